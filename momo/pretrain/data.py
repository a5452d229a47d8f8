"""Tiles as tensors, with every random choice drawn from the tile's key.

Tiles travel as they are stored, 8 or 16 bit, with the three numbers that scale them; scaling is left to the device.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from ..corpus import Corpus, StoredTile
from ..errors import ConfigError, DataError
from ..files import sha256_json
from ..models.masking import augmentation_rng, mask_noise, sample_rng
from ..normalise import Normalisation, normalise_batch
from .config import PretrainConfig


@dataclass(frozen=True)
class Sources:
    """The corpora of a run with their normalisation."""

    corpora: list[Corpus]
    normalisations: list[Normalisation]

    @property
    def fingerprint(self) -> str:
        """Identifies the training data of the run."""
        return sha256_json([corpus.manifest.fingerprint for corpus in self.corpora])

    @functools.cached_property
    def bounds(self) -> npt.NDArray[np.int64]:
        """Running sum of the training tiles of the corpora, from 0."""
        return np.cumsum([0] + [corpus.count("train") for corpus in self.corpora])

    @property
    def dtype(self) -> str:
        """Type that holds the stored pixels of every corpus, so that a batch may mix them."""
        return max((corpus.manifest.dtype for corpus in self.corpora), key=lambda name: np.dtype(name).itemsize)

    def card_sensors(self) -> list[dict[str, Any]]:
        """Returns the entries of `Card.sensors`."""
        entries = []
        for corpus, normalisation in zip(self.corpora, self.normalisations, strict=True):
            entry: dict[str, Any] = {"name": corpus.sensor, "tiles": corpus.count("train")}
            if normalisation.policy == "sensor_zscore":
                entry |= {"mean": normalisation.mean, "std": normalisation.std}
            entries.append(entry)
        return entries


def open_sources(config: PretrainConfig, *, verify: bool) -> Sources:
    """Opens the corpora of a run.

    Args:
        config: The job.
        verify: Compare every shard's SHA-256.

    Raises:
        DataError: A corpus is missing, altered, or has an empty split.
        ConfigError: Tile sizes differ, or two corpora are of one sensor.
    """
    corpora = [Corpus(Path(path), verify=verify) for path in config.data.corpora]
    for corpus in corpora:
        for split in ("train", "val"):
            if corpus.count(split) == 0:
                raise DataError(
                    f"the corpus has no {split} tile",
                    seen=corpus.path,
                    rule="both splits are needed: validation chooses checkpoints",
                    fix="run momo prep with another val_fraction, smaller blocks or more products",
                )
    sizes = {str(corpus.path): corpus.manifest.tile_size for corpus in corpora}
    if len(set(sizes.values())) > 1:
        raise ConfigError("the corpora have different tile sizes", seen=sizes, rule="one tile size a run")
    sensors = [corpus.sensor for corpus in corpora]
    if len(set(sensors)) < len(sensors):
        raise ConfigError("two corpora are of one sensor", seen=", ".join(sensors), fix="cut them into one corpus")
    return Sources(corpora, [_normalisation(config.data.normalisation, corpus) for corpus in corpora])


def _normalisation(policy: str, corpus: Corpus) -> Normalisation:
    if policy == "sensor_zscore":
        if corpus.manifest.mixed_units:
            raise ConfigError(
                "sensor_zscore needs one unit",
                seen=f"{corpus.path} joins products of different units",
                rule="one mean and one deviation can scale tiles of one unit only",
                fix="choose data.normalisation=per_tile_zscore, or prep calibrated products alone",
            )
        return Normalisation(policy, mean=corpus.stats["mean"], std=corpus.stats["std"])
    if policy == "per_product_percentile":
        _check_percentiles(corpus)
    return Normalisation(policy)


def _check_percentiles(corpus: Corpus) -> None:
    without: set[str] = set()
    for rows in corpus.index.values():
        used = np.unique(rows.product.codes)
        without.update(rows.product.values[used[~np.isfinite(rows.percentiles[:, used]).all(axis=0)]])
    if without:
        raise ConfigError(
            "per_product_percentile needs percentiles of every product",
            seen=f"{corpus.path}: {len(without)} products without, for example {', '.join(sorted(without)[:3])}",
            rule="products.parquet has percentile_low and percentile_high",
            fix="choose data.normalisation=per_tile_zscore, or run momo prep again",
        )


Sample = dict[str, Any]


def to_sample(
    tile: StoredTile,
    normalisation: Normalisation,
    rng: np.random.Generator,
    *,
    patches: int,
    dtype: str,
    augment: bool,
) -> Sample:
    """Makes one sample of a batch from a tile; `to_inputs` makes network input of the batch.

    Args:
        tile: The decoded tile.
        normalisation: Scaling of its sensor.
        rng: Source of the symmetry and of the mask.
        patches: Number of patches N of the model.
        dtype: `uint8` or `uint16`, one for all samples of a batch.
        augment: Draw one of the eight symmetries of the square; nadir images have no up.

    Returns:
        `stored` (H, W) of `dtype`, `valid` (H, W) bool, `affine` (3,) float32, `noise` (N,) float32, `key`.
    """
    stored, valid = tile.stored_HW, tile.valid
    if augment:
        turns, mirror = int(rng.integers(4)), bool(rng.integers(2))
        stored = _turned(stored, turns, mirror)
        if tile.valid_HW is not None:
            valid = _turned(valid, turns, mirror)
    return {
        "stored": torch.from_numpy(np.ascontiguousarray(stored, dtype=dtype)),
        "valid": torch.from_numpy(np.ascontiguousarray(valid)),
        "affine": torch.from_numpy(normalisation.affine(tile.statistics)),
        "noise": torch.from_numpy(mask_noise(rng, patches)),
        "key": tile.key,
    }


def to_inputs(
    batch: Sample, *, limit: float, in_chans: int, device: torch.device | str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Moves a batch of samples to a device and scales it there.

    Args:
        batch: Samples joined by the data loader.
        limit: `Normalisation.limit`.
        in_chans: 1, or 3 equal channels.
        device: Where the model is.

    Returns:
        Images (B, C, H, W) float32, validity (B, H, W) bool and noise (B, N) float32.
    """
    stored, valid, affine, noise = (
        batch[name].to(device, non_blocking=True) for name in ("stored", "valid", "affine", "noise")
    )
    return normalise_batch(stored, valid, affine, limit).expand(-1, in_chans, -1, -1), valid, noise


class TrainTiles(Dataset[Sample]):
    """Training tiles, addressed by (epoch, tile); the epoch chooses symmetry and mask.

    Args:
        sources: The corpora.
        patches: Number of patches of the model.
        augment: Draw one of the eight symmetries.
        seed: Seed of the run.
        cache_mb: When all decoded tiles fit into this memory they are kept after their first reading.
    """

    def __init__(self, sources: Sources, *, patches: int, augment: bool, seed: int, cache_mb: int = 0) -> None:
        self.sources, self.patches, self.augment, self.seed = sources, patches, augment, seed
        self._dtype = sources.dtype
        # The pixels and, at worst, the validity of each.
        tile_bytes = (np.dtype(self._dtype).itemsize + 1) * sources.corpora[0].manifest.tile_size ** 2
        self._cache: dict[int, StoredTile] | None = {} if len(self) * tile_bytes <= cache_mb << 20 else None

    def __len__(self) -> int:
        return int(self.sources.bounds[-1])

    def __getitem__(self, place: tuple[int, int]) -> Sample:
        epoch, index = place
        number = int(np.searchsorted(self.sources.bounds, index, side="right")) - 1
        tile = self._tile(number, index)
        rng = augmentation_rng(tile.key, self.seed, epoch)
        return to_sample(
            tile,
            self.sources.normalisations[number],
            rng,
            patches=self.patches,
            dtype=self._dtype,
            augment=self.augment,
        )

    def _tile(self, number: int, index: int) -> StoredTile:
        if self._cache is not None and index in self._cache:
            return self._cache[index]
        tile = self.sources.corpora[number].read_stored("train", index - int(self.sources.bounds[number]))
        if self._cache is not None:
            self._cache[index] = tile
        return tile


_ArrayT = TypeVar("_ArrayT", bound=np.ndarray[Any, Any])


def _turned(array_HW: _ArrayT, turns: int, mirror: bool) -> _ArrayT:
    return cast(_ArrayT, np.rot90(array_HW[:, ::-1] if mirror else array_HW, turns))


def validation_subset(corpus: Corpus, limit: int, seed: int) -> npt.NDArray[np.int64]:
    """Returns the positions of the validation tiles used, ascending; depends on the corpus and the seed alone."""
    count = corpus.count("val")
    if count <= limit:
        return np.arange(count)
    rng = sample_rng(corpus.manifest.fingerprint, seed, "validation subset")
    return np.sort(rng.choice(count, size=limit, replace=False))


class ValidationTiles(Dataset[Sample]):
    """A fixed subset of one corpus's validation tiles with masks drawn from their keys."""

    def __init__(self, corpus: Corpus, normalisation: Normalisation, *, patches: int, limit: int, seed: int) -> None:
        self.corpus, self.normalisation = corpus, normalisation
        self.patches, self.seed = patches, seed
        self.positions: Sequence[int] = validation_subset(corpus, limit, seed).tolist()

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, number: int) -> Sample:
        tile = self.corpus.read_stored("val", self.positions[number])
        rng = sample_rng(tile.key, self.seed, "validation mask")
        dtype = self.corpus.manifest.dtype
        return to_sample(tile, self.normalisation, rng, patches=self.patches, dtype=dtype, augment=False)
