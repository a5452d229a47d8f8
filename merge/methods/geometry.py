"""Merge methods that look at the angle between whole tensors: Model Stock and spherical interpolation.

Angles come from float64 sums in a fixed order, so neither the number of threads nor a library's choice of kernel
changes a bit of the result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from momo.errors import MergeError

from .arithmetic import average
from .blocks import check_tensors, flat, parts, scratch

_LANES = 32_768
_NEARLY_PARALLEL = 1e-6


def model_stock(
    base: torch.Tensor, tuned: Sequence[torch.Tensor], *, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Interpolates between base and average by the angle between the task vectors: t average + (1 - t) base.

    Jang et al. 2024, "Model Stock: All we need is just a few fine-tuned models", arXiv 2403.19522:
    t = n cos / (1 + (n - 1) cos) with the cosine between the task vectors of this tensor. The paper names one angle;
    for n > 2 the mean over all pairs is taken, as in mergekit. A zero task vector has cosine 0 with every other. A
    mean cosine below 0, for which the formula points away from the average, counts as 0 and gives the base.

    Args:
        base: The tensor all checkpoints started from.
        tuned: The same tensor in each checkpoint, two or more.
        dtype: Of the arithmetic and of the result.

    Returns:
        Tensor of the same shape and of `dtype`.

    Raises:
        MergeError: As `task_vector`, or fewer than two checkpoints.
    """
    check_tensors(base, tuned, dtype)
    if len(tuned) < 2:
        raise MergeError("Model Stock needs an angle between checkpoints", seen=f"{len(tuned)} checkpoint", rule="two+")
    ratio = stock_ratio(mean_cosine(base, tuned, dtype=dtype), len(tuned))
    merged = average(tuned, dtype=dtype)
    starts, results = flat(base), merged.view(-1)
    buffer = scratch(base, dtype)
    for part in parts(base.numel()):
        result = results[part].mul_(ratio)
        result.add_(buffer[: len(result)].copy_(starts[part]).mul_(1 - ratio))
    return merged


def stock_ratio(cosine: float, count: int) -> float:
    """Returns Model Stock's share of the average, 0 to 1, for `count` checkpoints at a mean cosine of -1 to 1."""
    cosine = min(max(cosine, 0.0), 1.0)
    return count * cosine / (1 + (count - 1) * cosine)


def mean_cosine(base: torch.Tensor, tuned: Sequence[torch.Tensor], *, dtype: torch.dtype = torch.float32) -> float:
    """Returns the mean over all pairs of the cosine between task vectors, -1 to 1; a zero task vector counts as 0."""
    count = len(tuned)
    products = _dot_products(tuned, base, dtype)
    cosines = []
    for first in range(count):
        for second in range(first + 1, count):
            norms = math.sqrt(products[first, first]) * math.sqrt(products[second, second])
            cosines.append(products[first, second] / norms if norms > 0 else 0.0)
    return math.fsum(cosines) / len(cosines)


def slerp(first: torch.Tensor, second: torch.Tensor, t: float, *, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Interpolates on the arc between two tensors: sin((1-t) a)/sin(a) first + sin(t a)/sin(a) second.

    Shoemake 1985, "Animating rotation with quaternion curves", doi 10.1145/325165.325242, with the angle a between the
    two tensors themselves, not between task vectors. Where |cos a| exceeds 1 - 1e-6 or a tensor is zero the result is
    linear, (1-t) first + t second; mergekit is linear from 0.9995 on, which checkpoints of one base often exceed.

    Args:
        first: The tensor in the first checkpoint.
        second: The same tensor in the second one.
        t: Position, 0 (first) to 1 (second).
        dtype: Of the arithmetic and of the result.

    Returns:
        Tensor of the same shape and of `dtype`.

    Raises:
        MergeError: As `task_vector`, or t is out of range.
    """
    check_tensors(None, [first, second], dtype)
    if not 0 <= t <= 1:
        raise MergeError("the position between two checkpoints is out of range", seen=t, rule="0 to 1")
    products = _dot_products([first, second], None, dtype)
    norms = math.sqrt(products[0, 0]) * math.sqrt(products[1, 1])
    cosine = products[0, 1] / norms if norms > 0 else 1.0
    if abs(cosine) > 1 - _NEARLY_PARALLEL:
        shares = (1 - t, t)
    else:
        angle = math.acos(cosine)
        shares = (math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle))
    merged = torch.empty(first.shape, dtype=dtype)
    firsts, seconds, results = flat(first), flat(second), merged.view(-1)
    buffer = scratch(first, dtype)
    for part in parts(first.numel()):
        result = results[part].copy_(firsts[part]).mul_(shares[0])
        result.add_(buffer[: len(result)].copy_(seconds[part]).mul_(shares[1]))
    return merged


def _dot_products(
    tensors: Sequence[torch.Tensor], origin: torch.Tensor | None, dtype: torch.dtype
) -> dict[tuple[int, int], float]:
    """Returns the dot products of all pairs (first <= second) of the tensors, seen from the origin.

    Entry i of a tensor is added to lane i mod 32,768, in order; the lanes are then folded by halves.

    Args:
        tensors: Tensors of one shape.
        origin: Subtracted from each in `dtype`; None: nothing is.
        dtype: In which the tensors are compared; products and sums are float64.

    Returns:
        (first, second) to the dot product.
    """
    models, start = [flat(tensor) for tensor in tensors], None if origin is None else flat(origin)
    pairs = [(first, second) for first in range(len(models)) for second in range(first, len(models))]
    lanes = {pair: torch.zeros(_LANES, dtype=torch.float64) for pair in pairs}
    buffer = torch.empty(_LANES, dtype=torch.float64)
    for begin in range(0, models[0].numel(), _LANES):
        part = slice(begin, begin + _LANES)
        values = [model[part].to(dtype) for model in models]
        if start is not None:
            values = [value - start[part].to(dtype) for value in values]
        doubles = [value.double() for value in values]
        for first, second in pairs:
            product = torch.mul(doubles[first], doubles[second], out=buffer[: len(doubles[first])])
            lanes[first, second][: len(product)].add_(product)
    return {pair: _fold(lane) for pair, lane in lanes.items()}


def _fold(lane: torch.Tensor) -> float:
    while len(lane) > 1:
        half = len(lane) // 2
        lane = lane[:half] + lane[half:]
    return float(lane)
