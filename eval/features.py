"""Frozen features: encoders under test, and what they say about the images of a dataset.

Axes: B batch, C channels, H W pixels, h w patch grid, N images, D feature width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from timm.models.vision_transformer import VisionTransformer
from torch.nn import functional

from momo.errors import EvalError
from momo.models import Architecture, load_encoder, random_encoder
from momo.normalise import Normalisation
from momo.weights import Card, load_card, weights_paths

from .config import ModelConfig
from .datasets import LabelledDataset, Sample
from .images import read_image, read_mask, resize_image, resize_mask, to_channels


@dataclass
class Model:
    """An encoder under test.

    Attributes:
        name: Name in the results.
        card: Card of the weights, or for random init of the weights it is like.
        weights: Weights file, or None for random init.
    """

    name: str
    card: Card
    weights: Path | None

    @property
    def architecture(self) -> Architecture:
        """Shapes of the encoder."""
        return Architecture.from_dict(self.card.architecture)

    def load(self, seed: int, device: torch.device) -> VisionTransformer:
        """Returns the encoder in eval mode; for random init a new one for each seed."""
        if self.weights is None:
            return random_encoder(self.architecture, seed=seed).to(device)
        encoder, _ = load_encoder(self.weights)
        return encoder.to(device)


def open_models(configs: Sequence[ModelConfig]) -> list[Model]:
    """Reads the card of every model, hashing the weights.

    Raises:
        CheckpointError: Weights are missing, damaged or altered.
        EvalError: A random model has no weights to be like.
    """
    fallback = next((config.weights for config in configs if config.weights is not None), None)
    models = []
    for config in configs:
        like = config.weights or config.like or fallback
        if like is None:
            raise EvalError(
                "a random model has nothing to be like",
                seen=config.name,
                rule="architecture and normalisation come from a card",
                fix="set like to a weights folder",
            )
        card = load_card(Path(like), check_hash=config.weights is not None)
        models.append(Model(config.name, card, weights_paths(Path(like))[0] if config.weights else None))
    return models


# ---- images to network input


@dataclass(frozen=True)
class Preparation:
    """How an image of a dataset becomes network input.

    Attributes:
        normalisation: Policy with its constants.
        constants_from: Where mean and std come from: `each image` or `training split of the dataset`.
        in_chans: Channels of the network.
        image_size: Side to resize to, or None.
        bands: Bands to read, or None.
    """

    normalisation: Normalisation
    constants_from: str
    in_chans: int
    image_size: int | None
    bands: list[int] | None

    def __call__(self, sample: Sample) -> npt.NDArray[np.float32]:
        """Reads one image and returns (C, H, W), normalised channel by channel; invalid pixels are 0."""
        value_CHW, valid_HW = self.read(sample)
        return np.stack([self.normalisation(value_HW, valid_HW) for value_HW in value_CHW])

    def read(self, sample: Sample) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
        """Reads one image in its stored unit, fitted to the network's channels and to `image_size`."""
        value_CHW, valid_HW = read_image(sample.image, bands=self.bands)
        value_CHW = to_channels(value_CHW, self.in_chans)
        return resize_image(value_CHW, valid_HW, self.image_size) if self.image_size else (value_CHW, valid_HW)

    def mask(self, sample: Sample) -> npt.NDArray[np.uint8]:
        """Reads the mask of a segmentation sample, resized like its image."""
        assert sample.mask is not None
        mask_HW = read_mask(sample.mask)
        return resize_mask(mask_HW, self.image_size) if self.image_size else mask_HW

    def to_dict(self) -> dict[str, Any]:
        """Returns the normalisation as it stands in a result."""
        return {**self.normalisation.to_dict(), "constants_from": self.constants_from}


def prepare(card: Card, dataset: LabelledDataset, image_size: int | None) -> Preparation:
    """Chooses the preparation a model was pretrained with.

    A card with `sensor_zscore` holds constants in the unit of its own corpus (radiance, kelvin), which mean nothing for
    the grey values of a benchmark; mean and deviation of the dataset's training images take their place.
    """
    fields = dict(card.normalisation)
    in_chans = Architecture.from_dict(card.architecture).in_chans
    per_image = Preparation(Normalisation(), "each image", in_chans, image_size, dataset.bands)
    if fields.get("policy") != "sensor_zscore":
        return dataclasses.replace(per_image, normalisation=Normalisation.from_dict(fields))
    count, total, square = 0, 0.0, 0.0
    for sample in dataset.splits["train"]:
        value_CHW, valid_HW = per_image.read(sample)
        values = value_CHW[:, valid_HW].astype(np.float64)
        count, total, square = count + values.size, total + values.sum(), square + np.square(values).sum()
    mean = total / max(count, 1)
    fields |= {"mean": mean, "std": float(np.sqrt(max(square / max(count, 1) - mean**2, 0.0)))}
    return dataclasses.replace(
        per_image, normalisation=Normalisation.from_dict(fields), constants_from="training split of the dataset"
    )


def same_size_batches(
    samples: Sequence[Sample], prepared: Preparation, batch_size: int
) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Yields (positions, images of shape (B, C, H, W)) in order, a batch ending where the image size changes."""
    positions: list[int] = []
    images: list[npt.NDArray[np.float32]] = []
    for position, sample in enumerate(samples):
        image = prepared(sample)
        if images and (len(images) == batch_size or image.shape != images[0].shape):
            yield positions, torch.from_numpy(np.stack(images))
            positions, images = [], []
        positions.append(position)
        images.append(image)
    if images:
        yield positions, torch.from_numpy(np.stack(images))


# ---- network input to features


def device_of(encoder: VisionTransformer) -> torch.device:
    """Returns where an encoder's weights are."""
    return next(encoder.parameters()).device


@torch.no_grad()
def pooled_features(
    encoder: VisionTransformer, samples: Sequence[Sample], prepared: Preparation, *, pooling: str, batch_size: int
) -> npt.NDArray[np.float32]:
    """Encodes each image into one vector.

    Args:
        encoder: In eval mode.
        samples: Images, of any size.
        prepared: See `Preparation`.
        pooling: `mean` of the patch tokens or `cls`, both after the final LayerNorm.
        batch_size: Images a forward pass.

    Returns:
        float32 of shape (N, D).
    """
    device = device_of(encoder)
    rows = []
    for _, image_BCHW in same_size_batches(samples, prepared, batch_size):
        tokens_BND = encoder.forward_features(image_BCHW.to(device))
        prefix = encoder.num_prefix_tokens
        pooled_BD = tokens_BND[:, 0] if pooling == "cls" else tokens_BND[:, prefix:].mean(dim=1)
        rows.append(pooled_BD.float().cpu().numpy())
    return np.concatenate(rows)


def depth_indices(encoder: VisionTransformer, depths: int) -> list[int]:
    """Returns `depths` evenly spaced block indices, the last block among them (all blocks when there are fewer)."""
    blocks = len(encoder.blocks)
    depths = min(depths, blocks)
    return [round((step + 1) * blocks / depths) - 1 for step in range(depths)]


def patch_tokens(encoder: VisionTransformer, image_BCHW: torch.Tensor, depths: int) -> torch.Tensor:
    """Encodes images into patch tokens of several depths.

    Each token of each depth is scaled to mean 0 and deviation 1 (LayerNorm without parameters), so that depths of
    different magnitude weigh alike.

    Args:
        encoder: The vision transformer.
        image_BCHW: Normalised images; sides that are no multiples of the patch are padded by the encoder.
        depths: How many blocks are read.

    Returns:
        Shape (B, h, w, depths * D) with h = ceil(H / patch).
    """
    indices = depth_indices(encoder, depths)
    maps = encoder.forward_intermediates(image_BCHW, indices=indices, intermediates_only=True, output_fmt="NLC")
    grid = encoder.patch_embed.dynamic_feat_size((image_BCHW.shape[-2], image_BCHW.shape[-1]))
    normed = [
        functional.layer_norm(tokens_BND, tokens_BND.shape[-1:]) for tokens_BND in cast("list[torch.Tensor]", maps)
    ]
    return torch.cat(normed, dim=2).unflatten(1, grid)
