"""Configuration of the prep stage."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from momo.config import one_of, option, positive
from momo.errors import ConfigError
from momo.sensors import sensor_named


def as_values(key: str, value: Any) -> list[float] | None:
    """Returns a number or a list of numbers as a list; None stays None.

    Raises:
        ConfigError: The value is neither.
    """
    if value is None:
        return None
    items = list(value) if isinstance(value, (list, tuple)) else [value]
    if any(isinstance(item, bool) or not isinstance(item, (int, float)) for item in items):
        raise ConfigError(f"{key} cannot be read", seen=repr(value), rule="a number or a list of numbers")
    return [float(item) for item in items]


@dataclass(kw_only=True)
class ProductRule:
    """Settings of the products whose file name matches; a later rule wins over an earlier one."""

    match: str = option(help="glob on the file name, for example '*.JP2'")
    band: int | None = option(None, "band to cut tiles from, from 1")
    nodata: Any = option(None, "value or list of values that mean no data; replaces what the file declares")
    gsd_m: float | None = option(None, "metres a pixel, used where the product has no georeference")
    licence: str | None = option(None, "SPDX identifier")

    def __post_init__(self) -> None:
        self.nodata = as_values("rules.nodata", self.nodata)
        if self.band is not None:
            positive(rules__band=self.band)
        if self.gsd_m is not None:
            positive(rules__gsd_m=self.gsd_m)


@dataclass(kw_only=True)
class PrepConfig:
    """What `momo prep` needs to turn raw products into one CORPUS."""

    products: Any = option(help="files, folders or globs; one or a list. Detached labels: give the label")
    out: str = option(help="corpus folder to make; must not exist")
    sensor: str = option("auto", "HiRISE, CTX, THEMIS, or auto: read it from the labels")
    tile_size: int = option(224, "side of a tile, pixels")
    stride: int | None = option(None, "step between tiles, pixels; null: tile_size")
    band: int = option(1, "band to cut tiles from, from 1")
    nodata: Any = option(None, "value or list of values that mean no data, for example 0 for a black collar; "
                               "replaces what the file declares ([] declares none)")  # fmt: skip
    gsd_m: float | None = option(None, "metres a pixel, used where a product has no georeference")
    rules: list[ProductRule] = option([], "settings for some products: match (file name glob), band, nodata, ...")
    min_valid: float = option(0.5, "a tile is kept when at least this share of its pixels is valid, in (0, 1]")
    min_quality: float = option(0.0, "a tile is kept when its structural score reaches this, 0..1")
    val_fraction: float = option(0.1, "share of the ground blocks that goes to validation, 0..1")
    block_tiles: int = option(8, "side of a split block in tiles of the coarsest product; used when block_m is null")
    block_m: float | None = option(None, "side of a split block on the ground, metres; give the same to all sensors")
    seed: int = option(0, "seed of the split")
    tiles_per_shard: int = option(1024, "tiles in a shard")
    licence: str = option("unknown", "SPDX identifier of the tiles")
    synthetic: bool = option(False, "true when the products were generated, not measured")
    on_error: str = option("stop", "stop at the first bad product, or skip it and say so")

    def __post_init__(self) -> None:
        if isinstance(self.products, str):
            self.products = [self.products]
        if not isinstance(self.products, list) or not all(isinstance(p, str) and p for p in self.products):
            raise ConfigError("products cannot be read", seen=repr(self.products), rule="a path or a list of paths")
        if not self.products:
            raise ConfigError("products is empty", rule="at least one file, folder or glob")
        if self.sensor != "auto":
            self.sensor = sensor_named(self.sensor).name
        self.nodata = as_values("nodata", self.nodata)
        positive(tile_size=self.tile_size, band=self.band, block_tiles=self.block_tiles)
        positive(tiles_per_shard=self.tiles_per_shard, min_valid=self.min_valid)
        for key in ("stride", "gsd_m", "block_m"):
            if getattr(self, key) is not None:
                positive(**{key: getattr(self, key)})
        for key, high in (("min_valid", 1.0), ("min_quality", 1.0), ("val_fraction", 0.9)):
            value = getattr(self, key)
            if not (math.isfinite(value) and 0.0 <= value <= high):
                raise ConfigError(f"{key} is out of range", seen=value, rule=f"0 to {high:g}")
        one_of("on_error", self.on_error, ("stop", "skip"))

    @property
    def step(self) -> int:
        """Step between tiles, pixels."""
        return self.stride or self.tile_size
