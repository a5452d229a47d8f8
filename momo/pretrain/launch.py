"""From one configuration to a finished RUN: checks, ranks, banner."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import io
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

from .. import errors
from ..config import config_from_dict, to_dict
from ..errors import ConfigError, MomoError, Stopped
from ..extras import require, require_installed
from ..files import write_json
from ..machine import usable_cores
from ..models.blocks import attention_kernel
from ..runs import Checkpoint
from .banner import Facts, banner, describe_device, measured_rate
from .checkpoint import check_resume, check_same_inputs, latest_resumable
from .config import PretrainConfig
from .control import STOP_SIGNALS, StopRequest, Watchdog
from .data import Sources, open_sources
from .keeper import make_uploader
from .plan import check_arithmetic
from .probe import KnnProbe
from .setup import Start, engine_config, make_card, make_start, store_config


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
        complete = _complete(config) or _spawn(config)
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


def _spawn(config: PretrainConfig) -> bool:
    """Starts the ranks on this machine; returns whether the run is complete."""
    received: list[int] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            ranks = torch.multiprocessing.start_processes(
                _rank_main,
                args=(config.world, str(Path(folder) / "store"), to_dict(config)),
                nprocs=config.world,
                join=False,
                start_method="spawn",
            )
            with _passing_on_signals(ranks.processes, received):
                # When one rank fails the others may sit in a collective and not hear SIGTERM: they get five seconds.
                while not ranks.join(grace_period=5):
                    pass
        except (torch.multiprocessing.ProcessExitedException, torch.multiprocessing.ProcessRaisedException) as error:
            _raise_told(Path(folder))
            if isinstance(error, torch.multiprocessing.ProcessRaisedException):
                raise
            if received and error.signal_name in ("SIGTERM", "SIGINT"):
                # It came while the rank was still starting and had nothing to save.
                return _stopped(received)
            raise MomoError(
                "a training process died",
                seen=f"rank {error.error_index}, {_exit_text(error)}",
                rule="all ranks run to the end",
                fix="start again with the same command: the run continues from its last state",
            ) from None
    return _complete(config) or _stopped(received)


def _stopped(received: Sequence[int]) -> bool:
    if signal.SIGINT in received:
        raise KeyboardInterrupt
    return False


def _exit_text(error: torch.multiprocessing.ProcessExitedException) -> str:
    # Linux's out-of-memory killer sends SIGKILL, and says so only in the kernel's log.
    memory = " (the machine may be out of memory)" if error.signal_name == "SIGKILL" else ""
    return f"{error.signal_name}{memory}" if error.signal_name else f"exit code {error.exit_code}"


@contextlib.contextmanager
def _passing_on_signals(processes: Sequence[Any], received: list[int]) -> Iterator[None]:
    """Passes stop signals on to the ranks, which save their state and end; a second Ctrl-C kills them.

    Args:
        processes: The ranks.
        received: Gets the signals that came.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def pass_on(number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and number in received:
            for process in processes:
                process.kill()
            raise KeyboardInterrupt
        received.append(number)
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGTERM)

    before = {number: signal.signal(number, pass_on) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
            _tell(error, Path(store).parent, rank)
        os._exit(2)

    stop_request = StopRequest()
    try:
        with stop_request.listening():
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


def _tell(error: MomoError, folder: Path, rank: int) -> None:
    """Leaves an error of a rank for the launching process, which raises it once."""
    seen = None if error.seen is None else str(error.seen)
    fields = {"kind": type(error).__name__, "what": error.what, "seen": seen, "rule": error.rule, "fix": error.fix}
    write_json(folder / f"error-{rank:05d}.json", fields)


def _raise_told(folder: Path) -> None:
    for path in sorted(folder.glob("error-*.json")):
        fields = json.loads(path.read_text(encoding="utf-8"))
        raise getattr(errors, fields.pop("kind"))(fields.pop("what"), **fields)


def _join(rank: int, ranks: int, store: str | None, timeout_s: float) -> None:
    # It warns on every machine that has a CUDA compiler but no CUDA device.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    deepspeed = require("deepspeed", "pretrain")
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    backend = "nccl" if cuda else "gloo"
    # The watchdog, which knows who is silent, is to be the first to speak.
    timeout = datetime.timedelta(seconds=2 * timeout_s)
    if store is not None:
        dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=timeout)
    else:
        dist.init_process_group(backend, timeout=timeout)
    with contextlib.redirect_stdout(io.StringIO()):
        deepspeed.init_distributed(dist_backend=backend)
