"""From tile values to network input: one function, used by pretraining, evaluation and reconstruction alike.

A policy is a function of one tile (and, for `sensor_zscore`, of two constants kept in the card), so a loss computed
after it depends on the weights and the tile alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .config import one_of
from .errors import ConfigError

POLICIES = ("per_tile_zscore", "per_tile_minmax", "sensor_zscore")


@dataclass(frozen=True)
class Normalisation:
    """How tile values become network input.

    Attributes:
        policy: `per_tile_zscore` (mean 0 and standard deviation 1 over the valid pixels of the tile),
            `per_tile_minmax` (the valid range of the tile goes to -1..1, as in MOMO up to its constants) or
            `sensor_zscore` (constants of the corpus; keeps absolute radiance or temperature).
        mean: Mean in the tile's physical unit, for `sensor_zscore` only.
        std: Standard deviation in the same unit, for `sensor_zscore` only.
        clip: Values beyond +-clip are cut after scaling, so that a hot pixel cannot rule a loss.
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

    def __call__(self, value_HW: npt.NDArray[np.float32], valid_HW: npt.NDArray[np.bool_]) -> npt.NDArray[np.float32]:
        """Scales one tile.

        Args:
            value_HW: Tile in physical units, any shape.
            valid_HW: True where the pixel was measured, same shape.

        Returns:
            float32 of the same shape, within +-clip; invalid pixels are 0. A tile without contrast is all 0.
        """
        scaled = np.zeros(value_HW.shape, dtype=np.float32)
        values = value_HW[valid_HW].astype(np.float64)
        if values.size == 0:
            return scaled
        centre, spread = self._centre_and_spread(values)
        if spread > 0:
            scaled[valid_HW] = np.clip((values - centre) / spread, -self.clip, self.clip)
        return scaled

    def _centre_and_spread(self, values: npt.NDArray[np.float64]) -> tuple[float, float]:
        if self.policy == "sensor_zscore":
            assert self.mean is not None and self.std is not None
            return self.mean, self.std
        if self.policy == "per_tile_minmax":
            low, high = float(values.min()), float(values.max())
            return (low + high) / 2, (high - low) / 2
        centre = float(values.mean())
        spread = float(values.std())
        # A flat tile has a rounding-noise spread; dividing by it would blow that noise up to full contrast.
        return centre, spread if spread > 1e-6 * max(1.0, abs(centre)) else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as plain values for a card."""
        return {"policy": self.policy, "mean": self.mean, "std": self.std, "clip": self.clip}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Normalisation:
        """Builds the object back from a card."""
        return cls(**fields)
