"""Views of tiles: the batched code against plain NumPy, one tile at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from momo.models import augmentation_rng
from momo.pretrain.augment import _apply_by_batch, _sources, apply_views, draw_view, draws_views
from momo.pretrain.config import AugmentOptions

ALL = AugmentOptions(symmetries=True, crop_min=0.4, gsd_jitter=0.5)
SYMMETRIES = [(turns, mirror) for mirror in (False, True) for turns in range(4)]


class Draws:
    """Stands for a generator and gives chosen numbers."""

    def __init__(self, turns: int = 0, mirror: bool = False, *uniforms: float) -> None:
        self.integer, self.uniforms = [turns, int(mirror)], list(uniforms)

    def integers(self, high: int) -> int:
        return self.integer.pop(0)

    def uniform(self, low: float, high: float, size: int | None = None) -> object:
        if size is None:
            return low + (high - low) * self.uniforms.pop(0)
        return np.array([low + (high - low) * self.uniforms.pop(0) for _ in range(size)])


def batch(count: int, size: int, *, seed: int = 0, invalid: float = 0.05) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(count, 1, size, size, generator=generator)
    valid = torch.rand(count, size, size, generator=generator) >= invalid
    return image.masked_fill(~valid[:, None], 0.0), valid


def views_of(count: int, options: AugmentOptions, *, seed: int = 0) -> torch.Tensor:
    drawn = [draw_view(augmentation_rng(f"tile {number}", seed, 0), options) for number in range(count)]
    return torch.from_numpy(np.stack(drawn))


def plain_symmetry(array: np.ndarray, turns: int, mirror: bool) -> np.ndarray:
    return np.rot90(array[..., ::-1] if mirror else array, turns, axes=(-2, -1))


def plain_view(image: np.ndarray, valid: np.ndarray, view: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pixel by pixel from the definition at the top of augment.py."""
    size = len(image)
    out, out_valid = np.zeros_like(image), np.zeros_like(valid)
    v = [float(number) for number in view]
    for i in range(size):
        for j in range(size):
            y, x = (2 * i + 1) / size - 1, (2 * j + 1) / size - 1
            row = ((v[0] * y + v[1] * x + v[2] + 1) * size - 1) / 2
            col = ((v[3] * y + v[4] * x + v[5] + 1) * size - 1) / 2
            row, col = min(max(row, 0.0), size - 1.0), min(max(col, 0.0), size - 1.0)
            # A whole tile falls on pixels up to rounding.
            row, col = (round(p) if abs(p - round(p)) < 1e-9 else p for p in (row, col))
            total, good = 0.0, True
            for r in {math.floor(row), math.ceil(row)}:
                for c in {math.floor(col), math.ceil(col)}:
                    weight = (1 - abs(row - r)) * (1 - abs(col - c))
                    total += weight * float(image[r, c])
                    good &= bool(valid[r, c])
            out[i, j], out_valid[i, j] = (total if good else 0.0), good
    return out, out_valid


@pytest.mark.parametrize("size", [8, 9, 28])
def test_symmetries_are_bit_equal_to_rot90_and_flip(size: int) -> None:
    image, valid = batch(8, size)
    image[0, 0, 0, 0] = -0.0
    options = AugmentOptions()
    views = np.stack([draw_view(Draws(turns, mirror), options) for turns, mirror in SYMMETRIES])
    seen, seen_valid = apply_views(image, valid, torch.from_numpy(views))
    for number, (turns, mirror) in enumerate(SYMMETRIES):
        expected = np.ascontiguousarray(plain_symmetry(image[number, 0].numpy(), turns, mirror))
        assert seen[number, 0].numpy().tobytes() == expected.tobytes()
        assert np.array_equal(seen_valid[number].numpy(), plain_symmetry(valid[number].numpy(), turns, mirror))
    assert len({tile.tobytes() for tile in seen.numpy()}) == 8


def test_eight_symmetries_differ() -> None:
    image = torch.arange(16.0).reshape(1, 1, 4, 4).expand(8, 1, 4, 4)
    views = np.stack([draw_view(Draws(turns, mirror), AugmentOptions()) for turns, mirror in SYMMETRIES])
    seen, valid = apply_views(image, None, torch.from_numpy(views))
    assert len({tile.tobytes() for tile in seen.numpy()}) == 8
    assert valid is None


@pytest.mark.parametrize("size", [12, 15])
def test_crops_agree_with_plain_numpy(size: int) -> None:
    image, valid = batch(24, size)
    views = views_of(24, ALL)
    seen, seen_valid = apply_views(image, valid, views)
    for number in range(24):
        expected, expected_valid = plain_view(image[number, 0].numpy(), valid[number].numpy(), views[number].numpy())
        np.testing.assert_array_equal(seen_valid[number].numpy(), expected_valid)
        np.testing.assert_allclose(seen[number, 0].numpy(), expected, atol=2e-6)
    assert seen.dtype == torch.float32 and seen_valid.dtype == torch.bool


def test_crop_agrees_with_torch_interpolation_inside() -> None:
    """A crop of whole pixels is torch's bilinear enlargement of it, up to a border where torch cannot look outside."""
    image, _ = batch(1, 32, invalid=0.0)
    view = draw_view(Draws(0, False, 0.0, 0.5, 0.5, 0.5), AugmentOptions(symmetries=False, crop_min=0.5))
    seen, _ = apply_views(image, None, torch.from_numpy(view)[None])
    expected = torch.nn.functional.interpolate(image[..., 8:24, 8:24], size=32, mode="bilinear", align_corners=False)
    torch.testing.assert_close(seen[..., 1:-1, 1:-1], expected[..., 1:-1, 1:-1])


def test_whole_tiles_among_crops_keep_their_bits() -> None:
    image, valid = batch(4, 16)
    views = views_of(4, ALL)
    views[1] = torch.tensor([1.0, 0, 0, 0, 1.0, 0])
    views[2] = torch.from_numpy(draw_view(Draws(1, True), AugmentOptions()))
    seen, seen_valid = apply_views(image, valid, views)
    assert seen[1].numpy().tobytes() == image[1].numpy().tobytes()
    turned = np.ascontiguousarray(plain_symmetry(image[2, 0].numpy(), 1, True))
    assert seen[2, 0].numpy().tobytes() == turned.tobytes()
    assert torch.equal(seen_valid[1], valid[1])
    assert not torch.equal(seen[0], image[0])


@pytest.mark.parametrize("options", [ALL, AugmentOptions()], ids=["crops", "symmetries"])
@pytest.mark.parametrize("masked", [True, False])
def test_by_batch_equals_by_tile(options: AugmentOptions, masked: bool) -> None:
    """What an accelerator runs, run on the CPU, gives the same bits."""
    image, valid = batch(24, 20, invalid=0.1 if masked else 0.0)
    views = views_of(24, options)
    expected = apply_views(image, valid if masked else None, views)
    sources = _sources(views.double().numpy(), 20)
    assert sources.whole_B.any() and sources.turned_B.any()
    seen = _apply_by_batch(image, valid if masked else None, sources)
    assert torch.equal(seen[0], expected[0])
    assert (seen[1] is None and expected[1] is None) if not masked else torch.equal(seen[1], expected[1])


def test_invalid_pixels_do_not_leak() -> None:
    image, valid = batch(16, 20, invalid=0.2)
    views = views_of(16, ALL)
    seen, seen_valid = apply_views(image, valid, views)
    # Any value under the mask gives the same output: it is used nowhere.
    soiled = image.masked_fill(~valid[:, None], 1e6)
    again, _ = apply_views(soiled, valid, views)
    assert torch.equal(seen, again.masked_fill(~seen_valid[:, None], 0.0))
    assert (seen[~seen_valid[:, None]] == 0).all()
    assert seen_valid.any() and not seen_valid.all()


def test_three_channels_and_no_mask() -> None:
    image, _ = batch(5, 16, invalid=0.0)
    views = views_of(5, ALL)
    grey, _ = apply_views(image, None, views)
    colour, none = apply_views(image.expand(-1, 3, -1, -1), None, views)
    assert none is None
    assert torch.equal(colour, grey.expand(-1, 3, -1, -1))
    _, all_valid = apply_views(image, torch.ones(5, 16, 16, dtype=torch.bool), views)
    assert all_valid.all(), "a crop stays within its tile"


def test_no_views_is_the_identity() -> None:
    image, valid = batch(2, 8)
    assert apply_views(image, valid, None) == (image, valid)
    nothing = AugmentOptions(symmetries=False)
    assert not draws_views(nothing)
    assert draw_view(np.random.default_rng(0), nothing).tolist() == [1, 0, 0, 0, 1, 0]
    assert draws_views(AugmentOptions()) and draws_views(AugmentOptions(symmetries=False, crop_min=0.5))


def test_draws_depend_on_the_key_alone() -> None:
    first, second = views_of(32, ALL), views_of(32, ALL)
    assert torch.equal(first, second)
    assert len({tuple(view) for view in first.tolist()}) > 24
    assert not torch.equal(first, views_of(32, ALL, seed=1))
    assert first.dtype == torch.float32 and first.shape == (32, 6)


def test_symmetries_are_drawn_as_before() -> None:
    """Turns first, then the mirror, and nothing else: the noise of the mask that follows keeps its values."""
    rng, other = np.random.default_rng(5), np.random.default_rng(5)
    view = draw_view(rng, AugmentOptions())
    turns, mirror = int(other.integers(4)), bool(other.integers(2))
    assert view.tolist() == draw_view(Draws(turns, mirror), AugmentOptions()).tolist()
    assert rng.random() == other.random()


def test_ranges_of_crops() -> None:
    options = AugmentOptions(symmetries=True, crop_min=0.4, gsd_jitter=0.5)
    views = views_of(4000, options).double()
    linear, shift = views.reshape(-1, 2, 3)[..., :2], views.reshape(-1, 2, 3)[..., 2]
    sides = linear.abs().sum(dim=2)
    assert torch.equal(sides[:, 0], sides[:, 1]), "the crop is a square"
    side = sides[:, 0]
    assert side.max() == 1 and 0.4 * 2**-0.5 <= side.min() < 0.32
    assert (shift.abs().amax(dim=1) + side <= 1 + 1e-6).all(), "the crop lies within the tile"
    assert (shift[side == 1] == 0).all()
    # Uniform places: the share of the free way that was taken has mean 0 and variance 1/3.
    share = (shift / (1 - side)[:, None])[side < 0.999]
    assert abs(share.mean()) < 0.03 and abs(share.var() - 1 / 3) < 0.02
    plain = views_of(4000, AugmentOptions(symmetries=False, crop_min=0.4)).double()
    assert abs(plain[:, 0].mean() - 0.7) < 0.01 and abs(plain[:, 0].var() - 0.6**2 / 12) < 0.002
    assert plain[:, 0].min() >= 0.4
    counts = np.unique(np.sign(linear.flatten(1).numpy()), axis=0, return_counts=True)[1]
    assert len(counts) == 8 and counts.min() > 400
