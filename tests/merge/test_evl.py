from __future__ import annotations

import doctest
import itertools
import math
import random
import re
import time
from pathlib import Path

import numpy as np
import pytest

from momo.errors import MergeError
from momo.merge.selecting import evl
from momo.merge.selecting.epsilon import nearest_ranges, normal_factor, used_range
from momo.merge.selecting.evl import (
    Candidate,
    EpsilonRange,
    distance,
    early_stop,
    last,
    select_evl,
    smallest_epsilon,
    sweep_epsilon,
)
from momo.merge.selecting.smoothing import non_increasing, smooth


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
    # Equal distance and equal losses: the first sensor keeps the checkpoint with fewer samples.
    low_high = [Candidate(100, 0.5), Candidate(200, 0.25), Candidate(300, 0.5)]
    assert select_evl([low_high, [Candidate(100, 0.5)]], 0.0).indices == (0, 0)
    symmetric = [Candidate(100, 0.6), Candidate(200, 0.4), Candidate(300, 0.5)]
    other = [Candidate(200, 0.55)]
    # 100 and 300 are equally far from 200 and both agree with 0.55 within 0.1; 300 has the lower loss.
    assert select_evl([symmetric, other], 0.1).indices == (2, 0)
    equal = [Candidate(300, 0.5), Candidate(100, 0.5), Candidate(200, 0.3)]
    assert select_evl([equal, other], 0.1).indices == (1, 0)


def test_the_first_of_two_equal_checkpoints_is_taken():
    rng = random.Random(5)
    for _ in range(200):
        curves = [[rng.choice(curve) for _ in range(6)] for curve in random_curves(rng)]
        pick = select_evl(curves, smallest_epsilon(curves))
        assert pick.indices == brute_force(curves, pick.epsilon)[1]


def test_many_tuples_are_swept_in_well_under_a_second():
    rng = random.Random(1)
    curves = [[Candidate(100 * i, 1 / (1 + i) + 0.01 * rng.random()) for i in range(2000)] for _ in range(5)]
    started = time.process_time()
    pick = select_evl(curves, 0.001)
    assert time.process_time() - started < 1
    losses = [curve[i].loss for curve, i in zip(curves, pick.indices)]
    assert max(losses) - min(losses) <= 0.001


def test_sweep_gives_the_pick_of_every_epsilon():
    rng = random.Random(11)
    several = 0
    for _ in range(300):
        curves = random_curves(rng)
        ranges = list(sweep_epsilon(curves))[::-1]
        several += len(ranges) > 3
        assert ranges[0].low == smallest_epsilon(curves) and ranges[-1].high == math.inf
        assert ranges[-1].indices == tuple(early_stop(curve) for curve in curves) and ranges[-1].distance == 0
        for before, after in itertools.pairwise(ranges):
            assert before.high == after.low and before.indices != after.indices and before.distance >= after.distance
        for found in ranges:
            top = min(found.high, found.low + 1)
            for epsilon in (found.low, math.nextafter(top, 0), found.low + rng.random() * (top - found.low) * 0.999):
                assert brute_force(curves, epsilon)[1] == found.indices
    assert several > 50


def test_rows_shown_are_those_around_the_epsilon_used():
    ranges = [EpsilonRange(float(n), float(n + 1), (n,), 0.0) for n in range(30)]
    assert used_range(ranges, 7.5) == used_range(ranges, 7.0) == 7
    assert [found.low for found in nearest_ranges(ranges, 15.5, rows=4)] == [13, 14, 15, 16]
    assert [found.low for found in nearest_ranges(ranges, 0.0, rows=4)] == [0, 1, 2, 3]
    assert [found.low for found in nearest_ranges(ranges, 99.0, rows=4)] == [26, 27, 28, 29]
    assert nearest_ranges(ranges[:3], 1.0) == ranges[:3]


@pytest.mark.parametrize(("sensors", "level"), [(2, 0.95), (3, 0.95), (5, 0.9)])
def test_level_of_the_automatic_epsilon_holds_for_equal_losses(sensors, level):
    noise = np.random.default_rng(0).normal(size=(200_000, sensors))
    spread = (noise.max(axis=1) - noise.min(axis=1)) / math.sqrt(2)
    kept = (spread <= normal_factor(level, sensors, "bonferroni")).mean()
    assert level - 0.002 < kept < level + 0.03
    one_pair = (abs(noise[:, 0] - noise[:, 1]) / math.sqrt(2) <= normal_factor(level, sensors, "none")).mean()
    assert one_pair == pytest.approx(level, abs=0.003)


def test_isotonic_fit_equals_the_min_max_formula():
    # Barlow et al. (1972): the fit at i is the minimum over a <= i of the maximum over b >= i of the mean of a..b.
    rng = np.random.default_rng(4)
    for _ in range(50):
        length = int(rng.integers(1, 9))
        values, weights = rng.integers(0, 6, length) / 4, rng.uniform(0.1, 2, length)

        def mean(a, b, values=values, weights=weights):
            return np.average(values[a : b + 1], weights=weights[a : b + 1])

        expected = [min(max(mean(a, b) for b in range(i, length)) for a in range(i + 1)) for i in range(length)]
        np.testing.assert_allclose(non_increasing(values.tolist(), weights.tolist()), expected, atol=1e-12)


def test_smoothing_by_hand():
    losses, errors = [0.6, 0.4, 0.5, 0.3, 0.35], [0.1, 0.1, 0.2, 0.1, 0.1]
    assert smooth(losses, errors, "none") == losses
    assert smooth(losses, errors, "running_min") == [0.6, 0.4, 0.4, 0.3, 0.3]
    # 0.4 and 0.5 pool with weights 100 and 25.
    assert smooth(losses, errors, "isotonic") == pytest.approx([0.6, 0.42, 0.42, 0.325, 0.325])
    for unknown in (None, 0.0):
        even = smooth(losses, [0.1, 0.1, unknown, 0.1, 0.1], "isotonic")
        assert even == pytest.approx([0.6, 0.45, 0.45, 0.325, 0.325])


def test_the_examples_in_the_guide_hold():
    guide = (Path(__file__).parents[2] / "docs" / "evl.md").read_text(encoding="utf-8")
    examples = re.findall(r"```python\n(.*?)```", guide, flags=re.S)
    assert len(examples) == 1 and examples[0].count("assert") >= 4
    exec(compile(examples[0], "docs/evl.md", "exec"), {})
    # The factors of the normal quantile that the guide states.
    assert (round(normal_factor(0.95, 2, "bonferroni"), 2), round(normal_factor(0.95, 3, "bonferroni"), 2)) == (
        1.96,
        2.39,
    )
    assert "z = 1.96 for two sensors, 2.39 for three" in guide


def test_the_example_in_the_module_holds():
    result = doctest.testmod(evl)
    assert result.attempted == 3 and result.failed == 0


@pytest.mark.parametrize("curve", [[], [Candidate(1, math.nan)], [Candidate(1, math.inf)]])
def test_unusable_curve_is_refused(curve):
    with pytest.raises(MergeError, match="a validation curve cannot be used"):
        select_evl([[Candidate(1, 0.5)], curve], 0.1)


@pytest.mark.parametrize("epsilon", [-0.1, math.nan])
def test_unusable_epsilon_is_refused(epsilon):
    with pytest.raises(MergeError, match="epsilon is out of range: .*Rule: 0 or more"):
        select_evl([[Candidate(1, 0.5)]], epsilon)


def test_no_curve_is_refused():
    with pytest.raises(MergeError, match="there is no validation curve"):
        select_evl([], 0.1)
