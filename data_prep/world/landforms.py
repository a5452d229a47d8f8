"""Landforms that fill a patch of ground: dunes, cones, polygons, rough and layered terrain.

Each function takes a raster window and a patch and returns the height in metres and the relative albedo. Scales are
given as `patch.scale`, the feature size in metres that suits the patch's band; a patch also carries hashed numbers
that vary everything else, so no two fields look alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .noise import Float32, Float64, Grid, hash_cells, lattice_noise, smoothstep, uniform, uniform_of

_TAN_SLIP = 0.6  # tangent of the slip face's angle, 31 degrees


@dataclass(frozen=True)
class Patch:
    """A patch of one kind of terrain.

    Attributes:
        seed: Seed of the world.
        band: Which of the feature scales.
        cell: Hash cell (column, row) it grew from.
        kind: `dunes`, `cones`, `polygons`, `rough`, `layered` or `plains`.
        centre: Ground coordinates, metres.
        scale: Feature size, metres.
    """

    seed: int
    band: int
    cell: tuple[int, int]
    kind: str
    centre: tuple[float, float]
    scale: float

    def vary(self, number: int, low: float, high: float) -> float:
        """Returns a number between `low` and `high` that is the patch's own."""
        return low + (high - low) * uniform_of(self.seed, 300 + self.band, *self.cell, number)

    def channel(self, number: int) -> int:
        """Returns a noise channel that is the patch's own."""
        return int(uniform_of(self.seed, 400 + self.band, *self.cell, number) * 2**40) + 10_000


Relief = tuple[Float32, Float32]


def _axes(grid: Grid, patch: Patch, angle: float) -> Relief:
    """Returns coordinates along and across a direction, metres from the patch's centre."""
    dx = (grid.x_W - patch.centre[0]).astype(np.float32)[None, :]
    dy = (grid.y_H - patch.centre[1]).astype(np.float32)[:, None]
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return dx * cos + dy * sin, dy * cos - dx * sin


def dunes(grid: Grid, patch: Patch) -> Relief:
    """Transverse dunes, symmetric ripples or barchans, dark or bright, along the patch's own wind."""
    style = patch.vary(0, 0, 1)
    if style < 0.3:
        return _barchans(grid, patch)
    wavelength = patch.scale * patch.vary(1, 0.5, 1.35)
    along, _ = _axes(grid, patch, patch.vary(2, 0, 2 * np.pi))
    warp = patch.vary(3, 0.1, 0.55) * lattice_noise(patch.seed, patch.channel(0), grid, 2.2 * wavelength)
    warp += patch.vary(4, 0.1, 0.4) * lattice_noise(patch.seed, patch.channel(1), grid, wavelength)
    phase = along / np.float32(wavelength) + warp
    phase -= np.floor(phase)
    broken = smoothstep(lattice_noise(patch.seed, patch.channel(2), grid, 1.6 * wavelength), -2.2, patch.vary(5, -1, 1))
    if style < 0.7:
        crest = np.minimum(phase / 0.72, (1 - phase) / 0.28)  # windward and slip side
        crest = crest * crest * (3 - 2 * crest)
        height = crest * broken * (0.11 * wavelength)
        albedo = 1 - patch.vary(6, 0.05, 0.35) * broken * (0.6 + 0.4 * crest)
    else:
        crest = np.square(1 - np.abs(2 * phase - 1))  # sharp, symmetric: transverse aeolian ridges
        height = crest * broken * (0.15 * wavelength)
        albedo = 1 + patch.vary(6, -0.1, 0.25) * broken * crest
    return height.astype(np.float32), albedo.astype(np.float32)


def _barchans(grid: Grid, patch: Patch) -> Relief:
    wind = patch.vary(2, 0, 2 * np.pi)
    height = np.zeros(grid.shape, dtype=np.float32)
    size = patch.scale * patch.vary(1, 0.5, 0.9)
    for x, y, (u0, u1) in _scattered(grid, patch, 2.1 * size, patch.vary(3, 0.55, 0.95), 2.0 * size):
        a = size * (0.6 + 0.5 * u0)
        window = _window(grid, x, y, 1.9 * a)
        if window is None:
            continue
        part = grid.part(*window)
        dx = (part.x_W - x).astype(np.float32)[None, :] / np.float32(a)
        dy = (part.y_H - y).astype(np.float32)[:, None] / np.float32(a)
        turn = wind + 0.5 * (u1 - 0.5)
        along, across = dx * np.cos(turn) + dy * np.sin(turn), dy * np.cos(turn) - dx * np.sin(turn)
        bulk = 0.24 * (1 - np.square((along - 0.1) / 1.15) - np.square(across / 0.85))
        slip = _TAN_SLIP * (0.12 + 0.95 * np.square(across) - along)
        dune = np.maximum(np.minimum(bulk, slip), 0) * np.float32(a)
        height[window] = np.maximum(height[window], dune)
    cover = smoothstep(height, 0.0, 0.06 * size)
    return height, (1 - patch.vary(6, 0.15, 0.42) * cover).astype(np.float32)


def cones(grid: Grid, patch: Patch) -> Relief:
    """A cluster of pitted cones: concave flanks and a summit crater."""
    height = np.zeros(grid.shape, dtype=np.float32)
    typical = patch.scale * patch.vary(0, 0.6, 1.0)
    for x, y, (u0, u1) in _scattered(grid, patch, 1.9 * typical, patch.vary(1, 0.45, 0.85), 1.1 * typical):
        radius = 0.5 * typical * (0.55 + 0.8 * u0 * u0)
        window = _window(grid, x, y, 1.6 * radius)
        if window is None:
            continue
        part = grid.part(*window)
        dx = (part.x_W - x).astype(np.float32)[None, :] / np.float32(radius)
        dy = (part.y_H - y).astype(np.float32)[:, None] / np.float32(radius * (0.85 + 0.3 * u1))
        distance = np.sqrt(dx * dx + dy * dy)
        pit_radius = 0.2 + 0.22 * u1
        flank = np.exp(-1.9 * distance * distance) * smoothstep(distance, 1.55, 0.9)
        pit = np.maximum(0, 1 - np.square(distance / pit_radius)) * (0.45 + 0.3 * u0)
        cone = (0.62 * radius * (flank - pit * 0.55)).astype(np.float32)
        height[window] = np.where(distance < pit_radius, cone, np.maximum(height[window], cone))
    cover = smoothstep(height, 0.0, 0.15 * typical)
    return height, (1 + patch.vary(6, -0.12, 0.12) * cover).astype(np.float32)


def polygons(grid: Grid, patch: Patch) -> Relief:
    """Polygonal ground: troughs along the edges of Voronoi cells, centres raised or sunken."""
    size = patch.scale * patch.vary(0, 0.55, 1.1)
    x, y = _axes(grid, patch, patch.vary(1, 0, np.pi))
    bend = 0.12 * lattice_noise(patch.seed, patch.channel(0), grid, 0.5 * size)
    px, py = x / np.float32(size) + bend, y / np.float32(size * patch.vary(2, 0.8, 1.3)) - bend
    cx, cy = np.floor(px).astype(np.int32), np.floor(py).astype(np.int32)
    jitter = patch.vary(3, 0.6, 0.95)
    low_x, low_y = int(cx.min()) - 1, int(cy.min()) - 1
    columns, rows = np.arange(low_x, cx.max() + 2)[None, :], np.arange(low_y, cy.max() + 2)[:, None]
    own = patch.channel(1)
    cells = hash_cells(patch.seed, own, columns, rows)
    seed_x = (columns + 0.5 + jitter * (uniform(cells, 0) - 0.5)).astype(np.float32)
    seed_y = (rows + 0.5 + jitter * (uniform(cells, 1) - 0.5)).astype(np.float32)
    flat = (cy - low_y) * seed_x.shape[1] + (cx - low_x)
    nearest = np.full(grid.shape, 9.0, dtype=np.float32)
    second = nearest.copy()
    for step_y in (-1, 0, 1):
        for step_x in (-1, 0, 1):
            index = flat + (step_y * seed_x.shape[1] + step_x)
            dx, dy = px - seed_x.ravel()[index], py - seed_y.ravel()[index]
            square = dx * dx + dy * dy
            np.minimum(second, np.maximum(nearest, square), out=second)
            np.minimum(nearest, square, out=nearest)
    edge = np.sqrt(second) - np.sqrt(nearest)
    width = patch.vary(4, 0.12, 0.3)
    trough = np.exp(-np.square(edge / width))
    dome = patch.vary(5, -0.06, 0.08) * np.clip(1 - nearest * 2, 0, 1)
    height = size * (dome - patch.vary(6, 0.035, 0.08) * trough)
    return height.astype(np.float32), (1 + patch.vary(7, -0.12, 0.25) * trough).astype(np.float32)


def rough(grid: Grid, patch: Patch) -> Relief:
    """Chaotic ground: ridged noise of several wavelengths, with or without flat-topped knobs."""
    size = patch.scale * patch.vary(0, 0.35, 0.75)
    pull = patch.vary(1, 1.0, 1.8)
    stretch = (pull, 1.0) if patch.vary(2, 0, 1) < 0.5 else (1.0, pull)
    height = np.zeros(grid.shape, dtype=np.float32)
    for octave in range(3):
        spacing = size / 2.0**octave
        if spacing * min(stretch) < 1.5 * grid.gsd_m:
            break
        ridge = 1 - np.abs(lattice_noise(patch.seed, patch.channel(octave), grid, spacing, stretch))
        height += ridge * np.float32(0.16 * spacing)
    if patch.vary(3, 0, 1) < 0.5:
        knobs = smoothstep(lattice_noise(patch.seed, patch.channel(9), grid, size), 0.35, 0.75)
        height += knobs * np.float32(0.3 * size)
    tint = lattice_noise(patch.seed, patch.channel(8), grid, size)
    return height, (1 + 0.06 * tint).astype(np.float32)


def layered(grid: Grid, patch: Patch) -> Relief:
    """Layered ground: an eroded slope cut into benches of different strength and tone."""
    step = patch.scale * patch.vary(0, 0.35, 0.8)
    along, _ = _axes(grid, patch, patch.vary(1, 0, 2 * np.pi))
    base = along / np.float32(step) * patch.vary(2, 0.35, 0.9)
    base += patch.vary(3, 0.5, 1.4) * lattice_noise(patch.seed, patch.channel(0), grid, 2.4 * step)
    base += patch.vary(4, 0.05, 0.25) * lattice_noise(patch.seed, patch.channel(1), grid, 0.6 * step)
    bed = np.floor(base)
    rise = smoothstep(base - bed, 1 - patch.vary(5, 0.25, 0.5), 1.0)
    height = (rise + bed - base) * np.float32(0.16 * step)
    low = int(bed.min())
    strength = uniform(hash_cells(patch.seed, patch.channel(2), np.arange(low, int(bed.max()) + 1)), 0)
    tone = strength[(bed - low).astype(np.int64)].astype(np.float32)
    return height, (1 + patch.vary(6, 0.05, 0.2) * (2 * tone - 1) * (1 - rise)).astype(np.float32)


def _scattered(
    grid: Grid, patch: Patch, cell: float, share: float, margin: float
) -> list[tuple[float, float, tuple[float, float]]]:
    """Lists objects of a patch near a window: one in a `share` of hashed cells, with two uniform numbers each."""
    west, south, east, north = grid.bounds
    columns = np.arange(np.floor((west - margin) / cell), np.floor((east + margin) / cell) + 1).astype(np.int64)
    rows = np.arange(np.floor((south - margin) / cell), np.floor((north + margin) / cell) + 1).astype(np.int64)
    cells = hash_cells(patch.seed, patch.channel(20), columns[None, :], rows[:, None])
    draws = [uniform(cells, number) for number in range(5)]
    x: Float64 = (columns[None, :] + 0.5 + 0.8 * (draws[1] - 0.5)) * cell
    y: Float64 = (rows[:, None] + 0.5 + 0.8 * (draws[2] - 0.5)) * cell
    keep = draws[0] < share
    listed = zip(x[keep], y[keep], draws[3][keep], draws[4][keep], strict=True)
    return [(float(px), float(py), (float(u0), float(u1))) for px, py, u0, u1 in listed]


def _window(grid: Grid, x: float, y: float, extent: float) -> tuple[slice, slice] | None:
    west, east = np.searchsorted(grid.x_W, (x - extent, x + extent))
    north, south = np.searchsorted(-grid.y_H, (-y - extent, -y + extent))
    if west >= east or north >= south:
        return None
    return slice(int(north), int(south)), slice(int(west), int(east))


RELIEF: dict[str, Callable[[Grid, Patch], Relief]] = {
    "dunes": dunes,
    "cones": cones,
    "polygons": polygons,
    "rough": rough,
    "layered": layered,
}
