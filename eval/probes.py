"""Probes on frozen features: k nearest neighbours and logistic regression."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from momo.extras import require

from .config import KnnConfig, LinearConfig
from .metrics import HEADLINE, confusion_counts, score

Features = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]


@dataclass
class Outcome:
    """What a probe did.

    Attributes:
        prediction_N: Predicted class of each test image.
        hyper_parameters: The values that were tested.
        grid: Every candidate with its `val_score`; empty when nothing was chosen.
    """

    prediction_N: Labels
    hyper_parameters: dict[str, Any]
    grid: list[dict[str, Any]] = field(default_factory=list)


def headline_score(label_N: Labels, prediction_N: Labels, classes: int) -> float:
    """Returns the headline metric of classification on one split; 0 when it is undefined."""
    counts = confusion_counts(label_N, prediction_N, classes)[None]
    value = float(score(HEADLINE["classification"], counts)[0])
    return value if np.isfinite(value) else 0.0


def knn_predict(train_ND: Features, label_N: Labels, query_MD: Features, config: KnnConfig, classes: int) -> Labels:
    """Predicts by the majority of the k nearest training features.

    A tie between classes goes to the class of the nearest neighbour among the tied; equal distances keep the order of
    the training set. With fewer than k training images all of them vote.

    Args:
        train_ND: Training features.
        label_N: Their classes.
        query_MD: Features to classify.
        config: k and metric: `cosine` scales features to unit length, `l2` takes them as they are.
        classes: Number of classes.

    Returns:
        int64 of shape (M,).
    """
    train, query = torch.from_numpy(train_ND), torch.from_numpy(query_MD)
    if config.metric == "cosine":
        train, query = (torch.nn.functional.normalize(x, dim=1) for x in (train, query))
    k = min(config.k, len(train))
    label = torch.from_numpy(label_N)
    predicted = []
    for block in query.split(1024):
        distance = torch.cdist(block.double(), train.double())
        nearest = distance.argsort(dim=1, stable=True)[:, :k]
        voters = label[nearest]
        votes = torch.zeros(len(block), classes).scatter_add_(1, voters, torch.ones(voters.shape))
        # A vote of rank r adds at most 1 / 4^r more, so that ranks only decide between equal numbers of votes.
        bonus = 0.25 ** torch.arange(1, k + 1, dtype=torch.float64)
        ranked = votes.double().scatter_add_(1, voters, bonus.expand(voters.shape).contiguous())
        predicted.append(ranked.argmax(dim=1))
    return torch.cat(predicted).numpy()


def run_knn(features: dict[str, Features], labels: dict[str, Labels], config: KnnConfig, classes: int) -> Outcome:
    """Classifies the test split by its nearest training features; `k` is fixed, so validation is only reported.

    Args:
        features: By split; `train` is what the run may learn from.
        labels: By split.
        config: k and metric.
        classes: Number of classes.
    """
    predicted = {
        split: knn_predict(features["train"], labels["train"], features[split], config, classes)
        for split in ("val", "test")
    }
    chosen = {"k": min(config.k, len(labels["train"])), "metric": config.metric}
    val = headline_score(labels["val"], predicted["val"], classes)
    return Outcome(predicted["test"], chosen, [{**chosen, "val_score": val}])


def run_linear(features: dict[str, Features], labels: dict[str, Labels], config: LinearConfig, classes: int) -> Outcome:
    """Fits logistic regressions on the training features and tests the one that is best on validation.

    Features are standardised with mean and deviation of the training features (the parameter-free batch norm of MAE's
    linear probe). Equal validation scores go to the stronger regularisation. The test split is looked at once.

    Args:
        features: By split; `train` is what the run may learn from.
        labels: By split.
        config: Grid of C and iterations.
        classes: Number of classes.
    """
    linear_model = require("sklearn.linear_model", "eval")
    convergence_warning = require("sklearn.exceptions", "eval").ConvergenceWarning
    train = features["train"].astype(np.float64)
    centre, spread = train.mean(axis=0), train.std(axis=0)
    spread[spread < 1e-8] = 1.0
    scaled = {split: (values - centre) / spread for split, values in features.items()}
    grid: list[dict[str, Any]] = []
    best: tuple[float, Any] | None = None
    for strength in sorted(config.c_grid):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", convergence_warning)
            fitted = linear_model.LogisticRegression(C=strength, max_iter=config.max_iter)
            fitted.fit(scaled["train"], labels["train"])
        converged = not any(issubclass(w.category, convergence_warning) for w in caught)
        val = headline_score(labels["val"], fitted.predict(scaled["val"]).astype(np.int64), classes)
        grid.append({"C": strength, "val_score": val, "converged": converged})
        if best is None or val > best[0]:
            best = (val, fitted)
    assert best is not None
    chosen = next(entry for entry in grid if entry["C"] == best[1].C)
    hyper_parameters = {
        "C": chosen["C"],
        "converged": chosen["converged"],
        "at_grid_edge": len(grid) > 2 and chosen in (grid[0], grid[-1]),
        "max_iter": config.max_iter,
        "standardised": True,
    }
    return Outcome(best[1].predict(scaled["test"]).astype(np.int64), hyper_parameters, grid)
