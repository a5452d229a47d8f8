"""The synthetic ground: one surface, asked for at any coordinate and any resolution.

Relief is the sum of fractal noise (octaves below the camera's resolution are left out, so nothing aliases), landforms
and craters. Landforms live in patches: jittered Voronoi cells of one kind of terrain each, on three bands whose
feature scales are 6 apart, as are the cameras, so that every camera resolves its own dunes, cones and craters while
the coarser ones shape its slopes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .craters import REACH, Craters, add_craters, craters_in
from .landforms import RELIEF, Patch
from .noise import (
    Float32,
    Float64,
    Grid,
    Int64,
    fade,
    hash_cells,
    interpolate,
    lattice_noise,
    resample,
    smoothstep,
    spline_weights,
    uniform,
    uniform_of,
)

BAND_SCALES_M = (20.0, 120.0, 720.0)
PATCH_IN_SCALES = 16.0
_PATCH_RIM = (0.1, 1.3)  # a patch fades in between these distances from its edge, in feature scales
KINDS = ("plains", "dunes", "cones", "polygons", "rough", "layered")
_KIND_EDGES = (0.22, 0.39, 0.57, 0.71, 0.86)  # cumulative shares of KINDS
# kind -> (roughness of the fine relief, albedo factor, thermal inertia in J m-2 K-1 s-1/2, crater retention)
_TRAITS = {
    "plains": (0.45, 1.0, 190.0, 1.0),
    "dunes": (0.25, 0.9, 240.0, 0.1),
    "cones": (0.5, 0.98, 260.0, 0.4),
    "polygons": (0.5, 1.05, 320.0, 0.5),
    "rough": (1.0, 0.95, 430.0, 0.45),
    "layered": (0.55, 1.08, 380.0, 0.5),
}
_SMALLEST_BAND_PX = 4.0  # landforms of a band whose scale is smaller than this are below a camera's resolution
_FINEST_OCTAVE_M = 2.0
_OCTAVES = 15
_OCTAVE_SLOPE = 0.022  # rms height of the finest octave over its lattice spacing
_SLOPE_DECAY = -0.15  # exponent: coarser octaves are gentler (a Hurst exponent of 0.85)


@dataclass
class Surface:
    """The ground on one raster.

    Attributes:
        elevation: Metres over the datum.
        albedo: Lambert albedo, 0..1.
        rock: Rockiness of fresh craters, 0..1.
        inertia: Thermal inertia, J m-2 K-1 s-1/2.
    """

    elevation: Float32
    albedo: Float32
    rock: Float32
    inertia: Float32


@dataclass
class _Terrain:
    """The patches of one band on one raster: heights in metres, the rest relative."""

    scale: float
    height: Float32
    sand: Float32  # height of dunes
    mantle: Float32  # 1 inside a dune field: it buries the finer landforms that are not dunes
    albedo: Float32
    roughness: Float32
    inertia: Float32


class Ground:
    """A seeded synthetic ground.

    Args:
        seed: Seed of the world.
        crater_density: N0 of the crater population (see `momo.data_prep.world.craters.craters_in`).
    """

    def __init__(self, seed: int, crater_density: float) -> None:
        self.seed, self.crater_density = seed, crater_density

    def craters(self, bounds: tuple[float, float, float, float], smallest_m: float, reach: float = 1.0) -> Craters:
        """Lists the craters that touch a window (west, south, east, north) with `reach` rim radii."""
        return craters_in(
            self.seed,
            bounds,
            density=self.crater_density,
            smallest_m=smallest_m,
            retention=self._retention,
            reach=reach,
        )

    def surface(self, grid: Grid) -> Surface:
        """Evaluates the ground on a raster, band-limited to its spacing."""
        gsd = grid.gsd_m
        elevation, albedo, rock = (np.full(grid.shape, value, dtype=np.float32) for value in (0.0, 0.2, 0.0))
        inertia = np.full(grid.shape, 1.0, dtype=np.float32)
        terrains = [
            self._terrain(grid, band) for band, scale in enumerate(BAND_SCALES_M) if scale > _SMALLEST_BAND_PX * gsd
        ]
        bare = np.ones(grid.shape, dtype=np.float32)
        for terrain in reversed(terrains):  # coarse to fine
            terrain.height = terrain.height * bare + terrain.sand
            albedo *= 1 + (terrain.albedo - 1) * (0.3 + 0.7 * bare)
            inertia *= terrain.inertia
            bare *= 1 - terrain.mantle
        self._add_relief(grid, elevation, {terrain.scale: terrain.roughness for terrain in terrains})
        self._add_mottling(grid, albedo)
        older = [(terrain.scale, terrain.height) for terrain in terrains]
        add_craters(self.craters(grid.bounds, 3 * gsd, REACH), grid, elevation, albedo, rock, older)
        for terrain in terrains:
            elevation += terrain.height
        inertia = (220 * inertia * (1 + rock)).astype(np.float32)
        return Surface(elevation, np.clip(albedo, 0.04, 0.6), rock, inertia)

    def kind_at(self, x: Float64, y: Float64, band: int) -> tuple[npt.NDArray[np.str_], Float64, Int64]:
        """Returns the kind of terrain at points.

        Args:
            x: Eastings, metres.
            y: Northings, metres, same shape.
            band: Index into `BAND_SCALES_M`.

        Returns:
            Kind, weight (0 at the patch's edge, 1 well inside) and the patch's cell (..., 2).
        """
        cell, edge = self._nearest_patch(x, y, band)
        return np.asarray(KINDS)[self._kind_number(cell, band)], smoothstep(edge, *_PATCH_RIM), cell

    def relief_share(self, grid: Grid, band: int, steeper_than: float = 0.06) -> float:
        """Returns the share of a raster where one band's landforms alone are steeper than a slope (rise over run)."""
        height, sand, *_ = self._terrain_at(grid, band)
        slope = np.hypot(*np.gradient(height + sand, np.float32(grid.gsd_m)))
        return float((slope > steeper_than).mean())

    def _kind_number(self, cell: Int64, band: int) -> Int64:
        draw = uniform(hash_cells(self.seed, 200 + band, cell[..., 0], cell[..., 1]), 2)
        return np.searchsorted(_KIND_EDGES, draw, side="right")

    def _retention(self, x: Float64, y: Float64, diameter: Float64) -> Float64:
        """Returns the chance that craters survived in the terrain of the scale nearest to their own."""
        nearest = np.abs(np.log(np.asarray(BAND_SCALES_M)[:, None] / diameter)).argmin(axis=0)
        by_kind = np.asarray([_TRAITS[name][3] for name in KINDS])
        chance = np.ones(len(x))
        for band in range(len(BAND_SCALES_M)):
            here = nearest == band
            if here.any():
                cell, edge = self._nearest_patch(x[here], y[here], band)
                chance[here] = 1 - smoothstep(edge, *_PATCH_RIM) * (1 - by_kind[self._kind_number(cell, band)])
        return chance

    def _nearest_patch(self, x: Float64, y: Float64, band: int) -> tuple[Int64, Float64]:
        """Returns the cell of the nearest patch seed and the distance to the patch's edge in feature scales."""
        scale = BAND_SCALES_M[band]
        size = PATCH_IN_SCALES * scale
        px, py = self._bent(x, y, band, size)
        cx, cy = np.floor(px).astype(np.int64), np.floor(py).astype(np.int64)
        low_x, low_y = int(cx.min()) - 1, int(cy.min()) - 1
        columns, rows = np.arange(low_x, int(cx.max()) + 2), np.arange(low_y, int(cy.max()) + 2)
        seed_x, seed_y = (s.ravel() for s in self._patch_seed(columns[None, :], rows[:, None], band))
        flat = (cy - low_y) * len(columns) + (cx - low_x)
        owner = flat.copy()
        first = np.full(px.shape, np.inf)
        second = first.copy()
        for step in (dy * len(columns) + dx for dy in (-1, 0, 1) for dx in (-1, 0, 1)):
            index = flat + step
            distance = np.hypot(px - seed_x[index], py - seed_y[index])
            closer = distance < first
            second = np.where(closer, first, np.minimum(second, distance))
            first = np.where(closer, distance, first)
            owner = np.where(closer, index, owner)
        nearest = np.stack((columns[owner % len(columns)], rows[owner // len(columns)]), axis=-1)
        return nearest, (second - first) / 2 * PATCH_IN_SCALES

    def _patch_seed(self, column: Int64, row: Int64, band: int) -> tuple[Float64, Float64]:
        cells = hash_cells(self.seed, 200 + band, column, row)
        return column + 0.5 + 0.7 * (uniform(cells, 0) - 0.5), row + 0.5 + 0.7 * (uniform(cells, 1) - 0.5)

    def _bent(self, x: Float64, y: Float64, band: int, size: float) -> tuple[Float64, Float64]:
        # Sines rather than noise: cheap at scattered points, and enough to hide that patch edges are straight.
        shift = 7.0 * band + 100.0 * uniform_of(self.seed, 200 + band)
        px, py = x / size, y / size
        bend_x = 0.09 * np.sin(5.1 * py + 1.7 * px + shift) + 0.035 * np.sin(13.0 * py - 6.0 * px + 2 * shift)
        bend_y = 0.09 * np.sin(4.7 * px - 1.9 * py + 3 * shift) + 0.035 * np.sin(12.0 * px + 7.0 * py + shift)
        return px + bend_x, py + bend_y

    def _terrain(self, grid: Grid, band: int) -> _Terrain:
        """Returns one band's patches, evaluated on a coarser raster when that loses nothing."""
        scale = BAND_SCALES_M[band]
        step = scale / 48
        if step <= 1.5 * grid.gsd_m:
            return _Terrain(scale, *self._terrain_at(grid, band))
        nodes = grid.coarse(step, margin=2)
        return _Terrain(scale, *(resample(a, nodes, grid) for a in self._terrain_at(nodes, band)))

    def _terrain_at(self, grid: Grid, band: int) -> tuple[Float32, Float32, Float32, Float32, Float32, Float32]:
        height, sand, mantle = (np.zeros(grid.shape, dtype=np.float32) for _ in range(3))
        albedo, roughness, inertia = (np.full(grid.shape, v, dtype=np.float32) for v in (1.0, 0.4, 1.0))
        visible = np.float32(fade(BAND_SCALES_M[band], grid.gsd_m, 2.5, 5.0))
        for patch, window, weight in self._patches(grid, band):
            rough, tone, thermal, _ = _TRAITS[patch.kind]
            rough *= patch.vary(50, 0.6, 1.4)
            tone *= patch.vary(51, 0.88, 1.12)
            thermal *= patch.vary(52, 0.8, 1.25)
            roughness[window] += weight * np.float32(rough - 0.4)
            inertia[window] += weight * np.float32(thermal / 260.0 - 1)
            tint = np.full(weight.shape, tone, dtype=np.float32)
            if patch.kind in RELIEF:
                relief, brightness = RELIEF[patch.kind](grid.part(*window), patch)
                (sand if patch.kind == "dunes" else height)[window] += relief * weight * visible
                tint *= brightness
            if patch.kind == "dunes":
                mantle[window] += np.float32(0.85) * weight
            albedo[window] += weight * (tint - 1)
        return height, sand, mantle, albedo, roughness, inertia

    def _patches(self, grid: Grid, band: int) -> Iterator[tuple[Patch, tuple[slice, slice], Float32]]:
        """Yields the patches that touch a raster, each with its window and its weight 0..1 there."""
        scale = BAND_SCALES_M[band]
        nodes = grid.coarse(max(scale / 3, grid.gsd_m), margin=3)
        x, y = np.meshgrid(nodes.x_W, nodes.y_H)
        kinds, weight, cell = self.kind_at(x, y, band)
        first_row, wy = _taps(nodes.y_H[0] - grid.y_H, nodes.gsd_m)
        first_column, wx = _taps(grid.x_W - nodes.x_W[0], nodes.gsd_m)
        size = PATCH_IN_SCALES * scale
        cells, owner = np.unique(cell.reshape(-1, 2), axis=0, return_inverse=True)
        owner = owner.reshape(x.shape)
        for number, (column, row) in enumerate(cells.tolist()):
            mine = owner == number
            own_weight = np.where(mine, weight, 0).astype(np.float32)
            rows = _reached(first_row, np.flatnonzero(own_weight.any(axis=1)))
            columns = _reached(first_column, np.flatnonzero(own_weight.any(axis=0)))
            if rows.start >= rows.stop or columns.start >= columns.stop:
                continue
            sx, sy = self._patch_seed(np.asarray([column]), np.asarray([row]), band)
            kind = str(kinds[mine][0])
            patch = Patch(self.seed, band, (column, row), kind, (float(sx[0]) * size, float(sy[0]) * size), scale)
            here = interpolate(own_weight, first_row[rows], wy[:, rows], first_column[columns], wx[:, columns])
            yield patch, (rows, columns), here

    def _add_relief(self, grid: Grid, elevation: Float32, roughness: dict[float, Float32]) -> None:
        """Adds fractal noise whose octaves are scaled by the roughness of the band they belong to."""
        step = 4 * grid.gsd_m
        nodes = grid.coarse(step, margin=2)
        smooth = np.zeros(nodes.shape, dtype=np.float32)
        for octave in range(_OCTAVES):
            spacing = _FINEST_OCTAVE_M * 2.0**octave
            slope = _OCTAVE_SLOPE * (spacing / _FINEST_OCTAVE_M) ** _SLOPE_DECAY
            amplitude = np.float32(slope * spacing * float(fade(spacing, grid.gsd_m, 1.4, 2.8)))
            if amplitude == 0:
                continue
            local = roughness.get(_band_scale(spacing)) if spacing < 2 * BAND_SCALES_M[-1] else None
            if local is None and spacing > 4 * step:
                smooth += amplitude * lattice_noise(self.seed, 100 + octave, nodes, spacing)
                continue
            noise = lattice_noise(self.seed, 100 + octave, grid, spacing)
            noise *= amplitude if local is None else amplitude * 2 * local
            elevation += noise
        elevation += resample(smooth, nodes, grid)

    def _add_mottling(self, grid: Grid, albedo: Float32) -> None:
        """Varies the albedo by dust and sand sheets of all wavelengths."""
        for octave in range(2, _OCTAVES, 2):
            spacing = _FINEST_OCTAVE_M * 2.0**octave
            amplitude = 0.02 * float(fade(spacing, grid.gsd_m, 2.0, 4.0))
            if amplitude:
                albedo *= 1 + np.float32(amplitude) * lattice_noise(self.seed, 150 + octave, grid, spacing)


def _band_scale(spacing: float) -> float:
    return min(BAND_SCALES_M, key=lambda scale: abs(np.log(scale / (2 * spacing))))


def _taps(offset: Float64, step: float) -> tuple[Int64, Float32]:
    position = offset / step
    cell = np.floor(position).astype(np.int64)
    return cell - 1, spline_weights(position - cell)


def _reached(first: Int64, used: Int64) -> slice:
    """Returns the output positions whose four taps touch any used node; `first` ascends."""
    if len(used) == 0:
        return slice(0, 0)
    return slice(int(np.searchsorted(first, used[0] - 3)), int(np.searchsorted(first, used[-1], side="right")))
