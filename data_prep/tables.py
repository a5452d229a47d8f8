"""Between pieces and corpus: the table of all tiles, products.parquet, report.json and the contact sheet."""

from __future__ import annotations

import heapq
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from momo.corpus_format import PRODUCT_COLUMNS

from .config import PrepConfig
from .contact_sheet import Example, draw_contact_sheet
from .pieces import PieceInfo, examples_of, read_table
from .planning import Plan, TileTable
from .products import Product
from .shards import TableFile
from .statistics import key_priority
from .tiling import KEPT

_SHEET_EXAMPLES = 12


@dataclass(frozen=True)
class Ready:
    """A product whose piece is finished."""

    product: Product
    folder: Path
    info: PieceInfo


def tile_table(ready: Sequence[Ready], config: PrepConfig) -> TileTable:
    """Returns the columns that planning needs, of all tiles in order of product, row and column."""
    names = ["row", "col", "lon", "lat", "corners", "cell", "touched", "phash", "quality"]
    columns: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in names}
    lengths = []
    for item in ready:
        table = read_table(item.folder, names).combine_chunks()
        for name in names:
            column = table[name]
            array = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
            if name == "corners":
                columns[name].append(array.flatten().to_numpy().reshape(-1, 8))
            elif name == "touched":
                lengths.append(np.diff(array.offsets.to_numpy()))
                columns[name].append(array.flatten().to_numpy())
            else:
                columns[name].append(array.to_numpy())
    product_N = np.repeat(np.arange(len(ready), dtype=np.int32), [item.info.tiles for item in ready])
    joined = {name: np.concatenate(parts) for name, parts in columns.items()}
    return TileTable(
        product_ids=[item.product.key for item in ready],
        product_N=product_N,
        row_N=joined["row"],
        col_N=joined["col"],
        size=config.tile_size,
        lon_N=joined["lon"],
        lat_N=joined["lat"],
        corners_N8=joined["corners"],
        cell_N=joined["cell"],
        touched=joined["touched"],
        start_N1=np.concatenate([[0], np.cumsum(np.concatenate(lengths))]).astype(np.int64),
        phash_N=joined["phash"],
        gsd_N=np.array([item.product.gsd_m for item in ready])[product_N],
        quality_N=joined["quality"],
    )


def write_products(path: Path, ready: Sequence[Ready], tiles: npt.NDArray[np.int64]) -> None:
    """Writes products.parquet.

    Args:
        path: The file.
        ready: The products.
        tiles: Tiles of each in the corpus.
    """
    table = TableFile(path, PRODUCT_COLUMNS)
    for item, count in zip(ready, tiles, strict=True):
        product, info, seen = item.product, item.info, item.product.observation
        table.add({
            "product_id": product.product_id, "source": product.source.display, "sha256": info.sha256,
            "tiles": int(count), "licence": product.licence, "driver": product.driver,
            "instrument": product.instrument, "band": product.band, "dtype": product.dtype, "width": product.width,
            "height": product.height, "gsd_m": product.gsd_m, "native_gsd_m": product.native_gsd_m,
            "kernel": product.resampling.kernel if product.resampling else "", "crs": product.georeference.name,
            "crs_wkt": product.georeference.wkt, "acquired": seen.acquired, "incidence_deg": seen.incidence_deg,
            "emission_deg": seen.emission_deg, "phase_deg": seen.phase_deg,
            "sub_solar_azimuth_deg": seen.sub_solar_azimuth_deg, "scale": info.scale,
            "offset_value": info.offset_value, "max_rounding_error": info.max_rounding_error,
            "mean": math.nan if info.mean is None else info.mean,
            "percentile_low": math.nan if info.percentile_low is None else info.percentile_low,
            "percentile_high": math.nan if info.percentile_high is None else info.percentile_high,
            "windows": info.windows, "dropped": json.dumps(info.dropped), "notes": json.dumps(info.notes),
            "damage": info.damage,
        })  # fmt: skip
    table.close()


def contact_sheet(path: Path, ready: Sequence[Ready], plan: Plan, sensor: str) -> None:
    """Draws examples of kept and dropped windows with the number of each reason."""
    chosen: dict[str, list[tuple[int, str, Example]]] = {}
    counts: Counter[str] = Counter()
    for item in ready:
        counts.update(item.info.dropped)
        for example in examples_of(item.info, item.product.key):
            heap = chosen.setdefault(example.reason, [])
            entry = (-key_priority(example.key), example.key, example)
            if len(heap) < _SHEET_EXAMPLES:
                heapq.heappush(heap, entry)
            else:
                heapq.heappushpop(heap, entry)
    counts[KEPT] = sum(item.info.tiles for item in ready)
    examples = [entry[2] for reason in chosen for entry in sorted(chosen[reason])]
    title = f"{sensor}: windows kept and dropped while cutting, {sum(counts.values())} in all"
    draw_contact_sheet(examples, counts, path, per_reason=_SHEET_EXAMPLES, title=title)


def report_file(ready: Sequence[Ready], plan: Plan, failures: Sequence[dict[str, str]]) -> dict[str, Any]:
    """Returns the content of report.json: what was dropped while cutting, and what planning decided."""
    dropped: Counter[str] = Counter()
    for item in ready:
        dropped.update(item.info.dropped)
    cutting = {
        "windows": sum(item.info.windows for item in ready),
        "good": sum(item.info.tiles for item in ready),
        "dropped": dict(sorted(dropped.items())),
    }
    return {"cutting": cutting, **plan.report, "failures": list(failures)}
