"""Reads one micro-batch of training tiles, in the process that trains or in another.

All it needs of the plan and of the index comes with the `Request`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from ..corpus import Corpus
from ..corpus_index import Places
from ..errors import DataError, MomoError
from ..models.masking import augmentation_rng, mask_noise
from .augment import draw_view, draws_views
from .config import AugmentOptions
from .data import Batch


@dataclass(frozen=True)
class Part:
    """The tiles of a micro-batch that lie in one corpus.

    Attributes:
        corpus: Its number in `Sources.corpora`.
        slots: Places of the tiles in the micro-batch.
        places: Where they lie.
    """

    corpus: int
    slots: npt.NDArray[np.int64]
    places: Places


@dataclass(frozen=True)
class Request:
    """One micro-batch to be read.

    Attributes:
        epochs: Epoch of each sample, B entries.
        tiles: Number of each tile over all corpora, int64 (B,).
        affine_B3: What scales them, float32.
        parts: The tiles by corpus.
    """

    epochs: list[int]
    tiles: npt.NDArray[np.int64]
    affine_B3: npt.NDArray[np.float32]
    parts: list[Part]


class Choices:
    """What is drawn for each visit to a tile: its view and its mask.

    Args:
        patches: Number of patches N of the model.
        augment: Which views are drawn.
        seed: Seed of the run.
    """

    def __init__(self, *, patches: int, augment: AugmentOptions, seed: int) -> None:
        self.patches, self.augment, self.seed = patches, augment, seed
        self.views = draws_views(augment)

    def draw(self, key: str, epoch: int, view_6: npt.NDArray[np.float32], noise_N: npt.NDArray[np.float32]) -> None:
        """Draws for one visit into the rows given."""
        rng = augmentation_rng(key, self.seed, epoch)
        if self.views:
            view_6[...] = draw_view(rng, self.augment)
        noise_N[...] = mask_noise(rng, self.patches)


class BatchReader(Dataset[Batch]):
    """Reads requests, in the process that trains or in another.

    Args:
        corpora: Where to read.
        choices: What to draw.
        dtype: Of the stored pixels of a batch.
        tiles: Training tiles over all corpora.
        cache_mb: When all decoded tiles fit into this memory they are kept after their first reading.
    """

    def __init__(self, corpora: list[Corpus], choices: Choices, *, dtype: str, tiles: int, cache_mb: int) -> None:
        self.corpora, self.choices, self.dtype = corpora, choices, dtype
        self.size = corpora[0].manifest.tile_size
        # The pixels and, at worst, the validity of each.
        tile_bytes = (np.dtype(dtype).itemsize + 1) * self.size**2
        self.kept = _Kept(tiles, self.size, dtype) if tiles * tile_bytes <= cache_mb << 20 else None

    def __getitem__(self, request: Request) -> Batch:
        """Returns one micro-batch; see `make_loader`. `corrupt` names places yet, not keys."""
        try:
            read = self._read(request) if self.kept is None else self._through(self.kept, request)
        except MomoError as error:
            # As a value, because DataLoader would make one text of an error and its traceback.
            return {"error": error}
        return self._batch(request, read)

    def _through(self, kept: _Kept, request: Request) -> _Read:
        if kept.there[request.tiles].all():
            return kept.get(request.tiles)
        missing = _without(request, kept)
        fresh = self._read(missing)
        kept.add(missing.tiles, fresh)
        bad = {int(missing.tiles[slot]): found for slot, found in fresh.damaged.items()}
        damaged = {slot: bad[tile] for slot, tile in enumerate(request.tiles.tolist()) if tile in bad}
        return dataclasses.replace(kept.get(request.tiles), damaged=damaged)

    def _read(self, request: Request) -> _Read:
        count = len(request.tiles)
        if len(request.parts) == 1 and self.corpora[request.parts[0].corpus].manifest.dtype == self.dtype:
            (part,) = request.parts
            tiles = self.corpora[part.corpus].read_places(part.places)
            damaged = {bad.slot: (part.corpus, bad.shard, bad.offset, bad.error) for bad in tiles.unreadable}
            return _Read(tiles.keys, tiles.stored_BHW, tiles.valid_BHW, damaged)
        stored_BHW = np.empty((count, self.size, self.size), dtype=self.dtype)
        valid_BHW: npt.NDArray[np.bool_] | None = None
        keys, damaged = [""] * count, {}
        for part in request.parts:
            tiles = self.corpora[part.corpus].read_places(part.places)
            stored_BHW[part.slots] = tiles.stored_BHW
            if tiles.valid_BHW is not None:
                if valid_BHW is None:
                    valid_BHW = np.ones(stored_BHW.shape, dtype=np.bool_)
                valid_BHW[part.slots] = tiles.valid_BHW
            slots = part.slots.tolist()
            for slot, key in zip(slots, tiles.keys, strict=True):
                keys[slot] = key
            for bad in tiles.unreadable:
                damaged[slots[bad.slot]] = (part.corpus, bad.shard, bad.offset, bad.error)
        return _Read(keys, stored_BHW, valid_BHW, damaged)

    def _batch(self, request: Request, read: _Read) -> Batch:
        count, choices = len(request.tiles), self.choices
        # 0 where nothing is drawn: then no views are handed out either.
        views_B6 = np.zeros((count, 6), dtype=np.float32)
        noise_BN = np.empty((count, choices.patches), dtype=np.float32)
        for slot, key in enumerate(read.keys):
            if slot not in read.damaged:
                choices.draw(key, request.epochs[slot], views_B6[slot], noise_BN[slot])
        return {
            "stored": torch.from_numpy(read.stored_BHW),
            "valid": None if read.valid_BHW is None else torch.from_numpy(read.valid_BHW),
            "affine": torch.from_numpy(request.affine_B3),
            "noise": torch.from_numpy(noise_BN),
            "views": torch.from_numpy(views_B6) if choices.views else None,
            "keys": read.keys,
            "corrupt": [Damaged(slot, request.epochs[slot], *found) for slot, found in sorted(read.damaged.items())],
        }


@dataclass(frozen=True)
class _Read:
    """Tiles as they were read or kept; `damaged` by slot: corpus, shard, offset, why."""

    keys: list[str]
    stored_BHW: npt.NDArray[Any]
    valid_BHW: npt.NDArray[np.bool_] | None
    damaged: dict[int, tuple[int, str, int, DataError]]


@dataclass(frozen=True)
class Damaged:
    """A tile of a micro-batch that could not be read.

    Attributes:
        slot: Its place in the micro-batch.
        epoch: Epoch of the visit.
        corpus: Number of its corpus.
        shard: File name of its shard.
        offset: First byte of its sample.
        error: Why.
    """

    slot: int
    epoch: int
    corpus: int
    shard: str
    offset: int
    error: DataError


def _without(request: Request, kept: _Kept) -> Request:
    """Returns what of a request is not kept yet, each tile once."""
    _, firsts = np.unique(request.tiles, return_index=True)
    wanted = np.zeros(len(request.tiles), dtype=bool)
    wanted[firsts] = True
    wanted &= ~kept.there[request.tiles]
    slots = np.cumsum(wanted) - 1
    parts = []
    for part in request.parts:
        mine = wanted[part.slots]
        if mine.any():
            columns = (getattr(part.places, field.name)[mine] for field in dataclasses.fields(Places))
            parts.append(Part(part.corpus, slots[part.slots[mine]], Places(*columns)))
    return dataclasses.replace(request, tiles=request.tiles[wanted], parts=parts)


class _Kept:
    """Decoded tiles by number. Memory is taken as tiles come; one that could not be read is read anew next time."""

    def __init__(self, tiles: int, size: int, dtype: str) -> None:
        self._form = (tiles, size, dtype)
        self._stored = np.empty((tiles, size, size), dtype=dtype)
        self._valid: npt.NDArray[np.bool_] | None = None
        self._masked = np.zeros(tiles, dtype=bool)
        self._keys = np.full(tiles, "", dtype=object)
        self.there = np.zeros(tiles, dtype=bool)

    def add(self, tiles: npt.NDArray[np.int64], read: _Read) -> None:
        self._stored[tiles] = read.stored_BHW
        self._keys[tiles] = read.keys
        self._masked[tiles] = False
        if read.valid_BHW is not None:
            if self._valid is None:
                self._valid = np.empty(self._stored.shape, dtype=np.bool_)
            self._valid[tiles] = read.valid_BHW
            self._masked[tiles] = ~read.valid_BHW.all(axis=(1, 2))
        self.there[tiles] = True
        self.there[tiles[list(read.damaged)]] = False

    def get(self, tiles: npt.NDArray[np.int64]) -> _Read:
        masked = self._masked[tiles]
        valid_BHW = None
        if self._valid is not None and masked.any():
            valid_BHW = np.ones((len(tiles), *self._stored.shape[1:]), dtype=np.bool_)
            valid_BHW[masked] = self._valid[tiles[masked]]
        return _Read(self._keys[tiles].tolist(), self._stored[tiles], valid_BHW, {})

    def __getstate__(self) -> dict[str, Any]:
        return {"form": self._form}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(*state["form"])  # type: ignore[misc]
