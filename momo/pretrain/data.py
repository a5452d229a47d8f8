"""The corpora of a run, and batches of their tiles as network input.

Tiles travel as they are stored, 8 or 16 bit, with the three numbers that scale them; scaling is left to the device.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..corpus import Corpus
from ..errors import ConfigError, DataError
from ..files import sha256_json
from ..normalise import Normalisation, normalise_batch
from ..pipes import ShardBuffer
from .augment import apply_views
from .config import PretrainConfig
from .plan import Supply


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

    @property
    def notes(self) -> list[str]:
        """Lines about how the corpora are read that the user should see."""
        return [line for corpus in self.corpora for line in corpus.notes]

    def supplies(self) -> list[Supply]:
        """Returns what `momo.pretrain.plan.check_arithmetic` compares."""
        found = []
        for corpus in self.corpora:
            train = [shard for shard in corpus.manifest.shards if shard.split == "train"]
            supply = Supply(
                name=corpus.sensor,
                tiles=[shard.samples for shard in train],
                nbytes=[shard.bytes for shard in train],
                other_nbytes=[shard.bytes for shard in corpus.manifest.shards if shard.split != "train"],
                streamed=corpus.store.streamed,
            )
            found.append(supply)
        return found

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
        verify: Compare every shard's SHA-256, where shards are local.

    Raises:
        DataError: A corpus is missing, altered, or has an empty split.
        ConfigError: Tile sizes differ, or two corpora are of one sensor.
    """
    # One buffer for all, so that data.buffer_mb bounds the reading process and not each corpus.
    buffer = ShardBuffer(config.data.buffer_mb)
    corpora = [Corpus(path, verify=verify, pipe=config.data.pipe, buffer=buffer) for path in config.data.corpora]
    for corpus in corpora:
        for split in ("train", "val"):
            if corpus.count(split) == 0:
                raise DataError(
                    f"the corpus has no {split} tile",
                    seen=corpus.location,
                    rule="both splits are needed: validation chooses checkpoints",
                    fix="run momo prep with another val_fraction, smaller blocks or more products",
                )
    sizes = {corpus.location: corpus.manifest.tile_size for corpus in corpora}
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
                seen=f"{corpus.location} joins products of different units",
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
            seen=f"{corpus.location}: {len(without)} products without, for example {', '.join(sorted(without)[:3])}",
            rule="products.parquet has percentile_low and percentile_high",
            fix="choose data.normalisation=per_tile_zscore, or run momo prep again",
        )


Batch = dict[str, Any]


def to_inputs(
    batch: Batch, *, limit: float, in_chans: int, device: torch.device | str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Moves a micro-batch to a device, scales it there and takes its views.

    Args:
        batch: From `momo.pretrain.loader.make_loader`.
        limit: `Normalisation.limit`.
        in_chans: 1, or 3 equal channels.
        device: Where the model is.

    Returns:
        Images (B, C, H, W) float32, validity (B, H, W) bool and noise (B, N) float32.
    """
    stored, affine, noise = (batch[name].to(device, non_blocking=True) for name in ("stored", "affine", "noise"))
    valid = batch["valid"]
    if valid is not None:
        valid = valid.to(device, non_blocking=True)
    image = normalise_batch(stored, valid, affine, limit)
    image, valid = apply_views(image, valid, batch["views"])
    if valid is None:
        valid = torch.ones(stored.shape, dtype=torch.bool, device=device)
    return image.expand(-1, in_chans, -1, -1), valid, noise
