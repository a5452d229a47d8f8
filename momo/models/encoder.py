"""The encoder alone, as a plain timm vision transformer."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from ..weights import Card, load_card, load_weights
from .architecture import Architecture
from .mae import build_mae


def build_encoder(architecture: Architecture, *, image_size: int | None = None) -> VisionTransformer:
    """Makes a timm vision transformer without head for images of any size.

    Inputs whose sides are not multiples of the patch are padded, so border pixels are seen too; positions are
    resampled by timm (bicubic) when the grid differs from the trained one.

    Args:
        architecture: Shapes and LayerNorm epsilon.
        image_size: Trained image side in pixels; that of the architecture when None.
    """
    widths = architecture.widths
    return VisionTransformer(
        img_size=image_size or architecture.image_size,
        patch_size=architecture.patch_size,
        in_chans=architecture.in_chans,
        num_classes=0,
        embed_dim=widths.dim,
        depth=widths.depth,
        num_heads=widths.heads,
        norm_layer=partial(nn.LayerNorm, eps=architecture.layer_norm_eps),
        dynamic_img_size=True,
        dynamic_img_pad=True,
    )


def load_encoder(path: Path, *, check_hash: bool = True) -> tuple[VisionTransformer, Card]:
    """Loads the encoder of a weights folder or file; a decoder in the file is left out.

    Args:
        path: Weights folder or safetensors file.
        check_hash: Compare the file's hash with the card's.

    Returns:
        The encoder in eval mode and the card.

    Raises:
        CheckpointError: An encoder tensor is missing or has another shape, or the file is damaged.
    """
    encoder = build_encoder(Architecture.from_dict(load_card(path).architecture))
    tensors, card = load_weights(path, expected=encoder.state_dict(), check_hash=check_hash)
    encoder.load_state_dict(tensors)
    return encoder.eval(), card


def random_encoder(architecture: Architecture, *, seed: int) -> VisionTransformer:
    """Makes an untrained encoder with the very initialisation pretraining starts from."""
    encoder = build_encoder(architecture)
    start: dict[str, torch.Tensor] = build_mae(architecture, seed=seed).state_dict()
    encoder.load_state_dict({name: start[name] for name in encoder.state_dict()})
    return encoder.eval()
