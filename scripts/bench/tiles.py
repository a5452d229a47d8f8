"""Times reading tiles on one core against one PNG a tile, on the same tiles in one run.

python scripts/bench/tiles.py              # generated terrain, 8 and 16 bit, 224 px
python scripts/bench/tiles.py CORPUS ...   # the first tiles of corpora

The reference opens one PNG with PIL, takes its range to 8 bit, makes RGB of it and normalises, as the published code
does. Files lie in the page cache in all cases; tiles are visited in random order; the best of several rounds counts.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from momo.config import load_config
from momo.corpus import Corpus
from momo.data_prep.shards import CorpusWriter, TileRecord
from momo.normalise import Normalisation, normalise_batch
from momo.pretrain import PretrainConfig
from momo.pretrain.data import Sources
from momo.pretrain.loader import make_loader

TILES, SIZE, BATCH, ROUNDS = 384, 224, 64, 5

Tiles = Iterator[tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]]


def terrain(dtype: str) -> Tiles:
    """Generates tiles with the power spectrum of terrain (amplitude ~ wavenumber ** -1.5) and 5 % of white noise."""
    rng = np.random.default_rng(0)
    wavenumber = np.hypot(np.fft.fftfreq(SIZE)[:, None], np.fft.rfftfreq(SIZE))
    mean, std = (120, 30) if dtype == "uint8" else (2000, 300)
    for _ in range(TILES):
        spectrum = np.fft.rfft2(rng.normal(size=(SIZE, SIZE))) / np.maximum(wavenumber, 0.01) ** 1.5
        field = np.fft.irfft2(spectrum, s=(SIZE, SIZE))
        field = (field - field.mean()) / field.std() + 0.05 * rng.normal(size=(SIZE, SIZE))
        stored = np.clip(np.round(field * std + mean), 0, np.iinfo(dtype).max).astype(dtype)
        yield stored, np.ones((SIZE, SIZE), dtype=bool)


def tiles_of(path: Path) -> Tiles:
    """Yields the first tiles of a corpus."""
    corpus = Corpus(path)
    for position in range(min(TILES, corpus.count("train"))):
        tile = corpus.read_stored("train", position)
        yield tile.stored_HW, tile.valid


def write_tiles(folder: Path, tiles: Tiles, dtype: str, size: int) -> int:
    """Writes one corpus of each codec and, beside them, the same tiles as single PNG files; returns their number."""
    (folder / "files").mkdir(parents=True)
    form: dict[str, Any] = {"sensor": "CTX", "tile_size": size, "dtype": dtype, "synthetic": True}
    writers = {}
    for codec in ("zstd", "png"):
        (folder / codec).mkdir()
        writers[codec] = CorpusWriter(folder / codec, codec=codec, **form)
    count = 0
    for stored, valid in tiles:
        meta = {"product_id": "P", "row": 0, "col": count, "scale": 0.01, "offset_value": 1.0}
        record = TileRecord(key=f"t{count:05d}", split="train", stored_HW=stored, valid_HW=valid, meta=meta)
        for writer in writers.values():
            writer.add(record)
        Image.fromarray(stored).save(folder / "files" / f"t{count:05d}.png")
        count += 1
    for writer in writers.values():
        writer.finish(products=[{"product_id": "P"}], prep={}, licence="CC0-1.0")
    return count


def plain_reader(folder: Path) -> Callable[[int], object]:
    """Opens one PNG a tile, min-max to 8 bit, RGB, normalise: what the published code does."""

    def read(number: int) -> object:
        raw = np.asarray(Image.open(folder / "files" / f"t{number:05d}.png"), dtype=np.float32)
        grey = ((raw - raw.min()) / (raw.max() - raw.min()) * 255).astype(np.uint8)
        rgb = np.asarray(Image.fromarray(grey).convert("RGB"), dtype=np.float32).transpose(2, 0, 1) / 255
        return (rgb - 0.45) / 0.225

    return read


def ways(folder: Path, order: npt.NDArray[np.int64]) -> dict[str, Callable[[], object]]:
    """Returns what is timed: each reads all tiles once."""
    plain, corpora = plain_reader(folder), {codec: Corpus(folder / codec) for codec in ("zstd", "png")}
    batches = [order[first : first + BATCH] for first in range(0, len(order), BATCH)]
    normalisation = Normalisation()

    def stored(codec: str) -> None:
        for batch in batches:
            corpora[codec].read_batch("train", batch)

    def scaled() -> None:
        for batch in batches:
            tiles = corpora["zstd"].read_batch("train", batch)
            valid = None if tiles.valid_BHW is None else torch.from_numpy(tiles.valid_BHW)
            affine = torch.from_numpy(normalisation.affine(tiles.statistics))
            normalise_batch(torch.from_numpy(tiles.stored_BHW), valid, affine, normalisation.limit)

    sources = Sources([corpora["zstd"]], [normalisation])
    patches = (corpora["zstd"].manifest.tile_size // 16) ** 2
    epoch = len(order) - len(order) % BATCH

    def training(megabytes: int, start: int) -> Callable[[], object]:
        config = load_config(
            PretrainConfig,
            None,
            ["out=o", "data.corpora=[c]", f"train.batch_size={BATCH}", f"data.cache_mb={megabytes}"],
        )
        loader = make_loader(sources, config, patches=patches, start=start, stop=10**9, rank=0, ranks=1, device="cpu")
        batches = iter(loader)

        def read() -> None:
            for _ in range(epoch // BATCH):
                next(batches)

        return read

    kept = training(4096, 0)
    kept()
    return {
        "one PNG a tile, min-max, RGB, normalised": lambda: [plain(number) for number in order.tolist()],
        "one PNG a tile, decoded only": lambda: [
            np.asarray(Image.open(folder / "files" / f"t{number:05d}.png")) for number in order.tolist()
        ],
        "corpus, png: stored tiles, ready for the device": lambda: stored("png"),
        "corpus, zstd: stored tiles, ready for the device": lambda: stored("zstd"),
        "corpus, zstd: scaled to float32 on the CPU": scaled,
        "training batches: stored, validity, symmetry, mask": training(0, 0),
        "training batches, kept decoded": kept,
    }


def measure(title: str, tiles: Tiles, dtype: str, size: int) -> None:
    """Prints tiles a second of each way and the ratio to the first."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        count = write_tiles(folder, tiles, dtype, size)
        timed = ways(folder, np.random.default_rng(1).permutation(count))
        seconds = dict.fromkeys(timed, float("inf"))
        for _ in range(ROUNDS):
            for label, read in timed.items():
                started = time.perf_counter()
                read()
                seconds[label] = min(seconds[label], time.perf_counter() - started)
    reference = next(iter(seconds.values()))
    print(f"{title}, {dtype}, {size} px, {count} tiles")
    for label, duration in seconds.items():
        print(f"  {label:52s} {count / duration:7.0f} tiles/s  {reference / duration:6.2f}")


def main() -> None:
    """Measures generated tiles, or those of the corpora given."""
    torch.set_num_threads(1)
    for path in map(Path, sys.argv[1:]):
        manifest = Corpus(path).manifest
        measure(path.name, tiles_of(path), manifest.dtype, manifest.tile_size)
    if not sys.argv[1:]:
        for dtype in ("uint8", "uint16"):
            measure("generated terrain", terrain(dtype), dtype, SIZE)


if __name__ == "__main__":
    main()
