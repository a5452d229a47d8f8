"""Configuration of the synthetic demo world."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from momo.config import option
from momo.errors import ConfigError

LANDFORM_CLASSES = ("cones", "crater", "dunes", "layered", "polygons", "rough", "smooth")


@dataclass
class WorldConfig:
    """What to generate and where to put it."""

    out: Path = option(help="folder to make; must not exist")
    seed: int = option(0, "seed of ground, cameras and labelled sets; 0 or above")
    tile_size: int = option(64, "side of a labelled image and of the intended pretraining tile, pixels; 32 to 512")
    products: int = option(5, "products of each camera; 1 to 20")
    tiles_per_product: int = option(320, "whole tiles in one product before validity filtering; 12 up")
    crater_images: int = option(240, "training images of demo-crater_seg; val has a third, test half of it; 6 up")
    landform_images: int = option(350, "training images of demo-landform_cls; val has a third, test as many; 7 up")
    crater_density: float = option(0.02, "N0 of the crater population, N(>D) = N0 / D^2 per unit area; 0.002 to 0.1")

    def __post_init__(self) -> None:
        self.out = Path(self.out)
        _within("seed", self.seed, 0, 2**63 - 1)
        _within("tile_size", self.tile_size, 32, 512)
        _within("products", self.products, 1, 20)
        _within("tiles_per_product", self.tiles_per_product, 12, 5000)
        _within("crater_images", self.crater_images, 6, 20_000)
        _within("landform_images", self.landform_images, len(LANDFORM_CLASSES), 20_000)
        _within("crater_density", self.crater_density, 0.002, 0.1)

    @property
    def crater_counts(self) -> dict[str, int]:
        """Images of demo-crater_seg by split."""
        return {"train": self.crater_images, "val": self.crater_images // 3, "test": self.crater_images // 2}

    @property
    def landform_counts(self) -> dict[str, int]:
        """Images of demo-landform_cls by split; every class has at least one in each."""
        least = len(LANDFORM_CLASSES)
        train = self.landform_images
        return {"train": train, "val": max(least, train // 3), "test": train}


def _within(key: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ConfigError(f"{key} is out of range", seen=value, rule=f"{low} to {high}")
