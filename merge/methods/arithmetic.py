"""Merge methods that treat every entry alone: averages, task arithmetic, MagMax.

The result of a part of a tensor is the part of the result, to the last bit, so a caller may cut tensors anywhere.
Values must be finite: a NaN never wins a comparison of magnitudes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .blocks import (
    blocks,
    check_coefficients,
    check_tensors,
    fit,
    relative_weights,
    result_tensor,
    scratch,
    task_vector_blocks,
)


def task_vector(base: torch.Tensor, tuned: torch.Tensor, *, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Returns tuned - base, the task vector of Ilharco et al. 2023, arXiv 2212.04089.

    Args:
        base: The tensor the checkpoint started from, of any float dtype.
        tuned: The same tensor in the checkpoint.
        dtype: Both are converted to it before the subtraction.

    Returns:
        Tensor of the same shape and of `dtype`.

    Raises:
        MergeError: The shapes differ, a tensor is not of floating point, or `dtype` is neither float32 nor float64.
    """
    check_tensors(base, [tuned], dtype)
    vector = torch.empty(base.shape, dtype=dtype)
    for _, result, deltas in task_vector_blocks(base, [tuned], vector):
        result.copy_(next(deltas))
    return vector


def average(
    tuned: Sequence[torch.Tensor], *, dtype: torch.dtype = torch.float32, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Averages checkpoints: sum_i tuned_i / n (Wortsman et al. 2022, "Model soups", arXiv 2203.05482).

    Args:
        tuned: The same tensor in each checkpoint, summed in this order.
        dtype: Of the arithmetic and of the result.
        out: Tensor of that shape and dtype to fill and return, contiguous; none of the others. A new one when None.

    Returns:
        Tensor of the same shape and of `dtype`.

    Raises:
        MergeError: As `task_vector`, or no checkpoint.
    """
    return weighted_average(tuned, [1.0] * len(tuned), dtype=dtype, out=out)


def weighted_average(
    tuned: Sequence[torch.Tensor],
    weights: Sequence[float],
    *,
    dtype: torch.dtype = torch.float32,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Averages checkpoints with weights: sum_i w_i tuned_i / sum_i w_i.

    Equal weights of any size give the bits of `average`.

    Args:
        tuned: The same tensor in each checkpoint, summed in this order.
        weights: One a checkpoint, none negative, at least one above 0; only their ratios matter.
        dtype: Of the arithmetic and of the result.
        out: Tensor of that shape and dtype to fill and return, contiguous; none of the others. A new one when None.

    Returns:
        Tensor of the same shape and of `dtype`.

    Raises:
        MergeError: As `average`, or weights that are negative, all zero, not finite or of another number.
    """
    check_tensors(None, tuned, dtype)
    factors = relative_weights(weights, tuned)
    merged = result_tensor(out, tuned[0].shape, dtype)
    buffer = scratch(merged, dtype)
    for total, *models in blocks(merged, *tuned):
        total.zero_()
        for factor, model in zip(factors, models, strict=True):
            total.add_(model if factor == 1 else torch.mul(model, factor, out=fit(buffer, total)))
        total.div_(sum(factors))
    return merged


def task_arithmetic(
    base: torch.Tensor,
    tuned: Sequence[torch.Tensor],
    coefficients: Sequence[float],
    *,
    dtype: torch.dtype = torch.float32,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Adds scaled task vectors to the base: base + sum_i c_i (tuned_i - base).

    Ilharco et al. 2023, "Editing models with task arithmetic", arXiv 2212.04089. Coefficients of 1/n make it the plain
    average; MOMO (arXiv 2604.02719) uses 0.5 for three checkpoints.

    Args:
        base: The tensor all checkpoints started from.
        tuned: The same tensor in each checkpoint; task vectors are added in this order.
        coefficients: Scaling coefficient of each task vector; 0 leaves it out, a negative one subtracts it.
        dtype: Of the arithmetic and of the result.
        out: Tensor of that shape and dtype to fill and return, contiguous; none of the others. A new one when None.

    Returns:
        Tensor of the same shape and of `dtype`.

    Raises:
        MergeError: As `task_vector`, no checkpoint, or coefficients that are not finite or of another number.
    """
    check_tensors(base, tuned, dtype)
    check_coefficients(coefficients, tuned)
    merged = result_tensor(out, base.shape, dtype)
    shared = len(set(coefficients)) == 1  # then the sum is scaled once
    buffer = scratch(base, dtype)
    for total, start, *models in blocks(merged, base, *tuned):
        for number, (coefficient, model) in enumerate(zip(coefficients, models, strict=True)):
            delta = torch.sub(model, start, out=fit(buffer, total) if number else total)
            if not shared:
                delta.mul_(coefficient)
            if number:
                total.add_(delta)
        if shared:
            total.mul_(coefficients[0])
        total.add_(start)
    return merged


def magmax(
    base: torch.Tensor,
    tuned: Sequence[torch.Tensor],
    coefficients: Sequence[float],
    *,
    dtype: torch.dtype = torch.float32,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Adds, entry by entry, the task vector of largest magnitude, scaled.

    Marczak et al. 2024, "MagMax: Leveraging Model Merging for Seamless Continual Learning", arXiv 2407.06322. The
    paper has one coefficient for all; here the winner's own coefficient scales its entry. Magnitudes are compared
    before scaling; of equal ones the first in order wins.

    Args:
        base: The tensor all checkpoints started from.
        tuned: The same tensor in each checkpoint.
        coefficients: Scaling coefficient of each checkpoint's entries.
        dtype: Of the arithmetic and of the result.
        out: Tensor of that shape and dtype to fill and return, contiguous; none of the others. A new one when None.

    Returns:
        Tensor of the same shape and of `dtype`.

    Raises:
        MergeError: As `task_arithmetic`.
    """
    check_tensors(base, tuned, dtype)
    check_coefficients(coefficients, tuned)
    merged = result_tensor(out, base.shape, dtype)
    buffers = [scratch(base, dtype) for _ in range(3)]
    for start, chosen, deltas in task_vector_blocks(base, tuned, merged):
        largest, magnitude, mask = (buffer[: len(chosen)] for buffer in buffers)
        largest.zero_()
        chosen.zero_()
        for coefficient, delta in zip(coefficients, deltas, strict=True):
            torch.abs(delta, out=magnitude)
            # Products with 0 and 1 are exact, and many times faster than torch.where.
            chosen.mul_(torch.le(magnitude, largest, out=mask))
            chosen.add_(delta.mul_(torch.gt(magnitude, largest, out=mask)).mul_(coefficient))
            torch.maximum(largest, magnitude, out=largest)
        chosen.add_(start)
    return merged
