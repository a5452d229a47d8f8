"""Measures pretraining on one GPU: how fast, how near the device's peak, in how much memory, bound by what.

scripts/bench/gpu.sh [--wheels DIR]        # ViT-B/16 and ViT-L/16, 224 px, bf16
python scripts/bench/gpu.py --device cpu   # a trial of the bench itself with a pico model

1. matrix products of bf16 alone: what the device reaches at best
2. steps of momo's DeepSpeed engine on tiles that lie on the device, batch sizes doubled until the memory ends
3. the loader alone, with several numbers of reading processes; stored tiles are decoded every time
4. `momo.pretrain.trainer.Trainer` at the best batch of each model, with the loader that was quick enough

Of 2 a figure is the median over the steps; of 4 the median over the train lines after the first. Peak memory is what
PyTorch allocated at most. MFU and FLOPs as in `momo.pretrain.flops`.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from gpu_report import bound_by, markdown, percent

from momo.config import load_config
from momo.data_prep.shards import CorpusWriter, TileRecord
from momo.pretrain import PretrainConfig
from momo.pretrain.banner import describe_device
from momo.pretrain.data import Sources, open_sources, to_inputs
from momo.pretrain.engine import Engine
from momo.pretrain.flops import flops_per_sample, mfu, peak_tflops
from momo.pretrain.loader import make_loader
from momo.pretrain.setup import engine_config, make_model, make_start, resolve_architecture, store_config
from momo.pretrain.telemetry import peak_memory_gib
from momo.pretrain.trainer import Trainer
from momo.runs import read_metrics

MODES = {
    "plain": [],
    "compile": ["model.compile=true"],
    "checkpointing": ["model.activation_checkpointing=true"],
    "both": ["model.compile=true", "model.activation_checkpointing=true"],
}
MASK_RATIO, PIXELS, VAL_TILES = 0.75, 224, 64


@dataclass(frozen=True)
class Measured:
    """One row of the report; `fits` is false where the memory ended, and the figures are then None."""

    model: str
    mode: str
    batch: int
    fits: bool
    images_per_s: float | None = None
    mfu: float | None = None
    memory_gib: float | None = None
    data_wait: float | None = None
    shares: dict[str, float] | None = None


class Bench:
    """All measurements of one call.

    Args:
        options: Of the command line.
        folder: For the corpus and the runs.
    """

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.device = torch.device(options.device, 0) if options.device == "cuda" else torch.device("cpu")
        self.corpus = write_corpus(folder / "corpus", options.tiles)
        name = torch.cuda.get_device_name(0) if options.device == "cuda" else "cpu"
        self.peak: float | None = options.peak or peak_tflops(name, "bf16")
        self.report: dict[str, Any] = {
            "device": asdict(describe_device()),
            "torch": torch.__version__,
            "peak_tflops": self.peak,
            "synthetic_tiles": True,
            "steps": [],
            "loader": [],
            "trainer": [],
        }

    def config(self, model: str, mode: str, batch: int, *more: str) -> PretrainConfig:
        """The job of one measurement."""
        items = [
            f"out={self.folder}/run", f"data.corpora=[{self.corpus}]", "data.verify=false", "data.cache_mb=0",
            f"model.size={model}", "model.patch_size=16", f"model.mask_ratio={MASK_RATIO}", *MODES[mode],
            f"train.batch_size={batch}", f"train.samples={batch}", "train.precision=bf16", "ranks=1",
            f"validation.samples={VAL_TILES}", "telemetry.reconstructions=0",
            *([f"telemetry.peak_tflops={self.peak}"] if self.peak else []),
        ]  # fmt: skip
        return load_config(PretrainConfig, None, [*items, *more])

    def save(self) -> None:
        """Writes what is known so far."""
        out = Path(self.options.out)
        (out / "gpu.json").write_text(json.dumps(self.report, indent=2) + "\n", encoding="utf-8")
        (out / "gpu.md").write_text(markdown(self.report, PIXELS, MASK_RATIO), encoding="utf-8")

    # --- 1. products ----------------------------------------------------------------------------------------------

    def products(self) -> None:
        """Times one large matrix product in bf16."""
        side = 8192 if self.device.type == "cuda" else 512
        left, right = (torch.randn(side, side, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        times = []
        for _ in range(24):
            self.wait()
            started = time.perf_counter()
            torch.mm(left, right)
            self.wait()
            times.append(time.perf_counter() - started)
        self.report["product_tflops"] = 2 * side**3 / statistics.median(times[4:]) / 1e12
        self.save()

    def wait(self) -> None:
        """Waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    # --- 2. steps -------------------------------------------------------------------------------------------------

    def sweep(self, model: str, mode: str, first: int) -> None:
        """Doubles the batch until the memory ends."""
        batch = first
        while batch <= self.options.max_batch:
            row = self.steps(model, mode, batch)
            self.report["steps"].append(asdict(row))
            self.save()
            say(row)
            if not row.fits:
                return
            batch *= 2

    def steps(self, model: str, mode: str, batch: int) -> Measured:
        """Times the engine's steps on tiles that lie on the device already."""
        config = self.config(model, mode, batch)
        sources = open_sources(config, verify=False)
        self.clean()
        torch._dynamo.reset()
        try:
            seconds, memory = self._timed_steps(config, sources)
        except RuntimeError as error:  # torch's OutOfMemoryError is one; the compiler wraps it in others
            if "out of memory" not in str(error).lower():
                raise
            return Measured(model, mode, batch, fits=False)
        rate = batch / statistics.median(seconds)
        return Measured(model, mode, batch, True, rate, self.mfu(config, rate), memory)

    def _timed_steps(self, config: PretrainConfig, sources: Sources) -> tuple[list[float], float]:
        reference = make_start(config, PIXELS).model.to(self.device)
        model = make_model(config, sources, reference, self.device)
        engine = Engine(model, config, engine_config(config))
        try:
            batch = next(iter(self.loader(sources, config)))
            inputs = to_inputs(batch, limit=sources.normalisations[0].limit, in_chans=1, device=self.device)
            seconds = []
            for _ in range(self.options.steps + 2):
                self.wait()
                started = time.perf_counter()
                engine.micro_step(*inputs, last=True)
                engine.finish_step(1e-4)
                self.wait()
                seconds.append(time.perf_counter() - started)
            return seconds[2:], peak_memory_gib(self.device)
        finally:
            engine.close()

    def clean(self) -> None:
        """Gives the memory of the last measurement back and starts counting anew."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def mfu(self, config: PretrainConfig, rate: float) -> float | None:
        """MFU at so many images a second."""
        return mfu(rate, flops_per_sample(resolve_architecture(config, PIXELS), MASK_RATIO).total, 1, self.peak)

    # --- 3. loader ------------------------------------------------------------------------------------------------

    def loader(self, sources: Sources, config: PretrainConfig) -> Any:
        """The micro-batches of a job."""
        patches = (PIXELS // 16) ** 2
        stop = config.train.samples - config.train.samples % config.train.batch_size
        return make_loader(sources, config, patches=patches, start=0, stop=stop, rank=0, ranks=1, device=self.device)

    def loaders(self) -> None:
        """Times reading alone: stored tiles, decoded and put into pinned batches."""
        batch = min(256, self.options.max_batch)
        for workers in self.options.workers:
            count = 4 * self.options.steps + 4
            config = self.config("pico", "plain", batch, f"data.workers={workers}", f"train.samples={count * batch}")
            batches = iter(self.loader(open_sources(config, verify=False), config))
            # Reading processes start, and fill the queue, before the clock does.
            for _ in itertools.islice(batches, 4):
                pass
            started = time.perf_counter()
            # Not to the end of the iterator, which waits for the processes to end.
            for _ in itertools.islice(batches, count - 4):
                pass
            rate = (count - 4) * batch / (time.perf_counter() - started)
            del batches
            self.report["loader"].append({"workers": workers, "images_per_s": rate})
            print(f"loader alone, {workers} reading processes: {rate:,.0f} images/s", flush=True)
            self.save()

    # --- 4. trainer -----------------------------------------------------------------------------------------------

    def train(self, model: str) -> None:
        """Runs the trainer at the quickest mode and batch of a model."""
        fitting = [row for row in self.report["steps"] if row["model"] == model and row["fits"]]
        if not fitting:
            print(f"{model}: no batch fits, the trainer is left out", flush=True)
            return
        best = max(fitting, key=lambda row: row["images_per_s"])
        workers = self._workers_for(best["images_per_s"])
        lines, every = 6, max(2, self.options.steps)
        batch = self._batch_that_trains(best)
        more = [
            f"data.workers={workers}", f"train.samples={lines * every * batch}", f"train.log_every={every}",
            f"validation.every={lines * every * batch}",
        ]  # fmt: skip
        config = self.config(model, best["mode"], batch, *more)
        self.clean()
        shutil.rmtree(config.out, ignore_errors=True)
        store_config(config)
        trainer = Trainer(config, rank=0, ranks=1)
        trainer.train()
        records = [r for r in read_metrics(Path(config.out)) if r["event"] == "train"][1:]
        assert trainer.engine is not None
        trainer.engine.close()
        row = summarise(model, best["mode"], batch, records)
        entry = {**row, "workers": workers, "alone": best}
        entry["bound"] = bound_by(entry, self.report)
        self.report["trainer"].append(entry)
        print(f"{model}: {entry['bound']}", flush=True)
        self.save()

    def _batch_that_trains(self, best: dict[str, Any]) -> int:
        """Half of a batch that only just fits: the trainer keeps the float32 reference and two batches more."""
        fitting = [
            row["batch"]
            for row in self.report["steps"]
            if (row["model"], row["mode"], row["fits"]) == (best["model"], best["mode"], True)
        ]
        last = best["batch"] == max(fitting) and len(fitting) > 1
        return int(best["batch"] // 2 if last else best["batch"])

    def _workers_for(self, rate: float) -> int:
        quick = [row["workers"] for row in self.report["loader"] if row["images_per_s"] > 1.3 * rate]
        quickest = max(self.report["loader"], key=lambda row: row["images_per_s"])["workers"]
        return int(min(quick, default=quickest))


def summarise(model: str, mode: str, batch: int, records: list[dict[str, Any]]) -> dict[str, Any]:
    """Joins train lines into one row: medians."""

    def median(key: str) -> float:
        return statistics.median(record[key] for record in records)

    shares = {name: statistics.median(r["shares"][name] for r in records) for name in records[0]["shares"]}
    share = None if records[0]["mfu"] is None else median("mfu")
    memory = max(record["peak_memory_gib"] for record in records)
    row = Measured(model, mode, batch, True, median("images_per_s"), share, memory, median("data_wait"), shares)
    return asdict(row)


def terrain(count: int) -> Iterator[npt.NDArray[np.uint8]]:
    """Generates tiles with the power spectrum of terrain (amplitude ~ wavenumber ** -1.5) and 5 % of white noise."""
    rng = np.random.default_rng(0)
    wavenumber = np.hypot(np.fft.fftfreq(PIXELS)[:, None], np.fft.rfftfreq(PIXELS))
    for _ in range(count):
        spectrum = np.fft.rfft2(rng.normal(size=(PIXELS, PIXELS))) / np.maximum(wavenumber, 0.01) ** 1.5
        field = np.fft.irfft2(spectrum, s=(PIXELS, PIXELS))
        field = (field - field.mean()) / field.std() + 0.05 * rng.normal(size=(PIXELS, PIXELS))
        yield np.clip(np.round(field * 30 + 120), 0, 255).astype(np.uint8)


def write_corpus(folder: Path, count: int) -> Path:
    """Writes generated terrain; every tile four times, turned."""
    folder.mkdir()
    writer = CorpusWriter(folder, sensor="CTX", tile_size=PIXELS, dtype="uint8", synthetic=True)
    distinct = list(terrain((count + VAL_TILES) // 4 + 1))
    valid = np.ones((PIXELS, PIXELS), dtype=np.bool_)
    turned = (np.rot90(tile, turn) for turn in range(4) for tile in distinct)
    for number, stored in enumerate(itertools.islice(turned, count + VAL_TILES)):
        meta = {"product_id": "P", "row": 0, "col": number, "scale": 0.01, "offset_value": 1.0}
        split = "train" if number < count else "val"
        stored_HW = np.ascontiguousarray(stored)
        writer.add(TileRecord(key=f"t{number:06d}", split=split, stored_HW=stored_HW, valid_HW=valid, meta=meta))
    writer.finish(products=[{"product_id": "P"}], prep={}, licence="CC0-1.0")
    return folder


# --- telling --------------------------------------------------------------------------------------------------------


def say(row: Measured) -> None:
    """Prints a row of the sweep."""
    figures = (
        f"{row.images_per_s:,.1f} images/s, MFU {percent(row.mfu)}, {row.memory_gib:.1f} GiB"
        if row.fits
        else "out of memory"
    )
    print(f"{row.model:6s} {row.mode:14s} batch {row.batch:5d}: {figures}", flush=True)


@contextlib.contextmanager
def one_rank(device: str, folder: Path) -> Iterator[None]:
    """A process group of this process alone."""
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_SIZE="1")
    if device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        torch.set_num_threads(1)
    else:
        torch.cuda.set_device(0)
    backend = "gloo" if device == "cpu" else "nccl"
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line; what is left out depends on the device."""
    cores = os.cpu_count() or 1
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", default="bench-gpu")
    parser.add_argument("--models")
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--first-batch", type=int)
    parser.add_argument("--max-batch", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--tiles", type=int)
    parser.add_argument("--workers", help="numbers of reading processes, by comma")
    parser.add_argument("--peak", type=float, help="TFLOP/s of the device in bf16, where momo does not know it")
    options = parser.parse_args(argv)
    small = options.device == "cpu"
    defaults = {
        "models": "pico" if small else "base,large",
        "first_batch": 4 if small else 64,
        "max_batch": 8 if small else 4096,
        "steps": 2 if small else 10,
        "tiles": 64 if small else 1472,
        "workers": "0,1" if small else ",".join(str(n) for n in (0, 4, 8, 16) if n < max(2, cores)),
    }
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    options.models, options.modes = options.models.split(","), options.modes.split(",")
    options.workers = [int(number) for number in options.workers.split(",")]
    if unknown := set(options.modes) - set(MODES):
        parser.error(f"--modes: unknown {', '.join(unknown)}; there are {', '.join(MODES)}")
    return options


def main() -> int:
    """Runs everything; returns the exit code."""
    options = parse()
    if options.device == "cuda" and not torch.cuda.is_available():
        print(
            "momo: error: there is no GPU: torch.cuda.is_available() is false. Rule: this bench measures a GPU. Next: "
            "run it on a machine with one (--wheels DIR without a network), or try it out with --device cpu.",
            file=sys.stderr,
        )
        return 2
    Path(options.out).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name, one_rank(options.device, Path(name)):
        bench = Bench(options, Path(name))
        bench.products()
        for model in options.models:
            for mode in options.modes:
                # Compiling takes a while for each batch: from what the plain steps like best upwards.
                rows = [r for r in bench.report["steps"] if r["model"] == model and r["fits"]]
                best = max(rows, key=lambda row: row["images_per_s"])["batch"] if rows else options.first_batch
                bench.sweep(model, mode, options.first_batch if mode == "plain" else best)
        bench.loaders()
        for model in options.models:
            bench.train(model)
    print(f"-> {options.out}/gpu.json, {options.out}/gpu.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
