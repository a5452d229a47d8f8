"""Masked autoencoder on timm's vision transformer (He et al. 2022, arXiv 2111.06377).

Axes: B batch, C channels, H W pixels, N patches, K kept patches, P pixels of a patch times channels, D width.
Encoder tensors have timm's names, so they load into `timm.create_model("vit_..._patch16_224", num_classes=0)`.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import torch
from timm.layers import build_sincos2d_pos_embed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from ..errors import ConfigError
from ..weights import Card, load_card, load_weights
from .architecture import Architecture

ENCODER_PREFIXES = ("cls_token", "pos_embed", "patch_embed.", "blocks.", "norm.")


class MaskedAutoencoder(VisionTransformer):
    """A vision transformer that learns to paint the patches it was not shown.

    The loss is the mean squared error over the valid pixels of the hidden patches; invalid pixels are neither scored
    nor, when a whole patch is invalid, shown (as long as a quarter of the patches has a valid pixel).

    Args:
        architecture: Shapes.
        mask_ratio: Share of patches hidden, in (0, 1); the paper and MOMO use 0.75.
        norm_pix_loss: Score each patch after standardising its valid pixels (paper, section 4.1).
    """

    def __init__(self, architecture: Architecture, *, mask_ratio: float = 0.75, norm_pix_loss: bool = False) -> None:
        widths = architecture.widths
        norm_layer = partial(nn.LayerNorm, eps=architecture.layer_norm_eps)
        super().__init__(
            img_size=architecture.image_size,
            patch_size=architecture.patch_size,
            in_chans=architecture.in_chans,
            num_classes=0,
            embed_dim=widths.dim,
            depth=widths.depth,
            num_heads=widths.heads,
            norm_layer=norm_layer,
        )
        if not 0 < mask_ratio < 1:
            raise ConfigError("mask_ratio is out of range", seen=mask_ratio, rule="above 0 and below 1")
        self.architecture = architecture
        self.mask_ratio = mask_ratio
        self.norm_pix_loss = norm_pix_loss
        self.kept = max(1, round(architecture.patches * (1 - mask_ratio)))
        side = architecture.image_size // architecture.patch_size
        self.decoder_embed = nn.Linear(widths.dim, widths.decoder_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, widths.decoder_dim))
        self.decoder_blocks = nn.ModuleList(
            Block(widths.decoder_dim, widths.decoder_heads, qkv_bias=True, norm_layer=norm_layer)  # type: ignore[arg-type]
            for _ in range(widths.decoder_depth)
        )
        self.decoder_norm = norm_layer(widths.decoder_dim)
        self.decoder_pred = nn.Linear(widths.decoder_dim, architecture.patch_size**2 * architecture.in_chans)
        # Fixed sine-cosine positions, as in MOMO; they stay in the state dict and out of the optimizer.
        self.cls_token: nn.Parameter
        self.pos_embed: nn.Parameter = nn.Parameter(_positions(side, widths.dim), requires_grad=False)
        self.decoder_pos_embed = nn.Parameter(_positions(side, widths.decoder_dim), requires_grad=False)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        weight = self.patch_embed.proj.weight
        nn.init.xavier_uniform_(weight.data.view(weight.shape[0], -1))
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(  # type: ignore[override]
        self, image_BCHW: torch.Tensor, valid_BHW: torch.Tensor, noise_BN: torch.Tensor
    ) -> torch.Tensor:
        """Computes the reconstruction loss of each sample.

        Args:
            image_BCHW: Normalised images; invalid pixels hold 0.
            valid_BHW: True where the pixel was measured.
            noise_BN: In [0, 1); the K smallest entries of a row are the patches shown.

        Returns:
            Shape (B,), float32: mean squared error over the scored pixels of each sample; 0 where none is scored.
        """
        prediction_BNP, hidden_BN = self.predict(image_BCHW, valid_BHW, noise_BN)
        target_BNP = self.patchify(image_BCHW).float()
        scored_BNP = self.patchify(valid_BHW[:, None].expand_as(image_BCHW)).float()
        if self.norm_pix_loss:
            target_BNP = _standardise(target_BNP, scored_BNP)
        scored_BNP = scored_BNP * hidden_BN[..., None]
        error_BNP = (prediction_BNP.float() - target_BNP).square() * scored_BNP
        return error_BNP.sum(dim=(1, 2)) / scored_BNP.sum(dim=(1, 2)).clamp(min=1)

    def predict(
        self, image_BCHW: torch.Tensor, valid_BHW: torch.Tensor, noise_BN: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Encodes the shown patches and predicts every patch.

        Returns:
            Predictions of shape (B, N, P), and a float mask of shape (B, N) that is 1 where the patch was hidden.
        """
        patch_valid_BN = self.patchify(valid_BHW[:, None].float()).amax(dim=2)
        # Noise lies in [0, 1), so adding 1 sorts wholly invalid patches behind all others.
        order_BN = torch.argsort(noise_BN + (1 - patch_valid_BN), dim=1, stable=True)
        kept_BK = order_BN[:, : self.kept]
        hidden_BN = torch.ones_like(noise_BN).scatter(1, kept_BK, 0.0)
        encoded = self._encode(image_BCHW, kept_BK)
        return self._decode(encoded, order_BN), hidden_BN

    def _encode(self, image_BCHW: torch.Tensor, kept_BK: torch.Tensor) -> torch.Tensor:
        tokens_BND = self.patch_embed(image_BCHW) + self.pos_embed[:, 1:]
        tokens_BKD = tokens_BND.gather(1, kept_BK[..., None].expand(-1, -1, tokens_BND.shape[-1]))
        cls_B1D = (self.cls_token + self.pos_embed[:, :1]).expand(len(tokens_BKD), -1, -1)
        return self.norm(self.blocks(torch.cat([cls_B1D.to(tokens_BKD.dtype), tokens_BKD], dim=1)))

    def _decode(self, encoded: torch.Tensor, order_BN: torch.Tensor) -> torch.Tensor:
        tokens = self.decoder_embed(encoded)
        batch, patches = order_BN.shape
        hidden = self.mask_token.to(tokens.dtype).expand(batch, patches - self.kept, -1)
        shuffled_BND = torch.cat([tokens[:, 1:], hidden], dim=1)
        back_BN = torch.argsort(order_BN, dim=1)
        tokens_BND = shuffled_BND.gather(1, back_BN[..., None].expand(-1, -1, tokens.shape[-1]))
        tokens = torch.cat([tokens[:, :1], tokens_BND], dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            tokens = block(tokens)
        return self.decoder_pred(self.decoder_norm(tokens))[:, 1:]

    @torch.no_grad()
    def reconstruct(
        self, image_BCHW: torch.Tensor, valid_BHW: torch.Tensor, noise_BN: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Paints the hidden patches into the image.

        Returns:
            The image with hidden patches predicted and shown patches kept, (B, C, H, W), and the hidden pixels,
            bool (B, H, W). With `norm_pix_loss` a predicted patch takes the mean and spread of the true one,
            which is the only way to show it.
        """
        prediction_BNP, hidden_BN = self.predict(image_BCHW, valid_BHW, noise_BN)
        target_BNP = self.patchify(image_BCHW)
        if self.norm_pix_loss:
            valid_BNP = self.patchify(valid_BHW[:, None].expand_as(image_BCHW)).float()
            mean, std = _moments(target_BNP.float(), valid_BNP)
            prediction_BNP = prediction_BNP * std + mean
        painted_BNP = torch.where(hidden_BN[..., None] > 0, prediction_BNP.to(target_BNP.dtype), target_BNP)
        hidden_BNP = (hidden_BN[..., None] > 0).expand_as(target_BNP)
        return self.unpatchify(painted_BNP), self.unpatchify(hidden_BNP)[:, 0]

    def patchify(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        """Cuts (B, C, H, W) into patches (B, N, P) with P = patch_size^2 * C, pixel by pixel then channel."""
        p = self.architecture.patch_size
        batch, chans, height, width = image_BCHW.shape
        cut = image_BCHW.reshape(batch, chans, height // p, p, width // p, p)
        return cut.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, p * p * chans)

    def unpatchify(self, patches_BNP: torch.Tensor) -> torch.Tensor:
        """Joins patches (B, N, P) into (B, C, H, W); the inverse of `patchify`."""
        p, side = self.architecture.patch_size, math.isqrt(patches_BNP.shape[1])
        cut = patches_BNP.reshape(len(patches_BNP), side, side, p, p, -1)
        return cut.permute(0, 5, 1, 3, 2, 4).reshape(len(patches_BNP), -1, side * p, side * p)


def _moments(values_BNP: torch.Tensor, valid_BNP: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    count = valid_BNP.sum(dim=2, keepdim=True).clamp(min=1)
    mean = (values_BNP * valid_BNP).sum(dim=2, keepdim=True) / count
    variance = ((values_BNP - mean).square() * valid_BNP).sum(dim=2, keepdim=True) / count
    return mean, (variance + 1e-6).sqrt()


def _standardise(values_BNP: torch.Tensor, valid_BNP: torch.Tensor) -> torch.Tensor:
    mean, std = _moments(values_BNP, valid_BNP)
    return (values_BNP - mean) / std


def _positions(side: int, dim: int) -> torch.Tensor:
    grid = build_sincos2d_pos_embed([side, side], dim=dim, interleave_sin_cos=False, dtype=torch.float32)
    return torch.cat([torch.zeros(1, dim), grid])[None]


def build_mae(
    architecture: Architecture, *, seed: int, mask_ratio: float = 0.75, norm_pix_loss: bool = False
) -> MaskedAutoencoder:
    """Makes a masked autoencoder with weights that depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MaskedAutoencoder(architecture, mask_ratio=mask_ratio, norm_pix_loss=norm_pix_loss)


def load_mae(
    path: Path, *, mask_ratio: float | None = None, norm_pix_loss: bool | None = None, check_hash: bool = True
) -> tuple[MaskedAutoencoder, Card]:
    """Loads a whole masked autoencoder, encoder and decoder.

    Args:
        path: Weights folder or file.
        mask_ratio: See `MaskedAutoencoder`; None takes the one the card names.
        norm_pix_loss: See `MaskedAutoencoder`; None takes the one the card names.
        check_hash: Compare the file's hash with the card's.

    Raises:
        CheckpointError: A tensor is missing (an encoder-only file, for example) or has another shape.
    """
    card = load_card(path)
    objective = {"mask_ratio": 0.75, "norm_pix_loss": False} | card.objective
    given = {"mask_ratio": mask_ratio, "norm_pix_loss": norm_pix_loss}
    objective |= {key: value for key, value in given.items() if value is not None}
    model = build_mae(Architecture.from_dict(card.architecture), seed=0, **objective)
    tensors, card = load_weights(path, expected=model.state_dict(), check_hash=check_hash)
    model.load_state_dict(tensors)
    return model, card
