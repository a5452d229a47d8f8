from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.metrics import f1_score, jaccard_score

from momo.eval.metrics import METRICS, all_scores, confusion_counts, score


def test_classification_metrics_counted_by_hand():
    # Class 0: 3 labels, 2 hit, predicted 3 times; class 1: 2 labels, 1 hit, predicted twice; class 2 never occurs.
    label, prediction = np.array([0, 0, 0, 1, 1]), np.array([0, 0, 1, 1, 0])
    counts = np.stack([confusion_counts(label[i : i + 1], prediction[i : i + 1], 3) for i in range(5)])
    scores = all_scores("classification", counts)
    f1_0, f1_1 = 2 * 2 / (3 + 3), 2 * 1 / (2 + 2)
    assert scores["accuracy"] == pytest.approx(3 / 5)
    assert scores["f1_macro"] == pytest.approx((f1_0 + f1_1) / 2)
    assert scores["f1_weighted"] == pytest.approx((3 * f1_0 + 2 * f1_1) / 5)


def test_constant_predictor_has_the_published_weighted_f1():
    # mb-change_cls_ctx: 8 of 10 test images are "Change"; always saying so scores 0.7111 on the leaderboard.
    label = np.array([1] * 8 + [0] * 2)
    counts = np.stack([confusion_counts(value[None], np.array([1]), 2) for value in label])
    assert score("f1_weighted", counts)[0] == pytest.approx(0.7111, abs=5e-5)


def test_metrics_agree_with_scikit_learn():
    rng = np.random.default_rng(0)
    label, prediction = rng.integers(5, size=300), rng.integers(4, size=300)
    counts = confusion_counts(label, prediction, 6)[None]
    for average in ("weighted", "macro"):
        assert score(f"f1_{average}", counts)[0] == pytest.approx(f1_score(label, prediction, average=average))
    iou = jaccard_score(label, prediction, average=None, labels=range(5))
    assert score("miou_incl_bg", counts)[0] == pytest.approx(iou.mean())
    assert score("iou_fg", counts)[0] == pytest.approx(iou[1:].mean())


def test_segmentation_metrics_counted_by_hand():
    # Image 0: 16 pixels, disc of 4, predicted 6 of which 3 hit. Image 1: no foreground, none predicted.
    masks = np.zeros((2, 16), dtype=int), np.zeros((2, 16), dtype=int)
    masks[0][0, :4] = 1
    masks[1][0, 1:7] = 1
    counts = np.stack([confusion_counts(label, prediction, 2) for label, prediction in zip(*masks, strict=True)])
    assert counts.tolist() == [[[9, 3], [1, 3]], [[16, 0], [0, 0]]]
    scores = all_scores("segmentation", counts)
    assert scores["iou_fg"] == pytest.approx(3 / 7)
    assert scores["f1_fg"] == pytest.approx(2 * 3 / (4 + 6))
    assert scores["miou_incl_bg"] == pytest.approx((25 / 29 + 3 / 7) / 2)
    # Per class over the images it is in: background (9/13 + 1) / 2; foreground 3/7 in image 0 only.
    assert scores["miou_imagewise"] == pytest.approx(((9 / 13 + 1) / 2 + 3 / 7) / 2)


def test_weights_are_repetitions():
    rng = np.random.default_rng(1)
    counts = rng.integers(0, 9, size=(6, 3, 3))
    counts[2, 2], counts[2, :, 2] = 0, 0
    weights = np.array([[1, 0, 2, 0, 3, 0], [0, 1, 1, 1, 1, 2]])
    for metric in METRICS["segmentation"]:
        repeated = [score(metric, np.repeat(counts, row, axis=0))[0] for row in weights]
        assert score(metric, counts, weights.astype(float)) == pytest.approx(repeated)


def test_nothing_to_score_is_nan():
    counts = np.array([[[20, 0], [0, 0]]])
    assert math.isnan(score("iou_fg", counts)[0]) and math.isnan(score("f1_fg", counts)[0])
    assert score("miou_incl_bg", counts)[0] == 1


def test_perfect_prediction_scores_one_for_many_classes():
    label = np.arange(25) % 5
    assert set(all_scores("segmentation", confusion_counts(label, label, 5)[None]).values()) == {1.0}
