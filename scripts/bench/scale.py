"""Plans and writes a corpus at 1/100 of 12 million tiles, and at half of that: what grows faster than the tiles?

python scripts/bench/scale.py                 120,000 tiles
python scripts/bench/scale.py tiles=30000

The pieces are generated (no pixels are cut: `scripts/bench/prep.py` times that) with 8 px tiles, realistic footprints,
repeated coverage and cells, so that planning, assembling, index, manifest and reading back are exercised as they are.
Each size runs in a process of its own; the last column is the straight line through both, at 12 million tiles.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from prep import peak_mb

from momo.codecs import encode_tile
from momo.config import config_from_dict
from momo.corpus import Corpus
from momo.data_prep import cluster, run
from momo.data_prep.config import PrepConfig
from momo.data_prep.georeference import MARS_RADIUS_M, Georeference
from momo.data_prep.observation import Observation
from momo.data_prep.pieces import PieceInfo, PieceTable, write_info
from momo.data_prep.planning import make_plan
from momo.data_prep.products import Product, Validity
from momo.data_prep.sources import Source
from momo.data_prep.split import cell_order, place_windows
from momo.data_prep.tables import Ready, tile_table

SETTINGS = {"tiles": 120_000}
TILE, ACROSS, DOWN, GSD_M = 8, 20, 50, 5.0  # windows of a product: 1,000
TARGET = 12_000_000
WKT = (
    'PROJCS["Mars equirectangular",GEOGCS["Mars",DATUM["Mars",SPHEROID["Mars",3396190,0]],PRIMEM["R",0],'
    'UNIT["degree",0.0174532925199433]],PROJECTION["Equirectangular"],PARAMETER["latitude_of_origin",0],'
    'PARAMETER["central_meridian",0],PARAMETER["standard_parallel_1",0],UNIT["metre",1]]'
)
MEASURES = {
    "valid_fraction": 1.0, "noise": 0.1, "blur": 0.3, "stripes": 0.0, "saturation": 0.0, "dead_lines": 0,
    "stored_mean": 100.0, "stored_std": 9.0, "stored_min": 60, "stored_max": 140,
}  # fmt: skip


def product_at(number: int, rng: np.random.Generator) -> Product:
    """Returns a product somewhere on Mars; a fifth of them lie half over their predecessor."""
    window = 224 * GSD_M
    x, y = rng.uniform(-0.9, 0.9) * np.pi * MARS_RADIUS_M, rng.uniform(-0.4, 0.4) * np.pi * MARS_RADIUS_M
    gsd = window / TILE  # a tile of 8 px with the ground of one of 224
    name = f"P{number:06d}"
    return Product(
        name=name, source=Source(name, name, None), files=(), product_id=name, instrument="CTX", driver="none", band=1,
        width=ACROSS * TILE, height=DOWN * TILE, dtype="uint8", scale=1.0, offset_value=0.0, validity=Validity(),
        georeference=Georeference(WKT, (x, gsd, 0.0, y, 0.0, -gsd)), gsd_m=gsd, licence="CC0-1.0",
        observation=Observation(), saturation=(-np.inf, np.inf), native_gsd_m=gsd,
    )  # fmt: skip


def write_piece(folder: Path, product: Product, order: int, rng: np.random.Generator) -> PieceInfo:
    """Writes a piece of 1,000 tiles of noise."""
    folder.mkdir(parents=True)
    table = PieceTable()
    offset = 0
    cols = [col * TILE for col in range(ACROSS)]
    with open(folder / "tiles.bin", "wb") as stream:
        for row in range(0, DOWN * TILE, TILE):
            places = place_windows(product, row, cols, TILE, order=order, pixel_block=64)
            for n, col in enumerate(cols):
                pixels = rng.integers(60, 140, size=(TILE, TILE), dtype=np.uint8)
                data = encode_tile(pixels, "zstd")
                stream.write(data)
                first, last = places.start_N1[n], places.start_N1[n + 1]
                table.add(MEASURES | {
                    "row": row, "col": col, "lon": places.lon_N[n], "lat": places.lat_N[n],
                    "corners": places.corners_N8[n], "cell": places.cell_N[n], "touched": places.touched[first:last],
                    "offset": offset, "tile_bytes": len(data), "mask_bytes": 0, "quality": rng.uniform(),
                    "phash": rng.integers(0, 2**63, dtype=np.uint64), "sample": pixels.ravel()[:64],
                })  # fmt: skip
                offset += len(data)
    table.write(folder / "table.arrow")
    info = PieceInfo(tiles=ACROSS * DOWN, windows=ACROSS * DOWN, sha256=product.product_id, mean=100.0)
    write_info(folder, info)
    return info


def run_at(queue: Any, tiles: int) -> None:
    """Plans, assembles and reads one corpus of that many tiles; puts the figures into the queue."""
    rng = np.random.default_rng(0)
    config = config_from_dict(PrepConfig, {"products": "x", "out": "x", "sensor": "CTX", "tile_size": TILE})
    with tempfile.TemporaryDirectory() as name:
        products: list[Product] = []
        for number in range(tiles // (ACROSS * DOWN)):
            product = product_at(number, rng)
            if number % 5 == 4:  # the ground of the one before, half a scene on
                x, *rest = products[-1].georeference.transform or ()
                moved = (x + ACROSS / 2 * TILE * product.gsd_m, *rest)
                product = dataclasses.replace(product, georeference=Georeference(WKT, moved))
            products.append(product)
        order = cell_order(8 * TILE * products[0].gsd_m)
        ready = []
        for product in products:
            folder = Path(name) / "pieces" / product.product_id
            ready.append(Ready(product, folder, write_piece(folder, product, order, rng)))
        before = peak_mb()
        started = time.perf_counter()
        plan = make_plan(tile_table(ready, config), config, order)
        planned = time.perf_counter()
        out = Path(name) / "corpus"
        out.mkdir()
        settings = run._cut_settings(config, products)
        failures = run.Failures("stop", print)
        run._assemble(out, ready, plan, config, settings, "CTX", cluster._Here(), failures, {}, lambda line: None)
        assembled = time.perf_counter()
        peak = peak_mb()
        corpus = Corpus(out)
        corpus.read_stored("train", 0)
        queue.put({
            "taken": corpus.count("train") + corpus.count("val"), "plan_s": planned - started,
            "assemble_s": assembled - planned, "memory_mb": peak - before,
            "index_mb": (out / "index.parquet").stat().st_size / 1e6,
            "manifest_mb": (out / "manifest.json").stat().st_size / 1e6,
            "open_s": time.perf_counter() - assembled,
            "table_mb": sum((item.folder / "table.arrow").stat().st_size for item in ready) / 1e6,
        })  # fmt: skip


def main() -> None:
    """Prints the figures of half and of the full size, their ratio, and what 12 million tiles would take."""
    for item in sys.argv[1:]:
        key, _, value = item.partition("=")
        SETTINGS[key] = int(value)
    figures = []
    for tiles in (SETTINGS["tiles"] // 2, SETTINGS["tiles"]):
        queue: multiprocessing.Queue[dict[str, float]] = multiprocessing.get_context("spawn").Queue()
        process = multiprocessing.get_context("spawn").Process(target=run_at, args=(queue, tiles))
        process.start()
        figures.append(queue.get())
        process.join()
    half, full = figures
    print(f"{'':<12}{SETTINGS['tiles'] // 2:>12,}{SETTINGS['tiles']:>12,}{'ratio':>8}{TARGET:>16,}")
    for key in full:
        ratio = full[key] / half[key] if half[key] else float("nan")
        slope = (full[key] - half[key]) / (SETTINGS["tiles"] / 2)
        at_target = full[key] + slope * (TARGET - SETTINGS["tiles"])
        print(f"{key:<12}{half[key]:>12.2f}{full[key]:>12.2f}{ratio:>8.2f}{at_target:>16,.0f}")


if __name__ == "__main__":
    main()
