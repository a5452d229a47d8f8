"""How sure the numbers are: bootstrap intervals over test images, seeds and pairs of models.

All intervals are percentile intervals (Efron & Tibshirani 1993, chapter 13) of seeded resamples. The resamples of the
test images depend on their number and on the seed alone, so two models are resampled alike and can be compared.
Axes: N test images, D draws, R runs (seeds), C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from momo.errors import EvalError
from momo.files import sha256_json

from .config import MIN_SEEDS
from .metrics import Counts, Floats, score
from .results import Result

LEVEL = 0.95


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A point estimate and its 95 % interval; NaN where undefined."""

    value: float
    low: float
    high: float


def image_weights(images: int, *, draws: int = 1000, seed: int = 0) -> Floats:
    """Draws bootstrap resamples of the test images.

    Args:
        images: Number of test images N.
        draws: Number of resamples D.
        seed: Seed of the draws.

    Returns:
        Shape (D, N): how often each image stands in each resample; rows sum to N.
    """
    rng = np.random.default_rng([seed, images])
    return rng.multinomial(images, np.full(images, 1 / images), size=draws).astype(np.float64)


def _percentiles(values_D: Floats) -> tuple[float, float]:
    # A resample without anything to score (no foreground, say) has no value; the others stand for the interval.
    defined = values_D[np.isfinite(values_D)]
    if defined.size == 0:
        return float("nan"), float("nan")
    low, high = np.quantile(defined, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def bootstrap_interval(counts_NCC: Counts, metric: str, *, draws: int = 1000, seed: int = 0) -> Interval:
    """Interval of one run: how much its score depends on which test images were taken.

    Args:
        counts_NCC: Confusion counts of each test image.
        metric: A name in `momo.eval.metrics.METRICS`.
        draws: Number of resamples.
        seed: Seed of the resamples.
    """
    weights_DN = image_weights(len(counts_NCC), draws=draws, seed=seed)
    low, high = _percentiles(score(metric, counts_NCC, weights_DN))
    return Interval(value=float(score(metric, counts_NCC)[0]), low=low, high=high)


def _run_weights(runs: int, draws: int, seed: int) -> Floats:
    rng = np.random.default_rng([seed, runs, 1])
    return rng.multinomial(runs, np.full(runs, 1 / runs), size=draws) / runs


def _scores_RD(counts_RNCC: Sequence[Counts], metric: str, weights_DN: Floats) -> Floats:
    return np.stack([score(metric, counts_NCC, weights_DN) for counts_NCC in counts_RNCC])


def combined_interval(counts_RNCC: Sequence[Counts], metric: str, *, draws: int = 1000, seed: int = 0) -> Interval:
    """Interval of the mean over runs: test images and seeds are both resampled.

    Each draw takes R runs with replacement and one resample of the test images, shared by all runs because they were
    scored on the same images. With few runs the spread over seeds is underestimated (by about (R - 1) / R).

    Args:
        counts_RNCC: Confusion counts of each run, all on the same test images in the same order.
        metric: A name in `momo.eval.metrics.METRICS`.
        draws: Number of draws.
        seed: Seed of the draws.
    """
    weights_DN = image_weights(len(counts_RNCC[0]), draws=draws, seed=seed)
    mean_D = (_scores_RD(counts_RNCC, metric, weights_DN) * _run_weights(len(counts_RNCC), draws, seed).T).sum(axis=0)
    low, high = _percentiles(mean_D)
    return Interval(value=float(np.mean([score(metric, c)[0] for c in counts_RNCC])), low=low, high=high)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """First model minus second on the same test images.

    Attributes:
        value: Mean over runs of the difference of scores.
        low: Lower end of the 95 % interval; above 0 means the first is better beyond chance of images and seeds.
        high: Upper end.
        share_above: Share of the draws with a difference above 0.
    """

    value: float
    low: float
    high: float
    share_above: float


def paired_difference(
    first_RNCC: Sequence[Counts], second_RNCC: Sequence[Counts], metric: str, *, draws: int = 1000, seed: int = 0
) -> Difference:
    """Compares two models run for run and image for image.

    Args:
        first_RNCC: Confusion counts of the first model's runs, by seed.
        second_RNCC: Of the second model's runs with the same seeds, on the same test images in the same order.
        metric: A name in `momo.eval.metrics.METRICS`.
        draws: Number of draws.
        seed: Seed of the draws.

    Raises:
        EvalError: The numbers of runs or of images differ.
    """
    shapes = [[counts.shape for counts in side] for side in (first_RNCC, second_RNCC)]
    if not shapes[0] or shapes[0] != shapes[1] or len(set(shapes[0])) != 1:
        raise EvalError(
            "the two models cannot be paired",
            seen=f"runs and shapes {shapes[0]} against {shapes[1]}",
            rule="same seeds, same test images, same classes",
        )
    weights_DN = image_weights(len(first_RNCC[0]), draws=draws, seed=seed)
    gap_RD = _scores_RD(first_RNCC, metric, weights_DN) - _scores_RD(second_RNCC, metric, weights_DN)
    gap_D = (gap_RD * _run_weights(len(first_RNCC), draws, seed).T).sum(axis=0)
    low, high = _percentiles(gap_D)
    pairs = zip(first_RNCC, second_RNCC, strict=True)
    value = float(np.mean([score(metric, a)[0] - score(metric, b)[0] for a, b in pairs]))
    return Difference(value=value, low=low, high=high, share_above=float((gap_D[np.isfinite(gap_D)] > 0).mean()))


@dataclass(frozen=True, kw_only=True)
class Summary:
    """All seeds of one (dataset, protocol, model).

    Attributes:
        dataset: Name of the dataset.
        protocol: Name of the protocol.
        model: Name of the model.
        metric: Exact name of the metric.
        n_runs: Number of seeds.
        n_test: Number of test images.
        mean: Mean over seeds; NaN when undefined.
        std: Sample standard deviation over seeds (n - 1); NaN with one seed.
        low: Lower end of the 95 % interval over seeds and test images.
        high: Upper end.
        few_seeds: True with fewer than 3 seeds: the spread over seeds is not to be trusted.
        values: Score of each seed, in order of seeds.
        fraction: Label budget.
        train_subset: CSV that named the training images, or None.
    """

    dataset: str
    protocol: str
    model: str
    metric: str
    n_runs: int
    n_test: int
    mean: float
    std: float
    low: float
    high: float
    few_seeds: bool
    values: tuple[float, ...]
    fraction: float = 1.0
    train_subset: str | None = None


def summarise(
    runs: Sequence[Result], metric: str | None = None, *, draws: int | None = None, seed: int = 0
) -> list[Summary]:
    """Joins the seeds of each (dataset, protocol, model) into one line.

    Args:
        runs: Results in any order; runs of several datasets, protocols and models may be mixed.
        metric: Exact name; each task's headline when None.
        draws: Bootstrap draws; as many as the runs used when None.
        seed: Seed of the draws.

    Returns:
        One entry a group, in order of first appearance. Copied numbers have no interval (NaN).

    Raises:
        EvalError: Runs of one group were scored on different datasets, or predictions cannot be read.
    """
    groups: dict[tuple[object, ...], list[Result]] = {}
    for run in runs:
        groups.setdefault(run.group, []).append(run)
    return [_summarise_group(sorted(group, key=lambda run: run.seed), metric, draws, seed) for group in groups.values()]


def _summarise_group(runs: list[Result], metric: str | None, draws: int | None, seed: int) -> Summary:
    first = runs[0]
    if len({sha256_json(run.identity()) for run in runs}) > 1:
        raise EvalError(
            "runs of one model differ in more than the seed",
            seen=f"{first.dataset} {first.protocol} {first.model}",
            rule="one dataset, one weights file and one set of options",
            fix="evaluate into a fresh folder",
        )
    metric = metric or first.headline
    values = tuple(_number(run.metrics[metric].value) for run in runs)
    low = high = float("nan")
    if all(run.predictions is not None for run in runs):
        counts = [run.load_predictions().counts_NCC for run in runs]
        interval = combined_interval(counts, metric, draws=draws or first.bootstrap["draws"], seed=seed)
        low, high = interval.low, interval.high
    return Summary(
        dataset=first.dataset,
        protocol=first.protocol,
        model=first.model,
        metric=metric,
        n_runs=len(runs),
        n_test=first.n_test,
        mean=float(np.mean(values)),
        std=float(np.std(values, ddof=1)) if len(values) > 1 else float("nan"),
        low=low,
        high=high,
        few_seeds=len(runs) < MIN_SEEDS,
        values=values,
        fraction=first.fraction,
        train_subset=first.train_subset,
    )


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def compare(
    first: Sequence[Result], second: Sequence[Result], metric: str | None = None, *, seed: int = 0
) -> Difference:
    """Compares two models on one (dataset, protocol), seed for seed (see `paired_difference`).

    Args:
        first: Runs of the first model.
        second: Runs of the second model with the same seeds.
        metric: Exact name; the headline when None.
        seed: Seed of the draws.

    Raises:
        EvalError: Seeds, dataset, protocol or settings differ.
    """
    sides = [sorted(side, key=lambda run: run.seed) for side in (first, second)]
    facts = [[(r.seed, r.dataset_fingerprint, r.protocol, r.config_hash) for r in side] for side in sides]
    if not facts[0] or facts[0] != facts[1]:
        raise EvalError(
            "the two models cannot be paired",
            seen=f"seeds {[f[0] for f in facts[0]]} against {[f[0] for f in facts[1]]}",
            rule="same seeds, dataset, protocol and settings",
            fix="evaluate both with one configuration",
        )
    run = sides[0][0]
    counts, others = ([r.load_predictions().counts_NCC for r in side] for side in sides)
    return paired_difference(counts, others, metric or run.headline, draws=run.bootstrap["draws"], seed=seed)
