"""Merge methods that drop entries of the task vectors before they are added: TIES, DARE, Breadcrumbs.

Which entries are kept is decided on float32 magnitudes, or by a seeded random mask, and so is the same in float32 and
in float64 arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch

from momo.errors import MergeError

from ..trim import kept_count, magnitude_threshold
from .blocks import check_coefficients, check_tensors, flat, parts, scratch, task_vector_blocks

Drop = Callable[[torch.Tensor], object]
"""Sets the dropped entries of the next block of a task vector to 0, in place."""


def ties(
    base: torch.Tensor,
    tuned: Sequence[torch.Tensor],
    coefficients: Sequence[float],
    *,
    density: float,
    thresholds: Sequence[float] | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Trims task vectors, elects a sign for each entry, and adds the mean of the entries that have it.

    Yadav et al. 2023, "TIES-Merging: Resolving Interference When Merging Models", arXiv 2306.01708. The paper trims
    over the whole model, which `thresholds` does; mergekit trims each tensor, as is done without them. Entries that
    equal the threshold are all kept.

    The paper has one coefficient. Here each scales its own trimmed task vector before the election, so a checkpoint
    votes and counts with its scaled entries: equal positive coefficients give the paper's result, and 0 leaves a
    checkpoint out. Where the sum is exactly 0 no sign is elected and the base stays; the paper's code gives such
    entries the sign that is more frequent in the model, mergekit the positive one.

    Args:
        base: The tensor all checkpoints started from.
        tuned: The same tensor in each checkpoint.
        coefficients: Scaling coefficient of each checkpoint.
        density: Fraction of the entries of largest magnitude that is kept, above 0 and at most 1; 1 keeps all.
        thresholds: Magnitude of each checkpoint below which its entries are trimmed, from the whole model; `density`
            is then unused. None: found in this tensor.
        dtype: Of the arithmetic and of the result.

    Returns:
        Tensor of the same shape and of `dtype`.

    Raises:
        MergeError: As `task_arithmetic`; the density is out of range, or another number of thresholds.
    """
    check_tensors(base, tuned, dtype)
    if thresholds is None:
        thresholds = [_threshold(base, tensor, kept_count(base.numel(), density), dtype) for tensor in tuned]
    if len(thresholds) != len(tuned):
        raise MergeError(
            "thresholds and checkpoints differ in number",
            seen=f"{len(thresholds)} thresholds, {len(tuned)} checkpoints",
            rule="one threshold a checkpoint",
        )
    drops = [_drop_outside(low, math.inf, base) for low in thresholds]
    return _elect_and_average(base, tuned, coefficients, drops, dtype)


def dare(
    base: torch.Tensor,
    tuned: Sequence[torch.Tensor],
    coefficients: Sequence[float],
    *,
    density: float,
    seeds: Sequence[int],
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Drops task vector entries at random, divides the rest by the density, scales and adds them to the base.

    Yu et al. 2024, "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch",
    arXiv 2311.03099: base + sum_i c_i m_i (tuned_i - base) / density, so that the expected value is task arithmetic's.
    The paper's drop rate is 1 - density.

    Args:
        base: The tensor all checkpoints started from.
        tuned: The same tensor in each checkpoint.
        coefficients: Scaling coefficient of each task vector.
        density: Probability that an entry is kept, above 0 and at most 1; 1 is task arithmetic.
        seeds: Seed of each checkpoint's mask, see `dare_mask`.
        dtype: Of the arithmetic and of the result.

    Returns:
        Tensor of the same shape and of `dtype`.

    Raises:
        MergeError: As `task_arithmetic`; the density is out of range, or another number of seeds.
    """
    check_tensors(base, tuned, dtype)
    drops = _random_drops(base, tuned, density, seeds)
    return _add_up(base, tuned, [factor / density for factor in coefficients], drops, dtype)


def dare_ties(
    base: torch.Tensor,
    tuned: Sequence[torch.Tensor],
    coefficients: Sequence[float],
    *,
    density: float,
    seeds: Sequence[int],
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Drops and rescales entries as `dare` does, then elects signs and averages as `ties` does.

    Yu et al. 2024, arXiv 2311.03099, with Yadav et al. 2023, arXiv 2306.01708. As in mergekit the random mask takes
    the place of trimming; the paper's code trims by magnitude as well.

    Args:
        base: The tensor all checkpoints started from.
        tuned: The same tensor in each checkpoint.
        coefficients: Scaling coefficient of each checkpoint; it enters as in `ties`.
        density: Probability that an entry is kept, above 0 and at most 1.
        seeds: Seed of each checkpoint's mask, see `dare_mask`.
        dtype: Of the arithmetic and of the result.

    Returns:
        Tensor of the same shape and of `dtype`.

    Raises:
        MergeError: As `dare`.
    """
    check_tensors(base, tuned, dtype)
    drops = _random_drops(base, tuned, density, seeds)
    return _elect_and_average(base, tuned, [factor / density for factor in coefficients], drops, dtype)


def breadcrumbs(
    base: torch.Tensor,
    tuned: Sequence[torch.Tensor],
    coefficients: Sequence[float],
    *,
    density: float,
    outliers: float,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Drops the largest and the smallest entries of each task vector and adds the scaled rest to the base.

    Davari & Belilovsky 2024, "Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks",
    arXiv 2312.06795, each tensor by itself as in the paper. Of n entries floor(outliers n) of largest magnitude are
    dropped, the next density * n (rounded, at least one) are kept. Entries that equal the smallest or the largest
    kept one are kept too. mergekit cuts down the outliers where the two fractions exceed 1; here that is an error.

    Args:
        base: The tensor all checkpoints started from.
        tuned: The same tensor in each checkpoint.
        coefficients: Scaling coefficient of each task vector.
        density: Fraction of the entries that is kept, above 0; density + outliers is at most 1.
        outliers: Fraction of the entries of largest magnitude that is dropped, at least 0 and below 1.
        dtype: Of the arithmetic and of the result.

    Returns:
        Tensor of the same shape and of `dtype`.

    Raises:
        MergeError: As `task_arithmetic`; the density or the outliers are out of range.
    """
    check_tensors(base, tuned, dtype)
    keep = kept_count(base.numel(), density)
    if not (outliers >= 0 and density + outliers <= 1 + 1e-9):
        raise MergeError(
            "the fraction of outliers is out of range",
            seen=f"outliers {outliers}, density {density}",
            rule="outliers at least 0, density + outliers at most 1",
        )
    # Float products such as 0.29 * 100 lie just below the whole number they stand for.
    top = min(math.floor(outliers * base.numel() + 1e-9), base.numel() - keep)
    drops = []
    for tensor in tuned:
        high = _threshold(base, tensor, top + 1, dtype) if top else math.inf
        drops.append(_drop_outside(_threshold(base, tensor, top + keep, dtype), high, base))
    return _add_up(base, tuned, coefficients, drops, dtype)


def dare_mask(shape: Sequence[int], density: float, seed: int) -> torch.Tensor:
    """Returns the random mask of `dare`: True where an entry is kept.

    Args:
        shape: Shape of the tensor.
        density: Probability that an entry is kept, above 0 and at most 1.
        seed: Of PyTorch's CPU generator; the number of threads does not matter.

    Returns:
        bool tensor of `shape`.

    Raises:
        MergeError: The density is out of range.
    """
    kept_count(1, density)
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(tuple(shape), generator=generator) < density


def _threshold(base: torch.Tensor, tuned: torch.Tensor, keep: int, dtype: torch.dtype) -> float:
    """Returns the keep-th largest magnitude of one task vector; 0 where all entries are kept."""
    if keep == base.numel():
        return 0.0
    starts, values = flat(base), flat(tuned)

    def pieces() -> Iterator[torch.Tensor]:
        for part in parts(base.numel()):
            yield values[part].to(dtype) - starts[part].to(dtype)

    return magnitude_threshold(pieces, base.numel(), keep)


def _drop_outside(low: float, high: float, like: torch.Tensor) -> Drop:
    """Returns a function that keeps the entries with low <= float32 magnitude <= high."""
    if low <= 0 and high == math.inf:
        return lambda delta: None
    magnitudes, masks = scratch(like, torch.float32), scratch(like, torch.float32)

    def drop(delta: torch.Tensor) -> None:
        magnitude, mask = magnitudes[: len(delta)].copy_(delta).abs_(), masks[: len(delta)]
        if high < math.inf:
            delta.mul_(torch.le(magnitude, high, out=mask))
        delta.mul_(torch.ge(magnitude, low, out=mask))

    return drop


def _random_drops(
    base: torch.Tensor, tuned: Sequence[torch.Tensor], density: float, seeds: Sequence[int]
) -> list[Drop]:
    kept_count(1, density)
    if len(seeds) != len(tuned):
        raise MergeError(
            "seeds and checkpoints differ in number",
            seen=f"{len(seeds)} seeds, {len(tuned)} checkpoints",
            rule="one seed a checkpoint",
        )
    return [_drop_at_random(density, seed, base) for seed in seeds]


def _drop_at_random(density: float, seed: int, like: torch.Tensor) -> Drop:
    """Returns a function that drops the entries outside `dare_mask`.

    The generator draws one number after the other, so that drawing by blocks gives the mask of the whole tensor.
    """
    generator = torch.Generator().manual_seed(seed)
    buffer = scratch(like, torch.float32)

    def drop(delta: torch.Tensor) -> None:
        delta.mul_(buffer[: len(delta)].uniform_(generator=generator).lt_(density))

    return drop


def _add_up(
    base: torch.Tensor,
    tuned: Sequence[torch.Tensor],
    coefficients: Sequence[float],
    drops: Sequence[Drop],
    dtype: torch.dtype,
) -> torch.Tensor:
    """Adds the scaled task vectors to the base after dropping."""
    check_coefficients(coefficients, tuned)
    merged = torch.empty(base.shape, dtype=dtype)
    for start, total, deltas in task_vector_blocks(base, tuned, merged):
        total.zero_()
        for coefficient, drop, delta in zip(coefficients, drops, deltas, strict=True):
            drop(delta)
            total.add_(delta.mul_(coefficient))
        total.add_(start)
    return merged


def _elect_and_average(
    base: torch.Tensor,
    tuned: Sequence[torch.Tensor],
    coefficients: Sequence[float],
    drops: Sequence[Drop],
    dtype: torch.dtype,
) -> torch.Tensor:
    """Adds, entry by entry, the mean of the scaled kept entries whose sign is that of their sum.

    The election is held with coefficients relative to the largest, which are exactly 1 where all are equal: otherwise
    the rounding of the products would decide between entries that cancel.
    """
    check_coefficients(coefficients, tuned)
    largest = max(abs(factor) for factor in coefficients) or 1.0
    merged = torch.empty(base.shape, dtype=dtype)
    buffers = [scratch(base, dtype) for _ in range(5)]
    for start, result, deltas in task_vector_blocks(base, tuned, merged):
        temporary, *sides = (buffer[: len(result)] for buffer in buffers)
        up, ups, down, downs = (side.zero_() for side in sides)
        for coefficient, drop, delta in zip(coefficients, drops, deltas, strict=True):
            drop(delta)
            delta.mul_(coefficient / largest)
            ups.add_(torch.gt(delta, 0, out=temporary))
            downs.add_(torch.lt(delta, 0, out=temporary))
            up.add_(torch.clamp(delta, min=0, out=temporary))
            down.add_(torch.clamp(delta, max=0, out=temporary))
        torch.div(up, ups.clamp_(min=1), out=ups)
        torch.div(down, downs.clamp_(min=1), out=downs)
        # A mean is multiplied by 1 where its side has won the election, and by 0 elsewhere.
        against = torch.neg(down, out=temporary)
        ups.mul_(torch.gt(up, against, out=down))
        downs.mul_(torch.lt(up, against, out=down))
        torch.add(ups, downs, out=result).mul_(largest).add_(start)
    return merged
