"""Micro-batches of training tiles, read batch-wise, with every random choice drawn from the tile's key.

The process that trains holds the plan and the index, and makes of each micro-batch a `Request`: where its samples lie
and what scales them. Requests are all that a reading process needs, so neither an epoch's order nor the index of
millions of tiles is held once a process. What is read does not depend on who reads it.

A tile that cannot be read becomes a wholly invalid one, which weighs nothing in the loss: the composition of every
batch is the same with and without damage.
"""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from ..errors import DataError
from .config import PretrainConfig
from .data import Batch, Sources
from .plan import SamplePlan
from .reader import BatchReader, Choices, Damaged, Part, Request

_PREFETCHED = 2  # micro-batches a reading process is ahead


def make_plan(sources: Sources, config: PretrainConfig) -> SamplePlan:
    """Returns the order of samples of a run."""
    shards = [tiles for supply in sources.supplies() for tiles in supply.tiles]
    return SamplePlan(
        sources.fingerprint,
        int(sources.bounds[-1]),
        config.seed,
        order=config.data.order,
        shards=shards,
        window_shards=config.data.window_shards,
    )


def make_request(sources: Sources, micro_batch: list[tuple[int, int]]) -> Request:
    """Looks the tiles of a micro-batch, (epoch, tile) pairs, up in the index."""
    epochs, numbers = (list(column) for column in zip(*micro_batch, strict=True))
    tiles = np.array(numbers, dtype=np.int64)
    owners = np.searchsorted(sources.bounds, tiles, side="right") - 1
    affine_B3 = np.empty((len(tiles), 3), dtype=np.float32)
    parts = []
    for number in np.unique(owners).tolist():
        slots = np.flatnonzero(owners == number)
        positions = tiles[slots] - sources.bounds[number]
        rows = sources.corpora[number].index["train"]
        affine_B3[slots] = sources.normalisations[number].affine(rows.statistics_of(positions))
        parts.append(Part(number, slots, rows.places(positions)))
    return Request(epochs, tiles, affine_B3, parts)


class Loader:
    """Iterates over the micro-batches of one rank; see `make_loader`."""

    def __init__(
        self, sources: Sources, config: PretrainConfig, reader: BatchReader, span: dict[str, int], *, pinned: bool
    ) -> None:
        self._sources, self._config, self._reader, self._span = sources, config, reader, span
        self._pinned = pinned

    def __len__(self) -> int:
        span = self._span
        steps = max(0, span["stop"] - span["start"]) // span["batch_size"]
        return steps * (span["batch_size"] // (span["ranks"] * span["micro_batch"]))

    def __iter__(self) -> Iterator[Batch]:
        batches = self._from_processes() if self._config.data.workers else self._from_here()
        for batch in batches:
            if "error" in batch:
                raise batch["error"]
            if batch["corrupt"]:
                self._name_damage(batch)
            yield batch

    def _requests(self) -> Iterator[Request]:
        plan = make_plan(self._sources, self._config)
        for micro_batch in plan.batches(**self._span):
            yield make_request(self._sources, micro_batch)

    def _from_processes(self) -> Iterator[Batch]:
        workers = min(self._config.data.workers, max(1, len(self)))
        loader = DataLoader(
            self._reader,
            batch_size=None,
            sampler=_Once(self._requests()),
            num_workers=workers,
            prefetch_factor=_PREFETCHED,
            collate_fn=_as_it_is,
            worker_init_fn=_outlive_first_signal,
            pin_memory=self._pinned,
            multiprocessing_context="spawn",
            # Without one of its own it would draw from torch's global generator.
            generator=torch.Generator().manual_seed(0),
        )
        try:
            yield from loader
        except (RuntimeError, EOFError, OSError) as error:
            if not _tells_of_death(error):
                raise
            raise DataError(
                "a reading process died",
                seen=(str(error) or "its last batch did not arrive").splitlines()[0],
                rule="reading processes live as long as the run",
                fix="look for a lack of memory or of shared memory (/dev/shm), or use fewer data.workers",
            ) from None

    def _from_here(self) -> Iterator[Batch]:
        remote = any(corpus.store.folder is None or corpus.store.streamed for corpus in self._sources.corpora)
        if self._reader.kept is not None and not remote:
            for request in self._requests():
                yield self._read(request)
            return
        # The index is read here, not by two threads at once.
        for corpus in self._sources.corpora:
            _ = corpus.index
        requests = self._requests()
        # A new thread would pin memory on the first GPU, whichever its rank has.
        gpu = torch.cuda.current_device() if self._pinned else None
        start = None if gpu is None else functools.partial(torch.cuda.set_device, gpu)
        with ThreadPoolExecutor(1, thread_name_prefix="tiles", initializer=start) as thread:
            ahead = thread.submit(self._read_next, requests)
            while (batch := ahead.result()) is not None:
                ahead = thread.submit(self._read_next, requests)
                yield batch

    def _read_next(self, requests: Iterator[Request]) -> Batch | None:
        request = next(requests, None)
        return None if request is None else self._read(request)

    def _read(self, request: Request) -> Batch:
        batch = self._reader[request]
        if self._pinned:
            batch = {k: v.pin_memory() if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        return batch

    def _name_damage(self, batch: Batch) -> None:
        """Gives damaged tiles their keys, and what is drawn from these, or stops."""
        damaged: list[Damaged] = batch["corrupt"]
        corpora, named = self._sources.corpora, []
        keys: dict[int, str] = {}
        for number in {tile.corpus for tile in damaged}:
            mine = [tile for tile in damaged if tile.corpus == number]
            found = corpora[number].keys_at([(tile.shard, tile.offset) for tile in mine])
            keys.update(zip((tile.slot for tile in mine), found, strict=True))
        for tile in damaged:
            key, why = keys[tile.slot], tile.error
            reason = f"{tile.shard} at byte {tile.offset}: {why.what}: {why.seen}"
            if self._config.data.on_corrupt == "stop":
                raise DataError(
                    "a training tile cannot be read",
                    seen=f"{key} of {corpora[tile.corpus].location}, {reason}",
                    rule="data.on_corrupt=stop: every tile of the plan is read",
                    fix="run momo prep verify on the corpus and copy it again, or go on with data.on_corrupt=skip",
                )
            batch["keys"][tile.slot] = key
            view_6 = np.empty(6, dtype=np.float32) if batch["views"] is None else batch["views"][tile.slot].numpy()
            self._reader.choices.draw(key, tile.epoch, view_6, batch["noise"][tile.slot].numpy())
            named.append((key, reason))
        batch["corrupt"] = named


class _Once:
    """Hands requests to DataLoader one by one as they are asked for."""

    def __init__(self, requests: Iterator[Request]) -> None:
        self._requests = requests

    def __iter__(self) -> Iterator[Request]:
        return self._requests


def _outlive_first_signal(worker: int) -> None:
    """Leaves it to the training process to answer SIGTERM, SIGUSR1 and Ctrl-C, which a cluster sends to every process.

    A reader that died of them would take away the time to save. A second SIGTERM, the training process's own, ends it.
    """
    heard: list[int] = []

    def on_terminate(number: int, frame: FrameType | None) -> None:
        if heard:
            os._exit(0)
        heard.append(number)

    signal.signal(signal.SIGTERM, on_terminate)
    for ignored in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(ignored, signal.SIG_IGN)


def _tells_of_death(error: Exception) -> bool:
    """Tells the death of a reading process from an error inside one, which DataLoader raises again as what it was."""
    if str(error).startswith("Caught "):
        return False
    # DataLoader watches its processes; a batch that was on its way is missed by multiprocessing.
    return "DataLoader worker" in str(error) or isinstance(error, (EOFError, ConnectionError, FileNotFoundError))


def _as_it_is(batch: Any) -> Any:
    return batch


def make_loader(
    sources: Sources,
    config: PretrainConfig,
    *,
    patches: int,
    start: int,
    stop: int,
    rank: int,
    ranks: int,
    device: torch.device | str,
) -> Loader:
    """Returns the micro-batches of one rank, in order.

    Args:
        sources: The corpora.
        config: The job.
        patches: Number of patches N of the model.
        start: Samples consumed before.
        stop: Samples consumed at the end.
        rank: This rank.
        ranks: Number of ranks.
        device: Where the model is; for CUDA batches come in pinned memory.

    Returns:
        An iterable of dicts: `stored` (B, H, W) uint8 or uint16, `valid` (B, H, W) bool or None when every pixel is
        valid, `affine` (B, 3) float32, `noise` (B, N) float32, `views` (B, 6) float32 or None when none are drawn,
        `keys` (B texts) and `corrupt`: (key, reason) of tiles that could not be read; these are wholly invalid.
        `momo.pretrain.data.to_inputs` makes network input of it. Iterating raises DataError for a damaged tile under
        data.on_corrupt=stop.
    """
    choices = Choices(patches=patches, augment=config.augment, seed=config.seed)
    tiles = int(sources.bounds[-1])
    reader = BatchReader(sources.corpora, choices, dtype=sources.dtype, tiles=tiles, cache_mb=config.data.cache_mb)
    span = {
        "start": start,
        "stop": stop,
        "batch_size": config.train.batch_size,
        "rank": rank,
        "ranks": ranks,
        "micro_batch": config.train.micro_batch or config.train.batch_size // ranks,
    }
    return Loader(sources, config, reader, span, pinned=torch.device(device).type == "cuda")
