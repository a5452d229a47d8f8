"""The state a run is resumed from, on disk.

engine/optimizer.safetensors   AdamW's moments by parameter name, whole, float32
engine/state.json              samples, optimizer steps, loss scale, counts; hash of the file above; written last

No pickles, no DeepSpeed files: the state can be read by any number of ranks and by other versions of DeepSpeed. No
random state is in it because nothing in training draws from a global generator.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..errors import CheckpointError
from ..files import atomic_file, sha256_file, write_json
from ..version import __version__
from .engine import OptimizerState

ENGINE_NAME = "engine"
_TENSORS, _STATE, _FORMAT_VERSION = "optimizer.safetensors", "state.json", 1


@dataclass(kw_only=True)
class RunState:
    """Counts that go on where the run was left.

    Attributes:
        samples: Training samples consumed.
        left_out: Samples at which each step began that was left out.
        totals: Work done so far, see `momo.pretrain.summary.Totals`.
    """

    samples: int
    left_out: list[int] = field(default_factory=list)
    totals: dict[str, Any] = field(default_factory=dict)


def has_state(checkpoint: Path) -> bool:
    """Says whether a checkpoint folder has the whole state for resuming."""
    return (checkpoint / ENGINE_NAME / _STATE).is_file()


def save_state(checkpoint: Path, optimizer: OptimizerState, state: RunState) -> None:
    """Writes the state into a checkpoint folder, `state.json` last."""
    folder = checkpoint / ENGINE_NAME
    folder.mkdir()
    with atomic_file(folder / _TENSORS) as partial:
        save_file({name: optimizer.moments[name] for name in sorted(optimizer.moments)}, partial)
    write_json(
        folder / _STATE,
        {
            "format_version": _FORMAT_VERSION,
            "momo_version": __version__,
            "samples": state.samples,
            "optimizer_steps": optimizer.steps,
            "loss_scale": optimizer.loss_scale,
            "left_out": state.left_out,
            "totals": state.totals,
            "sha256": sha256_file(folder / _TENSORS),
        },
    )


def load_state(checkpoint: Path) -> tuple[OptimizerState, RunState]:
    """Reads what `save_state` wrote.

    Raises:
        CheckpointError: A file is missing, damaged or of another format version.
    """
    folder = checkpoint / ENGINE_NAME
    fix = f"remove {checkpoint} to go on from the state before it"
    try:
        fields = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        if fields.pop("format_version") != _FORMAT_VERSION:
            raise CheckpointError(
                "the state was written by another version of momo",
                seen=f"{folder / _STATE}: momo {fields.get('momo_version')}",
                rule=f"this momo ({__version__}) reads version {_FORMAT_VERSION}",
                fix="go on with the momo version named",
            )
        if sha256_file(folder / _TENSORS) != fields["sha256"]:
            raise CheckpointError(
                "the optimizer's state was altered or damaged",
                seen=folder / _TENSORS,
                rule=f"its hash stands in {_STATE}",
                fix=fix,
            )
        optimizer = OptimizerState(load_file(folder / _TENSORS), fields["optimizer_steps"], fields["loss_scale"])
        state = RunState(
            samples=fields["samples"],
            left_out=fields["left_out"],
            totals=fields["totals"],
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(
            "the state for resuming cannot be read", seen=f"{folder}: {error}", rule="it is whole", fix=fix
        ) from None
    return optimizer, state
