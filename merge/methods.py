"""Merge methods: small pure functions on one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


def task_arithmetic(base: torch.Tensor, tuned: Sequence[torch.Tensor], coefficient: float) -> torch.Tensor:
    """Adds the scaled sum of task vectors to the base: base + coefficient * sum_i (tuned_i - base).

    Ilharco et al. 2023, "Editing models with task arithmetic", arXiv 2212.04089. With n checkpoints a coefficient of
    1/n is the plain average; MOMO uses 0.5 for three.

    Args:
        base: The tensor all checkpoints started from.
        tuned: The same tensor in each checkpoint.
        coefficient: Scale of the summed task vectors.

    Returns:
        float32 tensor of the same shape. Task vectors are added in the order given.
    """
    start = base.float()
    total = torch.zeros_like(start)
    for tensor in tuned:
        total += tensor.float() - start
    return start + coefficient * total


def average(base: torch.Tensor, tuned: Sequence[torch.Tensor], coefficient: float) -> torch.Tensor:
    """Averages the checkpoints (Wortsman et al. 2022, "Model soups", arXiv 2203.05482); base and coefficient unused."""
    total = torch.zeros_like(base, dtype=torch.float32)
    for tensor in tuned:
        total += tensor.float()
    return total / len(tuned)


@dataclass(frozen=True)
class Method:
    """A merge method as the command line knows it."""

    apply: Callable[[torch.Tensor, Sequence[torch.Tensor], float], torch.Tensor]
    uses_coefficient: bool
    reference: str


METHODS: dict[str, Method] = {
    "task_arithmetic": Method(task_arithmetic, True, "arXiv 2212.04089"),
    "average": Method(average, False, "arXiv 2203.05482"),
}
