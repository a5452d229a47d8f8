"""What a CORPUS holds: the manifest, and the columns of its tables.

manifest.json          sensor, tile size, dtype, codec, splits, shards with sha256, fingerprint (see `Manifest`)
index.parquet          one row a tile (see `INDEX_COLUMNS`)
products.parquet       one row a product (see `PRODUCT_COLUMNS`)
stats.json             mean, std and percentiles over the valid training pixels, in physical units
report.json            what prep dropped and why, duplicates, strata, failures
contact_sheet.png      examples of kept and dropped windows, by reason
shards/<split>-000000.tar
    <key>.json             provenance and the stretch: physical value = stored value * scale + offset_value
    <key>.zst | .png       the tile, lossless 8 or 16 bit, in the manifest's codec (see `momo.codecs`)
    <key>.valid.zst | .png where measured; only where some pixel is invalid
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from .files import sha256_json

FORMAT_VERSION = 2
SPLITS = ("train", "val")

# Column -> (Arrow type, what it holds). `offset` and `nbytes` bound the sample's members inside its shard.
INDEX_COLUMNS: dict[str, tuple[str, str]] = {
    "key": ("string", "unique key of the tile in the corpus; also the WebDataset key"),
    "split": ("string", "train or val"),
    "shard": ("string", "shard file name"),
    "offset": ("int64", "first byte of the sample's first tar header"),
    "nbytes": ("int64", "bytes of all members of the sample, headers and padding included"),
    "product_id": ("string", "product the tile was cut from"),
    "sensor": ("string", "camera"),
    "row": ("int64", "first row of the window in the product (after resampling), pixels"),
    "col": ("int64", "first column of the window in the product (after resampling), pixels"),
    "size": ("int64", "side of the window, pixels"),
    "gsd_m": ("float64", "ground sample distance, metres a pixel; NaN when unknown"),
    "lon": ("float64", "planetocentric longitude of the centre, degrees, east positive, -180..180; NaN without a CRS"),
    "lat": ("float64", "planetocentric latitude of the centre, degrees; NaN without a CRS"),
    "footprint": ("list<double>", "lon, lat of the corners, clockwise from the first pixel's; 8 numbers; null without"),
    "cell": ("int64", "HEALPix cell (nested) of the centre at the manifest's healpix_order; -1 without a CRS"),
    "block": ("string", "what decided the split: the cell, the product, or the block of pixels without a CRS"),
    "unit": ("string", "geologic unit or terrain class; empty when unknown"),
    "valid_fraction": ("float64", "share of measured pixels, 0..1"),
    "quality": ("float64", "structural score: lag-one spatial autocorrelation, 0..1"),
    "noise": ("float64", "noise standard deviation as a share of the tile's, 0.. (see data_prep/quality.py)"),
    "blur": ("float64", "blur, 0 (sharp) to 1"),
    "stripes": ("float64", "striping, 0 to 1"),
    "saturation": ("float64", "share of valid pixels at an end of the product's range, 0..1"),
    "dead_lines": ("int64", "dead lines and columns, masked"),
    "stored_mean": ("float64", "mean of the valid stored values"),
    "stored_std": ("float64", "their standard deviation (population)"),
    "stored_min": ("int64", "their minimum"),
    "stored_max": ("int64", "their maximum"),
    "scale": ("float64", "physical value = stored value * scale + offset_value"),
    "offset_value": ("float64", "see scale"),
    "phash": ("uint64", "64-bit perceptual hash"),
}

PRODUCT_COLUMNS: dict[str, tuple[str, str]] = {
    "product_id": ("string", "from the label, else the file stem; unique in the corpus"),
    "source": ("string", "file name, URL or zip member"),
    "sha256": ("string", "of the file; over name and hash of each file when it consists of several; empty if remote"),
    "tiles": ("int64", "tiles in the corpus"),
    "licence": ("string", "SPDX identifier"),
    "driver": ("string", "GDAL's short name of the format"),
    "instrument": ("string", "as the label spells it"),
    "band": ("int64", "band, from 1"),
    "dtype": ("string", "pixel type in the file"),
    "width": ("int64", "columns (after resampling)"),
    "height": ("int64", "lines (after resampling)"),
    "gsd_m": ("float64", "metres a pixel of the tiles; NaN when unknown"),
    "native_gsd_m": ("float64", "metres a pixel of the file; NaN when unknown"),
    "kernel": ("string", "GDAL warp kernel it was resampled with; empty when it was not"),
    "crs": ("string", "name of the CRS, or 'no CRS'"),
    "crs_wkt": ("string", "CRS as WKT; empty without one"),
    "acquired": ("string", "start of acquisition, ISO 8601; empty when the label does not say"),
    "incidence_deg": ("float64", "solar incidence angle, degrees; NaN when the label does not say"),
    "emission_deg": ("float64", "emission angle, degrees; NaN"),
    "phase_deg": ("float64", "phase angle, degrees; NaN"),
    "sub_solar_azimuth_deg": ("float64", "direction of the sun in the image, degrees, as the label defines it; NaN"),
    "scale": ("float64", "physical value = stored value * scale + offset_value"),
    "offset_value": ("float64", "see scale"),
    "max_rounding_error": ("float64", "largest error of storing, physical units; 0 when exact"),
    "mean": ("float64", "mean of the valid pixels of its kept tiles, physical units; NaN without a tile"),
    "percentile_low": ("float64", "1st percentile of the valid pixels, physical units (see per_product_percentile)"),
    "percentile_high": ("float64", "99th percentile, physical units"),
    "windows": ("int64", "windows looked at"),
    "dropped": ("string", "JSON: windows dropped while cutting, by reason"),
    "notes": ("string", "JSON: traps met and mended"),
    "damage": ("string", "why it was cut only in part; empty when whole"),
}


@dataclass(kw_only=True)
class ShardEntry:
    """One shard as the manifest lists it."""

    name: str
    split: str
    samples: int
    bytes: int
    sha256: str


@dataclass(kw_only=True)
class Manifest:
    """What a corpus is.

    Attributes:
        sensor: Camera of every tile.
        tile_size: Side of a tile, pixels.
        dtype: `uint8` or `uint16`, of the stored tiles.
        codec: `zstd` or `png`; see `momo.codecs`.
        synthetic: True when the tiles were generated, not measured.
        splits: Number of tiles by split.
        shards: Every shard.
        fingerprint: SHA-256 over the shard list; identifies the data.
        products: Number of rows of products.parquet.
        tables: SHA-256 of index.parquet, products.parquet and stats.json by file name.
        healpix_order: Order of the column `cell`; -1 when no product has a CRS.
        mixed_units: True when products can hardly share a unit, so that `stats.json` mixes them.
        prep: The resolved configuration that made the corpus.
        failures: Products that gave no tile: `source` and `reason`.
        licence: SPDX identifier of the tiles.
        momo_version: Version that wrote it.
        format: `momo-corpus`.
        format_version: Version of this layout.
    """

    sensor: str
    tile_size: int
    dtype: str
    codec: str
    synthetic: bool
    splits: dict[str, int]
    shards: list[ShardEntry]
    fingerprint: str
    products: int = 0
    tables: dict[str, str] = field(default_factory=dict)
    healpix_order: int = -1
    mixed_units: bool = False
    prep: dict[str, Any] = field(default_factory=dict)
    failures: list[dict[str, str]] = field(default_factory=list)
    licence: str = "unknown"
    momo_version: str = ""
    format: str = "momo-corpus"
    format_version: int = FORMAT_VERSION

    def to_dict(self) -> dict[str, Any]:
        """Returns the manifest as plain values."""
        return dataclasses.asdict(self)


def fingerprint(shards: list[ShardEntry]) -> str:
    """Returns the hash that identifies a corpus: over its shard list in order."""
    return sha256_json([dataclasses.asdict(shard) for shard in shards])
