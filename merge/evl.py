"""Equal-validation-loss selection (MOMO, arXiv 2604.02719).

Among tuples of checkpoints, one a sensor, whose validation losses agree pairwise within epsilon, EVL takes the tuple t
that minimises D(t) = (1/n) * sum_i |e_i - s_i|, with e_i the samples seen by the checkpoint of sensor i and s_i those
of its early-stopping checkpoint (lowest validation loss).

Losses agree pairwise within epsilon exactly when all lie in a window [low, low + epsilon] with low one of them, and in
a given window every sensor may choose on its own. So one sweep over the sorted losses with a monotone queue a sensor
finds the optimum in O(nK log K) instead of K^n.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from momo.errors import MergeError


@dataclass(frozen=True)
class Candidate:
    """One checkpoint on a validation curve: training samples seen and validation loss."""

    samples: int
    loss: float


@dataclass(frozen=True)
class Pick:
    """The chosen tuple.

    Attributes:
        indices: For each curve, the index of its checkpoint.
        epsilon: The epsilon that was used: the requested one, or the smallest feasible one when that is larger.
        distance: D of the tuple, in samples.
        feasible: False when no tuple agreed within the requested epsilon.
    """

    indices: tuple[int, ...]
    epsilon: float
    distance: float
    feasible: bool


def early_stop(curve: Sequence[Candidate]) -> int:
    """Returns the index of the lowest loss; the earliest of equals."""
    return min(range(len(curve)), key=lambda i: (curve[i].loss, curve[i].samples))


def last(curve: Sequence[Candidate]) -> int:
    """Returns the index of the checkpoint with the most samples."""
    return max(range(len(curve)), key=lambda i: curve[i].samples)


def distance(curves: Sequence[Sequence[Candidate]], indices: Sequence[int]) -> float:
    """Returns D: the mean distance in samples of the chosen checkpoints from the early-stopping ones."""
    gaps = [
        abs(curve[index].samples - curve[early_stop(curve)].samples)
        for curve, index in zip(curves, indices, strict=True)
    ]
    return sum(gaps) / len(gaps)


def smallest_epsilon(curves: Sequence[Sequence[Candidate]]) -> float:
    """Returns the smallest epsilon for which some tuple agrees: the narrowest loss window that meets every curve."""
    points = _sorted_points(curves)
    inside, covered, left = [0] * len(curves), 0, 0
    best = math.inf
    for loss, sensor, _ in points:
        covered += inside[sensor] == 0
        inside[sensor] += 1
        while covered == len(curves):
            best = min(best, loss - points[left][0])
            leaving = points[left][1]
            inside[leaving] -= 1
            covered -= inside[leaving] == 0
            left += 1
    return best


def select_evl(curves: Sequence[Sequence[Candidate]], epsilon: float) -> Pick:
    """Chooses one checkpoint a curve by equal validation loss.

    Ties are broken by the smaller sum of losses, then by fewer samples, sensor by sensor. When no tuple agrees within
    `epsilon`, the smallest feasible one is used and the pick says so.

    Args:
        curves: One curve a sensor, each with at least one checkpoint, in any order.
        epsilon: Largest loss difference that counts as equal, 0 or more.

    Raises:
        MergeError: A curve is empty or holds a loss that is not finite.
    """
    for number, curve in enumerate(curves):
        if not curve or not all(math.isfinite(point.loss) for point in curve):
            raise MergeError(
                "a validation curve cannot be used",
                seen=f"curve {number}: {list(curve)[:3]}",
                rule="one finite loss or more",
            )
    used = max(epsilon, smallest_epsilon(curves))
    indices = _best_tuple(curves, used)
    return Pick(indices, used, distance(curves, indices), feasible=used <= epsilon)


_Key = tuple[int, float, int]
_Point = tuple[float, int, int]


def _sorted_points(curves: Sequence[Sequence[Candidate]]) -> list[_Point]:
    return sorted((point.loss, sensor, i) for sensor, curve in enumerate(curves) for i, point in enumerate(curve))


def _best_tuple(curves: Sequence[Sequence[Candidate]], epsilon: float) -> tuple[int, ...]:
    stops = [curve[early_stop(curve)].samples for curve in curves]

    def key(sensor: int, index: int) -> _Key:
        point = curves[sensor][index]
        return abs(point.samples - stops[sensor]), point.loss, point.samples

    points = _sorted_points(curves)
    # Each queue holds (position in `points`, index, key) with keys rising from the left: its head is the best of
    # its sensor inside the window.
    queues: list[deque[tuple[int, int, _Key]]] = [deque() for _ in curves]
    best: tuple[int, float, tuple[int, ...]] | None = None
    chosen: tuple[int, ...] = ()
    right = 0
    for left, (low, _, _) in enumerate(points):
        while right < len(points) and points[right][0] - low <= epsilon:
            _, sensor, index = points[right]
            new = key(sensor, index)
            while queues[sensor] and queues[sensor][-1][2] >= new:
                queues[sensor].pop()
            queues[sensor].append((right, index, new))
            right += 1
        for queue in queues:
            if queue and queue[0][0] < left:
                queue.popleft()
        if all(queues):
            heads = [queue[0] for queue in queues]
            rank = (sum(k[0] for *_, k in heads), math.fsum(k[1] for *_, k in heads), tuple(k[2] for *_, k in heads))
            if best is None or rank < best:
                best, chosen = rank, tuple(index for _, index, _ in heads)
    return chosen
