"""Checks the manifest, the tables and the statistics of a corpus as a whole; part of `momo prep verify`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from momo.corpus_format import SPLITS, Manifest
from momo.errors import DataError
from momo.extras import require
from momo.files import sha256_file

from .statistics import PixelStatistics
from .verify_members import one_line

_NO_HASHES: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)
_TABLES = ("index.parquet", "products.parquet", "stats.json")
CHECKED_COLUMNS = [
    "key", "split", "shard", "offset", "nbytes", "product_id", "sensor", "row", "col", "size", "gsd_m", "lon", "lat",
    "unit", "scale", "offset_value", "valid_fraction", "stored_mean", "stored_std", "stored_min", "stored_max",
]  # fmt: skip


@dataclass(frozen=True)
class Problem:
    """One thing that is not as it should be.

    Attributes:
        place: File, or shard, member and byte offset.
        what: What is wrong there.
    """

    place: str
    what: str


def manifest_problems(folder: Path, manifest: Manifest) -> Iterator[Problem]:
    """Yields what is wrong with the shard list: counts that disagree, shards it does not list.

    Raises:
        DataError: A shard name would leave the folder, or stands twice; nothing more can be checked then.
    """
    names = Counter(shard.name for shard in manifest.shards)
    for shard in manifest.shards:
        if Path(shard.name).name != shard.name or not shard.name.endswith(".tar") or names[shard.name] > 1:
            # Such a name must not be opened: the rest of the checks would leave the folder.
            raise DataError(
                "the manifest names a shard that cannot be one",
                seen=repr(shard.name),
                rule="a plain file name ending in .tar, listed once",
                fix="run momo prep again",
            )
    for split in sorted({*manifest.splits, *(shard.split for shard in manifest.shards)}):
        listed = sum(shard.samples for shard in manifest.shards if shard.split == split)
        if split not in SPLITS or listed != manifest.splits.get(split, 0):
            said = manifest.splits.get(split, 0)
            yield Problem("manifest.json", f"split {split!r} has {said} tiles, its shards {listed}")
    for path in sorted((folder / "shards").glob("*.tar")):
        if path.name not in names:
            yield Problem(f"shards/{path.name}", "the manifest does not list this shard")


def table_problems(folder: Path, manifest: Manifest) -> Iterator[Problem]:
    """Yields tables that are missing or whose hash is another."""
    for name in _TABLES:
        path = folder / name
        if not path.is_file():
            yield Problem(name, "the file is missing")
        elif name not in manifest.tables:
            yield Problem("manifest.json", f"it has no hash of {name}")
        elif (found := sha256_file(path)) != manifest.tables[name]:
            yield Problem(
                name, f"it was altered: sha256 {found[:12]}..., the manifest says {manifest.tables[name][:12]}..."
            )


def index_problems(folder: Path, manifest: Manifest) -> tuple[dict[str, list[int]], list[Problem]]:
    """Reads the index once, in bounded memory: 8 bytes a tile.

    Returns:
        The row groups that hold the rows of each shard, and what is wrong with the index as a whole.
    """
    groups: dict[str, list[int]] = {}
    problems: list[Problem] = []
    names = {shard.name for shard in manifest.shards}
    hashes: list[npt.NDArray[np.int64]] = []
    products: list[npt.NDArray[np.int64]] = []
    try:
        table = open_table(folder / "index.parquet", ["shard", "product_id"])
        if missing := [name for name in CHECKED_COLUMNS if name not in table.schema_arrow.names]:
            return {}, [Problem("index.parquet", f"columns are missing: {', '.join(missing)}")]
        for number in range(table.num_row_groups):
            rows = table.read_row_group(number, columns=["key", "shard", "product_id"])
            for shard in _distinct(rows["shard"]):
                groups.setdefault(str(shard), []).append(number)
            hashes.append(_hashes(rows["key"].to_pylist()))
            products.append(_hashes(_distinct(rows["product_id"])))
        problems += [
            Problem("index.parquet", f"rows of the shard {shard}, which the manifest does not list")
            for shard in sorted(set(groups) - names)
        ]
        if (again := _repeated(hashes)).size:
            problems += _repeated_values(table, "key", again)
        problems += _product_problems(folder, manifest, products)
    except (OSError, ValueError) as error:  # pyarrow's ArrowInvalid is a ValueError
        problems.append(Problem("index.parquet or products.parquet", f"it cannot be read: {one_line(error)}"))
    return groups, problems


def _product_problems(folder: Path, manifest: Manifest, used: list[npt.NDArray[np.int64]]) -> Iterator[Problem]:
    table = open_table(folder / "products.parquet")
    if table.metadata.num_rows != manifest.products:
        yield Problem("products.parquet", f"{table.metadata.num_rows} rows, the manifest says {manifest.products}")
    batches = table.iter_batches(columns=["product_id"])
    known = [_hashes(batch["product_id"].to_pylist()) for batch in batches]
    if (again := _repeated(known)).size:
        for problem in _repeated_values(table, "product_id", again):
            yield Problem("products.parquet", problem.what)
    wanted = np.unique(np.concatenate([*used, _NO_HASHES]))
    if (missing := wanted[~np.isin(wanted, np.concatenate([*known, _NO_HASHES]))]).size:
        index = open_table(folder / "index.parquet", ["product_id"])
        name = next(_values_with(index, "product_id", missing))
        yield Problem("products.parquet", f"{missing.size} products of the index are missing, for example {name}")


def open_table(path: Path, dictionaries: Sequence[str] = ()) -> Any:
    """Opens a parquet table; `dictionaries` names columns of few different values."""
    return require("pyarrow.parquet", "prep").ParquetFile(path, read_dictionary=list(dictionaries))


def _distinct(column: Any) -> list[Any]:
    values: list[Any] = column.unique().to_pylist()
    return values


def _hashes(values: Iterable[Any]) -> npt.NDArray[np.int64]:
    return np.fromiter((hash(value) for value in values), dtype=np.int64)


def _repeated(hashes: list[npt.NDArray[np.int64]]) -> npt.NDArray[np.int64]:
    ordered = np.sort(np.concatenate([*hashes, _NO_HASHES]))
    return ordered[1:][ordered[1:] == ordered[:-1]]


def _repeated_values(table: Any, column: str, hashes: npt.NDArray[np.int64]) -> list[Problem]:
    # Two values may share a hash, so the values themselves are counted.
    counts = Counter(_values_with(table, column, hashes))
    again = sorted(value for value, count in counts.items() if count > 1)
    return [Problem("index.parquet", f"{len(again)} values of {column} stand in it twice, {again[0]}")] if again else []


def _values_with(table: Any, column: str, hashes: npt.NDArray[np.int64]) -> Iterator[str]:
    wanted = set(hashes.tolist())
    for batch in table.iter_batches(columns=[column]):
        yield from (str(value) for value in batch[column].to_pylist() if hash(value) in wanted)


def statistics_problems(folder: Path, found: PixelStatistics) -> list[Problem]:
    """Returns where stats.json differs from the statistics of the decoded training tiles, by more than 1e-6."""
    try:
        said = dict(json.loads((folder / "stats.json").read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        return [Problem("stats.json", f"it cannot be read: {one_line(error)}")]
    std = float(np.sqrt(found.squares / max(1, found.count)))
    tolerance = 1e-6 * (std + abs(found.mean))
    measured = {"count": found.count, "mean": found.mean, "std": std, "min": found.low, "max": found.high}
    return [
        Problem("stats.json", f"{name} is {said.get(name)}, the training tiles give {value:.9g}")
        for name, value in measured.items()
        if not isinstance(said.get(name), (int, float)) or abs(said[name] - value) > tolerance * (name != "count")
    ]
