"""Images cut into patches, and the statistics of a patch over its valid pixels.

Axes: B batch, C channels, H W pixels, N patches, M some of them, P = patch_size^2 * C values of a patch.
"""

from __future__ import annotations

import math

import torch
from torch import nn


def patchify(image_BCHW: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Cuts (B, C, H, W) into patches (B, N, P), row by row; a patch is read pixel by pixel, then channel."""
    batch, chans, height, width = image_BCHW.shape
    cut = image_BCHW.reshape(batch, chans, height // patch_size, patch_size, width // patch_size, patch_size)
    return cut.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, patch_size * patch_size * chans)


def unpatchify(patches_BNP: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Joins the patches (B, N, P) of a square image into (B, C, H, W); the inverse of `patchify`."""
    side = math.isqrt(patches_BNP.shape[1])
    cut = patches_BNP.reshape(len(patches_BNP), side, side, patch_size, patch_size, -1)
    return cut.permute(0, 5, 1, 3, 2, 4).reshape(len(patches_BNP), -1, side * patch_size, side * patch_size)


def take_patches(values_BND: torch.Tensor, numbers_BM: torch.Tensor) -> torch.Tensor:
    """Picks patches by number: (B, N, D) and int64 (B, M) give (B, M, D)."""
    return values_BND.gather(1, numbers_BM[..., None].expand(-1, -1, values_BND.shape[-1]))


def moments(values_BNP: torch.Tensor, valid_BNP: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and spread of each patch over its valid values.

    Args:
        values_BNP: Values, float32.
        valid_BNP: 1 where the value counts, else 0; same shape, float32.

    Returns:
        The mean and the square root of (population variance + 1e-6), each (B, N, 1); 0 and 1e-3 of a patch
        without valid values.
    """
    count = valid_BNP.sum(dim=2, keepdim=True).clamp(min=1)
    mean = (values_BNP * valid_BNP).sum(dim=2, keepdim=True) / count
    variance = ((values_BNP - mean).square() * valid_BNP).sum(dim=2, keepdim=True) / count
    return mean, (variance + 1e-6).sqrt()


def standardise(values_BNP: torch.Tensor, valid_BNP: torch.Tensor) -> torch.Tensor:
    """Subtracts a patch's mean and divides by its spread (see `moments`; MAE paper, arXiv 2111.06377, section 4.1)."""
    mean, std = moments(values_BNP, valid_BNP)
    return (values_BNP - mean) / std


class PatchProjection(nn.Conv2d):
    """The patch embedding of a vision transformer, for whole images (timm's way) or for patches cut already.

    Args:
        conv: Convolution whose kernel is its stride; its parameters are taken over.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        assert conv.bias is not None and conv.kernel_size == conv.stride
        size = (conv.kernel_size[0], conv.kernel_size[1])
        super().__init__(conv.in_channels, conv.out_channels, size, stride=size, device="meta")
        self.weight, self.bias = conv.weight, conv.bias

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Embeds images (B, C, H, W) as (B, D, rows, columns), or patches (B, M, P) as (B, M, D)."""
        if input.ndim == 4:
            return super().forward(input)
        # A matrix product: convolutions of many single patches are slow backwards.
        return nn.functional.linear(input, self.weight.permute(0, 2, 3, 1).flatten(1), self.bias)
