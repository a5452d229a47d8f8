"""Floating-point operations of a masked autoencoder, counted from its shapes, and the share of a device's peak in use.

A product of an (m, k) with a (k, n) matrix counts 2mnk: one multiplication and one addition for each of its terms.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass

from ..config import one_of
from ..models import Architecture

PRECISIONS = ("bf16", "fp16", "fp32")
_MLP_RATIO = 4

# Dense TFLOP/s (no structured sparsity, fp32 accumulation) of bf16 and fp16 tensor cores, and of fp32 without TF32, as
# commonly published; they were not compared with the vendors' data sheets, which print twice the dense figure where
# they say "with sparsity". `telemetry.peak_tflops` overrides them.
# Patterns are looked for in this order, so that variants come before the plain name.
_PEAKS: tuple[tuple[str, float | None, float, float | None], ...] = (
    # device name, bf16, fp16, fp32
    (r"B200", 2250.0, 2250.0, None),
    (r"GH200", 989.0, 989.0, 67.0),
    (r"H200 NVL", 835.0, 835.0, 60.0),
    (r"H200", 989.0, 989.0, 67.0),
    (r"H100 NVL", 835.0, 835.0, 60.0),
    (r"H100 PCIe", 756.0, 756.0, 51.0),
    (r"H100", 989.0, 989.0, 67.0),
    (r"A100", 312.0, 312.0, 19.5),
    (r"A30", 165.0, 165.0, 10.3),
    (r"A40", 149.7, 149.7, 37.4),
    (r"A10", 125.0, 125.0, 31.2),
    (r"RTX A6000", 154.8, 154.8, 38.7),
    (r"L40S", 362.0, 362.0, 91.6),
    (r"L40", 181.0, 181.0, 90.5),
    (r"L4", 121.0, 121.0, 30.3),
    (r"RTX 6000 Ada", 364.2, 364.2, 91.1),
    (r"RTX 4090$", 165.2, 165.2, 82.6),
    (r"RTX 3090$", 71.0, 71.0, 35.6),
    (r"V100-PCIE", None, 112.0, 14.0),
    (r"V100", None, 125.0, 15.7),
    (r"T4", None, 65.0, 8.1),
    (r"MI300X", 1307.4, 1307.4, 163.4),
)


@dataclass(frozen=True)
class Flops:
    """Operations of one training sample; see `flops_per_sample`.

    Attributes:
        encoder: Forward pass of the encoder, patch embedding included.
        decoder: Forward pass of the decoder, its embedding and its prediction head included.
    """

    encoder: int
    decoder: int

    @property
    def forward(self) -> int:
        """One forward pass."""
        return self.encoder + self.decoder

    @property
    def backward(self) -> int:
        """One backward pass: for each product one for the gradient of either factor, hence twice the forward pass."""
        return 2 * self.forward

    @property
    def total(self) -> int:
        """Forward and backward pass of one training sample."""
        return self.forward + self.backward

    def to_dict(self) -> dict[str, int]:
        """Returns all five counts as plain values."""
        return {**asdict(self), "forward": self.forward, "backward": self.backward, "total": self.total}


def shown_patches(architecture: Architecture, mask_ratio: float) -> int:
    """Returns K, the patches the encoder sees; the same rounding as in `MaskedAutoencoder`."""
    return max(1, round(architecture.patches * (1 - mask_ratio)))


def flops_per_sample(
    architecture: Architecture, mask_ratio: float, *, embed_hidden: bool = False, predict_shown: bool = False
) -> Flops:
    """Counts the matrix products of one training sample.

    With N patches, K of them shown and M = N - K hidden, P pixels (times channels) a patch, encoder width D and depth
    L on E = K + 1 tokens, decoder width d and depth l on T = N + 1 tokens, one pass forward takes

        encoder   2 K P D  +  L B(E, E, D)
        decoder   2 E D d  +  (l - 1) B(T, T, d)  +  B(T, M, d)  +  2 M d P
        block     B(t, r, w) = 2 t w 3w  +  2 * 2 r t w  +  2 r w w  +  2 * 2 r w 4w

    that is patch embedding of the shown patches; in each block query, key and value, the two products of attention
    (QK^T and AV), output projection and the two products of the MLP (ratio 4); then the same for the decoder between
    its embedding and its prediction head. The last block and the head work on the hidden patches alone. The backward
    pass is counted as twice the forward one.

    Left out: everything elementwise (LayerNorm, GELU, softmax, biases, positions, optimizer) and the loss (with
    `loss.lpips` that has a network of its own). Counted although not computed: the gradient of the image, 2 K P D, far
    below one per cent. Not counted although computed: what activation checkpointing and fused attention compute again
    in the backward pass. So these are model FLOPs, those of the MFU.

    Sources: Kaplan et al. 2020 (arXiv 2001.08361, table 1: 2mnk, backward twice forward), Chowdhery et al. 2022 (PaLM,
    arXiv 2204.02311, appendix B: recomputation is not credited).

    Args:
        architecture: Shapes.
        mask_ratio: Share of patches hidden, in (0, 1).
        embed_hidden: The model embeds all N patches before it drops the hidden ones (other implementations do).
        predict_shown: The last block and the head work on all T tokens (other implementations do).

    Returns:
        Counts of one sample.
    """
    widths, patches = architecture.widths, architecture.patches
    pixels = architecture.patch_size**2 * architecture.in_chans
    shown = shown_patches(architecture, mask_ratio)
    embedded = patches if embed_hidden else shown
    predicted = patches + 1 if predict_shown else patches - shown
    encoder = 2 * embedded * pixels * widths.dim + widths.depth * _block(shown + 1, shown + 1, widths.dim)
    decoder = (
        2 * (shown + 1) * widths.dim * widths.decoder_dim
        + (widths.decoder_depth - 1) * _block(patches + 1, patches + 1, widths.decoder_dim)
        + _block(patches + 1, predicted, widths.decoder_dim)
        + 2 * predicted * widths.decoder_dim * pixels
    )
    return Flops(encoder, decoder)


def _block(tokens: int, results: int, width: int) -> int:
    """A block on so many tokens of which so many are wanted as results."""
    values = 2 * tokens * 3 * width * width
    attention = 2 * 2 * results * tokens * width
    return values + attention + 2 * results * (1 + 2 * _MLP_RATIO) * width * width


def peak_tflops(device_name: str, precision: str) -> float | None:
    """Returns the dense peak of a device for matrix products.

    Args:
        device_name: As `torch.cuda.get_device_name` gives it.
        precision: `bf16`, `fp16` or `fp32` (without TF32, PyTorch's default).

    Returns:
        TFLOP/s of one device; None for a device that is not in the table (a CPU, a slice of a GPU made by MIG), which
        is then a case for `telemetry.peak_tflops`: a guess would make the MFU a guess.

    Raises:
        ConfigError: The precision is none of these.
    """
    one_of("train.precision", precision, PRECISIONS)
    if re.search(r"\bMIG\b", device_name):
        return None
    for pattern, *peaks in _PEAKS:
        if re.search(rf"(?<![A-Za-z0-9]){pattern}(?![A-Za-z0-9])", device_name, re.IGNORECASE):
            return peaks[PRECISIONS.index(precision)]
    return None


def mfu(images_per_s: float, flops_per_sample: float, devices: int, peak: float | None) -> float | None:
    """Returns the model FLOPs utilisation (PaLM, arXiv 2204.02311, appendix B).

        MFU = images/s * FLOPs per sample / (devices * peak)

    Args:
        images_per_s: Over all devices.
        flops_per_sample: `Flops.total`.
        devices: Number of devices.
        peak: Of one device, in TFLOP/s; None when unknown.

    Returns:
        A share, usually in (0, 1); None when the peak is unknown.
    """
    return None if peak is None else images_per_s * flops_per_sample / (devices * peak * 1e12)
