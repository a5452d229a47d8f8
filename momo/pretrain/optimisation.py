"""Learning rate and parameter groups of AdamW."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from .config import TrainOptions


def warmup_length(options: TrainOptions) -> int:
    """Returns the samples of warm-up: those asked for, or a tenth of the run when that is less."""
    return min(options.warmup_samples, options.samples // 10)


def learning_rate(options: TrainOptions, samples: int) -> float:
    """Returns the learning rate after `samples` training samples.

    Linear warm-up to base_lr * batch_size / 256 (Goyal et al. 2017, arXiv 1706.02677), then half a cosine down to
    `min_lr` at the end of the run (Loshchilov and Hutter 2017, arXiv 1608.03983). The warm-up is never longer than a
    tenth of the run, so that short runs leave it.
    """
    peak = options.base_lr * options.batch_size / 256
    warmup = warmup_length(options)
    if samples < warmup:
        return peak * samples / warmup
    progress = (samples - warmup) / max(1, options.samples - warmup)
    return options.min_lr + (peak - options.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Splits the trainable parameters into those with and without weight decay.

    Biases, norms and the learned tokens (class token, mask token) are not decayed.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        single = parameter.ndim <= 1 or name.endswith("_token")
        (plain if single else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
