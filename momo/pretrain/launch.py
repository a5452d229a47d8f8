"""From one configuration to a finished RUN: checks, ranks, banner."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import multiprocessing
import os
import shutil
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

from ..config import config_from_dict, to_dict
from ..errors import ConfigError, MomoError, Stopped
from ..extras import require, require_installed
from ..files import locked
from ..machine import usable_cores
from ..models.blocks import attention_kernel
from ..runs import Checkpoint
from .banner import Facts, banner, describe_device, measured_rate
from .checkpoint import check_resume, check_same_inputs, latest_resumable
from .config import PretrainConfig
from .control import StopRequest, collective_timeout
from .data import Sources, open_sources
from .keeper import make_uploader
from .local_ranks import run_ranks, tell
from .plan import check_arithmetic
from .probe import KnnProbe
from .setup import Start, engine_config, make_card, make_start, store_config
from .watchdog import Watchdog

_LOCK_NAME, _LOCK_WAIT_S = ".lock", 20.0


def pretrain(config: PretrainConfig) -> Path:
    """Makes or continues one RUN folder.

    Everything a user can get wrong is checked here, before any rank starts. An external launcher (`deepspeed`,
    `torchrun`, SLURM) that sets RANK and WORLD_SIZE is respected; otherwise `config.ranks` processes are started.
    SIGTERM, SIGUSR1 and Ctrl-C save the state at the end of the step.

    Args:
        config: The job.

    Returns:
        The RUN folder.

    Raises:
        MomoError: Bad configuration, corpus or base; a diverged loss; a lost or silent rank; a full disk.
        Stopped: SIGTERM or SIGUSR1 came and the state is saved.
        KeyboardInterrupt: Ctrl-C came and the state is saved; a second one does not wait for that.
    """
    require_installed("deepspeed", "pretrain")
    launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    rank, ranks = (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])) if launched else (0, config.world)
    if config.ranks not in (None, ranks):
        raise ConfigError(
            "the launcher started another number of ranks",
            seen=f"WORLD_SIZE={ranks}, ranks={config.ranks}",
            fix=f"leave ranks out, or give ranks={ranks}",
        )
    config = dataclasses.replace(config, ranks=ranks)
    if rank == 0:
        _prepare(config)
    if launched:
        complete = _rank_main(rank, ranks, None, to_dict(config))
    else:
        complete = _complete(config) or _run_here(config)
    if not complete:
        newest = latest_resumable(Path(config.out))
        where = f"at {newest.samples:,} samples" if newest is not None else "before its first state"
        raise Stopped(f"stopped by a signal {where}; the same command continues the run")
    return Path(config.out)


def _complete(config: PretrainConfig) -> bool:
    newest = latest_resumable(Path(config.out))
    return (
        newest is not None and newest.samples >= config.train.samples - config.train.samples % config.train.batch_size
    )


def _prepare(config: PretrainConfig) -> None:
    """Checks all inputs, stores the configuration and prints the banner."""
    run = Path(config.out)
    newest = latest_resumable(run)
    check_resume(config, newest)
    sources = open_sources(config, verify=config.data.verify)
    notes = [*sources.notes, *check_arithmetic(config, sources.supplies())]
    start = make_start(config, sources.corpora[0].manifest.tile_size)
    settings = engine_config(config)
    if config.telemetry.probe is not None:
        KnnProbe(Path(config.telemetry.probe), sources.normalisations[0], neighbours=config.telemetry.probe_neighbours)
    if config.checkpoint.upload is not None:
        make_uploader(config.checkpoint, run).check(run)
    if newest is not None:
        wanted = make_card(config, sources, start)
        notes += check_same_inputs(newest, wanted, accept_changed_corpus=config.data.accept_changed_corpus)
    notes += store_config(config)
    facts = _facts(config, sources, start, settings, newest)
    lines = banner(config, start.model.architecture, facts)
    print("\n".join([*lines, *(f"{'note':<10}{note}" for note in notes)]), flush=True)


def _facts(
    config: PretrainConfig, sources: Sources, start: Start, settings: dict[str, Any], newest: Checkpoint | None
) -> Facts:
    run, zero = Path(config.out), settings["zero_optimization"]
    offloads = {"offload_optimizer": "optimizer state", "offload_param": "parameters"}
    parameters = list(start.model.parameters())
    origin = f"base {start.parents[0]['sha256'][:12]}" if start.parents else f"random, seed {config.seed}"
    place = next(folder for folder in (run, *run.absolute().parents) if folder.is_dir())
    return Facts(
        tiles=[(corpus.sensor, corpus.count("train"), corpus.count("val")) for corpus in sources.corpora],
        synthetic=start.synthetic or any(corpus.manifest.synthetic for corpus in sources.corpora),
        origin=origin,
        parameters=sum(p.numel() for p in parameters),
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
        attention=attention_kernel(config.model.attention, "cuda" if torch.cuda.is_available() else "cpu"),
        zero_stage=zero["stage"],
        offload=[name for key, name in offloads.items() if zero.get(key, {}).get("device", "none") != "none"],
        device=describe_device(config.world),
        free_bytes=shutil.disk_usage(place).free,
        done=newest.samples if newest is not None else 0,
        resumed_from=newest.path.name if newest is not None else None,
        images_per_s=measured_rate(run),
    )


def _run_here(config: PretrainConfig) -> bool:
    with _owning(Path(config.out)):
        pass  # rank 0 takes the lock; that it cannot be had is better known before all ranks start
    received = run_ranks(_rank_main, config.world, to_dict(config))
    complete = _complete(config)
    if not complete and signal.SIGINT in received:
        raise KeyboardInterrupt
    return complete


def _rank_main(rank: int, ranks: int, store: str | None, fields: dict[str, Any]) -> bool:
    """Runs one rank; `store` is the rendezvous file of a job started here, None under an external launcher."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if store is not None:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks))
        os.environ.update(LOCAL_SIZE=str(ranks))
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        if "OMP_NUM_THREADS" not in os.environ:
            here = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or ranks)
            torch.set_num_threads(max(1, usable_cores() // here))
    from .trainer import Trainer

    warnings.filterwarnings("ignore", category=FutureWarning)
    config = config_from_dict(PretrainConfig, fields)

    def give_up(error: MomoError) -> None:
        if store is None:
            print(f"momo: error: {error}", file=sys.stderr, flush=True)
        else:
            tell(error, Path(store), rank)
        os._exit(2)

    stop_request = StopRequest()
    try:
        with stop_request.listening():
            if _orphaned():
                return False
            with _owning(Path(config.out)) if rank == 0 else contextlib.nullcontext():
                _join(rank, ranks, store, config.timeout_s)
                beats = dist.distributed_c10d._get_default_store()
                with Watchdog(beats, rank, ranks, config.timeout_s, give_up) as watchdog:
                    trainer = Trainer(config, rank=rank, ranks=ranks, beat=watchdog.beat, stop_request=stop_request)
                    complete = trainer.train()
        if store is None and stop_request.name == "SIGINT" and not complete:
            raise KeyboardInterrupt
        return complete
    except MomoError as error:
        if store is None:
            raise
        give_up(error)
        return False
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _owning(run: Path) -> contextlib.AbstractContextManager[None]:
    # The ranks of a launcher that was killed may still save their state.
    return locked(run / _LOCK_NAME, what="the run", wait_s=_LOCK_WAIT_S)


def _orphaned() -> bool:
    """Says whether the launching process died before this rank listened for the signal that would tell it so."""
    parent = multiprocessing.parent_process()
    return parent is not None and not parent.is_alive()


def _join(rank: int, ranks: int, store: str | None, timeout_s: float) -> None:
    # It warns on every machine that has a CUDA compiler but no CUDA device.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    deepspeed = require("deepspeed", "pretrain")
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    backend = "nccl" if cuda else "gloo"
    timeout = collective_timeout(timeout_s)
    if store is not None:
        dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=timeout)
    else:
        dist.init_process_group(backend, timeout=timeout)
    with contextlib.redirect_stdout(io.StringIO()):
        deepspeed.init_distributed(dist_backend=backend)
