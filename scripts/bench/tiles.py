"""Times training samples made from shards, kept decoded, and from one PNG a tile, on the same tiles in one run.

python scripts/bench/tiles.py
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from momo.corpus import Corpus
from momo.data_prep.shards import CorpusWriter, TileRecord
from momo.normalise import Normalisation
from momo.pretrain.data import Sources, TrainTiles

TILES, SIZE = 400, 224


def write_tiles(folder: Path) -> Path:
    """Writes one corpus and, beside it, the same tiles as single PNG files."""
    rng = np.random.default_rng(0)
    corpus, files = folder / "corpus", folder / "files"
    corpus.mkdir()
    files.mkdir()
    writer = CorpusWriter(corpus, sensor="CTX", tile_size=SIZE, dtype="uint8", synthetic=True)
    for number in range(TILES):
        ramp = np.add.outer(np.arange(SIZE) * rng.normal(), np.arange(SIZE) * rng.normal())
        field = ramp + rng.normal(scale=6.0, size=(SIZE, SIZE))
        pixels = (255 * (field - field.min()) / np.ptp(field)).astype(np.uint8)
        meta = {"product_id": "P", "row": 0, "col": number, "scale": 1.0, "offset_value": 0.0}
        valid = np.ones((SIZE, SIZE), dtype=bool)
        writer.add(TileRecord(key=f"t{number:05d}", split="train", stored_HW=pixels, valid_HW=valid, meta=meta))
        Image.fromarray(pixels).save(files / f"t{number:05d}.png")
    writer.finish(products=[], prep={}, licence="CC0-1.0")
    return folder


def plain_reader(folder: Path) -> Callable[[int], object]:
    """Opens one PNG a tile, min-max to 8 bit, RGB, normalise: what the published code does."""

    def read(number: int) -> object:
        raw = np.asarray(Image.open(folder / "files" / f"t{number:05d}.png"), dtype=np.float32)
        grey = ((raw - raw.min()) / (raw.max() - raw.min()) * 255).astype(np.uint8)
        rgb = np.asarray(Image.fromarray(grey).convert("RGB"), dtype=np.float32).transpose(2, 0, 1) / 255
        return (rgb - 0.45) / 0.225

    return read


def rate(read: Callable[[int], object]) -> float:
    """Returns tiles a second over all tiles."""
    started = time.perf_counter()
    for number in range(TILES):
        read(number)
    return TILES / (time.perf_counter() - started)


def main() -> None:
    """Prints tiles a second of each way and the ratios."""
    with tempfile.TemporaryDirectory() as name:
        folder = write_tiles(Path(name))
        sources = Sources([Corpus(folder / "corpus")], [Normalisation()])
        shards, kept = (
            TrainTiles(sources, patches=196, in_chans=1, augment=True, seed=0, cache_mb=megabytes)
            for megabytes in (0, 1024)
        )
        plain = rate(plain_reader(folder))
        anew = rate(lambda number: shards[(0, number)])
        rate(lambda number: kept[(0, number)])
        again = rate(lambda number: kept[(1, number)])
    print(f"one PNG a tile, plain: {plain:.0f} tiles/s")
    print(f"shards, with validity, symmetries and masks: {anew:.0f} tiles/s, ratio {anew / plain:.2f}")
    print(f"the same, kept decoded: {again:.0f} tiles/s, ratio {again / plain:.2f}")


if __name__ == "__main__":
    main()
