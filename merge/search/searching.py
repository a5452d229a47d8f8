"""`momo merge search`: coefficients of a merge by the sensors' own validation losses.

<out>.yaml            the merge found, for momo merge --config
<out>-trials.jsonl    every trial, see `momo.merge.search.log`; a search that was stopped goes on from it
<out>-report.json     losses and gains on tiles the search did not see
<out>.png             loss against trial, and against the coefficient where there is one

The optimiser is the tree-structured Parzen estimator of Optuna (Bergstra et al. 2011; Watanabe 2023, arXiv 2304.11127).
Its random numbers are drawn anew for each trial from seed and number of the trial, so a search that was stopped and
started again chooses what an undisturbed one chooses.
"""

from __future__ import annotations

import importlib.metadata
import math
import time
import warnings
from pathlib import Path
from typing import Any

from momo.errors import CheckpointError, DataError, MergeError
from momo.extras import require
from momo.files import write_json, write_text

from ..plan import MergePlan, make_plan, merged_state
from .config import SearchConfig
from .log import Trial, TrialLog
from .losses import HELD_OUT, SEARCHED, Bench, TileLosses
from .report import file_text, plot_search, report_fields, table
from .space import Point, Space, depth_groups


def search(config: SearchConfig) -> Path:
    """Searches the coefficients of a merge and writes them for `momo merge`.

    Half of each sensor's validation tiles choose. The merge found, task arithmetic with 0.5 and the plain average are
    then scored on the other half, so the gain that is told is not the luck of the search.

    Args:
        config: Weights, corpora, methods, range and budget.

    Returns:
        The YAML file.

    Raises:
        CheckpointError: A parent is missing or damaged, has no decoder, or does not fit the tiles.
        MergeError: The parents do not fit together, a corpus is not one of theirs, `out-trials.jsonl` is of another
            search, or no merge has a finite loss.
        DataError: A corpus cannot be read, or `out` is no result of a search.
        ConfigError: A package is not installed.
    """
    require("optuna", "merge")
    require("matplotlib.figure", "merge")
    out = Path(config.out)
    trials = out.with_name(f"{out.stem}-trials.jsonl")
    if out.exists() and not trials.exists():
        raise DataError(
            "the output exists already",
            seen=out,
            rule="only a result of momo merge search is replaced, by more trials of the same search",
            fix="choose another `out`, or remove the file",
        )
    plan = make_plan(config.merge_config(config.methods[0]))
    space = make_space(config, plan)
    for method in space.methods:  # a method that cannot merge these parents is told before hours of trials
        plan_of(plan, config, space, Point(method))
    bench = Bench(plan, config)
    log = TrialLog.open(trials, _identity(config, plan, space, bench))
    _run(config, plan, space, bench, log)
    best = best_trial(log.trials)
    compared = {"found": best.point, **{point.label: point for point in space.references}}
    losses = {
        name: bench.losses(HELD_OUT, merged_state(plan_of(plan, config, space, point)))
        for name, point in compared.items()
    }
    keys = config.merge_keys(best.point.method, **space.coefficients(best.point))
    report = report_fields(bench, log.trials, best, losses, keys)
    write_json(out.with_name(f"{out.stem}-report.json"), report)
    plot_search(log.trials, best, space, out.with_suffix(".png"))
    write_text(out, file_text(report, keys, out))
    print(table(report))
    print(f"written: {out}; merge with: momo merge --config {out} out=weights/merged")
    return out


def make_space(config: SearchConfig, plan: MergePlan) -> Space:
    """Returns what the search may choose."""
    return Space(
        methods=tuple(config.methods),
        per=config.per,
        parents=tuple(sorted(parent.name for parent in plan.parents)),
        low=config.low,
        high=config.high,
        groups=depth_groups(plan.merged, config.groups) if config.per == "layer_group" else {},
    )


def plan_of(plan: MergePlan, config: SearchConfig, space: Space, point: Point) -> MergePlan:
    """Returns the plan of a point, on the parents that are open already.

    Raises:
        ConfigError: The method cannot merge these parents.
    """
    wanted = config.merge_config(point.method, **space.coefficients(point))
    return plan.replaced(**{name: value for name, value in vars(wanted).items() if value != getattr(plan.config, name)})


def best_trial(trials: list[Trial]) -> Trial:
    """Returns the trial with the lowest score; the first of equals.

    Raises:
        MergeError: None has a finite score.
    """
    scored = [(trial.score, trial.number, trial) for trial in trials if trial.score is not None]
    if not scored:
        raise MergeError(
            "no merge of the search has a finite loss",
            seen=f"{len(trials)} trials",
            rule="merges lie where the model still works",
            fix="lower high=..., and see whether the checkpoints share one base",
        )
    return min(scored)[2]


def _run(config: SearchConfig, plan: MergePlan, space: Space, bench: Bench, log: TrialLog) -> None:
    started = time.monotonic()
    first = [*space.references, *space.fixed]
    total = config.trials if space.searched else min(config.trials, len(first))
    if log.trials:
        print(f"{len(log.trials)} trials are there already: {log.path}")
    study = _study(space, log.trials)
    bar = require("tqdm", "merge").tqdm(
        total=total, initial=min(len(log.trials), total), unit="trial", disable=None, desc="search"
    )
    with bar:
        for number in range(len(log.trials), total):
            late = config.minutes is not None and time.monotonic() - started > 60 * config.minutes
            if late and number >= len(space.references):  # without these a result could not be told
                bar.write(f"the budget of {config.minutes:g} minutes is spent after {number} of {total} trials")
                break
            if number < len(first):
                point, parameters = first[number], space.parameters(first[number])
            else:
                study.sampler = _sampler(config.seed + number, space)
                asked = study.ask()
                point, parameters = space.suggest(asked), asked.params
            log.add(_scored(bench, number, point, parameters, plan_of(plan, config, space, point)))
            if number < len(first):
                _tell(study, space, log.trials[-1])
            else:
                study.tell(asked, *_outcome(log.trials[-1]))
            bar.update()


def _scored(bench: Bench, number: int, point: Point, parameters: dict[str, Any] | None, plan: MergePlan) -> Trial:
    losses: TileLosses | None
    try:
        losses = bench.losses(SEARCHED, merged_state(plan))
    except CheckpointError as error:  # weights too far off for a loss; another trial may do better
        if "not finite" not in error.what:
            raise
        losses = None
    means = {sensor: None if losses is None else _finite(float(losses[sensor].mean())) for sensor in bench.sensors}
    score = None if losses is None or None in means.values() else _finite(bench.score(SEARCHED, losses))
    return Trial(number, point, means, score, parameters)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


# --- the optimiser --------------------------------------------------------------------------------------------------


def _study(space: Space, trials: list[Trial]) -> Any:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="minimize", sampler=_sampler(0, space))
    for trial in trials:
        _tell(study, space, trial)
    return study


def _sampler(seed: int, space: Space) -> Any:
    import optuna

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        # Methods have coefficients of their own: `group` models those of each method together.
        return optuna.samplers.TPESampler(seed=seed, multivariate=True, group=len(space.searched) > 1)


def _tell(study: Any, space: Space, trial: Trial) -> None:
    """Adds a trial that the study has not asked for."""
    import optuna

    if trial.parameters is None:
        return
    value, state = _outcome(trial)
    study.add_trial(
        optuna.trial.create_trial(
            params=trial.parameters,
            distributions=space.distributions(list(trial.parameters), optuna.distributions),
            value=value,
            state=state,
        )
    )


def _outcome(trial: Trial) -> tuple[float | None, Any]:
    import optuna

    state = optuna.trial.TrialState.COMPLETE if trial.score is not None else optuna.trial.TrialState.FAIL
    return trial.score, state


def _identity(config: SearchConfig, plan: MergePlan, space: Space, bench: Bench) -> dict[str, Any]:
    return {
        "parents": {parent.name: parent.source.sha256 for parent in plan.everyone},
        "fisher": {parent.name: config.options.get("fisher", {}).get(parent.name) for parent in plan.parents},
        "options": {key: value for key, value in config.options.items() if key != "fisher"},
        "methods": list(space.methods),
        "per": space.per,
        "groups": {group: list(globs) for group, globs in space.groups.items()},
        "range": [space.low, space.high],
        "seed": config.seed,
        "losses": bench.identity(),
        "optuna": importlib.metadata.version("optuna"),
    }
