"""From result files to the comparisons shown: seeds joined, intervals drawn, every model paired with the best."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from pathlib import Path

from momo.errors import EvalError

from .report_figures import slug
from .report_tables import PROTOCOL_WORDS, Comparison, Score, join_words
from .results import Result
from .statistics import Summary, compare, summarise


def budget_words(fraction: float, train_subset: str | None) -> str:
    """Returns the label budget in words; empty for all labels."""
    parts = [f"{fraction:.4g} of the labels"] if fraction != 1 else []
    return ", ".join(parts + ([Path(train_subset).stem.replace("_", " ")] if train_subset else []))


def build_comparisons(results: list[Result], notes: list[str]) -> list[Comparison]:
    """Groups runs into comparisons and pairs every model with the best one.

    Args:
        results: Runs of any datasets, protocols, models and seeds.
        notes: One line is appended for every number that is left out or could not be paired.

    Raises:
        EvalError: No run has a defined headline metric, or predictions are missing or altered.
    """
    runs_of: dict[tuple[object, ...], list[Result]] = defaultdict(list)
    for result in results:
        runs_of[result.group].append(result)
    by_test: dict[tuple[str, str, float, str | None], list[Summary]] = defaultdict(list)
    for summary in summarise(results):
        if math.isnan(summary.mean):
            notes.append(f"{summary.model} has no defined {summary.metric} on {summary.dataset}, {summary.protocol}.")
            continue
        by_test[(summary.dataset, summary.protocol, summary.fraction, summary.train_subset)].append(summary)
    if not by_test:
        raise EvalError(
            "no result has a defined score", seen=f"{len(results)} runs", fix="see metrics in the JSON files"
        )
    return [_comparison(by_test[test], runs_of, notes) for test in sorted(by_test, key=str)]


def _comparison(
    summaries: list[Summary], runs_of: dict[tuple[object, ...], list[Result]], notes: list[str]
) -> Comparison:
    metrics = {summary.metric for summary in summaries}
    if len(metrics) > 1:
        raise EvalError(
            "models of one comparison have different headline metrics",
            seen=f"{', '.join(sorted(metrics))} on {summaries[0].dataset}",
            rule="numbers under one heading are of one metric",
            fix="keep them in different RESULTS folders",
        )
    ordered = sorted(summaries, key=lambda summary: (-summary.mean, summary.model))
    first = ordered[0]
    best_runs = runs_of[_group(first)]
    budget = budget_words(first.fraction, first.train_subset)
    unpaired: list[str] = []
    scores = [_score(first, best_runs, best=True)]
    for summary in ordered[1:]:
        runs = runs_of[_group(summary)]
        score = dataclasses.replace(_score(summary, runs), difference=summary.mean - first.mean)
        if _pairable(runs, best_runs):
            paired = compare(runs, best_runs)
            low, high = _defined(paired.low), _defined(paired.high)
            score = dataclasses.replace(score, difference=paired.value, difference_low=low, difference_high=high)
        else:
            unpaired.append(summary.model)
        scores.append(score)
    if unpaired:
        notes.append(
            f"{first.dataset}, {first.protocol}: {join_words(unpaired)} could not be paired with {first.model} "
            "(other seeds, settings or test images, or copied numbers), so the difference has no interval."
        )
    return Comparison(
        key=slug("-".join([first.dataset, first.protocol, budget])),
        dataset=first.dataset,
        task=best_runs[0].task,
        protocol=first.protocol,
        budget=budget,
        metric=first.metric,
        split="test",
        scores=tuple(scores),
    )


def _group(summary: Summary) -> tuple[object, ...]:
    return summary.dataset, summary.protocol, summary.model, summary.fraction, summary.train_subset


def _pairable(first: list[Result], second: list[Result]) -> bool:
    sides = [
        sorted((run.seed, run.dataset_fingerprint, run.config_hash) for run in side if run.predictions is not None)
        for side in (first, second)
    ]
    return len(sides[0]) == len(first) and sides[0] == sides[1]


def _defined(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _score(summary: Summary, runs: list[Result], *, best: bool = False) -> Score:
    names = dict.fromkeys(name for run in runs for name in run.metrics)
    values = {name: [run.metrics[name].value for run in runs if name in run.metrics] for name in names}
    defined = {name: [v for v in found if v is not None] for name, found in values.items() if None not in found}
    means = {name: sum(found) / len(found) for name, found in defined.items()}
    return Score(
        model=summary.model,
        mean=summary.mean,
        std=_defined(summary.std),
        low=_defined(summary.low),
        high=_defined(summary.high),
        seeds=tuple(sorted(run.seed for run in runs)),
        n_test=summary.n_test,
        best=best,
        untrained=all(run.weights is None and run.provenance == "rerun" for run in runs),
        copied_from=next((run.source for run in runs if run.source), ""),
        all_metrics=means,
    )


def score_notes(results: list[Result]) -> list[str]:
    """Says what a reader must know before trusting the scores: seeds, what they vary, budgets, doubtful datasets."""
    notes = []
    seeds = sorted({result.seed for result in results if result.provenance == "rerun"})
    varies = list(dict.fromkeys(what for result in results for what in result.seed_varies))
    if seeds:
        changed = f" A seed changes {join_words(varies)}." if varies else ""
        notes.append(
            f"{len(seeds)} seeds ({', '.join(map(str, seeds))}).{changed} "
            "The 95 % intervals resample test images and seeds; differences are paired by image and by seed."
        )
    if few := sorted({result.model for result in results if result.few_seeds}):
        notes.append(f"Fewer than 3 seeds for {join_words(few)}: the spread over seeds is not to be trusted.")
    if copied := sorted({f"{r.model} ({r.source})" for r in results if r.provenance == "copied"}):
        notes.append(f"Copied, not run here: {join_words(copied)}.")
    runs_of: dict[tuple[str, str], list[Result]] = defaultdict(list)
    for result in results:
        runs_of[(result.dataset, result.protocol)].append(result)
    for (dataset, protocol), runs in sorted(runs_of.items()):
        if edge := sum(bool(run.hyper_parameters.get("at_grid_edge")) for run in runs):
            notes.append(
                f"{dataset}, {PROTOCOL_WORDS.get(protocol, protocol)}: in {edge} of {len(runs)} runs the value chosen "
                "stands at the edge of its grid; a wider grid could score higher."
            )
    for dataset, count in sorted({(r.dataset, _duplicates(r)) for r in results}):
        if count:
            notes.append(f"{dataset} has {count} validation or test images that also stand in another split.")
    return notes


def _duplicates(result: Result) -> int:
    found = result.dataset_info.get("duplicates_across_splits") or 0
    return found if isinstance(found, int) else len(found)
