"""Writing and finding checkpoints of a run (layout in `momo.runs`)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError, DataError
from ..files import remove_leftovers
from ..runs import CONFIG_NAME, Checkpoint, checkpoint_name, find_checkpoints
from ..weights import Card, save_weights
from .config import PretrainConfig

# A run may be continued with another value of these: they change neither the data order nor the arithmetic.
_FREE_KEYS = {
    "ranks",
    "keep_engine",
    "data.workers",
    "data.cache_mb",
    "data.verify",
    "train.log_every",
    "licence",
    "deepspeed",
}


def write_checkpoint(
    run: Path,
    samples: int,
    tensors: dict[str, torch.Tensor],
    card: Card,
    *,
    save_engine: Callable[[Path], None],
    is_main: bool,
    barrier: Callable[[], None],
) -> Path:
    """Writes one checkpoint on all ranks together, under a temporary name that is renamed when it is whole.

    Args:
        run: RUN folder.
        samples: Training samples seen.
        tensors: The whole model; used by the main rank only.
        card: Its card; used by the main rank only.
        save_engine: Called on every rank with the folder that takes the engine's state in `engine/`.
        is_main: True on the rank that writes the weights.
        barrier: Waits for all ranks.

    Returns:
        The checkpoint's folder.
    """
    final = run / "checkpoints" / checkpoint_name(samples)
    # One name for all ranks, which write into it together.
    partial = final.with_name(f".{final.name}.partial")
    if is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    barrier()
    save_engine(partial)
    barrier()
    if is_main:
        save_weights(partial, tensors, card)
        shutil.rmtree(final, ignore_errors=True)
        os.rename(partial, final)
    barrier()
    return final


def drop_old_engines(run: Path, keep: int) -> None:
    """Removes the engine state of all but the newest `keep` checkpoints; weights always stay."""
    for checkpoint in find_checkpoints(run)[:-keep]:
        shutil.rmtree(checkpoint.engine, ignore_errors=True)


def latest_resumable(run: Path) -> Checkpoint | None:
    """Returns the newest complete checkpoint that has engine state, or None."""
    return next((c for c in reversed(find_checkpoints(run)) if c.engine.is_dir()), None)


def clean_partials(run: Path) -> None:
    """Removes what a killed job left half-written in the run's checkpoint folder."""
    folder = run / "checkpoints"
    for path in folder.glob(".samples-*.partial"):
        shutil.rmtree(path)
    if folder.is_dir():
        remove_leftovers(folder)


def check_same_run(stored: dict[str, Any], wanted: dict[str, Any], config: PretrainConfig) -> None:
    """Refuses to continue a run under another configuration.

    Raises:
        ConfigError: A key that changes data or arithmetic differs; all are named.
    """
    before, now = _flat(stored), _flat(wanted)
    changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    changed = [key for key in changed if key not in _FREE_KEYS]
    if changed:
        shown = "; ".join(f"{key} was {before.get(key)!r}, is {now.get(key)!r}" for key in changed)
        raise ConfigError(
            "the run was started with another configuration",
            seen=f"{Path(config.out) / CONFIG_NAME}: {shown}",
            rule="a run continues only as it began",
            fix="give the old values, or another `out`",
        )


def check_same_inputs(newest: Checkpoint, wanted: Card) -> None:
    """Refuses to continue a run whose corpora or base were exchanged under the same paths.

    Args:
        newest: The checkpoint the run would continue from.
        wanted: The card that its next checkpoint would get.

    Raises:
        DataError: A corpus has another fingerprint, or the base another hash.
    """
    before = newest.card.data_fingerprints | {"base": newest.card.base_sha256 or "none"}
    now = wanted.data_fingerprints | {"base": wanted.base_sha256 or "none"}
    changed = [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
    if changed:
        shown = "; ".join(f"{n} was {before.get(n, 'none')[:12]}, is {now.get(n, 'none')[:12]}" for n in changed)
        raise DataError(
            "the run was started on other data or another base",
            seen=shown,
            rule="a run continues on the very tiles and base it began with",
            fix="put them back, or give another `out`",
        )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
