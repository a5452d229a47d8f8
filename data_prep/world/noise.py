"""Deterministic randomness on the ground: hashes of lattice cells and smooth noise between them.

Nothing here keeps state: a value depends on seed, channel and ground coordinate only, so any camera can ask for any
window at any resolution and see the same ground.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]

# Root mean square of cubic B-spline noise over a lattice of uniform values in -1..1.
_SPLINE_RMS = 0.2766


@dataclass(frozen=True)
class Grid:
    """Pixel centres of a north-up raster on the ground.

    Attributes:
        x_W: Easting of the columns, metres, ascending.
        y_H: Northing of the rows, metres, descending (row 0 is north).
        gsd_m: Spacing of both, metres.
    """

    x_W: Float64
    y_H: Float64
    gsd_m: float

    @classmethod
    def of(cls, west: float, north: float, gsd_m: float, rows: int, columns: int, margin: int = 0) -> Grid:
        """Returns the grid of a raster whose upper left corner is (west, north), widened by `margin` pixels."""
        column = np.arange(-margin, columns + margin, dtype=np.float64) + 0.5
        row = np.arange(-margin, rows + margin, dtype=np.float64) + 0.5
        return cls(west + column * gsd_m, north - row * gsd_m, gsd_m)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return len(self.y_H), len(self.x_W)

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        """West, south, east, north of the pixel centres, metres."""
        return float(self.x_W[0]), float(self.y_H[-1]), float(self.x_W[-1]), float(self.y_H[0])

    def part(self, rows: slice, columns: slice) -> Grid:
        """Returns a window of the grid."""
        return Grid(self.x_W[columns], self.y_H[rows], self.gsd_m)

    def coarse(self, step_m: float, margin: int) -> Grid:
        """Returns the grid of all multiples of `step_m` that covers this one with `margin` nodes to spare."""
        west, south, east, north = self.bounds
        columns = np.arange(np.floor(west / step_m) - margin, np.ceil(east / step_m) + margin + 1)
        rows = np.arange(np.ceil(north / step_m) + margin, np.floor(south / step_m) - margin - 1, -1)
        return Grid(columns * step_m, rows * step_m, step_m)


def hash_cells(seed: int, *keys: Any) -> npt.NDArray[np.uint64]:
    """Hashes integer keys that broadcast together into one state an element; see `uniform`.

    Args:
        seed: Seed of the world.
        keys: Integers or integer arrays.
    """
    state: Any = seed
    for key in keys:
        if isinstance(key, int) and isinstance(state, int):
            state = _mix_int(state * _SPREAD + key + _STEP)
            continue
        if isinstance(state, int):
            state = np.asarray([state & _MASK], dtype=np.uint64)
        added = [key & _MASK] if isinstance(key, int) else key
        state = _mix(state * np.uint64(_SPREAD) + np.asarray(added).astype(np.uint64) + np.uint64(_STEP))
    return np.asarray(state, dtype=np.uint64)


def uniform(state: npt.NDArray[np.uint64], number: int) -> Float64:
    """Draws the `number`-th uniform number in 0..1 of each hashed state."""
    mixed = _mix(np.atleast_1d(state) * np.uint64(_SPREAD) + np.uint64((number + _STEP) & _MASK))
    return ((mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53).reshape(state.shape)


def uniform_of(seed: int, *keys: int) -> float:
    """Hashes plain integers to one uniform number in 0..1."""
    state = seed
    for key in keys:
        state = _mix_int(state * _SPREAD + key + _STEP)
    return float((state >> 11) * 2.0**-53)


_MASK = 2**64 - 1
_SPREAD, _STEP = 0xD1342543DE82EF95, 0x9E3779B97F4A7C15


def _mix(z: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Mixes bits by the finaliser of splitmix64 (Steele, Lea and Flood 2014)."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _mix_int(z: int) -> int:
    z &= _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def spline_weights(t: Float64) -> Float32:
    """Returns the four cubic B-spline weights for fractions t in 0..1, shape (4, N)."""
    s = 1.0 - t
    weights = (s**3, 3 * t**3 - 6 * t**2 + 4, 3 * s**3 - 6 * s**2 + 4, t**3)
    return (np.stack(weights) / 6.0).astype(np.float32)


def catmull_rom_weights(t: Float64) -> Float32:
    """Returns the four Catmull-Rom weights (these pass through the nodes) for fractions t in 0..1, shape (4, N)."""
    weights = (-t + 2 * t**2 - t**3, 2 - 5 * t**2 + 3 * t**3, t + 4 * t**2 - 3 * t**3, -(t**2) + t**3)
    return (np.stack(weights) / 2.0).astype(np.float32)


def interpolate(nodes: Float32, first_row: Int64, wy: Float32, first_column: Int64, wx: Float32) -> Float32:
    """Interpolates a node array separably with four taps on each axis.

    Args:
        nodes: (rows, columns).
        first_row: First of the four node rows of every output row, (H,).
        wy: Weights (4, H).
        first_column: First of the four node columns of every output column, (W,).
        wx: Weights (4, W).

    Returns:
        (H, W).
    """
    low, high = int(first_row.min()), int(first_row.max()) + 4
    across = _four_taps(nodes[low:high].T, first_column, wx).T
    return _four_taps(np.ascontiguousarray(across), first_row - low, wy)


def _four_taps(nodes: Float32, first: Int64, weights: Float32) -> Float32:
    """Interpolates along the first axis."""
    out = nodes[first]
    out *= weights[0][:, None]
    for tap in range(1, 4):
        part = nodes[first + tap]
        part *= weights[tap][:, None]
        out += part
    return out


def lattice_noise(
    seed: int, channel: int, grid: Grid, spacing: float, stretch: tuple[float, float] = (1.0, 1.0)
) -> Float32:
    """Evaluates smooth noise of one wavelength: cubic B-splines over hashed lattice values.

    Its power lies at wavelengths of about two to six lattice spacings, so it does not alias while the spacing is at
    least two pixels.

    Args:
        seed: Seed of the world.
        channel: Different channels are independent.
        grid: Where to evaluate.
        spacing: Lattice spacing, metres.
        stretch: Factors on the spacing in x and y.

    Returns:
        float32 of the grid's shape, mean 0, root mean square about 1.
    """
    column, tx = _cell(grid.x_W, spacing * stretch[0])
    row, ty = _cell(grid.y_H, spacing * stretch[1])
    columns = np.arange(column.min() - 1, column.max() + 3)
    rows = np.arange(row.min() - 1, row.max() + 3)
    lattice = uniform(hash_cells(seed, channel, rows[:, None], columns[None, :]), 0) * 2 - 1
    lattice /= _SPLINE_RMS
    return interpolate(
        lattice.astype(np.float32), row - 1 - rows[0], spline_weights(ty), column - 1 - columns[0], spline_weights(tx)
    )


def _cell(coordinate: Float64, spacing: float) -> tuple[Int64, Float64]:
    position = coordinate / spacing
    cell = np.floor(position).astype(np.int64)
    return cell, position - cell


def resample(nodes: Float32, source: Grid, target: Grid, *, smooth: bool = False) -> Float32:
    """Interpolates values on a coarse grid (see `Grid.coarse`) at the pixels of a finer one.

    Args:
        nodes: Values on `source`.
        source: Coarse grid, at least two nodes wider than `target` on every side.
        target: Where to evaluate.
        smooth: B-spline (non-negative, smoothing) instead of Catmull-Rom (exact at the nodes).
    """
    weights = spline_weights if smooth else catmull_rom_weights
    column, tx = _cell(target.x_W - source.x_W[0], source.gsd_m)
    row, ty = _cell(source.y_H[0] - target.y_H, source.gsd_m)
    return interpolate(nodes, row - 1, weights(ty), column - 1, weights(tx))


def smoothstep(value: Any, low: float, high: float) -> Any:
    """Returns 0 below `low`, 1 above `high` and a smooth rise between."""
    t = np.clip((value - low) / (high - low), 0.0, 1.0)
    return t * t * (3 - 2 * t)


def fade(feature_m: Any, gsd_m: float, vanish: float = 2.0, full: float = 4.0) -> Any:
    """Returns the share of a feature a camera may still resolve: 0 below `vanish` pixels, 1 above `full`."""
    return smoothstep(np.log2(np.asarray(feature_m) / gsd_m), np.log2(vanish), np.log2(full))
