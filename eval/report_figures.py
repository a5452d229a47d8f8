"""Plots of the report: loss curves with picks, and intervals of scores.

Drawn on `Figure` objects without pyplot, so no global state; PNG without dates, so same numbers give same bytes.
Colours are from the Okabe-Ito palette, which holds up under colour blindness; a sensor has the same colour, marker
and line style everywhere.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from momo.extras import require
from momo.pages import Picture
from momo.sensors import SENSORS, sensor_colour

from .report_inputs import Run, Selection, ValPoint, run_of_pick, with_error

if TYPE_CHECKING:
    from .report_tables import Comparison

INK, FAINT, GRID = "#22262b", "#6b737c", "#e3e6e9"
_SENSOR_STYLES = ("-", (0, (6, 1.5)), (0, (5, 1.5, 1.2, 1.5)))
BEST_COLOUR, TIED_COLOUR, REST_COLOUR = "#B0431E", "#56718a", "#9aa3ab"
DPI = 200


def _sensor_style(sensor: str) -> Any:
    return dict(zip(SENSORS, _SENSOR_STYLES, strict=True)).get(sensor, "-")


@contextmanager
def _axes(width: float, height: float) -> Iterator[tuple[Any, Any]]:
    """Gives a figure and its one axes in the page's style; sizes in inches."""
    matplotlib = require("matplotlib", "eval")
    figures = require("matplotlib.figure", "eval")
    style = {
        "font.family": "DejaVu Sans",
        "font.size": 9,
        "axes.edgecolor": FAINT,
        "axes.labelcolor": INK,
        "axes.linewidth": 0.8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": GRID,
        "grid.linewidth": 0.7,
        "axes.axisbelow": True,
        "text.color": INK,
        "xtick.color": FAINT,
        "ytick.color": FAINT,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "legend.frameon": False,
        "legend.fontsize": 8,
    }
    with matplotlib.rc_context(style):
        figure = figures.Figure(figsize=(width, height), facecolor="white", layout="constrained")
        yield figure, figure.subplots()


def _png(figure: Any) -> bytes:
    backend = require("matplotlib.backends.backend_agg", "eval")
    backend.FigureCanvasAgg(figure)
    raw = io.BytesIO()
    figure.savefig(raw, format="png", dpi=DPI, metadata={"Software": None})
    return _fewer_colours(raw.getvalue())


def _fewer_colours(png: bytes) -> bytes:
    """Stores a plot with a palette: a third of the size, no visible difference."""
    from PIL import Image

    image = Image.open(io.BytesIO(png)).convert("RGB").quantize(colors=128, dither=Image.Dither.NONE)
    out = io.BytesIO()
    image.save(out, format="PNG", optimize=True)
    return out.getvalue()


Loss = tuple[float, float | None]


def _curve(
    axes: Any, samples: Sequence[int], points: Sequence[Loss], sensor: str, label: str, *, bars: bool = False
) -> None:
    """Draws losses with their standard errors, as a shaded band or as bars (for a few points that overlap)."""
    loss = np.array([point[0] for point in points])
    stderr = np.array([point[1] or 0.0 for point in points])
    colour = sensor_colour(sensor)
    if bars:
        axes.errorbar(samples, loss, stderr, fmt="none", ecolor=colour, elinewidth=1.2, capsize=3, alpha=0.6)
    else:
        axes.fill_between(samples, loss - stderr, loss + stderr, color=colour, alpha=0.18, linewidth=0)
    marker = "." if len(samples) <= 40 else None
    axes.plot(samples, loss, color=colour, linestyle=_sensor_style(sensor), linewidth=1.6, marker=marker, label=label)


def _thousands(axes: Any) -> None:
    axes.locator_params(axis="x", nbins=6)
    axes.xaxis.set_major_formatter(lambda value, _: short_count(value))
    axes.set_xlabel("training samples seen")


def short_count(value: float) -> str:
    """Writes a count shortly: 800, 12k, 1.5M."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"


def selection_plots(runs: list[Run], selection: Selection) -> list[Picture]:
    """Draws the validation loss of every selected run with pick, early stop and last: whole, and near the picks.

    The band is as high as epsilon and centred on the picks: under the EVL rule all picks lie inside it.
    """
    picks = "; ".join(f"{p.sensor} at {p.samples} samples with loss {p.val_loss:.4f}" for p in selection.picks.values())
    caption = "Star: picked; triangle: early stop (lowest loss); square: last. Shaded or bars: one standard error."
    if selection.epsilon is not None:
        caption += " Yellow band: its height is epsilon; the picks lie inside it."
    pictures = []
    for name, words in (("selection", "Whole runs"), ("selection-near", "Near the picks")):
        with _axes(4.6, 3.5) as (figure, axes):
            _draw_selection(axes, runs, selection, bars=name == "selection-near")
            if name == "selection-near":
                _zoom(axes, runs, selection)
            figure.legend(loc="outside upper center", ncols=4, handlelength=2.0, columnspacing=1.2)
            png = _png(figure)
        alt = f"{words}: validation loss against samples for each sensor; picked by {selection.rule_words}: {picks}"
        pictures.append(Picture(name, png, alt, f"{words}. {caption}", 480))
    return pictures


def _draw_selection(axes: Any, runs: list[Run], selection: Selection, *, bars: bool) -> None:
    if selection.epsilon is not None:
        losses = [pick.val_loss for pick in selection.picks.values()]
        middle, half = (max(losses) + min(losses)) / 2, selection.epsilon / 2
        label = f"epsilon {selection.epsilon:.3g}"
        axes.axhspan(middle - half, middle + half, color="#f1c40f", alpha=0.3, linewidth=0, label=label)
    for sensor, pick in selection.picks.items():
        colour = sensor_colour(sensor)
        hollow = {"mfc": "white", "mec": colour, "mew": 1.4}
        if (run := run_of_pick(pick, runs)) is not None:
            points = [_loss_of(point, sensor) for point in run.val]
            _curve(axes, [point.samples for point in run.val], points, sensor, sensor, bars=bars)
            axes.plot(run.last.samples, points[-1][0], "s", ms=8.5, zorder=4, **hollow)
            if (stop := _loss_at(run, pick.early_stop_samples, sensor)) is not None:
                axes.plot(pick.early_stop_samples, stop, "v", ms=7, zorder=5, **hollow)
        axes.plot(pick.samples, pick.val_loss, "*", mfc=colour, mec="white", mew=0.8, ms=14, zorder=6)
    for marker, label, size in (("*", "picked", 11), ("v", "early stop", 7), ("s", "last", 6)):
        face, edge = (INK, "white") if marker == "*" else ("white", INK)
        axes.plot([], [], marker, mfc=face, mec=edge, ms=size, label=label)
    axes.set_ylabel("validation loss")
    _thousands(axes)


def _zoom(axes: Any, runs: list[Run], selection: Selection) -> None:
    """Limits the axes to the samples around the first pick or early stop and later, and to the losses there."""
    picks = selection.picks.values()
    first = min(min(pick.samples, pick.early_stop_samples) for pick in picks)
    last = max(pick.samples for pick in picks)
    # Three validations before the earliest pick show where the curves come from.
    before = sorted(
        {p.samples for pick in picks if (run := run_of_pick(pick, runs)) for p in run.val if p.samples < first}
    )
    first = before[-3:][0] if before else first
    losses = [pick.val_loss for pick in picks]
    for pick in picks:
        if (run := run_of_pick(pick, runs)) is not None:
            last = max(last, run.last.samples)
            near = [_loss_of(point, pick.sensor) for point in run.val if point.samples >= first]
            losses += [loss + sign * (stderr or 0) for loss, stderr in near for sign in (-1, 1)]
    middle, half = (max(losses) + min(losses)) / 2, (max(losses) - min(losses)) / 2
    half = max(half, (selection.epsilon or 0) / 2, 1e-6) * 1.1
    room = max(last - first, 1) * 0.08
    axes.set_xlim(first - room, last + room)
    axes.set_ylim(middle - half, middle + half)


def _loss_of(point: ValPoint, sensor: str) -> Loss:
    return point.per_sensor.get(sensor, (point.loss, point.stderr))


def _loss_at(run: Run, samples: int, sensor: str) -> float | None:
    return next((_loss_of(point, sensor)[0] for point in run.val if point.samples == samples), None)


def run_plot(run: Run) -> Picture:
    """Draws one run: training loss in grey, validation loss by sensor with its standard error."""
    with _axes(4.4, 3.0) as (figure, axes):
        if run.train:
            axes.plot(*zip(*run.train, strict=True), color="#b9bfc5", linewidth=1.0, label="training", zorder=1)
        samples = [point.samples for point in run.val]
        sensors = run.sensors if len(run.sensors) > 1 else []
        for sensor in sensors:
            _curve(axes, samples, [_loss_of(point, sensor) for point in run.val], sensor, f"val., {sensor}")
        if not sensors:
            only = run.sensors[0] if run.sensors else ""
            _curve(axes, samples, [(point.loss, point.stderr) for point in run.val], only, "validation")
        best = run.early_stop
        if not sensors:
            colour = sensor_colour(run.sensors[0] if run.sensors else "")
            axes.plot(best.samples, best.loss, "v", mfc="white", mec=colour, mew=1.4, ms=8, zorder=5, label="lowest")
        axes.set_ylabel("loss")
        _thousands(axes)
        figure.legend(loc="outside upper center", ncols=3, handlelength=2.2, columnspacing=1.2)
        png = _png(figure)
    return Picture(
        name=f"run-{slug(run.name)}",
        png=png,
        alt=f"Training and validation loss of run {run.name}: validation starts at {run.val[0].loss:.3f} and is "
        f"lowest, {best.loss:.3f}, at {best.samples} samples",
        caption=f"{run.name}: lowest validation loss {with_error(best.loss, best.stderr)} "
        f"at {best.samples:,} samples, {best.count} tiles scored.",
        width=460,
    )


def forest_plot(comparison: Comparison) -> Picture:
    """Draws mean and 95 % interval of every model, best on top; the best in rust, ties of it in blue-grey."""
    scores = comparison.scores
    height = 0.95 + 0.3 * len(scores)
    with _axes(4.6, height) as (figure, axes):
        best = scores[0]
        if best.low is not None and best.high is not None:
            axes.axvspan(best.low, best.high, color=BEST_COLOUR, alpha=0.08, linewidth=0)
        for row, score in enumerate(scores):
            colour = BEST_COLOUR if score.best else TIED_COLOUR if score.tied else REST_COLOUR
            if score.low is not None and score.high is not None:
                axes.plot([score.low, score.high], [row, row], color=colour, linewidth=2.2, solid_capstyle="round")
            shape = "D" if score.best else "o" if score.tied else "X"
            axes.plot(score.mean, row, shape, color=colour, ms=6.5, mec="white", mew=0.8, zorder=4)
        axes.set_yticks(range(len(scores)), [score.model for score in scores])
        axes.set_ylim(len(scores) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel(f"{comparison.metric_words} (higher is better)")
        png = _png(figure)
    return Picture(
        name=f"scores-{comparison.key}",
        png=png,
        alt=f"{comparison.metric} on {comparison.title}: "
        + "; ".join(f"{score.model} {score.interval_words}" for score in scores),
        caption="Diamond: best mean. Circle: not separable from it. Cross: below it. Bars: 95 % intervals.",
        width=480,
    )


def slug(text: str) -> str:
    """Returns `text` as lower-case letters, digits and hyphens, for file names and anchors."""
    kept = "".join(letter.lower() if letter.isalnum() and letter.isascii() else "-" for letter in text)
    return "-".join(part for part in kept.split("-") if part) or "x"
