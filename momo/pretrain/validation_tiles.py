"""The fixed validation tiles of a corpus: a seeded subset with masks drawn from the tiles' keys.

Tiles are read batch by batch, one batch ahead of the one that is computed; a small subset may stay decoded in memory,
so that the validations of a run decode it once. Both ways give the same tensors.

Axes: B batch, C channels, H W pixels, N patches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from ..corpus import Corpus, Unreadable
from ..errors import DataError
from ..extras import require
from ..manifest import open_table
from ..models.masking import mask_noise, sample_rng
from ..normalise import Normalisation, normalise_batch

_SPLIT = "val"


def validation_subset(corpus: Corpus, limit: int, seed: int) -> npt.NDArray[np.int64]:
    """Returns the positions of the validation tiles used, ascending; depends on the corpus and the seed alone."""
    count = corpus.count(_SPLIT)
    if count <= limit:
        return np.arange(count)
    rng = sample_rng(corpus.manifest.fingerprint, seed, "validation subset")
    return np.sort(rng.choice(count, size=limit, replace=False))


@dataclass(frozen=True)
class TileBatch:
    """Validation tiles as they are stored, with what scales and masks them.

    Attributes:
        keys: Keys of the B tiles.
        stored_BHW: uint8 or uint16.
        valid_BHW: bool, True where the pixel was measured; None when every pixel was.
        affine_B3: float32, see `momo.normalise.Normalisation.affine`.
        noise_BN: float32 in [0, 1), see `momo.models.masking.mask_noise`.
    """

    keys: list[str]
    stored_BHW: torch.Tensor
    valid_BHW: torch.Tensor | None
    affine_B3: torch.Tensor
    noise_BN: torch.Tensor

    def to_inputs(
        self, *, limit: float, in_chans: int, device: torch.device | str
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Moves the tiles to a device and scales them there.

        Args:
            limit: `Normalisation.limit`.
            in_chans: 1, or 3 equal channels.
            device: Where the model is.

        Returns:
            Images (B, C, H, W) float32, validity (B, H, W) bool and noise (B, N) float32.
        """
        stored, affine, noise = (part.to(device) for part in (self.stored_BHW, self.affine_B3, self.noise_BN))
        valid = None if self.valid_BHW is None else self.valid_BHW.to(device)
        image_B1HW = normalise_batch(stored, valid, affine, limit)
        if valid is None:
            valid = torch.ones(stored.shape, dtype=torch.bool, device=device)
        return image_B1HW.expand(-1, in_chans, -1, -1), valid, noise


@dataclass(frozen=True)
class _KeptTile:
    """One tile of a `TileBatch`, kept decoded: views of its arrays."""

    key: str
    stored_HW: torch.Tensor
    valid_HW: torch.Tensor | None
    affine_3: torch.Tensor
    noise_N: torch.Tensor


class ValidationTiles(Dataset[dict[str, Any]]):
    """A fixed subset of one corpus's validation tiles with masks drawn from their keys.

    Args:
        corpus: The corpus.
        normalisation: Scaling of its tiles.
        patches: Number of patches N of the model.
        limit: At most so many tiles.
        seed: Chooses the subset and the masks.
        cache_mb: When the decoded subset fits into this memory its tiles are kept after their first reading.
    """

    def __init__(
        self,
        corpus: Corpus,
        normalisation: Normalisation,
        *,
        patches: int,
        limit: int,
        seed: int,
        cache_mb: int = 0,
    ) -> None:
        self.corpus, self.normalisation = corpus, normalisation
        self.patches, self.seed = patches, seed
        self.positions: Sequence[int] = validation_subset(corpus, limit, seed).tolist()
        # The pixels and, at worst, the validity of each; the mask's noise.
        tile_bytes = (np.dtype(corpus.manifest.dtype).itemsize + 1) * corpus.manifest.tile_size**2 + 4 * patches
        self._kept: dict[int, _KeptTile] | None = {} if len(self) * tile_bytes <= cache_mb << 20 else None

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, place: int) -> dict[str, Any]:
        """Returns one tile: `stored` (H, W), `valid` (H, W) bool, `affine` (3,), `noise` (N,) and `key`."""
        batch = self.batch(range(place, place + 1))
        valid = torch.ones_like(batch.stored_BHW, dtype=torch.bool) if batch.valid_BHW is None else batch.valid_BHW
        return {
            "stored": batch.stored_BHW[0],
            "valid": valid[0],
            "affine": batch.affine_B3[0],
            "noise": batch.noise_BN[0],
            "key": batch.keys[0],
        }

    def batch(self, places: range) -> TileBatch:
        """Returns neighbouring tiles of the subset.

        Args:
            places: Places in the subset, 0 to `len(self) - 1`.

        Raises:
            DataError: Tiles cannot be read; the message names them.
        """
        if self._kept is None:
            return self._read(places)
        if not all(place in self._kept for place in places):
            self._kept.update(zip(places, _split(self._read(places)), strict=True))
        return _joined([self._kept[place] for place in places])

    def batches(self, spans: Sequence[range]) -> Iterator[TileBatch]:
        """Yields the tiles of each span while a thread reads those of the next."""
        with ThreadPoolExecutor(1, thread_name_prefix="validation-tiles") as reader:
            ready: Future[TileBatch] | None = None
            for span in spans:
                following = reader.submit(self.batch, span)
                if ready is not None:
                    yield ready.result()
                ready = following
            if ready is not None:
                yield ready.result()

    def _read(self, places: range) -> TileBatch:
        rows = self.corpus.index[_SPLIT]
        positions = np.asarray(self.positions[places.start : places.stop], dtype=np.int64)
        tiles = self.corpus.read_places(rows.places(positions))
        if tiles.unreadable:
            raise self._damaged(tiles.unreadable)
        noises = [mask_noise(sample_rng(key, self.seed, "validation mask"), self.patches) for key in tiles.keys]
        return TileBatch(
            keys=tiles.keys,
            stored_BHW=torch.from_numpy(tiles.stored_BHW),
            valid_BHW=None if tiles.valid_BHW is None else torch.from_numpy(tiles.valid_BHW),
            affine_B3=torch.from_numpy(self.normalisation.affine(rows.statistics_of(positions))),
            noise_BN=torch.from_numpy(np.stack(noises)),
        )

    def _damaged(self, unreadable: Sequence[Unreadable]) -> DataError:
        keys = self.corpus.keys_at([(tile.shard, tile.offset) for tile in unreadable[:3]])
        error = unreadable[0].error
        return DataError(
            "a validation tile cannot be read",
            seen=f"{', '.join(keys)} of {self.corpus.location}: {error.what}: {error.seen}",
            rule="a validation loss is over the whole fixed subset, or it could not be compared with others",
            fix="copy the corpus again or mend it (momo prep verify lists what is damaged), then start again",
        )

    # --- what the tiles belong to -----------------------------------------------------------------------------------

    @cached_property
    def products(self) -> list[str]:
        """Product of each tile."""
        rows = self.corpus.index[_SPLIT]
        found: list[str] = rows.product[np.asarray(self.positions, dtype=np.int64)].tolist()
        return found

    @cached_property
    def units(self) -> list[str] | None:
        """Geologic unit of each tile, empty where unknown; None when it is known of none."""
        return read_units(self.corpus, self.positions)

    def keys(self, places: Sequence[int]) -> list[str]:
        """Returns the keys of tiles by their place in the subset, without reading the tiles."""
        rows, shards = self.corpus.index[_SPLIT], self.corpus.manifest.shards
        samples = [rows.place(self.positions[place]) for place in places]
        return self.corpus.keys_at([(shards[shard].name, offset) for shard, offset, _ in samples])


def _split(batch: TileBatch) -> Iterator[_KeptTile]:
    for row, key in enumerate(batch.keys):
        valid_HW = None if batch.valid_BHW is None else batch.valid_BHW[row]
        yield _KeptTile(key, batch.stored_BHW[row], valid_HW, batch.affine_B3[row], batch.noise_BN[row])


def _joined(tiles: list[_KeptTile]) -> TileBatch:
    valid_BHW = None
    if any(tile.valid_HW is not None for tile in tiles):
        whole_HW = torch.ones_like(tiles[0].stored_HW, dtype=torch.bool)
        valid_BHW = torch.stack([whole_HW if tile.valid_HW is None else tile.valid_HW for tile in tiles])
    return TileBatch(
        keys=[tile.key for tile in tiles],
        stored_BHW=torch.stack([tile.stored_HW for tile in tiles]),
        valid_BHW=valid_BHW,
        affine_B3=torch.stack([tile.affine_3 for tile in tiles]),
        noise_BN=torch.stack([tile.noise_N for tile in tiles]),
    )


def read_units(corpus: Corpus, positions: Sequence[int]) -> list[str] | None:
    """Reads the geologic units of a few validation tiles from index.parquet; the index in memory leaves them out.

    Args:
        corpus: The corpus.
        positions: Positions in the validation split.

    Returns:
        One unit a position, empty where unknown; None when it is known of none.

    Raises:
        DataError: The table cannot be read.
    """
    arrow, parquet = require("pyarrow", "pretrain"), require("pyarrow.parquet", "pretrain")
    found = open_table(corpus.store, corpus.manifest, "index.parquet")
    source = arrow.BufferReader(found) if isinstance(found, bytes) else found
    try:
        table = parquet.ParquetFile(source, read_dictionary=["shard", "unit"])
        if "unit" not in table.schema_arrow.names or not _has_units(table.metadata):
            return None
        units = _units_at(table, corpus, positions)
    except (arrow.ArrowException, OSError) as error:
        seen = f"{corpus.location}/index.parquet: {error}"
        raise DataError("a table of the corpus cannot be read", seen=seen, fix="run momo prep again") from None
    return units if any(units) else None


def _has_units(metadata: Any) -> bool:
    """False when the table's own statistics tell that every unit is the empty text, so that no row need be read."""
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        column = next(c for c in map(group.column, range(group.num_columns)) if c.path_in_schema == "unit")
        statistics = column.statistics
        if statistics is None or not statistics.has_min_max or statistics.max != "":
            return True
    return False


def _units_at(table: Any, corpus: Corpus, positions: Sequence[int]) -> list[str]:
    """Finds the rows by shard and first byte, which name a tile whatever the order of the table."""
    numbers = {entry.name: number for number, entry in enumerate(corpus.manifest.shards)}
    places = corpus.index[_SPLIT].places(np.asarray(positions, dtype=np.int64))
    wanted = _address(places.shard, places.offset)
    order = np.argsort(wanted)
    found = [""] * len(wanted)
    for batch in table.iter_batches(columns=["shard", "offset", "unit"]):
        shard, offset, unit = (batch.column(name) for name in ("shard", "offset", "unit"))
        codes = np.array([numbers[text] for text in shard.dictionary.to_pylist()], dtype=np.int64)
        here = _address(codes[shard.indices.to_numpy()], offset.to_numpy())
        slots = order[np.minimum(np.searchsorted(wanted, here, sorter=order), len(wanted) - 1)]
        for row in np.flatnonzero(wanted[slots] == here).tolist():
            found[slots[row]] = unit[row].as_py() or ""
    return found


def _address(shard: npt.NDArray[np.int64], offset: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return shard << 40 | offset
