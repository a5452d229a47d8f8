"""From pieces to shards: the chosen tiles are copied, byte for byte, in the order of product, row and column.

A shard is a task of its own: it reads its tiles' rows and bytes from the pieces and gives back its rows of the index
and its share of the statistics. Shards come in any order and are used in theirs, so the corpus does not depend on the
number of workers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from momo.corpus_format import INDEX_COLUMNS, ShardEntry
from momo.extras import require

from .pieces import read_table, tile_key
from .shards import ShardFile, sample_meta
from .statistics import PixelStatistics, key_priority

_MEASURES = (
    "valid_fraction", "quality", "noise", "blur", "stripes", "saturation", "dead_lines", "stored_mean", "stored_std",
    "stored_min", "stored_max", "phash",
)  # fmt: skip


@dataclass(frozen=True)
class Part:
    """The tiles of one product that go into one shard.

    Attributes:
        piece: Piece folder.
        product_id: Of the product, unique.
        product_key: The same as tile keys have it.
        gsd_m: Metres a pixel of the tiles.
        scale: Physical value = stored value * scale + offset_value.
        offset_value: See `scale`.
        rows_N: Rows of the piece's table, ascending.
        units: Geologic unit of each.
        blocks: What decided the split of each.
    """

    piece: Path
    product_id: str
    product_key: str
    gsd_m: float
    scale: float
    offset_value: float
    rows_N: npt.NDArray[np.int64]
    units: list[str]
    blocks: list[str]


@dataclass(frozen=True)
class ShardPlan:
    """One shard to write."""

    folder: Path
    split: str
    number: int
    codec: str
    sensor: str
    tile_size: int
    parts: list[Part]


@dataclass(frozen=True)
class ShardDone:
    """A written shard.

    Attributes:
        entry: For the manifest.
        index: Its rows of the index, an Arrow table.
        moments: Valid pixels, mean and standard deviation of each tile, physical units, shape (N, 3).
        low: Smallest value.
        high: Largest value.
        samples: Priority and sampled values of each tile, physical units.
    """

    entry: ShardEntry
    index: Any
    moments: npt.NDArray[np.float64]
    low: float
    high: float
    samples: list[tuple[int, npt.NDArray[np.float64]]]


def write_shard(plan: ShardPlan) -> ShardDone:
    """Writes one shard; see `ShardDone`.

    Raises:
        DataError: A piece is damaged.
    """
    shard = ShardFile(plan.folder, plan.split, plan.number, plan.codec)
    tables, moments, samples = [], [], []
    low, high = np.inf, -np.inf
    for part in plan.parts:
        rows = read_table(part.piece).take(part.rows_N)
        columns = {name: rows[name].to_numpy() for name in (*_MEASURES, "row", "col", "lon", "lat", "cell")}
        keys = [tile_key(part.product_key, int(r), int(c)) for r, c in zip(columns["row"], columns["col"], strict=True)]
        places = _copy(shard, plan, part, rows, columns, keys)
        tables.append(_index_rows(plan, part, rows, columns, keys, places))
        physical = _physical(columns, part, plan.tile_size)
        moments.append(physical[:, :3])
        low, high = min(low, float(physical[:, 3].min())), max(high, float(physical[:, 4].max()))
        if plan.split == "train":
            samples += [
                (key_priority(key), np.asarray(values, dtype=np.float64) * part.scale + part.offset_value)
                for key, values in zip(keys, rows["sample"].to_pylist(), strict=True)
            ]
    entry = shard.close()
    index = require("pyarrow", "prep").concat_tables(tables)
    names = require("pyarrow", "prep").array([entry.name] * len(index))
    index = index.set_column(index.schema.get_field_index("shard"), "shard", names)
    return ShardDone(entry, index, np.concatenate(moments), low, high, samples)


def _copy(
    shard: ShardFile, plan: ShardPlan, part: Part, rows: Any, columns: dict[str, npt.NDArray[Any]], keys: list[str]
) -> list[tuple[int, int]]:
    sizes = {name: rows[name].to_numpy() for name in ("offset", "tile_bytes", "mask_bytes")}
    places = []
    with open(part.piece / "tiles.bin", "rb") as stream:
        for n, key in enumerate(keys):
            stream.seek(int(sizes["offset"][n]))
            tile = stream.read(int(sizes["tile_bytes"][n]))
            mask = stream.read(int(sizes["mask_bytes"][n])) if sizes["mask_bytes"][n] else None
            row = {
                "product_id": part.product_id, "row": int(columns["row"][n]), "col": int(columns["col"][n]),
                "gsd_m": part.gsd_m, "lon": float(columns["lon"][n]), "lat": float(columns["lat"][n]),
                "unit": part.units[n], "scale": part.scale, "offset_value": part.offset_value,
            }  # fmt: skip
            meta = sample_meta(row, key=key, sensor=plan.sensor, split=plan.split, size=plan.tile_size)
            places.append(shard.add(key, meta, tile, mask))
    return places


def _index_rows(
    plan: ShardPlan, part: Part, rows: Any, columns: dict[str, npt.NDArray[Any]], keys: list[str],
    places: list[tuple[int, int]],
) -> Any:  # fmt: skip
    arrow = require("pyarrow", "prep")
    count = len(keys)
    located = bool(np.isfinite(columns["lon"]).all())
    values: dict[str, Any] = {
        "key": keys, "split": [plan.split] * count, "shard": [""] * count, "offset": [place[0] for place in places],
        "nbytes": [place[1] for place in places], "product_id": [part.product_id] * count,
        "sensor": [plan.sensor] * count, "size": [plan.tile_size] * count, "gsd_m": [part.gsd_m] * count,
        "footprint": rows["corners"].cast(arrow.list_(arrow.float64())) if located else [None] * count,
        "block": part.blocks, "unit": part.units, "scale": [part.scale] * count,
        "offset_value": [part.offset_value] * count,
    }  # fmt: skip
    for name in (*_MEASURES, "row", "col", "lon", "lat", "cell"):
        values[name] = columns[name]
    types = {"list<double>": arrow.list_(arrow.float64())}
    arrays, fields = [], []
    for name, (kind, _) in INDEX_COLUMNS.items():
        type_ = types.get(kind) or arrow.type_for_alias(kind)
        value = values[name]
        arrays.append(value.cast(type_) if isinstance(value, arrow.ChunkedArray) else arrow.array(value, type_))
        fields.append(arrow.field(name, type_))
    return arrow.table(arrays, schema=arrow.schema(fields))


def _physical(columns: dict[str, npt.NDArray[Any]], part: Part, size: int) -> npt.NDArray[np.float64]:
    """Returns count, mean, std, low and high of each tile in physical units, shape (N, 5)."""
    count = np.rint(columns["valid_fraction"] * size * size)
    mean = columns["stored_mean"] * part.scale + part.offset_value
    ends = np.stack([columns[name] * part.scale + part.offset_value for name in ("stored_min", "stored_max")])
    std = columns["stored_std"] * abs(part.scale)
    return np.stack([count, mean, std, ends.min(axis=0), ends.max(axis=0)], axis=1)


def in_order(results: Iterator[tuple[int, Any]], count: int) -> Iterator[Any]:
    """Yields results by position although they come in any order; holds only those that came too early."""
    early: dict[int, Any] = {}
    position = 0
    for place, result in results:
        early[place] = result
        while position in early:
            yield early.pop(position)
            position += 1
    assert position == count, f"{count - position} results did not come"


def add_statistics(statistics: PixelStatistics, shard: ShardDone) -> None:
    """Adds a training shard to the statistics of the corpus."""
    if shard.entry.split != "train":
        return
    count, mean, std = shard.moments.T
    statistics.add(count.astype(np.int64), mean, std, shard.low, shard.high)
    for priority, values in shard.samples:
        statistics.offer(priority, values)


def chunks(indices_N: npt.NDArray[np.int64], size: int) -> Sequence[npt.NDArray[np.int64]]:
    """Cuts tile numbers into shards of `size` tiles, the last one shorter."""
    return [indices_N[start : start + size] for start in range(0, len(indices_N), size)]
