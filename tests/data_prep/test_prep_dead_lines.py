from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from momo.data_prep.dead_lines import mask_dead_lines
from tests.data_prep.products import terrain


def ground(height: int, width: int, seed: int = 0, spread: float = 800.0, sigma: float = 3.0) -> np.ndarray:
    field = gaussian_filter(np.random.default_rng(seed).normal(size=(height, width)), sigma)
    return 20000 + spread * field / field.std()


def found(raw: np.ndarray, valid: np.ndarray | None = None) -> tuple[list[int], list[int]]:
    """Dead rows and columns, after checking that the validity says the same."""
    valid = np.ones(raw.shape, bool) if valid is None else valid
    before, levels = valid.copy(), raw.copy()
    left, rows, cols = mask_dead_lines(raw, valid)
    np.testing.assert_array_equal(left, before & ~rows[:, None] & ~cols)
    np.testing.assert_array_equal(valid, before)
    np.testing.assert_array_equal(raw, levels)
    assert rows.shape == raw.shape[:1] and cols.shape == raw.shape[1:]
    assert (left is valid) == (not rows.any() and not cols.any())
    return np.flatnonzero(rows).tolist(), np.flatnonzero(cols).tolist()


def is_constant(line: np.ndarray, mask: np.ndarray) -> bool:
    return mask.sum() >= 16 and len(set(line[mask].tolist())) == 1


def dead_rows(raw: np.ndarray, valid: np.ndarray, longest: int | None) -> list[int]:
    """The rule as `mask_dead_lines` states it, pixel by pixel."""
    height = len(raw)
    constant = [is_constant(raw[row], valid[row]) for row in range(height)]
    tolerance, dead, row = 0 if raw.dtype.kind == "f" else 1, [], 0
    while row < height:
        stop = row
        while stop < height and constant[stop]:
            stop += 1
        if stop == row:
            row += 1
            continue
        values = {float(raw[line][valid[line]][0]) for line in range(row, stop)}
        answers = []
        for edge, step in ((row, -1), (stop - 1, 1)):
            near = edge + step
            for distance in range(1, 9):
                far = near + distance * step
                if not 0 <= far < height or constant[far]:
                    continue
                used = valid[edge] & valid[near] & valid[far]
                if used.sum() >= 16:
                    c, a, a2 = (raw[line][used].astype(float) for line in (edge, near, far))
                    answers.append(np.mean(np.abs(c - a) > 2 * np.abs(a - a2) + tolerance) >= 0.5)
                    break
        alike = len(values) == 1 and (longest is None or stop - row <= longest)
        if alike and answers and all(answers) and (len(answers) == 2 or stop - row == 1):
            dead += range(row, stop)
        row = stop
    return dead


def by_the_rule(raw: np.ndarray, valid: np.ndarray) -> tuple[list[int], list[int]]:
    valid = valid.copy()
    rows = dead_rows(raw, valid, None)
    valid[rows] = False
    cols = dead_rows(raw.T, valid.T, 2)
    valid[:, cols] = False
    return sorted({*rows, *(dead_rows(raw, valid, None) if cols else [])}), cols


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "float32"])
def test_random_strips_follow_the_stated_rule(dtype):
    rng, dead, alive = np.random.default_rng(5), 0, 0
    for number in range(60):
        height, width = (int(side) for side in rng.integers(12, 60, 2))
        raw = ground(height, width, number, spread=rng.choice([1.0, 5.0, 30.0]))
        raw = (raw - 20000 + 120).round().astype(dtype) if dtype != "float32" else raw.astype(dtype)
        valid = rng.random(raw.shape) > rng.choice([0.0, 0.1, 0.6])
        for _ in range(rng.integers(1, 5)):
            row, col = int(rng.integers(height)), int(rng.integers(width))
            value = rng.choice([0, 120, 118, 250])
            if rng.random() < 0.5:
                raw[row : row + int(rng.integers(1, 7)), : width if rng.random() < 0.7 else 9] = value
            else:
                raw[:, col : col + int(rng.integers(1, 4))] = value
        rows, cols = found(raw, valid)
        assert (rows, cols) == by_the_rule(raw, valid)
        dead, alive = dead + bool(rows or cols), alive + (not rows and not cols)
    assert dead > 10 and alive > 10, "both cases were met"


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int32", "float32"])
def test_rows_columns_and_lost_packets(dtype):
    raw = ground(96, 300)
    raw = ((raw - raw.min()) / np.ptp(raw) * 200 + 30).astype(dtype)
    assert found(raw) == ([], [])
    raw[20] = 0
    raw[40:52] = 0
    raw[70] = 255
    raw[:, 100] = 15
    raw[:, 200:202] = 0
    assert found(raw) == ([20, *range(40, 52), 70], [100, 200, 201])


def test_lines_that_cross_do_not_hide_each_other():
    raw = ground(64, 64).astype(np.uint16)
    raw[:, 30] = 65535
    raw[12] = 0
    raw[12, 30] = 65535  # the detector is stuck at its own level in the lost line too
    raw[50] = 0
    assert found(raw) == ([12, 50], [30])


def test_the_ends_of_a_strip():
    raw = ground(64, 200).astype(np.uint16)
    raw[0] = raw[-1] = 0
    raw[:, 0] = 0
    assert found(raw) == ([0, 63], [0])
    raw = ground(64, 200).astype(np.uint16)
    raw[:3] = 0  # with one side alone several lines could be shadow as well
    assert found(raw) == ([], [])


def test_invalid_pixels_take_no_part():
    raw, (y, x) = ground(80, 400).astype(np.uint16), np.mgrid[:80, :400]
    valid = (x > 2 * y) & (x < 300 + y)
    raw[~valid] = 9
    assert found(raw, valid) == ([], [])
    raw[33, valid[33]] = 500
    raw[valid & (x == 200)] = 500
    assert found(raw, valid) == ([33], [200])
    valid[33, np.flatnonzero(valid[33])[15:]] = False
    assert found(raw, valid)[0] == [], "fewer than 16 valid pixels are no line"
    assert found(raw, np.zeros_like(valid)) == ([], [])
    real = np.where(valid, raw, np.nan).astype(np.float32)
    real[60, valid[60]] = -4.5
    assert found(real, valid) == ([60], [200])


FLAT = {
    "smooth 8-bit ground": lambda: ground(224, 800, spread=2.0, sigma=12.0) - 19900,
    "almost one level": lambda: ground(224, 800, spread=0.3) - 19900,
    "a ramp down": lambda: np.repeat(np.arange(224.0)[:, None] // 7, 800, axis=1),
    "a ramp across": lambda: np.repeat(np.arange(800.0)[None] // 9, 224, axis=0),
    "one level": lambda: np.full((224, 800), 77.0),
    "two levels, half each": lambda: np.repeat(np.repeat([10.0, 90.0], 112)[:, None], 800, axis=1),
    "saturated by degrees": lambda: ((ground(224, 800, spread=100.0, sigma=8.0) - 20000) + 200).clip(0, 255),
    "saturated below a ridge": lambda: (
        ground(224, 800, spread=9.0) - np.linspace(20000, 19600, 224)[:, None]
    ).clip(0, 255),
    "shadow with a ragged edge": lambda: np.where(
        np.arange(224)[:, None] < 90 + 20 * np.sin(np.arange(800) / 40.0), 0, ground(224, 800, spread=20.0) - 19900
    ),
    "half of it black": lambda: np.where(np.arange(800) < 300, 0, ground(224, 800, spread=20.0) - 19900),
}  # fmt: skip


@pytest.mark.parametrize("case", list(FLAT))
def test_flat_dark_and_saturated_ground_is_not_dead(case):
    raw = FLAT[case]().round().astype(np.uint8)
    for strip in (raw, raw.astype(np.float32), np.ascontiguousarray(raw.T)):
        assert found(strip) == ([], [])


@pytest.mark.parametrize("width", [1, 5, 15])
def test_narrow_images_have_no_dead_rows(width):
    raw = ground(64, width).astype(np.uint16)
    raw[30] = 0
    assert found(raw) == ([], [])
    assert found(raw.T) == ([], [])


def test_the_narrowest_row_that_counts():
    raw = ground(64, 16).astype(np.uint16)
    raw[30] = 0
    assert found(raw) == ([30], [])


def test_one_pixel_that_differs_keeps_a_line_alive():
    raw = ground(64, 1000).astype(np.uint16)
    raw[30] = 0
    for col in (1, 500, 998):
        other = raw.copy()
        other[30, col] = 1
        assert found(other) == ([], [])


def test_runs_of_two_values_and_wide_bands_of_columns_are_ground():
    raw = ground(64, 300).astype(np.uint16)
    raw[20], raw[21] = 0, 1
    raw[:, 100:103] = 0
    assert found(raw) == ([], [])


def test_terrain_with_noise_has_none():
    for seed in range(5):
        assert found((terrain(64, 500, seed) * 12).astype(np.uint8)) == ([], [])
