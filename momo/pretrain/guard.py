"""What happens when a loss or a gradient is no number, or when tiles are damaged: told, counted, bounded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import DataError, MomoError
from .config import PretrainConfig
from .telemetry import group_of

_SHOWN = 5


@dataclass(frozen=True)
class NonFinite:
    """A step whose loss or gradients were no numbers.

    Attributes:
        samples: Training samples before the step.
        step: Its number, from 0.
        ranks: Ranks that saw a loss that is no number.
        keys: Samples whose loss was no number, by rank.
        groups: Parts of the model whose gradients were no numbers (`momo.pretrain.telemetry.group_of`).
    """

    samples: int
    step: int
    ranks: list[int]
    keys: list[str]
    groups: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields of an incident line."""
        return {"step": self.step, "ranks": self.ranks, "keys": self.keys, "groups": self.groups}

    def __str__(self) -> str:
        what = "gradients" if not self.ranks else f"loss on rank {', '.join(map(str, self.ranks))}"
        tiles = f"; tiles {_some(self.keys)}" if self.keys else ""
        parts = f"; gradients of {_some(self.groups)}" if self.groups else ""
        return f"{what} at step {self.step} ({self.samples:,} samples){tiles}{parts}"


class Reload(Exception):
    """Asks the training loop to go back to the last good state and to leave one step out."""

    def __init__(self, found: NonFinite) -> None:
        self.found = found
        super().__init__(str(found))


def bad_keys(losses: Sequence[torch.Tensor], keys: Sequence[Sequence[str]]) -> list[str]:
    """Returns the keys of the samples whose loss is no number.

    Args:
        losses: (B,) of each micro-batch.
        keys: B keys of each micro-batch.
    """
    flags = [(~torch.isfinite(loss_B)).tolist() for loss_B in losses]
    return [
        key for flag_B, key_B in zip(flags, keys, strict=True) for flag, key in zip(flag_B, key_B, strict=True) if flag
    ]


def bad_groups(squares: dict[str, float]) -> list[str]:
    """Returns the parts of the model with a gradient that is no number, from sums of squares by parameter."""
    return list(dict.fromkeys(group_of(name) for name, value in squares.items() if not math.isfinite(value)))


def after_nonfinite(found: NonFinite, config: PretrainConfig, count: int) -> None:
    """Follows `train.on_nonfinite`: returns to go on without the step, raises to reload or to stop.

    Args:
        found: The step.
        config: The job.
        count: Steps left out before this one.

    Raises:
        Reload: The policy is to go back to the last good state.
        MomoError: The policy is to stop, or the budget is spent.
    """
    policy, budget = config.train.on_nonfinite, config.train.nonfinite_budget
    if policy == "stop" or count >= budget:
        spent = f"; {count} steps were left out before" if count else ""
        raise MomoError(
            "training diverged: the numbers are not finite",
            seen=f"{found}{spent}",
            rule=f"loss and gradients are finite (train.on_nonfinite={policy}, train.nonfinite_budget={budget})",
            fix="look at the tiles named; lower train.base_lr or go on with train.precision=fp32: the same command "
            "continues from the last checkpoint, which is intact",
        )
    if policy == "reload":
        raise Reload(found)


def check_corrupt(count: int, newest: Sequence[tuple[str, str]], config: PretrainConfig) -> None:
    """Stops a run that has skipped more damaged tiles than `data.corrupt_budget`.

    Args:
        count: Damaged tiles of the run, the newest included.
        newest: Key and reason of the newest ones.
        config: The job.

    Raises:
        DataError: The budget is spent.
    """
    if count > config.data.corrupt_budget:
        raise DataError(
            "too many damaged tiles",
            seen=f"{count}; the last: {_some([f'{key} ({reason})' for key, reason in newest])}",
            rule=f"at most data.corrupt_budget={config.data.corrupt_budget} in a run",
            fix="run momo prep verify on the corpus; mend it, or raise the budget, and start again",
        )


def _some(names: Sequence[str]) -> str:
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
