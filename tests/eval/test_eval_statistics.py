from __future__ import annotations

import numpy as np
import pytest

from momo.errors import EvalError
from momo.eval.metrics import score
from momo.eval.statistics import bootstrap_interval, combined_interval, image_weights, paired_difference


def outcomes(right: np.ndarray) -> np.ndarray:
    """Confusion counts of images of class 0 or 1 that were classified rightly or not."""
    counts = np.zeros((len(right), 2, 2), dtype=np.int64)
    label = np.arange(len(right)) % 2
    counts[np.arange(len(right)), label, np.where(right, label, 1 - label)] = 1
    return counts


def test_resamples_are_seeded_and_whole():
    weights = image_weights(40, draws=50, seed=3)
    assert weights.shape == (50, 40) and (weights.sum(axis=1) == 40).all()
    assert (weights == image_weights(40, draws=50, seed=3)).all()
    assert (weights != image_weights(40, draws=50, seed=4)).any()


def test_bootstrap_interval_of_accuracy_is_binomial():
    right = np.arange(400) < 300
    interval = bootstrap_interval(outcomes(right), "accuracy", draws=4000)
    half = 1.96 * np.sqrt(0.75 * 0.25 / 400)
    assert interval.value == 0.75
    assert interval.low == pytest.approx(0.75 - half, abs=0.006)
    assert interval.high == pytest.approx(0.75 + half, abs=0.006)


def test_undefined_metric_has_no_interval():
    interval = bootstrap_interval(np.tile([[9, 0], [0, 0]], (5, 1, 1)), "iou_fg")
    assert np.isnan([interval.value, interval.low, interval.high]).all()


def test_combined_interval_holds_the_spread_of_seeds():
    rng = np.random.default_rng(0)
    alike = [outcomes(rng.random(2000) < 0.8)] * 3
    apart = [outcomes(rng.random(2000) < share) for share in (0.7, 0.8, 0.9)]
    same, spread = (combined_interval(runs, "accuracy") for runs in (alike, apart))
    single = bootstrap_interval(alike[0], "accuracy")
    assert (same.low, same.high) == pytest.approx((single.low, single.high))
    assert spread.high - spread.low > 3 * (same.high - same.low)
    assert spread.value == pytest.approx(np.mean([score("accuracy", run)[0] for run in apart]))
    assert spread == combined_interval(apart, "accuracy")


def test_paired_difference_sees_what_unpaired_intervals_hide():
    rng = np.random.default_rng(0)
    right = rng.random(300) < 0.7
    better = right.copy()
    better[np.flatnonzero(~right)[:15]] = True
    first, second = outcomes(better), outcomes(right)
    assert bootstrap_interval(first, "accuracy").low < bootstrap_interval(second, "accuracy").high
    gap = paired_difference([first] * 3, [second] * 3, "accuracy")
    assert gap.value == pytest.approx(0.05) and 0 < gap.low < 0.05 < gap.high and gap.share_above == 1
    none = paired_difference([first], [first], "accuracy")
    assert (none.value, none.low, none.high, none.share_above) == (0, 0, 0, 0)


def test_pairing_needs_the_same_runs_and_images():
    with pytest.raises(EvalError, match="cannot be paired.*same seeds, same test images"):
        paired_difference([outcomes(np.ones(4))], [outcomes(np.ones(5))], "accuracy")
    with pytest.raises(EvalError, match="cannot be paired"):
        paired_difference([outcomes(np.ones(4))] * 2, [outcomes(np.ones(4))], "accuracy")
