"""Dead lines of push-broom images: rows that were lost and columns of a detector that does not answer."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

_LEAST = 16
_WIDEST_COLUMNS = 2
_REACH = 8
# How many lines beyond a run its judgement may need.
LINES_BEYOND = _REACH + 2
_FIRST_LOOK = 8
_SECOND_LOOK = 64

Array = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]


def mask_dead_lines(raw_HW: Array, valid_HW: Mask) -> tuple[Mask, Mask, Mask]:
    """Finds dead rows and columns of a full-width strip and makes their pixels invalid.

    A line is constant when it has at least 16 valid pixels and all have one value. A run is a longest series of
    adjacent constant lines. It is dead when

    1. it is one line, or several of one and the same value: any number of rows (a lost packet), at most 2 columns;
    2. the picture breaks off at it. On a side of the run, let c be the run's value, a the line next to it and a2
       the nearest line beyond a, within 8, that is not constant. The picture breaks off there when for at least half
       of the places valid in the run's line, in a and in a2 (at least 16), |c - a| > 2 |a - a2| + t, t = 1 level for
       integers and 0 for real numbers: the step into the run is far larger than the step before. It must break off on
       both sides. A side without such lines (end of the strip, too few valid pixels) is not asked, but a run with
       one side alone must be a single line, and one with none is not dead.

    So flat ground, shadow and saturation are no dead lines: they are approached by degrees, have ragged borders,
    or fill the strip. Rows come first, and their pixels take no part in the search for columns; where a column is
    dead, rows are searched once more without it, so lines that cross do not hide each other.

    Args:
        raw_HW: Strip of any real type, over the full width of the image.
        valid_HW: True where measured.

    Returns:
        The validity without dead lines (`valid_HW` itself when there is none), the dead rows, shape (H,), and the
        dead columns, shape (W,).
    """
    rows_H = _dead_rows(raw_HW, valid_HW, None)
    if rows_H.any():
        valid_HW = valid_HW & ~rows_H[:, None]
    cols_W = _dead_rows(raw_HW.T, valid_HW.T, _WIDEST_COLUMNS)
    if cols_W.any():
        valid_HW = valid_HW & ~cols_W
        more_H = _dead_rows(raw_HW, valid_HW, None)
        if more_H.any():
            valid_HW, rows_H = valid_HW & ~more_H[:, None], rows_H | more_H
    return valid_HW, rows_H, cols_W


def holds_constant_row(raw_HW: Array, valid_HW: Mask) -> bool:
    """Returns whether some row has at least 16 valid pixels, all of one value."""
    return bool(_constant_rows(raw_HW, valid_HW).any())


def _dead_rows(raw_HW: Array, valid_HW: Mask, longest: int | None) -> Mask:
    constant_H = _constant_rows(raw_HW, valid_HW)
    dead_H = np.zeros(raw_HW.shape[0], dtype=bool)
    if not constant_H.any():
        return dead_H
    edges = np.flatnonzero(np.diff(constant_H.astype(np.int8), prepend=0, append=0))
    for first, stop in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
        if longest is None or stop - first <= longest:
            dead_H[first:stop] = _is_dead(raw_HW, valid_HW, constant_H, first, stop)
    return dead_H


def _is_dead(raw_HW: Array, valid_HW: Mask, constant_H: Mask, first: int, stop: int) -> bool:
    values = [raw_HW[row][np.argmax(valid_HW[row])] for row in range(first, stop)]
    if any(value != values[0] for value in values):
        return False
    sides = [_breaks_off(raw_HW, valid_HW, constant_H, row, step) for row, step in ((first, -1), (stop - 1, 1))]
    asked = [side for side in sides if side is not None]
    return bool(asked) and all(asked) and (len(asked) == 2 or stop - first == 1)


def _breaks_off(raw_HW: Array, valid_HW: Mask, constant_H: Mask, row: int, step: int) -> bool | None:
    """Returns whether the step into a run is larger than the step before it, None where that cannot be asked."""
    height, near = raw_HW.shape[0], row + step
    beyond = [r for r in range(near + step, near + (_REACH + 1) * step, step) if 0 <= r < height and not constant_H[r]]
    for far in beyond:
        used = valid_HW[row] & valid_HW[near] & valid_HW[far]
        if np.count_nonzero(used) < _LEAST:
            continue
        kind = np.float64 if raw_HW.dtype.kind == "f" else np.int64
        c, a, a2 = (raw_HW[line][used].astype(kind) for line in (row, near, far))
        tolerance = 0 if raw_HW.dtype.kind == "f" else 1
        return bool(2 * np.count_nonzero(np.abs(c - a) > 2 * np.abs(a - a2) + tolerance) >= c.size)
    return None


def _constant_rows(raw_HW: Array, valid_HW: Mask) -> Mask:
    """Returns which rows have at least 16 valid pixels, all of one value.

    Most rows are told from a few of their pixels; only what looks constant there is read in full.
    """
    height, width = raw_HW.shape
    constant_H = np.zeros(height, dtype=bool)
    if width < _LEAST:
        return constant_H
    rows = np.arange(height)
    for number in (_FIRST_LOOK, _SECOND_LOOK):
        rows = rows[_one_value(raw_HW, valid_HW, rows, slice(None, None, max(1, width // number)))]
        if rows.size == 0:
            return constant_H
    rows = rows[np.count_nonzero(valid_HW[rows], axis=1) >= _LEAST]
    if rows.size:
        constant_H[rows[_one_value(raw_HW, valid_HW, rows, slice(None))]] = True
    return constant_H


def _one_value(raw_HW: Array, valid_HW: Mask, rows: npt.NDArray[np.int64], places: slice) -> Mask:
    """Returns for each of `rows` whether its valid pixels at `places` have at most one value."""
    every = rows.size == raw_HW.shape[0]
    raw, valid = (array[:, places] if every else array[:, places][rows] for array in (raw_HW, valid_HW))
    if valid.all():
        return np.asarray((raw == raw[:, :1]).all(axis=1))
    first = raw[np.arange(rows.size), np.argmax(valid, axis=1)]
    return np.asarray(((raw == first[:, None]) | ~valid).all(axis=1))
