"""Validation curves from files, for runs that momo did not make.

CSV, with a header line; `val_stderr` may be empty or left out:

    checkpoint,samples,val_loss,val_stderr
    ctx-1.safetensors,100000,0.61,0.004

JSON, the same as a list of objects, or with what is known of the run:

    {"sensor": "CTX", "base": {"path": "base", "sha256": "..."}, "protocol": "...", "checkpoints": [{...}, ...]}

The sensor is the one named, else the file's stem. Paths are relative to the file.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from momo.errors import MergeError
from momo.sensors import SENSORS

from .curves import Curve, Point

NEEDED = ("checkpoint", "samples", "val_loss")
COLUMNS = (*NEEDED, "val_stderr")
_JSON_KEYS = ("sensor", "base", "protocol", "checkpoints")
_SHOWN = 8


def read_curve_file(path: Path) -> Curve:
    """Reads a curve from a CSV or JSON file.

    Raises:
        MergeError: The file is missing, empty or damaged; every damaged row is named.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise MergeError("the curve file does not exist", seen=path, fix="check the path in runs=[...]") from None
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from None
    head, rows, damaged = (_read_json if path.suffix.lower() == ".json" else _read_csv)(path, text)
    base = _base(path, head.get("base"))
    sensor, protocol = (_text(path, head, key) for key in ("sensor", "protocol"))
    points = _points(path, rows, damaged, protocol, base.get("sha256"))
    by_lower = {known.lower(): known for known in SENSORS}
    sensor = sensor or by_lower.get(path.stem.lower(), path.stem)
    unknown = sorted({str(key) for _, row in rows for key in row if key not in COLUMNS})
    return Curve(
        name=sensor,
        sensor=sensor,
        place=path,
        points=points,
        smoothed=tuple(point.loss for point in points),
        base_path=str(path.parent / base["path"]) if "path" in base else None,
        notes=(f"{path.name}: columns left out: {', '.join(unknown)}.",) if unknown else (),
    )


# Rows with where they stand, and what is wrong with rows that cannot be taken apart, by where they stand.
_Rows = list[tuple[str, dict[str, Any]]]
_Damaged = dict[str, str]


def _read_csv(path: Path, text: str) -> tuple[dict[str, Any], _Rows, _Damaged]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: _Rows = []
    damaged: _Damaged = {}
    header: list[str] = []
    try:
        for cells in reader:
            cells = [cell.strip() for cell in cells]
            if not any(cells):
                continue
            if not header:
                header = cells
                _check_header(path, header)
            elif len(cells) != len(header):
                damaged[f"line {reader.line_num}"] = f"{len(cells)} cells, not {len(header)}"
            else:
                rows.append((f"line {reader.line_num}", dict(zip(header, cells, strict=True))))
    except csv.Error as error:
        damaged[f"line {reader.line_num}"] = str(error)
    if not header:
        _check_header(path, header)
    return {}, rows, damaged


def _check_header(path: Path, header: list[str]) -> None:
    missing = [name for name in NEEDED if name not in header]
    twice = sorted({name for name in header if header.count(name) > 1})
    if missing or twice:
        raise MergeError(
            "the header of a curve file does not fit",
            seen=f"{path}: {', '.join(header)[:200] or 'empty file'}",
            rule=f"columns {', '.join(COLUMNS)}, each once; val_stderr may be left out",
            fix=f"{'add ' + ', '.join(missing) if missing else 'keep one column ' + ', '.join(twice)}",
        )


def _read_json(path: Path, text: str) -> tuple[dict[str, Any], _Rows, _Damaged]:
    try:
        stored = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _unreadable(path, error) from None
    head = stored if isinstance(stored, dict) else {"checkpoints": stored}
    entries = head.get("checkpoints")
    unknown = [key for key in head if key not in _JSON_KEYS]
    if not isinstance(entries, list) or unknown:
        raise MergeError(
            "the curve file has another layout",
            seen=f"{path}: {'unknown keys ' + ', '.join(unknown) if unknown else 'no list of checkpoints'}",
            rule=f"a list of objects, or an object with {', '.join(_JSON_KEYS)}",
        )
    rows: _Rows = []
    damaged: _Damaged = {}
    for number, entry in enumerate(entries, start=1):
        missing = [key for key in NEEDED if key not in entry] if isinstance(entry, dict) else []
        if not isinstance(entry, dict) or missing:
            what = f"lacks {', '.join(missing)}" if missing else f"is {type(entry).__name__}, not an object"
            damaged[f"entry {number}"] = what
        else:
            rows.append((f"entry {number}", entry))
    return head, rows, damaged


def _points(
    path: Path, rows: _Rows, damaged: _Damaged, protocol: str | None, base_sha256: str | None
) -> tuple[Point, ...]:
    points: list[Point] = []
    first_with: dict[int, str] = {}
    for where, row in rows:
        try:
            point = Point(
                checkpoint=path.parent / _name(row["checkpoint"]),
                samples=_samples(row["samples"]),
                loss=_number("val_loss", row["val_loss"]),
                stderr=_stderr(row.get("val_stderr")),
                protocol=protocol,
                base_sha256=base_sha256,
            )
        except ValueError as error:
            damaged[where] = str(error)
            continue
        if point.samples in first_with:
            damaged[where] = f"samples {point.samples} stand in {first_with[point.samples]} too"
        first_with.setdefault(point.samples, where)
        points.append(point)
    if damaged:
        raise _damaged(path, damaged)
    if not points:
        raise MergeError("the curve file holds no checkpoint", seen=path, rule="one row or more below the header")
    return tuple(sorted(points, key=lambda point: point.samples))


def _name(value: Any) -> str:
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise ValueError(f"checkpoint {value!r} is no path")
    return value


def _number(key: str, value: Any) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{key} {value!r} is no finite number")
    return number


def _samples(value: Any) -> int:
    number = _number("samples", value)
    if number < 1 or number != int(number):
        raise ValueError(f"samples {value!r} is no whole number of 1 or more")
    return int(number)


def _stderr(value: Any) -> float | None:
    if value is None or value == "":
        return None
    number = _number("val_stderr", value)
    if number < 0:
        raise ValueError(f"val_stderr {value!r} is below 0")
    return number


def _text(path: Path, head: dict[str, Any], key: str) -> str | None:
    value = head.get(key)
    if value is not None and (not isinstance(value, str) or not value.strip()):
        raise MergeError("a key of the curve file does not fit", seen=f"{path}: {key} {value!r}", rule="a text")
    return value


def _base(path: Path, base: Any) -> dict[str, str]:
    if base is None:
        return {}
    known: Iterable[Any] = base if isinstance(base, dict) else ()
    good = isinstance(base, dict) and set(known) <= {"path", "sha256"} and bool(base)
    if not good or not all(isinstance(value, str) and value for value in base.values()):
        raise MergeError(
            "a key of the curve file does not fit",
            seen=f"{path}: base {base!r}",
            rule="base has a path, a sha256, or both, as texts",
        )
    return dict(base)


def _damaged(path: Path, damaged: _Damaged) -> MergeError:
    places = sorted(damaged, key=lambda place: int(place.split()[1]))
    shown = "; ".join(f"{place}: {damaged[place]}" for place in places[:_SHOWN])
    if len(places) > _SHOWN:
        shown += f"; the like in {', '.join(places[_SHOWN:])}"
    return MergeError(
        "a curve file has damaged rows",
        seen=f"{path}: {shown}",
        rule=f"{', '.join(COLUMNS)}: a path, a whole number, a finite number, a number of 0 or more or nothing",
        fix="correct or remove them",
    )


def _unreadable(path: Path, error: Exception) -> MergeError:
    reason = " ".join(str(error).split())
    return MergeError(
        "the curve file cannot be read", seen=f"{path}: {reason}", rule="it is a CSV or JSON file in UTF-8"
    )
