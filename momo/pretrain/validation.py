"""Fixed-mask validation: the loss of a checkpoint, comparable between checkpoints and sensors, with its error.

Equal-validation-loss selection compares these numbers, so each is a function of the weights and the data alone: a
fixed subset, masks drawn from tile keys, one normalisation, float32, every tile counted once, the same batches
whatever the number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Subset

from ..errors import CheckpointError
from ..files import sha256_json
from ..models import MaskedAutoencoder
from ..normalise import Normalisation
from .data import ValidationTiles, to_inputs


@dataclass(frozen=True)
class LossEstimate:
    """A mean loss over tiles.

    Attributes:
        loss: Mean over tiles of the tile's loss.
        stderr: Standard error of that mean over tiles, s / sqrt(n) with s the sample standard deviation.
        count: Number of tiles n.
    """

    loss: float
    stderr: float
    count: int

    @classmethod
    def of(cls, losses: torch.Tensor) -> LossEstimate:
        """Summarises the losses of tiles, shape (n,)."""
        losses = losses.double()
        count = losses.numel()
        spread = float(losses.std(unbiased=True)) if count > 1 else math.nan
        return cls(float(losses.mean()), spread / math.sqrt(count), count)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values; an undefined standard error (one tile) becomes None."""
        return {"loss": self.loss, "stderr": self.stderr if math.isfinite(self.stderr) else None, "count": self.count}


def protocol_hash(model: MaskedAutoencoder, normalisation: Normalisation, seed: int) -> str:
    """Returns a hash of everything but weights and tiles that the loss depends on.

    Two losses may be compared only when their protocols are equal.
    """
    architecture = model.architecture
    return sha256_json(
        {
            "loss": "mean squared error over valid pixels of hidden patches, mean over tiles, float32",
            "norm_pix_loss": model.norm_pix_loss,
            "mask_ratio": model.mask_ratio,
            "mask_seed": seed,
            "normalisation": {"policy": normalisation.policy, "clip": normalisation.clip},
            "image_size": architecture.image_size,
            "patch_size": architecture.patch_size,
            "in_chans": architecture.in_chans,
        }
    )


@torch.no_grad()
def tile_losses(
    model: MaskedAutoencoder,
    tiles: ValidationTiles,
    *,
    batch_size: int,
    rank: int = 0,
    ranks: int = 1,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Computes the loss of this rank's batches.

    Args:
        model: The autoencoder; its mode is left as found.
        tiles: Fixed tiles.
        batch_size: Tiles a forward pass. Batch j goes to rank j % ranks whole, so no loss depends on `ranks`.
        rank: This rank.
        ranks: Number of ranks.
        device: Where the model is.

    Returns:
        float64 of shape (len(tiles),): losses of this rank's tiles, 0 for the others; the sum over ranks is complete.
    """
    was_training = model.training
    model.eval()
    limit = tiles.normalisation.limit
    losses = torch.zeros(len(tiles), dtype=torch.float64)
    for number, first in enumerate(range(0, len(tiles), batch_size)):
        if number % ranks != rank:
            continue
        places: Sequence[int] = range(first, min(first + batch_size, len(tiles)))
        batch = next(iter(DataLoader(Subset(tiles, places), batch_size=len(places))))
        loss_B = model(*to_inputs(batch, limit=limit, in_chans=model.architecture.in_chans, device=device))
        losses[places[0] : places[-1] + 1] = loss_B.double().cpu()
    model.train(was_training)
    return losses


def summarise(losses_by_sensor: dict[str, torch.Tensor], protocol: str) -> dict[str, Any]:
    """Joins complete per-tile losses into the `val_loss` entry of a card.

    Args:
        losses_by_sensor: Sensor name to float64 losses, one a tile.
        protocol: See `protocol_hash`.

    Raises:
        CheckpointError: A loss is NaN or infinite.
    """
    everything = torch.cat(list(losses_by_sensor.values()))
    if not torch.isfinite(everything).all():
        bad = int((~torch.isfinite(everything)).sum())
        raise CheckpointError(
            "the validation loss is not finite",
            seen=f"{bad} of {everything.numel()} tiles",
            rule="every tile has a finite loss",
            fix="lower train.base_lr or use train.precision=fp32; the last checkpoint is intact",
        )
    per_sensor = {name: LossEstimate.of(losses).to_dict() for name, losses in losses_by_sensor.items()}
    return {**LossEstimate.of(everything).to_dict(), "protocol": protocol, "per_sensor": per_sensor}
