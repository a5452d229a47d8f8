"""The rules of selection: each takes curves and says which checkpoints, and why not the others."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from momo.errors import MergeError

from .config import SelectConfig
from .curves import Curve
from .evl import Candidate, Pick, distance, early_stop, last, select_evl, spread


@dataclass(frozen=True)
class Outcome:
    """What a rule chose.

    Attributes:
        pick: The checkpoints.
        notes: What a reader must know, in sentences.
        reason: Says of (curve number, checkpoint index) why it was not chosen.
    """

    pick: Pick
    notes: list[str]
    reason: Callable[[int, int], str]


def apply_rule(config: SelectConfig, curves: Sequence[Curve], epsilon: float | None) -> Outcome:
    """Chooses one checkpoint of each curve.

    Args:
        config: Rule, its parameter and the unit of distance.
        curves: Two or more, smoothed.
        epsilon: For `evl`; other rules do not look at it.

    Raises:
        MergeError: No checkpoint of a run reaches the loss of `at_loss`.
    """
    candidates = [curve.candidates(config.distance) for curve in curves]
    if config.rule == "evl":
        assert epsilon is not None
        return _evl(candidates, epsilon, config.distance)
    if config.rule == "at_samples":
        assert config.samples is not None
        indices, reason, notes = _at_samples(curves, config.samples)
    elif config.rule == "at_loss":
        assert config.loss is not None
        indices, reason, notes = _at_loss(curves, config.loss)
    else:
        indices, reason, notes = (_early_stop if config.rule == "early_stop" else _last)(candidates)
    width = spread(candidates, indices)
    notes.append(f"Rule {config.rule!r} does not look at epsilon; {width:.4g} is the spread of the chosen losses.")
    return Outcome(Pick(indices, width, distance(candidates, indices), True), notes, reason)


_Part = tuple[tuple[int, ...], Callable[[int, int], str], list[str]]


def _evl(candidates: Sequence[Sequence[Candidate]], epsilon: float, unit: str) -> Outcome:
    pick = select_evl(candidates, epsilon)
    chosen = [curve[index].loss for curve, index in zip(candidates, pick.indices, strict=True)]
    stops = [curve[early_stop(curve)].samples for curve in candidates]

    def reason(number: int, index: int) -> str:
        point, best = candidates[number][index], candidates[number][pick.indices[number]]
        gap = max(abs(point.loss - other) for place, other in enumerate(chosen) if place != number)
        if gap > pick.epsilon:
            return f"differs by {gap:.4g} from another chosen loss"
        away, nearer = abs(point.samples - stops[number]), abs(best.samples - stops[number])
        if away > nearer:
            return f"agrees, but is {away:,} {unit} from early stopping, the chosen one {nearer:,}"
        return "agrees and is as near to early stopping, but " + (
            "has a higher loss" if point.loss > best.loss else "comes later"
        )

    notes = []
    if not pick.feasible:
        notes.append(
            f"NO TUPLE AGREES within epsilon {epsilon:.4g}: the smallest feasible epsilon {pick.epsilon:.4g} was used "
            "instead, so these losses are not equal at the level asked for. See the sweep for what other epsilons pick."
        )
    return Outcome(pick, notes, reason)


def _early_stop(candidates: Sequence[Sequence[Candidate]]) -> _Part:
    indices = tuple(early_stop(curve) for curve in candidates)

    def reason(number: int, index: int) -> str:
        above = candidates[number][index].loss - candidates[number][indices[number]].loss
        return f"loss is {above:.4g} above the lowest" if above else "as low, but later"

    return indices, reason, []


def _last(candidates: Sequence[Sequence[Candidate]]) -> _Part:
    return tuple(last(curve) for curve in candidates), lambda number, index: "not the last checkpoint", []


def _at_samples(curves: Sequence[Curve], wanted: int) -> _Part:
    def away(number: int, index: int) -> int:
        return abs(curves[number].points[index].samples - wanted)

    indices = tuple(_nearest(curve, wanted) for curve in curves)

    def reason(number: int, index: int) -> str:
        this, best = away(number, index), away(number, indices[number])
        if this > best:
            return f"{this:,} samples away from {wanted:,}, the chosen one {best:,}"
        return "as near, but later"

    far = [f"{c.name} {away(n, indices[n]):,}" for n, c in enumerate(curves) if away(n, indices[n])]
    notes = (
        [f"No checkpoint at {wanted:,} samples; the nearest is so many samples away: {', '.join(far)}."] if far else []
    )
    return indices, reason, notes


def _nearest(curve: Curve, wanted: int) -> int:
    """Index of the checkpoint nearest in samples; the earlier of two as near."""
    return min(range(len(curve.points)), key=lambda index: (abs(curve.points[index].samples - wanted), index))


def _at_loss(curves: Sequence[Curve], wanted: float) -> _Part:
    first = [next((i for i, loss in enumerate(curve.smoothed) if loss <= wanted), None) for curve in curves]
    short = [curve for curve, index in zip(curves, first, strict=True) if index is None]
    if short:
        lowest = [(c.name, min(c.smoothed), c.points[c.smoothed.index(min(c.smoothed))].samples) for c in short]
        reached = max(min(curve.smoothed) for curve in curves)
        raise MergeError(
            "no checkpoint reaches the loss",
            seen="; ".join(f"{name}: lowest {loss:.6g} at {samples:,} samples" for name, loss, samples in lowest),
            rule=f"rule=at_loss takes the first checkpoint at or below {wanted:g}",
            fix=f"every run reaches loss={_rounded_up(reached)}",
        )
    indices = tuple(index for index in first if index is not None)

    def reason(number: int, index: int) -> str:
        return f"loss is above {wanted:g}" if curves[number].smoothed[index] > wanted else "not the first at or below"

    return indices, reason, []


def _rounded_up(loss: float) -> str:
    """The loss with six decimals, not below it."""
    short = round(loss, 6)
    return f"{short if short >= loss else math.ceil(loss * 1e6) / 1e6:g}" if loss < 1 else repr(loss)
