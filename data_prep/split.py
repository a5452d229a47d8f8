"""Train or validation by whole blocks of ground, so that no validation pixel was seen in training.

Blocks form one grid over Mars in planetocentric coordinates: bands of latitude, cut in longitude so that blocks are
about square. The same ground therefore has the same block, hence the same split, in every product, projection and
corpus that shares block side and seed. Products without a CRS are cut into blocks of their own pixels.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from .georeference import MARS_RADIUS_M
from .products import Product

_EDGE_POINTS = 9


@dataclass(frozen=True)
class Footprint:
    """The blocks one tile lies in.

    Attributes:
        lon: Planetocentric longitude of the centre, degrees east, -180..180; NaN without a CRS.
        lat: Planetocentric latitude of the centre, degrees.
        block: Block of the centre.
        touched: Every block the tile may reach into, `block` included; empty when the tile leaves the map.
    """

    lon: float
    lat: float
    block: str
    touched: tuple[str, ...]


@dataclass(frozen=True)
class BlockGrid:
    """Cuts ground, or a product without a CRS, into blocks.

    Attributes:
        side_m: Side of a ground block, metres.
        side_px: Side of a block in products without a CRS, pixels.
    """

    side_m: float
    side_px: int

    def footprints(self, product: Product, row: int, cols: Sequence[int], size: int) -> list[Footprint]:
        """Returns the footprints of the tiles of one row of windows.

        Args:
            product: The product.
            row: First row of the windows.
            cols: First columns.
            size: Side of a window, pixels.
        """
        if not product.georeference.located:
            return [self._pixel_footprint(product, row, col, size) for col in cols]
        outline = _outline(size)
        lon, lat = product.georeference.lonlat(
            np.asarray(cols, dtype=np.float64)[:, None] + outline[None, :, 0],
            row + np.repeat(outline[None, :, 1], len(cols), axis=0),
        )
        return [self._ground_footprint(lon[i], lat[i]) for i in range(len(cols))]

    def _pixel_footprint(self, product: Product, row: int, col: int, size: int) -> Footprint:
        def name(r: int, c: int) -> str:
            return f"{product.key}_{r // self.side_px}_{c // self.side_px}"

        corners = {name(r, c) for r in self._steps(row, size) for c in self._steps(col, size)}
        return Footprint(math.nan, math.nan, name(row + size // 2, col + size // 2), tuple(sorted(corners)))

    def _steps(self, start: int, size: int) -> list[int]:
        last = start + size - 1
        return [start, *range(start + self.side_px, last, self.side_px), last]

    def _ground_footprint(self, lon: npt.NDArray[np.float64], lat: npt.NDArray[np.float64]) -> Footprint:
        centre_lon, centre_lat = float(lon[-1]), float(lat[-1])
        if not np.isfinite(lon).all():
            return Footprint(centre_lon, centre_lat, "", ())
        east = (lon - centre_lon + 180.0) % 360.0 - 180.0
        south, north, west, far = float(lat.min()), float(lat.max()), float(east.min()), float(east.max())
        around = (np.diff(np.append(lon[:-1], lon[0])) + 180.0) % 360.0 - 180.0
        if abs(float(around.sum())) > 180.0:  # the outline goes round a pole
            west, far = -180.0, 180.0
            south, north = (south, 90.0) if centre_lat > 0 else (-90.0, north)
        touched = self._blocks(south, north, centre_lon + west, centre_lon + far)
        return Footprint(centre_lon, centre_lat, self._block(centre_lon, centre_lat), tuple(sorted(set(touched))))

    @property
    def _bands(self) -> int:
        return max(1, round(math.pi * MARS_RADIUS_M / self.side_m))

    def _band(self, lat: float) -> int:
        return min(self._bands - 1, max(0, math.floor((lat + 90.0) / 180.0 * self._bands)))

    def _in_band(self, band: int) -> int:
        """Returns the number of blocks round Mars in a band of latitude."""
        middle = math.radians((band + 0.5) * 180.0 / self._bands - 90.0)
        return max(1, round(2.0 * self._bands * math.cos(middle)))

    def _name(self, band: int, number: int) -> str:
        return f"{self.side_m:.6g}m_{band}_{number % self._in_band(band)}"

    def _block(self, lon: float, lat: float) -> str:
        band = self._band(lat)
        return self._name(band, math.floor((lon + 180.0) / 360.0 * self._in_band(band)))

    def _blocks(self, south: float, north: float, west: float, east: float) -> Iterator[str]:
        """Yields all blocks that meet a box of latitude and longitude; east may exceed 180."""
        for band in range(self._band(south), self._band(north) + 1):
            count = self._in_band(band)
            first, last = (math.floor((lon + 180.0) / 360.0 * count) for lon in (west, east))
            for number in range(first, min(last, first + count - 1) + 1):
                yield self._name(band, number)


@lru_cache(maxsize=8)
def _outline(size: int) -> npt.NDArray[np.float64]:
    """Returns (col, row) offsets round a window, in order, and last its centre."""
    edge = np.linspace(0.0, size, _EDGE_POINTS)[:-1]
    zero, full = np.zeros_like(edge), np.full_like(edge, float(size))
    sides = [(edge, zero), (full, edge), (size - edge, full), (zero, size - edge)]
    ring = np.concatenate([np.stack(side, axis=1) for side in sides])
    return np.vstack([ring, [[size / 2.0, size / 2.0]]])


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
        """Returns the block's fixed place in 0..1."""
        digest = hashlib.sha256(f"{self.seed}:{block}".encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2.0**64

    def split_of(self, block: str) -> str:
        """Returns `train` or `val`."""
        return self.forced.get(block) or ("val" if self.position(block) < self.val_fraction else "train")

    def of_tile(self, footprint: Footprint) -> str | None:
        """Returns the split of a tile, or None when it reaches into blocks of both splits."""
        splits = {self.split_of(block) for block in footprint.touched}
        return splits.pop() if len(splits) == 1 else None


def balanced(rule: SplitRule, footprints: Iterable[Footprint]) -> SplitRule:
    """Makes sure that both splits can get tiles, with as few changes to the hash as possible.

    Reads footprints only until a tile of each split was met. When one split stays empty, the block with the lowest
    (for validation) or highest (for training) place that holds at most half of the tiles changes sides.

    Args:
        rule: The hash.
        footprints: Footprints of all windows.

    Returns:
        `rule`, or a rule with one forced block; `rule` again when there is only one block.
    """
    if rule.val_fraction == 0.0:
        return rule
    whole: Counter[str] = Counter()
    met = set()
    for footprint in footprints:
        split = rule.of_tile(footprint)
        if split is not None:
            met.add(split)
        if len(met) == 2:
            return rule
        if len(footprint.touched) == 1:
            whole[footprint.block] += 1
    missing = "train" if met == {"val"} else "val"
    blocks = sorted(whole, key=rule.position, reverse=missing == "train")
    small = [block for block in blocks if whole[block] <= sum(whole.values()) / 2]
    if len(blocks) < 2 or not small:
        return rule
    return SplitRule(rule.seed, rule.val_fraction, {small[0]: missing})
