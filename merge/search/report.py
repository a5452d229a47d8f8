"""What a search tells: report, table, the head of its YAML file and the plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from momo.files import atomic_file
from momo.sensors import sensor_colour
from momo.version import __version__

from .log import Trial
from .losses import HELD_OUT, SEARCHED, Bench, TileLosses
from .space import COEFFICIENT, Space

_REFERENCES = ("0.5", "average")
_ROOM = 0.04  # of the lowest score, above it in the plot


def report_fields(
    bench: Bench, trials: list[Trial], best: Trial, losses: dict[str, TileLosses], keys: dict[str, Any]
) -> dict[str, Any]:
    """Returns what `<out>-report.json` holds.

    Args:
        bench: It scored the merges.
        trials: Of the search.
        best: The best of them.
        losses: Losses on the held-out half of `found`, `0.5` and `average`.
        keys: The merge found, as keys of `MergeConfig`.
    """
    own = bench.own_losses(HELD_OUT)
    held_out: dict[str, Any] = {
        name: {"score": bench.score(HELD_OUT, found), "losses": _means(found)} for name, found in losses.items()
    }
    held_out["own_checkpoints"] = {
        "score": bench.score(HELD_OUT, own) if len(own) == len(bench.sensors) else None,
        "losses": _means(own),
    }
    return {
        "momo_version": __version__,
        "merge": keys,
        "objective": bench.objective,
        "relative": bench.relative,
        "tiles": {
            sensor: {half: len(halves.places[half]) for half in (SEARCHED, HELD_OUT)} | {"cut_by": halves.by}
            for sensor, halves in bench.halves.items()
        },
        "best_trial": best.number,
        "trials": len(trials),
        "not_finite": sum(trial.score is None for trial in trials),
        "searched": {
            name: {"score": trial.score, "losses": trial.losses}
            for name, trial in (("found", best), *((t.point.label, t) for t in trials if t.point.label))
        },
        "held_out": held_out,
        "gains": {name: bench.gain(HELD_OUT, losses["found"], losses[name]) for name in _REFERENCES},
        "protocol": bench.meters[HELD_OUT].protocol,
    }


def _means(losses: TileLosses) -> dict[str, float]:
    return {sensor: float(values.mean()) for sensor, values in losses.items()}


def table(report: dict[str, Any]) -> str:
    """Returns the lines that are printed."""
    sensors = list(report["tiles"])
    joined = f"{report['objective']}{' relative' if report['relative'] else ''}"
    lines = [
        f"best of {report['trials']} trials: number {report['best_trial']}, {describe(report['merge'])}",
        f"  on validation tiles the search did not see: {_tiles(report)}",
        f"  {'merge':<16} {joined:>14} " + " ".join(f"{sensor:>9}" for sensor in sensors),
    ]
    for name, row in report["held_out"].items():
        score = "-" if row["score"] is None else f"{row['score']:.5f}"
        cells = " ".join(f"{row['losses'][s]:>9.5f}" if s in row["losses"] else f"{'-':>9}" for s in sensors)
        lines.append(f"  {name.replace('_', ' '):<16} {score:>14} {cells}")
    lines += [f"  {line}" for line in gain_lines(report)]
    if report["not_finite"]:
        lines.append(f"  {report['not_finite']} trials had no finite loss")
    return "\n".join(lines)


def gain_lines(report: dict[str, Any]) -> list[str]:
    """Returns one sentence a merge that was to be beaten."""
    lines = []
    for name, gain in report["gains"].items():
        text = f"gain over {name:<8} {gain['gain']:+.5f} +- {gain['stderr']:.5f} over tiles"
        largest = gain["stderr"]
        if gain["stderr_products"] is not None:
            text += f", +- {gain['stderr_products']:.5f} over {_products(gain)} products"
            largest = max(largest, gain["stderr_products"])
        verdict = "beyond two standard errors" if abs(gain["gain"]) > 2 * largest else "no more than noise"
        lines.append(f"{text}: {verdict if gain['gain'] else 'the same merge'}")
    return lines


def _products(gain: dict[str, Any]) -> str:
    return "+".join(str(own["products"]) for own in gain["per_sensor"].values())


def _tiles(report: dict[str, Any]) -> str:
    return ", ".join(f"{sensor} {own[HELD_OUT]} (cut by {own['cut_by']})" for sensor, own in report["tiles"].items())


def describe(keys: dict[str, Any]) -> str:
    """Says a merge in one line."""
    parts = [str(keys["method"])]
    if "coefficient" in keys:
        parts.append(f"coefficient {keys['coefficient']:.4g}")
    for key in ("coefficients", "layers"):
        parts += [f"{name} {value:.4g}" for name, value in keys.get(key, {}).items()]
    return ", ".join(parts)


def file_text(report: dict[str, Any], keys: dict[str, Any], out: Path) -> str:
    """Returns the YAML file that `momo merge` takes, with the report in its head."""
    head = [
        f"momo merge --config {out} out=weights/merged",
        f"Found by momo merge search {__version__}: best of {report['trials']} trials by the {report['objective']} over"
        f" sensors of the{' relative' if report['relative'] else ''} validation loss.",
        "Paths are relative to the folder momo is started in.",
        *table(report).split("\n"),
    ]
    return "".join(f"# {line}\n" for line in head) + yaml.safe_dump(keys, sort_keys=False, allow_unicode=True)


def plot_search(trials: list[Trial], best: Trial, space: Space, out: Path) -> None:
    """Draws the score of each trial with the best so far, and for one shared coefficient the losses against it."""
    from matplotlib.figure import Figure

    curve = space.per == "shared" and len(space.searched) == 1
    figure = Figure(figsize=(10.4 if curve else 6.2, 4.0), dpi=140, layout="constrained")
    axes = figure.subplots(1, 2 if curve else 1, squeeze=False)[0]
    _plot_trials(axes[0], trials, best)
    if curve:
        _plot_coefficient(axes[1], trials, best, space.searched[0])
    for own in axes:
        own.spines[["top", "right"]].set_visible(False)
        own.grid(axis="y", color="0.92")
        own.legend(frameon=False, fontsize=8)
    with atomic_file(out) as partial:
        figure.savefig(partial, format="png", metadata={"Software": None})


def _plot_trials(axes: Any, trials: list[Trial], best: Trial) -> None:
    scored = [(trial.number, trial.score) for trial in trials if trial.score is not None]
    lowest, so_far = float("inf"), []
    for _, score in scored:
        lowest = min(lowest, score)
        so_far.append(lowest)
    numbers = [number for number, _ in scored]
    axes.plot(numbers, [score for _, score in scored], ".", color="0.6", label="trial")
    axes.step(numbers, so_far, where="post", color="0.2", lw=1.5, label="best so far")
    axes.plot(best.number, best.score, "o", color="#D55E00", mfc="none", ms=11, mew=2, label="found")
    for trial, style in zip((t for t in trials if t.point.label and t.score is not None), ("--", ":"), strict=False):
        axes.axhline(trial.score, color="0.5", lw=1, ls=style, label=trial.point.label)
    # Merges far off would flatten everything else.
    references = [trial.score for trial in trials if trial.point.label and trial.score is not None]
    top = lowest + max(_ROOM * lowest, 2 * (max(references, default=lowest) - lowest))
    axes.set_ylim(lowest - 0.1 * (top - lowest), top)
    if beyond := len(trials) - sum(score <= top for _, score in scored):
        axes.set_title(f"{beyond} of {len(trials)} trials lie above", fontsize=8, color="0.4", loc="right")
    axes.set(xlabel="trial", ylabel="objective on the searched half")


def _plot_coefficient(axes: Any, trials: list[Trial], best: Trial, method: str) -> None:
    own = sorted(
        (t.point.values[COEFFICIENT], t.number)
        for t in trials
        if t.point.method == method and COEFFICIENT in t.point.values
    )
    found = [loss for loss in best.losses.values() if loss is not None]
    axes.set_ylim((1 - 0.2 * _ROOM) * min(found), (1 + 3 * _ROOM) * max(found))
    for sensor in best.losses:
        points = [(x, trials[number].losses[sensor]) for x, number in own if trials[number].losses[sensor] is not None]
        axes.plot(*zip(*points, strict=True), ".-", lw=1, color=sensor_colour(sensor), label=sensor)
    if best.point.method == method and COEFFICIENT in best.point.values:
        axes.axvline(best.point.values[COEFFICIENT], color="#D55E00", lw=1.5, label="found")
    for trial, style in zip((t for t in trials if t.point.label), ("--", ":"), strict=False):
        axes.axvline(trial.point.values[COEFFICIENT], color="0.5", lw=1, ls=style, label=trial.point.label)
    axes.set(xlabel=f"coefficient ({method})", ylabel="loss on the searched half")
