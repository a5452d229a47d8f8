"""How close is equal: epsilon from the standard errors, and what other epsilons would pick."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from momo.errors import MergeError

from .curves import Curve
from .evl import EpsilonRange, sweep_epsilon

ROWS = 12


@dataclass(frozen=True)
class AutoEpsilon:
    """Epsilon from the standard errors, with the sentences that say how."""

    value: float
    notes: list[str]


def normal_factor(level: float, sensors: int, correction: str) -> float:
    """Returns the factor z of z * (standard error of a difference).

    Two losses with equal true values differ by less than z standard errors with probability `level`, with
    z = quantile(1 - (1 - level) / (2 m)) of the normal distribution. m is 1 for one pair. EVL asks that all
    n (n - 1) / 2 pairs agree at once; with m their number (Bonferroni; Dunn 1961, JASA 56(293), 52-64) a tuple of
    equal losses is kept with at least that probability, whatever the standard errors are.

    Args:
        level: Above 0 and below 1.
        sensors: n, 2 or more.
        correction: `bonferroni` (m is the number of pairs) or `none` (m is 1).
    """
    pairs = sensors * (sensors - 1) // 2 if correction == "bonferroni" else 1
    return statistics.NormalDist().inv_cdf(1 - (1 - level) / (2 * pairs))


def auto_epsilon(
    curves: Sequence[Curve],
    *,
    level: float = 0.95,
    correction: str = "bonferroni",
    stderr: str = "tiles",
    relative: float = 0.0,
) -> AutoEpsilon:
    """Computes epsilon = z * sqrt(a^2 + b^2): two losses within the noise count as equal.

    a and b are the two largest of the curves' median standard errors, so one epsilon serves every pair and is wide
    enough for the noisiest. z is that of `normal_factor`. With many tiles the noise goes to zero and the distance
    between checkpoints does not; `relative` says below which share of the loss a difference is of no interest however
    well it is measured.

    Args:
        curves: Two or more.
        level: Confidence level.
        correction: See `normal_factor`.
        stderr: Which standard errors, see `Point.error`.
        relative: Floor as a share of the mean early-stopping loss; 0 for none.

    Raises:
        MergeError: A checkpoint has no standard error of this kind.
    """
    medians = {curve.name: _median_error(curve, stderr) for curve in curves}
    (first, a), (second, b) = sorted(medians.items(), key=lambda item: -item[1])[:2]
    factor = normal_factor(level, len(curves), correction)
    noise = factor * math.hypot(a, b)
    pairs = len(curves) * (len(curves) - 1) // 2
    whose = f"for all {pairs} pairs at once, Bonferroni" if correction == "bonferroni" and pairs > 1 else "for one pair"
    notes = [
        f"Epsilon {noise:.4g} is {factor:.3g} standard errors of a difference of two losses: the normal quantile at "
        f"level {level:g} ({whose}) times sqrt({a:.3g}^2 + {b:.3g}^2), the median standard errors over {stderr} of "
        f"{first} and {second}, the largest."
    ]
    lowest = statistics.fmean(min(curve.smoothed) for curve in curves)
    floor = relative * abs(lowest)
    if floor > noise:
        notes.append(f"Epsilon was raised to {floor:.4g}: {relative:g} of the mean early-stopping loss {lowest:.4g}.")
    return AutoEpsilon(max(noise, floor), notes)


def _median_error(curve: Curve, stderr: str) -> float:
    found = [point.error(stderr) for point in curve.points]
    errors = [error for error in found if error is not None]
    if len(errors) < len(found):
        raise MergeError(
            "a validation loss has no standard error",
            seen=f"{curve.place}, {len(found) - len(errors)} of {len(found)} checkpoints, over {stderr}",
            rule=f"two validation {stderr} or more; in a curve file a value in val_stderr (over tiles)",
            fix="give epsilon=... yourself, or validate on more",
        )
    return statistics.median(errors)


def epsilon_ranges(curves: Sequence[Curve], unit: str) -> list[EpsilonRange]:
    """Returns the ranges of epsilon over which EVL's pick stays the same, all of them, from small to large."""
    return list(sweep_epsilon([curve.candidates(unit) for curve in curves]))[::-1]


def used_range(ranges: Sequence[EpsilonRange], epsilon: float) -> int:
    """Returns the index of the range that an epsilon lies in."""
    return max(index for index, found in enumerate(ranges) if found.low <= epsilon)


def nearest_ranges(ranges: Sequence[EpsilonRange], epsilon: float, rows: int = ROWS) -> list[EpsilonRange]:
    """Returns at most so many neighbouring ranges, with the one that is used in the middle where there are more."""
    used = used_range(ranges, epsilon)
    first = max(0, min(used - rows // 2, len(ranges) - rows))
    return list(ranges[first : first + rows])


def sweep_entries(curves: Sequence[Curve], ranges: Sequence[EpsilonRange]) -> list[dict[str, Any]]:
    """Returns the ranges as the SELECTION keeps them: `low` included, `high` excluded (None: no end)."""
    return [
        {
            "low": found.low,
            "high": found.high if math.isfinite(found.high) else None,
            "distance": found.distance,
            "samples": {c.name: c.points[i].samples for c, i in zip(curves, found.indices, strict=True)},
        }
        for found in ranges
    ]
