"""The index of a corpus in memory: where each tile lies in its shard, and the statistics that scale it.

12 million tiles must fit beside a model, so a tile takes about 30 bytes here: columns are read one at a time into the
smallest whole-number type that holds them, and text is a code into a short list. No Python object is made per row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .corpus_format import SPLITS, Manifest
from .errors import DataError
from .extras import require
from .manifest import open_table
from .stores import Store

_BLOCK = 512  # members of a tar file begin and end at multiples of it
_FIX = "run momo prep again"
_BATCH = 1 << 18  # rows read at once

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class StoredStatistics:
    """What scales stored pixels: of one tile (floats), or of B tiles (float64 arrays of shape (B,)).

    Attributes:
        scale: Physical value = stored value * scale + offset_value.
        offset_value: See `scale`.
        mean: Mean of the valid stored values.
        std: Their standard deviation (population).
        low: Their minimum.
        high: Their maximum.
        percentile_low: 1st percentile of the tile's product, physical units; NaN when products.parquet has none.
        percentile_high: 99th percentile of the tile's product, physical units.
    """

    scale: Any
    offset_value: Any
    mean: Any
    std: Any
    low: Any
    high: Any
    percentile_low: Any
    percentile_high: Any


@dataclass(frozen=True)
class _Coded:
    """A column with few distinct values: value of row i is `values[codes[i]]`."""

    codes: npt.NDArray[Any]
    values: npt.NDArray[Any]

    def __getitem__(self, rows: Any) -> Any:
        return self.values[self.codes[rows]]

    @property
    def nbytes(self) -> int:
        return int(self.codes.nbytes)


@dataclass(frozen=True)
class Places:
    """Where B samples lie: all a reader needs to know of the index, and little to send to another process.

    Attributes:
        shard: Numbers of the shards in `Manifest.shards`, int64 (B,).
        offset: First bytes, int64 (B,).
        nbytes: Bytes, int64 (B,).
    """

    shard: npt.NDArray[np.int64]
    offset: npt.NDArray[np.int64]
    nbytes: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.shard)


@dataclass(frozen=True)
class IndexRows:
    """The tiles of one split in shard order, one array entry a tile.

    Attributes:
        shard: Number of the shard in `Manifest.shards`.
        block: First byte of the sample in its shard, in units of 512 bytes.
        blocks: Bytes of the sample, in units of 512 bytes.
        product: Product id, coded.
        percentiles: (2, products) array by code of the product.
        columns: The columns of `StoredStatistics` that are a tile's own, by name.
    """

    shard: npt.NDArray[Any]
    block: npt.NDArray[Any]
    blocks: npt.NDArray[Any]
    product: _Coded
    percentiles: Floats
    columns: dict[str, Any]

    def __len__(self) -> int:
        return len(self.shard)

    def place(self, position: int) -> tuple[int, int, int]:
        """Returns shard number, first byte and number of bytes of a sample."""
        return int(self.shard[position]), int(self.block[position]) * _BLOCK, int(self.blocks[position]) * _BLOCK

    def places(self, positions: npt.NDArray[np.integer[Any]]) -> Places:
        """Returns where several samples lie."""
        shard, block, blocks = (
            np.asarray(column[positions], dtype=np.int64) for column in (self.shard, self.block, self.blocks)
        )
        return Places(shard, block * _BLOCK, blocks * _BLOCK)

    def statistics(self, position: int) -> StoredStatistics:
        """Returns the statistics of one tile as floats."""
        columns = {name: float(column[position]) for name, column in self.columns.items()}
        low, high = self.percentiles[:, self.product.codes[position]].tolist()
        return StoredStatistics(**columns, percentile_low=low, percentile_high=high)

    def statistics_of(self, positions: npt.NDArray[np.int64]) -> StoredStatistics:
        """Returns the statistics of several tiles as float64 arrays."""
        columns = {name: np.asarray(column[positions], dtype=np.float64) for name, column in self.columns.items()}
        low, high = self.percentiles[:, self.product.codes[positions]]
        return StoredStatistics(**columns, percentile_low=low, percentile_high=high)

    @property
    def nbytes(self) -> int:
        """Memory the tiles take, bytes."""
        columns: list[Any] = [self.shard, self.block, self.blocks, self.product, *self.columns.values()]
        return sum(int(column.nbytes) for column in columns)


def read_index(store: Store, manifest: Manifest) -> dict[str, IndexRows]:
    """Reads index.parquet and the percentiles of products.parquet.

    Args:
        store: Where the corpus is.
        manifest: Its manifest.

    Returns:
        The tiles by split. Every split of `SPLITS` is there, if only empty.

    Raises:
        DataError: A table is missing or damaged, or contradicts the manifest.
    """
    table = _Table(store, manifest, "index.parquet")
    split = table.coded("split", SPLITS)
    shard = table.coded("shard", [entry.name for entry in manifest.shards])
    block, blocks = _blocks(table, shard, manifest)
    rows_by_split = {}
    for code, name in enumerate(SPLITS):
        rows = np.flatnonzero(split == code)
        _check_count(name, len(rows), manifest)
        rows_by_split[name] = rows[_shard_order(shard[rows], block[rows], table.path)]
    product = table.categories("product_id")
    percentiles = _percentiles(_Table(store, manifest, "products.parquet"), product.values.tolist())
    # A column at a time: whole and shared out among the splits it lies in memory twice.
    columns: dict[str, dict[str, Any]] = {name: {} for name in SPLITS}
    for key, read in {
        "mean": lambda: table.floats("stored_mean", np.float64),
        "std": lambda: table.floats("stored_std", np.float32),
        "low": lambda: table.levels("stored_min"),
        "high": lambda: table.levels("stored_max"),
        "scale": lambda: table.coded_floats("scale"),
        "offset_value": lambda: table.coded_floats("offset_value"),
    }.items():
        column = read()
        for name, rows in rows_by_split.items():
            columns[name][key] = _rows_of(column, rows)
    table.release()
    return {
        name: IndexRows(
            shard=shard[rows],
            block=block[rows],
            blocks=blocks[rows],
            product=_rows_of(product, rows),
            percentiles=percentiles,
            columns=columns[name],
        )
        for name, rows in rows_by_split.items()
    }


def read_keys(store: Store, manifest: Manifest, places: Sequence[tuple[str, int]]) -> Mapping[tuple[str, int], str]:
    """Looks the keys of samples up; for messages, so they are not kept in memory.

    Args:
        store: Where the corpus is.
        manifest: Its manifest.
        places: Shard file name and first byte of each sample.

    Returns:
        Keys by place; a place that no tile has is left out.

    Raises:
        DataError: The index is missing or damaged.
    """
    table = _Table(store, manifest, "index.parquet")
    shards = {shard for shard, _ in places}
    wanted, keys = set(places), {}
    for _, columns in table.batches("shard", "offset", "key"):
        here = table.is_in(columns[0], shards)
        rows = zip(*(column.filter(here).to_pylist() for column in columns), strict=True)
        keys.update({(shard, offset): key for shard, offset, key in rows if (shard, offset) in wanted})
    table.release()
    return keys


def _rows_of(column: Any, rows: npt.NDArray[np.int64]) -> Any:
    return _Coded(column.codes[rows], column.values) if isinstance(column, _Coded) else column[rows]


def _compact(column: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return column.astype(np.min_scalar_type(int(column.max()) if len(column) else 0))


def _shard_order(shard: npt.NDArray[Any], block: npt.NDArray[Any], path: str) -> Any:
    """Returns what sorts tiles by shard and place in it: a slice when they lie so already, as prep writes them."""
    place = shard.astype(np.int64) << 40
    place |= block
    if (place[1:] > place[:-1]).all():
        return slice(None)
    order = np.argsort(place, kind="stable")
    place = place[order]
    if not (place[1:] > place[:-1]).all():
        raise DataError("two tiles of the index are one sample", seen=path, fix=_FIX)
    return order


def _blocks(
    table: _Table, shard: npt.NDArray[Any], manifest: Manifest
) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint32]]:
    """Returns first block and number of blocks of each sample. 32 bits reach to 2 TB in a shard."""
    sizes = np.array([entry.bytes for entry in manifest.shards], dtype=np.int64)
    block, blocks = (np.empty(table.rows, dtype=np.uint32) for _ in range(2))
    for here, (offset, nbytes) in table.batches("offset", "nbytes"):
        offset, nbytes = (np.asarray(column, dtype=np.int64) for column in (offset, nbytes))
        wrong = (offset < 0) | (nbytes <= 0) | (offset % _BLOCK != 0) | (nbytes % _BLOCK != 0)
        wrong |= offset + nbytes > sizes[shard[here]]
        if wrong.any():
            row = int(np.argmax(wrong))
            raise DataError(
                "the index points outside a shard",
                seen=f"{table.path}, row {here.start + row}: byte {offset[row]}, {nbytes[row]} bytes",
                rule="whole blocks of 512 bytes inside the shard",
                fix=_FIX,
            )
        block[here], blocks[here] = offset // _BLOCK, nbytes // _BLOCK
    return block, _compact(blocks)


def _check_count(split: str, found: int, manifest: Manifest) -> None:
    expected = manifest.splits.get(split, 0)
    if found != expected:
        raise DataError(
            "index and manifest disagree", seen=f"{found} {split} rows, {expected} in the manifest", fix=_FIX
        )


def _percentiles(table: _Table, ids: list[str]) -> Floats:
    """Percentiles of the products in the order of `ids`, shape (2, len(ids)); NaN where a product has none."""
    values = np.full((2, len(ids)), np.nan)
    numbers = {product: number for number, product in enumerate(ids)}
    for _, (products, *columns) in table.batches("product_id", "percentile_low", "percentile_high", gaps=True):
        found = np.array([numbers.get(product, -1) for product in products.to_pylist()], dtype=np.int64)
        for line, column in enumerate(columns):
            values[line, found[found >= 0]] = column.to_numpy(zero_copy_only=False)[found >= 0]
    return values


class _Table:
    """Columns of a parquet file as arrays, read batch by batch so that a large table never lies in memory whole."""

    def __init__(self, store: Store, manifest: Manifest, name: str) -> None:
        self._arrow = require("pyarrow", "pretrain")
        self._parquet = require("pyarrow.parquet", "pretrain")
        self.path = f"{store.location.rstrip('/')}/{name}"
        found = open_table(store, manifest, name)
        self.source = self._arrow.BufferReader(found) if isinstance(found, bytes) else found
        try:
            metadata = self._parquet.read_metadata(self.source)
        except (self._arrow.ArrowException, OSError) as error:
            raise self._unreadable(error) from None
        self.rows: int = metadata.num_rows
        self._names = set(metadata.schema.to_arrow_schema().names)

    def batches(self, *names: str, text: bool = False, gaps: bool = False) -> Iterator[tuple[slice, list[Any]]]:
        """Yields rows and, for each column, an Arrow array of them.

        Args:
            *names: Columns.
            text: Give the columns dictionary-encoded.
            gaps: Nulls are allowed.
        """
        if missing := [name for name in names if name not in self._names]:
            raise DataError("a table of the corpus lacks a column", seen=f"{self.path}: {missing[0]}", fix=_FIX)
        first = 0
        try:
            file = self._parquet.ParquetFile(self.source, read_dictionary=list(names) if text else None)
            for batch in file.iter_batches(batch_size=_BATCH, columns=list(names)):
                columns = [batch.column(name) for name in names]
                if not gaps:
                    for name, column in zip(names, columns, strict=True):
                        self._check(name, first, column.null_count > 0)
                yield slice(first, first + len(batch)), columns
                first += len(batch)
        except (self._arrow.ArrowException, OSError) as error:
            raise self._unreadable(error) from None

    def is_in(self, column: Any, values: set[str]) -> Any:
        """Returns where an Arrow column has one of the values."""
        return require("pyarrow.compute", "pretrain").is_in(column, value_set=self._arrow.array(sorted(values)))

    def release(self) -> None:
        """Gives the memory that Arrow keeps for its next table back."""
        self._arrow.default_memory_pool().release_unused()

    def _unreadable(self, error: Exception) -> DataError:
        return DataError("a table of the corpus cannot be read", seen=f"{self.path}: {error}", fix=_FIX)

    def _check(self, name: str, first: int, bad: bool) -> None:
        if bad:
            seen = f"{self.path}: {name}, rows from {first}"
            raise DataError("a column of the corpus has gaps", seen=seen, rule="every row has a number", fix=_FIX)

    def floats(self, name: str, dtype: type[np.floating[Any]]) -> npt.NDArray[Any]:
        """Returns a column of finite numbers."""
        out = np.empty(self.rows, dtype=dtype)
        for here, (column,) in self.batches(name):
            out[here] = column.to_numpy()
            self._check(name, here.start, not np.isfinite(out[here]).all())
        return out

    def levels(self, name: str) -> npt.NDArray[Any]:
        """Returns a column of stored values."""
        out = np.empty(self.rows, dtype=np.uint16)
        for here, (column,) in self.batches(name):
            values = column.to_numpy()
            if len(values) and not 0 <= values.min() <= values.max() <= 65535:
                raise DataError("a stored value is out of range", seen=f"{self.path}: {name}", rule="0 to 65535")
            out[here] = values
        return _compact(out)

    def categories(self, name: str) -> _Coded:
        """Returns a text column as codes."""
        return self._coded(name, text=True)

    def coded_floats(self, name: str) -> _Coded:
        """Returns a column of finite numbers with few distinct values."""
        column = self._coded(name, text=False)
        column = _Coded(column.codes, column.values.astype(np.float64))
        self._check(name, 0, not np.isfinite(column.values).all())
        return column

    def _coded(self, name: str, *, text: bool) -> _Coded:
        codes = np.empty(self.rows, dtype=np.uint32)
        numbers: dict[Any, int] = {}
        for here, (column,) in self.batches(name, text=text):
            encoded = column if text else column.dictionary_encode()
            own = [numbers.setdefault(value, len(numbers)) for value in encoded.dictionary.to_pylist()]
            codes[here] = np.array(own, dtype=np.uint32)[encoded.indices.to_numpy()]
        return _Coded(_compact(codes), np.array(list(numbers), dtype=object))

    def coded(self, name: str, known: Sequence[str]) -> npt.NDArray[Any]:
        """Returns a text column as numbers of its texts in `known`."""
        column = self.categories(name)
        numbers = {text: number for number, text in enumerate(known)}
        if unknown := [text for text in column.values if text not in numbers]:
            raise DataError(
                f"the index names a {name} that the manifest has not", seen=f"{self.path}: {unknown[0]}", fix=_FIX
            )
        return _compact(np.array([numbers[text] for text in column.values], dtype=np.int64)[column.codes])
