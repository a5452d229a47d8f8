"""CORPUS: WebDataset shards of tiles with a manifest, an index and statistics; reading side.

manifest.json          sensor, tile size, dtype, codec, splits, shards with sha256, fingerprint (see `Manifest`)
index.parquet          one row a tile (see `INDEX_COLUMNS`)
stats.json             mean, std and percentiles over the valid training pixels, in physical units
shards/<split>-000000.tar
    <key>.png          the tile, lossless 8 or 16 bit
    <key>.json         provenance and the stretch: physical value = stored value * scale + offset
    <key>.valid.png    255 where measured, 0 elsewhere; only where some pixel is invalid
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import tarfile
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from .errors import DataError
from .extras import require
from .files import sha256_file, sha256_json

FORMAT_VERSION = 1
SPLITS = ("train", "val")

# Column name -> what it holds. `offset` and `nbytes` bound the sample's members inside its shard.
INDEX_COLUMNS: dict[str, str] = {
    "key": "unique key of the tile in the corpus; also the WebDataset key",
    "split": "train or val",
    "shard": "shard file name",
    "offset": "first byte of the sample's first tar header",
    "nbytes": "bytes of all members of the sample, headers and padding included",
    "product_id": "product the tile was cut from",
    "sensor": "camera",
    "row": "first row of the window in the product, pixels",
    "col": "first column of the window in the product, pixels",
    "size": "side of the window, pixels",
    "gsd_m": "ground sample distance, metres a pixel; NaN when unknown",
    "crs": "CRS of the product as WKT; empty when it has none",
    "lon": "planetocentric longitude of the window's centre, degrees, east positive, -180..180; NaN without a CRS",
    "lat": "planetocentric latitude of the window's centre, degrees; NaN without a CRS",
    "valid_fraction": "share of measured pixels, 0..1",
    "quality": "structural score of the tile, 0..1",
    "scale": "physical value = stored value * scale + offset_value",
    "offset_value": "see scale",
    "unit": "geologic unit or terrain class; empty when unknown",
    "block": "name of the geographic block that decided the split",
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
        codec: `png`.
        synthetic: True when the tiles were generated, not measured.
        splits: Number of tiles by split.
        shards: Every shard.
        fingerprint: SHA-256 over the shard list; identifies the data.
        products: One entry a product: `product_id`, `source` (file name), `sha256`, `tiles`, and `licence`.
        prep: The resolved configuration that made the corpus.
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
    products: list[dict[str, Any]] = field(default_factory=list)
    prep: dict[str, Any] = field(default_factory=dict)
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


@dataclass(frozen=True)
class Tile:
    """One decoded tile.

    Attributes:
        key: Unique key.
        value_HW: float32 in physical units.
        valid_HW: True where the pixel was measured.
        meta: The sample's JSON.
    """

    key: str
    value_HW: npt.NDArray[np.float32]
    valid_HW: npt.NDArray[np.bool_]
    meta: dict[str, Any]


class Corpus:
    """A corpus on disk, read tile by tile at any position.

    Args:
        path: Corpus folder.
        verify: Compare every shard's SHA-256 with the manifest; sizes are always compared.

    Raises:
        DataError: The folder is no corpus, is incomplete, or a shard was altered.
    """

    def __init__(self, path: Path, *, verify: bool = False) -> None:
        self.path = Path(path)
        self.manifest = _read_manifest(self.path)
        for shard in self.manifest.shards:
            _check_shard(self.path / "shards" / shard.name, shard, hashes=verify)
        self._descriptors: dict[tuple[int, int], int] = {}

    @property
    def sensor(self) -> str:
        """Camera of every tile."""
        return self.manifest.sensor

    @cached_property
    def stats(self) -> dict[str, Any]:
        """Statistics over valid training pixels: `mean`, `std`, `min`, `max`, `count`, `percentiles`."""
        return _read_json(self.path / "stats.json")

    @cached_property
    def _places(self) -> dict[str, _Places]:
        parquet = require("pyarrow.parquet", "pretrain")
        path = self.path / "index.parquet"
        if not path.is_file():
            raise DataError("the corpus has no index", seen=path, fix="run momo prep again")
        table = parquet.read_table(path, columns=["split", "shard", "offset", "nbytes"])
        split = np.asarray(table["split"].to_pylist())
        numbers = {shard.name: number for number, shard in enumerate(self.manifest.shards)}
        shard = np.asarray([numbers[name] for name in table["shard"].to_pylist()], dtype=np.int32)
        offset, nbytes = (table[name].to_numpy().astype(np.int64) for name in ("offset", "nbytes"))
        places = {}
        for name in SPLITS:
            here = split == name
            order = np.lexsort((offset[here], shard[here]))
            places[name] = _Places(shard[here][order], offset[here][order], nbytes[here][order])
            if len(places[name].offset) != self.manifest.splits.get(name, 0):
                raise DataError(
                    "index and manifest disagree",
                    seen=f"{len(places[name].offset)} {name} rows, {self.manifest.splits.get(name, 0)} in the manifest",
                    fix="run momo prep again",
                )
        return places

    def count(self, split: str) -> int:
        """Returns the number of tiles of a split."""
        return self.manifest.splits.get(split, 0)

    def read(self, split: str, position: int) -> Tile:
        """Reads and decodes one tile.

        Args:
            split: `train` or `val`.
            position: 0 to `count(split) - 1`, in shard order.

        Raises:
            DataError: The sample cannot be decoded; the message names shard and offset.
        """
        places = self._places[split]
        shard, offset, nbytes = (int(a[position]) for a in (places.shard, places.offset, places.nbytes))
        raw = os.pread(self._descriptor(shard), nbytes, offset)
        where = f"{self.manifest.shards[shard].name} at byte {offset}"
        try:
            return decode_sample(raw)
        except (tarfile.TarError, KeyError, OSError, ValueError) as error:
            raise DataError(
                "a tile cannot be decoded", seen=f"{where}: {error}", fix="check the corpus's hashes"
            ) from error

    def _descriptor(self, shard: int) -> int:
        # Keyed by process, because a descriptor inherited by a forked worker must not be closed twice.
        key = (os.getpid(), shard)
        if key not in self._descriptors:
            self._descriptors[key] = os.open(self.path / "shards" / self.manifest.shards[shard].name, os.O_RDONLY)
        return self._descriptors[key]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptors": {}}

    def __del__(self) -> None:
        for (pid, _), descriptor in getattr(self, "_descriptors", {}).items():
            if pid == os.getpid():
                os.close(descriptor)


@dataclass(frozen=True)
class _Places:
    shard: npt.NDArray[np.int32]
    offset: npt.NDArray[np.int64]
    nbytes: npt.NDArray[np.int64]


def decode_sample(raw: bytes) -> Tile:
    """Decodes the tar members of one sample into a tile.

    Raises:
        KeyError: A member is missing.
        OSError: An image cannot be decoded.
    """
    members: dict[str, bytes] = {}
    key = ""
    with tarfile.open(fileobj=io.BytesIO(raw), mode="r:") as tar:
        for member in tar:
            key, _, extension = member.name.partition(".")
            stream = tar.extractfile(member)
            if stream is not None:
                members[extension] = stream.read()
    meta = json.loads(members["json"])
    stored = np.asarray(Image.open(io.BytesIO(members["png"])))
    if "valid.png" in members:
        valid = np.asarray(Image.open(io.BytesIO(members["valid.png"]))) > 0
    else:
        valid = np.ones(stored.shape, dtype=bool)
    value = stored.astype(np.float32) * np.float32(meta["scale"]) + np.float32(meta["offset_value"])
    return Tile(key, value, valid, meta)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError("a file of the corpus is missing", seen=path, fix="run momo prep again") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(
            "a file of the corpus is not JSON", seen=f"{path}: {error}", fix="run momo prep again"
        ) from None


def _read_manifest(path: Path) -> Manifest:
    if not (path / "manifest.json").is_file():
        raise DataError(
            "this is no corpus",
            seen=path,
            rule="a corpus is a folder with manifest.json",
            fix="make one with momo prep",
        )
    fields = _read_json(path / "manifest.json")
    if fields.get("format") != "momo-corpus" or fields.get("format_version") != FORMAT_VERSION:
        raise DataError(
            "the manifest has another format",
            seen=f"{fields.get('format')} version {fields.get('format_version')}",
            rule=f"momo-corpus version {FORMAT_VERSION}",
        )
    try:
        fields["shards"] = [ShardEntry(**shard) for shard in fields["shards"]]
        manifest = Manifest(**fields)
    except (TypeError, KeyError) as error:
        raise DataError("the manifest cannot be read", seen=f"{path / 'manifest.json'}: {error}") from None
    if fingerprint(manifest.shards) != manifest.fingerprint:
        raise DataError(
            "the manifest was altered",
            seen=path / "manifest.json",
            rule="its fingerprint is the hash of its shard list",
            fix="run momo prep again",
        )
    return manifest


def _check_shard(path: Path, shard: ShardEntry, *, hashes: bool) -> None:
    if not path.is_file():
        raise DataError("a shard is missing", seen=path, fix="copy it back, or run momo prep again")
    if path.stat().st_size != shard.bytes:
        raise DataError(
            "a shard has another size than the manifest says",
            seen=f"{path}: {path.stat().st_size} bytes",
            rule=f"{shard.bytes} bytes",
            fix="copy it again, or run momo prep again",
        )
    if hashes and (found := sha256_file(path)) != shard.sha256:
        raise DataError(
            "a shard was altered",
            seen=f"{path} has sha256 {found[:12]}...",
            rule=f"the manifest says {shard.sha256[:12]}...",
            fix="copy it again, or run momo prep again",
        )
