from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from momo.data_prep import quality
from momo.data_prep.quality import Measures, is_constant, mask_dead_lines, measure, structure_score

NO_ENDS = (-1, 65536)
FIELDS = ("valid_fraction", "quality", "noise", "blur", "stripes", "saturation", "stored_mean", "stored_std",
          "stored_min", "stored_max")  # fmt: skip


def fractal(side, seed, hurst=0.4, blur=0.0):
    """Self-affine surface of unit variance with a power-law spectrum, blurred by a Gaussian of `blur` pixels."""
    rng = np.random.default_rng(seed)
    wave = np.fft.fftfreq(2 * side)
    radius = np.hypot(wave[:, None], wave[None, :])
    radius[0, 0] = np.inf
    spectrum = np.fft.fft2(rng.normal(size=(2 * side, 2 * side))) * radius ** -(hurst + 1)
    radius[0, 0] = 0.0
    surface = np.fft.ifft2(spectrum * np.exp(-2 * (np.pi * blur * radius) ** 2)).real[:side, :side]
    return (surface - surface.mean()) / surface.std()


def stored(values, mean=20000.0, contrast=2000.0, dtype=np.uint16):
    return np.clip(np.rint(mean + contrast * values), 0, np.iinfo(dtype).max).astype(dtype)


def everywhere(tile):
    return np.ones(tile.shape, dtype=bool)


def whole(tile, ends=NO_ENDS):
    return measure(tile, everywhere(tile), ends)


def sections(length):
    return np.arange(length) * min(length, max(8, -(-length // 64))) // length


def line_share(tile, valid):
    """Stripes along the rows by the definition: products of all pairs of second differences in unlike sections."""
    second, used = tile[2:] - 2 * tile[1:-1] + tile[:-2], valid[2:] & valid[1:-1] & valid[:-2]
    part = sections(tile.shape[1])
    products = pairs = 0.0
    for line, use in zip(second, used):
        for p in set(part.tolist()):
            for q in set(part.tolist()) - {p}:
                first, other = line[use & (part == p)], line[use & (part == q)]
                products, pairs = products + first.sum() * other.sum(), pairs + first.size * other.size
    square = np.square(second[used])
    return 0.0 if pairs == 0 or square.sum() == 0 else min(1.0, max(0.0, products / pairs / square.mean()))


def reference(tile, valid, ends=NO_ENDS):
    """Every measure by its definition, with plain loops over pixels in float64."""
    x = tile.astype(np.float64)
    values = x[valid]
    height, width = x.shape
    semivariance = {}
    for lag in (1, 2, 4):
        squares = []
        for r in range(height):
            for c in range(width):
                for r2, c2 in ((r + lag, c), (r, c + lag)):
                    if r2 < height and c2 < width and valid[r, c] and valid[r2, c2]:
                        squares.append((x[r2, c2] - x[r, c]) ** 2)
        semivariance[lag] = np.mean(squares) / 2 if squares else math.inf
    mask = np.outer([1, -2, 1], [1, -2, 1])
    ripple = [
        abs((x[r : r + 3, c : c + 3] * mask).sum())
        for r in range(height - 2) for c in range(width - 2) if valid[r : r + 3, c : c + 3].all()
    ]  # fmt: skip
    near, far = semivariance[2] - semivariance[1], semivariance[4] - semivariance[2]
    seen = math.isfinite(semivariance[4]) and near > 4 * semivariance[1] / math.sqrt(values.size) and far > near
    return Measures(
        valid_fraction=valid.mean(),
        quality=max(0.0, 1 - semivariance[1] / values.var()),
        noise=math.sqrt(math.pi / 2) / 6 * (np.mean(ripple) if ripple else 0.0) / values.std(),
        blur=min(1.0, math.log2(far / near) / 2) if seen else 0.0,
        stripes=max(line_share(x, valid), line_share(x.T, valid.T)),
        saturation=np.mean((values <= ends[0]) | (values >= ends[1])),
        stored_mean=values.mean(),
        stored_std=values.std(),
        stored_min=values.min(),
        stored_max=values.max(),
        phash=0,
    )


def assert_close(found, expected, rtol=1e-5):
    for name in FIELDS:
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=rtol, abs=2e-6), name


CASES = {
    "terrain": lambda: stored(fractal(40, 0)),
    "bright and flat": lambda: stored(fractal(40, 1), 65000, 4),
    "8 bit": lambda: stored(fractal(40, 2), 120, 30, np.uint8),
    "two levels": lambda: (np.random.default_rng(3).random((40, 40)) < 0.01).astype(np.uint8) + np.uint8(7),
    "noise": lambda: np.random.default_rng(4).integers(0, 65536, (40, 40), dtype=np.uint16),
    "striped": lambda: stored(fractal(40, 5) + np.random.default_rng(5).normal(size=40)),
    "oblong": lambda: stored(fractal(48, 6)[:19]),
    "tall": lambda: stored(fractal(48, 6)[:, :11]),
}


@pytest.mark.parametrize("case", list(CASES))
def test_measures_are_those_defined(case):
    tile = CASES[case]()
    low, high = (int(v) for v in np.percentile(tile, [5, 90]))
    assert_close(whole(tile, (low, high)), reference(tile, everywhere(tile), (low, high)))


@pytest.mark.parametrize("case", list(CASES))
def test_measures_with_a_mask_are_those_defined(case):
    tile = CASES[case]()
    rng = np.random.default_rng(9)
    valid = rng.random(tile.shape) < 0.97
    valid[3:9, : tile.shape[1] // 2] = False
    expected = reference(tile, valid, (0, 60000))
    assert_close(measure(tile, valid, (0, 60000)), expected)
    spoilt = np.where(valid, tile, rng.integers(0, 255, tile.shape)).astype(tile.dtype)
    assert measure(spoilt, valid, (0, 60000)) == measure(tile, valid, (0, 60000)), "invalid pixels take no part"


@pytest.mark.parametrize("shape", [(224, 224), (64, 64), (33, 70), (600, 530)])
def test_both_paths_agree_on_a_tile_without_an_invalid_pixel(shape):
    tile = stored(fractal(max(shape), 0)[: shape[0], : shape[1]], 50000, 3000)
    room = quality._room(shape)
    quality._centre(room, tile, None, tile.size)
    fast = quality._whole_texture(room)
    quality._centre(room, tile, everywhere(tile), tile.size)
    careful = quality._masked_texture(room, everywhere(tile))
    for name in ("lag1", "lag2", "lag4", "ripple", "stripes"):
        assert getattr(fast, name) == pytest.approx(getattr(careful, name), rel=1e-5, abs=1e-7), name


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (2, 2), (3, 3), (4, 5), (5, 4), (7, 2), (8, 8)])
def test_tiny_tiles(shape):
    tile = np.random.default_rng(0).integers(0, 99, shape, dtype=np.uint8)
    tile.flat[0] += 100 if tile.size > 1 else 0
    found = whole(tile)
    if tile.size > 1:
        assert_close(found, reference(tile, everywhere(tile)))
    assert all(math.isfinite(getattr(found, name)) for name in FIELDS)
    lonely = np.zeros(shape, bool)
    lonely.flat[0] = True
    assert measure(tile, lonely, NO_ENDS).stored_std == 0.0


@pytest.mark.parametrize("masked", [False, True])
def test_the_widest_range_of_values(masked):
    """The largest numbers that 16 bit can lead to, in sections of the full 64 pixels and in a tile of 224."""
    rng = np.random.default_rng(0)
    alternating = (np.indices((8, 640)).sum(axis=0) % 2 * 65535).astype(np.uint16)
    rows = np.repeat(rng.integers(0, 2, (16, 1)) * 65535, 512, axis=1).astype(np.uint16)
    for tile in (alternating, rows, rng.integers(0, 2, (224, 224)).astype(np.uint16) * 65535):
        valid = rng.random(tile.shape) < (0.95 if masked else 2.0)
        assert_close(measure(tile, valid, (0, 65535)), reference(tile, valid, (0, 65535)))


def test_no_valid_pixel_no_contrast_and_no_neighbours():
    tile = stored(fractal(32, 0))
    assert measure(tile, np.zeros((32, 32), bool), NO_ENDS) == Measures(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
    flat = whole(np.full((32, 32), 65535, np.uint16), (0, 65535))
    assert flat == Measures(1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 65535.0, 0.0, 65535, 65535, 0)
    checked = np.indices((32, 32)).sum(axis=0) % 2 == 0
    sparse = measure(tile, checked, NO_ENDS)
    assert sparse.quality == sparse.noise == sparse.blur == sparse.stripes == 0.0 and sparse.stored_std > 0


def test_brightness_and_contrast_do_not_count():
    values = fractal(224, 3) + 0.1 * np.random.default_rng(3).normal(size=(224, 224))
    plain = whole(stored(values, 10000, 1000))
    for mean, contrast in ((40000, 5000), (60000, 300)):
        other = whole(stored(values, mean, contrast))
        for name in ("quality", "noise", "blur", "stripes"):
            assert getattr(other, name) == pytest.approx(getattr(plain, name), abs=2e-3), name
        assert other.stored_std == pytest.approx(contrast * values.std(), rel=1e-3)


@pytest.mark.parametrize("share", [0.05, 0.1, 0.3, 1.0])
def test_noise_is_the_share_that_was_added(share):
    smooth = fractal(224, 0, hurst=0.8, blur=2.0)
    noisy = smooth + share * np.random.default_rng(1).normal(size=smooth.shape)
    assert whole(stored(noisy)).noise == pytest.approx(share / noisy.std(), rel=0.03)
    assert whole(stored(smooth)).noise < 0.01


def test_white_noise():
    found = whole(stored(np.random.default_rng(0).normal(size=(224, 224))))
    assert found.noise == pytest.approx(1.0, rel=0.02)
    assert found.quality < 0.02 and found.blur == 0.0 and found.stripes < 0.005


@pytest.mark.parametrize("hurst", [0.1, 0.4, 0.7])
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_blur_grows_with_blur_and_hardly_with_noise(hurst, noise):
    found, clean = [], []
    for blur in (0.0, 0.5, 0.8, 1.2, 2.0, 3.0):
        surface = fractal(224, 1, hurst, blur)
        grain = np.random.default_rng(2).normal(size=surface.shape)
        clean.append(whole(stored(surface)).blur)
        found.append(whole(stored(surface + noise * grain)).blur)
    assert all(a < b for a, b in itertools.pairwise(found)), found
    assert found[0] == pytest.approx(hurst, abs=0.1), "a sharp self-affine surface has its Hurst exponent"
    assert found[-1] > 0.9
    assert max(abs(a - b) for a, b in zip(found, clean)) < 0.05


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("strength", [0.1, 0.5, 1.0])
def test_stripes_of_known_strength(turned, strength):
    rng = np.random.default_rng(0)
    image = rng.normal(size=(224, 224)) + strength * rng.normal(size=224)
    tile = stored(image if turned else image.T)
    expected = strength**2 / (1 + strength**2)
    assert whole(tile).stripes == pytest.approx(expected, rel=0.2)
    valid = np.random.default_rng(1).random(tile.shape) < 0.8
    assert measure(tile, valid, NO_ENDS).stripes == pytest.approx(expected, rel=0.25)


def test_terrain_has_no_stripes_and_pure_stripes_are_all():
    for hurst in (0.1, 0.4, 0.8):
        for blur in (0.0, 1.0, 3.0):
            assert whole(stored(fractal(224, 5, hurst, blur))).stripes < 0.06
    pure = np.tile(np.random.default_rng(0).integers(0, 255, 64, dtype=np.uint8), (64, 1))
    assert whole(pure).stripes == whole(np.ascontiguousarray(pure.T)).stripes == 1.0
    surface = fractal(224, 5)
    faint = surface + 0.1 * np.random.default_rng(0).normal(size=224)
    assert whole(stored(faint)).stripes > 10 * whole(stored(surface)).stripes + 0.1, "a tenth of the contrast shows"


def test_saturation():
    tile = np.full((10, 10), 100, np.uint8)
    tile[0], tile[1, :5] = 0, 255
    valid = everywhere(tile)
    valid[0, :5] = False
    assert measure(tile, valid, (0, 255)).saturation == pytest.approx(10 / 95)
    assert measure(tile, valid, (-1, 255)).saturation == pytest.approx(5 / 95)
    assert measure(tile, valid, (0, 65536)).saturation == pytest.approx(5 / 95)
    assert measure(tile, valid, NO_ENDS).saturation == 0.0
    assert measure(tile, valid, (100, 101)).saturation == 1.0
    assert measure(tile, valid, (200, 100)).saturation == 1.0, "a pixel counts once"


def test_is_constant():
    flat = np.full((50, 50), 7, np.uint16)
    assert is_constant(flat, everywhere(flat)) and is_constant(flat, np.zeros_like(everywhere(flat)))
    flat[40, 3] = 8
    valid = everywhere(flat)
    assert not is_constant(flat, valid)
    valid[40, 3] = False
    assert is_constant(flat, valid)
    assert is_constant(flat[:0], valid[:0])


def test_structure_score_is_the_quality_of_measure():
    tile = stored(fractal(64, 0) + 0.5 * np.random.default_rng(0).normal(size=(64, 64)))
    valid = np.random.default_rng(0).random(tile.shape) < 0.9
    assert measure(tile, valid, NO_ENDS).quality == pytest.approx(structure_score(tile, valid), rel=1e-5)
    assert whole(tile).quality == pytest.approx(structure_score(tile, everywhere(tile)), rel=1e-5)


_PRINT = """
import numpy as np
from momo.data_prep.quality import measure
rng = np.random.default_rng(0)
for side in (64, 224, 700):
    tile = np.clip(rng.normal(30000, 2000, (side, side)).cumsum(axis=0) * 0.01 + 30000, 0, 65535).astype(np.uint16)
    for valid in (np.ones(tile.shape, bool), rng.random(tile.shape) < 0.9):
        print(measure(tile, valid, (0, 65535)))
"""


def test_every_bit_is_the_same_with_one_and_many_threads_and_in_every_order():
    printed = []
    for threads in ("1", "2", "8"):
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": threads, "OMP_NUM_THREADS": threads}
        done = subprocess.run(
            [sys.executable, "-c", _PRINT], env=environment, capture_output=True, text=True, check=True
        )
        printed.append(done.stdout)
    assert printed[0].count("Measures(") == 6 and printed[0] == printed[1] == printed[2]
    tiles = [stored(fractal(64, seed)) for seed in range(6)] + [stored(fractal(40, 9))]
    alone = [whole(tile) for tile in tiles]
    assert [whole(tile) for tile in reversed(tiles)] == alone[::-1], "nothing is left over in the work space"
    found = {}
    threads = [
        threading.Thread(target=lambda i=i: found.update({i: [whole(tile) for tile in tiles * 5]})) for i in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(found[i] == alone * 5 for i in range(3)), "threads do not share work space"


def strip(height=96, width=400, seed=0, contrast=2000.0, mean=20000.0, dtype=np.uint16):
    side = max(height, width)
    return stored(fractal(side, seed)[:height, :width], mean, contrast, dtype)


def found_lines(raw, valid=None):
    valid = everywhere(raw) if valid is None else valid
    before = valid.copy()
    masked, rows, cols = mask_dead_lines(raw, valid)
    np.testing.assert_array_equal(valid, before, err_msg="the argument was changed")
    expected = valid & ~rows[:, None] & ~cols
    np.testing.assert_array_equal(masked, expected)
    assert (masked is valid) == (not rows.any() and not cols.any())
    return np.flatnonzero(rows).tolist(), np.flatnonzero(cols).tolist()


@pytest.mark.parametrize("value", [0, 20000, 65535])
@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_dead_lines_are_found(value, dtype):
    raw = strip().astype(dtype)
    raw[:, 77] = raw[:, 200:202] = raw[:, 0] = value
    raw[0] = raw[20] = raw[40:47] = raw[95] = value
    assert found_lines(raw) == ([0, 20, *range(40, 47), 95], [0, 77, 200, 201])
    assert found_lines(raw.T.copy())[0] == [0, 77, 200, 201], "wide gaps of columns are not dead columns"


def test_lines_that_cross_do_not_hide_each_other():
    raw = strip()
    raw[30] = 0
    raw[:, 90] = 65535
    assert found_lines(raw) == ([30], [90])
    raw[30] = 0
    assert found_lines(raw) == ([30], [90])


def test_dead_lines_within_the_valid_part_only():
    raw = strip()
    valid = np.zeros(raw.shape, bool)
    valid[10:80, 50:300] = True
    raw[~valid] = 0
    raw[33], raw[60, :] = 5, 5
    valid[60, 65:] = False
    raw[:, 120] = 5
    valid[:60, 310] = True  # a constant column without neighbours
    rows, cols = found_lines(raw, valid)
    assert rows == [33] and cols == [120], "15 valid pixels are too few to tell"
    valid[60, 65] = True
    assert found_lines(raw, valid) == ([33, 60], [120])


def test_every_second_line_dead():
    raw = strip()
    raw[1::2] = 0
    assert found_lines(raw)[0] == list(range(1, 96, 2))


def test_gap_at_the_end_of_a_strip_is_not_told_from_a_border():
    raw = strip()
    raw[:5] = 0
    assert found_lines(raw) == ([], [])
    raw[5:8], raw[50:52] = 0, 0
    raw[51] = 9
    assert found_lines(raw) == ([], []), "a lost packet has one value"


FALSE_ALARMS = {
    "flat": lambda: np.full((64, 300), 9, np.uint8),
    "rows": lambda: np.tile(np.arange(64, dtype=np.uint8)[:, None], (1, 300)),
    "columns": lambda: np.tile(np.arange(64, dtype=np.uint8), (300, 1)),
    "two halves": lambda: np.vstack([np.zeros((30, 300)), strip(34, 300, mean=99, contrast=9)]).astype(np.uint8),
    "low contrast": lambda: strip(64, 300, contrast=0.6, mean=100, dtype=np.uint8),
    "lowest contrast": lambda: strip(64, 300, contrast=0.2, mean=100, dtype=np.uint8),
    "smooth": lambda: stored(fractal(300, 1, 0.8, 4.0)[:64], 100, 3, np.uint8),
    "saturated": lambda: strip(64, 300, contrast=120, mean=250, dtype=np.uint8),
    "shadow": lambda: strip(64, 300, contrast=90, mean=5, dtype=np.uint8),
    "narrow": lambda: stored(fractal(200, 2, 0.8, 3.0)[:, :17], 100, 2, np.uint8),
    "narrow saturated": lambda: stored(fractal(200, 3, 0.8, 3.0)[:, :17], 240, 60, np.uint8),
    "under 16": lambda: np.where(np.arange(60)[:, None] % 9 == 0, 0, strip(60, 15)).astype(np.uint16),
    "saddle": lambda: np.outer(np.linspace(-9, 9, 65), np.linspace(-40, 40, 201)).astype(np.float32),
    "ramp": lambda: (np.arange(64)[:, None] * 1.5 + np.linspace(0, 1, 300)).astype(np.uint8),
    "steep ramp": lambda: (np.arange(64)[:, None] * 300.5 + np.linspace(0, 1, 300)).astype(np.uint16),
    "empty": lambda: np.zeros((0, 300), np.uint8),
}  # fmt: skip


@pytest.mark.parametrize("case", list(FALSE_ALARMS))
def test_no_dead_line_where_there_is_none(case):
    raw = FALSE_ALARMS[case]()
    assert found_lines(raw) == ([], [])
    assert found_lines(np.ascontiguousarray(raw.T)) == ([], [])


def test_no_dead_line_in_many_smooth_8_bit_strips():
    for seed in range(60):
        rng = np.random.default_rng(seed)
        surface = fractal(96, seed, rng.uniform(0.2, 0.9), rng.choice([0.0, 2.0, 5.0]))[:, : rng.integers(16, 96)]
        raw = stored(surface, rng.choice([0, 100, 255]), 10 ** rng.uniform(-1, 2), np.uint8)
        assert found_lines(raw) == ([], []), seed


@pytest.mark.parametrize("looks", [(1, 2), (8, 64), (400, 400)])
def test_constant_rows_equal_the_plain_definition(monkeypatch, looks):
    from momo.data_prep import dead_lines

    monkeypatch.setattr(dead_lines, "_FIRST_LOOK", looks[0])
    monkeypatch.setattr(dead_lines, "_SECOND_LOOK", looks[1])
    for seed in range(20):
        rng = np.random.default_rng(seed)
        raw = rng.integers(0, 2, (40, 120)).astype(np.uint8)
        raw[rng.integers(0, 40, 12)] = 1
        valid = rng.random(raw.shape) < rng.uniform(0.05, 1.0)
        valid[::7] = True
        plain = [row[use].size >= 16 and len(set(row[use].tolist())) == 1 for row, use in zip(raw, valid)]
        assert dead_lines._constant_rows(raw, valid).tolist() == plain
        assert dead_lines._constant_rows(raw.T, valid.T).tolist() == [
            column[use].size >= 16 and len(set(column[use].tolist())) == 1 for column, use in zip(raw.T, valid.T)
        ]
