"""CORPUS, writing side: tiles go into WebDataset shards, an index, statistics and a manifest."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from momo.corpus import INDEX_COLUMNS, SPLITS, Manifest, ShardEntry, fingerprint
from momo.errors import DataError
from momo.extras import require
from momo.files import sha256_file, write_json
from momo.version import __version__

PERCENTILES = (0.1, 1.0, 5.0, 25.0, 50.0, 75.0, 95.0, 99.0, 99.9)


@dataclass(kw_only=True)
class TileRecord:
    """One tile ready to be written.

    Attributes:
        key: Unique key without dots or slashes.
        split: `train` or `val`.
        stored_HW: uint8 or uint16 pixels, all of one dtype in a corpus.
        valid_HW: True where the pixel was measured.
        meta: The columns of `momo.corpus.INDEX_COLUMNS` known before writing (product_id, row, col, gsd_m, ...);
            `scale` and `offset_value` are required.
    """

    key: str
    split: str
    stored_HW: npt.NDArray[Any]
    valid_HW: npt.NDArray[np.bool_]
    meta: dict[str, Any]


@dataclass
class _OpenShard:
    entry: ShardEntry
    stream: io.BufferedWriter
    writer: Any


@dataclass
class PixelStatistics:
    """Statistics of physical values, gathered tile by tile.

    Percentiles come from a fixed, evenly strided sample of each tile's valid pixels, so they do not depend on order.
    """

    count: int = 0
    total: float = 0.0
    total_of_squares: float = 0.0
    low: float = math.inf
    high: float = -math.inf
    _sample: list[npt.NDArray[np.float32]] = field(default_factory=list)

    def add(self, values: npt.NDArray[np.float32]) -> None:
        """Adds the valid pixels of one tile."""
        if values.size == 0:
            return
        exact = values.astype(np.float64)
        self.count += values.size
        self.total += float(exact.sum())
        self.total_of_squares += float(np.square(exact).sum())
        self.low, self.high = min(self.low, float(values.min())), max(self.high, float(values.max()))
        self._sample.append(values[:: max(1, values.size // 64)])

    def to_dict(self) -> dict[str, Any]:
        """Returns count, mean, std, min, max and percentiles as plain values."""
        mean = self.total / self.count
        variance = max(0.0, self.total_of_squares / self.count - mean * mean)
        points = np.percentile(np.concatenate(self._sample), PERCENTILES)
        return {
            "count": self.count,
            "mean": mean,
            "std": math.sqrt(variance),
            "min": self.low,
            "max": self.high,
            "percentiles": {str(p): float(v) for p, v in zip(PERCENTILES, points, strict=True)},
            "over": "valid pixels of the training tiles, physical units",
        }


_INDEX_TEXT = frozenset({"key", "split", "shard", "product_id", "sensor", "crs", "unit", "block"})
_INDEX_WHOLE = frozenset({"offset", "nbytes", "row", "col", "size"})
_INDEX_ROWS = 16384


class IndexFile:
    """Writes `index.parquet` group by group, so that memory does not grow with the number of tiles.

    Args:
        path: File to write.
    """

    def __init__(self, path: Path) -> None:
        self._pyarrow, self._parquet = require("pyarrow", "prep"), require("pyarrow.parquet", "prep")
        text, whole, real = self._pyarrow.string(), self._pyarrow.int64(), self._pyarrow.float64()
        self._schema = self._pyarrow.schema(
            (name, text if name in _INDEX_TEXT else whole if name in _INDEX_WHOLE else real) for name in INDEX_COLUMNS
        )
        self._path = path
        self._file: Any = None
        self._rows: list[dict[str, Any]] = []

    def add(self, row: dict[str, Any]) -> None:
        """Appends one row with the columns of `momo.corpus.INDEX_COLUMNS`."""
        self._rows.append(row)
        if len(self._rows) >= _INDEX_ROWS:
            self._flush()

    def _flush(self) -> None:
        if self._file is None:
            self._file = self._parquet.ParquetWriter(self._path, self._schema)
        self._file.write_table(self._pyarrow.Table.from_pylist(self._rows, schema=self._schema))
        self._rows.clear()

    def close(self) -> None:
        """Writes what is left; closing twice does nothing."""
        if self._rows:
            self._flush()
        if self._file is not None:
            self._file.close()


class CorpusWriter:
    """Writes a corpus into a folder that the caller publishes (see `momo.files.atomic_folder`).

    As a context manager it closes its files when the work in it fails.

    Args:
        folder: Existing, empty folder.
        sensor: Camera of every tile.
        tile_size: Side of a tile in pixels.
        dtype: `uint8` or `uint16`.
        synthetic: True when the tiles were generated.
        tiles_per_shard: A shard is closed after this many tiles.
    """

    def __init__(
        self, folder: Path, *, sensor: str, tile_size: int, dtype: str, synthetic: bool, tiles_per_shard: int = 1024
    ) -> None:
        self.folder, self.sensor, self.tile_size = folder, sensor, tile_size
        self.dtype, self.synthetic, self.tiles_per_shard = dtype, synthetic, tiles_per_shard
        self._wds_writer = require("webdataset.writer", "prep").TarWriter
        self._open: dict[str, _OpenShard] = {}
        self._shards: list[ShardEntry] = []
        self._index = IndexFile(folder / "index.parquet")
        self._keys: set[str] = set()
        self._statistics = PixelStatistics()
        (folder / "shards").mkdir()

    def add(self, tile: TileRecord) -> None:
        """Appends one tile to the current shard of its split.

        Raises:
            DataError: Wrong shape or dtype, or a key that was used before.
        """
        self._check(tile)
        shard = self._shard_of(tile.split)
        offset = shard.writer.tarstream.offset
        shard.writer.write(self._members(tile))
        shard.entry.samples += 1
        row = {name: tile.meta.get(name) for name in INDEX_COLUMNS}
        row |= {
            "key": tile.key,
            "split": tile.split,
            "shard": shard.entry.name,
            "offset": offset,
            "nbytes": shard.writer.tarstream.offset - offset,
            "sensor": self.sensor,
            "size": self.tile_size,
            "valid_fraction": float(tile.valid_HW.mean()),
        }
        self._index.add(row)
        if tile.split == "train":
            stored = tile.stored_HW[tile.valid_HW].astype(np.float32)
            self._statistics.add(stored * np.float32(tile.meta["scale"]) + np.float32(tile.meta["offset_value"]))
        if shard.entry.samples >= self.tiles_per_shard:
            self._close(tile.split)

    def _check(self, tile: TileRecord) -> None:
        if tile.key in self._keys or "." in tile.key or "/" in tile.key:
            raise DataError("a tile key cannot be used", seen=tile.key, rule="unique, without dots and slashes")
        if tile.split not in SPLITS:
            raise DataError("a tile has an unknown split", seen=tile.split, rule=f"one of {', '.join(SPLITS)}")
        shape = (self.tile_size, self.tile_size)
        if tile.stored_HW.shape != shape or tile.valid_HW.shape != shape or str(tile.stored_HW.dtype) != self.dtype:
            raise DataError(
                "a tile does not fit the corpus",
                seen=f"{tile.key}: {tile.stored_HW.shape} {tile.stored_HW.dtype}, mask {tile.valid_HW.shape}",
                rule=f"{shape} {self.dtype}",
            )
        self._keys.add(tile.key)

    def _members(self, tile: TileRecord) -> dict[str, Any]:
        meta = {"key": tile.key, "sensor": self.sensor, "split": tile.split, "size": self.tile_size, **tile.meta}
        members: dict[str, Any] = {
            "__key__": tile.key,
            "json": json.dumps(_without_nan(meta), sort_keys=True, allow_nan=False).encode(),
            "png": _png(np.where(tile.valid_HW, tile.stored_HW, 0).astype(tile.stored_HW.dtype)),
        }
        if not tile.valid_HW.all():
            members["valid.png"] = _png(tile.valid_HW.astype(np.uint8) * 255)
        return members

    def _shard_of(self, split: str) -> _OpenShard:
        if split not in self._open:
            number = sum(shard.split == split for shard in self._shards)
            entry = ShardEntry(name=f"{split}-{number:06d}.tar", split=split, samples=0, bytes=0, sha256="")
            stream = open(self.folder / "shards" / entry.name, "wb")  # noqa: SIM115 - closed in _close
            writer = self._wds_writer(stream, encoder=False, mtime=0.0, user="momo", group="momo")
            self._shards.append(entry)
            self._open[split] = _OpenShard(entry, stream, writer)
        return self._open[split]

    def _close(self, split: str) -> None:
        shard = self._open.pop(split)
        shard.writer.close()
        shard.stream.close()
        path = self.folder / "shards" / shard.entry.name
        shard.entry.bytes, shard.entry.sha256 = path.stat().st_size, sha256_file(path)

    def __enter__(self) -> CorpusWriter:
        return self

    def __exit__(self, *error: object) -> None:
        """Closes what is still open; after `finish` nothing is."""
        for split in list(self._open):
            self._close(split)
        self._index.close()

    def finish(self, *, products: Sequence[dict[str, Any]], prep: dict[str, Any], licence: str) -> Manifest:
        """Closes the shards and writes index, statistics and, last, the manifest.

        Args:
            products: Entries of `Manifest.products`.
            prep: Resolved configuration.
            licence: SPDX identifier of the tiles.

        Raises:
            DataError: No training tile was written.
        """
        for split in list(self._open):
            self._close(split)
        if self._statistics.count == 0:
            raise DataError(
                "the corpus would have no training tile",
                seen=f"{len(self._keys)} tiles in all",
                rule="at least one training tile with a valid pixel",
                fix="lower prep's min_valid or tile_size, or give more products",
            )
        shards = sorted(self._shards, key=lambda shard: shard.name)
        self._index.close()
        write_json(self.folder / "stats.json", self._statistics.to_dict())
        manifest = Manifest(
            sensor=self.sensor,
            tile_size=self.tile_size,
            dtype=self.dtype,
            codec="png",
            synthetic=self.synthetic,
            splits={split: sum(s.samples for s in shards if s.split == split) for split in SPLITS},
            shards=shards,
            fingerprint=fingerprint(shards),
            products=list(products),
            prep=prep,
            licence=licence,
            momo_version=__version__,
        )
        write_json(self.folder / "manifest.json", asdict(manifest))
        return manifest


def _png(pixels: npt.NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", compress_level=6)
    return buffer.getvalue()


def _without_nan(meta: dict[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in meta.items()}
