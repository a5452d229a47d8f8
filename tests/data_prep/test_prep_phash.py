from __future__ import annotations

import numpy as np
import pytest
from scipy.fft import dctn
from scipy.ndimage import gaussian_filter, shift

from momo.data_prep.phash import _bit_count, hash_distance, perceptual_hash
from momo.data_prep.quality import measure

NONE = (-1, 1 << 20)


def ground(size: int, seed: int) -> np.ndarray:
    field = gaussian_filter(np.random.default_rng(seed).normal(size=(size + 32, size + 32)), 3.0)[16:-16, 16:-16]
    return np.rint(20000 + 2000 * field / field.std()).astype(np.uint16)


def hash_of(tile: np.ndarray, valid: np.ndarray | None = None) -> int:
    return measure(tile, np.ones(tile.shape, bool) if valid is None else valid, NONE).phash


def distance(a: int, b: int) -> int:
    return int(hash_distance(a, b))


def area_average(tile: np.ndarray) -> np.ndarray:
    """Means over 32 x 32 equal cells: every pixel is repeated 32 times along each axis, so cells hold whole ones."""
    height, width = tile.shape
    for axis, side in ((0, height), (1, width)):
        tile = np.repeat(tile, 32, axis=axis)
        tile = np.stack([part.mean(axis=axis) for part in np.split(tile, 32, axis=axis)], axis=axis)
        assert tile.shape[axis] == 32 and side >= 1
    return tile


@pytest.mark.parametrize("shape", [(8, 8), (32, 32), (48, 48), (50, 37), (224, 224)])
def test_bits_are_those_of_a_float64_transform(shape):
    for seed in range(3):
        tile = ground(max(shape), seed)[: shape[0], : shape[1]]
        centred = tile - np.rint(tile.astype(np.float64).mean())
        coefficients = dctn(area_average(centred), type=2)[1:9, 1:9].ravel()
        margin = coefficients - np.median(coefficients)
        sure = np.abs(margin) > 2e-6 * np.abs(coefficients).max()
        bits = np.array([int(bit) for bit in f"{perceptual_hash(centred):064b}"], bool)
        np.testing.assert_array_equal(bits[sure], (margin > 0)[sure])
        assert min(shape) < 32 or (sure.sum() >= 60 and bits.sum() == 32)
        assert hash_of(tile) == perceptual_hash(centred)


def test_bit_order_is_down_then_across():
    """A wave `v` down and `u` across alone is the one coefficient above the median of zeros, up to rounding."""
    place = (2 * np.arange(32) + 1) * np.pi / 64
    for v, u in ((1, 1), (1, 8), (3, 2), (8, 8)):
        wave = 1000 * np.outer(np.cos(v * place), np.cos(u * place))
        assert perceptual_hash(wave) >> (63 - (8 * (v - 1) + u - 1)) & 1
        assert not perceptual_hash(-wave) >> (63 - (8 * (v - 1) + u - 1)) & 1


@pytest.mark.parametrize("size", [32, 64, 224])
def test_near_duplicates_are_a_few_bits_apart(size):
    for seed in range(5):
        tile = ground(size, seed)
        rng, found = np.random.default_rng(seed), hash_of(tile)
        noisy = (tile + rng.normal(0, 100, tile.shape)).astype(np.uint16)
        assert distance(found, hash_of(noisy)) <= 4
        assert distance(found, hash_of((tile // 257).astype(np.uint8))) <= 4, "in 8 bit"
        bent = np.rint(65535 * (tile / 65535.0) ** 0.8).astype(np.uint16)
        assert distance(found, hash_of(bent)) <= 6, "another stretch"
        if size == 224:
            moved = np.rint(shift(tile.astype(np.float64), (1, 1), order=1, mode="nearest")).astype(np.uint16)
            assert distance(found, hash_of(moved)) <= 10, "one pixel beside"
            holes = rng.random(tile.shape) > 0.02
            assert distance(found, hash_of(tile, holes)) <= 6, "invalid pixels strewn in"


def test_other_ground_and_other_orientation_are_about_32_bits_apart():
    tiles = [ground(64, seed) for seed in range(40)]
    hashes = np.array([hash_of(tile) for tile in tiles], np.uint64)
    every = hash_distance(hashes[:, None], hashes)[np.triu_indices(40, 1)]
    assert every.mean() == pytest.approx(32, abs=1.0) and every.min() >= 12
    for turned in (np.rot90, np.fliplr, np.flipud, np.transpose):
        apart = hash_distance(hashes, np.array([hash_of(turned(tile)) for tile in tiles], np.uint64))
        assert apart.mean() == pytest.approx(32, abs=4.0) and apart.min() >= 8, turned.__name__


def test_profiles_of_rows_and_columns_do_not_enter():
    """So a shading gradient across a detector does not make unlike tiles alike, nor like tiles unlike."""
    tile = ground(224, 0)
    shaded = tile + np.linspace(0, 3000, 224).astype(np.uint16)[:, None]
    assert distance(hash_of(tile), hash_of(shaded + np.linspace(0, 3000, 224).astype(np.uint16))) <= 2


def test_values_of_invalid_pixels_do_not_enter():
    tile, valid = ground(64, 0), np.ones((64, 64), bool)
    valid[10:30, 20:50] = False
    found = hash_of(tile, valid)
    assert found == hash_of(np.where(valid, tile, 0).astype(np.uint16), valid) != hash_of(tile)


def test_constant_tiles_have_hash_0_and_contrast_does_not_count():
    assert perceptual_hash(np.zeros((32, 32), np.float32)) == 0
    centred = ground(64, 1).astype(np.float64) - 20000
    assert perceptual_hash(centred) == perceptual_hash(centred / 512) != perceptual_hash(-centred)


def test_a_tile_large_enough_for_many_threads_has_the_same_hash():
    threadpoolctl = pytest.importorskip("threadpoolctl")
    tile = np.random.default_rng(0).normal(size=(600, 700))
    found = set()
    for number in (1, 2, 4):
        with threadpoolctl.threadpool_limits(number):
            found.add(perceptual_hash(tile))
    assert len(found) == 1


def test_distance_is_the_number_of_differing_bits():
    rng = np.random.default_rng(0)
    words = np.concatenate([
        rng.integers(0, 2**64, 400, dtype=np.uint64), np.array([0, 1, 2**63, 2**64 - 1, 0x5555555555555555], np.uint64)
    ])  # fmt: skip
    expected = np.array([[(int(a) ^ int(b)).bit_count() for b in words[-40:]] for a in words], np.uint8)
    found = hash_distance(words[:, None], words[-40:])
    assert found.dtype == np.uint8 and found.max() == 64
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(_bit_count(words[:, None] ^ words[-40:]), expected)
    assert distance(2**64 - 1, 0) == bin(2**64 - 1).count("1") == 64 and distance(5, 5) == 0
    assert int(_bit_count(np.uint64(2**64 - 1))) == 64
