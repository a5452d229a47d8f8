"""A 64-bit perceptual hash of a tile, to find near-duplicates, and the distance of such hashes."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

_REDUCED = 32
_SIDE = 8
# OpenBLAS works with several threads above 2^18 multiplications, and the last bits then depend on their number.
_ONE_THREAD = 2**18


def perceptual_hash(centred_HW: npt.NDArray[Any]) -> int:
    """Returns the 64-bit DCT hash of a tile.

    The tile is reduced to 32 x 32 by area averaging; of its two-dimensional DCT-II the coefficients 1 to 8 of each
    axis are kept, so neither the DC term nor a pure row or column profile enters; bit 8 (v - 1) + u - 1, counted
    from the most significant, is 1 where coefficient (v, u), v down and u across, is above the median of the 64
    (Zauner 2010, "Implementation and Benchmarking of Perceptual Image Hash Functions", section 3.2.1, and his pHash).
    Brightness and a positive factor of contrast do not change it. Tiles of unlike ground differ in about 32 bits.

    Both steps are linear, so they are done as C_H X C_W^T with C (8 x side) the DCT times the area averaging.
    float32 throughout: a coefficient within about 1e-6 of the median, relative to the largest, may fall either way,
    but always the same way for the same pixels.

    Args:
        centred_HW: Tile less (about) the mean of its valid pixels, 0 where invalid; any linear unit, shape, and
            size. Below 8 pixels a side the bits are no longer independent.

    Returns:
        The hash, 0..2^64 - 1; 0 for a constant tile.
    """
    height, width = centred_HW.shape
    tile_HW = np.asarray(centred_HW, dtype=np.float32)
    down_H8, across_W8 = _basis(height), _basis(width)
    rows = max(1, _ONE_THREAD // (_SIDE * width))
    reduced_H8 = np.empty((height, _SIDE), dtype=np.float32)
    for row in range(0, height, rows):
        np.matmul(tile_HW[row : row + rows], across_W8, out=reduced_H8[row : row + rows])
    coefficients = np.matmul(down_H8.T, reduced_H8).ravel()
    ordered = np.sort(coefficients)
    middle = (ordered[ordered.size // 2 - 1] + ordered[ordered.size // 2]) / 2
    return int.from_bytes(np.packbits(coefficients > middle).tobytes(), "big")


@lru_cache(maxsize=32)
def _basis(side: int) -> npt.NDArray[np.float32]:
    """Returns area averaging of `side` pixels to 32 cells followed by DCT-II waves 1..8; shape (side, 8)."""
    edges = np.arange(_REDUCED + 1) * (side / _REDUCED)
    pixels = np.arange(side)
    overlap = np.minimum(edges[1:, None], pixels + 1.0) - np.maximum(edges[:-1, None], pixels)
    averaging = np.clip(overlap, 0.0, None) / (side / _REDUCED)
    waves = np.arange(1, _SIDE + 1)[:, None]
    cosines = np.cos(np.pi * waves * (2 * np.arange(_REDUCED) + 1) / (2 * _REDUCED))
    basis = np.ascontiguousarray((cosines @ averaging).T.astype(np.float32))
    basis.flags.writeable = False
    return basis


def hash_distance(a: npt.ArrayLike, b: npt.ArrayLike) -> npt.NDArray[np.uint8]:
    """Returns the Hamming distance of 64-bit hashes, in bits, 0..64.

    Args:
        a: Hashes as uint64 (or Python integers 0..2^64 - 1), any shape.
        b: Hashes that broadcast against `a`.

    Returns:
        Distances of the broadcast shape.
    """
    differing = np.bitwise_xor(np.asarray(a, dtype=np.uint64), np.asarray(b, dtype=np.uint64))
    if hasattr(np, "bitwise_count"):
        return np.asarray(np.bitwise_count(differing), dtype=np.uint8)
    return _bit_count(differing)


def _bit_count(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint8]:
    """Counts ones by adding neighbouring fields of 1, 2, 4, then 8 bits (numpy below 2.0 has no bitwise_count)."""
    ones, pairs, nibbles = (np.uint64(mask) for mask in (0x5555555555555555, 0x3333333333333333, 0x0F0F0F0F0F0F0F0F))
    words = words - ((words >> np.uint64(1)) & ones)
    words = (words & pairs) + ((words >> np.uint64(2)) & pairs)
    words = (words + (words >> np.uint64(4))) & nibbles
    # The eight byte counts are added by shifts: a multiplication would overflow, which numpy warns about for scalars.
    for shift in (8, 16, 32):
        words = words + (words >> np.uint64(shift))
    return np.asarray(words & np.uint64(0x7F), dtype=np.uint8)
