"""How the merge methods walk over tensors: flat, in blocks that stay in the processor's cache, one model at a time.

A merge reads every model once and writes one result; each step between runs on a block that is still in the cache.
Products and sums are separate operations: a fused multiply-add, which some vector units have and some remainders of a
loop have not, would make the last bit depend on where a tensor was cut and on the number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from momo.errors import MergeError

BLOCK = 65_536
"""Elements handled at a time: 256 KiB of float32, of which a core's cache takes several."""


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the tensor as one dimension, a view where its layout allows one."""
    return tensor.detach().reshape(-1)


def parts(count: int) -> Iterator[slice]:
    """Yields slices of at most `BLOCK` elements that cover `count` elements in order."""
    for first in range(0, count, BLOCK):
        yield slice(first, min(first + BLOCK, count))


def scratch(like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns an uninitialised buffer as long as the largest block of `like`."""
    return torch.empty(min(BLOCK, like.numel()), dtype=dtype)


def blocks(merged: torch.Tensor, *tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Walks over tensors of one shape block by block.

    Args:
        merged: The result to fill, contiguous; its dtype is that of the arithmetic.
        tensors: Others, not to be changed.

    Yields:
        The part of `merged`, and that of each tensor in the same dtype.
    """
    dtype = merged.dtype
    views = [merged.view(-1).split(BLOCK), *(flat(tensor).split(BLOCK) for tensor in tensors)]
    if all(tensor.dtype == dtype for tensor in tensors):
        yield from zip(*views, strict=True)
    else:
        for result, *others in zip(*views, strict=True):
            yield result, *(other.to(dtype) for other in others)


def fit(buffer: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Returns as much of a buffer as another block is long."""
    count = like.numel()
    return buffer if buffer.numel() == count else buffer[:count]


def task_vector_blocks(
    base: torch.Tensor, tuned: Sequence[torch.Tensor], merged: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor, Iterator[torch.Tensor]]]:
    """Walks over the task vectors block by block.

    Args:
        base: The tensor all checkpoints started from.
        tuned: The same tensor in each checkpoint.
        merged: The result to fill; its dtype is that of the arithmetic.

    Yields:
        The base of the block, the part of `merged` to fill, and the task vectors of the block one after the other in
        the order of `tuned`. All task vectors share one buffer, which the caller may change.
    """
    buffer = scratch(base, merged.dtype)
    for result, start, *models in blocks(merged, base, *tuned):
        delta = fit(buffer, result)
        yield start, result, (torch.sub(model, start, out=delta) for model in models)


def check_tensors(base: torch.Tensor | None, tuned: Sequence[torch.Tensor], dtype: torch.dtype) -> None:
    """Checks that the tensors can be merged entry by entry.

    Raises:
        MergeError: No checkpoint, different shapes, a tensor that is not of floating point, or another `dtype` than
            float32 and float64.
    """
    if dtype not in (torch.float32, torch.float64):
        raise MergeError("merging cannot be done in this dtype", seen=dtype, rule="torch.float32 or torch.float64")
    if not tuned:
        raise MergeError("there is no checkpoint to merge", rule="one or more")
    tensors = [*tuned] if base is None else [base, *tuned]
    shapes = [tuple(tensor.shape) for tensor in tensors]
    if len(set(shapes)) > 1:
        raise MergeError("the tensors differ in shape", seen=shapes, rule="one shape in all models")
    kinds = [tensor.dtype for tensor in tensors]
    if not all(kind.is_floating_point for kind in kinds):
        raise MergeError("a tensor is not of floating point", seen=kinds, rule="only float tensors are merged")


def result_tensor(out: torch.Tensor | None, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """Returns the tensor to fill: `out`, or a new one.

    Raises:
        MergeError: `out` has another shape or dtype, or is not contiguous.
    """
    if out is None:
        return torch.empty(shape, dtype=dtype)
    if out.shape != shape or out.dtype != dtype or not out.is_contiguous():
        raise MergeError(
            "the tensor for the result does not fit it",
            seen=f"{tuple(out.shape)} {out.dtype}, contiguous: {out.is_contiguous()}",
            rule=f"{tuple(shape)} {dtype}, contiguous",
        )
    return out


def check_coefficients(coefficients: Sequence[float], tuned: Sequence[torch.Tensor]) -> None:
    """Checks that there is one finite scaling coefficient a checkpoint.

    Raises:
        MergeError: Another number of coefficients than of checkpoints, or one that is NaN or infinite.
    """
    if len(coefficients) != len(tuned):
        raise MergeError(
            "coefficients and checkpoints differ in number",
            seen=f"{len(coefficients)} coefficients, {len(tuned)} checkpoints",
            rule="one coefficient a checkpoint",
        )
    if not all(math.isfinite(factor) for factor in coefficients):
        raise MergeError("a coefficient is not a finite number", seen=list(coefficients))


def relative_weights(weights: Sequence[float], tuned: Sequence[torch.Tensor]) -> list[float]:
    """Checks the weights of an average and divides them by the largest, so that equal weights are exactly 1.

    Raises:
        MergeError: Another number of weights than of checkpoints, a negative or non-finite one, or all zero.
    """
    check_coefficients(weights, tuned)
    if min(weights) < 0 or max(weights) == 0:
        raise MergeError(
            "the weights of an average are not usable", seen=list(weights), rule="none negative, at least one above 0"
        )
    return [weight / max(weights) for weight in weights]
