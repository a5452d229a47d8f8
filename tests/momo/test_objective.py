"""The loss against plain formulas, one sample and one pixel at a time."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from momo.errors import ConfigError
from momo.models.lpips import load_lpips
from momo.models.objective import (
    CombinedObjective,
    PixelObjective,
    gradient_error,
    make_objective,
    structural_dissimilarity,
)
from momo.models.patches import patchify, unpatchify
from momo.pretrain.config import LossOptions
from tests.momo.objective_helper import LIMIT, PATCH, SIZE, random_alexnet

Case = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def case(*, batch: int = 4, chans: int = 1, size: int = SIZE, seed: int = 0, hidden: int = 11) -> Case:
    """Prediction, hidden patches, image, validity; sample 1 has an invalid corner, sample 2 nothing to score."""
    generator = torch.Generator().manual_seed(seed)
    valid = torch.ones(batch, size, size, dtype=torch.bool)
    valid[1, : size // 2, : size // 4 + 1] = False
    valid[2] = False
    image = torch.randn(batch, 1, size, size, generator=generator).clamp(-LIMIT, LIMIT)
    image = image.masked_fill(~valid[:, None], 0.0).expand(-1, chans, -1, -1)
    patches = (size // PATCH) ** 2
    order = torch.stack([torch.randperm(patches, generator=generator) for _ in range(batch)])
    prediction = torch.randn(batch, hidden, PATCH * PATCH * chans, generator=generator)
    return prediction, order[:, :hidden], image, valid


def masks(hidden_BM: torch.Tensor, valid_BHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    patches = (valid_BHW.shape[-1] // PATCH) ** 2
    hidden_BN = torch.zeros(len(hidden_BM), patches).scatter(1, hidden_BM, 1.0)
    return unpatchify(hidden_BN[..., None].expand(-1, -1, PATCH**2), PATCH), valid_BHW[:, None].float()


def old_loss(case_: Case, norm_pix_loss: bool) -> torch.Tensor:
    """The loss as the model computed it from the predictions of all patches."""
    prediction_BMP, hidden_BM, image, valid = case_
    target = patchify(image, PATCH)
    scored = patchify(valid[:, None].expand_as(image), PATCH).float()
    # What was predicted for shown patches counts for nothing.
    prediction = torch.full_like(target, 7.0).scatter(
        1, hidden_BM[..., None].expand_as(prediction_BMP), prediction_BMP.float()
    )
    if norm_pix_loss:
        count = scored.sum(dim=2, keepdim=True).clamp(min=1)
        mean = (target * scored).sum(dim=2, keepdim=True) / count
        variance = ((target - mean).square() * scored).sum(dim=2, keepdim=True) / count
        target = (target - mean) / (variance + 1e-6).sqrt()
    hidden = torch.zeros(target.shape[:2]).scatter(1, hidden_BM, 1.0)
    scored = scored * hidden[..., None]
    error = (prediction - target).square() * scored
    return error.sum(dim=(1, 2)) / scored.sum(dim=(1, 2)).clamp(min=1)


@pytest.mark.parametrize("chans", [1, 3])
@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_pixel_objective_is_bit_equal_to_the_full_formula(norm_pix_loss: bool, chans: int) -> None:
    values = case(chans=chans)
    objective = PixelObjective(PATCH, norm_pix_loss)
    loss = objective(*values)
    assert torch.equal(loss, old_loss(values, norm_pix_loss))
    assert loss[2] == 0 and (loss[[0, 1, 3]] > 0).all()
    assert torch.equal(objective.terms["mse"], loss) and not objective.terms["mse"].requires_grad
    order = torch.randperm(values[1].shape[1])
    assert torch.equal(objective(values[0][:, order], values[1][:, order], *values[2:]), loss), "order matters not"


def test_pixel_objective_against_loops() -> None:
    prediction, hidden, image, valid = case()
    total, count = 0.0, 0
    for place, number in enumerate(hidden[1].tolist()):
        row, col = divmod(number, SIZE // PATCH)
        for i in range(PATCH):
            for j in range(PATCH):
                y, x = row * PATCH + i, col * PATCH + j
                if valid[1, y, x]:
                    total += float(prediction[1, place, i * PATCH + j] - image[1, 0, y, x]) ** 2
                    count += 1
    assert PixelObjective(PATCH, False)(prediction, hidden, image, valid)[1].item() == pytest.approx(total / count)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_predictions_are_scored_in_float32(dtype: torch.dtype) -> None:
    prediction, *rest = case()
    half = prediction.to(dtype).requires_grad_()
    for objective in (PixelObjective(PATCH, False), combined(mse=0.5, ssim=0.25, gradient=0.25)):
        loss = objective(half, *rest)
        assert loss.dtype == torch.float32
        assert torch.equal(loss, objective(half.detach().float(), *rest))
        loss.sum().backward()
        assert half.grad is not None and half.grad.dtype == dtype


def combined(*, norm_pix_loss: bool = False, limit: float = LIMIT, **weights: float) -> CombinedObjective:
    return CombinedObjective(PATCH, norm_pix_loss, weights, limit)


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_combined_with_mse_alone_is_the_pixel_objective(norm_pix_loss: bool) -> None:
    values = case()
    assert torch.equal(
        combined(norm_pix_loss=norm_pix_loss, mse=1.0)(*values), PixelObjective(PATCH, norm_pix_loss)(*values)
    )


# ---- SSIM


def plain_dissimilarity(x: np.ndarray, y: np.ndarray, hidden: np.ndarray, valid: np.ndarray) -> float:
    """1 - SSIM of one channel with values in [0, 1], window by window in float64 (Wang et al. 2004)."""
    axis = np.exp(-((np.arange(11) - 5.0) ** 2) / (2 * 1.5**2))
    kernel = np.outer(axis, axis)
    kernel /= kernel.sum()
    c1, c2 = (0.01 * 1.0) ** 2, (0.03 * 1.0) ** 2
    values = []
    for i in range(x.shape[0] - 10):
        for j in range(x.shape[1] - 10):
            window = np.s_[i : i + 11, j : j + 11]
            if not valid[window].all() or not hidden[window].any():
                continue
            mx, my = (kernel * x[window]).sum(), (kernel * y[window]).sum()
            vx, vy = (kernel * (x[window] - mx) ** 2).sum(), (kernel * (y[window] - my) ** 2).sum()
            cov = (kernel * (x[window] - mx) * (y[window] - my)).sum()
            values.append((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    return 1 - float(np.mean(values)) if values else 0.0


@pytest.mark.parametrize("contrast", [1.0, 1e-3])
def test_ssim_against_loops(contrast: float) -> None:
    _, hidden_BM, image, valid = case(hidden=6)
    hidden, valid_B1HW = masks(hidden_BM, valid)
    generator = torch.Generator().manual_seed(1)
    x = contrast * (torch.rand(image.shape, generator=generator) - 0.5) * hidden * valid_B1HW
    y = (0.5 * x + 0.5 * contrast * (torch.rand(image.shape, generator=generator) - 0.5)) * hidden * valid_B1HW
    seen = structural_dissimilarity(x, y, hidden, valid_B1HW)
    for number in range(len(image)):
        arrays = (x[number, 0].double() + 0.5, y[number, 0].double() + 0.5, hidden[number, 0], valid_B1HW[number, 0])
        expected = plain_dissimilarity(*(array.numpy() for array in arrays))
        assert seen[number].item() == pytest.approx(expected, rel=2e-5, abs=1e-8)
    assert seen[2] == 0 and seen[0] > 0


def test_ssim_of_equal_images_is_one_and_never_diluted_by_shown_windows() -> None:
    hidden, valid = torch.zeros(1, 1, 32, 32), torch.ones(1, 1, 32, 32)
    hidden[..., :8, :8] = 1
    x = torch.rand(1, 1, 32, 32) * hidden - 0.5 * hidden
    assert structural_dissimilarity(x, x, hidden, valid).abs().item() < 1e-6
    y = torch.zeros_like(x)
    # Doubling the image by shown pixels leaves the mean as it is.
    wide = [torch.nn.functional.pad(tensor, (0, 32)) for tensor in (x, y, hidden)]
    narrow = structural_dissimilarity(x, y, hidden, valid)
    torch.testing.assert_close(structural_dissimilarity(*wide, torch.ones(1, 1, 32, 64)), narrow)
    assert narrow > 0.1


def test_ssim_refuses_images_smaller_than_its_window() -> None:
    small = torch.zeros(1, 1, 8, 8)
    with pytest.raises(ConfigError, match=r"too small for SSIM: 8 x 8 pixels.*at least 11.*loss\.ssim=0"):
        structural_dissimilarity(small, small, small, small)


# ---- gradient


def plain_gradient(error: np.ndarray, hidden: np.ndarray, valid: np.ndarray) -> float:
    result = 0.0
    for down, right in ((1, 0), (0, 1)):
        values = []
        for i in range(error.shape[0] - down):
            for j in range(error.shape[1] - right):
                a, b = (i, j), (i + down, j + right)
                if valid[a] and valid[b] and (hidden[a] or hidden[b]):
                    values.append(abs(float(error[b]) - float(error[a])))
        result += float(np.mean(values)) if values else 0.0
    return result


def test_gradient_against_loops() -> None:
    _, hidden_BM, image, valid = case(hidden=6)
    hidden, valid_B1HW = masks(hidden_BM, valid)
    error = torch.randn(image.shape, generator=torch.Generator().manual_seed(2)) * hidden * valid_B1HW
    seen = gradient_error(error, hidden, valid_B1HW)
    for number in range(len(image)):
        expected = plain_gradient(*(tensor[number, 0].numpy() for tensor in (error, hidden, valid_B1HW)))
        assert seen[number].item() == pytest.approx(expected, rel=1e-5)
    assert seen[2] == 0


# ---- the four together


def painted(values: Case, norm_pix_loss: bool) -> tuple[np.ndarray, np.ndarray]:
    """Predicted and true image in [0, 1], 0.5 where a pixel is shown or invalid; float64, patch by patch."""
    prediction, hidden, image, valid = (tensor.detach().numpy() for tensor in values)
    ours, true = np.full(image.shape, 0.5), np.full(image.shape, 0.5)
    for b in range(len(image)):
        for place, number in enumerate(hidden[b]):
            row, col = divmod(int(number), SIZE // PATCH)
            cell = np.s_[row * PATCH : (row + 1) * PATCH, col * PATCH : (col + 1) * PATCH]
            good, pixels = valid[b][cell], image[b, 0][cell].astype(np.float64)
            patch = prediction[b, place].reshape(PATCH, PATCH).astype(np.float64)
            if norm_pix_loss and good.any():
                patch = patch * math.sqrt(pixels[good].var() + 1e-6) + pixels[good].mean()
            ours[b, 0][cell] = np.where(good, (patch + LIMIT) / (2 * LIMIT), 0.5)
            true[b, 0][cell] = np.where(good, (pixels + LIMIT) / (2 * LIMIT), 0.5)
    return ours, true


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_terms_are_on_denormalised_pixels_of_range_one(norm_pix_loss: bool, alexnet: Path) -> None:
    values = case()
    weights = {"mse": 0.1, "ssim": 0.2, "lpips": 0.3, "gradient": 0.4}
    lpips = load_lpips(alexnet)
    objective = CombinedObjective(PATCH, norm_pix_loss, weights, LIMIT, lpips)
    loss = objective(*values)
    ours, true = painted(values, norm_pix_loss)
    hidden, valid = (mask.numpy() for mask in masks(values[1], values[3]))
    scaled = [torch.from_numpy(2 * array - 1).float() for array in (ours, true)]
    torch.testing.assert_close(objective.terms["lpips"], lpips(*scaled), rtol=1e-4, atol=1e-6)
    for b in range(len(loss)):
        ssim = plain_dissimilarity(ours[b, 0], true[b, 0], hidden[b, 0], valid[b, 0])
        assert objective.terms["ssim"][b].item() == pytest.approx(ssim, rel=1e-4, abs=1e-7)
        gradient = plain_gradient(ours[b, 0] - true[b, 0], hidden[b, 0], valid[b, 0])
        assert objective.terms["gradient"][b].item() == pytest.approx(gradient, rel=1e-4)
    assert torch.equal(objective.terms["mse"], old_loss(values, norm_pix_loss))
    assert set(objective.terms) == set(weights)
    expected = sum(weight * objective.terms[name] for name, weight in weights.items())
    torch.testing.assert_close(loss, expected)


def test_a_perfect_prediction_costs_nothing(alexnet: Path) -> None:
    _, hidden, image, valid = case()
    patches = patchify(image, PATCH).gather(1, hidden[..., None].expand(-1, -1, PATCH**2))
    objective = CombinedObjective(
        PATCH, False, dict.fromkeys(("mse", "ssim", "lpips", "gradient"), 0.25), LIMIT, load_lpips(alexnet)
    )
    assert objective(patches, hidden, image, valid).abs().max() < 1e-6


@pytest.mark.parametrize("chans", [1, 3])
def test_gradients_are_finite_and_zero_without_a_scored_pixel(chans: int, alexnet: Path) -> None:
    prediction, *rest = case(chans=chans)
    weights = dict.fromkeys(("mse", "ssim", "lpips", "gradient"), 0.25)
    objective = CombinedObjective(PATCH, False, weights, LIMIT, load_lpips(alexnet))
    prediction.requires_grad_()
    loss = objective(prediction, *rest)
    loss.sum().backward()
    assert prediction.grad is not None and prediction.grad.isfinite().all()
    assert loss[2] == 0 and (prediction.grad[2] == 0).all()
    assert all(term[2] == 0 for term in objective.terms.values())
    assert (prediction.grad[[0, 1, 3]].abs().amax(dim=(1, 2)) > 0).all()
    # Pixels that are invalid get no gradient: sample 1 has some in hidden patches.
    seen = patchify(rest[2][:, None].expand_as(rest[1]), PATCH).gather(
        1, rest[0][..., None].expand(-1, -1, PATCH**2 * chans)
    )
    assert (prediction.grad[~seen] == 0).all() and (~seen[1]).any()


@pytest.mark.parametrize("term", ["ssim", "gradient"])
def test_derivatives_agree_with_finite_differences(term: str) -> None:
    prediction, *rest = case(batch=3)
    objective = combined(**{"mse": 0.0, term: 1.0})
    prediction.requires_grad_()
    objective(prediction, *rest)[0].backward()
    assert prediction.grad is not None
    direction = torch.randn(prediction.shape, generator=torch.Generator().manual_seed(3))
    step = 1e-2
    with torch.no_grad():
        slope = (objective(prediction + step * direction, *rest) - objective(prediction - step * direction, *rest))[0]
    expected = (prediction.grad * direction).sum().item()
    assert slope.item() / (2 * step) == pytest.approx(expected, rel=0.03)


def test_samples_do_not_touch_one_another(alexnet: Path) -> None:
    values = case()
    weights = dict.fromkeys(("mse", "ssim", "lpips", "gradient"), 0.25)
    objective = CombinedObjective(PATCH, True, weights, LIMIT, load_lpips(alexnet))
    whole = objective(*values)
    for number in range(len(whole)):
        alone = objective(*(tensor[number : number + 1] for tensor in values))
        torch.testing.assert_close(alone[0], whole[number], rtol=1e-5, atol=1e-7)


# ---- make_objective, describe


def test_make_objective_chooses_the_plain_loss_by_default(alexnet: Path) -> None:
    make = {"patch_size": PATCH, "norm_pix_loss": True, "limit": LIMIT, "device": "cpu"}
    plain = make_objective(LossOptions(), **make)
    assert isinstance(plain, PixelObjective) and plain.norm_pix_loss
    assert isinstance(make_objective(LossOptions(mse=0.5), **make), CombinedObjective)
    options = LossOptions(mse=0.25, ssim=0.25, lpips=0.25, gradient=0.25, lpips_backbone=str(alexnet))
    momo = make_objective(options, **make)
    assert isinstance(momo, CombinedObjective) and momo.lpips is not None
    values = case()
    torch.testing.assert_close(momo(*values), 0.25 * sum(momo.terms.values()))


def test_describe_changes_with_all_that_changes_the_loss(alexnet: Path, tmp_path: Path) -> None:
    save_file(random_alexnet(seed=1), tmp_path / "other.safetensors")
    lpips, other = load_lpips(alexnet), load_lpips(tmp_path / "other.safetensors")
    weights = {"mse": 0.25, "ssim": 0.25, "lpips": 0.25}
    described = [
        PixelObjective(PATCH, False).describe(),
        PixelObjective(PATCH, True).describe(),
        CombinedObjective(PATCH, False, weights, LIMIT, lpips).describe(),
        CombinedObjective(PATCH, True, weights, LIMIT, lpips).describe(),
        CombinedObjective(PATCH, False, weights | {"mse": 0.5}, LIMIT, lpips).describe(),
        CombinedObjective(PATCH, False, weights | {"gradient": 0.1}, LIMIT, lpips).describe(),
        CombinedObjective(PATCH, False, weights, 1.0, lpips).describe(),
        CombinedObjective(PATCH, False, weights, LIMIT, other).describe(),
    ]
    assert len({repr(description) for description in described}) == len(described)
    assert described[2] == CombinedObjective(PATCH, False, weights, LIMIT, load_lpips(alexnet)).describe()


def test_combined_objective_refuses_what_it_cannot_compute() -> None:
    with pytest.raises(ConfigError, match=r"a term of the loss is not known: \['psnr'\].*mse, ssim, lpips, gradient"):
        combined(psnr=1.0)
    with pytest.raises(ConfigError, match=r"limit of the network's input is out of range: 0"):
        combined(mse=1.0, limit=0.0)
    with pytest.raises(ConfigError, match=r"LPIPS has a weight and no network: 0\.25.*load_lpips"):
        CombinedObjective(PATCH, False, {"lpips": 0.25}, LIMIT)
