"""A PIECE: everything cut from one product, in the work folder, before anything is decided about the whole corpus.

<work>/pieces/<id>/
    tiles.bin      encoded tiles and masks, one after another
    table.arrow    one row a tile: place, footprint, cells, measures, position in tiles.bin
    piece.json     windows, what was dropped and why, stretch, percentiles, damage, example thumbnails

A piece depends on the product and the cutting settings alone; its name is their hash, so a finished product is found
again whatever else changes, and is never cut twice.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from momo.errors import DataError
from momo.extras import require
from momo.files import write_json
from momo.version import __version__

from .contact_sheet import Example
from .products import Product

_VERSION = 1
# Column -> Arrow type. The names of measures are those of the index.
_COLUMNS = {
    "row": "int32", "col": "int32", "lon": "float64", "lat": "float64", "corners": "corners", "cell": "int64",
    "touched": "cells", "offset": "int64", "tile_bytes": "int32", "mask_bytes": "int32", "valid_fraction": "float64",
    "quality": "float64", "noise": "float64", "blur": "float64", "stripes": "float64", "saturation": "float64",
    "dead_lines": "int64", "stored_mean": "float64", "stored_std": "float64", "stored_min": "int64",
    "stored_max": "int64", "phash": "uint64", "sample": "values",
}  # fmt: skip


@dataclass(frozen=True)
class CutSettings:
    """What decides how a product is cut, the product's own settings aside.

    Attributes:
        tile_size: Side of a tile, pixels.
        step: Step between tiles, pixels.
        quality: Limits, the fields of `QualityConfig`.
        codec: Codec of the tiles.
        dtype: Stored type, `uint8` or `uint16`.
        order: HEALPix order of the cells; -1 when no product has a CRS.
        pixel_block: Side of a split block in products without a CRS, pixels.
    """

    tile_size: int
    step: int
    quality: dict[str, Any]
    codec: str
    dtype: str
    order: int
    pixel_block: int


def piece_id(product: Product, settings: CutSettings) -> str:
    """Returns the name of a product's piece; ids and licences are given later and do not count."""
    plain = dataclasses.replace(product, product_id="", licence="")
    text = f"{_VERSION} {__version__} {product.source.identity()} {plain!r} {settings!r}"
    return hashlib.sha256(text.encode()).hexdigest()[:24]


@dataclass
class PieceInfo:
    """What `piece.json` says.

    Attributes:
        tiles: Tiles in the piece.
        windows: Windows looked at.
        dropped: Windows that gave no tile, by reason.
        bytes_read: Pixel bytes of the product.
        sha256: Hash of the product's files, "" when remote.
        scale: Physical value = stored value * scale + offset_value.
        offset_value: See `scale`.
        max_rounding_error: Largest error of storing, physical units.
        percentile_low: 1st percentile of the valid pixels of its tiles, physical units; None without a tile.
        percentile_high: 99th percentile.
        mean: Mean of the valid pixels of its tiles, physical units.
        damage: Why it was cut only in part, else "".
        notes: Lines for the user.
        examples: Thumbnails for the contact sheet.
    """

    tiles: int = 0
    windows: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    bytes_read: int = 0
    sha256: str = ""
    scale: float = 1.0
    offset_value: float = 0.0
    max_rounding_error: float = 0.0
    percentile_low: float | None = None
    percentile_high: float | None = None
    mean: float | None = None
    damage: str = ""
    notes: list[str] = field(default_factory=list)
    examples: list[dict[str, Any]] = field(default_factory=list)


class PieceTable:
    """Collects the rows of `table.arrow`."""

    def __init__(self) -> None:
        self._columns: dict[str, list[Any]] = {name: [] for name in _COLUMNS}

    def add(self, row: dict[str, Any]) -> None:
        """Appends one row with every column of the table."""
        for name, column in self._columns.items():
            column.append(row[name])

    def write(self, path: Path) -> None:
        """Writes the table as an Arrow file."""
        arrow = require("pyarrow", "prep")
        schema = _schema(arrow)
        table = arrow.table({name: arrow.array(self._columns[name], schema.field(name).type) for name in _COLUMNS})
        with require("pyarrow.ipc", "prep").new_file(str(path), schema) as writer:
            writer.write_table(table.cast(schema))


def _schema(arrow: Any) -> Any:
    types = {
        "corners": arrow.list_(arrow.float64(), 8),
        "cells": arrow.list_(arrow.int64()),
        "values": arrow.list_(arrow.uint16()),
    }
    return arrow.schema((name, types.get(kind) or arrow.type_for_alias(kind)) for name, kind in _COLUMNS.items())


def read_table(folder: Path, columns: list[str] | None = None) -> Any:
    """Returns the table of a piece, memory-mapped.

    Args:
        folder: The piece.
        columns: Column names; all when None.

    Raises:
        DataError: The file is missing or damaged.
    """
    arrow, ipc = require("pyarrow", "prep"), require("pyarrow.ipc", "prep")
    path = folder / "table.arrow"
    try:
        with arrow.memory_map(str(path)) as stream:
            table = ipc.open_file(stream).read_all()
            return table.select(columns) if columns else table
    except (OSError, arrow.ArrowInvalid) as error:
        raise _damaged(path, error) from None


def write_info(folder: Path, info: PieceInfo) -> None:
    """Writes `piece.json`, the last file of a piece."""
    write_json(folder / "piece.json", dataclasses.asdict(info))


def read_info(folder: Path) -> PieceInfo | None:
    """Returns what `piece.json` says, or None when the piece was not finished.

    Raises:
        DataError: It is damaged.
    """
    path = folder / "piece.json"
    try:
        return PieceInfo(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> DataError:
    return DataError(
        "a finished product in the work folder is damaged",
        seen=f"{path}: {' '.join(str(error).split())}",
        fix=f"remove {path.parent} and start the same command again",
    )


def example_to_dict(example: Example, row: int, col: int) -> dict[str, Any]:
    """Returns an example as JSON values; the key is given when the product's id is known."""
    return {
        "reason": example.reason,
        "row": row,
        "col": col,
        "note": example.note,
        "shape": list(example.thumb_HW.shape),
        "thumb": base64.b64encode(np.ascontiguousarray(example.thumb_HW).tobytes()).decode(),
        "valid": base64.b64encode(np.packbits(example.valid_HW).tobytes()).decode(),
    }


def examples_of(info: PieceInfo, product_key: str) -> Iterator[Example]:
    """Yields the examples of a piece with their keys."""
    for item in info.examples:
        shape = tuple(item["shape"])
        bits = np.frombuffer(base64.b64decode(item["valid"]), dtype=np.uint8)
        yield Example(
            reason=item["reason"],
            key=tile_key(product_key, item["row"], item["col"]),
            thumb_HW=np.frombuffer(base64.b64decode(item["thumb"]), dtype=np.uint8).reshape(shape),
            valid_HW=np.unpackbits(bits, count=shape[0] * shape[1]).astype(bool).reshape(shape),
            note=item["note"],
        )


def tile_key(product_key: str, row: int, col: int) -> str:
    """Returns the key of a tile."""
    return f"{product_key}_r{row:06d}_c{col:06d}"


def packed(values: npt.NDArray[Any]) -> list[int]:
    """Returns sampled stored values as the table holds them."""
    return [int(value) for value in values]
