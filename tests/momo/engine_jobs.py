"""Jobs of several ranks for the engine's tests: each rank runs `main`, rank 0 leaves what it measured."""

from __future__ import annotations

import contextlib
import io
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

from momo.config import load_config
from momo.models import MaskedAutoencoder, build_mae
from momo.pretrain import PretrainConfig
from tests.conftest import PICO

BATCH, RATE, DECAY, CLIP = 16, 1e-3, 0.05, 1.0


@dataclass(frozen=True)
class Job:
    """One training of the engine on generated batches.

    Attributes:
        name: Names its files.
        precision: `bf16`, `fp16` or `fp32`.
        stage: ZeRO stage.
        accumulation: Micro-batches a step.
        steps: Steps from `first` on.
        first: First step.
        load: Name of the job whose state at its end is gone on from.
        offload: Keep the optimizer's state off the device.
    """

    name: str
    precision: str = "fp32"
    stage: int = 0
    accumulation: int = 1
    steps: int = 50
    first: int = 0
    load: str | None = None
    offload: bool = False


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The global batch of a step: smooth images, some invalid pixels, masks."""
    generator = torch.Generator().manual_seed(step)
    coarse = torch.randn(BATCH, 1, 4, 4, generator=generator)
    image = torch.nn.functional.interpolate(coarse, size=PICO.image_size, mode="bilinear")
    valid = torch.rand(BATCH, PICO.image_size, PICO.image_size, generator=generator) > 0.02
    return image * valid[:, None], valid, torch.rand(BATCH, PICO.patches, generator=generator)


def plain_loop(steps: int) -> tuple[list[float], MaskedAutoencoder]:
    """The reference: one process, float32, no DeepSpeed, the whole batch at once."""
    from momo.pretrain.optimisation import parameter_groups

    model = build_mae(PICO, seed=0)
    optimizer = torch.optim.AdamW(parameter_groups(model, DECAY), lr=RATE, betas=(0.9, 0.95))
    losses = []
    for step in range(steps):
        loss = model(*batch(step)).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, model


def start(jobs: list[Job], ranks: int, folder: Path) -> dict[str, dict[str, Any]]:
    """Runs jobs one after another on `ranks` processes; returns what each measured."""
    store = folder / f"store-{ranks}-{len(list(folder.iterdir()))}"
    torch.multiprocessing.start_processes(
        main, args=(ranks, str(store), str(folder), jobs), nprocs=ranks, start_method="spawn"
    )
    return {job.name: json.loads((folder / f"{job.name}.json").read_text()) for job in jobs}


def main(rank: int, ranks: int, store: str, folder: str, jobs: list[Job]) -> None:
    """One rank."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_SIZE=str(ranks))
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    import deepspeed

    with contextlib.redirect_stdout(io.StringIO()):
        deepspeed.init_distributed(dist_backend="gloo")
        for job in jobs:
            run_job(job, rank, ranks, Path(folder))
    dist.destroy_process_group()


def make_config(job: Job, ranks: int, folder: Path) -> PretrainConfig:
    zero: dict[str, Any] = {"stage": job.stage}
    if job.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    path = folder / f"zero{job.stage}{'-offload' if job.offload else ''}.json"
    path.write_text(json.dumps({"zero_optimization": zero}))
    items = [
        "out=o", "data.corpora=[c]", f"train.batch_size={BATCH}", "train.samples=1600", f"ranks={ranks}",
        f"train.micro_batch={BATCH // ranks // job.accumulation}", f"train.precision={job.precision}",
        f"train.weight_decay={DECAY}", f"train.clip_grad={CLIP}", f"deepspeed={path}",
    ]  # fmt: skip
    return load_config(PretrainConfig, None, items)


def run_job(job: Job, rank: int, ranks: int, folder: Path) -> None:
    from momo.pretrain.engine import Engine
    from momo.pretrain.setup import engine_config
    from momo.pretrain.state import RunState, load_state, save_state

    config = make_config(job, ranks, folder)
    model = build_mae(PICO, seed=0)
    state = None
    if job.load is not None:
        model.load_state_dict(torch.load(folder / job.load / "model.pt", weights_only=True))
        state, _ = load_state(folder / job.load)
        if rank:
            state.moments.clear()  # rank 0 alone may have them
    engine = Engine(model, config, engine_config(config), state)
    losses, norms = [], []
    for step in range(job.first, job.first + job.steps):
        loss, norm = one_step(engine, step, rank, ranks, job.accumulation)
        losses.append(loss)
        norms.append(norm)
    reference = build_mae(PICO, seed=0)
    engine.copy_weights(reference)
    optimizer = engine.optimizer_state(keep=rank == 0)
    if rank == 0:
        assert optimizer is not None
        (folder / job.name).mkdir()
        torch.save(reference.state_dict(), folder / job.name / "model.pt")
        save_state(folder / job.name, optimizer, RunState(samples=(job.first + job.steps) * BATCH))
        measured = {"losses": losses, "norms": norms, "steps": optimizer.steps, "scale": optimizer.loss_scale}
        measured["optimizer"] = type(engine.deepspeed.optimizer).__name__
        (folder / f"{job.name}.json").write_text(json.dumps(measured))
    engine.close()
    dist.barrier()


def one_step(engine: Any, step: int, rank: int, ranks: int, accumulation: int) -> tuple[float, float]:
    share = BATCH // ranks
    mine = [part[rank * share : (rank + 1) * share] for part in batch(step)]
    micro = share // accumulation
    total = torch.zeros(())
    for number in range(accumulation):
        inputs = [part[number * micro : (number + 1) * micro] for part in mine]
        total += engine.micro_step(*inputs, last=number + 1 == accumulation).sum()
    norm = engine.finish_step(RATE)
    dist.all_reduce(total)
    return float(total) / BATCH, norm
