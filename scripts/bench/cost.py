"""What pretraining costs: time a sample against model size and against ranks, and 12 million samples worked out.

python scripts/bench/cost.py                        all three parts, about five minutes on two cores
python scripts/bench/cost.py sizes                  one part: sizes, ranks or table
python scripts/bench/cost.py sizes sizes=pico,tiny batch=8 steps=3

Part one times whole steps (forward, backward, fused AdamW) of the autoencoder alone, all threads, weights and
activations in the precision named; the median step counts. Part two runs `momo pretrain` on a generated corpus with
one and with more ranks on the same cores. Part three is arithmetic from counted operations; its assumptions are
printed above it.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from momo.config import config_from_dict
from momo.data_prep.shards import CorpusWriter, TileRecord
from momo.models import Architecture, build_mae
from momo.pretrain import PretrainConfig, pretrain
from momo.pretrain.flops import flops_per_sample, peak_tflops
from momo.pretrain.optimisation import parameter_groups
from momo.runs import read_metrics

SETTINGS = {
    "sizes": "pico,tiny,small,base",
    "precisions": "fp32,bf16",
    "batch": "16",
    "steps": "4",
    "ranks": "1,2",
    "rank_size": "tiny",
    "rank_samples": "384",
}
MASK_RATIO, SIDE = 0.75, 224

# --- assumptions of part three
SAMPLES = 12_000_000
# Name for the peak, and bytes/s a GPU sends in an all-reduce within its node: two thirds of NVLink's one direction.
DEVICES = {"A100": ("NVIDIA A100-SXM4-80GB", 200e9), "H100": ("NVIDIA H100 80GB HBM3", 300e9)}
UTILISATIONS = (0.30, 0.45)
NODE = 8
NETWORKS = {"8 x 200 Gbit/s": 200e9, "1 x 100 Gbit/s": 12.5e9}  # bytes/s of a node
GRADIENT_BYTES = 2
BATCHES = (256, 4096)


def chosen(name: str) -> list[str]:
    """Returns the entries of a setting that is a list."""
    return SETTINGS[name].split(",")


# --- one: model size --------------------------------------------------------------------------------------------


def step_seconds(architecture: Architecture, precision: str, batch: int, steps: int) -> float:
    """Returns the median time of a training step of the autoencoder alone."""
    model = build_mae(architecture, seed=0, mask_ratio=MASK_RATIO)
    model.to(torch.bfloat16 if precision == "bf16" else torch.float32)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.05), lr=1e-4, betas=(0.9, 0.95), fused=True)
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(batch, architecture.in_chans, SIDE, SIDE, generator=generator)
    valid = torch.ones(batch, SIDE, SIDE, dtype=torch.bool)
    times = []
    for _ in range(steps + 1):
        noise = torch.rand(batch, architecture.patches, generator=generator)
        started = time.perf_counter()
        model(image, valid, noise).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - started)
    # The first step allocates.
    return statistics.median(times[1:])


def print_sizes() -> None:
    """Prints time and rate of arithmetic for each size and precision."""
    batch, steps = int(SETTINGS["batch"]), int(SETTINGS["steps"])
    print(f"time a sample against model size: {SIDE} px, patches of 16, 1 channel, {MASK_RATIO:.0%} hidden")
    print(f"batch {batch}, {torch.get_num_threads()} threads, median of {steps} steps")
    print(
        f"  {'size':6s} {'parameters':>10s} {'GFLOP/sample':>12s}  {'':5s} {'ms/sample':>9s} {'images/s':>9s} "
        f"{'GFLOP/s':>8s}"
    )
    for size in chosen("sizes"):
        architecture = Architecture(size=size, image_size=SIDE)
        flops = flops_per_sample(architecture, MASK_RATIO).total
        parameters = sum(p.numel() for p in build_mae(architecture, seed=0).parameters() if p.requires_grad)
        for precision in chosen("precisions"):
            seconds = step_seconds(architecture, precision, batch, steps) / batch
            print(
                f"  {size:6s} {parameters / 1e6:8.1f} M {flops / 1e9:12.2f}  {precision:5s} {seconds * 1e3:9.2f} "
                f"{1 / seconds:9.1f} {flops / seconds / 1e9:8.0f}",
                flush=True,
            )


# --- two: ranks -------------------------------------------------------------------------------------------------


def write_corpus(folder: Path, tiles: int) -> None:
    """Writes a corpus of terrain-like noise (amplitude ~ wavenumber ** -1.5)."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    wavenumber = np.hypot(np.fft.fftfreq(SIDE)[:, None], np.fft.rfftfreq(SIDE))
    writer = CorpusWriter(folder, sensor="CTX", tile_size=SIDE, dtype="uint8", synthetic=True)
    for number in range(tiles + 8):
        field = np.fft.irfft2(np.fft.rfft2(rng.normal(size=(SIDE, SIDE))) / np.maximum(wavenumber, 0.01) ** 1.5)
        stored = np.clip(np.round(120 + 30 * (field - field.mean()) / field.std()), 0, 255).astype(np.uint8)
        meta = {"product_id": "P", "row": 0, "col": number, "scale": 0.01, "offset_value": 1.0}
        split = "train" if number < tiles else "val"
        valid = np.ones((SIDE, SIDE), dtype=bool)
        writer.add(TileRecord(key=f"t{number:05d}", split=split, stored_HW=stored, valid_HW=valid, meta=meta))
    writer.finish(products=[{"product_id": "P"}], prep={}, licence="CC0-1.0")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps the lines of the run and of its processes out of the table."""
    sys.stdout.flush()
    own = os.dup(1)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(own, 1)
        os.close(own)


def run_images_per_s(corpus: Path, out: Path, ranks: int, batch: int) -> tuple[float, float]:
    """Trains a short run and returns the median images/s and data-wait share of its train lines but the first."""
    samples = int(SETTINGS["rank_samples"])
    config = {
        "out": str(out),
        "ranks": ranks,
        "data": {"corpora": [str(corpus)]},
        "model": {"size": SETTINGS["rank_size"], "mask_ratio": MASK_RATIO},
        "train": {"samples": samples, "batch_size": batch, "log_every": 2, "precision": "bf16"},
        "validation": {"every": samples, "samples": 8},
        "telemetry": {"reconstructions": 0},
    }
    with quiet():
        pretrain(config_from_dict(PretrainConfig, config))
    lines = [record for record in read_metrics(out) if record["event"] == "train"][1:]
    return statistics.median(line["images_per_s"] for line in lines), statistics.median(
        line["data_wait"] for line in lines
    )


def print_ranks() -> None:
    """Prints images/s of `momo pretrain` against the number of ranks on the same cores."""
    batch, cores = int(SETTINGS["batch"]), os.cpu_count() or 1
    size = SETTINGS["rank_size"]
    flops = flops_per_sample(Architecture(size=size, image_size=SIDE), MASK_RATIO).total
    print(
        f"time a sample against ranks: momo pretrain, {size}, bf16, global batch {batch}, {cores} cores for all ranks"
    )
    print(f"  {'ranks':>5s} {'threads/rank':>12s} {'ms/sample':>9s} {'images/s':>9s} {'GFLOP/s':>8s} {'data wait':>9s}")
    with tempfile.TemporaryDirectory() as name:
        write_corpus(Path(name) / "corpus", tiles=128)
        for ranks in map(int, chosen("ranks")):
            rate, wait = run_images_per_s(Path(name) / "corpus", Path(name) / f"run{ranks}", ranks, batch)
            print(
                f"  {ranks:5d} {max(1, cores // ranks):12d} {1e3 / rate:9.2f} {rate:9.1f} {rate * flops / 1e9:8.0f} "
                f"{wait:9.1%}",
                flush=True,
            )


# --- three: 12 million samples ----------------------------------------------------------------------------------


def all_reduce_seconds(devices: int, gradient_bytes: float, link: float, network: float) -> float:
    """Returns the time of one all-reduce: rings within nodes, then rings between them.

    A ring over n members sends 2 (n - 1) / n times the gradients through each link (Patarasuk and Yuan 2009, J.
    Parallel Distrib. Comput. 69, 117-124).
    """
    here, nodes = min(devices, NODE), -(-devices // NODE)
    return 2 * gradient_bytes * ((here - 1) / here / link + (nodes - 1) / nodes / network)


def print_table() -> None:
    """Prints what 12 million samples of ViT-B/16 cost on GPUs, with everything that is assumed."""
    architecture = Architecture(size="base", image_size=SIDE)
    flops = flops_per_sample(architecture, MASK_RATIO).total
    parameters = sum(p.numel() for p in build_mae(architecture, seed=0).parameters() if p.requires_grad)
    links = ", ".join(f"{link / 1e9:.0f} GB/s ({name})" for name, (_, link) in DEVICES.items())
    print(f"{SAMPLES // 10**6} million samples of ViT-B/16, {SIDE} px, 1 channel, {MASK_RATIO:.0%} hidden, bf16")
    print("  Arithmetic from counted operations, nothing here is measured:")
    print(f"  - {flops / 1e9:.2f} GFLOP a sample, {flops * SAMPLES:.3g} in all")
    print("  - hours = samples x FLOP a sample / (MFU x peak x GPUs x 3600) / efficiency; GPU-hours = hours x GPUs")
    print("  - efficiency = computing / (computing + all-reduce), nothing overlapped: a lower bound for the network")
    print(
        f"  - all-reduce of {GRADIENT_BYTES} bytes x {parameters / 1e6:.1f} M gradients a step in rings; "
        f"within a node {links}"
    )
    print("  - MFU is taken as the same at any batch, which flatters few samples a GPU; loader and disk keep up")
    print(
        f"  {'GPU':4s} {'TFLOP/s':>7s} {'MFU':>4s} {'GPUs':>4s} {'batch':>5s} {'network':14s} "
        f"{'efficiency':>10s} {'images/s':>9s} {'minutes':>7s} {'GPU-hours':>9s}"
    )
    for name, (device, link) in DEVICES.items():
        peak = peak_tflops(device, "bf16") or 0.0
        for share, (devices, batch, label, network) in itertools.product(UTILISATIONS, layouts()):
            compute = batch * flops / (share * peak * 1e12 * devices)
            step = compute + all_reduce_seconds(devices, GRADIENT_BYTES * parameters, link, network)
            hours = SAMPLES / batch * step / 3600
            print(
                f"  {name:4s} {peak:7.0f} {share:4.2f} {devices:4d} {batch:5d} {label:14s} {compute / step:10.0%} "
                f"{batch / step:9,.0f} {hours * 60:7.1f} {hours * devices:9.2f}"
            )


def layouts() -> Iterator[tuple[int, int, str, float]]:
    """Yields number of GPUs, global batch, name of the network and its bytes/s a node."""
    yield 1, BATCHES[0], "-", 1.0
    for batch in BATCHES:
        yield NODE, batch, "one node", 1.0
    for batch, (label, network) in itertools.product(BATCHES, NETWORKS.items()):
        yield 64, batch, label, network


def main() -> None:
    """Prints the parts asked for."""
    parts = {"sizes": print_sizes, "ranks": print_ranks, "table": print_table}
    for argument in sys.argv[1:]:
        name, equals, value = argument.partition("=")
        if equals and name in SETTINGS:
            SETTINGS[name] = value
        elif argument not in parts:
            sys.exit(f"{argument}: give {', '.join(parts)} or {'=..., '.join(SETTINGS)}=...")
    wanted = [argument for argument in sys.argv[1:] if argument in parts] or list(parts)
    for number, part in enumerate(wanted):
        print("" if number == 0 else "\n", end="")
        parts[part]()


if __name__ == "__main__":
    main()
