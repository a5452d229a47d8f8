"""The autoencoder that a card describes."""

from __future__ import annotations

import torch

from ..models import Architecture, MaskedAutoencoder, build_mae
from ..models.objective import make_objective
from ..weights import Card
from .config import LossOptions


def autoencoder_of(
    card: Card, *, limit: float, lpips_backbone: str | None = None, device: torch.device | str = "cpu"
) -> MaskedAutoencoder:
    """Builds the autoencoder that a card describes, with the loss it names; its weights are not loaded.

    Args:
        card: Of weights with a decoder; a card that names no loss is of the plain one.
        limit: `Normalisation.limit` of the model's input.
        lpips_backbone: AlexNet weights, for a loss with an LPIPS term.
        device: Where the model is put.

    Raises:
        ConfigError: The loss needs LPIPS, and its package or backbone cannot be had.
    """
    model = build_mae(
        Architecture.from_dict(card.architecture),
        seed=0,
        mask_ratio=card.objective.get("mask_ratio", 0.75),
        norm_pix_loss=card.objective.get("norm_pix_loss", False),
    )
    if "loss" in card.objective:
        # Terms that weigh nothing may be left out of a card.
        weights = {"mse": 0.0, **card.objective["loss"], "lpips_backbone": lpips_backbone}
        model.objective = make_objective(
            LossOptions(**weights),
            patch_size=model.architecture.patch_size,
            norm_pix_loss=model.norm_pix_loss,
            limit=limit,
            device=device,
        )
    return model.to(device).eval()
