"""Sizes for the tests of the loss, and an AlexNet drawn at random."""

from __future__ import annotations

import math

import torch

PATCH, SIZE, LIMIT = 8, 32, 4.0


def random_alexnet(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {0: (64, 3, 11), 3: (192, 64, 5), 6: (384, 192, 3), 8: (256, 384, 3), 10: (256, 256, 3)}
    weights = {}
    for place, (out, into, side) in shapes.items():
        spread = math.sqrt(2 / (into * side * side))
        weights[f"features.{place}.weight"] = spread * torch.randn(out, into, side, side, generator=generator)
        weights[f"features.{place}.bias"] = 0.1 * torch.randn(out, generator=generator)
    return weights
