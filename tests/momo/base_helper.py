"""Bases for the tests of `momo init`: a timm ViT of momo's pico size, and one call that makes a base."""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from momo.pretrain.base import InitConfig, init

PICO_SHAPES = {"img_size": 32, "patch_size": 8, "embed_dim": 96, "depth": 4, "num_heads": 3}


def vit(seed=0, **options) -> VisionTransformer:
    """A timm ViT of momo's pico size whose every tensor is away from its initial value."""
    torch.manual_seed(seed)
    model = timm.create_model("vit_tiny_patch16_224", **{"num_classes": 10, **PICO_SHAPES, **options}).eval()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(torch.randn_like(tensor), alpha=0.05)
    return model


def make(tmp_path, *, name="base", **options) -> Path:
    return init(InitConfig(out=str(tmp_path / name), **({"licence": "MIT"} | options)))
