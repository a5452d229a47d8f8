from __future__ import annotations

import numpy as np
import pytest
import torch

from momo.models.patches import moments, patchify, standardise, take_patches, unpatchify


@pytest.mark.parametrize("chans", [1, 3])
def test_patches_are_read_row_by_row_pixel_then_channel(chans):
    image = torch.arange(2 * chans * 6 * 6).reshape(2, chans, 6, 6)
    patches = patchify(image, 2)
    for number in range(9):
        top, left = 2 * (number // 3), 2 * (number % 3)
        expected = [
            image[1, chan, top + y, left + x].item() for y in range(2) for x in range(2) for chan in range(chans)
        ]
        assert patches[1, number].tolist() == expected
    assert torch.equal(unpatchify(patches, 2), image)


def test_oblong_images_have_patches_too():
    assert patchify(torch.zeros(1, 1, 4, 8), 2).shape == (1, 8, 4)


def test_take_patches_by_number():
    values = torch.arange(24).reshape(2, 4, 3)
    numbers = torch.tensor([[3, 0], [1, 1]])
    assert torch.equal(take_patches(values, numbers), torch.stack([values[0, [3, 0]], values[1, [1, 1]]]))


def test_moments_are_those_of_the_valid_values():
    rng = np.random.default_rng(0)
    values, valid = rng.normal(3, 2, size=(2, 5, 16)), rng.random((2, 5, 16)) > 0.4
    valid[1, 4] = False
    mean, std = moments(torch.tensor(values, dtype=torch.float32), torch.tensor(valid, dtype=torch.float32))
    for b in range(2):
        for n in range(5):
            chosen = values[b, n][valid[b, n]]
            expected = (chosen.mean(), np.sqrt(chosen.var() + 1e-6)) if chosen.size else (0.0, 1e-3)
            assert (float(mean[b, n, 0]), float(std[b, n, 0])) == pytest.approx(expected, rel=1e-5)


def test_standardised_patches_have_mean_0_and_spread_1():
    values = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0)) * 5 + 7
    valid = torch.ones_like(values)
    valid[:, :, :20] = 0
    mean, std = moments(standardise(values, valid), valid)
    torch.testing.assert_close(mean, torch.zeros(2, 3, 1), rtol=0, atol=1e-5)
    torch.testing.assert_close(std, torch.ones(2, 3, 1), rtol=1e-4, atol=0)
