"""Which training sample comes when: a function of data, seed and position, not of ranks or workers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError
from ..models.masking import sample_rng
from .config import ORDERS, PretrainConfig

Numbers = npt.NDArray[np.int64]


class SamplePlan:
    """The global order of training samples.

    Sample n belongs to epoch n // size. Inside an epoch the order is

        global   a seeded permutation of all tiles
        shards   a seeded permutation of all shards, cut into windows of `window_shards`; the tiles of a window are
                 permuted among themselves, so that a reader needs the shards of one window at a time, of two where
                 they meet

    Global batch b holds samples b * batch to (b + 1) * batch - 1; rank r reads an equal, contiguous share of it, cut
    into micro-batches in order. So batches do not depend on the number of ranks or of reading processes, every rank
    has the same number of micro-batches, and resuming needs one number: the samples consumed.

    An epoch of `global` takes 4 bytes a tile (12 million tiles: 48 MB, 0.9 s to make); `shards` a window at a time.

    Args:
        fingerprint: Identifies the data.
        size: Tiles in an epoch.
        seed: Seed of the run.
        order: `global` or `shards`.
        shards: Tiles of each shard in the order of the tiles, for `shards`.
        window_shards: Shards of a window, for `shards`.

    Raises:
        ConfigError: There is no tile, a window holds no shard, or the shards hold another number of tiles.
    """

    def __init__(
        self,
        fingerprint: str,
        size: int,
        seed: int,
        *,
        order: str = "global",
        shards: Sequence[int] = (),
        window_shards: int = 16,
    ) -> None:
        self.fingerprint, self.size, self.seed, self.order = fingerprint, size, seed, order
        if size < 1 or window_shards < 1 or order not in ORDERS or (order == "shards" and sum(shards) != size):
            raise ConfigError(
                "the samples cannot be planned",
                seen=f"{size} tiles, data.order={order}, {sum(shards)} tiles in {len(shards)} shards, "
                f"data.window_shards={window_shards}",
                rule="at least one tile and one shard a window; the shards hold the tiles",
                fix="prep a corpus with training tiles, or correct data.order and data.window_shards",
            )
        self._shards = np.cumsum([0, *shards], dtype=np.int64)
        self._window_shards = window_shards
        self._epoch = -1
        self._order: npt.NDArray[np.integer] = np.empty(0, dtype=np.int32)
        self._windows: Numbers = np.empty(0, dtype=np.int64)
        self._window = (-1, -1)
        self._window_order: Numbers = np.empty(0, dtype=np.int64)

    def locate(self, sample: int) -> tuple[int, int]:
        """Returns (epoch, tile) of a sample of the run."""
        epoch, position = divmod(sample, self.size)
        return epoch, int(self.tiles(epoch, position, position + 1)[0])

    def tiles(self, epoch: int, first: int, last: int) -> Numbers:
        """Returns the tiles at positions `first` to `last` - 1 of an epoch, int64."""
        if self.order == "global":
            return self._whole_epoch(epoch)[first:last].astype(np.int64)
        self._start_epoch(epoch)
        parts = []
        window = int(np.searchsorted(self._windows, first, side="right")) - 1
        while first < last:
            start, end = self._windows[window : window + 2].tolist()
            parts.append(self._tiles_of_window(window)[first - start : last - start])
            first, window = max(first, end), window + 1
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)

    def span(self, first: int, last: int) -> list[tuple[int, int]]:
        """Returns (epoch, tile) of the samples `first` to `last` - 1 of the run."""
        places: list[tuple[int, int]] = []
        while first < last:
            epoch, position = divmod(first, self.size)
            count = min(last - first, self.size - position)
            places += [(epoch, tile) for tile in self.tiles(epoch, position, position + count).tolist()]
            first += count
        return places

    def batches(
        self, *, start: int, stop: int, batch_size: int, rank: int, ranks: int, micro_batch: int | None = None
    ) -> Iterator[list[tuple[int, int]]]:
        """Yields this rank's micro-batches as (epoch, tile) pairs.

        Args:
            start: Samples consumed before.
            stop: Samples consumed at the end; a last batch that would pass it is not made.
            batch_size: Samples of a global batch; a multiple of `ranks` times `micro_batch`.
            rank: This rank, 0 to `ranks` - 1.
            ranks: Number of ranks.
            micro_batch: Samples a rank computes at once; None: its share of the batch.
        """
        share = batch_size // ranks
        micro_batch = micro_batch or share
        for first in range(start, stop - batch_size + 1, batch_size):
            mine = first + rank * share
            for place in range(mine, mine + share, micro_batch):
                yield self.span(place, place + micro_batch)

    def _whole_epoch(self, epoch: int) -> npt.NDArray[np.integer]:
        if epoch != self._epoch:
            order = sample_rng(self.fingerprint, self.seed, f"order of epoch {epoch}").permutation(self.size)
            self._order, self._epoch = order.astype(np.min_scalar_type(-self.size)), epoch
        return self._order

    def _start_epoch(self, epoch: int) -> None:
        """Makes the order of the shards of an epoch, and where its windows begin."""
        if epoch == self._epoch:
            return
        rng = sample_rng(self.fingerprint, self.seed, f"order of shards of epoch {epoch}")
        self._order, self._epoch = rng.permutation(len(self._shards) - 1), epoch
        ends = np.cumsum(np.diff(self._shards)[self._order])
        last = np.arange(self._window_shards, len(ends) + self._window_shards, self._window_shards) - 1
        self._windows = np.concatenate([[0], ends[np.minimum(last, len(ends) - 1)]])

    def _tiles_of_window(self, window: int) -> Numbers:
        if (self._epoch, window) != self._window:
            shards = self._order[window * self._window_shards : (window + 1) * self._window_shards]
            tiles = np.concatenate([np.arange(self._shards[n], self._shards[n + 1]) for n in shards])
            rng = sample_rng(self.fingerprint, self.seed, f"order of window {window} of epoch {self._epoch}")
            self._window, self._window_order = (self._epoch, window), rng.permutation(tiles)
        return self._window_order


@dataclass(frozen=True)
class Supply:
    """What one corpus brings to the arithmetic of the start.

    Attributes:
        name: Sensor.
        tiles: Training tiles of each shard that has some.
        nbytes: Bytes of each of these shards.
        other_nbytes: Bytes of every other shard (validation).
        streamed: Its shards come whole, none in part.
    """

    name: str
    tiles: list[int]
    nbytes: list[int]
    other_nbytes: list[int]
    streamed: bool


def check_arithmetic(config: PretrainConfig, supplies: Sequence[Supply]) -> list[str]:
    """Compares tiles, shards, ranks, reading processes and memory before anything starts.

    Args:
        config: The job.
        supplies: Its corpora.

    Returns:
        Lines for the banner: the arithmetic, and what is allowed but may surprise.

    Raises:
        ConfigError: It cannot work; the message has the numbers and what to change.
    """
    data, train = config.data, config.train
    tiles, shards = sum(sum(s.tiles) for s in supplies), sum(len(s.tiles) for s in supplies)
    if not tiles:
        raise ConfigError("there is no training tile", seen=f"{len(supplies)} corpora", fix="run momo prep again")
    _check_buffer(config, supplies)
    order = "all tiles of an epoch" if data.order == "global" else f"windows of {data.window_shards} shards"
    readers = max(1, data.workers)
    processes = f"{data.workers} reading processes a rank" if data.workers else "read in the training process"
    lines = [f"{tiles:,} tiles in {shards:,} shards, mixed over {order}; {processes}"]
    if tiles < train.batch_size:
        lines.append(
            f"an epoch has {tiles:,} tiles, fewer than train.batch_size={train.batch_size:,}: "
            "a batch holds tiles more than once"
        )
    if data.order == "shards":
        lines += _window_lines(config, tiles, shards)
    micro_batches = train.samples // train.batch_size * config.accumulation
    if data.workers > micro_batches:
        lines.append(
            f"a rank has {micro_batches} micro-batches in all: {data.workers - micro_batches} of its {data.workers} "
            "reading processes are not started (data.workers)"
        )
    if any(s.streamed for s in supplies):
        nbytes = sum(sum(s.nbytes) for s in supplies if s.streamed)
        count = config.world * readers
        lines.append(
            f"whole shards are streamed: {_megabytes(nbytes):,} MB an epoch to each of {count} reading processes, "
            f"which keep {data.buffer_mb:,} MB each"
        )
    return lines


def _window_lines(config: PretrainConfig, tiles: int, shards: int) -> list[str]:
    window, batch = config.data.window_shards, config.train.batch_size
    if window >= shards:
        return [f"data.window_shards={window} covers all {shards} shards: the same mixing as data.order=global"]
    in_window = tiles * window // shards
    if in_window < 2 * batch:
        return [
            f"a window of {window} shards has about {in_window:,} tiles for batches of {batch:,}: batches hardly mix, "
            "a larger data.window_shards would"
        ]
    return []


def _check_buffer(config: PretrainConfig, supplies: Sequence[Supply]) -> None:
    """Refuses to stream what would be streamed again for every batch."""
    data, limit = config.data, config.data.buffer_mb << 20
    streamed = [supply for supply in supplies if supply.streamed]
    if not streamed:
        return
    for supply in streamed:
        largest = max([*supply.nbytes, *supply.other_nbytes], default=0)
        if largest > limit:
            raise ConfigError(
                "a shard does not fit the buffer",
                seen=f"{supply.name}: a shard of {_megabytes(largest):,} MB, data.buffer_mb={data.buffer_mb:,}",
                rule="shards that can only be streamed are held whole",
                fix=f"data.buffer_mb={_megabytes(largest)}, or prep with fewer tiles a shard",
            )
    sizes = sorted((nbytes for supply in streamed for nbytes in supply.nbytes), reverse=True)
    whole, seen = sum(sizes), f"{len(sizes):,} shards of {_megabytes(sum(sizes)):,} MB together"
    if whole <= limit:
        return
    fitting = int(np.searchsorted(np.cumsum(sizes), limit, side="right"))
    if data.order == "global":
        raise ConfigError(
            "data.order=global cannot be streamed",
            seen=f"{seen}, data.buffer_mb={data.buffer_mb:,}",
            rule="a batch takes tiles from any shard, so all shards must fit the buffer of each reading process",
            fix=f"data.order=shards data.window_shards={min(fitting, data.window_shards)}, or "
            f"data.buffer_mb={_megabytes(whole)}",
        )
    if fitting < data.window_shards:
        window = sum(sizes[: data.window_shards])
        raise ConfigError(
            "the window of shards does not fit the buffer",
            seen=f"data.window_shards={data.window_shards} take up to {_megabytes(window):,} MB, "
            f"data.buffer_mb={data.buffer_mb:,} ({seen})",
            rule="each reading process holds the shards of a window",
            fix=f"data.window_shards={fitting}, or data.buffer_mb={_megabytes(window)}",
        )


def _megabytes(nbytes: int) -> int:
    return -(-nbytes >> 20)
