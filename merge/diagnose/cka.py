"""Centred kernel alignment: how alike the features of two encoders are.

Linear CKA (Kornblith et al. 2019, arXiv 1905.00414, equation 4 with a linear kernel) compares features X (n, d1) and
Y (n, d2) of the same n tiles by their Gram matrices K = X X^T and L = Y Y^T:

    CKA = HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L))

It does not change when a feature space is turned, mirrored or scaled as a whole. HSIC(K, L) = tr(K H L H) / (n - 1)^2,
with H the centring matrix, is biased: with few tiles and wide features CKA is too high even between unrelated
features. The estimator HSIC_1 of Song et al. (2012, JMLR 13, 1393-1434, equation 5), which Nguyen et al. (2020, arXiv
2010.15327) use, has no such bias; the CKA made of it is near 0 for unrelated features and may fall below 0.

Axes: n tiles, d width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from timm.models.vision_transformer import VisionTransformer

from momo.errors import MergeError
from momo.models.architecture import Architecture
from momo.models.encoder import build_encoder
from momo.pretrain.exact import exact_float32, map_exactly
from momo.pretrain.validation_tiles import TileBatch, ValidationTiles

Array = npt.NDArray[np.float64]
LEAST_TILES = 4


def linear_cka(gram_nn: Array, other_nn: Array) -> float | None:
    """Computes linear CKA with the biased HSIC.

    Args:
        gram_nn: Gram matrix K = X X^T of features (n, d1), not centred.
        other_nn: The same of other features of the same tiles.

    Returns:
        0 to 1, or None when the features of all tiles are equal.
    """
    first, second = _centred(gram_nn), _centred(other_nn)
    return _ratio(float((first * second).sum()), float((first * first).sum()), float((second * second).sum()))


def debiased_cka(gram_nn: Array, other_nn: Array) -> float | None:
    """Computes linear CKA with the unbiased estimator HSIC_1.

    Args:
        gram_nn: See `linear_cka`; four tiles or more.
        other_nn: See `linear_cka`.

    Returns:
        At most 1, about 0 for unrelated features; None where it is not defined.

    Raises:
        MergeError: There are fewer than four tiles.
    """
    if len(gram_nn) < LEAST_TILES:
        raise MergeError(
            "too few tiles for CKA",
            seen=len(gram_nn),
            rule=f"{LEAST_TILES} or more",
            fix="give a corpus with more val tiles",
        )
    first, second = (matrix - np.diag(np.diag(matrix)) for matrix in (gram_nn, other_nn))
    return _ratio(_hsic_1(first, second), _hsic_1(first, first), _hsic_1(second, second))


def _centred(gram_nn: Array) -> Array:
    rows = gram_nn.mean(axis=0)
    centred: Array = gram_nn - rows[None, :] - rows[:, None] + rows.mean()
    return centred


def _hsic_1(first: Array, second: Array) -> float:
    """HSIC_1 of Gram matrices whose diagonals are 0."""
    count = len(first)
    trace = float((first * second).sum())  # the matrices are symmetric
    corner = float(first.sum() * second.sum()) / ((count - 1) * (count - 2))
    cross = float((first.sum(axis=0) * second.sum(axis=0)).sum()) * 2 / (count - 2)
    return (trace + corner - cross) / (count * (count - 3))


def _ratio(joint: float, first: float, second: float) -> float | None:
    # What is left of equal features is rounding noise; its ratio says nothing.
    if first <= 0 or second <= 0:
        return None
    return joint / math.sqrt(first * second)


# --- features of encoders -------------------------------------------------------------------------------------------


def encoder_of(architecture: Architecture, state: Mapping[str, torch.Tensor]) -> VisionTransformer:
    """Builds an encoder with the weights of a state; a decoder in it is left out.

    Raises:
        MergeError: A tensor of the encoder is missing or has another shape.
    """
    encoder = build_encoder(architecture)
    own = encoder.state_dict()
    bad = [name for name, tensor in own.items() if name not in state or state[name].shape != tensor.shape]
    if bad:
        raise MergeError(
            "the weights do not fit the encoder",
            seen=", ".join(bad[:8]) + (f" and {len(bad) - 8} more" if len(bad) > 8 else ""),
            rule="every tensor of the encoder is there with its shape",
        )
    encoder.load_state_dict({name: state[name].float() for name in own})
    return encoder.eval()


def block_grams(
    encoder: VisionTransformer, tiles: ValidationTiles, *, in_chans: int, batch_size: int = 64
) -> dict[str, Array]:
    """Computes the Gram matrices of an encoder's features, block by block.

    The encoder sees every patch; the features of a tile are the mean over its patches, without the class token.

    Args:
        encoder: In float32 on the CPU or a GPU.
        tiles: Fixed tiles.
        in_chans: 1 or 3, of the encoder.
        batch_size: Tiles a forward pass.

    Returns:
        float64 of shape (n, n) by `blocks.0`, ..., and `norm` for the encoder's output.
    """
    device = next(encoder.parameters()).device
    spans = [range(first, min(first + batch_size, len(tiles))) for first in range(0, len(tiles), batch_size)]

    def compute(batch: TileBatch) -> list[torch.Tensor]:
        image_BCHW, _, _ = batch.to_inputs(limit=tiles.normalisation.limit, in_chans=in_chans, device=device)
        outcome: Any = encoder.forward_intermediates(image_BCHW, norm=False, output_fmt="NLC")
        last_BND, found = outcome
        pooled = [tokens_BND.mean(dim=1) for tokens_BND in found]
        pooled.append(last_BND[:, encoder.num_prefix_tokens :].mean(dim=1))
        return [features_BD.cpu() for features_BD in pooled]

    parts: list[list[torch.Tensor]] = []
    with exact_float32(device.type):
        parts.extend(map_exactly(compute, tiles.batches(spans), device.type))
    names = [*(f"blocks.{number}" for number in range(len(encoder.blocks))), "norm"]
    return {name: gram(torch.cat([part[i] for part in parts])) for i, name in enumerate(names)}


def gram(features_nD: torch.Tensor) -> Array:
    """Returns X X^T in float64 of features after their mean is taken off, which keeps digits and changes no CKA."""
    features: Array = features_nD.double().numpy()
    features = features - features.mean(axis=0)
    product: Array = features @ features.T
    return product


def compare(grams: Mapping[str, Mapping[str, Array]]) -> dict[str, dict[str, dict[str, dict[str, float | None]]]]:
    """Compares every two encoders at every depth.

    Args:
        grams: By model and block, see `block_grams`.

    Returns:
        `linear` and `debiased`, each by block, model and model.
    """
    blocks = list(next(iter(grams.values())))
    return {
        kind: {
            block: {one: {two: measure(grams[one][block], grams[two][block]) for two in grams} for one in grams}
            for block in blocks
        }
        for kind, measure in (("linear", linear_cka), ("debiased", debiased_cka))
    }
