"""CORPUS, reading side; `momo.corpus_format` says what the folder holds."""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .codecs import MASK_SUFFIX, TILE_SUFFIX, decode_mask, decode_tile
from .corpus_format import (
    FORMAT_VERSION,
    INDEX_COLUMNS,
    PRODUCT_COLUMNS,
    SPLITS,
    Manifest,
    ShardEntry,
    fingerprint,
)
from .corpus_index import IndexRows, StoredStatistics, read_index
from .errors import DataError
from .extras import require
from .manifest import check_files, read_json, read_manifest
from .samples import split_sample

__all__ = [
    "FORMAT_VERSION",
    "INDEX_COLUMNS",
    "PRODUCT_COLUMNS",
    "SPLITS",
    "Corpus",
    "Manifest",
    "ShardEntry",
    "StoredBatch",
    "StoredStatistics",
    "StoredTile",
    "Tile",
    "fingerprint",
    "read_manifest",
]

_OPEN_FILES = 256  # a process may often have 1024; a corpus of millions of tiles has more shards than that
_RUN_BYTES = 8 << 20


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


@dataclass(frozen=True)
class StoredTile:
    """One tile as it is stored; `momo.normalise` makes network input of it.

    Attributes:
        key: Unique key.
        stored_HW: uint8 or uint16.
        valid_HW: True where the pixel was measured; None when every pixel was.
        product_id: Product it was cut from.
        statistics: What scales it.
    """

    key: str
    stored_HW: npt.NDArray[Any]
    valid_HW: npt.NDArray[np.bool_] | None
    product_id: str
    statistics: StoredStatistics

    @property
    def valid(self) -> npt.NDArray[np.bool_]:
        """True where the pixel was measured, (H, W)."""
        return np.ones(self.stored_HW.shape, dtype=np.bool_) if self.valid_HW is None else self.valid_HW

    @property
    def value_HW(self) -> npt.NDArray[np.float32]:
        """float32 in physical units."""
        return _physical(self.stored_HW, self.statistics.scale, self.statistics.offset_value)


@dataclass(frozen=True)
class StoredBatch:
    """Tiles as they are stored, in the order they were asked for.

    Attributes:
        keys: Unique keys.
        stored_BHW: uint8 or uint16, one contiguous array.
        valid_BHW: True where the pixel was measured; None when every pixel was.
        product_ids: Products they were cut from.
        statistics: What scales them.
    """

    keys: list[str]
    stored_BHW: npt.NDArray[Any]
    valid_BHW: npt.NDArray[np.bool_] | None
    product_ids: list[str]
    statistics: StoredStatistics


class Corpus:
    """A corpus on disk, read tile by tile at any position.

    The index is read at the first tile and takes about 30 bytes a tile.

    Args:
        path: Corpus folder.
        verify: Compare every shard's and table's SHA-256 with the manifest; sizes of shards are always compared.

    Raises:
        DataError: The folder is no corpus, is incomplete, or a file was altered.
    """

    def __init__(self, path: Path, *, verify: bool = False) -> None:
        self.path = Path(path)
        self.manifest = read_manifest(self.path)
        check_files(self.path, self.manifest, hashes=verify)
        self._files: OrderedDict[int, _File] = OrderedDict()

    @property
    def sensor(self) -> str:
        """Camera of every tile."""
        return self.manifest.sensor

    @cached_property
    def stats(self) -> dict[str, Any]:
        """Statistics over valid training pixels: `mean`, `std`, `min`, `max`, `count`, `percentiles`."""
        fields = read_json(self.path / "stats.json")
        if not isinstance(fields, dict):
            raise DataError("the statistics cannot be read", seen=self.path / "stats.json", fix="run momo prep again")
        return fields

    @property
    def products(self) -> list[dict[str, Any]]:
        """The rows of products.parquet, read anew at each use; see `momo.corpus_format.PRODUCT_COLUMNS`."""
        path = self.path / "products.parquet"
        if not path.is_file():
            raise DataError("a table of the corpus is missing", seen=path, fix="run momo prep again")
        rows: list[dict[str, Any]] = require("pyarrow.parquet", "pretrain").read_table(path).to_pylist()
        return rows

    @cached_property
    def index(self) -> dict[str, IndexRows]:
        """The index by split, in shard order."""
        return read_index(self.path, self.manifest)

    def count(self, split: str) -> int:
        """Returns the number of tiles of a split."""
        return self.manifest.splits.get(split, 0)

    def read(self, split: str, position: int) -> Tile:
        """Reads and decodes one tile with its provenance.

        Args:
            split: `train` or `val`.
            position: 0 to `count(split) - 1`, in shard order.

        Raises:
            DataError: The sample cannot be decoded; the message names shard and offset.
        """
        shard, offset, nbytes = self.index[split].place(position)
        raw = self._file(shard).read(offset, nbytes)
        try:
            return decode_sample(raw, self.manifest)
        except ValueError as error:
            raise self._undecodable(shard, offset, error) from error

    def read_stored(self, split: str, position: int) -> StoredTile:
        """Reads and decodes one tile as it is stored.

        Args:
            split: `train` or `val`.
            position: 0 to `count(split) - 1`, in shard order.

        Raises:
            DataError: The sample cannot be decoded; the message names shard and offset.
        """
        rows = self.index[split]
        shard, offset, nbytes = rows.place(position)
        raw = self._file(shard).read(offset, nbytes)
        try:
            key, members = split_sample(raw)
            stored_HW = _decoded_tile(members, self.manifest)
            valid_HW = _decoded_mask(members, self.manifest)
        except ValueError as error:
            raise self._undecodable(shard, offset, error) from error
        return StoredTile(key, stored_HW, valid_HW, rows.product[position], rows.statistics(position))

    def read_batch(self, split: str, positions: Sequence[int] | npt.NDArray[np.integer[Any]]) -> StoredBatch:
        """Reads and decodes tiles as they are stored into one array; neighbours in a shard are read at once.

        Args:
            split: `train` or `val`.
            positions: Each 0 to `count(split) - 1`, in any order.

        Raises:
            DataError: A sample cannot be decoded; the message names shard and offset.
        """
        rows, size = self.index[split], self.manifest.tile_size
        wanted = np.asarray(positions, dtype=np.int64)
        stored_BHW = np.empty((len(wanted), size, size), dtype=self.manifest.dtype)
        valid_BHW: npt.NDArray[np.bool_] | None = None
        keys = [""] * len(wanted)
        for slot, shard, offset, raw in self._samples(rows, wanted):
            try:
                keys[slot], members = split_sample(raw)
                _decoded_tile(members, self.manifest, stored_BHW[slot])
                if (mask_HW := _decoded_mask(members, self.manifest)) is not None:
                    if valid_BHW is None:
                        valid_BHW = np.ones(stored_BHW.shape, dtype=np.bool_)
                    valid_BHW[slot] = mask_HW
            except ValueError as error:
                raise self._undecodable(shard, offset, error) from error
        return StoredBatch(keys, stored_BHW, valid_BHW, rows.product[wanted].tolist(), rows.statistics_of(wanted))

    def _samples(
        self, rows: IndexRows, wanted: npt.NDArray[np.int64]
    ) -> Iterator[tuple[int, int, int, bytes | memoryview]]:
        """Yields place in `wanted`, shard, offset and bytes of each sample, in the order of the shards."""
        run: list[tuple[int, int, int, int]] = []
        for slot in np.argsort(wanted, kind="stable").tolist():
            shard, offset, nbytes = rows.place(wanted[slot])
            follows = bool(run) and run[-1][1] == shard and run[-1][2] + run[-1][3] == offset
            if run and (not follows or offset + nbytes - run[0][2] > _RUN_BYTES):
                yield from self._read_run(run)
                run = []
            run.append((slot, shard, offset, nbytes))
        if run:
            yield from self._read_run(run)

    def _read_run(self, run: list[tuple[int, int, int, int]]) -> Iterator[tuple[int, int, int, bytes | memoryview]]:
        _, shard, start, _ = run[0]
        raw = memoryview(self._file(shard).read(start, run[-1][2] + run[-1][3] - start))
        for slot, _, offset, nbytes in run:
            yield slot, shard, offset, raw[offset - start : offset - start + nbytes]

    def _undecodable(self, shard: int, offset: int, error: ValueError) -> DataError:
        where = f"{self.manifest.shards[shard].name} at byte {offset}"
        return DataError("a tile cannot be decoded", seen=f"{where}: {error}", fix="run momo prep verify on the corpus")

    def _file(self, shard: int) -> _File:
        file = self._files.get(shard)
        if file is None:
            file = self._files[shard] = _File(self.path / "shards" / self.manifest.shards[shard].name)
            if len(self._files) > _OPEN_FILES:
                self._files.popitem(last=False)
        return file

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict()}


class _File:
    """An open shard. Reading takes no file position, so a forked worker may go on with an inherited one."""

    def __init__(self, path: Path) -> None:
        self._descriptor = -1
        self._path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise DataError("a shard cannot be opened", seen=f"{path}: {error.strerror}") from None

    def read(self, offset: int, nbytes: int) -> bytes:
        raw = os.pread(self._descriptor, nbytes, offset)
        while len(raw) < nbytes:
            more = os.pread(self._descriptor, nbytes - len(raw), offset + len(raw))
            if not more:
                raise DataError("a shard ends early", seen=f"{self._path} at byte {offset + len(raw)}")
            raw += more
        return raw

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)


def decode_sample(raw: bytes, manifest: Manifest) -> Tile:
    """Decodes the tar members of one sample into a tile.

    Args:
        raw: Bytes of all members of the sample.
        manifest: Of the corpus the sample belongs to.

    Raises:
        ValueError: A member is missing or cannot be decoded.
    """
    key, members = split_sample(raw)
    meta = json.loads(bytes(_member(members, "json")))
    stored = _decoded_tile(members, manifest)
    valid = _decoded_mask(members, manifest)
    if valid is None:
        valid = np.ones(stored.shape, dtype=bool)
    try:
        value = _physical(stored, float(meta["scale"]), float(meta["offset_value"]))
    except (TypeError, KeyError) as error:
        raise ValueError(f"its JSON has no stretch: {error}") from None
    return Tile(key, value, valid, meta)


def _physical(stored_HW: npt.NDArray[Any], scale: float, offset_value: float) -> npt.NDArray[np.float32]:
    return stored_HW.astype(np.float32) * np.float32(scale) + np.float32(offset_value)


def _member(members: Mapping[str, memoryview], suffix: str) -> memoryview:
    if suffix not in members:
        raise ValueError(f"the sample has no {suffix}, only {', '.join(members)}")
    return members[suffix]


def _decoded_tile(
    members: Mapping[str, memoryview], manifest: Manifest, out: npt.NDArray[Any] | None = None
) -> npt.NDArray[Any]:
    data = _member(members, TILE_SUFFIX[manifest.codec])
    return decode_tile(data, manifest.codec, manifest.dtype, manifest.tile_size, out)


def _decoded_mask(members: Mapping[str, memoryview], manifest: Manifest) -> npt.NDArray[np.bool_] | None:
    data = members.get(MASK_SUFFIX[manifest.codec])
    return None if data is None else decode_mask(data, manifest.codec, manifest.tile_size)
