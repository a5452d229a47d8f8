"""Sources, licences and the report of prep, for the data card."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from momo.errors import DataError
from momo.extras import require

from .describe_numbers import Floats, column_floats


@dataclass
class Products:
    """What products.parquet says.

    Attributes:
        count: Number of products.
        first: Rows of the first ones.
        licences: Products by licence.
        tiles: Tiles of each product.
        years: Decimal year of acquisition and tiles, for the products that say it.
        incidence: Solar incidence angle in degrees and tiles, for the products that say it.
        damaged: Products cut only in part.
        resampled: Products that were resampled.
    """

    count: int = 0
    first: list[dict[str, Any]] = field(default_factory=list)
    licences: Counter[str] = field(default_factory=Counter)
    tiles: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    years: tuple[Floats, Floats] = field(default_factory=lambda: (np.zeros(0), np.zeros(0)))
    incidence: tuple[Floats, Floats] = field(default_factory=lambda: (np.zeros(0), np.zeros(0)))
    damaged: int = 0
    resampled: int = 0


def read_products(path: Path, shown: int) -> Products:
    """Reads products.parquet batch by batch.

    Args:
        path: The corpus folder.
        shown: Products to keep whole.

    Raises:
        DataError: The table is missing or cannot be read.
    """
    parquet = require("pyarrow.parquet", "prep")
    file, found = path / "products.parquet", Products()
    tiles, years, incidence = [np.zeros(0)], [np.zeros((0, 2))], [np.zeros((0, 2))]
    columns = ["tiles", "licence", "acquired", "incidence_deg", "damage", "kernel"]
    try:
        table = parquet.ParquetFile(file)
        found.count = table.metadata.num_rows
        for batch in table.iter_batches(batch_size=shown):
            found.first = batch.to_pylist()
            break
        for batch in table.iter_batches(batch_size=1 << 16, columns=columns):
            number = np.nan_to_num(column_floats(batch["tiles"]))
            tiles.append(number)
            found.licences.update(text or "unknown" for text in batch["licence"].to_pylist())
            year = np.array([decimal_year(text or "") for text in batch["acquired"].to_pylist()])
            years.append(np.stack([year, number], axis=1)[np.isfinite(year)])
            angle = column_floats(batch["incidence_deg"])
            incidence.append(np.stack([angle, number], axis=1)[np.isfinite(angle)])
            found.damaged += sum(bool(text) for text in batch["damage"].to_pylist())
            found.resampled += sum(bool(text) for text in batch["kernel"].to_pylist())
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            "the table of products cannot be read", seen=f"{file}: {error}", fix="run momo prep verify"
        ) from None
    found.tiles = np.concatenate(tiles).astype(np.int64)
    found.years, found.incidence = (_pair(np.concatenate(parts)) for parts in (years, incidence))
    return found


def _pair(table_N2: Floats) -> tuple[Floats, Floats]:
    return table_N2[:, 0], table_N2[:, 1]


def decimal_year(acquired: str) -> float:
    """Returns an ISO 8601 time (a date, or year and day of year) as a decimal year, or NaN when it is none."""
    try:
        if len(acquired) >= 8 and acquired[4] == "-" and acquired[5:8].isdigit():
            return int(acquired[:4]) + (int(acquired[5:8]) - 1) / 366.0
        day = np.datetime64(acquired[:10], "D")
    except ValueError:
        return math.nan
    if np.isnat(day):
        return math.nan
    year = day.astype("datetime64[Y]")
    return float(year.astype(np.int64)) + 1970 + float((day - year.astype("datetime64[D]")).astype(np.int64)) / 366.0


def read_report(path: Path) -> dict[str, Any] | None:
    """Returns report.json, or None when there is none.

    Raises:
        DataError: It is no JSON object.
    """
    file = path / "report.json"
    if not file.is_file():
        return None
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError("report.json cannot be read", seen=f"{file}: {error}", fix="run momo prep again") from None
    if not isinstance(report, dict):
        raise DataError("report.json cannot be read", seen=f"{file}: a {type(report).__name__}", rule="a JSON object")
    return report
