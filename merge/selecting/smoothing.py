"""Smoothing of validation curves before a rule looks at them; the raw losses are always kept and shown."""

from __future__ import annotations

import itertools
from collections.abc import Sequence


def smooth(losses: Sequence[float], stderrs: Sequence[float | None], smoothing: str) -> list[float]:
    """Smooths the losses of one curve, in order of training samples.

    Args:
        losses: Raw validation losses, length K.
        stderrs: Their standard errors; None where there is none.
        smoothing: `none`, `running_min` (lowest loss so far) or `isotonic` (the non-increasing curve nearest in least
            squares, weighted by 1 / stderr^2 when every standard error is there and above 0, else evenly).

    Returns:
        K losses; not increasing, except with `none`.
    """
    if smoothing == "none":
        return list(losses)
    if smoothing == "running_min":
        return list(itertools.accumulate(losses, min))
    known = [error for error in stderrs if error]
    weights = [1 / error**2 for error in known] if len(known) == len(losses) else [1.0] * len(losses)
    return non_increasing(losses, weights)


def non_increasing(values: Sequence[float], weights: Sequence[float]) -> list[float]:
    """Fits the non-increasing sequence of least weighted squared distance by pooling adjacent violators.

    Neighbours that rise are replaced by their weighted mean until none rises (Barlow, Bartholomew, Bremner and Brunk
    1972, Statistical Inference under Order Restrictions; de Leeuw, Hornik and Mair 2009, J. Stat. Software 32(5)).

    Args:
        values: Length K.
        weights: Length K, above 0.

    Returns:
        Length K.
    """
    blocks: list[tuple[float, float, int]] = []  # mean, weight, number of values
    for value, weight in zip(values, weights, strict=True):
        block = (value, weight, 1)
        while blocks and blocks[-1][0] < block[0]:
            mean, before, count = blocks.pop()
            total = before + block[1]
            block = ((mean * before + block[0] * block[1]) / total, total, count + block[2])
        blocks.append(block)
    return [mean for mean, _, count in blocks for _ in range(count)]
