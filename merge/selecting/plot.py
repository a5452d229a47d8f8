"""The picture of a selection: validation curves, picks, early-stopping points, the epsilon band and the sweep."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from momo.files import atomic_file
from momo.sensors import sensor_colour

from .curves import Curve
from .epsilon import used_range
from .evl import EpsilonRange, Pick, early_stop

# The rest of the Okabe-Ito palette, for runs that have no sensor's colour to themselves.
_MORE_COLOURS = ("#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D1F", "#777777")
_LINES = ("-", "--", ":", "-.")
_LONG, _SHOWN = 20, 0.85  # curves from so many checkpoints on show the lower part of their losses


def plot_selection(
    curves: Sequence[Curve],
    pick: Pick,
    rule: str,
    out: Path,
    *,
    smoothing: str = "none",
    ranges: Sequence[EpsilonRange] = (),
) -> None:
    """Draws validation loss over samples for each run with what was picked, as PNG.

    Args:
        curves: The runs.
        pick: What was picked.
        rule: Name of the rule; the epsilon band is drawn for `evl`.
        out: PNG file.
        smoothing: When not `none`, the raw losses are drawn pale behind the smoothed ones.
        ranges: The sweep over epsilon; a second panel shows the samples picked against epsilon.
    """
    from matplotlib.figure import Figure

    height = 7.0 if ranges else 4.2
    figure = Figure(figsize=(7.2, height), dpi=140, layout="constrained")
    panels = figure.subplots(2, 1, height_ratios=[1.6, 1], squeeze=False)[:, 0] if ranges else [figure.add_subplot()]
    styles = curve_styles(curves)
    _draw_curves(panels[0], curves, pick, rule, smoothing, styles)
    if ranges:
        _draw_sweep(panels[1], curves, pick, ranges, styles)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.92")
        axes.set_axisbelow(True)
    with atomic_file(out) as partial:
        figure.savefig(partial, format="png", metadata={"Software": None})


def curve_styles(curves: Sequence[Curve]) -> list[dict[str, str]]:
    """Colour and line of each run: the sensor's colour for its first run, a free one for an unknown sensor."""
    grey = sensor_colour("")
    free = list(_MORE_COLOURS)
    colours: dict[str, str] = {}
    styles: list[dict[str, str]] = []
    for curve in curves:
        if curve.sensor not in colours:
            known = sensor_colour(curve.sensor)
            colours[curve.sensor] = known if known != grey or not free else free.pop(0)
        before = sum(other.sensor == curve.sensor for other in curves[: len(styles)])
        styles.append({"color": colours[curve.sensor], "ls": _LINES[before % len(_LINES)]})
    return styles


def _draw_curves(
    axes: Any, curves: Sequence[Curve], pick: Pick, rule: str, smoothing: str, styles: list[dict[str, str]]
) -> None:
    chosen = [curve.smoothed[index] for curve, index in zip(curves, pick.indices, strict=True)]
    if rule == "evl":
        low = min(chosen)
        axes.axhspan(low, low + pick.epsilon, color="0.88", zorder=0, label=f"epsilon band ({pick.epsilon:.3g})")
    for curve, index, style in zip(curves, pick.indices, styles, strict=True):
        samples = [point.samples for point in curve.points]
        raw = [point.loss for point in curve.points]
        errors = [point.stderr or 0.0 for point in curve.points]
        dense = len(samples) > 60
        marks = {"marker": "" if dense else ".", "lw": 1.2 if dense else 1.5}
        if smoothing == "none":
            line = {**style, **marks, "label": curve.name}
            if dense:
                axes.plot(samples, raw, **line)
                low_high = [[loss + sign * e for loss, e in zip(raw, errors, strict=True)] for sign in (-1, 1)]
                axes.fill_between(samples, *low_high, color=style["color"], alpha=0.2, lw=0)
            else:
                axes.errorbar(samples, raw, yerr=errors, capsize=2, **line)
        else:
            bars = None if dense else errors
            pale = {"ls": "", "marker": ".", "ms": 3 if dense else 4, "lw": 0.7, "alpha": 0.2 if dense else 0.35}
            axes.errorbar(samples, raw, yerr=bars, color=style["color"], **pale)
            axes.plot(samples, curve.smoothed, **style, lw=1.6, label=f"{curve.name} ({smoothing.replace('_', ' ')})")
        stop = early_stop(curve.candidates())
        for shape, where, size, edge in (("v", stop, 10, 1.5), ("o", index, 13, 2.0)):
            at = (samples[where], curve.smoothed[where], shape)
            axes.plot(*at, color="white", mfc="none", ms=size, mew=edge + 2.5, zorder=4)  # stands out from its own line
            axes.plot(*at, color=style["color"], mfc="none", ms=size, mew=edge, zorder=5)
    axes.plot([], [], "o", color="0.3", mfc="none", ms=11, mew=2, label=f"picked ({rule})")
    axes.plot([], [], "v", color="0.3", mfc="none", ms=9, mew=1.5, label="early stopping")
    axes.set(xlabel="training samples", ylabel="validation loss (fixed masks)")
    _count_axis(axes.xaxis)
    _cut_steep_start(axes, curves, max(chosen) + 2 * pick.epsilon)
    axes.legend(frameon=False, fontsize=8, ncols=2)


def _cut_steep_start(axes: Any, curves: Sequence[Curve], needed: float) -> None:
    """Leaves the highest losses of long curves out of the frame, so that the picks are not pressed together."""
    losses = sorted(point.loss for curve in curves for point in curve.points)
    top = max(losses[int(_SHOWN * (len(losses) - 1))], needed)
    if min(len(curve.points) for curve in curves) < _LONG or losses[-1] < losses[0] + 1.3 * (top - losses[0]):
        return
    axes.set_ylim(losses[0] - 0.08 * (top - losses[0]), top)
    above = sum(loss > top for loss in losses)
    axes.annotate(
        f"{above} losses above the frame, up to {losses[-1]:.3g}", (0.01, 1.01), xycoords="axes fraction", fontsize=8,
        color="0.4",
    )  # fmt: skip


def _draw_sweep(
    axes: Any, curves: Sequence[Curve], pick: Pick, ranges: Sequence[EpsilonRange], styles: list[dict[str, str]]
) -> None:
    """Steps: the samples picked of each run for every epsilon from the smallest feasible one on."""
    end = _sweep_end(ranges, pick.epsilon)
    shown = [found for found in ranges if found.low < end]
    lows = [found.low for found in shown]
    for number, (curve, style) in enumerate(zip(curves, styles, strict=True)):
        samples = [curve.points[found.indices[number]].samples for found in shown]
        # Runs that pick the same samples would hide each other: thinner lines lie above.
        width = 1.5 + min(1.3, 4 / len(curves)) * (len(curves) - 1 - number)
        axes.step([*lows, end], [*samples, samples[-1]], where="post", color=style["color"], ls=style["ls"], lw=width)
    axes.axvline(pick.epsilon, color="0.3", lw=1, ls=":")
    axes.annotate(
        f"used: {pick.epsilon:.3g}", (pick.epsilon, 1), xycoords=("data", "axes fraction"), xytext=(4, -2),
        textcoords="offset points", fontsize=8, va="top", color="0.3",
    )  # fmt: skip
    axes.set(xlabel="epsilon", ylabel="samples picked", xlim=(0, end))
    axes.margins(y=0.15)
    _count_axis(axes.yaxis)
    if lows[0] > 0:
        axes.axvspan(0, lows[0], color="0.95", zorder=0)
        if lows[0] > 0.12 * end:
            axes.annotate(
                "no tuple agrees", (lows[0] / 2, 0.5), xycoords=("data", "axes fraction"), fontsize=8, color="0.4",
                ha="center", va="center", rotation=90 if lows[0] < 0.3 * end else 0,
            )  # fmt: skip


def _sweep_end(ranges: Sequence[EpsilonRange], epsilon: float) -> float:
    """Right end of the epsilon axis: a few ranges past the one used, and past the last one when it is near."""
    last = ranges[min(used_range(ranges, epsilon) + 4, len(ranges) - 1)].low
    near = max(last, epsilon)
    whole = ranges[-1].low
    return 1.25 * max(whole if whole <= 4 * near else near, epsilon) or 1.0


def _count_axis(axis: Any) -> None:
    from matplotlib.ticker import EngFormatter

    axis.set_major_formatter(EngFormatter(sep=""))
