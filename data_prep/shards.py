"""CORPUS, writing side: shards, tables, statistics and the manifest."""

from __future__ import annotations

import array
import hashlib
import json
import math
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from momo.codecs import MASK_SUFFIX, TILE_SUFFIX, encode_mask, encode_tile
from momo.corpus_format import INDEX_COLUMNS, PRODUCT_COLUMNS, SPLITS, Manifest, ShardEntry, fingerprint
from momo.errors import DataError
from momo.extras import require
from momo.files import sha256_file, write_json
from momo.version import __version__

from .quality import measure
from .statistics import SAMPLE_VALUES, PixelStatistics, key_priority, value_sample

# What a sample's JSON says; the rest stands in the index and in products.parquet.
_META = ("product_id", "row", "col", "gsd_m", "lon", "lat", "unit", "scale", "offset_value")
_ROWS = 16384
_MAX_KEY = 90  # with the longest suffix a name still fits the 100 bytes of a plain tar header


@dataclass(kw_only=True)
class TileRecord:
    """One tile ready to be written.

    Attributes:
        key: Unique key without dots or slashes.
        split: `train` or `val`.
        stored_HW: uint8 or uint16 pixels, all of one dtype in a corpus.
        valid_HW: True where the pixel was measured.
        meta: The columns of `momo.corpus_format.INDEX_COLUMNS` known before writing (product_id, row, col, gsd_m,
            ...); `scale` and `offset_value` are required, what can be measured on the pixels is measured.
    """

    key: str
    split: str
    stored_HW: npt.NDArray[Any]
    valid_HW: npt.NDArray[np.bool_]
    meta: dict[str, Any]


class _HashingStream:
    """Writes to a file and hashes what passes."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "wb", buffering=1 << 20)  # noqa: SIM115 - closed in close
        self.digest = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> None:
        self.digest.update(data)
        self.size += len(data)
        self._file.write(data)

    def close(self) -> None:
        self._file.close()


class ShardFile:
    """One WebDataset shard in the making; closing it gives its manifest entry.

    Args:
        folder: Folder of the shards.
        split: `train` or `val`.
        number: Number of the shard within its split, from 0.
        codec: Codec of the corpus.
    """

    def __init__(self, folder: Path, split: str, number: int, codec: str) -> None:
        self.entry = ShardEntry(name=f"{split}-{number:06d}.tar", split=split, samples=0, bytes=0, sha256="")
        self._stream = _HashingStream(folder / self.entry.name)
        self._tile, self._mask = TILE_SUFFIX[codec], MASK_SUFFIX[codec]

    def add(self, key: str, meta: Mapping[str, Any], tile: bytes, mask: bytes | None) -> tuple[int, int]:
        """Appends one sample.

        Args:
            key: Unique key.
            meta: Content of its JSON.
            tile: Encoded pixels.
            mask: Encoded validity, or None when every pixel is valid.

        Returns:
            First byte of the sample and the number of its bytes.
        """
        offset = self._stream.size
        self._member(f"{key}.json", json.dumps(_without_nan(meta), sort_keys=True, allow_nan=False).encode())
        self._member(f"{key}.{self._tile}", tile)
        if mask is not None:
            self._member(f"{key}.{self._mask}", mask)
        self.entry.samples += 1
        return offset, self._stream.size - offset

    def _member(self, name: str, data: bytes) -> None:
        # The headers are the standard library's; webdataset's own writer would import torch into every worker.
        info = tarfile.TarInfo(name)
        info.size, info.mode, info.uname, info.gname = len(data), 0o444, "momo", "momo"
        self._stream.write(info.tobuf(tarfile.USTAR_FORMAT))
        self._stream.write(data)
        self._stream.write(bytes(-len(data) % tarfile.BLOCKSIZE))

    def close(self) -> ShardEntry:
        """Closes the file and returns its entry with size and hash."""
        self._stream.write(bytes(2 * tarfile.BLOCKSIZE))
        self._stream.close()
        self.entry.bytes, self.entry.sha256 = self._stream.size, self._stream.digest.hexdigest()
        return self.entry


class TableFile:
    """Writes a parquet table group by group, so that memory does not grow with its rows.

    Args:
        path: File to write.
        columns: `INDEX_COLUMNS` or `PRODUCT_COLUMNS`.
    """

    def __init__(self, path: Path, columns: Mapping[str, tuple[str, str]]) -> None:
        self._arrow, self._parquet = require("pyarrow", "prep"), require("pyarrow.parquet", "prep")
        types = {"list<double>": self._arrow.list_(self._arrow.float64())}
        self.schema = self._arrow.schema(
            (name, types.get(kind) or self._arrow.type_for_alias(kind)) for name, (kind, _) in columns.items()
        )
        self.path = path
        self._file: Any = None
        self._rows: list[dict[str, Any]] = []

    def add(self, row: dict[str, Any]) -> None:
        """Appends one row; a missing column is null."""
        self._rows.append(row)
        if len(self._rows) >= _ROWS:
            self._flush()

    def add_table(self, table: Any) -> None:
        """Appends an Arrow table of the same schema."""
        self._flush()
        self._write(table.cast(self.schema))

    def _flush(self) -> None:
        if self._rows:
            self._write(self._arrow.Table.from_pylist(self._rows, schema=self.schema))
            self._rows.clear()

    def _write(self, table: Any) -> None:
        if self._file is None:
            self._file = self._parquet.ParquetWriter(self.path, self.schema, compression="zstd")
        self._file.write_table(table)

    def close(self) -> None:
        """Writes what is left, at least the empty table; closing twice does nothing."""
        self._flush()
        if self._file is None and not self.path.exists():
            self._write(self.schema.empty_table())
        if self._file is not None:
            self._file.close()


def sample_meta(row: Mapping[str, Any], *, key: str, sensor: str, split: str, size: int) -> dict[str, Any]:
    """Returns the content of a sample's JSON."""
    return {"key": key, "sensor": sensor, "split": split, "size": size} | {name: row.get(name) for name in _META}


class CorpusWriter:
    """Writes a corpus tile by tile into a folder that the caller publishes (see `momo.files.atomic_folder`).

    `momo prep` writes its shards in parallel (see `assembly.py`); this is the plain way for generated and imported
    tiles. Memory does not grow with the number of tiles but for 8 bytes a key. As a context manager it closes its
    files when the work in it fails.

    Args:
        folder: Existing, empty folder.
        sensor: Camera of every tile.
        tile_size: Side of a tile in pixels.
        dtype: `uint8` or `uint16`.
        synthetic: True when the tiles were generated.
        tiles_per_shard: A shard is closed after this many tiles.
        codec: `zstd` or `png`.
    """

    def __init__(
        self, folder: Path, *, sensor: str, tile_size: int, dtype: str, synthetic: bool, tiles_per_shard: int = 1024,
        codec: str = "zstd",
    ) -> None:  # fmt: skip
        self.folder, self.sensor, self.tile_size = folder, sensor, tile_size
        self.dtype, self.synthetic, self.tiles_per_shard, self.codec = dtype, synthetic, tiles_per_shard, codec
        self._open: dict[str, ShardFile] = {}
        self._shards: list[ShardEntry] = []
        self._index = TableFile(folder / "index.parquet", INDEX_COLUMNS)
        self._keys = array.array("Q")
        self._statistics = PixelStatistics()
        self._levels = np.iinfo(dtype).min, np.iinfo(dtype).max
        (folder / "shards").mkdir()

    def add(self, tile: TileRecord) -> None:
        """Appends one tile to the current shard of its split.

        Raises:
            DataError: Wrong shape or dtype, or a key that cannot be used.
        """
        self._check(tile)
        shard = self._shard_of(tile.split)
        stored = np.where(tile.valid_HW, tile.stored_HW, 0).astype(tile.stored_HW.dtype)
        measures = measure(stored, tile.valid_HW, self._levels)
        row = {name: getattr(measures, name, None) for name in INDEX_COLUMNS} | {"dead_lines": 0, "cell": -1}
        row |= {name: tile.meta[name] for name in INDEX_COLUMNS if tile.meta.get(name) is not None}
        whole = bool(tile.valid_HW.all())
        offset, nbytes = shard.add(
            tile.key,
            sample_meta(row, key=tile.key, sensor=self.sensor, split=tile.split, size=self.tile_size),
            encode_tile(stored, self.codec),
            None if whole else encode_mask(tile.valid_HW, self.codec),
        )
        row |= {"key": tile.key, "split": tile.split, "shard": shard.entry.name, "offset": offset, "nbytes": nbytes}
        self._index.add(row | {"sensor": self.sensor, "size": self.tile_size})
        if tile.split == "train":
            self._add_statistics(tile, stored, row)
        if shard.entry.samples >= self.tiles_per_shard:
            self._close(tile.split)

    def _add_statistics(self, tile: TileRecord, stored_HW: npt.NDArray[Any], row: Mapping[str, Any]) -> None:
        count = int(tile.valid_HW.sum())
        if count == 0:
            return
        scale, offset = float(row["scale"]), float(row["offset_value"])
        low, high = sorted(float(row[name]) * scale + offset for name in ("stored_min", "stored_max"))
        self._statistics.add(
            np.array([count]),
            np.array([row["stored_mean"] * scale + offset]),
            np.array([row["stored_std"] * abs(scale)]),
            low,
            high,
        )
        values = value_sample(stored_HW, tile.valid_HW, SAMPLE_VALUES)
        self._statistics.offer(key_priority(tile.key), values.astype(np.float64) * scale + offset)

    def _check(self, tile: TileRecord) -> None:
        if "." in tile.key or "/" in tile.key or not 0 < len(tile.key) <= _MAX_KEY or not tile.key.isascii():
            raise DataError(
                "a tile key cannot be used",
                seen=tile.key,
                rule=f"1 to {_MAX_KEY} ASCII characters, unique, without dots and slashes",
            )
        if tile.split not in SPLITS:
            raise DataError("a tile has an unknown split", seen=tile.split, rule=f"one of {', '.join(SPLITS)}")
        shape = (self.tile_size, self.tile_size)
        if tile.stored_HW.shape != shape or tile.valid_HW.shape != shape or str(tile.stored_HW.dtype) != self.dtype:
            raise DataError(
                "a tile does not fit the corpus",
                seen=f"{tile.key}: {tile.stored_HW.shape} {tile.stored_HW.dtype}, mask {tile.valid_HW.shape}",
                rule=f"{shape} {self.dtype}",
            )
        self._keys.append(key_priority(tile.key))

    def _shard_of(self, split: str) -> ShardFile:
        if split not in self._open:
            number = sum(shard.split == split for shard in self._shards)
            self._open[split] = ShardFile(self.folder / "shards", split, number, self.codec)
        return self._open[split]

    def _close(self, split: str) -> None:
        self._shards.append(self._open.pop(split).close())

    def __enter__(self) -> CorpusWriter:
        return self

    def __exit__(self, *error: object) -> None:
        """Closes what is still open; after `finish` nothing is."""
        for split in list(self._open):
            self._close(split)
        self._index.close()

    def finish(
        self,
        *,
        products: Sequence[dict[str, Any]],
        prep: dict[str, Any],
        licence: str,
        failures: Sequence[dict[str, str]] = (),
    ) -> Manifest:
        """Closes the shards and writes index, products, statistics and, last, the manifest.

        Args:
            products: Rows of products.parquet; missing columns are null.
            prep: Resolved configuration.
            licence: SPDX identifier of the tiles.
            failures: Products that gave no tile: `source` and `reason`.

        Raises:
            DataError: No training tile was written, or a key was used twice.
        """
        for split in list(self._open):
            self._close(split)
        if len(np.unique(np.frombuffer(self._keys, dtype=np.uint64))) < len(self._keys):
            raise DataError("a tile key was used twice", rule="keys are unique in a corpus", fix="rename the products")
        self._index.close()
        table = TableFile(self.folder / "products.parquet", PRODUCT_COLUMNS)
        for product in products:
            table.add(product)
        table.close()
        return write_manifest(
            self.folder,
            shards=self._shards,
            statistics=self._statistics,
            fields={
                "sensor": self.sensor, "tile_size": self.tile_size, "dtype": self.dtype, "codec": self.codec,
                "synthetic": self.synthetic, "products": len(products), "prep": prep, "licence": licence,
                "failures": list(failures),
            },
        )  # fmt: skip


def write_manifest(
    folder: Path, *, shards: Sequence[ShardEntry], statistics: PixelStatistics, fields: dict[str, Any]
) -> Manifest:
    """Writes stats.json and, last, manifest.json; the tables and shards are there already.

    Args:
        folder: The corpus folder.
        shards: Every shard.
        statistics: Of the training tiles.
        fields: The other fields of the manifest.

    Raises:
        DataError: There is no training tile.
    """
    ordered = sorted(shards, key=lambda shard: shard.name)
    splits = {split: sum(s.samples for s in ordered if s.split == split) for split in SPLITS}
    if statistics.count == 0:
        raise DataError(
            "the corpus would have no training tile",
            seen=f"{sum(splits.values())} tiles in all",
            rule="at least one training tile with a valid pixel",
            fix="lower quality.min_valid or tile_size, or give more products",
        )
    write_json(folder / "stats.json", statistics.to_dict())
    tables = {name: sha256_file(folder / name) for name in ("index.parquet", "products.parquet", "stats.json")}
    manifest = Manifest(
        splits=splits,
        shards=ordered,
        fingerprint=fingerprint(ordered),
        tables=tables,
        momo_version=__version__,
        **fields,
    )
    write_json(folder / "manifest.json", manifest.to_dict())
    return manifest


def _without_nan(meta: Mapping[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in meta.items()}
