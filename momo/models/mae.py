"""Masked autoencoder on timm's vision transformer (He et al. 2022, arXiv 2111.06377).

Axes: B batch, C channels, H W pixels, N patches, K shown and M hidden patches (N = K + M), P pixels of a patch times
channels, D width. Encoder tensors have timm's names, so they load into
`timm.create_model("vit_..._patch16_224", num_classes=0)`.

Tokens are kept in the order class token, shown patches, hidden patches: attention does not care, and what only the
hidden ones need is a slice.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.layers import build_sincos2d_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from ..config import one_of
from ..errors import ConfigError
from ..weights import Card, load_card, load_weights
from .architecture import Architecture
from .blocks import ATTENTIONS, Attention, Block, run_blocks
from .objective import PixelObjective
from .patches import PatchProjection, moments, patchify, take_patches, unpatchify

ENCODER_PREFIXES = ("cls_token", "pos_embed", "patch_embed.", "blocks.", "norm.")
Objective = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class MaskedAutoencoder(VisionTransformer):
    """A vision transformer that learns to paint the patches it was not shown.

    Only shown patches are embedded and only hidden ones are predicted for the loss. Images and losses are float32
    whatever the dtype of the weights (bfloat16 and float16 included). Invalid pixels are neither scored nor, when a
    whole patch is invalid, shown (as long as a quarter of the patches has a valid pixel).

    Args:
        architecture: Shapes.
        mask_ratio: Share of patches hidden, in (0, 1); the paper and MOMO use 0.75.
        norm_pix_loss: Score each patch after standardising its valid pixels (paper, section 4.1).
        objective: Gives the loss of each sample, shape (B,), from the predicted patches (B, M, P), their numbers
            (B, M), the images (B, C, H, W) and the validity (B, H, W); `PixelObjective` when None. It is no part of
            the state dict.
        attention: How attention is computed: `auto`, `sdpa` or `plain` (see `blocks.attention_kernel`).
        activation_checkpointing: Compute each block again in the backward pass, for less memory.
    """

    objective: Objective

    def __init__(
        self,
        architecture: Architecture,
        *,
        mask_ratio: float = 0.75,
        norm_pix_loss: bool = False,
        objective: Objective | None = None,
        attention: str = "auto",
        activation_checkpointing: bool = False,
    ) -> None:
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
            block_fn=Block,
        )
        if not 0 < mask_ratio < 1:
            raise ConfigError("mask_ratio is out of range", seen=mask_ratio, rule="above 0 and below 1")
        self.architecture = architecture
        self.mask_ratio = mask_ratio
        self.norm_pix_loss = norm_pix_loss
        self.activation_checkpointing = activation_checkpointing
        # Past nn.Module's own bookkeeping: an objective may be a module with weights that are not the model's.
        object.__setattr__(self, "objective", objective or PixelObjective(architecture.patch_size, norm_pix_loss))
        self.patch_embed.proj = PatchProjection(self.patch_embed.proj)
        self.kept = max(1, round(architecture.patches * (1 - mask_ratio)))
        side = architecture.image_size // architecture.patch_size
        self.decoder_embed = nn.Linear(widths.dim, widths.decoder_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, widths.decoder_dim))
        self.decoder_blocks = nn.ModuleList(
            Block(widths.decoder_dim, widths.decoder_heads, qkv_bias=True, norm_layer=norm_layer)
            for _ in range(widths.decoder_depth)
        )
        self.decoder_norm = norm_layer(widths.decoder_dim)
        self.decoder_pred = nn.Linear(widths.decoder_dim, architecture.patch_size**2 * architecture.in_chans)
        # Fixed sine-cosine positions, as in MOMO; they stay in the state dict and out of the optimizer.
        self.cls_token: nn.Parameter
        self.pos_embed: nn.Parameter = nn.Parameter(_positions(side, widths.dim), requires_grad=False)
        self.decoder_pos_embed = nn.Parameter(_positions(side, widths.decoder_dim), requires_grad=False)
        self._initialise()
        self.set_attention(attention)

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

    def set_attention(self, attention: str) -> None:
        """Chooses how attention is computed from now on: `auto`, `sdpa` or `plain`."""
        one_of("model.attention", attention, ATTENTIONS)
        for module in self.modules():
            if isinstance(module, Attention):
                module.kernel = attention

    def forward(  # type: ignore[override]
        self, image_BCHW: torch.Tensor, valid_BHW: torch.Tensor, noise_BN: torch.Tensor
    ) -> torch.Tensor:
        """Computes the loss of each sample.

        Args:
            image_BCHW: Normalised images, float32; invalid pixels hold 0.
            valid_BHW: True where the pixel was measured.
            noise_BN: In [0, 1); the K smallest entries of a row are the patches shown.

        Returns:
            Shape (B,), float32: what the objective makes of the hidden patches (mean squared error over their valid
            pixels when none was given); 0 where no pixel is scored.
        """
        prediction_BMP, hidden_BM = self.predict_hidden(image_BCHW, valid_BHW, noise_BN)
        return self.objective(prediction_BMP, hidden_BM, image_BCHW, valid_BHW)

    def predict_hidden(
        self, image_BCHW: torch.Tensor, valid_BHW: torch.Tensor, noise_BN: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Encodes the shown patches and predicts the hidden ones.

        Returns:
            Predictions of shape (B, M, P) in the dtype of the weights (or of autocast), and the int64 numbers of
            these patches, (B, M), in no particular order.
        """
        order_BN = self._order(valid_BHW, noise_BN)
        prediction_BMP = self._decode(self._encode(image_BCHW, order_BN), order_BN, last=order_BN.shape[1] - self.kept)
        return prediction_BMP, order_BN[:, self.kept :]

    def predict(
        self, image_BCHW: torch.Tensor, valid_BHW: torch.Tensor, noise_BN: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Encodes the shown patches and predicts every patch.

        Returns:
            Predictions of shape (B, N, P), and a float mask of shape (B, N) that is 1 where the patch was hidden.
        """
        order_BN = self._order(valid_BHW, noise_BN)
        ordered_BNP = self._decode(self._encode(image_BCHW, order_BN), order_BN, last=None)[:, 1:]
        hidden_BN = torch.ones_like(noise_BN).scatter(1, order_BN[:, : self.kept], 0.0)
        return take_patches(ordered_BNP, torch.argsort(order_BN, dim=1)), hidden_BN

    def _order(self, valid_BHW: torch.Tensor, noise_BN: torch.Tensor) -> torch.Tensor:
        patch_valid_BN = self.patchify(valid_BHW[:, None].float()).amax(dim=2)
        # Noise lies in [0, 1), so adding 1 sorts wholly invalid patches behind all others.
        return torch.argsort(noise_BN + (1 - patch_valid_BN), dim=1, stable=True)

    def _encode(self, image_BCHW: torch.Tensor, order_BN: torch.Tensor) -> torch.Tensor:
        shown_BK = order_BN[:, : self.kept]
        dtype = self.patch_embed.proj.weight.dtype
        pixels_BKP = take_patches(self.patchify(image_BCHW), shown_BK).to(dtype)
        tokens_BKD = self.patch_embed.proj(pixels_BKP) + self.pos_embed[0, 1:][shown_BK]
        cls_B1D = (self.cls_token + self.pos_embed[:, :1]).expand(len(tokens_BKD), -1, -1)
        tokens_BND = torch.cat([cls_B1D.to(tokens_BKD.dtype), tokens_BKD], dim=1)
        return self.norm(run_blocks(self.blocks, tokens_BND, again=self.activation_checkpointing))

    def _decode(self, encoded_BND: torch.Tensor, order_BN: torch.Tensor, *, last: int | None) -> torch.Tensor:
        tokens_BND = self.decoder_embed(encoded_BND)
        batch, patches = order_BN.shape
        hidden_BMD = self.mask_token.to(tokens_BND.dtype).expand(batch, patches - self.kept, -1)
        position_BND = self.decoder_pos_embed[0][nn.functional.pad(order_BN + 1, (1, 0))]
        tokens_BND = torch.cat([tokens_BND, hidden_BMD], dim=1) + position_BND
        tokens_BND = run_blocks(self.decoder_blocks, tokens_BND, last=last, again=self.activation_checkpointing)
        return self.decoder_pred(self.decoder_norm(tokens_BND))

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
            mean, std = moments(target_BNP.float(), valid_BNP)
            prediction_BNP = prediction_BNP * std + mean
        painted_BNP = torch.where(hidden_BN[..., None] > 0, prediction_BNP.to(target_BNP.dtype), target_BNP)
        hidden_BNP = (hidden_BN[..., None] > 0).expand_as(target_BNP)
        return self.unpatchify(painted_BNP), self.unpatchify(hidden_BNP)[:, 0]

    def patchify(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        """Cuts (B, C, H, W) into patches (B, N, P) with P = patch_size^2 * C, pixel by pixel then channel."""
        return patchify(image_BCHW, self.architecture.patch_size)

    def unpatchify(self, patches_BNP: torch.Tensor) -> torch.Tensor:
        """Joins patches (B, N, P) into (B, C, H, W); the inverse of `patchify`."""
        return unpatchify(patches_BNP, self.architecture.patch_size)


def compile_blocks(model: MaskedAutoencoder, *, backend: str = "inductor") -> None:
    """Compiles each block in place by `torch.compile`; names in the state dict stay as they are.

    Blocks of one kind share their code. The first step of each input shape and dtype takes longer, and on a CPU needs
    a C++ compiler.

    Args:
        model: The model.
        backend: One of `torch._dynamo.list_backends()`.
    """
    for block in [*model.blocks, *model.decoder_blocks]:
        block.compile(backend=backend, dynamic=False)


def _positions(side: int, dim: int) -> torch.Tensor:
    grid = build_sincos2d_pos_embed([side, side], dim=dim, interleave_sin_cos=False, dtype=torch.float32)
    return torch.cat([torch.zeros(1, dim), grid])[None]


def build_mae(architecture: Architecture, *, seed: int, **options: Any) -> MaskedAutoencoder:
    """Makes a masked autoencoder with weights that depend on the seed alone.

    Args:
        architecture: Shapes.
        seed: Seed of the weights.
        **options: Of `MaskedAutoencoder`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MaskedAutoencoder(architecture, **options)


def load_mae(
    path: Path,
    *,
    mask_ratio: float | None = None,
    norm_pix_loss: bool | None = None,
    check_hash: bool = True,
    **options: Any,
) -> tuple[MaskedAutoencoder, Card]:
    """Loads a whole masked autoencoder, encoder and decoder.

    Args:
        path: Weights folder or file.
        mask_ratio: See `MaskedAutoencoder`; None takes the one the card names.
        norm_pix_loss: See `MaskedAutoencoder`; None takes the one the card names.
        check_hash: Compare the file's hash with the card's.
        **options: The other ones of `MaskedAutoencoder`.

    Raises:
        CheckpointError: A tensor is missing (an encoder-only file, for example) or has another shape.
    """
    card = load_card(path)
    objective = {
        "mask_ratio": card.objective.get("mask_ratio", 0.75),
        "norm_pix_loss": card.objective.get("norm_pix_loss", False),
    }
    given = {"mask_ratio": mask_ratio, "norm_pix_loss": norm_pix_loss}
    objective |= {key: value for key, value in given.items() if value is not None}
    model = build_mae(Architecture.from_dict(card.architecture), seed=0, **objective, **options)
    tensors, card = load_weights(path, expected=model.state_dict(), check_hash=check_hash)
    model.load_state_dict(tensors)
    return model, card
