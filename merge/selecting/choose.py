"""`momo select`: from validation curves of several runs to one SELECTION."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from momo.errors import MergeError
from momo.extras import require

from ..selection import Chosen, Selection, is_selection
from .comparable import Gate, check_comparable, check_names, find_base, hash_of_checkpoint
from .config import SelectConfig
from .curves import Curve, curve_order, read_curve, smoothed_curve
from .epsilon import auto_epsilon, epsilon_ranges, nearest_ranges, sweep_entries
from .evl import EpsilonRange, early_stop
from .plot import plot_selection
from .rules import Outcome, apply_rule


def select(config: SelectConfig) -> Path:
    """Chooses one checkpoint of each run and writes SELECTION and its plot.

    Args:
        config: Runs, rule and epsilon.

    Returns:
        The SELECTION file.

    Raises:
        CheckpointError: A run is missing, empty or damaged, or its base or a chosen checkpoint is not there.
        MergeError: A curve file is damaged, or the runs do not belong together: other base, other validation protocol,
            two of one sensor without names; or `out` is something else than an older selection.
    """
    require("matplotlib.figure", "merge")
    out = Path(config.out)
    plot = out.with_suffix(".png")
    _check_out(out, plot)
    read = [read_curve(Path(place), name) for name, place in config.places]
    curves = sorted((smoothed_curve(curve, config.smoothing) for curve in read), key=curve_order)
    gate = Gate(config.allow)
    check_names(curves)
    base = find_base(config.base, curves, gate)
    check_comparable(curves, gate)
    epsilon, notes = _epsilon(config, curves)
    outcome = apply_rule(config, curves, epsilon)
    ranges = epsilon_ranges(curves, config.distance) if config.rule == "evl" else []
    shown = nearest_ranges(ranges, outcome.pick.epsilon) if ranges else []
    chosen = {c.name: _chosen(c, i, config, gate) for c, i in zip(curves, outcome.pick.indices, strict=True)}
    notes += outcome.notes + _smoothing_notes(config.smoothing, chosen, outcome.pick.epsilon)
    selection = Selection(
        rule=config.rule,
        epsilon=outcome.pick.epsilon,
        epsilon_requested=config.requested_epsilon,
        distance=outcome.pick.distance,
        base=base,
        sensors=chosen,
        rejected=_rejected(curves, outcome, config.smoothing),
        notes=notes + [note for curve in curves for note in curve.notes] + gate.notes,
        distance_unit=config.distance,
        smoothing=config.smoothing,
        sweep=sweep_entries(curves, shown),
    )
    plot_selection(curves, outcome.pick, config.rule, plot, smoothing=config.smoothing, ranges=ranges)
    selection.write(out)
    print(selection_table(selection))
    if shown:
        print(sweep_table(selection, shown, len(ranges)))
    for note in selection.notes:
        print(f"  note: {note}")
    return out


def _check_out(out: Path, plot: Path) -> None:
    """Refuses to replace anything but an older selection and its plot."""
    for path in (out, plot):
        if os.path.lexists(path) and not (path.is_file() and is_selection(out)):
            raise MergeError(
                "the output is something else than an older selection",
                seen=path,
                rule="momo select replaces a selection and the plot beside it, and nothing else",
                fix="choose another `out`, or remove it yourself",
            )


def _epsilon(config: SelectConfig, curves: Sequence[Curve]) -> tuple[float | None, list[str]]:
    if config.rule != "evl":
        return None, []
    if config.requested_epsilon is not None:
        return config.requested_epsilon, []
    auto = auto_epsilon(
        curves,
        level=config.level,
        correction=config.correction,
        stderr=config.stderr,
        relative=config.epsilon_relative,
    )
    return auto.value, auto.notes


def _chosen(curve: Curve, index: int, config: SelectConfig, gate: Gate) -> Chosen:
    point = curve.points[index]
    return Chosen(
        run=str(curve.place),
        checkpoint=str(point.checkpoint),
        sha256=hash_of_checkpoint(point, gate),
        samples=point.samples,
        val_loss=point.loss,
        val_stderr=point.stderr,
        early_stop_samples=curve.points[early_stop(curve.candidates())].samples,
        val_loss_smoothed=None if config.smoothing == "none" else curve.smoothed[index],
        sensor=None if curve.name == curve.sensor else curve.sensor,
    )


def _smoothing_notes(smoothing: str, chosen: dict[str, Chosen], epsilon: float) -> list[str]:
    if smoothing == "none":
        return []
    raw = [pick.val_loss for pick in chosen.values()]
    notes = [f"The rule saw the losses after smoothing ({smoothing}); val_loss is as measured."]
    if max(raw) - min(raw) > epsilon:
        notes.append(
            f"The measured losses of the picks differ by {max(raw) - min(raw):.4g}, more than epsilon {epsilon:.4g}: "
            "they are equal only after smoothing."
        )
    return notes


def _rejected(curves: Sequence[Curve], outcome: Outcome, smoothing: str) -> list[dict[str, Any]]:
    rejected = []
    for number, (curve, chosen) in enumerate(zip(curves, outcome.pick.indices, strict=True)):
        for index, point in enumerate(curve.points):
            if index == chosen:
                continue
            entry: dict[str, Any] = {"sensor": curve.name, "samples": point.samples, "val_loss": point.loss}
            if smoothing != "none":
                entry["val_loss_smoothed"] = curve.smoothed[index]
            rejected.append(entry | {"reason": outcome.reason(number, index)})
    return rejected


def selection_table(selection: Selection) -> str:
    """Returns the picks as a text table."""
    smoothed = selection.smoothing != "none"
    width = max(8, *(len(name) for name in selection.sensors))
    title = f"rule {selection.rule}, epsilon {selection.epsilon:.4g}, "
    title += f"distance {selection.distance:,.{0 if selection.distance_unit == 'samples' else 2}f} "
    title += selection.distance_unit + (f", smoothing {selection.smoothing}" if smoothed else "")
    header = f"  {'sensor':<{width}} {'samples':>12} {'val loss':>9} {'+-':>8}"
    lines = [title, header + (f" {'smoothed':>9}" if smoothed else "") + f" {'early stop at':>14}"]
    for name, chosen in selection.sensors.items():
        error = f"{chosen.val_stderr:.4f}" if chosen.val_stderr is not None else "-"
        middle = f" {chosen.val_loss_smoothed:>9.4f}" if chosen.val_loss_smoothed is not None else ""
        lines.append(
            f"  {name:<{width}} {chosen.samples:>12,} {chosen.val_loss:>9.4f} {error:>8}{middle} "
            f"{chosen.early_stop_samples:>14,}"
        )
    return "\n".join(lines)


def sweep_table(selection: Selection, shown: Sequence[EpsilonRange], total: int) -> str:
    """Returns the sweep as a text table; an arrow marks the range that was used."""
    names = list(selection.sensors)
    widths = [max(11, len(name)) for name in names]
    cut = f" ({len(shown)} of {total} ranges, around the one used)" if len(shown) < total else ""
    lines = [f"what other epsilons pick{cut}: samples by sensor"]
    columns = " ".join(f"{name:>{width}}" for name, width in zip(names, widths, strict=True))
    lines.append(f"     {'epsilon from':>12} {'below':>10} {'distance':>12} {columns}")
    for found, entry in zip(shown, selection.sweep, strict=True):
        used = found.low <= selection.epsilon < found.high
        picks = " ".join(f"{entry['samples'][name]:>{width},}" for name, width in zip(names, widths, strict=True))
        high = "-" if entry["high"] is None else f"{found.high:.5g}"
        lines.append(f"  {'->' if used else '  '} {found.low:>12.5g} {high:>10} {found.distance:>12,.2f} {picks}")
    return "\n".join(lines)
