"""The crater population: a power law of sizes, hashed per cell, with a bowl, rim, ejecta and an age."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from .noise import Float32, Float64, Grid, fade, hash_cells, smoothstep, uniform

SMALLEST_M = 2.0
OCTAVES = 14  # 2 m to 32 km
CENTRAL_PEAK_M = 5000.0  # simple-to-complex transition on Mars is near 5 to 8 km
REACH = 2.6  # ejecta end at this many radii

_CHANNEL = 1000
_CELL_IN_DIAMETERS = 4.0
_MOST_PER_CELL = 6


@dataclass(frozen=True)
class Craters:
    """Craters, one array element each.

    Attributes:
        x: Easting of the centre, metres.
        y: Northing of the centre, metres.
        diameter: Rim to rim, metres.
        age: 0 fresh to 1 strongly degraded.
        c2: Amplitude of the oval part of the rim's outline, east-west, share of the radius.
        s2: The same along the diagonal.
        c3: Amplitude of the three-cornered part.
    """

    x: Float64
    y: Float64
    diameter: Float64
    age: Float64
    c2: Float64
    s2: Float64
    c3: Float64

    def __len__(self) -> int:
        return len(self.x)

    def where(self, keep: npt.NDArray[Any]) -> Craters:
        """Returns the craters selected, and ordered, by a boolean or index array."""
        return Craters(*(getattr(self, field.name)[keep] for field in fields(self)))

    @classmethod
    def join(cls, parts: list[Craters]) -> Craters:
        """Returns one catalogue."""
        return cls(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)))


# Probability that craters at (x, y) with those diameters outlived resurfacing.
Retention = Callable[[Float64, Float64, Float64], Float64]


def craters_in(
    seed: int,
    bounds: tuple[float, float, float, float],
    *,
    density: float,
    smallest_m: float,
    retention: Retention | None = None,
    reach: float = REACH,
) -> Craters:
    """Lists the craters whose centre lies within `reach` radii of a window.

    The cumulative population is N(>D) = density / D^2 per unit area (a slope of -2 on a cumulative plot, near that of
    the Martian production function at these sizes), before resurfacing.

    Args:
        seed: Seed of the world.
        bounds: West, south, east, north, metres.
        density: N0, dimensionless.
        smallest_m: Leave out smaller craters.
        retention: Chance of survival; None keeps all.
        reach: Widening of the window, in radii of the crater.

    Returns:
        The catalogue, largest craters first.
    """
    parts, draws = [], []
    for octave in range(OCTAVES):
        low = SMALLEST_M * 2.0**octave
        if 2 * low >= smallest_m:
            found, draw = _octave(seed, octave, low, bounds, density, reach, smallest_m)
            parts.append(found)
            draws.append(draw)
    craters, draw = Craters.join(parts), np.concatenate(draws)
    if retention is not None and len(craters):
        kept = draw < retention(craters.x, craters.y, craters.diameter)
        craters = craters.where(kept)
    return craters.where(np.lexsort((craters.x, -craters.diameter)))


def _octave(
    seed: int,
    octave: int,
    low: float,
    bounds: tuple[float, float, float, float],
    density: float,
    reach: float,
    smallest_m: float,
) -> tuple[Craters, Float64]:
    """Lists the craters of diameters `low` to twice that, and a uniform number for each that decides its survival."""
    cell = _CELL_IN_DIAMETERS * low
    margin = low * reach
    first_x, last_x = (int(np.floor(edge / cell)) for edge in (bounds[0] - margin, bounds[2] + margin))
    first_y, last_y = (int(np.floor(edge / cell)) for edge in (bounds[1] - margin, bounds[3] + margin))
    cy, cx = (a.ravel() for a in np.mgrid[first_y : last_y + 1, first_x : last_x + 1])
    expected = 0.75 * density * _CELL_IN_DIAMETERS**2  # N(>low) - N(>2 low), times the cell's area
    draw = uniform(hash_cells(seed, _CHANNEL + octave, cx, cy), 0)
    count = np.searchsorted(_poisson_cdf(expected), draw, side="right")
    slot = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    cx, cy = np.repeat(cx, count), np.repeat(cy, count)
    state = hash_cells(seed, _CHANNEL + octave, cx, cy, slot)
    x, y = (cx + uniform(state, 1)) * cell, (cy + uniform(state, 2)) * cell
    diameter = low / np.sqrt(1 - 0.75 * uniform(state, 3))  # inverse of the truncated power law
    reach_m = diameter / 2 * reach
    near = diameter >= smallest_m
    near &= (x > bounds[0] - reach_m) & (x < bounds[2] + reach_m)
    near &= (y > bounds[1] - reach_m) & (y < bounds[3] + reach_m)
    x, y, diameter, state = x[near], y[near], diameter[near], state[near]
    oval, angle = 0.07 * uniform(state, 5), 2 * np.pi * uniform(state, 6)
    found = Craters(
        x, y, diameter, uniform(state, 7), oval * np.cos(angle), oval * np.sin(angle), 0.05 * uniform(state, 8) - 0.025
    )
    return found, uniform(state, 4)


def _poisson_cdf(expected: float) -> Float64:
    terms = [np.exp(-expected)]
    for n in range(1, _MOST_PER_CELL):
        terms.append(terms[-1] * expected / n)
    return np.cumsum(terms)


def rim_distance(craters: Craters, number: int, grid: Grid, reach: float) -> tuple[tuple[slice, slice], Float32] | None:
    """Measures the distance from one crater's centre in units of its (slightly irregular) rim radius.

    Args:
        craters: Catalogue.
        number: Which crater.
        grid: Raster.
        reach: Half-width of the wanted window, in radii.

    Returns:
        The window of the raster (rows, columns) and the distance there, float32; None when it misses the raster.
    """
    radius = craters.diameter[number] / 2
    extent = radius * reach * 1.1
    columns = _span(grid.x_W, craters.x[number], extent)
    rows = _span(-grid.y_H, -craters.y[number], extent)
    if columns.start >= columns.stop or rows.start >= rows.stop:
        return None
    dx = ((grid.x_W[columns] - craters.x[number]) / radius).astype(np.float32)[None, :]
    dy = ((grid.y_H[rows] - craters.y[number]) / radius).astype(np.float32)[:, None]
    xx, yy = dx * dx, dy * dy
    square = xx + yy + np.float32(1e-6)
    outline = np.float32(craters.c2[number]) * (xx - yy)
    outline += np.float32(2 * craters.s2[number]) * (dx * dy)
    outline /= square
    distance = np.sqrt(square)
    outline += np.float32(craters.c3[number]) * (dx * (xx - 3 * yy)) / (square * distance)
    outline += np.float32(1)
    distance /= outline
    return (rows, columns), distance


def _span(ascending: Float64, centre: float, extent: float) -> slice:
    low, high = np.searchsorted(ascending, (centre - extent, centre + extent))
    return slice(int(low), int(high))


def add_craters(
    craters: Craters,
    grid: Grid,
    elevation: Float32,
    albedo: Float32,
    rock: Float32,
    older: Sequence[tuple[float, Float32]] = (),
) -> None:
    """Adds craters to a ground raster in place.

    Depth is 0.2 of the diameter and rim height 0.04 when fresh (Pike 1977; Watters et al. 2015 for Mars), less with
    age; large craters have a flat floor and a central peak.

    Args:
        craters: Catalogue, largest first.
        grid: Raster.
        elevation: Metres, changed.
        albedo: Multiplied by the ejecta's brightness.
        rock: Rockiness 0..1, raised at fresh walls and ejecta.
        older: (feature scale in metres, height) of landforms; a crater larger than the features flattens them.
    """
    for number in range(len(craters)):
        found = rim_distance(craters, number, grid, REACH)
        if found is None:
            continue
        window, distance = found
        diameter, age = float(craters.diameter[number]), float(craters.age[number])
        visible = float(fade(diameter, grid.gsd_m, 3.0, 4.5))
        elevation[window] += profile(distance, diameter, age) * np.float32(visible)
        for scale, height in older:
            if diameter > 0.5 * scale:
                height[window] *= 1 - np.float32(1 - 0.5 * age) * smoothstep(distance, 1.5, 0.95)
        if age < 0.3:
            fresh = (1 - age / 0.3) * visible
            halo = np.exp(-0.5 * np.square((distance - 0.9) / 0.55))
            albedo[window] *= 1 + np.float32(0.16 * fresh) * halo
            rock[window] += np.float32(0.6 * fresh) * halo


def profile(distance: Float32, diameter: float, age: float) -> Float32:
    """Returns the height of a crater over the plain.

    Args:
        distance: Distance from the centre in rim radii.
        diameter: Metres.
        age: 0 fresh to 1 degraded.
    """
    depth, rim = 0.2 * diameter * (1 - 0.72 * age), 0.04 * diameter * (1 - 0.7 * age)
    square = distance * distance
    floor = -depth * (0.95 - 0.45 * age - 0.35 * float(smoothstep(diameter, 2000.0, 8000.0)))
    bowl, flat = (depth + rim) * (square - 1) + rim, np.float32(floor + rim)
    inside = 0.5 * (bowl + flat + np.sqrt(np.square(bowl - flat) + np.float32(0.02) * depth**2))
    outside = rim * (1 / (square * distance + 1e-6) - REACH**-3)
    sharp = np.where(distance < 1, inside, outside)
    # An old crater is the same bowl after diffusion: no edge at the rim.
    soft = -depth * np.exp(-1.6 * square * distance) + 0.8 * rim * np.exp(-np.square((distance - 1.15) / 0.35))
    height = (1 - age) * sharp + age * soft
    if diameter > CENTRAL_PEAK_M:
        height = height + 0.35 * depth * np.exp(-square / 0.02)
    height[distance > REACH] = 0
    return np.asarray(height, dtype=np.float32)
