"""Fisher-weighted averaging."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from momo.errors import MergeError

from .blocks import check_tensors, flat, parts, relative_weights, scratch


def fisher_average(
    tuned: Sequence[torch.Tensor],
    fishers: Sequence[torch.Tensor],
    weights: Sequence[float],
    *,
    floor: float,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Averages checkpoints entry by entry with their Fisher information: sum_i w_i F_i tuned_i / sum_i w_i F_i.

    Matena & Raffel 2022, "Merging Models with Fisher-Weighted Averaging", arXiv 2111.09832, with the diagonal of the
    Fisher information matrix. Entries are averaged alone, so tensors may be cut.

    Args:
        tuned: The same tensor in each checkpoint.
        fishers: Diagonal Fisher information of each checkpoint, of the same shape, none negative. Their scales are
            compared with each other: estimate all in one way.
        weights: One a checkpoint, none negative, at least one above 0; only their ratios matter.
        floor: Smaller information counts as this much, above 0. Where no checkpoint has more, the result is the
            weighted average.
        dtype: Of the arithmetic and of the result.

    Returns:
        Tensor of the same shape and of `dtype`.

    Raises:
        MergeError: As `weighted_average`; or Fisher information of another shape or number, negative or not finite, or
            a floor that is not above 0.
    """
    check_tensors(None, [*tuned, *fishers] if tuned else [], dtype)
    factors = relative_weights(weights, tuned)
    if len(fishers) != len(tuned):
        raise MergeError(
            "Fisher tensors and checkpoints differ in number",
            seen=f"{len(fishers)} Fisher tensors, {len(tuned)} checkpoints",
            rule="one Fisher tensor a checkpoint",
        )
    if not floor > 0:
        raise MergeError("the floor of the Fisher information is not above 0", seen=floor)
    merged = torch.empty(tuned[0].shape, dtype=dtype)
    models, informations, results = [flat(t) for t in tuned], [flat(f) for f in fishers], merged.view(-1)
    buffers = [scratch(merged, dtype) for _ in range(3)]
    for part in parts(merged.numel()):
        result = results[part].zero_()
        mass, information, value = (buffer[: len(result)] for buffer in buffers)
        mass.zero_()
        for factor, model, fisher in zip(factors, models, informations, strict=True):
            _check_information(information.copy_(fisher[part]))
            mass.add_(information.clamp_(min=floor).mul_(factor))
            result.add_(value.copy_(model[part]).mul_(information))
        result.div_(mass)
    return merged


def _check_information(block: torch.Tensor) -> None:
    low, high = (float(bound) for bound in torch.aminmax(block))
    if not (low >= 0 and high < float("inf")):
        raise MergeError(
            "Fisher information is negative or not finite",
            seen=f"{low} to {high}",
            rule="means of squared gradients, 0 or more",
            fix="estimate it again from finite gradients",
        )
