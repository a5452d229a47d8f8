"""Transformer blocks with timm's parameters and two ways to compute attention.

Axes: B batch, N tokens, D width, H heads, E width of a head; G = B * H.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers.attention import Attention as TimmAttention
from timm.models.vision_transformer import Block as TimmBlock
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..config import one_of
from .cpu import Linear

ATTENTIONS = ("auto", "sdpa", "plain")


def attention_kernel(choice: str, device: torch.device | str) -> str:
    """Returns how attention is computed on a device: `sdpa` or `plain`.

    `auto` takes `plain` on the CPU, where the backward pass of the fused kernel is several times slower than that of
    batched products at 50 and 197 tokens in bfloat16 (docs/performance.md), and `sdpa` elsewhere.

    Raises:
        ConfigError: `choice` is none of `ATTENTIONS`.
    """
    one_of("model.attention", choice, ATTENTIONS)
    if choice != "auto":
        return choice
    return "plain" if torch.device(device).type == "cpu" else "sdpa"


class PlainAttention(torch.autograd.Function):
    """Softmax attention by batched matrix products (Vaswani et al. 2017, arXiv 1706.03762, equation 1).

    The softmax is computed in float32 whatever the dtype and rounded once. Unlike the same formula under autograd, it
    copies queries, keys and values once together, and lays their gradients straight beside one another.
    """

    @staticmethod
    def forward(ctx: Any, qkv_BNX: torch.Tensor, heads: int, last: int) -> torch.Tensor:
        """Attends the last tokens to all.

        Args:
            ctx: Autograd's context.
            qkv_BNX: Queries, keys and values of all heads beside one another, X = 3 * D.
            heads: Number of heads.
            last: Number of tokens, from the end, whose result is wanted.

        Returns:
            Shape (B, last, D).
        """
        batch, tokens, width = qkv_BNX.shape
        shape = (batch, tokens, heads, width // (3 * heads))
        qkv = qkv_BNX.view(batch, tokens, 3, *shape[2:]).permute(2, 0, 3, 1, 4).reshape(3, -1, tokens, shape[3])
        query_GNE, key_GNE, value_GNE = qkv
        query_GNE = query_GNE[:, tokens - last :] * shape[3] ** -0.5
        with torch.autocast(qkv_BNX.device.type, enabled=False):
            weights_GNN = torch.softmax(torch.bmm(query_GNE, key_GNE.transpose(1, 2)), dim=-1)
            attended_GNE = torch.bmm(weights_GNN, value_GNE)
        ctx.save_for_backward(query_GNE, key_GNE, value_GNE, weights_GNN)
        ctx.shape = shape
        return _join_heads(attended_GNE, heads)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient_BND: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """Gradient of `forward` (the usual one of softmax attention)."""
        query_GNE, key_GNE, value_GNE, weights_GNN = ctx.saved_tensors
        batch, tokens, heads, head_dim = ctx.shape
        last = query_GNE.shape[1]
        gradient_GNE = gradient_BND.view(batch, last, heads, head_dim).transpose(1, 2).reshape(-1, last, head_dim)
        shape = (3, *key_GNE.shape)
        qkv = key_GNE.new_empty(shape) if last == tokens else key_GNE.new_zeros(shape)
        with torch.autocast(key_GNE.device.type, enabled=False):
            torch.bmm(weights_GNN.transpose(1, 2), gradient_GNE, out=qkv[2])
            above_GNN = torch.bmm(gradient_GNE, value_GNE.transpose(1, 2))
            scores_GNN = torch._softmax_backward_data(above_GNN, weights_GNN, -1, weights_GNN.dtype)
            torch.bmm(scores_GNN.transpose(1, 2), query_GNE, out=qkv[1])
            qkv[0, :, tokens - last :] = torch.bmm(scores_GNN, key_GNE).mul_(head_dim**-0.5)
        qkv = qkv.view(3, batch, heads, tokens, head_dim).permute(1, 3, 0, 2, 4)
        return qkv.reshape(batch, tokens, -1), None, None


def _fused_attention(qkv_BNX: torch.Tensor, heads: int, last: int) -> torch.Tensor:
    batch, tokens, width = qkv_BNX.shape
    qkv = qkv_BNX.view(batch, tokens, 3, heads, width // (3 * heads)).permute(2, 0, 3, 1, 4)
    attended_BHNE = F.scaled_dot_product_attention(qkv[0, :, :, tokens - last :], qkv[1], qkv[2])
    return attended_BHNE.transpose(1, 2).reshape(batch, last, -1)


def _join_heads(values_GNE: torch.Tensor, heads: int) -> torch.Tensor:
    groups, tokens, head_dim = values_GNE.shape
    split_BHNE = values_GNE.view(groups // heads, heads, tokens, head_dim)
    return split_BHNE.transpose(1, 2).reshape(groups // heads, tokens, -1)


class Attention(TimmAttention):
    """timm's self-attention (no dropout, no normalised queries), with a choice of kernel.

    Attributes:
        kernel: One of `ATTENTIONS`.
    """

    kernel = "auto"

    def forward(  # type: ignore[override]
        self, tokens_BND: torch.Tensor, last: int | None = None
    ) -> torch.Tensor:
        """Attends to all tokens.

        Args:
            tokens_BND: Normalised tokens.
            last: Number of tokens, from the end, whose result is wanted; None: all.

        Returns:
            Shape (B, last, D).
        """
        kernel = attention_kernel(self.kernel, tokens_BND.device)
        attend = PlainAttention.apply if kernel == "plain" else _fused_attention
        count = tokens_BND.shape[1] if last is None else last
        return self.proj(attend(self.qkv(tokens_BND), self.num_heads, count))


class Block(TimmBlock):
    """timm's pre-norm block, able to compute only the tokens that are needed."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **(options | {"attn_layer": Attention}))
        for part, name in ((self.attn, "qkv"), (self.attn, "proj"), (self.mlp, "fc1"), (self.mlp, "fc2")):
            layer = getattr(part, name)
            assert isinstance(layer, nn.Linear)
            setattr(part, name, Linear(layer))

    def forward(  # type: ignore[override]
        self, tokens_BND: torch.Tensor, last: int | None = None
    ) -> torch.Tensor:
        """Transforms tokens.

        Args:
            tokens_BND: All tokens.
            last: Number of tokens, from the end, whose result is wanted; None: all. The others are still attended to.

        Returns:
            Shape (B, last, D), equal to the last rows of the whole result up to rounding.
        """
        kept_BND = tokens_BND if last is None else tokens_BND[:, tokens_BND.shape[1] - last :]
        tokens_BND = kept_BND + self.attn(self.norm1(tokens_BND), last)
        return tokens_BND + self.mlp(self.norm2(tokens_BND))


def run_blocks(
    blocks: nn.Sequential | nn.ModuleList, tokens_BND: torch.Tensor, *, last: int | None = None, again: bool = False
) -> torch.Tensor:
    """Runs blocks one after another.

    Args:
        blocks: Blocks of this file.
        tokens_BND: Tokens.
        last: Number of tokens, from the end, whose result is wanted; None: all.
        again: Forget what happens inside a block and compute it again in the backward pass (Chen et al. 2016,
            arXiv 1604.06174): the same numbers for less memory.
    """
    for number, block in enumerate(blocks):
        wanted = last if number == len(blocks) - 1 else None
        if again and torch.is_grad_enabled():
            # Nothing in a block is random.
            tokens_BND = checkpoint(block, tokens_BND, wanted, use_reentrant=False, preserve_rng_state=False)
        else:
            tokens_BND = block(tokens_BND, wanted)
    return tokens_BND
