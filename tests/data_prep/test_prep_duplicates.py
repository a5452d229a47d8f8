from __future__ import annotations

import time

import numpy as np
import pytest

pytest.importorskip("shapely", reason="shapely is not installed (extra prep)")

from momo.data_prep import duplicates
from momo.data_prep.duplicates import hash_neighbours, remove_alike, remove_overlapping
from momo.data_prep.phash import hash_distance
from tests.data_prep.test_prep_overlap import flat_shares, tilted


def hashes(count, seed, families=12):
    """Families of hashes up to 5 bits from their first, some identical, some differing in the outermost bits."""
    rng = np.random.default_rng(seed)
    first = rng.integers(0, 2**64, families, dtype=np.uint64)
    found = first[rng.integers(0, families, count)]
    for _ in range(5):
        flip = rng.random(count) < 0.2
        found = np.where(flip, found ^ (np.uint64(1) << rng.integers(0, 64, count, dtype=np.uint64)), found)
    found[:2] = [0, 2**64 - 1]
    found[2:4] = [1 | 1 << 63, 2**64 - 1 - (1 << 32)]
    return found


@pytest.mark.parametrize("distance", [0, 1, 2, 3])
@pytest.mark.parametrize("portion", [1 << 21, 50])
def test_hash_neighbours_equal_a_brute_force(distance, portion, monkeypatch):
    monkeypatch.setattr(duplicates, "_PAIRS", portion)
    mine, others = hashes(400, 1), np.concatenate([hashes(150, 1)[::-1], hashes(100, 2)])
    within = hash_distance(mine[:, None], mine[None]) <= distance
    i, j = hash_neighbours(mine, distance)
    expected = np.argwhere(np.triu(within, 1))
    np.testing.assert_array_equal(np.stack([i, j], axis=1), expected)
    across = np.argwhere(hash_distance(mine[:, None], others[None]) <= distance)
    np.testing.assert_array_equal(np.stack(hash_neighbours(mine, distance, others), axis=1), across)
    assert len(expected) > 200 and len(across) > 200


def test_no_hashes():
    none, one = np.empty(0, dtype=np.uint64), np.zeros(1, dtype=np.uint64)
    for a, b in ((none, None), (one, None), (none, one), (one, none)):
        assert [len(part) for part in hash_neighbours(a, 3, b)] == [0, 0]
    assert len(remove_alike(np.empty(0, dtype=np.int64), one, 3).tile) == 0
    assert len(remove_overlapping(np.empty(0, dtype=np.int64), np.empty((0, 8)), none, 0.5).tile) == 0


def greedy(best_first, explains):
    """The plain rule: from the best to the worst, a tile goes when a kept one explains it."""
    kept, removed = [], {}
    for tile in best_first.tolist():
        by = next((k for k in kept if explains(tile, k)), None)
        if by is None:
            kept.append(tile)
        else:
            removed[tile] = by
    return removed


@pytest.mark.parametrize("distance", [0, 1, 3])
@pytest.mark.parametrize("batch", [256, 16])
def test_tiles_that_look_alike_equal_the_plain_rule(distance, batch, monkeypatch):
    monkeypatch.setattr(duplicates, "_FIRST_BATCH", batch)
    phash = hashes(500, 3)
    best_first = np.random.default_rng(0).permutation(500)[:450]
    removed = remove_alike(best_first, phash, distance)
    expected = greedy(best_first, lambda tile, kept: hash_distance(phash[tile], phash[kept]) <= distance)
    assert dict(zip(removed.tile.tolist(), removed.kept.tolist())) == expected and len(expected) > 50
    assert (np.diff(removed.tile) > 0).all()
    np.testing.assert_array_equal(removed.value, hash_distance(phash[removed.tile], phash[removed.kept]))
    assert not set(removed.tile.tolist()) & set(removed.kept.tolist()), "what explains is never removed itself"


@pytest.mark.parametrize("limit", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("batch", [256, 16])
def test_overlapping_tiles_equal_the_plain_rule(limit, batch, monkeypatch):
    monkeypatch.setattr(duplicates, "_FIRST_BATCH", batch)
    corners = squares(250, 0.12, [0.02, 0.04], 5)
    share, _ = flat_shares(corners, corners)
    product = np.random.default_rng(1).integers(0, 4, 250)
    best_first = np.random.default_rng(2).permutation(250)
    removed = remove_overlapping(best_first, tilted(corners, 180.0, 60.0), product, limit)
    expected = greedy(best_first, lambda tile, kept: product[tile] != product[kept] and share[tile, kept] > limit)
    assert dict(zip(removed.tile.tolist(), removed.kept.tolist())) == expected and len(expected) > 10
    np.testing.assert_allclose(removed.value, share[removed.tile, removed.kept], atol=1e-5)


def squares(count, spread, sizes, seed):
    """Corners of turned squares near (0, 0), degrees; shape (count, 8)."""
    rng = np.random.default_rng(seed)
    side, angle = rng.choice(sizes, count), rng.uniform(0, 2 * np.pi, count)
    reach = side[:, None] / np.sqrt(2) * np.ones(4)
    turn = angle[:, None] - np.arange(4) * np.pi / 2
    corners = np.stack([reach * np.cos(turn), reach * np.sin(turn)], axis=2)
    return (rng.uniform(-spread, spread, (count, 1, 2)) + corners).reshape(count, 8)


def expected_pairs(removed):
    return list(zip(removed.tile.tolist(), removed.kept.tolist()))


def test_tiles_of_one_product_may_overlap():
    tile = np.array([0.0, 1, 1, 1, 1, 0, 0, 0])
    corners = np.stack([tile, tile, tile])
    order = np.array([2, 1, 0])
    assert len(remove_overlapping(order, corners, np.zeros(3, int), 0.5).tile) == 0
    removed = remove_overlapping(order, corners, np.array([0, 0, 1]), 0.5)
    assert expected_pairs(removed) == [(0, 2), (1, 2)] and removed.value == pytest.approx([1.0, 1.0])


def test_a_small_tile_in_a_large_one_goes_and_not_the_other_way():
    small, large = [0.4, 0.6, 0.6, 0.6, 0.6, 0.4, 0.4, 0.4], [0.0, 1, 1, 1, 1, 0, 0, 0]
    corners, product = np.array([small, large]), np.array([0, 1])
    assert expected_pairs(remove_overlapping(np.array([1, 0]), corners, product, 0.5)) == [(0, 1)]
    assert expected_pairs(remove_overlapping(np.array([0, 1]), corners, product, 0.5)) == []


def test_a_chain_of_neighbours_keeps_every_other_tile():
    phash = np.array([0b0, 0b111, 0b111111, 0b111111111], dtype=np.uint64)
    assert expected_pairs(remove_alike(np.arange(4), phash, 3)) == [(1, 0), (3, 2)]


def test_many_identical_tiles_are_removed_fast():
    """60,000 tiles of near hashes are 1.8e9 pairs, and 5,000 on one piece of ground 1.2e7."""
    started = time.perf_counter()
    phash = np.full(60_000, 77, dtype=np.uint64)
    phash[::3] ^= np.uint64(1)
    removed = remove_alike(np.arange(60_000), phash, 3)
    assert len(removed.tile) == 59_999 and (removed.kept == 0).all()
    corners = np.tile(np.array([0.0, 0.01, 0.01, 0.01, 0.01, 0, 0, 0]), (5000, 1))
    removed = remove_overlapping(np.arange(5000), corners, np.arange(5000), 0.5)
    assert len(removed.tile) == 4999 and (removed.kept == 0).all()
    assert time.perf_counter() - started < 20


def test_tiles_that_only_touch_are_no_duplicates_even_at_a_limit_of_zero():
    step = np.arange(6) * 0.01 + 3.3
    grid = np.array([[x, y + 0.01, x + 0.01, y + 0.01, x + 0.01, y, x, y] for x in step for y in step])
    assert not len(remove_overlapping(np.arange(36), grid, np.arange(36), 0.0).tile)
