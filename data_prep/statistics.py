"""Statistics of a corpus from the statistics of its tiles, without reading the pixels again."""

from __future__ import annotations

import hashlib
import heapq
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

PERCENTILES = (0.1, 1.0, 5.0, 25.0, 50.0, 75.0, 95.0, 99.0, 99.9)
SAMPLE_VALUES = 64  # pixels sampled from one tile
SAMPLE_TILES = 8192  # tiles whose pixels are sampled


def key_priority(key: str) -> int:
    """Returns a fixed pseudo-random 64-bit number for a tile key: the same in every run and process."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")


def value_sample(stored_HW: npt.NDArray[Any], valid_HW: npt.NDArray[np.bool_], count: int) -> npt.NDArray[Any]:
    """Returns at most `count` valid values of a tile, evenly strided in reading order, as an array of their own."""
    values = stored_HW.ravel() if valid_HW.all() else stored_HW[valid_HW]
    # Not a view: it would keep the whole tile in memory.
    return values[:: max(1, -(-values.size // count))].copy()


@dataclass
class PixelStatistics:
    """Statistics of physical values, gathered from the statistics of tiles.

    Mean and standard deviation are exact (pairwise merging of moments: Chan, Golub and LeVeque 1979). Percentiles
    come from a sample of the `SAMPLE_TILES` tiles with the smallest priority, so memory is bounded and neither the
    order of tiles nor the number of processes matters.
    """

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0
    low: float = math.inf
    high: float = -math.inf
    _sample: list[tuple[int, int, npt.NDArray[np.float64]]] = field(default_factory=list)
    _offered: int = 0

    def add(
        self,
        count_N: npt.NDArray[np.int64],
        mean_N: npt.NDArray[np.float64],
        std_N: npt.NDArray[np.float64],
        low: float,
        high: float,
    ) -> None:
        """Adds tiles by their number of valid pixels, mean and population standard deviation, in physical units.

        Args:
            count_N: Valid pixels, above 0.
            mean_N: Means.
            std_N: Standard deviations.
            low: Smallest value of all of them.
            high: Largest value of all of them.
        """
        count = int(count_N.sum())
        if count == 0:
            return
        mean = float((mean_N * count_N).sum() / count)
        squares = float((count_N * (np.square(std_N) + np.square(mean_N - mean))).sum())
        total = self.count + count
        shift = mean - self.mean
        self.squares += squares + shift * shift * self.count * count / total
        self.mean += shift * count / total
        self.count = total
        self.low, self.high = min(self.low, low), max(self.high, high)

    def offer(self, priority: int, values: npt.NDArray[np.float64]) -> None:
        """Offers the sampled values of a tile; kept when its priority is among the smallest."""
        self._offered += 1
        item = (-priority, self._offered, values)
        if len(self._sample) < SAMPLE_TILES:
            heapq.heappush(self._sample, item)
        elif -priority > self._sample[0][0]:
            heapq.heapreplace(self._sample, item)

    def to_dict(self) -> dict[str, Any]:
        """Returns count, mean, std, min, max and percentiles as plain values."""
        sample = np.concatenate([values for _, _, values in self._sample])
        points = np.percentile(sample, PERCENTILES)
        return {
            "count": self.count,
            "mean": self.mean,
            "std": math.sqrt(self.squares / self.count),
            "min": self.low,
            "max": self.high,
            "percentiles": {str(p): float(v) for p, v in zip(PERCENTILES, points, strict=True)},
            "percentiles_from": int(sample.size),
            "over": "valid pixels of the training tiles, physical units",
        }
