"""Segmentation: a small convolutional decoder on an encoder's patch tokens.

Axes: B batch, H W pixels, h w patch grid, D channels of the tokens, C classes, N images.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn import functional

from momo.models import sample_rng

from .config import DecoderConfig
from .datasets import Sample
from .features import Preparation, device_of, patch_tokens, same_size_batches
from .metrics import HEADLINE, Counts, confusion_counts, score

Masks = list[npt.NDArray[np.uint8]]


class TokenDecoder(nn.Module):
    """Turns patch tokens into class scores for every pixel.

    A 3x3 convolution looks around on the patch grid, a linear layer writes the pixels of each patch (pixel shuffle),
    and a 3x3 convolution at full size joins the patches. Nearly all arithmetic stays on the coarse grid.

    Args:
        channels: Channels D of the tokens.
        patch_size: Side of a patch in pixels.
        classes: Number of classes C.
        width: Channels on the patch grid.
    """

    def __init__(self, channels: int, patch_size: int, classes: int, width: int) -> None:
        super().__init__()
        fine = max(4, classes)
        self.project = nn.Sequential(nn.Linear(channels, width), nn.LayerNorm(width), nn.GELU())
        self.context = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.GELU())
        self.paint = nn.Linear(width, fine * patch_size**2)
        self.classify = nn.Sequential(nn.PixelShuffle(patch_size), nn.GELU(), nn.Conv2d(fine, classes, 3, padding=1))

    def forward(self, token_BhwD: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """Decodes tokens.

        Args:
            token_BhwD: Patch tokens.
            size: Height and width of the image; what the encoder padded at right and bottom is cut off.

        Returns:
            Logits of shape (B, C, H, W).
        """
        grid_BWhw = self.project(token_BhwD).permute(0, 3, 1, 2)
        grid_BWhw = grid_BWhw + self.context(grid_BWhw)
        pixels = self.paint(grid_BWhw.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.classify(pixels)[..., : size[0], : size[1]]


def segmentation_loss(logits_BCHW: torch.Tensor, mask_BHW: torch.Tensor) -> torch.Tensor:
    """Cross-entropy plus soft Dice loss (1 - Dice, mean over the foreground classes, over all pixels of the batch)."""
    probability_BCHW = logits_BCHW.softmax(dim=1)
    truth_BCHW = functional.one_hot(mask_BHW, logits_BCHW.shape[1]).permute(0, 3, 1, 2).float()
    hit_C = (probability_BCHW * truth_BCHW).sum(dim=(0, 2, 3))
    size_C = probability_BCHW.sum(dim=(0, 2, 3)) + truth_BCHW.sum(dim=(0, 2, 3))
    dice_C = (2 * hit_C + 1) / (size_C + 1)
    return functional.cross_entropy(logits_BCHW, mask_BHW) + (1 - dice_C[1:]).mean()


class TokenSource:
    """Patch tokens of the images of one split, kept in memory when they fit, else encoded anew.

    Args:
        encoder: In eval mode.
        samples: Images of the split.
        prepared: See `Preparation`.
        depths: Encoder blocks read.
        batch_size: Images a forward pass while the cache is filled.
        cache: Keep the tokens; needed tokens are float32.
    """

    def __init__(
        self,
        encoder: VisionTransformer,
        samples: Sequence[Sample],
        prepared: Preparation,
        *,
        depths: int,
        batch_size: int,
        cache: bool,
    ) -> None:
        self.encoder, self.samples, self.prepared, self.depths = encoder, samples, prepared, depths
        self.masks: Masks = [prepared.mask(sample) for sample in samples]
        self.device = device_of(encoder)
        self._tokens: list[torch.Tensor] | None = None
        if cache:
            with torch.no_grad():
                batches = same_size_batches(samples, prepared, batch_size)
                tokens = (patch_tokens(encoder, image_BCHW.to(self.device), depths) for _, image_BCHW in batches)
                self._tokens = [token for token_BhwD in tokens for token in token_BhwD.cpu()]

    def tokens(self, indices: Sequence[int], encoder: VisionTransformer | None = None) -> torch.Tensor:
        """Returns the tokens of images of one size, (B, h, w, D).

        Args:
            indices: Positions in `samples`.
            encoder: Encode with this one (being trained) instead of the frozen one.
        """
        if encoder is None and self._tokens is not None:
            return torch.stack([self._tokens[index] for index in indices]).to(self.device)
        images = np.stack([self.prepared(self.samples[index]) for index in indices])
        image_BCHW = torch.from_numpy(images).to(self.device)
        if encoder is not None:
            return patch_tokens(encoder, image_BCHW, self.depths)
        with torch.no_grad():
            return patch_tokens(self.encoder, image_BCHW, self.depths)

    def batches(self, order: Sequence[int], batch_size: int) -> Iterator[list[int]]:
        """Yields lists of at most `batch_size` positions in the given order, images of one size together."""
        waiting: dict[tuple[int, ...], list[int]] = {}
        for index in order:
            same = waiting.setdefault(self.masks[index].shape, [])
            same.append(index)
            if len(same) == batch_size:
                yield waiting.pop(self.masks[index].shape)
        yield from waiting.values()


def token_gib(images: int, size: tuple[int, int], encoder: VisionTransformer, depths: int) -> float:
    """Returns the memory that cached tokens of so many images of a size take, in GiB."""
    patch = encoder.patch_embed.patch_size[0]
    grid = math.ceil(size[0] / patch) * math.ceil(size[1] / patch)
    return images * grid * encoder.embed_dim * min(depths, len(encoder.blocks)) * 4 / 2**30


@dataclass
class DecoderOutcome:
    """What a decoder run did.

    Attributes:
        masks: Predicted mask of each test image, at the size it was scored.
        counts_NCC: Confusion counts of each test image.
        hyper_parameters: The values that were tested.
        grid: Every learning rate with its best `val_score` and the step it was reached at.
    """

    masks: Masks
    counts_NCC: Counts
    hyper_parameters: dict[str, Any]
    grid: list[dict[str, Any]]


def run_decoder(
    sources: dict[str, TokenSource], train: Sequence[int], config: DecoderConfig, *, classes: int, seed: int
) -> DecoderOutcome:
    """Trains a decoder for each learning rate and tests the weights that were best on validation.

    Initialisation and batch order depend on the seed alone, so every model meets the same ones. Equal validation
    scores go to the earlier look and the smaller learning rate. The test split is looked at once.

    Args:
        sources: Tokens and masks by split.
        train: Positions in the training split the run may learn from.
        config: Steps, learning rates and widths.
        classes: Number of classes.
        seed: Seed of the run.
    """
    grid: list[dict[str, Any]] = []
    best: tuple[float, nn.Module, VisionTransformer | None] | None = None
    for rate in sorted(config.lr_grid):
        val, step, decoder, encoder = _fit(sources, train, config, rate, classes, seed)
        grid.append({"lr": rate, "val_score": val, "step": step})
        if best is None or val > best[0]:
            best = (val, decoder, encoder)
    assert best is not None
    chosen = max(grid, key=lambda entry: (entry["val_score"], -entry["lr"]))
    masks = _predict(best[1], sources["test"], config.batch_size, best[2])
    hyper_parameters = {
        "lr": chosen["lr"],
        "step": chosen["step"],
        "at_grid_edge": len(grid) > 2 and chosen in (grid[0], grid[-1]),
        "steps": config.steps,
        "batch_size": config.batch_size,
        "weight_decay": config.weight_decay,
        "encoder": "frozen" if config.freeze_encoder else "trained",
        "loss": "cross-entropy + soft Dice",
    }
    counts = np.stack([confusion_counts(a, b, classes) for a, b in zip(sources["test"].masks, masks, strict=True)])
    return DecoderOutcome(masks, counts, hyper_parameters, grid)


def _fit(
    sources: dict[str, TokenSource], train: Sequence[int], config: DecoderConfig, rate: float, classes: int, seed: int
) -> tuple[float, int, nn.Module, VisionTransformer | None]:
    """Trains at one learning rate; returns best validation score, its step, and decoder and encoder of that step."""
    source = sources["train"]
    decoder, encoder = _new_decoder(source, config, classes, seed)
    groups: list[dict[str, Any]] = [{"params": list(decoder.parameters()), "lr": rate}]
    if encoder is not None:
        groups.append({"params": list(encoder.parameters()), "lr": rate * config.encoder_lr_scale})
    optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _warm_cosine(step, config.steps))
    looks = {round(config.steps * (look + 1) / config.validations) for look in range(config.validations)} | {
        config.steps
    }
    best_score, best_step = -1.0, 0
    best_state: list[dict[str, torch.Tensor]] = []
    parts: list[nn.Module] = [decoder] if encoder is None else [decoder, encoder]
    for step, indices in enumerate(_endless_batches(source, train, config.batch_size, seed), start=1):
        for part in parts:
            part.train()
        mask_BHW = torch.from_numpy(np.stack([source.masks[index] for index in indices])).long().to(source.device)
        logits_BCHW = decoder(source.tokens(indices, encoder), mask_BHW.shape[1:])
        loss = segmentation_loss(logits_BCHW, mask_BHW)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], 1.0)
        optimizer.step()
        schedule.step()
        if step in looks:
            value = _val_score(decoder, sources["val"], config.batch_size, classes, encoder)
            if value > best_score:
                best_score, best_step = value, step
                best_state = [copy.deepcopy(part.state_dict()) for part in parts]
        if step == config.steps:
            break
    for part, state in zip(parts, best_state, strict=True):
        part.load_state_dict(state)
    return best_score, best_step, decoder, encoder


def _new_decoder(
    source: TokenSource, config: DecoderConfig, classes: int, seed: int
) -> tuple[TokenDecoder, VisionTransformer | None]:
    encoder = source.encoder
    channels = encoder.embed_dim * min(source.depths, len(encoder.blocks))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        decoder = TokenDecoder(channels, encoder.patch_embed.patch_size[0], classes, config.width).to(source.device)
    return decoder, None if config.freeze_encoder else copy.deepcopy(encoder)


def _warm_cosine(step: int, steps: int) -> float:
    warm = max(1, steps // 20)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _endless_batches(source: TokenSource, train: Sequence[int], batch_size: int, seed: int) -> Iterator[list[int]]:
    epoch = 0
    while True:
        order = sample_rng(str(epoch), seed, "decoder batches").permutation(np.asarray(train))
        yield from source.batches([int(index) for index in order], batch_size)
        epoch += 1


@torch.no_grad()
def _predict(decoder: nn.Module, source: TokenSource, batch_size: int, encoder: VisionTransformer | None) -> Masks:
    for part in (decoder, encoder):
        if part is not None:
            part.eval()
    masks: dict[int, npt.NDArray[np.uint8]] = {}
    for indices in source.batches(range(len(source.samples)), batch_size):
        logits_BCHW = decoder(source.tokens(indices, encoder), source.masks[indices[0]].shape)
        predicted = logits_BCHW.argmax(dim=1).to(torch.uint8).cpu().numpy()
        masks.update(zip(indices, predicted, strict=True))
    return [masks[index] for index in range(len(source.samples))]


def _val_score(
    decoder: nn.Module, source: TokenSource, batch_size: int, classes: int, encoder: VisionTransformer | None
) -> float:
    predicted = _predict(decoder, source, batch_size, encoder)
    counts = np.stack([confusion_counts(a, b, classes) for a, b in zip(source.masks, predicted, strict=True)])
    value = float(score(HEADLINE["segmentation"], counts)[0])
    return value if np.isfinite(value) else 0.0
