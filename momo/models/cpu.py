"""What makes training on a CPU quicker without changing its arithmetic."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # mallopt's numbers, malloc.h of glibc


def keep_freed_memory() -> bool:
    """Asks the C library to keep freed memory in the process instead of handing it back to the system.

    Activations of tens of megabytes are otherwise mapped, zeroed and unmapped at every use: 3 to 8 % of a step of
    ViT-B/16 at batch 16 (docs/performance.md).

    Returns:
        False where the C library is not glibc; nothing is changed then.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_MMAP_THRESHOLD, 2**30) and mallopt(_TRIM_THRESHOLD, 2**31 - 1))


class Linear(nn.Linear):
    """A linear layer that adds its bias inside oneDNN's matrix product where that can be: bfloat16 on a CPU.

    PyTorch writes the bias to the result first and lets the product add to it, one more pass over the memory of the
    widest activations: forward products take up to half as long again. Results are the same.

    Args:
        linear: Layer whose parameters are taken over.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Returns input @ weight.T + bias."""
        if torch.compiler.is_compiling() or self.bias is None:
            return F.linear(input, self.weight, self.bias)
        # Under autocast weights are float32 while the input may be bfloat16.
        bfloat16 = input.dtype == self.weight.dtype == torch.bfloat16 and input.device.type == "cpu"
        if bfloat16 and _fused_bias():
            return _FusedBias.apply(input, self.weight, self.bias)
        return F.linear(input, self.weight, self.bias)


@functools.cache
def _fused_bias() -> bool:
    operations = torch.ops.mkldnn
    if not (torch.backends.mkldnn.is_available() and hasattr(operations, "_linear_pointwise")):
        return False
    return bool(operations._is_mkldnn_bf16_supported())


class _FusedBias(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(input, weight)
        return torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, above: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        above_MN = above.reshape(-1, above.shape[-1])
        below = None
        if ctx.needs_input_grad[0]:
            below = torch.ops.mkldnn._linear_pointwise(above_MN, weight.t(), None, "none", [], "").view_as(input)
        return below, above_MN.t() @ input.reshape(-1, input.shape[-1]), above_MN.sum(dim=0)
