"""What the model makes of a few fixed validation tiles, as one picture."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..models import MaskedAutoencoder
from .validation_tiles import ValidationTiles

_GAP, _GAP_GREY, _HIDDEN_GREY, _INVALID_GREY = 2, 1.0, 0.5, 0.0


class Reconstructions:
    """A few tiles of the validation subsets, with their fixed masks.

    Args:
        tiles_by_sensor: The tiles of validation.
        count: Tiles shown, dealt to the sensors in turn and spread evenly over each subset; fewer when there are fewer.
        in_chans: Channels of the model.
    """

    def __init__(self, tiles_by_sensor: Mapping[str, ValidationTiles], count: int, *, in_chans: int) -> None:
        self.keys: list[str] = []
        self._inputs: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        for (sensor, places), tiles in zip(
            _spread({s: len(t) for s, t in tiles_by_sensor.items()}, count).items(),
            tiles_by_sensor.values(),
            strict=True,
        ):
            for place in places:
                batch = tiles.batch(range(place, place + 1))
                self.keys.append(f"{sensor} {batch.keys[0]}")
                self._inputs.append(batch.to_inputs(limit=tiles.normalisation.limit, in_chans=in_chans, device="cpu"))

    def picture(self, model: MaskedAutoencoder) -> torch.Tensor | None:
        """Paints the tiles.

        Args:
            model: The autoencoder in float32; its mode is left as found.

        Returns:
            Grey values in [0, 1], float32 (H, W) on the CPU; None when there is no tile. A row a tile: the tile, what
            was shown (hidden patches grey), what was painted. Each tile is stretched by its own 1st to 99th
            percentile; invalid pixels are black.
        """
        if not self._inputs:
            return None
        device = next(model.parameters()).device
        image, valid, noise = (torch.cat(parts).to(device) for parts in zip(*self._inputs, strict=True))
        was_training = model.training
        painted, hidden = model.eval().reconstruct(image, valid, noise)
        model.train(was_training)
        return picture_of(image.cpu(), painted.float().cpu(), valid.cpu(), hidden.cpu())


def picture_of(
    image_BCHW: torch.Tensor, painted_BCHW: torch.Tensor, valid_BHW: torch.Tensor, hidden_BHW: torch.Tensor
) -> torch.Tensor:
    """Lays out target, masked and painted tiles; see `Reconstructions.picture`.

    Args:
        image_BCHW: Targets.
        painted_BCHW: The same with hidden patches painted.
        valid_BHW: True where the pixel was measured.
        hidden_BHW: True where the pixel was hidden.
    """
    rows = []
    for image_HW, painted_HW, valid_HW, hidden_HW in zip(
        image_BCHW[:, 0], painted_BCHW[:, 0], valid_BHW, hidden_BHW, strict=True
    ):
        target, painted = (_stretched(values, image_HW[valid_HW]) for values in (image_HW, painted_HW))
        masked = target.masked_fill(hidden_HW, _HIDDEN_GREY)
        panels = [panel.masked_fill(~valid_HW, _INVALID_GREY) for panel in (target, masked, painted)]
        rows.append(_join(panels, dim=1))
    return _join(rows, dim=0)


def _stretched(values_HW: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    if reference.numel() == 0:
        return torch.zeros_like(values_HW)
    low, high = torch.quantile(reference, torch.tensor([0.01, 0.99]))
    # A tile without contrast is mid grey.
    spread = high - low
    return ((values_HW - low) / spread).clamp(0, 1) if spread > 0 else torch.full_like(values_HW, _HIDDEN_GREY)


def _join(panels: list[torch.Tensor], dim: int) -> torch.Tensor:
    shape = list(panels[0].shape)
    shape[dim] = _GAP
    gap = torch.full(shape, _GAP_GREY)
    parts = [part for panel in panels for part in (gap, panel)][1:]
    return torch.cat(parts, dim=dim)


def _spread(sizes: Mapping[str, int], count: int) -> dict[str, list[int]]:
    """Deals places to the sensors in turn, then spreads each sensor's share evenly over its subset."""
    shares = dict.fromkeys(sizes, 0)
    for _ in range(min(count, sum(sizes.values()))):
        # The sensor with the smallest share among those with tiles left; the first of equals.
        shares[min((s for s in sizes if shares[s] < sizes[s]), key=lambda s: shares[s])] += 1
    return {sensor: [k * sizes[sensor] // share for k in range(share)] for sensor, share in shares.items()}
