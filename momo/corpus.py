"""CORPUS, reading side; `momo.corpus_format` says what the folder holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .corpus_format import (
    FORMAT_VERSION,
    INDEX_COLUMNS,
    PRODUCT_COLUMNS,
    SPLITS,
    Manifest,
    ShardEntry,
    fingerprint,
)
from .corpus_index import IndexRows, Places, StoredStatistics, read_index, read_keys
from .errors import DataError
from .extras import require
from .manifest import check_files, open_table, read_json, read_manifest
from .pipes import ShardBuffer
from .samples import split_sample
from .stores import Bytes, Patience, Run, open_store
from .tiles import (
    DecodedBatch,
    StoredBatch,
    StoredTile,
    Tile,
    Unreadable,
    decode_sample,
    decoded_mask,
    decoded_tile,
)

__all__ = [
    "FORMAT_VERSION",
    "INDEX_COLUMNS",
    "PRODUCT_COLUMNS",
    "SPLITS",
    "Corpus",
    "DecodedBatch",
    "Manifest",
    "ShardEntry",
    "StoredBatch",
    "StoredStatistics",
    "StoredTile",
    "Tile",
    "Unreadable",
    "fingerprint",
    "read_manifest",
]

_RUN_BYTES = 8 << 20


class Corpus:
    """A corpus, read tile by tile at any position; threads may share it.

    The index is read at the first tile and takes about 30 bytes a tile. It stays behind when a corpus is pickled.

    Args:
        path: Corpus folder, or URL of one (see `momo.stores`).
        verify: Compare every shard's and table's SHA-256 with the manifest; sizes of shards are always compared. Of a
            remote corpus only what is fetched whole is compared, when it is; `notes` says so.
        pipe: Command that writes a shard to its output, see `momo.stores.PipeStore`.
        buffer: Where shards that come whole are kept; several corpora may share one.
        patience: How long remote reads are tried.

    Raises:
        DataError: The folder is no corpus, is incomplete, or a file was altered.
        ConfigError: The URL's protocol is unknown or its package is not installed.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        verify: bool = False,
        pipe: str | None = None,
        buffer: ShardBuffer | None = None,
        patience: Patience | None = None,
    ) -> None:
        self.store = open_store(path, pipe=pipe, buffer=buffer, patience=patience)
        self.manifest = read_manifest(self.store)
        unchecked = check_files(self.store, self.manifest, hashes=verify)
        self.notes = [line for line in (self.store.note, *(unchecked if verify else ())) if line]

    @property
    def location(self) -> str:
        """Folder or URL."""
        return self.store.location

    @property
    def path(self) -> Path:
        """Corpus folder.

        Raises:
            DataError: The corpus is not on this machine.
        """
        if self.store.folder is None:
            raise DataError(
                "the corpus is not on this machine",
                seen=self.location,
                rule="this step reads other files than tiles and tables",
                fix="copy the corpus to a folder",
            )
        return self.store.folder

    @property
    def sensor(self) -> str:
        """Camera of every tile."""
        return self.manifest.sensor

    @cached_property
    def stats(self) -> dict[str, Any]:
        """Statistics over valid training pixels: `mean`, `std`, `min`, `max`, `count`, `percentiles`."""
        fields = read_json(self.store, "stats.json")
        if not isinstance(fields, dict):
            seen = f"{self.location}/stats.json"
            raise DataError("the statistics cannot be read", seen=seen, fix="run momo prep again")
        return fields

    @property
    def products(self) -> list[dict[str, Any]]:
        """The rows of products.parquet, read anew at each use; see `momo.corpus_format.PRODUCT_COLUMNS`."""
        found = open_table(self.store, self.manifest, "products.parquet")
        source = require("pyarrow", "pretrain").BufferReader(found) if isinstance(found, bytes) else found
        rows: list[dict[str, Any]] = require("pyarrow.parquet", "pretrain").read_table(source).to_pylist()
        return rows

    @cached_property
    def index(self) -> dict[str, IndexRows]:
        """The index by split, in shard order."""
        return read_index(self.store, self.manifest)

    def count(self, split: str) -> int:
        """Returns the number of tiles of a split."""
        return self.manifest.splits.get(split, 0)

    def read(self, split: str, position: int) -> Tile:
        """Reads and decodes one tile with its provenance.

        Args:
            split: `train` or `val`.
            position: 0 to `count(split) - 1`, in shard order.

        Raises:
            DataError: The sample cannot be read or decoded; the message names shard and offset.
        """
        shard, offset, nbytes = self.index[split].place(position)
        try:
            return decode_sample(self._sample(shard, offset, nbytes), self.manifest)
        except ValueError as error:
            raise self._undecodable(shard, offset, error) from error

    def read_stored(self, split: str, position: int) -> StoredTile:
        """Reads and decodes one tile as it is stored.

        Args:
            split: `train` or `val`.
            position: 0 to `count(split) - 1`, in shard order.

        Raises:
            DataError: The sample cannot be read or decoded; the message names shard and offset.
        """
        rows = self.index[split]
        shard, offset, nbytes = rows.place(position)
        try:
            key, members = split_sample(self._sample(shard, offset, nbytes))
            stored_HW = decoded_tile(members, self.manifest)
            valid_HW = decoded_mask(members, self.manifest)
        except ValueError as error:
            raise self._undecodable(shard, offset, error) from error
        return StoredTile(key, stored_HW, valid_HW, rows.product[position], rows.statistics(position))

    def read_batch(self, split: str, positions: Sequence[int] | npt.NDArray[np.integer[Any]]) -> StoredBatch:
        """Reads and decodes tiles as they are stored into one array; neighbours in a shard are read at once.

        Args:
            split: `train` or `val`.
            positions: Each 0 to `count(split) - 1`, in any order.

        Raises:
            DataError: A sample cannot be read or decoded; the message names shard and offset.
        """
        rows = self.index[split]
        wanted = np.asarray(positions, dtype=np.int64)
        tiles = self.read_places(rows.places(wanted))
        if tiles.unreadable:
            raise tiles.unreadable[0].error
        product_ids, statistics = rows.product[wanted].tolist(), rows.statistics_of(wanted)
        return StoredBatch(tiles.keys, tiles.stored_BHW, tiles.valid_BHW, product_ids, statistics)

    def read_places(self, places: Places) -> DecodedBatch:
        """Reads and decodes tiles by their places, without the index; `read_batch` is the usual way.

        Args:
            places: From `IndexRows.places`, in any order.
        """
        size = self.manifest.tile_size
        stored_BHW = np.empty((len(places), size, size), dtype=self.manifest.dtype)
        valid_BHW: npt.NDArray[np.bool_] | None = None
        keys, unreadable = [""] * len(places), []
        for slot, shard, offset, raw in self._samples(places):
            mask_HW: npt.NDArray[np.bool_] | bool | None
            try:
                if isinstance(raw, DataError):
                    raise raw
                key, members = split_sample(raw)
                decoded_tile(members, self.manifest, stored_BHW[slot])
                mask_HW = decoded_mask(members, self.manifest)
                keys[slot] = key
            except (ValueError, DataError) as error:
                known = error if isinstance(error, DataError) else self._undecodable(shard, offset, error)
                unreadable.append(Unreadable(slot, self.manifest.shards[shard].name, offset, known))
                stored_BHW[slot], mask_HW = 0, False
            if mask_HW is not None:
                if valid_BHW is None:
                    valid_BHW = np.ones(stored_BHW.shape, dtype=np.bool_)
                valid_BHW[slot] = mask_HW
        return DecodedBatch(keys, stored_BHW, valid_BHW, unreadable)

    def keys_at(self, places: Sequence[tuple[str, int]]) -> list[str]:
        """Looks keys up in the index, for messages about tiles that cannot be read.

        Args:
            places: Shard file name and first byte of each sample.

        Returns:
            The keys; shard and byte where the index does not tell.
        """
        try:
            found = read_keys(self.store, self.manifest, places)
        except DataError:
            found = {}
        return [found.get(place, f"{place[0]} at byte {place[1]}") for place in places]

    def _sample(self, shard: int, offset: int, nbytes: int) -> Bytes:
        (raw,) = self.store.read([Run(self.manifest.shards[shard], offset, nbytes)])
        if isinstance(raw, DataError):
            raise raw
        return raw

    def _samples(self, places: Places) -> Iterator[tuple[int, int, int, Bytes | DataError]]:
        """Yields slot, shard, offset and bytes of each sample, in the order of the shards."""
        runs: list[list[tuple[int, int, int, int]]] = []
        shards, offsets, sizes = places.shard.tolist(), places.offset.tolist(), places.nbytes.tolist()
        end = 0
        for slot in np.lexsort((places.offset, places.shard)).tolist():
            shard, offset, nbytes = shards[slot], offsets[slot], sizes[slot]
            near = bool(runs) and runs[-1][0][1] == shard and 0 <= offset - end <= self.store.gap
            if not near or offset + nbytes - runs[-1][0][2] > _RUN_BYTES:
                runs.append([])
            runs[-1].append((slot, shard, offset, nbytes))
            end = offset + nbytes
        wanted = []
        for run in runs:
            (_, shard, first, _), (_, _, last, nbytes) = run[0], run[-1]
            wanted.append(Run(self.manifest.shards[shard], first, last + nbytes - first))
        for run, raw in zip(runs, self.store.read(wanted), strict=True):
            if isinstance(raw, DataError) and len(run) > 1:
                # One damaged end must not take its neighbours along.
                yield from self._one_by_one(run)
                continue
            view, start = raw if isinstance(raw, DataError) else memoryview(raw), run[0][2]
            for slot, shard, offset, nbytes in run:
                part = view if isinstance(view, DataError) else view[offset - start : offset - start + nbytes]
                yield slot, shard, offset, part

    def _one_by_one(self, run: list[tuple[int, int, int, int]]) -> Iterator[tuple[int, int, int, Bytes | DataError]]:
        alone = [Run(self.manifest.shards[shard], offset, nbytes) for _, shard, offset, nbytes in run]
        for (slot, shard, offset, _), raw in zip(run, self.store.read(alone), strict=True):
            yield slot, shard, offset, raw

    def _undecodable(self, shard: int, offset: int, error: ValueError) -> DataError:
        where = f"{self.manifest.shards[shard].name} at byte {offset}"
        return DataError("a tile cannot be decoded", seen=f"{where}: {error}", fix="run momo prep verify on the corpus")

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "index"}
