"""The picture of a selection: validation curves, picks, early-stopping points and the epsilon band."""

from __future__ import annotations

from pathlib import Path

from momo.files import atomic_file
from momo.sensors import sensor_colour

from .curves import Curve
from .evl import Pick, early_stop


def plot_selection(curves: list[Curve], pick: Pick, rule: str, out: Path) -> None:
    """Draws validation loss over samples for each sensor with what was picked, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.2), dpi=140, layout="constrained")
    axes = figure.add_subplot()
    losses = [curve.val_loss(i)["loss"] for curve, i in zip(curves, pick.indices, strict=True)]
    if rule == "evl":
        low = min(losses)
        axes.axhspan(low, low + pick.epsilon, color="0.88", zorder=0, label=f"epsilon band ({pick.epsilon:.3g})")
    for curve, index in zip(curves, pick.indices, strict=True):
        colour = sensor_colour(curve.sensor)
        samples = [c.samples for c in curve.checkpoints]
        values = [curve.val_loss(i)["loss"] for i in range(len(samples))]
        errors = [curve.val_loss(i)["stderr"] or 0.0 for i in range(len(samples))]
        axes.errorbar(samples, values, yerr=errors, color=colour, marker=".", lw=1.5, capsize=2, label=curve.sensor)
        stop = early_stop(curve.candidates)
        axes.plot(samples[stop], values[stop], "v", color=colour, mfc="none", ms=10, mew=1.5)
        axes.plot(samples[index], values[index], "o", color=colour, mfc="none", ms=13, mew=2)
    axes.plot([], [], "o", color="0.3", mfc="none", ms=11, mew=2, label=f"picked ({rule})")
    axes.plot([], [], "v", color="0.3", mfc="none", ms=9, mew=1.5, label="early stopping")
    axes.set(xlabel="training samples", ylabel="validation loss (fixed masks)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.92")
    axes.legend(frameon=False, fontsize=8, ncols=2)
    with atomic_file(out) as partial:
        figure.savefig(partial, format="png", metadata={"Software": None})
