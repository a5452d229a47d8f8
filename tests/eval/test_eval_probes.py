from __future__ import annotations

import numpy as np
import pytest

from momo.errors import ConfigError
from momo.eval.config import KnnConfig, LinearConfig
from momo.eval.datasets import Sample
from momo.eval.plan import draw_train
from momo.eval.probes import knn_predict, run_knn, run_linear


def line(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float32)[:, None]


def test_knn_votes_by_hand():
    train, label = line(0, 1, 2, 3, 10), np.array([0, 1, 1, 0, 2])
    predicted = [int(knn_predict(train, label, line(0.1), KnnConfig(k=k, metric="l2"), 3)[0]) for k in (1, 2, 3, 4)]
    # k=1: the 0 at 0; k=2: a tie, the nearer 0 wins; k=3: two 1s; k=4: two each, the nearer 0 wins.
    assert predicted == [0, 0, 1, 0]
    assert knn_predict(train, label, line(9.0), KnnConfig(k=1, metric="l2"), 3).tolist() == [2]
    assert knn_predict(train, label, line(9.0), KnnConfig(k=99, metric="l2"), 3).tolist() == [0]


def test_knn_metrics_differ():
    train, label = np.array([[10, 0], [0.5, 0.5]], dtype=np.float32), np.array([0, 1])
    query = np.array([[1, 0.2]], dtype=np.float32)
    assert knn_predict(train, label, query, KnnConfig(k=1, metric="cosine"), 2).tolist() == [0]
    assert knn_predict(train, label, query, KnnConfig(k=1, metric="l2"), 2).tolist() == [1]


def gaussians(seed: int, count: int, gap: float) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    label = np.arange(count) % 3
    return rng.normal(size=(count, 6)).astype(np.float32) * [1, 50, 1, 1, 1, 1] + gap * np.eye(6)[label], label


def splits(gap: float) -> tuple[dict, dict]:
    drawn = {name: gaussians(seed, 90, gap) for seed, name in enumerate(("train", "val", "test"))}
    features = {name: pair[0].astype(np.float32) for name, pair in drawn.items()}
    return features, {name: pair[1] for name, pair in drawn.items()}


def test_linear_probe_learns_through_a_loud_useless_feature():
    features, labels = splits(gap=4)
    # Classes 0 and 2 stand apart along quiet axes; axis 1 drowns class 1, which is what the others leave over.
    outcome = run_linear(features, labels, LinearConfig(c_grid=[1e-3, 1.0]), 3)
    assert (outcome.prediction_N == labels["test"]).mean() > 0.9
    assert [entry["C"] for entry in outcome.grid] == [1e-3, 1.0]
    best = max(outcome.grid, key=lambda entry: entry["val_score"])
    assert outcome.hyper_parameters["C"] == best["C"] and outcome.hyper_parameters["standardised"]


def test_hyper_parameters_never_see_the_test_labels():
    features, labels = splits(gap=1)
    shuffled = labels | {"test": labels["test"][::-1].copy()}
    first, second = (run_linear(features, side, LinearConfig(), 3) for side in (labels, shuffled))
    assert first.grid == second.grid and (first.prediction_N == second.prediction_N).all()
    first, second = (run_knn(features, side, KnnConfig(), 3) for side in (labels, shuffled))
    assert first.grid == second.grid and (first.prediction_N == second.prediction_N).all()


def test_equal_validation_scores_take_the_stronger_regularisation():
    features, labels = splits(gap=200)
    outcome = run_linear(features, labels, LinearConfig(c_grid=[10.0, 1.0, 0.1]), 3)
    assert [entry["val_score"] for entry in outcome.grid] == [1, 1, 1]
    assert outcome.hyper_parameters["C"] == 0.1 and outcome.hyper_parameters["at_grid_edge"]


def test_unconverged_fit_is_marked():
    features, labels = splits(gap=1)
    outcome = run_linear(features, labels, LinearConfig(c_grid=[1e4], max_iter=2), 3)
    assert outcome.hyper_parameters["converged"] is False


def samples(*strata: int) -> list[Sample]:
    return [Sample(key=str(n), image=None, stratum=stratum) for n, stratum in enumerate(strata)]


def test_training_draw_is_stratified_seeded_and_nested():
    many = samples(*[0] * 50, *[1] * 10, 2)
    drawn = draw_train(many, 0.4, seed=1)
    assert [sum(many[i].stratum == s for i in drawn) for s in range(3)] == [20, 4, 1]
    assert drawn == draw_train(many, 0.4, seed=1) != draw_train(many, 0.4, seed=2)
    assert set(draw_train(many, 0.2, seed=1)) < set(drawn)
    assert draw_train(many, 1.0, seed=5) == list(range(61))


def test_probe_options_are_checked():
    with pytest.raises(ConfigError, match=r"knn\.k is out of range: 0"):
        KnnConfig(k=0)
    with pytest.raises(ConfigError, match="knn.metric has an unknown value: 'cosin'.*did you mean 'cosine'"):
        KnnConfig(metric="cosin")
    with pytest.raises(ConfigError, match=r"linear\.c_grid are empty"):
        LinearConfig(c_grid=[])
    with pytest.raises(ConfigError, match=r"linear\.c_grid are not unique: 1\.0"):
        LinearConfig(c_grid=[1.0, 1.0])
