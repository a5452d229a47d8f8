"""A simple structural score of a tile: how much of its contrast is spatial structure rather than noise."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


def is_constant(stored_HW: npt.NDArray[Any], valid_HW: npt.NDArray[np.bool_]) -> bool:
    """Returns True when all valid pixels have one value, or none is valid."""
    values = stored_HW[valid_HW]
    return values.size == 0 or bool(values.min() == values.max())


def structure_score(stored_HW: npt.NDArray[Any], valid_HW: npt.NDArray[np.bool_]) -> float:
    """Returns the lag-one spatial autocorrelation of a tile, cut at 0.

    With the semivariance of neighbours g = mean((a - b)^2) / 2 over all horizontal and vertical pairs of valid
    pixels and the variance s2 of the valid pixels, the score is max(0, 1 - g / s2): near 1 for smooth terrain, near
    0 for white noise, 0 for a constant tile. It does not change with brightness or contrast.

    Args:
        stored_HW: Tile, any linear unit.
        valid_HW: True where measured.

    Returns:
        The score, 0..1.
    """
    value_HW = stored_HW.astype(np.float64)
    spread = float(value_HW[valid_HW].var()) if valid_HW.any() else 0.0
    total, pairs = 0.0, 0
    for a, b in ((np.s_[:, 1:], np.s_[:, :-1]), (np.s_[1:, :], np.s_[:-1, :])):
        both = valid_HW[a] & valid_HW[b]
        total += float(np.square(value_HW[a] - value_HW[b])[both].sum())
        pairs += int(both.sum())
    if spread == 0.0 or pairs == 0:
        return 0.0
    return float(np.clip(1.0 - total / pairs / 2.0 / spread, 0.0, 1.0))
