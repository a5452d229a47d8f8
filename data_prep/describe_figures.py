"""Plots of the data card; its maps are in `describe_maps`.

Drawn on `Figure` objects without pyplot, so no global state; PNG without dates, so same numbers give same bytes.
Colours are from the Okabe-Ito palette, which holds up under colour blindness; train has the sensor's colour.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from momo.extras import require
from momo.pages import Picture
from momo.sensors import sensor_colour

from .describe_numbers import BAND_DEG, MEASURES, Floats, Measure, Tables, Tones
from .describe_sources import Products

INK, FAINT, GRID = "#22262b", "#6b737c", "#e3e6e9"
DPI = 200
MAX_UNITS = 24
_FEW_PRODUCTS = 24
_MEASURE_LABELS = {
    "valid_fraction": "valid fraction", "quality": "structural score", "noise": "noise / tile std", "blur": "blur",
    "stripes": "striping", "saturation": "saturated share",
}  # fmt: skip


def val_colour(sensor: str) -> str:
    """Returns the colour of validation tiles: the one of the palette that stands out most from the sensor's."""
    return "#56B4E9" if sensor == "HiRISE" else "#E69F00"


@contextmanager
def new_axes(width: float, height: float, rows: int = 1, cols: int = 1) -> Iterator[tuple[Any, Any]]:
    """Gives a figure of `width` x `height` inches in the style of the card, and its axes."""
    matplotlib = require("matplotlib", "prep")
    figures = require("matplotlib.figure", "prep")
    style = {
        "font.family": "DejaVu Sans", "font.size": 9, "axes.edgecolor": FAINT, "axes.labelcolor": INK,
        "axes.linewidth": 0.8, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
        "grid.color": GRID, "grid.linewidth": 0.7, "axes.axisbelow": True, "text.color": INK, "xtick.color": FAINT,
        "ytick.color": FAINT, "xtick.labelcolor": INK, "ytick.labelcolor": INK, "legend.frameon": False,
        "legend.fontsize": 8,
    }  # fmt: skip
    with matplotlib.rc_context(style):
        figure = figures.Figure(figsize=(width, height), facecolor="white", layout="constrained")
        yield figure, figure.subplots(rows, cols)


def figure_png(figure: Any) -> bytes:
    """Returns a figure as PNG."""
    require("matplotlib.backends.backend_agg", "prep").FigureCanvasAgg(figure)
    raw = io.BytesIO()
    figure.savefig(raw, format="png", dpi=DPI, metadata={"Software": None})
    return _with_palette(Image.open(raw), 128)


def _with_palette(image: Image.Image, colours: int) -> bytes:
    """Stores an image with a palette: a third of the size, no visible difference."""
    out = io.BytesIO()
    image.convert("RGB").quantize(colours, dither=Image.Dither.NONE).save(out, format="PNG", optimize=True)
    return out.getvalue()


def short_count(value: float, _: Any = None) -> str:
    """Writes a count shortly: 800, 12k, 1.5M."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"


def _counts_on(axis: Any) -> None:
    ticker = require("matplotlib.ticker", "prep")
    axis.set_major_locator(ticker.MaxNLocator(nbins=5, integer=True))
    axis.set_major_formatter(short_count)


def split_legend(axes: Any, sensor: str, val: bool) -> None:
    """Adds the colours of training and validation tiles; none is needed without validation."""
    if val:
        patches = require("matplotlib.patches", "prep")
        colours = (sensor_colour(sensor), val_colour(sensor))
        handles = [
            patches.Patch(color=colour, label=name) for colour, name in zip(colours, ("train", "val"), strict=True)
        ]
        axes.figure.legend(handles=handles, loc="outside upper right", ncols=2)


def bar_figure(
    name: str, what: str, labels: Sequence[str], pairs: Sequence[npt.NDArray[np.int64]], sensor: str, caption: str
) -> Picture:
    """Draws one horizontal bar a category, training and validation tiles stacked; the first label is on top."""
    position = np.arange(len(labels))
    train, val = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    with new_axes(5.2, 1.0 + 0.235 * max(3, len(labels))) as (figure, axes):
        axes.barh(position, train, color=sensor_colour(sensor), height=0.72)
        axes.barh(position, val, left=train, color=val_colour(sensor), height=0.72)
        for place, total in zip(position, train + val, strict=True):
            axes.annotate(short_count(total), (total, place), (4, 0), textcoords="offset points", va="center",
                          fontsize=7.5, color=FAINT)  # fmt: skip
        axes.set_yticks(position, labels, fontsize=8)
        axes.set_ylim(len(labels) - 0.4, -0.6)
        axes.margins(x=0.12)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("tiles")
        _counts_on(axes.xaxis)
        split_legend(axes, sensor, bool(val.any()))
        png = figure_png(figure)
    shares = ", ".join(f"{label} {total}" for label, total in zip(labels[:8], (train + val)[:8], strict=True))
    return Picture(name, png, f"Tiles by {what}: {shares}", caption)


def unit_figure(tables: Tables, sensor: str) -> Picture:
    """Draws tiles by unit, the most common on top."""
    known = sorted(
        ((unit, pair) for unit, pair in tables.units.items() if unit), key=lambda item: (-item[1].sum(), item[0])
    )
    shown = known[:MAX_UNITS]
    if len(known) > MAX_UNITS:
        shown.append(
            (f"{len(known) - MAX_UNITS} others", sum((p for _, p in known[MAX_UNITS:]), np.zeros(2, np.int64)))
        )
    caption = f"Tiles by geologic unit or terrain class, {len(known)} in all."
    if "" in tables.units:
        caption += f" {int(tables.units[''].sum()):,} tiles have no unit."
    return bar_figure("units", "unit", [_cut(unit) for unit, _ in shown], [pair for _, pair in shown], sensor, caption)


def _cut(text: str) -> str:
    return text if len(text) <= 28 else text[:26] + "..."


def gsd_figure(tables: Tables, sensor: str) -> Picture:
    """Draws tiles by ground sample distance, by value or, when there are many, in logarithmic classes."""
    known = sorted((gsd, pair) for gsd, pair in tables.gsds.items() if math.isfinite(gsd))
    caption = "Tiles by ground sample distance, metres a pixel."
    unknown = sum(int(pair.sum()) for gsd, pair in tables.gsds.items() if not math.isfinite(gsd))
    if unknown:
        caption += f" Of {unknown:,} tiles it is unknown."
    if len(known) <= 14:
        labels = [f"{gsd:.4g} m" for gsd, _ in known]
        return bar_figure("gsd", "ground sample distance", labels, [pair for _, pair in known], sensor, caption)
    value = np.array([gsd for gsd, _ in known])
    edges = np.geomspace(value.min() * 0.999, value.max() * 1.001, 13)
    code = np.clip(np.searchsorted(edges, value, side="right") - 1, 0, 11)
    pairs = [
        sum((pair for (_, pair), c in zip(known, code, strict=True) if c == n), np.zeros(2, np.int64))
        for n in range(12)
    ]
    labels = [f"{low:.4g} to {high:.4g} m" for low, high in itertools.pairwise(edges)]
    return bar_figure("gsd", "ground sample distance", labels, pairs, sensor, caption)


def latitude_figure(tables: Tables, sensor: str) -> Picture:
    """Draws tiles by latitude band as a profile from pole to pole."""
    edges = np.arange(-90.0, 90.0 + BAND_DEG / 2, BAND_DEG)
    train, val = tables.bands
    with new_axes(5.2, 4.0) as (figure, axes):
        middle = (edges[:-1] + edges[1:]) / 2
        axes.barh(middle, train, height=BAND_DEG * 0.86, color=sensor_colour(sensor))
        axes.barh(middle, val, left=train, height=BAND_DEG * 0.86, color=val_colour(sensor))
        axes.set_ylim(-90, 90)
        axes.set_yticks(np.arange(-90, 91, 30))
        axes.set_ylabel("planetocentric latitude (degrees)")
        axes.set_xlabel("tiles")
        _counts_on(axes.xaxis)
        split_legend(axes, sensor, bool(val.any()))
        png = figure_png(figure)
    caption = f"Tiles by latitude band of {BAND_DEG:g} degrees. Centres lie between {tables.lat_range[0]:.2f} and "
    caption += f"{tables.lat_range[1]:.2f} degrees."
    return Picture("latitude", png, "Tiles by latitude band", caption)


def product_figure(products: Products, sensor: str) -> Picture:
    """Draws tiles a product: bars for few products, the ranked curve for many."""
    order = np.sort(products.tiles)[::-1]
    if products.count <= _FEW_PRODUCTS and len(products.first) == products.count:
        named = sorted(products.first, key=lambda row: (-(row["tiles"] or 0), row["product_id"]))
        pairs = [np.array([row["tiles"] or 0, 0], dtype=np.int64) for row in named]
        labels = [_cut(row["product_id"]) for row in named]
        return bar_figure("products", "product", labels, pairs, sensor, "Tiles by product.")
    with new_axes(5.2, 3.2) as (figure, axes):
        axes.plot(np.arange(1, order.size + 1), np.maximum(order, 0.8), color=sensor_colour(sensor), linewidth=1.8)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("rank of the product")
        axes.set_ylabel("tiles of the product")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(short_count)
        png = figure_png(figure)
    half = int(np.searchsorted(np.cumsum(order), order.sum() / 2) + 1) if order.sum() else 0
    caption = f"Tiles of each product, largest first. Half of all tiles come from {half:,} of {order.size:,} products."
    return Picture("products", png, "Tiles of each product by rank, both axes logarithmic", caption)


def pixel_figure(tones: Tones, stats: Mapping[str, Any], sensor: str) -> Picture:
    """Draws the distribution of pixel values, with mean and standard deviation of the corpus in physical units."""
    # Products with few grey levels leave every other one of 256 bins empty, so a quarter as many are drawn.
    edges = tones.edges[::4]
    train, val = (shares.reshape(-1, 4).sum(axis=1) / (edges[1] - edges[0]) for shares in (tones.train, tones.val))
    mean, std = float(stats["mean"]), float(stats["std"])
    with new_axes(5.2, 3.3) as (figure, axes):
        axes.stairs(train, edges, color=sensor_colour(sensor), linewidth=1.5, label="train")
        axes.stairs(train, edges, color=sensor_colour(sensor), fill=True, alpha=0.18)
        if val.any():
            axes.stairs(val, edges, color=val_colour(sensor), linewidth=1.5, label="val")
        if not tones.relative:
            axes.axvline(mean, color=INK, linewidth=1.1, label="mean")
            axes.axvspan(mean - std, mean + std, color=INK, alpha=0.06, linewidth=0, label="one std")
        axes.set_xlim(edges[0], edges[-1])
        axes.set_ylim(0)
        axes.set_xlabel(_value_label(tones, "pixel value"))
        axes.set_ylabel("probability density")
        figure.legend(loc="outside upper right", ncols=4, handlelength=1.4, columnspacing=1.2)
        png = figure_png(figure)
    caption = f"Pixel values of {tones.val_N.size:,} tiles drawn at random"
    if tones.relative:
        caption += ", each on the scale of its product because the products differ in unit."
        return Picture("pixels", png, "Histogram of pixel values on the scale of their product", caption)
    caption += (
        f", between the 0.1st and 99.9th percentile. Mean {mean:.5g}, standard deviation {std:.5g} over every valid "
        "training pixel."
    )
    return Picture("pixels", png, f"Histogram of pixel values, mean {mean:.4g}, standard deviation {std:.4g}", caption)


def _value_label(tones: Tones, what: str) -> str:
    return f"{what} ({'0: 1st, 1: 99th percentile of the product' if tones.relative else 'physical units'})"


def measure_figure(measures: Mapping[str, Measure], sensor: str) -> Picture:
    """Draws the histogram of each quality measure over all tiles."""
    with new_axes(5.2, 6.0, 3, 2) as (figure, grid):
        for axes, name in zip(grid.flat, MEASURES, strict=True):
            measure = measures[name]
            edges = np.linspace(0, measure.end, measure.counts.size + 1)
            axes.stairs(measure.counts, edges, fill=True, color=sensor_colour(sensor), alpha=0.85)
            axes.set_xlim(0, measure.end)
            axes.set_xlabel(_MEASURE_LABELS[name])
            _counts_on(axes.yaxis)
            if measure.known:
                axes.axvline(min(measure.mean, measure.end), color=INK, linewidth=1)
                axes.set_title(f"mean {measure.mean:.3g}", fontsize=8, color=FAINT, loc="right")
            else:
                axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color=FAINT)
        for row in grid:
            row[0].set_ylabel("tiles")
        png = figure_png(figure)
    means = ", ".join(
        f"{_MEASURE_LABELS[name]} {measure.mean:.3g}" for name, measure in measures.items() if measure.known
    )
    caption = "Quality measures of all tiles; the line is the mean. The last bin also holds what lies beyond the axis."
    return Picture("measures", png, f"Histograms of quality measures with means: {means}", caption)


def tone_figure(tones: Tones, sensor: str) -> Picture:
    """Draws mean against standard deviation of sampled tiles: the brightness and contrast the corpus covers."""
    mean, std, val = tones.mean_N, tones.std_N, tones.val_N
    with new_axes(5.2, 3.6) as (figure, axes):
        size = float(np.clip(9000 / max(1, mean.size), 2.5, 18))
        for chosen, colour in ((~val, sensor_colour(sensor)), (val, val_colour(sensor))):
            axes.scatter(mean[chosen], std[chosen], s=size, color=colour, alpha=0.55, linewidths=0)
        if mean.size:
            # A few tiles at the fringe would press all others into a corner.
            axes.set_xlim(*_span(mean))
            axes.set_ylim(0, max(_span(std)[1], 1e-12))
        axes.set_xlabel(_value_label(tones, "mean of a tile"))
        axes.set_ylabel("standard deviation within it")
        split_legend(axes, sensor, bool(val.any()))
        png = figure_png(figure)
    caption = f"Brightness and contrast of {mean.size:,} tiles, one dot each; the axes end at the 99.5th percentile."
    return Picture("tones", png, "Mean of tiles against the standard deviation within them", caption)


def _span(values: Floats) -> tuple[float, float]:
    low, high = (float(edge) for edge in np.percentile(values, (0.5, 99.5)))
    margin = 0.06 * (high - low) or 0.5
    return low - margin, high + margin


def weighted_figure(
    name: str, values: tuple[Floats, Floats], edges: Floats, label: str, sensor: str, caption: str
) -> Picture:
    """Draws a histogram of a property of products, weighted by their tiles."""
    with new_axes(5.2, 3.0) as (figure, axes):
        counts, _ = np.histogram(values[0], edges, weights=values[1])
        axes.stairs(counts, edges, fill=True, color=sensor_colour(sensor), alpha=0.85)
        axes.set_xlim(edges[0], edges[-1])
        axes.set_ylim(0)
        axes.set_xlabel(label)
        axes.set_ylabel("tiles")
        _counts_on(axes.yaxis)
        if name == "acquired":
            axes.xaxis.set_major_locator(require("matplotlib.ticker", "prep").MaxNLocator(nbins=7, integer=True))
            axes.xaxis.set_major_formatter(lambda year, _: f"{year:.0f}")
        png = figure_png(figure)
    return Picture(name, png, caption, caption)


def drop_figure(counts: Mapping[str, int], sensor: str) -> Picture:
    """Draws what became of all windows: taken, and dropped by reason, on a logarithmic axis."""
    labels, values = list(counts), np.array(list(counts.values()), dtype=np.float64)
    with new_axes(5.2, 1.0 + 0.26 * max(3, len(labels))) as (figure, axes):
        colours = [sensor_colour(sensor), *["#8a929a"] * (len(labels) - 1)]
        axes.barh(np.arange(len(labels)), np.maximum(values, 0.5), left=0.5, color=colours, height=0.7)
        for place, value in enumerate(values):
            axes.annotate(f"{int(value):,}", (max(value, 0.5) + 0.5, place), (4, 0), textcoords="offset points",
                          va="center", fontsize=7.5, color=FAINT)  # fmt: skip
        axes.set_xscale("log")
        axes.set_xlim(0.5, max(10.0, values.max(initial=1) * 4))
        axes.set_yticks(np.arange(len(labels)), [_cut(label) for label in labels], fontsize=8)
        axes.set_ylim(len(labels) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        axes.xaxis.set_major_formatter(short_count)
        axes.set_xlabel("windows (logarithmic)")
        png = figure_png(figure)
    words = ", ".join(f"{label} {int(value)}" for label, value in counts.items())
    return Picture(
        "dropped", png, f"Windows taken and dropped: {words}", "What became of the windows that prep looked at."
    )
