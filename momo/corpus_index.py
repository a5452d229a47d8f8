"""The index of a corpus in memory: where each tile lies in its shard, and the statistics that scale it.

12 million tiles must fit beside a model, so a tile takes about 30 bytes here: columns are read one at a time into the
smallest whole-number type that holds them, and text is a code into a short list. No Python object is made per row.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .corpus_format import SPLITS, Manifest
from .errors import DataError
from .extras import require

_BLOCK = 512  # members of a tar file begin and end at multiples of it
_FIX = "run momo prep again"

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
        arrays = [self.shard, self.block, self.blocks, self.product]
        arrays += self.columns.values()
        return sum(array.codes.nbytes if isinstance(array, _Coded) else array.nbytes for array in arrays)


def read_index(folder: Path, manifest: Manifest) -> dict[str, IndexRows]:
    """Reads index.parquet and the percentiles of products.parquet.

    Args:
        folder: The corpus folder.
        manifest: Its manifest.

    Returns:
        The tiles by split. Every split of `SPLITS` is there, if only empty.

    Raises:
        DataError: A table is missing or damaged, or contradicts the manifest.
    """
    table = _Table(folder / "index.parquet")
    split = table.coded("split", SPLITS)
    shard = table.coded("shard", [entry.name for entry in manifest.shards])
    sizes = np.array([entry.bytes for entry in manifest.shards], dtype=np.int64)
    block, blocks = _blocks(table, shard, sizes)
    rows_by_split = {}
    for code, name in enumerate(SPLITS):
        rows = np.flatnonzero(split == code)
        _check_count(name, len(rows), manifest)
        place = shard[rows].astype(np.int64) << 40 | block[rows]
        if len(rows) and not (np.diff(place) > 0).all():
            order = np.argsort(place, kind="stable")
            rows, place = rows[order], place[order]
            if not (np.diff(place) > 0).all():
                raise DataError("two tiles of the index are one sample", seen=table.path, fix=_FIX)
        rows_by_split[name] = rows
    products, ids = table.categories("product_id")
    percentiles = _percentiles(folder / "products.parquet", ids)
    whole: dict[str, Any] = {name: table.floats(f"stored_{name}") for name in ("mean", "std")}
    whole |= {name: _compact(table.whole(f"stored_{level}")) for name, level in (("low", "min"), ("high", "max"))}
    whole |= {name: table.coded_floats(name) for name in ("scale", "offset_value")}
    whole["std"] = whole["std"].astype(np.float32)
    product = _Coded(_compact(products), np.array(ids, dtype=object))
    places = tuple(_compact(column) for column in (shard, block, blocks))
    return {
        name: IndexRows(
            *(column[rows] for column in places),
            product=_Coded(product.codes[rows], product.values),
            percentiles=percentiles,
            columns={key: _rows_of(column, rows) for key, column in whole.items()},
        )
        for name, rows in rows_by_split.items()
    }


def _rows_of(column: Any, rows: npt.NDArray[np.int64]) -> Any:
    return _Coded(column.codes[rows], column.values) if isinstance(column, _Coded) else column[rows]


def _compact(column: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return column.astype(np.min_scalar_type(int(column.max()) if len(column) else 0))


def _blocks(
    table: _Table, shard: npt.NDArray[Any], sizes: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    offset, nbytes = table.whole("offset"), table.whole("nbytes")
    wrong = (offset < 0) | (nbytes <= 0) | (offset % _BLOCK != 0) | (nbytes % _BLOCK != 0)
    if len(offset):
        wrong |= offset + nbytes > sizes[shard]
    if wrong.any():
        row = int(np.argmax(wrong))
        raise DataError(
            "the index points outside a shard",
            seen=f"{table.path}, row {row}: byte {offset[row]}, {nbytes[row]} bytes",
            rule="whole blocks of 512 bytes inside the shard",
            fix=_FIX,
        )
    return offset // _BLOCK, nbytes // _BLOCK


def _check_count(split: str, found: int, manifest: Manifest) -> None:
    expected = manifest.splits.get(split, 0)
    if found != expected:
        raise DataError(
            "index and manifest disagree", seen=f"{found} {split} rows, {expected} in the manifest", fix=_FIX
        )


def _percentiles(path: Path, ids: list[str]) -> Floats:
    """Percentiles of the products in the order of `ids`, shape (2, len(ids)); NaN where a product has none."""
    table = _Table(path)
    values = np.full((2, len(ids)), np.nan)
    known = {product: row for row, product in enumerate(table.read("product_id").to_pylist())}
    found = np.array([known.get(product, -1) for product in ids], dtype=np.int64)
    for line, name in enumerate(("percentile_low", "percentile_high")):
        column = table.read(name).to_numpy().astype(np.float64)
        values[line, found >= 0] = column[found[found >= 0]]
    return values


class _Table:
    """Columns of a parquet file as arrays, read one at a time so that a large table never lies in memory whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._arrow = require("pyarrow", "pretrain")
        self._parquet = require("pyarrow.parquet", "pretrain")
        if not path.is_file():
            raise DataError("a table of the corpus is missing", seen=path, fix=_FIX)

    def read(self, name: str, *, dictionary: bool = False) -> Any:
        """Returns a column as an Arrow chunked array."""
        try:
            file = self._parquet.ParquetFile(self.path, read_dictionary=[name] if dictionary else None)
            if name not in file.schema_arrow.names:
                raise DataError("a table of the corpus lacks a column", seen=f"{self.path}: {name}", fix=_FIX)
            return file.read(columns=[name]).column(name)
        except (self._arrow.ArrowException, OSError) as error:
            raise DataError("a table of the corpus cannot be read", seen=f"{self.path}: {error}", fix=_FIX) from None

    def _complete(self, name: str, *, dictionary: bool = False) -> Any:
        column = self.read(name, dictionary=dictionary)
        if column.null_count:
            raise self._incomplete(name, column.null_count)
        return column

    def _incomplete(self, name: str, count: int) -> DataError:
        return DataError("a column of the corpus has gaps", seen=f"{self.path}: {name}, {count} rows", fix=_FIX)

    def whole(self, name: str) -> npt.NDArray[np.int64]:
        """Returns a column of whole numbers."""
        return np.asarray(self._complete(name).to_numpy(), dtype=np.int64)

    def floats(self, name: str) -> Floats:
        """Returns a column of finite numbers."""
        column = np.asarray(self._complete(name).to_numpy(), dtype=np.float64)
        if bad := int(np.count_nonzero(~np.isfinite(column))):
            raise self._incomplete(name, bad)
        return column

    def coded_floats(self, name: str) -> _Coded:
        """Returns a column of finite numbers with few distinct values."""
        column = self._complete(name).dictionary_encode()
        codes, values = self._codes(column)
        values = np.array(values, dtype=np.float64)
        if not np.isfinite(values).all():
            raise self._incomplete(name, int(np.count_nonzero(~np.isfinite(values[codes]))))
        return _Coded(_compact(codes), values)

    def categories(self, name: str) -> tuple[npt.NDArray[np.int64], list[str]]:
        """Returns the codes of a text column and the texts they stand for."""
        return self._codes(self._complete(name, dictionary=True))

    def _codes(self, column: Any) -> tuple[npt.NDArray[np.int64], list[Any]]:
        column = column.unify_dictionaries()
        if not column.num_chunks:
            return np.zeros(0, dtype=np.int64), []
        codes = [chunk.indices.to_numpy(zero_copy_only=False) for chunk in column.chunks]
        return np.concatenate(codes).astype(np.int64), column.chunk(0).dictionary.to_pylist()

    def coded(self, name: str, known: tuple[str, ...] | list[str]) -> npt.NDArray[np.int64]:
        """Returns a text column as numbers of its texts in `known`."""
        codes, texts = self.categories(name)
        numbers = {text: number for number, text in enumerate(known)}
        if unknown := [text for text in texts if text not in numbers]:
            raise DataError(
                f"the index names a {name} that the manifest has not", seen=f"{self.path}: {unknown[0]}", fix=_FIX
            )
        return np.array([numbers[text] for text in texts], dtype=np.int64)[codes]
