"""The training loss of the masked autoencoder.

Axes: B batch, C channels, H W pixels, N patches, M hidden patches, P pixels of a patch times channels.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Protocol

import torch

from ..errors import ConfigError
from .lpips import PerceptualDistance, load_lpips
from .patches import moments, patchify, standardise, take_patches, unpatchify

TERMS = ("mse", "ssim", "lpips", "gradient")
WINDOW, SIGMA = 11, 1.5
C1, C2 = 0.01**2, 0.03**2


class LossWeights(Protocol):
    """What `make_objective` needs to know; see `momo.pretrain.config.LossOptions`."""

    mse: float
    ssim: float
    lpips: float
    gradient: float
    lpips_backbone: str | None


class PixelObjective:
    """Mean squared error over the valid pixels of the hidden patches (He et al. 2022, arXiv 2111.06377).

    Args:
        patch_size: Side of a patch in pixels.
        norm_pix_loss: Score each patch after standardising its valid pixels (paper, section 4.1).

    Attributes:
        terms: After a call the terms of the loss of each sample, detached, shape (B,).
    """

    def __init__(self, patch_size: int, norm_pix_loss: bool) -> None:
        self.patch_size, self.norm_pix_loss = patch_size, norm_pix_loss
        self.terms: dict[str, torch.Tensor] = {}

    def __call__(
        self,
        prediction_BMP: torch.Tensor,
        hidden_BM: torch.Tensor,
        image_BCHW: torch.Tensor,
        valid_BHW: torch.Tensor,
    ) -> torch.Tensor:
        """Computes the loss of each sample.

        Args:
            prediction_BMP: Predicted patches, any floating type.
            hidden_BM: int64 numbers of these patches, in any order.
            image_BCHW: float32 images; invalid pixels hold 0.
            valid_BHW: True where the pixel was measured.

        Returns:
            Shape (B,), float32; 0 where no pixel is scored.
        """
        target_BNP = patchify(image_BCHW, self.patch_size).float()
        scored_BNP = patchify(valid_BHW[:, None].expand_as(image_BCHW), self.patch_size).float()
        if self.norm_pix_loss:
            target_BNP = standardise(target_BNP, scored_BNP)
        loss_B = masked_square_error(prediction_BMP, hidden_BM, target_BNP, scored_BNP)
        self.terms = {"mse": loss_B.detach()}
        return loss_B

    def describe(self) -> dict[str, Any]:
        """Returns all that changes the loss, as plain values."""
        return {"loss": {"mse": 1.0}, "norm_pix_loss": self.norm_pix_loss}


def masked_square_error(
    prediction_BMP: torch.Tensor, hidden_BM: torch.Tensor, target_BNP: torch.Tensor, valid_BNP: torch.Tensor
) -> torch.Tensor:
    """Averages the squared error over the valid pixels of the hidden patches.

    The sum runs over all patches in their order, so its rounding does not depend on the order of `hidden_BM`.

    Returns:
        Shape (B,), float32; 0 where no pixel is scored.
    """
    prediction_BNP = spread_patches(prediction_BMP.float(), hidden_BM, target_BNP.shape[1])
    hidden_BN = torch.zeros_like(valid_BNP[..., 0]).scatter(1, hidden_BM, 1.0)
    scored_BNP = valid_BNP * hidden_BN[..., None]
    error_BNP = (prediction_BNP - target_BNP).square() * scored_BNP
    return error_BNP.sum(dim=(1, 2)) / scored_BNP.sum(dim=(1, 2)).clamp(min=1)


def spread_patches(patches_BMP: torch.Tensor, numbers_BM: torch.Tensor, patches: int) -> torch.Tensor:
    """Puts patches at their places among all N patches; the others are 0."""
    places_BMP = numbers_BM[..., None].expand_as(patches_BMP)
    return patches_BMP.new_zeros(len(patches_BMP), patches, patches_BMP.shape[2]).scatter(1, places_BMP, patches_BMP)


class CombinedObjective:
    """MOMO's combined loss (arXiv 2604.02719): MSE + SSIM + LPIPS + gradient, each with a weight, per sample.

    The squared error is `PixelObjective`'s. The other terms compare whole images in which shown patches and invalid
    pixels are 0 on both sides, the hidden patches being the predicted and the true ones. With `norm_pix_loss`
    predictions first take the mean and spread of the true patch. Network input within +-limit is scaled to a range of
    exactly 1, so that the constants of SSIM hold; LPIPS gets -1..1. Predictions beyond the limit are not cut.

    Args:
        patch_size: Side of a patch in pixels.
        norm_pix_loss: See `PixelObjective`.
        weights: Weight of each of `mse`, `ssim`, `lpips` and `gradient`; a term not named weighs 0.
        limit: Network input lies within +-limit (`Normalisation.limit`).
        lpips: Distance of images in -1..1; needed when its weight is above 0.

    Attributes:
        terms: After a call each term of each sample before its weight, detached, shape (B,): `mse` always, `ssim`
            (1 - SSIM), `lpips` and `gradient` where they weigh something.
    """

    def __init__(
        self,
        patch_size: int,
        norm_pix_loss: bool,
        weights: Mapping[str, float],
        limit: float,
        lpips: PerceptualDistance | None = None,
    ) -> None:
        unknown = sorted(set(weights) - set(TERMS))
        if unknown:
            raise ConfigError("a term of the loss is not known", seen=unknown, rule=f"one of {', '.join(TERMS)}")
        if not limit > 0:
            raise ConfigError("the limit of the network's input is out of range", seen=limit, rule="above 0")
        self.weights = {name: float(weights.get(name, 0.0)) for name in TERMS}
        if self.weights["lpips"] and lpips is None:
            raise ConfigError("LPIPS has a weight and no network", seen=weights["lpips"], fix="pass load_lpips(...)")
        self.patch_size, self.norm_pix_loss, self.limit, self.lpips = patch_size, norm_pix_loss, limit, lpips
        self.terms: dict[str, torch.Tensor] = {}

    def __call__(
        self,
        prediction_BMP: torch.Tensor,
        hidden_BM: torch.Tensor,
        image_BCHW: torch.Tensor,
        valid_BHW: torch.Tensor,
    ) -> torch.Tensor:
        """Computes the weighted loss of each sample; see `PixelObjective.__call__`.

        Raises:
            ConfigError: The images are too small for SSIM or LPIPS.
        """
        prediction_BMP, image_BCHW = prediction_BMP.float(), image_BCHW.float()
        target_BNP = patchify(image_BCHW, self.patch_size)
        valid_BNP = patchify(valid_BHW[:, None].expand_as(image_BCHW), self.patch_size).float()
        scored_BNP = standardise(target_BNP, valid_BNP) if self.norm_pix_loss else target_BNP
        terms = {"mse": masked_square_error(prediction_BMP, hidden_BM, scored_BNP, valid_BNP)}
        if any(weight for name, weight in self.weights.items() if name != "mse"):
            if self.norm_pix_loss:
                mean, std = (take_patches(numbers, hidden_BM) for numbers in moments(target_BNP, valid_BNP))
                prediction_BMP = prediction_BMP * std + mean
            terms |= self._image_terms(prediction_BMP, hidden_BM, image_BCHW, valid_BHW)
        self.terms = {name: term_B.detach() for name, term_B in terms.items()}
        return torch.stack([self.weights[name] * term_B for name, term_B in terms.items()]).sum(dim=0)

    def _image_terms(
        self, prediction_BMP: torch.Tensor, hidden_BM: torch.Tensor, image_BCHW: torch.Tensor, valid_BHW: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        patches = image_BCHW.shape[-2] * image_BCHW.shape[-1] // self.patch_size**2
        prediction_BCHW = unpatchify(spread_patches(prediction_BMP, hidden_BM, patches), self.patch_size)
        ones_BMP = torch.ones(*hidden_BM.shape, self.patch_size**2, device=image_BCHW.device)
        hidden_B1HW = unpatchify(spread_patches(ones_BMP, hidden_BM, patches), self.patch_size)
        valid_B1HW = valid_BHW[:, None].float()
        scored_B1HW = hidden_B1HW * valid_B1HW / (2 * self.limit)
        ours, true = prediction_BCHW * scored_B1HW, image_BCHW * scored_B1HW
        terms = {}
        if self.weights["ssim"]:
            terms["ssim"] = structural_dissimilarity(ours, true, hidden_B1HW, valid_B1HW)
        if self.weights["lpips"] and self.lpips is not None:
            terms["lpips"] = self.lpips(2 * ours, 2 * true)
        if self.weights["gradient"]:
            terms["gradient"] = gradient_error(ours - true, hidden_B1HW, valid_B1HW)
        return terms

    def describe(self) -> dict[str, Any]:
        """Returns all that changes the loss, as plain values."""
        return {
            "loss": {name: weight for name, weight in self.weights.items() if weight},
            "norm_pix_loss": self.norm_pix_loss,
            "limit": self.limit,
            "lpips_sha256": self.lpips.sha256 if self.weights["lpips"] and self.lpips is not None else None,
        }


Objective = PixelObjective | CombinedObjective


def structural_dissimilarity(
    image_BCHW: torch.Tensor, target_BCHW: torch.Tensor, hidden_B1HW: torch.Tensor, valid_B1HW: torch.Tensor
) -> torch.Tensor:
    """Computes 1 - SSIM (Wang et al. 2004, doi:10.1109/TIP.2003.819861).

    Windows of 11 x 11 pixels weighted by a Gaussian of deviation 1.5, K1 = 0.01, K2 = 0.03, data range 1. Scored are
    windows of valid pixels alone, at least one of them hidden: all others would only dilute the mean.

    Args:
        image_BCHW: float32 in about -0.5..0.5, the range with its middle at 0.
        target_BCHW: The same.
        hidden_B1HW: 1 where the pixel was hidden, else 0.
        valid_B1HW: 1 where the pixel was measured, else 0.

    Returns:
        Shape (B,): mean over the scored windows; 0 where there is none.

    Raises:
        ConfigError: The image is smaller than a window.
    """
    if min(image_BCHW.shape[-2:]) < WINDOW:
        raise ConfigError(
            "the images are too small for SSIM",
            seen=f"{image_BCHW.shape[-2]} x {image_BCHW.shape[-1]} pixels",
            rule=f"at least {WINDOW}, the side of its window",
            fix="set loss.ssim=0 or use larger tiles",
        )
    with torch.no_grad():
        invalid, hidden = _window_mean(torch.stack([1 - valid_B1HW, hidden_B1HW]))
        scored = ((invalid == 0) & (hidden > 0)).float().expand_as(image_BCHW[..., WINDOW - 1 :, WINDOW - 1 :])
        mean_y, square_y = _window_mean(torch.stack([target_BCHW, target_BCHW.square()]))
    products = torch.stack([image_BCHW, image_BCHW.square(), image_BCHW * target_BCHW])
    mean_x, square_x, product = _window_mean(products)
    # Variances do not change with the level, so they are taken about 0 where float32 is finest; the means are not.
    structure = (2 * (product - mean_x * mean_y) + C2) / (
        (square_x - mean_x.square()) + (square_y - mean_y.square()) + C2
    )
    mean_x, mean_y = mean_x + 0.5, mean_y + 0.5
    luminance = (2 * mean_x * mean_y + C1) / (mean_x.square() + mean_y.square() + C1)
    return _mean(1 - luminance * structure, scored)


def gradient_error(error_BCHW: torch.Tensor, hidden_B1HW: torch.Tensor, valid_B1HW: torch.Tensor) -> torch.Tensor:
    """Averages the absolute error of horizontal and of vertical differences and adds the two.

    Args:
        error_BCHW: Prediction minus truth where a pixel is hidden and valid, 0 elsewhere.
        hidden_B1HW: 1 where the pixel was hidden, else 0.
        valid_B1HW: 1 where the pixel was measured, else 0.

    Returns:
        Shape (B,): over pairs of neighbours that are both valid and of which at least one is hidden; 0 without any.
    """
    total_B = error_BCHW.new_zeros(len(error_BCHW))
    for axis in (2, 3):
        size = error_BCHW.shape[axis]
        valid = valid_B1HW.narrow(axis, 1, size - 1) * valid_B1HW.narrow(axis, 0, size - 1)
        hidden = torch.maximum(hidden_B1HW.narrow(axis, 1, size - 1), hidden_B1HW.narrow(axis, 0, size - 1))
        differences = error_BCHW.diff(dim=axis).abs()
        total_B = total_B + _mean(differences, (valid * hidden).expand_as(differences))
    return total_B


def _mean(values_BCHW: torch.Tensor, scored_BCHW: torch.Tensor) -> torch.Tensor:
    return (values_BCHW * scored_BCHW).sum(dim=(1, 2, 3)) / scored_BCHW.sum(dim=(1, 2, 3)).clamp(min=1)


def _window_mean(images: torch.Tensor) -> torch.Tensor:
    # Two products with a band matrix: faster than convolutions of one channel, and not rounded to TF32 by cuDNN.
    rows, cols = (_gaussian_band(size, images.device) for size in images.shape[-2:])
    return rows @ (images @ cols.T)


@functools.lru_cache(maxsize=8)
def _gaussian_band(size: int, device: torch.device) -> torch.Tensor:
    """Row i holds the weights of the window that starts at pixel i; shape (size - 10, size)."""
    weights = torch.exp(-((torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2) ** 2) / (2 * SIGMA**2))
    band = torch.zeros(size - WINDOW + 1, size, dtype=torch.float64)
    for start in range(len(band)):
        band[start, start : start + WINDOW] = weights / weights.sum()
    return band.float().to(device)


def make_objective(
    loss: LossWeights, *, patch_size: int, norm_pix_loss: bool, limit: float, device: torch.device | str
) -> Objective:
    """Makes the loss that the options ask for.

    Args:
        loss: Weights of the terms and the backbone of LPIPS, which is loaded if LPIPS weighs something.
        patch_size: Side of a patch in pixels.
        norm_pix_loss: See `PixelObjective`.
        limit: See `CombinedObjective`.
        device: Where the model is.

    Raises:
        ConfigError: LPIPS is asked for and its package or backbone cannot be had.
    """
    weights = {name: float(getattr(loss, name)) for name in TERMS}
    if weights == {"mse": 1.0, "ssim": 0.0, "lpips": 0.0, "gradient": 0.0}:
        return PixelObjective(patch_size, norm_pix_loss)
    lpips = load_lpips(loss.lpips_backbone, device=device) if weights["lpips"] else None
    return CombinedObjective(patch_size, norm_pix_loss, weights, limit, lpips)
