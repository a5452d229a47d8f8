"""Sizes of the vision transformer and of its light decoder."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from ..config import one_of
from ..errors import ConfigError


@dataclass(frozen=True)
class Size:
    """Widths and depths of one model size."""

    dim: int
    depth: int
    heads: int
    decoder_dim: int
    decoder_depth: int
    decoder_heads: int


# tiny to large are timm's vit_*_patch16 with the decoder of the MAE paper (arXiv 2111.06377, section 4);
# pico is momo's own, small enough for tests and the demo on two CPU cores.
SIZES: dict[str, Size] = {
    "pico": Size(96, 4, 3, 64, 2, 2),
    "tiny": Size(192, 12, 3, 512, 8, 16),
    "small": Size(384, 12, 6, 512, 8, 16),
    "base": Size(768, 12, 12, 512, 8, 16),
    "large": Size(1024, 24, 16, 512, 8, 16),
}


@dataclass(frozen=True)
class Architecture:
    """Everything that fixes the shapes and the arithmetic of a model.

    Attributes:
        size: A key of `SIZES`.
        image_size: Side of the square input in pixels.
        patch_size: Side of a patch in pixels; divides `image_size`.
        in_chans: 1 (native grey) or 3 (grey repeated, for weights made for RGB).
        layer_norm_eps: Epsilon of every LayerNorm; 1e-6 is timm's.
    """

    size: str = "base"
    image_size: int = 224
    patch_size: int = 16
    in_chans: int = 1
    layer_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        one_of("model.size", self.size, list(SIZES))
        if self.patch_size <= 0 or self.image_size <= 0 or self.image_size % self.patch_size:
            raise ConfigError(
                "the image cannot be cut into patches",
                seen=f"image_size={self.image_size}, patch_size={self.patch_size}",
                rule="image_size is a multiple of patch_size",
            )
        if self.in_chans not in (1, 3):
            raise ConfigError("model.in_chans is out of range", seen=self.in_chans, rule="1 or 3")

    @property
    def widths(self) -> Size:
        """Widths and depths of the chosen size."""
        return SIZES[self.size]

    @property
    def patches(self) -> int:
        """Number of patches in an image."""
        return (self.image_size // self.patch_size) ** 2

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as plain values for a card."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Architecture:
        """Builds the object back from a card."""
        return cls(**fields)
