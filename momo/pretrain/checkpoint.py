"""Writing, finding and thinning out the checkpoints of a run (layout in `momo.runs`).

checkpoints/samples-...   on the grid of `validation.every`: weights, card with validation loss, at first also engine/
resume/samples-...        in between, for resuming alone; removed when something newer can be resumed from
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ..errors import CheckpointError, ConfigError, DataError
from ..files import remove_leftovers
from ..runs import CHECKPOINTS_NAME, CONFIG_NAME, RESUME_NAME, Checkpoint, checkpoint_name, find_checkpoints
from ..weights import Card, save_weights
from .config import PretrainConfig
from .engine import OptimizerState
from .state import ENGINE_NAME, RunState, has_state, save_state

# A run may go on with another value of these: they change speed and safety alone, or are compared by content, as
# corpora and base are, so that a run can be moved. A change of the second group alters the arithmetic and is told.
_FREE = {
    "out", "resume", "base", "ranks", "deepspeed", "timeout_s", "licence",
    "data.corpora", "data.pipe", "data.buffer_mb", "data.on_corrupt", "data.corrupt_budget",
    "data.accept_changed_corpus", "data.workers", "data.cache_mb", "data.verify",
    "model.attention", "model.activation_checkpointing", "model.compile", "loss.lpips_backbone",
    "train.micro_batch", "train.on_nonfinite", "train.nonfinite_budget", "train.log_every",
    "checkpoint.resume_every", "checkpoint.keep_engine", "checkpoint.upload", "checkpoint.upload_engine",
    "telemetry.reconstructions", "telemetry.peak_tflops", "telemetry.probe", "telemetry.probe_neighbours",
}  # fmt: skip
_TOLD = {"train.precision"}


def write_checkpoint(
    parent: Path, samples: int, tensors: dict[str, torch.Tensor], card: Card, state: tuple[OptimizerState, RunState]
) -> Path:
    """Writes one checkpoint under a temporary name that is renamed when it is whole.

    Args:
        parent: Folder of checkpoints.
        samples: Training samples seen.
        tensors: The whole model.
        card: Its card.
        state: What resuming needs.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: The disk is full or cannot be written; older checkpoints are as they were.
    """
    final = parent / checkpoint_name(samples)
    partial = final.with_name(f".{final.name}.partial")
    weights = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    with _told_when_full(parent, needed=weights + sum(t.numel() * 4 for t in state[0].moments.values())):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            save_state(partial, *state)
            save_weights(partial, tensors, card)
            shutil.rmtree(final, ignore_errors=True)
            os.rename(partial, final)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return final


@contextlib.contextmanager
def _told_when_full(parent: Path, needed: int) -> Iterator[None]:
    """Turns a failed write into an error with the numbers."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        free = shutil.disk_usage(parent).free if parent.is_dir() else 0
        raise CheckpointError(
            "a checkpoint could not be written" + (": the disk is full" if full else ""),
            seen=f"{parent}: {error}; {needed / 2**30:.2f} GiB needed, {free / 2**30:.2f} GiB free",
            rule="there is room for one more checkpoint with its optimizer state",
            fix="make room and start again with the same command: the run continues from the state before",
        ) from None


def thin_out(run: Path, keep: int) -> None:
    """Removes what is no longer needed for resuming; weights in checkpoints/ always stay.

    Args:
        run: RUN folder.
        keep: Newest checkpoints that keep their engine state.
    """
    resumable = [checkpoint for checkpoint in find_checkpoints(run) if has_state(checkpoint.path)]
    for checkpoint in resumable[:-keep]:
        shutil.rmtree(checkpoint.path / ENGINE_NAME, ignore_errors=True)
    between = sorted((run / RESUME_NAME).glob("samples-*"))
    newest = latest_resumable(run)
    for path in between:
        if newest is not None and path != newest.path:
            shutil.rmtree(path, ignore_errors=True)


def latest_resumable(run: Path) -> Checkpoint | None:
    """Returns the newest complete checkpoint that has the state for resuming, or None."""
    found = [*find_checkpoints(run, CHECKPOINTS_NAME), *find_checkpoints(run, RESUME_NAME)]
    return max((c for c in found if has_state(c.path)), key=lambda c: c.samples, default=None)


def clean_partials(run: Path) -> None:
    """Removes what a killed job left half-written in the run."""
    for folder in (run / CHECKPOINTS_NAME, run / RESUME_NAME):
        for path in folder.glob(".samples-*.partial"):
            shutil.rmtree(path)
        if folder.is_dir():
            remove_leftovers(folder)


def check_resume(config: PretrainConfig, newest: Checkpoint | None) -> None:
    """Compares what is there with `resume`.

    Raises:
        ConfigError: `never` and there is a run, or `must` and there is none.
    """
    if config.resume == "never" and (Path(config.out) / CONFIG_NAME).is_file():
        raise ConfigError(
            "there is a run already",
            seen=config.out,
            rule="resume=never starts in a new folder",
            fix="choose another `out`, or resume=auto to continue it",
        )
    if config.resume == "must" and newest is None:
        raise ConfigError(
            "there is nothing to resume",
            seen=config.out,
            rule="resume=must continues a run that has a state",
            fix="check `out`, or use resume=auto to start",
        )


def check_same_run(stored: dict[str, Any], wanted: dict[str, Any], config: PretrainConfig) -> list[str]:
    """Refuses to continue a run under another configuration.

    Returns:
        Lines about changes that are allowed and alter the arithmetic.

    Raises:
        ConfigError: A key that changes data or arithmetic differs; all are named.
    """
    before, now = _flat(stored), _flat(wanted)
    changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    refused = [key for key in changed if key not in _FREE | _TOLD]
    if refused:
        shown = "; ".join(f"{key} was {before.get(key)!r}, is {now.get(key)!r}" for key in refused)
        raise ConfigError(
            "the run was started with another configuration",
            seen=f"{Path(config.out) / CONFIG_NAME}: {shown}",
            rule="a run continues only as it began",
            fix="give the old values, or another `out`",
        )
    return [f"{key} was {before.get(key)}, is {now.get(key)}" for key in changed if key in _TOLD]


def check_same_inputs(newest: Checkpoint, wanted: Card, *, accept_changed_corpus: bool = False) -> list[str]:
    """Refuses to continue a run whose corpora or base are not those it began with.

    Args:
        newest: The checkpoint the run would continue from.
        wanted: The card that its next checkpoint would get.
        accept_changed_corpus: Let corpora differ; the base never may.

    Returns:
        Lines about changed corpora that were accepted.

    Raises:
        DataError: A corpus has another fingerprint, or the base another hash.
    """
    before = newest.card.data_fingerprints | {"base": newest.card.base_sha256 or "none"}
    now = wanted.data_fingerprints | {"base": wanted.base_sha256 or "none"}
    changed = [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
    lines = [f"{n} was {before.get(n, 'none')[:12]}, is {now.get(n, 'none')[:12]}" for n in changed]
    if changed and not (accept_changed_corpus and "base" not in changed):
        raise DataError(
            "the run was started on other data or another base",
            seen="; ".join(lines),
            rule="a run continues on the very tiles and base it began with",
            fix="put them back, or give another `out`; data.accept_changed_corpus=true goes on with other corpora",
        )
    return [f"corpus {line}" for line in lines]


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
