"""Configuration of the prep stage."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from momo.codecs import CODECS
from momo.config import one_of, option, positive
from momo.errors import ConfigError
from momo.sensors import sensor_named

KERNELS = ("nearest", "bilinear", "cubic", "lanczos", "average")
SPLIT_BY = ("healpix", "product")
STRATA = ("none", "unit", "latitude", "healpix")
PLANS = ("all", "uniform", "sqrt", "capped")


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


def within(low: float, high: float, **values: float | None) -> None:
    """Raises ConfigError for the first keyword that is neither None nor a number in low..high."""
    for key, value in values.items():
        if value is not None and not (math.isfinite(value) and low <= value <= high):
            name = key.replace("__", ".")
            raise ConfigError(f"{name} is out of range", seen=value, rule=f"{low:g} to {high:g}")


@dataclass(kw_only=True)
class ProductRule:
    """Settings of the products whose file name matches; a later rule wins over an earlier one."""

    match: str = option(help="glob on the file name, for example '*.JP2'")
    band: int | None = option(None, "band to cut tiles from, from 1")
    nodata: Any = option(None, "value or list of values that mean no data; replaces what the file declares")
    collar: str | None = option(None, "auto or off; see collar")
    gsd_m: float | None = option(None, "metres a pixel, used where the product has no georeference")
    product_id: str | None = option(None, "product id instead of the label's")
    acquired: str | None = option(None, "acquisition time instead of the label's, ISO 8601")
    incidence_deg: float | None = option(None, "solar incidence instead of the label's, degrees 0..180")
    emission_deg: float | None = option(None, "emission angle instead of the label's, degrees 0..180")
    phase_deg: float | None = option(None, "phase angle instead of the label's, degrees 0..180")
    sub_solar_azimuth_deg: float | None = option(None, "sub-solar azimuth instead of the label's, degrees -360..360")
    licence: str | None = option(None, "SPDX identifier")

    def __post_init__(self) -> None:
        self.nodata = as_values("rules.nodata", self.nodata)
        within(0.0, 180.0, rules__incidence_deg=self.incidence_deg, rules__emission_deg=self.emission_deg)
        within(0.0, 180.0, rules__phase_deg=self.phase_deg)
        within(-360.0, 360.0, rules__sub_solar_azimuth_deg=self.sub_solar_azimuth_deg)
        if self.band is not None:
            positive(rules__band=self.band)
        if self.gsd_m is not None:
            positive(rules__gsd_m=self.gsd_m)
        if self.collar is not None:
            one_of("rules.collar", self.collar, ("auto", "off"))


@dataclass(kw_only=True)
class ResampleConfig:
    """Tiles at one stated GSD instead of each product's own."""

    gsd_m: float | None = option(None, "metres a pixel of the tiles; null: each product's own")
    kernel: str = option("average", "GDAL warp kernel: nearest, bilinear, cubic, lanczos, average")

    def __post_init__(self) -> None:
        one_of("resample.kernel", self.kernel, KERNELS)
        if self.gsd_m is not None:
            positive(resample__gsd_m=self.gsd_m)


@dataclass(kw_only=True)
class QualityConfig:
    """Which windows become tiles; the measures are defined in `data_prep/quality.py`. null: no limit."""

    min_valid: float = option(0.5, "least share of measured pixels, in (0, 1]")
    min_structure: float = option(0.0, "least structural score (lag-one autocorrelation), 0..1")
    max_noise: float | None = option(None, "most noise, as a share of the tile's standard deviation")
    max_blur: float | None = option(None, "most blur, 0 (sharp) to 1")
    max_stripes: float | None = option(None, "most striping, 0 to 1")
    max_saturation: float | None = option(None, "most saturated pixels, share of the valid ones")
    max_dead_lines: int | None = option(None, "most dead lines and columns (their pixels are masked)")

    def __post_init__(self) -> None:
        positive(quality__min_valid=self.min_valid)
        within(0.0, 1.0, quality__min_valid=self.min_valid, quality__min_structure=self.min_structure)
        within(0.0, 1.0, quality__max_blur=self.max_blur, quality__max_stripes=self.max_stripes)
        within(0.0, 1.0, quality__max_saturation=self.max_saturation)
        within(0.0, math.inf, quality__max_noise=self.max_noise, quality__max_dead_lines=self.max_dead_lines)


@dataclass(kw_only=True)
class SplitConfig:
    """Train or validation."""

    by: str = option("healpix", "healpix: whole cells of ground; product: whole products")
    order: int | None = option(None, "HEALPix order 0..29; null: cells about block_tiles tiles wide")
    block_tiles: int = option(8, "side of a cell in tiles of the coarsest product, when order is null")
    val_fraction: float = option(0.1, "share of the cells (or products) that goes to validation, 0..0.9")
    seed: int = option(0, "seed of the split")

    def __post_init__(self) -> None:
        one_of("split.by", self.by, SPLIT_BY)
        positive(split__block_tiles=self.block_tiles)
        within(0.0, 0.9, split__val_fraction=self.val_fraction)
        within(0, 29, split__order=self.order)


@dataclass(kw_only=True)
class StrataConfig:
    """Which of the good tiles are taken, so that common terrain does not drown rare terrain."""

    by: str = option("none", "none, unit (geologic unit), latitude, or healpix (cells)")
    units: str | None = option(None, "vector file of geologic units (shapefile, GeoPackage, GeoJSON); fills `unit`")
    column: str | None = option(None, "column of that file that names the unit, for example Unit")
    layer: str | None = option(None, "layer of that file; null: the first")
    latitude_deg: float = option(15.0, "height of a latitude band, degrees")
    order: int = option(3, "HEALPix order of the cells, 0..29")
    plan: str = option("all", "all, uniform (equal share a stratum), sqrt (share by square root), capped")
    tiles: int | None = option(None, "tiles to take with uniform and sqrt; null: as many as the plan allows")
    cap: int | None = option(None, "most tiles of one stratum, for capped")
    seed: int = option(0, "seed of the choice")

    def __post_init__(self) -> None:
        one_of("strata.by", self.by, STRATA)
        one_of("strata.plan", self.plan, PLANS)
        positive(strata__latitude_deg=self.latitude_deg)
        within(0, 29, strata__order=self.order)
        for key in ("tiles", "cap"):
            if getattr(self, key) is not None:
                positive(**{f"strata__{key}": getattr(self, key)})
        if self.units is not None and self.column is None:
            raise ConfigError(
                "strata.column is missing", seen=f"strata.units={self.units}", rule="it names the unit of a polygon"
            )
        if self.by == "unit" and self.units is None:
            raise ConfigError("strata.units is missing", seen="strata.by=unit", rule="a vector file of units")
        if self.plan == "capped" and self.cap is None:
            raise ConfigError("strata.cap is missing", seen="strata.plan=capped", fix="add strata.cap=10000")
        if self.plan != "all" and self.by == "none":
            raise ConfigError(
                "a sampling plan needs strata", seen=f"strata.plan={self.plan}", fix="set strata.by to unit, ..."
            )


@dataclass(kw_only=True)
class DuplicatesConfig:
    """Which tiles show what another tile shows already. null switches a rule off."""

    max_overlap: float | None = option(0.5, "largest share of a tile's ground that a tile of another product may have")
    max_distance: int | None = option(3, "perceptual hashes (64 bit) this near or nearer are duplicates, bits 0..3")

    def __post_init__(self) -> None:
        within(0.0, 1.0, duplicates__max_overlap=self.max_overlap)
        within(0, 3, duplicates__max_distance=self.max_distance)


@dataclass(kw_only=True)
class LeakageConfig:
    """Ground that must not be trained on: footprints of benchmark test tiles."""

    footprints: str | None = option(None, "vector or CSV file of footprints (see docs/data_prep.md)")
    on_overlap: str = option("drop", "drop the tiles that touch them and count them, or stop")

    def __post_init__(self) -> None:
        one_of("leakage.on_overlap", self.on_overlap, ("drop", "stop"))


@dataclass(kw_only=True)
class SlurmConfig:
    """Workers as SLURM jobs (dask-jobqueue)."""

    jobs: int = option(0, "jobs to submit; 0: none, work on this machine or on `scheduler`")
    cores: int = option(1, "cores, hence worker processes, of a job")
    memory: str = option("4GB", "memory of a job")
    walltime: str = option("04:00:00", "time limit of a job")
    queue: str | None = option(None, "partition")
    account: str | None = option(None, "account")
    prologue: list[str] = option([], "shell lines run before the worker starts, for example 'module load gdal'")


@dataclass(kw_only=True)
class PrepConfig:
    """What `momo prep` needs to turn raw products into one CORPUS."""

    products: Any = option(help="files, folders, globs, .txt lists, URLs, zip members; one or a list. "
                                "Detached labels: give the label")  # fmt: skip
    out: str = option(help="corpus folder to make; must not exist")
    sensor: str = option("auto", "HiRISE, CTX, THEMIS, or auto: read it from the labels")
    tile_size: int = option(224, "side of a tile, pixels")
    stride: int | None = option(None, "step between tiles, pixels; null: tile_size")
    band: int = option(1, "band to cut tiles from, from 1")
    nodata: Any = option(None, "value or list of values that mean no data, for example 0 for a black collar; "
                               "replaces what the file declares ([] declares none)")  # fmt: skip
    collar: str = option("auto", "auto: a border of zeros with no declared no-data is no data (and said); off")
    gsd_m: float | None = option(None, "metres a pixel, used where a product has no georeference")
    rules: list[ProductRule] = option([], "settings for some products: match (file name glob), band, nodata, ...")
    resample: ResampleConfig = option(ResampleConfig)
    quality: QualityConfig = option(QualityConfig)
    split: SplitConfig = option(SplitConfig)
    strata: StrataConfig = option(StrataConfig)
    duplicates: DuplicatesConfig = option(DuplicatesConfig)
    leakage: LeakageConfig = option(LeakageConfig)
    codec: str = option("zstd", "zstd (fast) or png (any tool shows the tiles); both lossless")
    tiles_per_shard: int = option(1024, "tiles in a shard")
    licence: str = option("unknown", "SPDX identifier of the tiles")
    synthetic: bool = option(False, "true when the products were generated, not measured")
    on_error: str = option("skip", "skip a bad product, list it at the end and exit with 3; or stop at the first")
    workers: int | None = option(None, "worker processes on this machine; null: one a core, at most one a product")
    scheduler: str | None = option(None, "address of a running Dask scheduler, for example tcp://node1:8786")
    slurm: SlurmConfig = option(SlurmConfig)
    work: str | None = option(None, "folder of finished products, kept until the corpus is whole; null: beside out")
    keep_work: bool = option(False, "keep it after that: another split or sampling then cuts nothing again")

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
        positive(tile_size=self.tile_size, band=self.band, tiles_per_shard=self.tiles_per_shard)
        for key in ("stride", "gsd_m", "workers"):
            if getattr(self, key) is not None:
                positive(**{key: getattr(self, key)})
        one_of("on_error", self.on_error, ("stop", "skip"))
        one_of("collar", self.collar, ("auto", "off"))
        one_of("codec", self.codec, CODECS)

    @property
    def step(self) -> int:
        """Step between tiles, pixels."""
        return self.stride or self.tile_size
