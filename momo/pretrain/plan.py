"""Which training sample comes when: a function of data, seed and position, not of ranks or workers."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from ..models.masking import sample_rng


class SamplePlan:
    """The global order of training samples.

    Sample n belongs to epoch n // size; inside an epoch the order is a seeded permutation of all tiles. Global batch b
    holds samples b * batch to (b + 1) * batch - 1 and rank r reads an equal, contiguous share of it, so batches do not
    depend on the number of ranks, every rank has the same number of steps, and resuming needs one number.

    Args:
        fingerprint: Identifies the data.
        size: Tiles in an epoch.
        seed: Seed of the run.
    """

    def __init__(self, fingerprint: str, size: int, seed: int) -> None:
        self.fingerprint, self.size, self.seed = fingerprint, size, seed
        self._epoch = -1
        self._order: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def locate(self, sample: int) -> tuple[int, int]:
        """Returns (epoch, tile) of a sample of the run."""
        epoch, position = divmod(sample, self.size)
        if epoch != self._epoch:
            rng = sample_rng(self.fingerprint, self.seed, f"order of epoch {epoch}")
            self._order, self._epoch = rng.permutation(self.size), epoch
        return epoch, int(self._order[position])

    def batches(
        self, *, start: int, stop: int, batch_size: int, rank: int, ranks: int
    ) -> Iterator[list[tuple[int, int]]]:
        """Yields this rank's share of each global batch as (epoch, tile) pairs.

        Args:
            start: Samples consumed before; a multiple of `batch_size`.
            stop: Samples consumed at the end; a last batch that would pass it is not made.
            batch_size: Samples of a global batch; a multiple of `ranks`.
            rank: This rank, 0 to `ranks` - 1.
            ranks: Number of ranks.
        """
        share = batch_size // ranks
        for first in range(start, stop - batch_size + 1, batch_size):
            mine = first + rank * share
            yield [self.locate(sample) for sample in range(mine, mine + share)]
