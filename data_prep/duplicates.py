"""Tiles that show what another tile shows already: footprints over each other, and near perceptual hashes.

Both rules go through the tiles from the best to the worst: a tile goes when a tile kept before it explains it. So of a
pair never both go, and the outcome does not depend on the order of the table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt

from .overlap import overlapping_pairs, quadrilaterals
from .phash import hash_distance

Ints = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]
PairFinder = Callable[[Ints, Ints | None], tuple[Ints, Ints, npt.NDArray[Any]]]
_ROUNDING = 1e-6  # share of ground; tiles that touch may share less by rounding
_FIRST_BATCH = 256
_PAIRS = 1 << 21  # candidate pairs in memory


@dataclass(frozen=True)
class Removed:
    """Tiles that go, in order of their numbers.

    Attributes:
        tile: Their numbers.
        kept: The kept tile that explains each: the best of those that do.
        value: Share of the tile's ground that the kept one has, or distance of the hashes in bits.
    """

    tile: Ints
    kept: Ints
    value: npt.NDArray[np.float64]


def remove_overlapping(
    best_first: Ints, corners_N8: npt.NDArray[np.float64], product_N: npt.NDArray[Any], max_overlap: float
) -> Removed:
    """Finds tiles of whose ground a better tile of another product shows more than a share.

    Tiles of one product may overlap as the stride says.

    Args:
        best_first: Numbers of the tiles to look at, best first.
        corners_N8: Corners of all tiles, degrees; finite for those to look at.
        product_N: Product of all tiles.
        max_overlap: Largest share allowed, 0..1.
    """
    limit = max(max_overlap, _ROUNDING)

    def pairs(mine: Ints, others: Ints | None) -> tuple[Ints, Ints, npt.NDArray[Any]]:
        first = quadrilaterals(corners_N8[mine])
        second = None if others is None else quadrilaterals(corners_N8[others])
        groups = None if others is None else product_N[others]
        found = overlapping_pairs(first, second, limit, group_a=product_N[mine], group_b=groups)
        if others is not None:
            return found.i, found.j, found.share_i
        worse = found.share_j > limit  # i < j, so j is the worse of the two
        return found.j[worse], found.i[worse], found.share_j[worse]

    return _remove(best_first, pairs)


def remove_alike(best_first: Ints, phash_N: Hashes, max_distance: int) -> Removed:
    """Finds tiles whose perceptual hash is near that of a better tile.

    Args:
        best_first: Numbers of the tiles to look at, best first.
        phash_N: Hashes of all tiles.
        max_distance: Hashes this near or nearer are duplicates, bits 0..3.
    """
    # The best tile of each hash stands for all: what explains it, itself or a kept one near it, explains the others.
    _, first_U, inverse = np.unique(phash_N[best_first], return_index=True, return_inverse=True)
    stand_in = best_first[first_U][inverse.reshape(-1)]

    def pairs(mine: Ints, others: Ints | None) -> tuple[Ints, Ints, npt.NDArray[Any]]:
        i, j = hash_neighbours(phash_N[mine], max_distance, None if others is None else phash_N[others])
        i, j = (j, i) if others is None else (i, j)
        return i, j, hash_distance(phash_N[mine[i]], phash_N[mine[j] if others is None else others[j]])

    near = _remove(best_first[np.sort(first_U)], pairs)
    position = np.minimum(np.searchsorted(near.tile, stand_in), max(0, len(near.tile) - 1))
    explained = near.tile[position] == stand_in if len(near.tile) else np.zeros(len(stand_in), dtype=bool)
    kept = np.where(explained, near.kept[position] if len(near.tile) else -1, stand_in)
    value = np.where(explained, near.value[position] if len(near.tile) else 0.0, 0.0)
    gone = np.flatnonzero(kept != best_first)
    gone = gone[np.argsort(best_first[gone])]
    return Removed(best_first[gone], kept[gone], value[gone])


def _remove(best_first: Ints, pairs: PairFinder) -> Removed:
    """Goes through tiles in order and removes those that a kept one explains.

    Batches double: each is compared with all kept before, then what is left of it with itself. So where many tiles
    show the same, most go against the few kept ones, and the pairs stay about as many as the tiles.

    Args:
        best_first: Numbers of tiles.
        pairs: Returns positions i, j and a value where tile j of the second list explains tile i of the first; with
            None as second list, within the first, for j before i.
    """
    removed: list[tuple[Ints, Ints, npt.NDArray[Any]]] = []
    kept = best_first[:0]
    start = 0
    while start < len(best_first):
        batch = best_first[start : max(_FIRST_BATCH, 2 * start)]
        start += len(batch)
        if len(kept):
            i, j, value = _first_only(*pairs(batch, kept))
            removed.append((batch[i], kept[j], value))
            batch = np.delete(batch, i)
        i, j, value = _greedy(len(batch), *pairs(batch, None))
        removed.append((batch[i], batch[j], value))
        kept = np.concatenate([kept, np.delete(batch, i)])
    if not removed:
        return Removed(best_first[:0], best_first[:0], np.empty(0))
    tile, by, value = (np.concatenate([part[k] for part in removed]) for k in range(3))
    order = np.argsort(tile)
    return Removed(tile[order], by[order], value[order].astype(np.float64))


def _first_only(i: Ints, j: Ints, value: npt.NDArray[Any]) -> tuple[Ints, Ints, npt.NDArray[Any]]:
    order = np.lexsort((j, i))
    _, first = np.unique(i[order], return_index=True)
    return i[order][first], j[order][first], value[order][first]


def _greedy(count: int, i: Ints, j: Ints, value: npt.NDArray[Any]) -> tuple[Ints, Ints, npt.NDArray[Any]]:
    """Returns the pairs that remove i because of a kept j < i, in one pass over the pairs by j."""
    gone = bytearray(count)
    order = np.lexsort((i, j))
    chosen = []
    for place, worse, better in zip(order.tolist(), i[order].tolist(), j[order].tolist(), strict=True):
        if not gone[better] and not gone[worse]:
            gone[worse] = 1
            chosen.append(place)
    found = np.array(chosen, dtype=np.int64)
    return i[found], j[found], value[found]


def hash_neighbours(phash_N: Hashes, max_distance: int, others_M: Hashes | None = None) -> tuple[Ints, Ints]:
    """Returns all pairs of 64-bit hashes that differ in at most a few bits; exact.

    The bits are cut into max_distance + 3 blocks; hashes that near agree in at least three of them, so they stand in
    one bucket of the table sorted by those three, for one of the choices of three (Manku, Jain, Das Sarma 2007,
    "Detecting near-duplicates for web crawling", WWW, section 3.1, which has 20 tables for distance 3). Each bucket is
    compared in full, in portions of bounded memory.

    Args:
        phash_N: Hashes.
        max_distance: Most bits that differ, 0..3.
        others_M: Hashes to compare with; None compares `phash_N` with itself.

    Returns:
        Numbers i and j of the pairs, in order; i < j within one list.
    """
    blocks = np.array_split(np.arange(64, dtype=np.uint64), max_distance + 3)
    mask_B = [np.bitwise_or.reduce(np.uint64(1) << block) for block in blocks]
    other_M = phash_N if others_M is None else others_M
    found: list[tuple[Ints, Ints]] = []
    for table in combinations(range(len(mask_B)), 3):
        mask = mask_B[table[0]] | mask_B[table[1]] | mask_B[table[2]]
        # A pair that agrees in more blocks stands in several tables; it is taken in the first of them only.
        earlier = [mask_B[k] for k in range(table[2]) if k not in table]
        for i, j in _same_bucket(phash_N & mask, other_M & mask):
            if others_M is None:
                i, j = i[i < j], j[i < j]
            near = hash_distance(phash_N[i], other_M[j]) <= max_distance
            i, j = i[near], j[near]
            differing = phash_N[i] ^ other_M[j]
            fresh = np.ones(len(i), dtype=bool)
            for block in earlier:
                fresh &= (differing & block) != 0
            found.append((i[fresh], j[fresh]))
    i, j = (np.concatenate([np.empty(0, np.int64), *(pair[k] for pair in found)]) for k in range(2))
    order = np.lexsort((j, i))
    return i[order], j[order]


def _same_bucket(key_N: Hashes, key_M: Hashes) -> Iterator[tuple[Ints, Ints]]:
    """Yields all pairs of equal keys, about `_PAIRS` at a time."""
    by_key_N, by_key_M = np.argsort(key_N, kind="stable"), np.argsort(key_M, kind="stable")
    sorted_M = key_M[by_key_M]
    left = np.searchsorted(sorted_M, key_N[by_key_N], side="left")
    count = np.searchsorted(sorted_M, key_N[by_key_N], side="right") - left
    hit = np.flatnonzero(count)
    by_key_N, left, count = by_key_N[hit], left[hit], count[hit]
    total = np.concatenate([[0], np.cumsum(count)])
    start = 0
    while start < len(count):
        end = max(start + 1, int(np.searchsorted(total, total[start] + _PAIRS, side="right")) - 1)
        some = count[start:end]
        local = np.arange(total[end] - total[start]) - np.repeat(total[start:end] - total[start], some)
        yield np.repeat(by_key_N[start:end], some), by_key_M[np.repeat(left[start:end], some) + local]
        start = end
