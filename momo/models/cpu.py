"""What makes training on a CPU quicker without changing its arithmetic."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

# Of two threads oneDNN gives products of this size to one, those of ViT-B's encoder at batch 15 to 25; it shares out
# either half of the rows (docs/performance.md).
_ONE_THREAD_ROWS, _ONE_THREAD_COLUMNS = range(750, 1251), 768


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
        return _product(input.reshape(-1, input.shape[-1]), weight, bias).view(*input.shape[:-1], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, above: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        above_MN = above.reshape(-1, above.shape[-1])
        below = None
        if ctx.needs_input_grad[0]:
            below = _product(above_MN, weight.t(), None).view_as(input)
        return below, _weight_gradient(above_MN, input.reshape(-1, input.shape[-1]), weight), above_MN.sum(dim=0)


def _product(input_MK: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None) -> torch.Tensor:
    """Returns input @ weight.T + bias, bfloat16."""
    rows, columns = len(input_MK), len(weight_NK)
    if not (columns == _ONE_THREAD_COLUMNS and rows in _ONE_THREAD_ROWS and torch.get_num_threads() == 2):
        return torch.ops.mkldnn._linear_pointwise(input_MK, weight_NK, bias_N, "none", [], "")
    output_MN = input_MK.new_empty(rows, columns)
    for half in (slice(0, rows // 2), slice(rows // 2, rows)):
        if bias_N is None:
            torch.mm(input_MK[half], weight_NK.t(), out=output_MN[half])
        else:
            torch.addmm(bias_N, input_MK[half], weight_NK.t(), out=output_MN[half])
    return output_MN


def _weight_gradient(above_MN: torch.Tensor, input_MK: torch.Tensor, weight_NK: torch.Tensor) -> torch.Tensor:
    """Returns above.T @ input, in the weight's memory layout."""
    if weight_NK.shape[0] == weight_NK.shape[1]:
        return above_MN.t() @ input_MK  # transposing costs as much as it gains
    if weight_NK.is_contiguous():
        return _transposed(above_MN) @ input_MK
    return (_transposed(input_MK) @ above_MN).t()


def _transposed(matrix: torch.Tensor) -> torch.Tensor:
    """Returns the transpose laid out anew; oneDNN takes a third to a half of the time of `contiguous`."""
    transposed: torch.Tensor = torch._mkldnn_transpose(matrix.contiguous().to_mkldnn(), 0, 1).to_dense()
    return transposed


@torch.no_grad()
def lay_out_for_training(model: nn.Module) -> None:
    """Lays the weights of widening `Linear` layers out column by column, in bfloat16 on a CPU.

    oneDNN multiplies a transposed first factor, as in the gradient of a weight, at half speed. Transposing it first
    pays for the narrower of the two factors only, and the product then comes out in this layout. Nothing but the
    memory layout changes: shapes, values and saved files are the same.
    """
    for layer in model.modules():
        if not isinstance(layer, Linear) or layer.out_features <= layer.in_features:
            continue
        weight = layer.weight
        if weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and _fused_bias():
            weight.data = weight.data.t().contiguous().t()
