"""Maps of the data card: where on Mars the tiles lie."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from momo.extras import require
from momo.pages import Picture
from momo.sensors import sensor_colour

from .describe_figures import figure_png, new_axes, split_legend, val_colour
from .describe_numbers import GRID_DEG, MAX_SHOWN_ROWS, Floats, Rows, Tables

_CLOSE_DEG = 40.0
# IAU Gazetteer of Planetary Nomenclature, centres, east positive; for orientation on the map.
_FEATURES = {
    "Olympus Mons": (-133.8, 18.7), "Valles Marineris": (-58.6, -14.0), "Hellas": (70.5, -42.4),
    "Argyre": (-43.3, -49.8), "Elysium Mons": (147.2, 25.0), "Syrtis Major": (69.5, 8.4), "Utopia": (117.5, 46.7),
    "Acidalia": (-21.7, 49.8),
}  # fmt: skip


def map_figures(tables: Tables, sensor: str) -> list[Picture]:
    """Draws where the tiles lie: the whole planet, and the region when they are close together."""
    assert tables.rows is not None
    rows = tables.rows
    known = np.isfinite(rows.lon) & np.isfinite(rows.lat)
    lon, lat, val = rows.lon[known], rows.lat[known], rows.val[known]
    pictures = [_global_map(tables, lon, lat, val, sensor)]
    near = max(float(np.ptp(lon)), float(np.ptp(lat)))
    if near < _CLOSE_DEG:
        pictures.append(_region_map(rows, lon, lat, val, sensor))
    return pictures


def _global_map(tables: Tables, lon: Floats, lat: Floats, val: npt.NDArray[np.bool_], sensor: str) -> Picture:
    with new_axes(8.6, 4.5) as (figure, axes):
        axes.set_facecolor("#f7f5f2")
        if tables.located > MAX_SHOWN_ROWS:
            row, col = np.nonzero(tables.grid)
            colours = require("matplotlib.colors", "prep")
            mesh = axes.hexbin(
                (col + 0.5) * GRID_DEG - 180, (row + 0.5) * GRID_DEG - 90, tables.grid[row, col], gridsize=(120, 60),
                extent=(-180, 180, -90, 90), reduce_C_function=np.sum, cmap="viridis", linewidths=0.1,
                norm=colours.LogNorm(),
            )  # fmt: skip
            figure.colorbar(mesh, ax=axes, label="tiles in a cell of 3 degrees", shrink=0.8, pad=0.015)
            how = "Density of tile centres (logarithmic colours)."
        else:
            for chosen, colour in ((~val, sensor_colour(sensor)), (val, val_colour(sensor))):
                axes.scatter(lon[chosen], lat[chosen], s=22, color=colour, linewidths=0.3, edgecolors="white", zorder=4)
            split_legend(axes, sensor, bool(val.any()))
            how = "One dot a tile" + (f" ({lon.size:,} of {tables.located:,})." if lon.size < tables.located else ".")
        # A light edge keeps the names readable on any colour.
        edge = require("matplotlib.patheffects", "prep").withStroke(linewidth=1.6, foreground="white")
        for name, (x, y) in _FEATURES.items():
            axes.plot(x, y, "+", color="#5f676f", ms=5, mew=0.8, zorder=6)
            axes.annotate(name, (x, y), (4, 3), textcoords="offset points", fontsize=6.5, color="#5f676f",
                          zorder=6, path_effects=[edge])  # fmt: skip
        axes.set_xlim(-180, 180)
        axes.set_ylim(-90, 90)
        axes.set_xticks(np.arange(-180, 181, 45))
        axes.set_yticks(np.arange(-90, 91, 30))
        axes.set_aspect("equal")
        axes.set_xlabel("longitude (degrees, east positive)")
        axes.set_ylabel("planetocentric latitude (degrees)")
        png = figure_png(figure)
    caption = f"{how} Simple cylindrical grid of Mars; crosses name features for orientation."
    return Picture("map", png, f"Map of {tables.located} tile centres on Mars", caption, 1080)


def _region_map(rows: Rows, lon: Floats, lat: Floats, val: npt.NDArray[np.bool_], sensor: str) -> Picture:
    collections = require("matplotlib.collections", "prep")
    with new_axes(6.4, 5.0) as (figure, axes):
        whole = len(rows.footprint) == lon.size
        for chosen, colour in ((~val, sensor_colour(sensor)), (val, val_colour(sensor))):
            if whole:
                corners = [np.reshape(rows.footprint[n], (4, 2)) for n in np.flatnonzero(chosen)]
                corners = [c for c in corners if np.ptp(c[:, 0]) < 180]  # not those across the antimeridian
                shapes = collections.PolyCollection(
                    corners, facecolors=colour, edgecolors="white", linewidths=0.4, alpha=0.75
                )
                axes.add_collection(shapes)
            else:
                axes.scatter(lon[chosen], lat[chosen], s=9, color=colour, linewidths=0, alpha=0.8)
        axes.autoscale()
        axes.margins(0.04)
        axes.set_aspect(1 / max(0.05, math.cos(math.radians(float(lat.mean())))), adjustable="datalim")
        axes.ticklabel_format(useOffset=False)
        axes.locator_params(nbins=6)
        axes.set_xlabel("longitude (degrees, east positive)")
        axes.set_ylabel("planetocentric latitude (degrees)")
        split_legend(axes, sensor, bool(val.any()))
        png = figure_png(figure)
    shown = "Footprints" if whole else "Centres"
    return Picture("region", png, f"{shown} of {lon.size} tiles", f"{shown} of {lon.size:,} tiles, close up.", 640)
