"""Times cutting one large 16-bit GeoTIFF into tiles against GDAL copying it into a tiled, equally compressed GeoTIFF.

python scripts/bench/prep.py                 20,000 x 20,000 pixels (1.6 GB of disk for a while), about a minute
python scripts/bench/prep.py side=8000

Each measurement runs in a process of its own, on one core, and is repeated; the best counts. The ratio is GDAL's time
over momo's: 1 means as fast as the copy. Peak memory is that of the process (resident set).
"""

from __future__ import annotations

import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from osgeo import gdal, osr

from momo.data_prep.config import PrepConfig
from momo.data_prep.pieces import CutSettings
from momo.data_prep.products import inspect
from momo.data_prep.sources import find_sources
from momo.data_prep.split import cell_order
from momo.data_prep.tiling import cut

gdal.UseExceptions()
TILE, STRIP, REPEATS = 224, 500, 3
SETTINGS = {"side": 20_000}
MARS = (
    'GEOGCS["Mars",DATUM["Mars",SPHEROID["Mars",3396190,169.894447223612]],PRIMEM["R",0],UNIT["degree",0.0174532925]]'
)


def write_scene(path: Path, width: int, height: int) -> None:
    """Writes fractal terrain with sensor noise, 12 bits of 16, uncompressed, in blocks of 256 pixels."""
    crs = osr.SpatialReference()
    crs.ImportFromWkt(MARS)
    crs.SetProjCS("Mars equirectangular")
    crs.SetEquirectangular(0.0, 0.0, 0.0, 0.0)
    scene = gdal.GetDriverByName("GTiff").Create(
        str(path), width, height, 1, gdal.GDT_UInt16, ["TILED=YES", "BIGTIFF=YES"]
    )
    scene.SetProjection(crs.ExportToWkt())
    scene.SetGeoTransform((0.0, 5.0, 0.0, 0.0, 0.0, -5.0))
    rng = np.random.default_rng(0)
    side = 2048
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    frequency[0, 0] = 1.0
    white = np.fft.rfft2(rng.normal(size=(side, side)))
    ground = np.fft.irfft2(white / frequency**1.3)
    ground = (ground - ground.mean()) / ground.std() * 350.0 + 2000.0
    for row in range(0, height, STRIP):
        rows = np.arange(row, min(row + STRIP, height))
        strip = ground[np.ix_(rows % side, np.arange(width) % side)] + rng.normal(scale=6.0, size=(len(rows), width))
        scene.GetRasterBand(1).WriteArray(strip.clip(0, 4095).astype(np.uint16), 0, row)
    scene.FlushCache()


def copy_by_gdal(scene: Path, folder: Path, options: list[str]) -> int:
    """Copies the scene with GDAL on one thread; returns the bytes written."""
    target = folder / "copy.tif"
    gdal.SetCacheMax(128 << 20)
    gdal.Translate(str(target), str(scene), creationOptions=["TILED=YES", "BIGTIFF=YES", *options])
    return target.stat().st_size


def cut_by_momo(scene: Path, folder: Path, codec: str) -> int:
    """Cuts the scene into a piece: reading, validity, measures, footprints, encoding, writing; returns its bytes."""
    (source,), _ = find_sources([str(scene)])
    product = inspect(source)
    quality = PrepConfig(products="x", out="x").quality.__dict__
    order = cell_order(8 * TILE * product.gsd_m)
    done = cut(product, CutSettings(TILE, TILE, quality, codec, "uint16", order, 8 * TILE), folder)
    assert done.folder is not None and not done.failure, done.failure
    return (done.folder / "tiles.bin").stat().st_size


def measured(function: Callable[..., int], *arguments: Any) -> dict[str, float]:
    """Runs a function in a fresh process: wall and processor seconds, bytes and peak memory."""
    queue: multiprocessing.Queue[dict[str, float]] = multiprocessing.get_context("spawn").Queue()
    process = multiprocessing.get_context("spawn").Process(target=_measure, args=(queue, function, arguments))
    process.start()
    result = queue.get()
    process.join()
    return result


def _measure(queue: Any, function: Callable[..., int], arguments: tuple[Any, ...]) -> None:
    with tempfile.TemporaryDirectory(dir=arguments[0].parent) as name:
        before = time.process_time(), time.perf_counter()
        size = function(arguments[0], Path(name), *arguments[1:])
        used = time.process_time() - before[0], time.perf_counter() - before[1]
        queue.put({"cpu": used[0], "wall": used[1], "bytes": size, "peak_mb": peak_mb()})


def peak_mb() -> float:
    """Returns the peak resident set of this process; getrusage would count the parent's before the exec too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def best(function: Callable[..., int], *arguments: Any) -> dict[str, float]:
    """Returns the run with the least processor time."""
    return min((measured(function, *arguments) for _ in range(REPEATS)), key=lambda run: run["cpu"])


def main() -> None:
    """Prints times, sizes, ratios and peak memory."""
    for item in sys.argv[1:]:
        key, _, value = item.partition("=")
        SETTINGS[key] = int(value)
    side = SETTINGS["side"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        scene = folder / "scene.tif"
        write_scene(scene, side, side)
        zstd = ["COMPRESS=ZSTD", "ZSTD_LEVEL=3", "PREDICTOR=2"]
        copies = {
            "GDAL copy, zstd 3, horizontal differences": best(copy_by_gdal, scene, zstd),
            "GDAL copy, zstd 3": best(copy_by_gdal, scene, zstd[:2]),
        }
        ours = best(cut_by_momo, scene, "zstd")
        print(f"{side} x {side} uint16, {scene.stat().st_size / 1e6:.0f} MB, one core, best of {REPEATS}")
        for label, run in copies.items():
            print(f"{label}: {run['cpu']:.2f} s CPU ({run['wall']:.2f} s), {run['bytes'] / 1e6:.0f} MB")
        tiles = (side // TILE) ** 2
        print(
            f"momo, zstd 3 of byte planes: {ours['cpu']:.2f} s CPU ({ours['wall']:.2f} s), "
            f"{ours['bytes'] / 1e6:.0f} MB, {tiles / ours['cpu']:.0f} tiles/s, peak {ours['peak_mb']:.0f} MB"
        )
        for label, run in copies.items():
            print(f"ratio to {label}: {run['cpu'] / ours['cpu']:.2f}")
        scene.unlink()
        for width, height in ((side // 2, side // 2), (side // 2, side)):
            write_scene(scene, width, height)
            print(f"peak memory at {width} x {height}: {measured(cut_by_momo, scene, 'zstd')['peak_mb']:.0f} MB")
        print(f"peak memory at {side} x {side}: {ours['peak_mb']:.0f} MB")


if __name__ == "__main__":
    main()
