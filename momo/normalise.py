"""From tile values to network input: one definition, used by pretraining, evaluation and reconstruction alike.

A policy is a function of one tile (and, for `sensor_zscore`, of two constants kept in the card, for
`per_product_percentile` of two constants of its product), so a loss computed after it depends on the weights and the
tile alone.

Every policy is linear up to a clip, so stored pixels need neither their stretch nor a look at the tile:

    input = clip((stored - pivot) * gain + bias)        0 where invalid

with three numbers a tile from the index (`Normalisation.affine`), on any device (`normalise_batch`). The pivot is a
whole number near the middle: the difference is exact, so float32 loses nothing on a faint tile at a high level.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .config import one_of
from .corpus_index import StoredStatistics
from .errors import ConfigError, DataError

POLICIES = ("per_tile_zscore", "per_tile_minmax", "per_product_percentile", "sensor_zscore")
PERCENTILES = (1.0, 99.0)


@dataclass(frozen=True)
class Normalisation:
    """How tile values become network input.

    Attributes:
        policy: `per_tile_zscore` (mean 0 and standard deviation 1 over the valid pixels of the tile),
            `per_tile_minmax` (the valid range of the tile goes to -1..1, as in MOMO up to its constants),
            `per_product_percentile` (1st to 99th percentile of the product go to -1..1, cut beyond; keeps what is
            bright and dark within a product) or `sensor_zscore` (constants of the corpus; keeps absolute radiance or
            temperature).
        mean: Mean in the tile's physical unit, for `sensor_zscore` only.
        std: Standard deviation in the same unit, for `sensor_zscore` only.
        clip: Values beyond +-clip are cut after scaling, so that a hot pixel cannot rule a loss;
            `per_product_percentile` cuts at +-1 whatever it says.
    """

    policy: str = "per_tile_zscore"
    mean: float | None = None
    std: float | None = None
    clip: float = 4.0

    def __post_init__(self) -> None:
        one_of("normalisation.policy", self.policy, POLICIES)
        if self.policy == "sensor_zscore" and (self.mean is None or not self.std or self.std <= 0):
            raise ConfigError(
                "sensor_zscore lacks its constants",
                seen=f"mean={self.mean}, std={self.std}",
                rule="mean is a number and std is above 0",
                fix="take both from the corpus's stats.json",
            )

    @property
    def limit(self) -> float:
        """Network input lies within +-limit."""
        return min(1.0, self.clip) if self.policy == "per_product_percentile" else self.clip

    def __call__(
        self,
        value_HW: npt.NDArray[np.float32],
        valid_HW: npt.NDArray[np.bool_],
        percentiles: tuple[float, float] | None = None,
    ) -> npt.NDArray[np.float32]:
        """Scales one tile from its values.

        Args:
            value_HW: Tile in physical units, any shape.
            valid_HW: True where the pixel was measured, same shape.
            percentiles: 1st and 99th percentile of the product, for `per_product_percentile`; None: an image that
                belongs to no product is its own product, and its own percentiles are taken.

        Returns:
            float32 of the same shape, within +-limit; invalid pixels are 0. A tile (or, with `per_product_percentile`,
            a product) without contrast is all 0.
        """
        scaled = np.zeros(value_HW.shape, dtype=np.float32)
        values = value_HW[valid_HW].astype(np.float64)
        if values.size == 0:
            return scaled
        centre, spread = self._centre_and_spread(values, percentiles)
        if spread > 0:
            scaled[valid_HW] = np.clip((values - centre) / spread, -self.limit, self.limit)
        return scaled

    def _centre_and_spread(
        self, values: npt.NDArray[np.float64], percentiles: tuple[float, float] | None
    ) -> tuple[float, float]:
        if self.policy == "sensor_zscore":
            assert self.mean is not None and self.std is not None
            return self.mean, self.std
        if self.policy == "per_tile_minmax":
            low, high = float(values.min()), float(values.max())
            return (low + high) / 2, (high - low) / 2
        if self.policy == "per_product_percentile":
            low, high = np.percentile(values, PERCENTILES).tolist() if percentiles is None else percentiles
            return (low + high) / 2, (high - low) / 2
        centre = float(values.mean())
        spread = float(values.std())
        return centre, spread if _has_contrast(centre, spread) else 0.0

    def affine(self, statistics: StoredStatistics) -> npt.NDArray[np.float32]:
        """Returns what takes stored pixels to network input (see the top of this file).

        Args:
            statistics: Of one tile, or of B tiles.

        Returns:
            float32 `(pivot, gain, bias)` of shape (3,), or (B, 3). A tile that `__call__` makes 0 has gain and bias 0.

        Raises:
            DataError: The policy needs percentiles and a product has none.
        """
        scale, offset_value = statistics.scale, statistics.offset_value
        centre, spread, middle = self._stored_centre_and_spread(statistics)
        # Written so that it holds for floats and for arrays alike: a tile is often asked for alone.
        used = spread > 0
        divisor = spread + (1 - used)
        pivot = middle // 1
        gain = used * scale / divisor
        bias = used * (pivot * scale + offset_value - centre) / divisor
        return np.ascontiguousarray(np.array([pivot, gain, bias], dtype=np.float32).T)

    def _stored_centre_and_spread(self, statistics: StoredStatistics) -> tuple[Any, Any, Any]:
        """Returns centre and spread in physical units, and about where the stored values lie."""
        scale, offset_value, middle = statistics.scale, statistics.offset_value, statistics.mean
        if self.policy == "sensor_zscore":
            return self.mean, self.std, middle
        if self.policy == "per_product_percentile":
            low, high = statistics.percentile_low, statistics.percentile_high
            if not np.isfinite(low + high).all():
                raise DataError(
                    "per_product_percentile lacks the percentiles of a product",
                    seen=f"{np.count_nonzero(~np.isfinite(low + high))} tiles of such products",
                    rule="products.parquet has percentile_low and percentile_high of every product",
                    fix="run momo prep again, or choose another normalisation",
                )
            return (low + high) / 2, (high - low) / 2, middle
        if self.policy == "per_tile_minmax":
            middle = (statistics.low + statistics.high) / 2
            return middle * scale + offset_value, abs(scale) * (statistics.high - statistics.low) / 2, middle
        centre, spread = middle * scale + offset_value, abs(scale) * statistics.std
        return centre, spread * _has_contrast(centre, spread), middle

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as plain values for a card."""
        return {"policy": self.policy, "mean": self.mean, "std": self.std, "clip": self.clip}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Normalisation:
        """Builds the object back from a card."""
        return cls(**fields)


def _has_contrast(centre: Any, spread: Any) -> Any:
    # A flat tile has a rounding-noise spread; dividing by it would blow that noise up to full contrast.
    return (spread > 1e-6) & (spread > 1e-6 * abs(centre))


def normalise_batch(
    stored_BHW: torch.Tensor, valid_BHW: torch.Tensor | None, affine_B3: torch.Tensor, limit: float
) -> torch.Tensor:
    """Makes network input of stored tiles, on the device they are on.

    Args:
        stored_BHW: uint8 or uint16.
        valid_BHW: bool, True where the pixel was measured; None when every pixel was.
        affine_B3: float32, from `Normalisation.affine`.
        limit: `Normalisation.limit`.

    Returns:
        float32 of shape (B, 1, H, W), 0 where invalid.
    """
    if stored_BHW.device.type == "cpu":
        image_BHW = torch.empty(stored_BHW.shape, dtype=torch.float32)
        # Tile by tile, so that every pass over a tile finds it in the processor's cache; NumPy is the faster at that.
        for image_HW, stored_HW, numbers in zip(image_BHW.numpy(), stored_BHW.numpy(), affine_B3.numpy(), strict=True):
            image_HW[...] = stored_HW
            np.clip(_scaled(image_HW, *numbers), -limit, limit, out=image_HW)
    else:
        columns = (column[:, None, None] for column in affine_B3.unbind(-1))
        image_BHW = _scaled(_to_float(stored_BHW), *columns).clamp_(-limit, limit)
    if valid_BHW is not None:
        image_BHW.masked_fill_(~valid_BHW, 0.0)
    return image_BHW[:, None]


def _scaled(image: Any, pivot: Any, gain: Any, bias: Any) -> Any:
    image -= pivot
    image *= gain
    image += bias
    return image


def _to_float(stored: torch.Tensor) -> torch.Tensor:
    if stored.dtype == torch.uint16:
        # Not every backend of torch converts uint16.
        return stored.view(torch.int16).to(torch.int32).bitwise_and_(0xFFFF).to(torch.float32)
    return stored.to(torch.float32)
