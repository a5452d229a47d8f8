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

_MAX_LISTED = 20


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
        damaged: Products cut only in part, with the reason; the first ones.
        damaged_count: How many those are.
        resampled: Products that were resampled.
        notes: Products by trap that was met and mended.
    """

    count: int = 0
    first: list[dict[str, Any]] = field(default_factory=list)
    licences: Counter[str] = field(default_factory=Counter)
    tiles: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    years: tuple[Floats, Floats] = field(default_factory=lambda: (np.zeros(0), np.zeros(0)))
    incidence: tuple[Floats, Floats] = field(default_factory=lambda: (np.zeros(0), np.zeros(0)))
    damaged: list[tuple[str, str]] = field(default_factory=list)
    damaged_count: int = 0
    resampled: int = 0
    notes: Counter[str] = field(default_factory=Counter)


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
    columns = ["product_id", "tiles", "licence", "acquired", "incidence_deg", "damage", "kernel", "notes"]
    for_list = ["source", "instrument", "gsd_m", "width", "height", "crs", "sha256"]
    try:
        table = parquet.ParquetFile(file)
        found.count = table.metadata.num_rows
        if missing := [name for name in [*columns, *for_list] if name not in table.schema_arrow.names]:
            raise KeyError(f"it lacks {', '.join(missing)}")
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
            _add_damage(found, batch["product_id"].to_pylist(), batch["damage"].to_pylist())
            found.notes.update(note for text in batch["notes"].to_pylist() for note in json.loads(text or "[]"))
            found.resampled += sum(bool(text) for text in batch["kernel"].to_pylist())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            "the table of products cannot be read", seen=f"{file}: {error}", fix="run momo prep verify"
        ) from None
    found.tiles = np.concatenate(tiles).astype(np.int64)
    found.years, found.incidence = (_pair(np.concatenate(parts)) for parts in (years, incidence))
    return found


def _add_damage(found: Products, names: list[str], reasons: list[str | None]) -> None:
    damaged = [(name, reason) for name, reason in zip(names, reasons, strict=True) if reason]
    found.damaged_count += len(damaged)
    found.damaged = (found.damaged + damaged)[:_MAX_LISTED]


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


@dataclass(frozen=True)
class LeftOut:
    """What report.json says of windows that did not become tiles, and of products that gave none.

    Attributes:
        windows: Windows looked at.
        reasons: (stage, reason, windows), largest first within its stage.
        duplicates: Tiles removed by overlap and by hash; None for a rule that was off or never ran.
        duplicate_examples: (tile, kept tile, why, value).
        leakage: Given footprints, footprints touched, tiles on them; None when none were given.
        leakage_examples: (tile, footprint, share).
        split: How the split was made: `by`, `order`, `seed`, `val_fraction`, `blocks`; empty when unknown.
        ground_check: Tiles compared (train, val) and training tiles dropped over validation ground; None if not done.
        strata: `by`, `plan`, `seed`, `strata`, `table`; empty without a sampling plan.
        notes: Lines of planning.
        failures: (source, reason).
    """

    windows: int = 0
    reasons: list[tuple[str, str, int]] = field(default_factory=list)
    duplicates: tuple[int | None, int | None] = (None, None)
    duplicate_examples: list[tuple[str, ...]] = field(default_factory=list)
    leakage: tuple[int, int, int] | None = None
    leakage_examples: list[tuple[str, ...]] = field(default_factory=list)
    split: dict[str, Any] = field(default_factory=dict)
    ground_check: tuple[int, int, int] | None = None
    strata: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    failures: list[tuple[str, str]] = field(default_factory=list)


def read_left_out(path: Path) -> LeftOut | None:
    """Reads report.json, or returns None when there is none.

    Args:
        path: The corpus folder.

    Raises:
        DataError: It is not what prep writes.
    """
    file = path / "report.json"
    if not file.is_file():
        return None
    try:
        return _left_out(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(
            "report.json cannot be read",
            seen=f"{file}: {type(error).__name__}: {error}",
            rule="a JSON object as momo prep writes it",
            fix="run momo prep again, or remove the file to leave that part of the card empty",
        ) from None


def _left_out(report: dict[str, Any]) -> LeftOut:
    reasons = []
    for stage, words in (("cutting", "while cutting"), ("planning", "while planning")):
        dropped = report.get(stage, {}).get("dropped", {})
        ranked = sorted(dropped.items(), key=lambda item: (-int(item[1]), item[0]))
        reasons += [(words, str(reason), int(count)) for reason, count in ranked]
    duplicates, leakage, ground = (report.get(name) for name in ("duplicates", "leakage", "ground_check"))
    strata = dict(report.get("strata", {}))
    if strata:
        names = ("available", "taken", "train", "val")
        strata["table"] = [(str(row["name"]), *(int(row[name]) for name in names)) for row in strata["table"]]
        strata |= {"by": str(strata["by"]), "plan": str(strata["plan"]), "strata": int(strata["strata"])}
    return LeftOut(
        windows=int(report.get("cutting", {}).get("windows", 0)),
        reasons=reasons,
        duplicates=(_count(duplicates["overlap"]), _count(duplicates["hash"])) if duplicates else (None, None),
        duplicate_examples=_texts(duplicates),
        leakage=_whole(leakage, "footprints", "touched_footprints", "tiles"),
        leakage_examples=_texts(leakage),
        split=_split(dict(report.get("split", {}))),
        ground_check=_whole(ground, "train_tiles", "val_tiles", "dropped"),
        strata=strata,
        notes=[str(note) for note in report.get("notes", [])],
        failures=[(str(failure["source"]), str(failure["reason"])) for failure in report.get("failures", [])],
    )


def _count(value: Any) -> int | None:
    return None if value is None else int(value)


def _split(fields: dict[str, Any]) -> dict[str, Any]:
    kinds = {"by": str, "order": int, "seed": int, "val_fraction": float, "blocks": int}
    return {name: kind(fields[name]) for name, kind in kinds.items()} if fields else {}


def _whole(fields: dict[str, Any] | None, *names: str) -> Any:
    return tuple(int(fields[name]) for name in names) if fields else None


def _texts(fields: dict[str, Any] | None) -> list[tuple[str, ...]]:
    return [tuple(str(value) for value in example) for example in (fields or {}).get("examples", [])]
