"""From one configuration to a finished RUN: checks, ranks, banner."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import tempfile
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing

from .. import errors
from ..config import config_from_dict, to_dict
from ..errors import ConfigError, MomoError
from ..extras import require, require_installed
from ..files import write_json
from ..runs import read_checkpoints
from .checkpoint import check_same_inputs, latest_resumable
from .config import PretrainConfig
from .data import open_sources
from .optimisation import warmup_length
from .setup import engine_config, make_card, make_start, store_config


def pretrain(config: PretrainConfig) -> Path:
    """Makes or continues one RUN folder.

    Everything a user can get wrong is checked here, before any rank starts. An external launcher (`deepspeed`,
    `torchrun`, SLURM) that sets RANK and WORLD_SIZE is respected; otherwise `config.ranks` processes are started.

    Args:
        config: The job.

    Returns:
        The RUN folder.

    Raises:
        MomoError: Bad configuration, corpus or base; a diverged loss.
    """
    require_installed("deepspeed", "pretrain")
    launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    rank, ranks = (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])) if launched else (0, config.ranks)
    if ranks != config.ranks:
        raise ConfigError(
            "the launcher started another number of ranks",
            seen=f"WORLD_SIZE={ranks}, ranks={config.ranks}",
            fix=f"add ranks={ranks}",
        )
    if rank == 0:
        _prepare(config)
    if launched:
        _rank_main(rank, ranks, None, to_dict(config))
    elif not _complete(config):
        _spawn(config)
    return Path(config.out)


def _complete(config: PretrainConfig) -> bool:
    newest = latest_resumable(Path(config.out))
    return (
        newest is not None and newest.samples >= config.train.samples - config.train.samples % config.train.batch_size
    )


def _prepare(config: PretrainConfig) -> None:
    """Checks all inputs, stores the configuration and prints the banner."""
    sources = open_sources(config, verify=config.data.verify)
    start = make_start(config, sources.corpora[0].manifest.tile_size)
    engine_config(config)
    store_config(config)
    shapes, train = start.model.architecture, config.train
    tiles = int(sources.bounds[-1])
    parameters = sum(p.numel() for p in start.model.parameters())
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU (no CUDA device found)"
    sensors = ", ".join(f"{c.sensor} {c.count('train'):,} + {c.count('val'):,} val" for c in sources.corpora)
    origin = f"base {start.parents[0]['sha256'][:12]}" if start.parents else f"random, seed {config.seed}"
    steps = train.samples // train.batch_size
    print(f"run       {config.out}")
    print(f"tiles     {sensors}" + ("   SYNTHETIC" if any(c.manifest.synthetic for c in sources.corpora) else ""))
    print(
        f"model     {shapes.size}, {shapes.image_size} px in patches of {shapes.patch_size}, "
        f"{shapes.in_chans} channel, {parameters / 1e6:.2f} M parameters, start: {origin}"
    )
    print(f"device    {device}, {config.ranks} rank(s), {train.precision}")
    print(
        f"batch     {train.batch_size} = {config.ranks} x {train.batch_size // config.ranks}; {steps:,} steps = "
        f"{steps * train.batch_size:,} samples = {steps * train.batch_size / tiles:.1f} epochs"
    )
    warmup = warmup_length(train)
    cut = f" (train.warmup_samples={train.warmup_samples:,} is cut to a tenth of the run)"
    print(
        f"schedule  peak learning rate {train.base_lr * train.batch_size / 256:.3g} after {warmup:,} samples"
        + (cut if warmup < train.warmup_samples else "")
    )
    newest = latest_resumable(Path(config.out))
    if newest is not None:
        check_same_inputs(newest, make_card(config, sources, start))
        state = "complete already" if _complete(config) else f"continues at {newest.samples:,} samples"
        print(f"resume    {state} ({newest.path.name})")


def _spawn(config: PretrainConfig) -> None:
    with tempfile.TemporaryDirectory() as folder:
        try:
            ranks = torch.multiprocessing.start_processes(
                _rank_main,
                args=(config.ranks, str(Path(folder) / "store"), to_dict(config)),
                nprocs=config.ranks,
                join=False,
                start_method="spawn",
            )
            # When one rank fails the others may sit in a collective and not hear SIGTERM: they get five seconds.
            while not ranks.join(grace_period=5):
                pass
        except torch.multiprocessing.ProcessExitedException as error:
            _raise_told(Path(folder))
            raise MomoError(
                "a training process died",
                seen=f"rank {error.error_index}, exit code {error.exit_code}",
                rule="all ranks run to the end",
                fix="start again with the same command: the run continues from its last checkpoint",
            ) from None
    read_checkpoints(Path(config.out))


def _rank_main(rank: int, ranks: int, store: str | None, fields: dict[str, object]) -> None:
    """Runs one rank; `store` is the rendezvous file of a job started here, None under an external launcher."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    if store is not None:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks))
        os.environ.update(LOCAL_SIZE=str(ranks))
    from .trainer import Trainer

    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        _join(rank, ranks, store)
        Trainer(config_from_dict(PretrainConfig, fields), rank=rank, ranks=ranks).train()
    except MomoError as error:
        if store is None:
            raise
        _tell(error, Path(store).parent, rank)
        os._exit(1)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _tell(error: MomoError, folder: Path, rank: int) -> None:
    """Leaves an error of a rank for the launching process, which raises it once."""
    seen = None if error.seen is None else str(error.seen)
    fields = {"kind": type(error).__name__, "what": error.what, "seen": seen, "rule": error.rule, "fix": error.fix}
    write_json(folder / f"error-{rank:05d}.json", fields)


def _raise_told(folder: Path) -> None:
    for path in sorted(folder.glob("error-*.json")):
        fields = json.loads(path.read_text(encoding="utf-8"))
        raise getattr(errors, fields.pop("kind"))(fields.pop("what"), **fields)


def _join(rank: int, ranks: int, store: str | None) -> None:
    # It warns on every machine that has a CUDA compiler but no CUDA device.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    deepspeed = require("deepspeed", "pretrain")
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    backend = "nccl" if cuda else "gloo"
    if store is not None:
        dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=ranks)
    else:
        dist.init_process_group(backend)
    with contextlib.redirect_stdout(io.StringIO()):
        deepspeed.init_distributed(dist_backend=backend)
