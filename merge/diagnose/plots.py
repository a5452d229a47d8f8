"""Figures of a diagnosis, drawn without pyplot's global state; the same numbers give the same bytes.

Models have the Okabe-Ito colours of their sensors; surfaces use `viridis`, which is perceptually uniform; both hold up
under colour blindness.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from momo.extras import require
from momo.sensors import SENSORS, sensor_colour

from .landscape import mean_loss

INK, FAINT, GRID = "#22262b", "#6b737c", "#e3e6e9"
MEAN = "mean"
_MORE = ("#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
_MARKERS = ("o", "s", "^", "v", "P", "X")
_DASHES: tuple[Any, ...] = ("-", (0, (6, 1.5)), (0, (5, 1.5, 1.2, 1.5)), (0, (1.5, 1.2)))
_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "text.color": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 8,
}


@contextmanager
def _figure(width: float, height: float) -> Iterator[Any]:
    matplotlib, figures = require("matplotlib", "merge"), require("matplotlib.figure", "merge")
    with matplotlib.rc_context(_STYLE):
        yield figures.Figure(figsize=(width, height), facecolor="white", layout="constrained")


def _png(figure: Any) -> bytes:
    require("matplotlib.backends.backend_agg", "merge").FigureCanvasAgg(figure)
    raw = io.BytesIO()
    figure.savefig(raw, format="png", dpi=160, metadata={"Software": None})
    return raw.getvalue()


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y")


def colours(names: Sequence[str]) -> dict[str, str]:
    """Returns a colour a name: the sensor's own, or one of the rest of the palette."""
    more = iter(_MORE * len(names))
    return {name: sensor_colour(name) if name in SENSORS else next(more) for name in names}


def short_layer(layer: str) -> str:
    """Returns a tick label: `3` for `blocks.3`, `d3` for `decoder_blocks.3`."""
    if layer.startswith("decoder_blocks."):
        return "d" + layer.removeprefix("decoder_blocks.")
    return layer.removeprefix("blocks.")


# --- weights --------------------------------------------------------------------------------------------------------


def plot_task_vectors(vectors: dict[str, Any]) -> bytes:
    """Draws relative norm, energy, cosine and sign conflict of task vectors over the layers."""
    # Layers that nobody changed, fixed position embeddings for example, have no direction to show.
    layers = {name: own for name, own in vectors["layers"].items() if any(own["norm"])}
    parents, ticks = vectors["parents"], np.arange(len(layers))
    known, figures = colours(parents), list(layers.values())
    with _figure(9.2, 8.2) as figure:
        norm, energy, cosine, conflict = figure.subplots(4, 1, sharex=True)
        for number, name in enumerate(parents):
            style = {"color": known[name], "marker": _MARKERS[number % 6], "ms": 4, "lw": 1.4}
            relative = [own["relative"][number] for own in figures]
            norm.plot(ticks, [np.nan if v is None else 100 * v for v in relative], label=name, **style)
            wide = 0.8 / len(parents)
            share = [100 * (own["energy"][number] or 0.0) for own in figures]
            energy.bar(ticks + (number - (len(parents) - 1) / 2) * wide, share, wide, color=known[name])
        pairs = [(p, q) for p in range(len(parents)) for q in range(p + 1, len(parents))]
        for number, (p, q) in enumerate(pairs):
            values = [np.nan if own["cosine"][p][q] is None else own["cosine"][p][q] for own in figures]
            label = f"{parents[p]} - {parents[q]}"
            shade = str(0.1 + 0.5 * number / max(1, len(pairs)))
            cosine.plot(ticks, values, color=shade, ls=_DASHES[number % 4], marker=".", lw=1.3, label=label)
        for key, label, dash in (
            ("sign_conflict", "share of changed weights", "-"),
            ("sign_conflict_by_magnitude", "the same by magnitude", (0, (5, 1.5))),
            ("cancelled", "cancelled in a plain sum", (0, (1.5, 1.2))),
        ):
            values = [np.nan if own[key] is None else 100 * own[key] for own in figures]
            conflict.plot(ticks, values, color=INK, ls=dash, marker=".", lw=1.3, label=label)
        cosine.axhline(0, color=FAINT, lw=0.8)
        norm.set_ylim(bottom=0)
        conflict.set_ylim(bottom=0)
        for axes, title in (
            (norm, "size of the change: norm of the task vector, % of the base's norm"),
            (energy, "where the change is: share of the squared norm, %"),
            (cosine, "direction: cosine between task vectors"),
            (conflict, "sign conflict, %"),
        ):
            axes.set_title(title)
            _plain(axes)
            if axes is not energy:
                axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        conflict.set_xticks(ticks, [short_layer(layer) for layer in layers], rotation=60, ha="right", fontsize=8)
        conflict.set_xlabel("layer, from input to output (numbers: encoder blocks; d: decoder blocks)")
        return _png(figure)


# --- losses ---------------------------------------------------------------------------------------------------------


def plot_lines(losses: dict[str, Any]) -> bytes:
    """Draws the losses of every sensor along the lines between checkpoints."""
    lines, sensors = losses["lines"], losses["sensors"]
    columns = min(3, len(lines))
    rows = -(-len(lines) // columns)
    known = colours(sensors)
    with _figure(max(5.0, 3.3 * columns), 3.1 * rows + 0.3) as figure:
        grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
        for axes, line in zip(grid.flat, lines, strict=False):
            for number, sensor in enumerate(sensors):
                loss = [own[sensor]["loss"] if own else np.nan for own in line["losses"]]
                style = {"color": known[sensor], "ls": _DASHES[number % 4], "marker": ".", "ms": 4, "lw": 1.5}
                axes.plot(line["positions"], loss, label=sensor, **style)
            if len(sensors) > 1:
                mean = [np.nan if (value := mean_loss(own)) is None else value for own in line["losses"]]
                axes.plot(line["positions"], mean, color=INK, lw=2, label="mean of sensors")
            for place in (0, 1):
                axes.axvline(place, color=FAINT, lw=0.8, zorder=0)
            axes.set_xticks([0, 0.5, 1], [line["first"], "half way", line["second"]])
            _plain(axes)
            height = line["barrier"][MEAN]
            words = "not finite" if height is None else f"{height:.4f}" if height > 0 else "none"
            axes.set_title(f"barrier of the mean: {words}")
        for axes in list(grid.flat)[len(lines) :]:
            axes.set_axis_off()
        for row in grid:
            row[0].set_ylabel("validation loss")
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
        return _png(figure)


def plot_plane(losses: dict[str, Any]) -> bytes:
    """Draws the loss on the plane, one panel a sensor and one for the mean, with every model marked.

    A model's marker has the colour of its own loss, measured at the model itself; where it lies off the plane that is
    another colour than the surface has there, and its label says how far off it is.
    """
    plane, sensors = losses["plane"], losses["sensors"]
    panels = [*sensors, *([MEAN] if len(sensors) > 1 else [])]
    surfaces = {panel: _surface(plane["losses"], panel) for panel in panels}
    own = {panel: {name: _loss_of(found, panel) for name, found in losses["models"].items()} for panel in panels}
    limits = {panel: _limits(surfaces[panel], list(own[panel].values())) for panel in panels}
    whole = (min(low for low, _ in limits.values()), max(high for _, high in limits.values()))
    # One scale for all panels unless it would leave one of them flat.
    common = whole[1] - whole[0] <= 2.5 * min(high - low for low, high in limits.values())
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    ratio = np.ptp(plane["y"]) / np.ptp(plane["x"])
    with _figure(4.7 * columns, min(6.0, max(2.6, 3.5 * ratio)) * rows + 0.4 * rows) as figure:
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        for number, (axes, panel) in enumerate(zip(grid.flat, panels, strict=False)):
            low, high = whole if common else limits[panel]
            drawn = _panel(axes, plane, surfaces[panel], own[panel], low, high)
            axes.set_title("mean of sensors" if panel == MEAN else panel)
            if number % columns == 0:
                axes.set_ylabel("distance in weight space")
            if number + columns >= len(panels):
                axes.set_xlabel("distance in weight space")
                axes.tick_params(labelbottom=True)
            if not common:
                figure.colorbar(drawn, ax=axes, shrink=0.85)
        for axes in list(grid.flat)[len(panels) :]:
            axes.set_axis_off()
        if common:
            figure.colorbar(drawn, ax=grid, shrink=0.7, label="validation loss")
        return _png(figure)


def _loss_of(losses: dict[str, Any], panel: str) -> float:
    if not losses:
        return float("nan")
    value = mean_loss(losses) if panel == MEAN else losses[panel]["loss"]
    return float("nan") if value is None else float(value)


def _surface(rows: list[list[dict[str, Any]]], panel: str) -> Any:
    return np.ma.masked_invalid([[_loss_of(found, panel) for found in row] for row in rows])


def _limits(surface: Any, own: list[float]) -> tuple[float, float]:
    """Ends of the colour scale: from the lowest loss to the highest of the models and of three quarters of the grid.

    The far corners rise steeply; they would leave the middle, which matters, in one colour.
    """
    values = np.array([*surface.compressed(), *own])
    values = values[np.isfinite(values)]
    if not len(values):
        return 0.0, 1.0
    inner = [value for value in own if np.isfinite(value)]
    high = max([float(np.quantile(values, 0.75)), *inner])
    low = float(values.min())
    return low, high if high > low else low + max(1e-6, abs(low) * 1e-6)


def _panel(axes: Any, plane: dict[str, Any], surface: Any, own: dict[str, float], low: float, high: float) -> Any:
    effects = require("matplotlib.patheffects", "merge")
    levels = require("matplotlib.ticker", "merge").MaxNLocator(12).tick_values(low, high)
    drawn = axes.contourf(plane["x"], plane["y"], surface, levels=levels, cmap="viridis", extend="max")
    axes.contour(plane["x"], plane["y"], surface, levels=levels[1:-1], colors="white", linewidths=0.35, alpha=0.6)
    axes.set_aspect("equal")
    marks, middle = plane["marks"], np.mean([[m["x"], m["y"]] for m in plane["marks"][:3]], axis=0)
    corner_shapes = dict(zip(plane["corners"], _MARKERS, strict=False))
    for mark in marks:
        shape = {"base": "D", "merged": "*"}.get(mark["name"], corner_shapes.get(mark["name"], "P"))
        size = 190 if shape == "*" else 60
        value = own[mark["name"]]
        face = drawn.cmap(drawn.norm(value)) if np.isfinite(value) else "#999999"
        axes.scatter(mark["x"], mark["y"], s=size * 1.9, marker=shape, color="white", zorder=4, linewidths=0)
        axes.scatter(mark["x"], mark["y"], s=size, marker=shape, color=[face], edgecolors="black", zorder=5)
        above = mark["y"] >= middle[1]
        label = mark["name"] if mark["on_plane"] else f"{mark['name']}, {mark['distance']:.3g} off"
        axes.annotate(
            label,
            (mark["x"], mark["y"]),
            xytext=(0, 9 if above else -9),
            textcoords="offset points",
            ha="center",
            va="bottom" if above else "top",
            fontsize=8,
            fontstyle="normal" if mark["on_plane"] else "italic",
            path_effects=[effects.withStroke(linewidth=2.5, foreground="white")],
            zorder=6,
        )
    return drawn


# --- features -------------------------------------------------------------------------------------------------------


def plot_cka(cka: dict[str, Any]) -> bytes:
    """Draws debiased linear CKA of every two encoders at every depth, one panel a corpus."""
    matrices = {}
    for sensor, found in cka.items():
        blocks = list(found["debiased"])
        models = list(found["debiased"][blocks[0]])
        pairs = [(one, two) for number, one in enumerate(models) for two in models[number + 1 :]]
        values = [[found["debiased"][block][one][two] for block in blocks] for one, two in pairs]
        matrices[sensor] = (pairs, blocks, np.array(values, dtype=float))
    every = np.concatenate([matrix.ravel() for _, _, matrix in matrices.values()])
    finite = every[np.isfinite(every)]
    low = min(0.95, float(np.floor(finite.min() * 20) / 20)) if len(finite) else 0.0
    digits = 3 if low >= 0.9 else 2
    pairs, blocks, _ = next(iter(matrices.values()))
    columns = len(matrices) if len(matrices) * len(blocks) <= 20 else 1
    rows = -(-len(matrices) // columns)
    with _figure(2.4 + 0.48 * len(blocks) * columns, (0.75 + 0.27 * len(pairs)) * rows + 0.2) as figure:
        grid = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
        for axes, (sensor, (pairs, blocks, matrix)) in zip(grid, matrices.items(), strict=True):
            drawn = axes.imshow(matrix, cmap="viridis", vmin=low, vmax=1, aspect="auto")
            axes.set_title(f"tiles of {sensor} ({cka[sensor]['samples']:,})")
            axes.set_yticks(range(len(pairs)), [f"{one} - {two}" for one, two in pairs], fontsize=8)
            axes.set_xticks(range(len(blocks)), [short_layer(block) for block in blocks], fontsize=8)
            for (row, column), value in np.ndenumerate(matrix):
                ink = "white" if not np.isfinite(value) or (value - low) / (1 - low) < 0.6 else "black"
                text = "-" if not np.isfinite(value) else f"{value:.{digits}f}"
                axes.text(column, row, text, ha="center", va="center", fontsize=7, color=ink)
            axes.spines[:].set_visible(False)
            axes.tick_params(length=0)
        figure.supxlabel("encoder block; norm: output of the encoder", fontsize=9)
        figure.colorbar(drawn, ax=grid, shrink=0.6, label="CKA, debiased")
        return _png(figure)
