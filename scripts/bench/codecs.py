"""Measures size and speed of ways to store a tile, on one core.

python scripts/bench/codecs.py                     # generated terrain, 8 and 16 bit, 224 px
python scripts/bench/codecs.py CORPUS FILE ...     # tiles of a corpus; 224 px windows of a raster that GDAL reads

Forms: `pixels` as they lie in memory; `planes` (16 bit) all low bytes, then all high bytes; `row` and `column`, each
pixel less the one above or to the left, then planes; `momo` is what `momo.codecs` writes. Decoding ends with the
array of pixels, forms undone.
"""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zstandard
from PIL import Image

from momo.codecs import decode_tile, encode_tile
from momo.corpus import Corpus

TILES, SIZE, ROUNDS = 96, 224, 5
LEVELS = (1, 3, 6)

Array = npt.NDArray[Any]


def planes(tile: Array) -> bytes:
    """Returns low bytes, then high bytes."""
    if tile.dtype == np.uint8:
        return tile.tobytes()
    return (tile & 255).astype(np.uint8).tobytes() + (tile >> 8).astype(np.uint8).tobytes()


def from_planes(raw: bytes, like: Array) -> Array:
    """Undoes `planes`."""
    values = np.frombuffer(raw, dtype=np.uint8)
    if like.dtype == np.uint8:
        return values.reshape(like.shape)
    tile = values[like.size :].astype(np.uint16)
    tile <<= 8
    tile |= values[: like.size]
    return tile.reshape(like.shape)


def differences(tile: Array, axis: int) -> Array:
    """Returns each pixel less its neighbour before it along an axis."""
    return np.diff(tile, axis=axis, prepend=np.zeros_like(tile.take([0], axis=axis)))


FORMS: dict[str, tuple[Callable[[Array], bytes], Callable[[bytes, Array], Array]]] = {
    "pixels": (lambda t: t.tobytes(), lambda raw, like: np.frombuffer(raw, dtype=like.dtype).reshape(like.shape)),
    "planes": (planes, from_planes),
    "row": (
        lambda t: planes(differences(t, 0)),
        lambda raw, like: np.add.accumulate(from_planes(raw, like), axis=0, dtype=like.dtype),
    ),
    "column": (
        lambda t: planes(differences(t, 1)),
        lambda raw, like: np.add.accumulate(from_planes(raw, like), axis=1, dtype=like.dtype),
    ),
}


def png(tile: Array) -> bytes:
    """Returns a PNG at PIL's usual level."""
    buffer = io.BytesIO()
    Image.fromarray(tile).save(buffer, format="PNG", compress_level=6)
    return buffer.getvalue()


def seconds(work: Callable[[], object]) -> float:
    """Returns the best of several rounds."""
    best = float("inf")
    for _ in range(ROUNDS):
        started = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - started)
    return best


def line(name: str, tiles: list[Array], encode: Callable[[Array], bytes], decode: Callable[[bytes], Array]) -> None:
    """Prints size, encoding and decoding speed of one way, after checking that it is lossless."""
    packed = [encode(tile) for tile in tiles]
    for tile, data in zip(tiles, packed, strict=True):
        assert np.array_equal(decode(data), tile), name
    share = sum(map(len, packed)) / sum(tile.nbytes for tile in tiles)
    writing = len(tiles) / seconds(lambda: [encode(tile) for tile in tiles])
    reading = len(tiles) / seconds(lambda: [decode(data) for data in packed])
    print(f"  {name:16s} {share:7.3f} {writing:10.0f} {reading:10.0f}")


def measure(title: str, tiles: list[Array]) -> None:
    """Prints the table of one set of tiles."""
    first = tiles[0]
    dtype, size = str(first.dtype), first.shape[0]
    print(f"{title}: {len(tiles)} tiles, {size} px, {dtype}")
    print(f"  {'':16s} {'of raw':>7s} {'encode/s':>10s} {'decode/s':>10s}")
    line("png", tiles, png, lambda data: np.asarray(Image.open(io.BytesIO(data))))
    decompressor = zstandard.ZstdDecompressor()
    for form, (pack, unpack) in FORMS.items():
        if form == "planes" and dtype == "uint8":
            continue
        for level in LEVELS:
            compress = zstandard.ZstdCompressor(level=level, write_checksum=True).compress
            line(
                f"zstd {level} {form}",
                tiles,
                lambda tile, pack=pack, compress=compress: compress(pack(tile)),  # type: ignore[misc]
                lambda data, unpack=unpack: unpack(decompressor.decompress(data), first),  # type: ignore[misc]
            )
    line("momo", tiles, lambda tile: encode_tile(tile, "zstd"), lambda data: decode_tile(data, "zstd", dtype, size))


def of_corpus(path: Path) -> list[Array]:
    """Returns tiles of a corpus, evenly spaced."""
    corpus = Corpus(path)
    count = corpus.count("train")
    return [corpus.read_stored("train", place).stored_HW for place in range(0, count, max(1, count // TILES))][:TILES]


def of_raster(path: Path) -> list[Array]:
    """Returns windows of the first band; what is neither 8 nor 16 bit is scaled to 16 bits, as prep does."""
    from osgeo import gdal

    gdal.UseExceptions()
    dataset = gdal.Open(str(path))
    values = dataset.GetRasterBand(1).ReadAsArray()
    if values.dtype not in (np.uint8, np.uint16):
        good = np.isfinite(values) & (np.abs(values) < 1e30) & (values != -32768)
        low, high = float(values[good].min()), float(values[good].max())
        scaled = (np.where(good, values, low).astype(np.float64) - low) / (high - low) * 65535
        values = np.clip(np.round(scaled), 0, 65535).astype(np.uint16)
    rows, cols = (range(0, side - SIZE + 1, SIZE) for side in values.shape)
    windows = [np.ascontiguousarray(values[row : row + SIZE, col : col + SIZE]) for row in rows for col in cols]
    return [window for window in windows if np.ptp(window) > 0][:TILES]


def generated(dtype: str) -> list[Array]:
    """Returns tiles with the power spectrum of terrain and 5 % of white noise."""
    rng = np.random.default_rng(0)
    wavenumber = np.hypot(np.fft.fftfreq(SIZE)[:, None], np.fft.rfftfreq(SIZE))
    mean, std = (120, 30) if dtype == "uint8" else (2000, 300)
    tiles = []
    for _ in range(TILES):
        spectrum = np.fft.rfft2(rng.normal(size=(SIZE, SIZE))) / np.maximum(wavenumber, 0.01) ** 1.5
        field = np.fft.irfft2(spectrum, s=(SIZE, SIZE))
        field = (field - field.mean()) / field.std() + 0.05 * rng.normal(size=(SIZE, SIZE))
        tiles.append(np.clip(np.round(field * std + mean), 0, np.iinfo(dtype).max).astype(dtype))
    return tiles


def main() -> None:
    """Measures what is given, or generated tiles."""
    for path in map(Path, sys.argv[1:]):
        if tiles := of_corpus(path) if path.is_dir() else of_raster(path):
            measure(path.name, tiles)
        else:
            print(f"{path.name}: no whole window of {SIZE} px with contrast")
    if not sys.argv[1:]:
        for dtype in ("uint8", "uint16"):
            measure("generated terrain", generated(dtype))


if __name__ == "__main__":
    main()
