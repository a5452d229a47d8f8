"""The tables and JSON files beside the images of a labelled dataset."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from momo.errors import DataError


def read_csv(path: Path, columns: Iterable[str]) -> list[tuple[int, dict[str, str]]]:
    """Reads a CSV file as (line number, row); raises DataError when it is unreadable or lacks one of the columns."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            rows = [(reader.line_num, row) for row in reader]
            header = reader.fieldnames or []
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError("a table of the dataset cannot be read", seen=f"{path}: {error}", rule="CSV in UTF-8") from None
    absent = [column for column in columns if column not in header]
    if absent:
        raise DataError(
            "a table of the dataset lacks a column",
            seen=f"{', '.join(absent)} in {path}",
            rule=f"it has {', '.join(columns)}",
            fix="download the file again",
        )
    return rows


def read_mapping(root: Path) -> list[str] | None:
    """Reads the class names of `mapping.json` in index order, or None without that file."""
    path = root / "mapping.json"
    if not path.is_file():
        return None
    mapping = read_json(path)
    if isinstance(mapping, list):
        mapping = {str(index): name for index, name in enumerate(mapping)}
    try:
        names = {int(index): name for index, name in mapping.items()}
        if sorted(names) != list(range(len(names))) or not names:
            raise ValueError(f"indices {sorted(names)}")
    except (AttributeError, ValueError) as error:
        raise DataError(
            "the class mapping cannot be read",
            seen=f"{path}: {error}",
            rule='{"0": "name", "1": ...} without gaps, or a list of names',
        ) from None
    return [str(names[i][0] if isinstance(names[i], list) else names[i]) for i in range(len(names))]


def read_info(root: Path) -> dict[str, Any]:
    """Reads `dataset.json`; empty without that file."""
    path = root / "dataset.json"
    info = read_json(path) if path.is_file() else {}
    if not isinstance(info, dict):
        raise DataError(
            "dataset.json is not a mapping", seen=path, rule="keys such as synthetic, sensor, gsd_m, licence"
        )
    return info


def read_json(path: Path) -> Any:
    """Reads a JSON file; raises DataError naming it when it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError("a file of the dataset is not JSON", seen=f"{path}: {error}") from None
