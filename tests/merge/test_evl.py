from __future__ import annotations

import itertools
import math
import random

import pytest

from momo.errors import MergeError
from momo.merge.evl import Candidate, distance, early_stop, last, select_evl, smallest_epsilon


def brute_force(curves, epsilon):
    """Every tuple, straight from the definition."""
    best = None
    for indices in itertools.product(*(range(len(curve)) for curve in curves)):
        points = [curve[i] for curve, i in zip(curves, indices)]
        losses = [p.loss for p in points]
        if max(losses) - min(losses) > epsilon:
            continue
        gaps = sum(abs(p.samples - c[early_stop(c)].samples) for p, c in zip(points, curves))
        rank = (gaps, math.fsum(losses), tuple(p.samples for p in points))
        if best is None or rank < best[0]:
            best = (rank, indices)
    return best


def random_curves(rng):
    # Few distinct losses and samples, so that ties are common.
    curves = []
    for _ in range(rng.randint(2, 4)):
        samples = rng.sample(range(100, 1300, 100), rng.randint(1, 6))
        curves.append([Candidate(s, rng.choice([rng.randint(1, 6) / 8, rng.random()])) for s in samples])
    return curves


def test_equals_brute_force_on_random_cases():
    rng = random.Random(7)
    infeasible = 0
    for _ in range(1000):
        curves = random_curves(rng)
        epsilon = rng.choice([0.0, 0.125, 0.25, rng.random()])
        expected = brute_force(curves, epsilon)
        pick = select_evl(curves, epsilon)
        if expected is None:
            infeasible += 1
            assert not pick.feasible and pick.epsilon == smallest_epsilon(curves) > epsilon
            expected = brute_force(curves, pick.epsilon)
        else:
            assert pick.feasible and pick.epsilon == epsilon
        assert pick.indices == expected[1]
        assert pick.distance == pytest.approx(expected[0][0] / len(curves))
    assert infeasible > 100


def test_smallest_epsilon_equals_brute_force():
    rng = random.Random(3)
    for _ in range(300):
        curves = random_curves(rng)
        spreads = (max(p.loss for p in points) - min(p.loss for p in points) for points in itertools.product(*curves))
        assert smallest_epsilon(curves) == min(spreads)


def test_hand_made_case():
    falling = [Candidate(100, 0.9), Candidate(200, 0.5), Candidate(300, 0.3)]
    slow = [Candidate(100, 0.95), Candidate(200, 0.7), Candidate(300, 0.52)]
    # Early stopping is at 300 in both; only (200, 300) agrees within 0.05.
    pick = select_evl([falling, slow], 0.05)
    assert pick.indices == (1, 2) and pick.distance == 50 and pick.feasible
    assert (early_stop(falling), last(slow)) == (2, 2)
    assert distance([falling, slow], (0, 2)) == 100


def test_ties_take_lower_losses_then_fewer_samples():
    symmetric = [Candidate(100, 0.6), Candidate(200, 0.4), Candidate(300, 0.5)]
    other = [Candidate(200, 0.55)]
    # 100 and 300 are equally far from 200 and both agree with 0.55 within 0.1; 300 has the lower loss.
    assert select_evl([symmetric, other], 0.1).indices == (2, 0)
    equal = [Candidate(300, 0.5), Candidate(100, 0.5), Candidate(200, 0.3)]
    assert select_evl([equal, other], 0.1).indices == (1, 0)


def test_a_million_tuples_are_quick_enough_to_be_swept():
    rng = random.Random(1)
    curves = [[Candidate(100 * i, 1 / (1 + i) + 0.01 * rng.random()) for i in range(2000)] for _ in range(5)]
    pick = select_evl(curves, 0.001)
    losses = [curve[i].loss for curve, i in zip(curves, pick.indices)]
    assert max(losses) - min(losses) <= 0.001


@pytest.mark.parametrize("curve", [[], [Candidate(1, math.nan)], [Candidate(1, math.inf)]])
def test_unusable_curve_is_refused(curve):
    with pytest.raises(MergeError, match="a validation curve cannot be used"):
        select_evl([[Candidate(1, 0.5)], curve], 0.1)
