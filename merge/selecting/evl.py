"""Equal-validation-loss selection (MOMO, arXiv 2604.02719).

Among tuples of checkpoints, one a sensor, whose validation losses agree pairwise within epsilon, EVL takes the tuple t
that minimises D(t) = (1/n) * sum_i |e_i - s_i|, with e_i the samples seen by the checkpoint of sensor i and s_i those
of its early-stopping checkpoint (lowest validation loss).

Losses agree pairwise within epsilon exactly when all lie in a window [low, low + epsilon] with low one of them, and in
a given window every sensor may choose on its own. So one sweep over the sorted losses with a monotone queue a sensor
finds the optimum in O(nK log K) instead of K^n.

>>> hirise = [Candidate(100, 0.90), Candidate(200, 0.50), Candidate(300, 0.30)]
>>> ctx = [Candidate(100, 0.95), Candidate(200, 0.70), Candidate(300, 0.52)]
>>> select_evl([hirise, ctx], epsilon=0.05)
Pick(indices=(1, 2), epsilon=0.05, distance=50.0, feasible=True)

Both curves stop early at 300 samples, with losses 0.30 and 0.52 that do not agree. HiRISE at 200 (0.50) and CTX at 300
(0.52) do; D = (100 + 0) / 2.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from momo.errors import MergeError


@dataclass(frozen=True)
class Candidate:
    """One checkpoint on a validation curve.

    Attributes:
        samples: Training samples seen, or whatever distance is measured in (checkpoint steps).
        loss: Validation loss.
    """

    samples: int
    loss: float


@dataclass(frozen=True)
class Pick:
    """The chosen tuple.

    Attributes:
        indices: For each curve, the index of its checkpoint.
        epsilon: The epsilon that was used: the requested one, or the smallest feasible one when that is larger.
        distance: D of the tuple, in the unit of `Candidate.samples`.
        feasible: False when no tuple agreed within the requested epsilon.
    """

    indices: tuple[int, ...]
    epsilon: float
    distance: float
    feasible: bool


Curves = Sequence[Sequence[Candidate]]


def early_stop(curve: Sequence[Candidate]) -> int:
    """Returns the index of the lowest loss; the earliest of equals."""
    return min(range(len(curve)), key=lambda i: (curve[i].loss, curve[i].samples))


def last(curve: Sequence[Candidate]) -> int:
    """Returns the index of the checkpoint with the most samples."""
    return max(range(len(curve)), key=lambda i: curve[i].samples)


def distance(curves: Curves, indices: Sequence[int]) -> float:
    """Returns D: the mean distance in samples of the chosen checkpoints from the early-stopping ones."""
    gaps = [
        abs(curve[index].samples - curve[early_stop(curve)].samples)
        for curve, index in zip(curves, indices, strict=True)
    ]
    return sum(gaps) / len(gaps)


def spread(curves: Curves, indices: Sequence[int]) -> float:
    """Returns the largest difference of two chosen losses: the smallest epsilon for which this tuple agrees."""
    losses = [curve[index].loss for curve, index in zip(curves, indices, strict=True)]
    return max(losses) - min(losses)


def smallest_epsilon(curves: Curves) -> float:
    """Returns the smallest epsilon for which some tuple agrees: the narrowest loss window that meets every curve."""
    return EvlSearch(curves).smallest_epsilon()


def select_evl(curves: Curves, epsilon: float) -> Pick:
    """Chooses one checkpoint a curve by equal validation loss.

    Ties are broken by the smaller sum of losses, then by fewer samples, sensor by sensor. When no tuple agrees within
    `epsilon`, the smallest feasible one is used and the pick says so. See the top of this file for an example.

    Args:
        curves: One curve a sensor, each with at least one checkpoint, in any order.
        epsilon: Largest loss difference that counts as equal, 0 or more.

    Raises:
        MergeError: There is no curve, a curve is empty or holds a loss that is not finite, or epsilon is no number of
            0 or more.
    """
    if not epsilon >= 0:
        raise MergeError("epsilon is out of range", seen=epsilon, rule="0 or more")
    search = EvlSearch(curves)
    used = max(epsilon, search.smallest_epsilon())
    indices = search.best(used)
    return Pick(indices, used, distance(curves, indices), feasible=used <= epsilon)


@dataclass(frozen=True)
class EpsilonRange:
    """The tuple that EVL picks for every epsilon in a range.

    Attributes:
        low: Smallest epsilon of the range (included): the spread of the tuple's losses.
        high: End of the range (excluded); infinity for the last one.
        indices: For each curve, the index of its checkpoint.
        distance: D of the tuple.
    """

    low: float
    high: float
    indices: tuple[int, ...]
    distance: float


def sweep_epsilon(curves: Curves) -> Iterator[EpsilonRange]:
    """Yields every tuple that EVL picks for some epsilon, from the largest epsilons down to the smallest feasible one.

    A tuple that is best for epsilon stays best down to the spread of its own losses, since a smaller epsilon only
    takes tuples away. So the breakpoints are exact, and each costs one search.

    Args:
        curves: As in `select_evl`.
    """
    search = EvlSearch(curves)
    floor, high = search.smallest_epsilon(), math.inf
    epsilon = math.inf
    while epsilon >= floor:
        indices = search.best(epsilon)
        low = spread(curves, indices)
        yield EpsilonRange(low, high, indices, distance(curves, indices))
        high, epsilon = low, math.nextafter(low, -math.inf)


# (|e - s|, loss, samples): what makes one checkpoint of a sensor better than another.
_Key = tuple[int, float, int]


class EvlSearch:
    """The losses of all curves in one sorted list, ready for searches with several epsilons.

    Args:
        curves: As in `select_evl`.

    Raises:
        MergeError: There is no curve, or a curve is empty or holds a loss that is not finite.
    """

    def __init__(self, curves: Curves) -> None:
        if not curves:
            raise MergeError("there is no validation curve", rule="one curve or more")
        for number, curve in enumerate(curves):
            if not curve or not all(math.isfinite(point.loss) for point in curve):
                raise MergeError(
                    "a validation curve cannot be used",
                    seen=f"curve {number}: {list(curve)[:3]}",
                    rule="one finite loss or more",
                )
        self._number = len(curves)
        stops = [curve[early_stop(curve)].samples for curve in curves]
        # (loss, sensor, index, key)
        self._points: list[tuple[float, int, int, _Key]] = sorted(
            (point.loss, sensor, index, (abs(point.samples - stops[sensor]), point.loss, point.samples))
            for sensor, curve in enumerate(curves)
            for index, point in enumerate(curve)
        )

    def smallest_epsilon(self) -> float:
        """Returns the smallest epsilon for which some tuple agrees."""
        points = self._points
        inside, covered, left = [0] * self._number, 0, 0
        best = math.inf
        for loss, sensor, *_ in points:
            covered += inside[sensor] == 0
            inside[sensor] += 1
            while covered == self._number:
                best = min(best, loss - points[left][0])
                leaving = points[left][1]
                inside[leaving] -= 1
                covered -= inside[leaving] == 0
                left += 1
        return best

    def best(self, epsilon: float) -> tuple[int, ...]:
        """Returns the index chosen of each curve; empty when no tuple agrees within epsilon."""
        points = self._points
        # Each queue holds (position in `points`, index, key) with keys rising from the left: its head is the best of
        # its sensor inside the window.
        queues: list[deque[tuple[int, int, _Key]]] = [deque() for _ in range(self._number)]
        best: tuple[int, float, tuple[int, ...]] | None = None
        chosen: tuple[int, ...] = ()
        right = 0
        for left, (low, leaving, *_) in enumerate(points):
            while right < len(points) and points[right][0] - low <= epsilon:
                _, sensor, index, new = points[right]
                queue = queues[sensor]
                while queue and queue[-1][2] > new:
                    queue.pop()
                queue.append((right, index, new))
                right += 1
            if all(queues):
                total = sum([queue[0][2][0] for queue in queues])
                if best is None or total <= best[0]:
                    heads = [queue[0] for queue in queues]
                    rank = (total, math.fsum(key[1] for *_, key in heads), tuple(key[2] for *_, key in heads))
                    if best is None or rank < best:
                        best, chosen = rank, tuple(index for _, index, _ in heads)
            if queues[leaving] and queues[leaving][0][0] == left:
                queues[leaving].popleft()
        return chosen
