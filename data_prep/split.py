"""Train or validation by whole cells of ground, so that no validation pixel was seen in training.

Cells are HEALPix cells (Gorski et al. 2005, ApJ 622:759), nested numbering, on planetocentric longitude and latitude.
The same ground therefore has the same cell, hence the same split, in every product, projection and corpus that shares
order and seed. Products without a CRS are cut into blocks of their own pixels.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from momo.errors import ConfigError
from momo.extras import require

from .georeference import MARS_RADIUS_M

if TYPE_CHECKING:
    from .products import Product

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Lattice = Callable[[int], tuple[Floats, Floats]]
MAX_ORDER = 29
TRAIN, VAL = 0, 1
_MOST_CELLS = 256  # cells one window may touch
_ROUNDING = 1e-6  # cells; a window this near to a cell touches it
_BENT = 0.2  # bend of an outline, as a share of its extent, from which on it is sampled
_LATTICE = 8  # least number of steps along a side of a window that is sampled
_OUTLINE = 8  # points along a side of a cell


def cell_side_m(order: int) -> float:
    """Returns the side of a square with the area of a HEALPix cell, metres: sqrt(4 pi / (12 * 4^order)) * R.

    R is the volumetric mean radius of Mars, 3,389,500 m. All cells of an order have the same area.
    """
    return math.sqrt(4.0 * math.pi / (12 * 4**order)) * MARS_RADIUS_M


def cell_order(side_m: float) -> int:
    """Returns the largest order whose cells have sides of at least `side_m` metres (0 when none has)."""
    return max((order for order in range(MAX_ORDER + 1) if cell_side_m(order) >= side_m), default=0)


def cells_at(lon_N: Floats, lat_N: Floats, order: int) -> Ints:
    """Returns the HEALPix cells (nested) of points.

    Args:
        lon_N: Planetocentric longitudes, degrees east.
        lat_N: Latitudes, degrees.
        order: HEALPix order, 0..29.

    Returns:
        One cell a point; -1 where a coordinate is NaN.
    """
    cell_N = np.full(lon_N.shape, -1, dtype=np.int64)
    known = np.isfinite(lon_N) & np.isfinite(lat_N)
    face, x, y = _face_coordinates(lon_N[known], lat_N[known])
    last = 2**order - 1
    x, y = (np.minimum((a * 2**order).astype(np.int64), last) for a in (x, y))
    cell_N[known] = _nested(face, x, y, order)
    return cell_N


@dataclass(frozen=True)
class Places:
    """Where N windows lie.

    Attributes:
        lon_N: Planetocentric longitude of the centre, degrees east, -180..180; NaN without a CRS.
        lat_N: Planetocentric latitude of the centre, degrees; NaN without a CRS.
        corners_N8: Longitude and latitude of the corners, clockwise from the first pixel's; NaN without a CRS.
        cell_N: HEALPix cell (nested) of the centre; -1 without a CRS.
        touched: Every block the windows may reach into, window after window, the centre's block first. >= 0: HEALPix
            cell; < 0: block of pixels of its product, -(1 + (r << 24 | c)). None when the window leaves the map.
        start_N1: Window i touches `touched[start_N1[i] : start_N1[i + 1]]`.
    """

    lon_N: Floats
    lat_N: Floats
    corners_N8: Floats
    cell_N: Ints
    touched: Ints
    start_N1: Ints


def place_windows(
    product: Product, row: int, cols: Sequence[int], size: int, *, order: int, pixel_block: int
) -> Places:
    """Returns where the windows of one row of windows lie.

    Cells are those that meet the outline of the window drawn straight between its corners in HEALPix's own
    coordinates, in which cells are unit squares; the measured bend of its sides is added on all sides. Windows over
    several base cells, or strongly bent ones (beside a pole), are sampled. So no touched cell is missed, and now and
    then a cell is given that the window only comes close to.

    Args:
        product: The product.
        row: First row of the windows.
        cols: First columns.
        size: Side of a window, pixels.
        order: HEALPix order of the cells.
        pixel_block: Side of a block in products without a CRS, pixels.

    Raises:
        ConfigError: The cells are far smaller than a window.
    """
    first_N = np.asarray(cols, dtype=np.int64)
    if not product.georeference.located:
        return _pixel_places(row, first_N, size, pixel_block)
    half = size / 2.0
    col_U, inverse_N3 = np.unique(first_N[:, None] + np.array([0.0, half, size]), return_inverse=True)
    row_3 = row + np.array([0.0, half, size])
    lon, lat = product.georeference.lonlat(np.tile(col_U, (3, 1)), np.repeat(row_3[:, None], len(col_U), axis=1))
    inverse_N3 = inverse_N3.reshape(len(first_N), 3)
    lon_N33, lat_N33 = (a[:, inverse_N3].transpose(1, 0, 2) for a in (lon, lat))
    lon_N, lat_N = lon_N33[:, 1, 1].copy(), lat_N33[:, 1, 1].copy()
    ring = ((0, 0), (0, 2), (2, 2), (2, 0))
    corners_N8 = np.stack([a[:, r, c] for r, c in ring for a in (lon_N33, lat_N33)], axis=1)
    cell_N = cells_at(lon_N, lat_N, order)
    window, cell = _touched_cells(
        lon_N33, lat_N33, order, lambda i: partial(_lattice, product, row, int(first_N[i]), size)
    )
    touched, start_N1 = _flat(window, cell, cell_N)
    return Places(lon_N, lat_N, corners_N8, cell_N, touched, start_N1)


def _pixel_places(row: int, first_N: Ints, size: int, side: int) -> Places:
    def code(r: Any, c: Any) -> Any:
        return -(1 + (np.int64(r) << 24 | np.asarray(c, dtype=np.int64)))

    low_N, high_N = first_N // side, (first_N + size - 1) // side
    low, high = row // side, (row + size - 1) // side
    window = np.repeat(np.arange(len(first_N)), high_N - low_N + 1)
    local = np.arange(len(window)) - np.searchsorted(window, window)
    rows = np.arange(low, high + 1)
    blocks = np.concatenate([code(r, low_N[window] + local) for r in rows])
    centre_N = code((row + size // 2) // side, (first_N + size // 2) // side)
    touched, start_N1 = _flat(np.tile(window, len(rows)), blocks, centre_N)
    unknown_N = np.full(len(first_N), np.nan)
    corners_N8 = np.full((len(first_N), 8), np.nan)
    return Places(unknown_N, unknown_N.copy(), corners_N8, np.full(len(first_N), -1), touched, start_N1)


def _flat(window: Ints, block: Ints, centre_N: Ints) -> tuple[Ints, Ints]:
    """Returns blocks window after window, without repeats, the centre's first, and where each window starts."""
    order = np.lexsort((block, block != centre_N[window], window))
    window, block = window[order], block[order]
    fresh = np.ones(len(window), dtype=bool)
    fresh[1:] = (np.diff(window) != 0) | (np.diff(block) != 0)
    counts_N = np.bincount(window[fresh], minlength=len(centre_N))
    return block[fresh], np.concatenate([[0], np.cumsum(counts_N)]).astype(np.int64)


def _lattice(product: Product, row: int, col: int, size: int, points: int) -> tuple[Floats, Floats]:
    steps = np.linspace(0.0, size, points)
    return product.georeference.lonlat(*np.meshgrid(col + steps, row + steps))


def _face_coordinates(lon: Floats, lat: Floats) -> tuple[Ints, Floats, Floats]:
    """Returns the base cell (0..11) of points and their place in it, two coordinates in 0..1 along its sides."""
    healpix, units = require("astropy_healpix", "prep"), require("astropy.units", "prep")
    face, x, y = healpix.lonlat_to_healpix(
        np.radians(lon) * units.rad, np.radians(lat) * units.rad, 1, return_offsets=True, order="nested"
    )
    return np.asarray(face, dtype=np.int64), np.asarray(x), np.asarray(y)


def _nested(face: Ints, x: Ints, y: Ints, order: int) -> Ints:
    """Returns nested numbers: the base cell, then the bits of y and x in turn (Gorski et al. 2005, section 4.1)."""
    return (face << (2 * order)) | _spread(x) | (_spread(y) << 1)


def _spread(value: Ints) -> Ints:
    """Puts a zero bit above each of the low 32 bits."""
    value = value.astype(np.int64)
    for shift, mask in (
        (16, 0x0000FFFF0000FFFF),
        (8, 0x00FF00FF00FF00FF),
        (4, 0x0F0F0F0F0F0F0F0F),
        (2, 0x3333333333333333),
        (1, 0x5555555555555555),
    ):
        value = (value | (value << shift)) & mask
    return value


def _touched_cells(
    lon_N33: Floats, lat_N33: Floats, order: int, lattices: Callable[[int], Lattice]
) -> tuple[Ints, Ints]:
    """Returns window numbers and cells, one pair for each cell that a window may touch."""
    on_map = np.flatnonzero(np.isfinite(lon_N33).all(axis=(1, 2)) & np.isfinite(lat_N33).all(axis=(1, 2)))
    lon_W9, lat_W9 = lon_N33[on_map].reshape(-1, 9), lat_N33[on_map].reshape(-1, 9)
    face_W9, x_W9, y_W9 = (a.reshape(-1, 9) for a in _face_coordinates(lon_W9.ravel(), lat_W9.ravel()))
    scale = 2**order
    xy_W92 = np.stack([x_W9, y_W9], axis=2) * scale
    corner, after, middle = [0, 2, 8, 6], [2, 8, 6, 0], [1, 5, 7, 3]
    bend_W = np.abs(xy_W92[:, middle] - (xy_W92[:, corner] + xy_W92[:, after]) / 2.0).max(axis=(1, 2))
    # The bend is measured in the middle of a side; a kink (at |latitude| 41.8) elsewhere is at most twice as high.
    margin_W = 2.0 * bend_W + _ROUNDING
    low_W2, high_W2 = xy_W92.min(axis=1) - margin_W[:, None], xy_W92.max(axis=1) + margin_W[:, None]
    one_face = (face_W9 == face_W9[:, :1]).all(axis=1) & (low_W2 >= 0).all(axis=1) & (high_W2 < scale).all(axis=1)
    plain = one_face & (margin_W <= _BENT * (high_W2 - low_W2).max(axis=1) + 2 * _ROUNDING)
    window, cell = _straight(face_W9[plain, 0], xy_W92[plain][:, corner], margin_W[plain], order)
    pairs = [(on_map[plain][window], cell)]
    for w in np.flatnonzero(~plain):
        cells = _near_samples(lattices(int(on_map[w])), unit_vectors(lon_W9[w], lat_W9[w]), order)
        pairs.append((np.full(len(cells), on_map[w], dtype=np.int64), cells))
    return np.concatenate([p[0] for p in pairs]), np.concatenate([p[1] for p in pairs])


def _straight(face_W: Ints, corner_W42: Floats, margin_W: Floats, order: int) -> tuple[Ints, Ints]:
    """Returns numbers and cells of quadrilaterals, grown by a margin, that meet, by the separating axis theorem."""
    low_W2 = np.floor(corner_W42.min(axis=1) - margin_W[:, None]).astype(np.int64)
    high_W2 = np.floor(corner_W42.max(axis=1) + margin_W[:, None]).astype(np.int64)
    extent_W2 = high_W2 - low_W2 + 1
    count_W = extent_W2[:, 0] * extent_W2[:, 1]
    _require_few(int(count_W.max(initial=0)), order)
    window = np.repeat(np.arange(len(count_W)), count_W)
    local = np.arange(len(window)) - np.repeat(np.cumsum(count_W) - count_W, count_W)
    width = extent_W2[window, 0]
    x, y = low_W2[window, 0] + local % width, low_W2[window, 1] + local // width
    following_W42 = np.roll(corner_W42, -1, axis=1)
    cross_W4 = corner_W42[..., 0] * following_W42[..., 1] - corner_W42[..., 1] * following_W42[..., 0]
    sign_W = np.sign(cross_W4.sum(axis=1))
    meets = np.ones(len(window), dtype=bool)
    for k in range(4):
        side_W2 = following_W42[:, k] - corner_W42[:, k]
        out_x, out_y = (sign_W * side_W2[:, 1])[window], (-sign_W * side_W2[:, 0])[window]
        reach = (np.abs(out_x) + np.abs(out_y)) * (0.5 + margin_W[window])
        away = out_x * (x + 0.5 - corner_W42[window, k, 0]) + out_y * (y + 0.5 - corner_W42[window, k, 1])
        meets &= away <= reach
    window = window[meets]
    return window, _nested(face_W[window], x[meets], y[meets], order)


def _near_samples(lattice: Lattice, xyz_93: Floats, order: int) -> Ints:
    """Returns all cells that a window meets, from a lattice of points on it, wherever on the sphere it lies.

    These are the cells of the points, and of their neighbours those whose outline comes nearer to a point than half
    the diagonal of the lattice. The lattice is far finer than a cell, so no cell is farther than a neighbour.
    """
    healpix, units = require("astropy_healpix.core", "prep"), require("astropy.units", "prep")
    extent = float(np.linalg.norm(xyz_93 - xyz_93[4], axis=1).max()) * 2.0 * MARS_RADIUS_M / cell_side_m(order)
    _require_few(int(extent**2), order)
    lon_LL, lat_LL = lattice(max(_LATTICE, math.ceil(8.0 * extent)) + 1)
    own = np.unique(cells_at(lon_LL.ravel(), lat_LL.ravel(), order))
    with np.errstate(invalid="ignore"):  # raised by the library where a cell has seven neighbours
        around = np.setdiff1d(healpix.neighbours(own, 2**order, order="nested"), np.append(own, -1))
    lon_CB, lat_CB = healpix.boundaries_lonlat(around, _OUTLINE, 2**order, order="nested")
    # Relative to the window's centre, so that the squares below keep their digits.
    xyz_LL3 = unit_vectors(lon_LL, lat_LL) - xyz_93[4]
    outline_CB3 = unit_vectors(lon_CB.to_value(units.deg), lat_CB.to_value(units.deg)) - xyz_93[4]
    diagonals = [xyz_LL3[1:, 1:] - xyz_LL3[:-1, :-1], xyz_LL3[1:, :-1] - xyz_LL3[:-1, 1:]]
    gap_C = np.linalg.norm(outline_CB3 - np.roll(outline_CB3, 1, axis=1), axis=-1).max(axis=1)
    reach_C = 1.05 * (float(np.linalg.norm(diagonals, axis=-1).max()) + gap_C) / 2.0
    sample_P3 = xyz_LL3.reshape(-1, 3)
    square_P = (sample_P3**2).sum(axis=1)
    nearest_C = [((b**2).sum(axis=1)[:, None] + square_P - 2.0 * b @ sample_P3.T).min() for b in outline_CB3]
    return np.concatenate([own, around[np.array(nearest_C) <= reach_C**2]]).astype(np.int64)


def unit_vectors(lon: Floats, lat: Floats) -> Floats:
    """Returns points on the unit sphere, a last axis of 3, of longitudes and latitudes in degrees."""
    lon, lat = np.radians(lon), np.radians(lat)
    return np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)], axis=-1)


def _require_few(count: int, order: int) -> None:
    if count > _MOST_CELLS:
        raise ConfigError(
            "the cells of the split are far smaller than a tile",
            seen=f"split.order={order} (cells of {cell_side_m(order):.4g} m): a tile touches about {count}",
            rule=f"a tile touches at most {_MOST_CELLS} cells, and few tiles are left from 2 on",
            fix="leave split.order out, or take a lower order",
        )


@dataclass(frozen=True)
class SplitRule:
    """Gives every block its split, by a seeded hash of its name.

    Attributes:
        seed: Seed of the hash.
        val_fraction: Share of blocks in validation.
        forced: Blocks whose split is set because the hash alone left one split empty.
    """

    seed: int
    val_fraction: float
    forced: dict[str, str] = field(default_factory=dict)

    def position(self, block: str) -> float:
        """Returns the block's fixed place in 0..1: the first 64 bits of SHA-256 of `seed:block`."""
        digest = hashlib.sha256(f"{self.seed}:{block}".encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2.0**64

    def split_of(self, block: str) -> str:
        """Returns `train` or `val`."""
        return self.forced.get(block) or ("val" if self.position(block) < self.val_fraction else "train")


@dataclass(frozen=True)
class Blocks:
    """The blocks that N tiles lie in.

    Attributes:
        names: Name of each block.
        touched: Index into `names` of every block a tile reaches into, tile after tile, the centre's first.
        start_N1: Tile i reaches into `touched[start_N1[i] : start_N1[i + 1]]`.
    """

    names: list[str]
    touched: Ints
    start_N1: Ints

    def name_of(self, tile: int) -> str:
        """Returns the name of the block of a tile's centre; empty when the tile leaves the map."""
        start, end = self.start_N1[tile : tile + 2]
        return self.names[self.touched[start]] if end > start else ""

    def splits(self, rule: SplitRule) -> npt.NDArray[np.int8]:
        """Returns 0 (train) or 1 (val) for tiles whose blocks agree, and -1 for all others."""
        val_K = np.array([rule.split_of(name) == "val" for name in self.names], dtype=np.int64)
        before = np.concatenate([[0], np.cumsum(val_K[self.touched])])
        val_N, all_N = np.diff(before[self.start_N1]), np.diff(self.start_N1)
        split_N = np.where(val_N == 0, TRAIN, np.where(val_N == all_N, VAL, -1))
        return np.where(all_N == 0, -1, split_N).astype(np.int8)


def make_blocks(
    touched: Ints, start_N1: Ints, product_N: npt.NDArray[np.integer[Any]], product_ids: Sequence[str], order: int
) -> Blocks:
    """Names the blocks of `Places.touched`: `healpix<order>_<cell>`, or `<product>_<r>_<c>` without a CRS."""
    owner = np.repeat(product_N, np.diff(start_N1))
    code, inverse = np.unique(touched, return_inverse=True)
    # The same block of pixels in two products is two blocks; a cell is one.
    combined = np.where(
        touched < 0, owner.astype(np.int64) * len(code) + inverse, len(product_ids) * len(code) + inverse
    )
    _, first, index = np.unique(combined, return_index=True, return_inverse=True)
    names = []
    for place in first:
        block = int(touched[place])
        r, c = divmod(-block - 1, 1 << 24)
        names.append(f"healpix{order}_{block}" if block >= 0 else f"{product_ids[owner[place]]}_{r}_{c}")
    return Blocks(names, index.reshape(-1), start_N1)


def balanced(rule: SplitRule, blocks: Blocks, eligible_N: npt.NDArray[np.bool_]) -> SplitRule:
    """Makes sure that both splits can get tiles, with as few changes to the hash as possible.

    When one split stays empty, the block with the lowest (for validation) or highest (for training) place that holds
    at most half of the tiles changes sides.

    Args:
        rule: The hash.
        blocks: Blocks of all tiles.
        eligible_N: Tiles that count.

    Returns:
        `rule`, or a rule with one forced block; `rule` again when there is only one block.
    """
    met = set(np.unique(blocks.splits(rule)[eligible_N]).tolist()) - {-1}
    if rule.val_fraction == 0.0 or met == {TRAIN, VAL}:
        return rule
    whole = np.flatnonzero((np.diff(blocks.start_N1) == 1) & eligible_N)
    counts_K = np.bincount(blocks.touched[blocks.start_N1[whole]], minlength=len(blocks.names))
    missing = "train" if met == {VAL} else "val"
    present = sorted(
        np.flatnonzero(counts_K).tolist(),
        key=lambda k: (rule.position(blocks.names[k]), blocks.names[k]),
        reverse=missing == "train",
    )
    small = [k for k in present if counts_K[k] <= len(whole) / 2]
    if len(present) < 2 or not small:
        return rule
    return SplitRule(rule.seed, rule.val_fraction, {blocks.names[small[0]]: missing})
