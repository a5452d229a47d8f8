"""Contact sheets: thumbnails against a plain area mean, what is drawn, size and determinism."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from momo.data_prep.contact_sheet import (
    MAX_BYTES,
    NOT_MEASURED,
    SIDE,
    Example,
    draw_contact_sheet,
    thumbnail,
    thumbnail_mask,
)


def plain_area_mean(stored, valid, side):
    """Repeats every pixel `side` times each way, so that each thumbnail pixel covers whole ones."""
    fine = np.where(valid, stored, 0).astype(float).repeat(side, 0).repeat(side, 1)
    share = valid.astype(float).repeat(side, 0).repeat(side, 1)
    step = stored.shape[0]
    total = fine.reshape(side, step, side, step).sum((1, 3))
    weight = share.reshape(side, step, side, step).sum((1, 3))
    return np.divide(total, weight, out=np.zeros_like(total), where=weight > 0), weight / step**2


def example(number, reason="kept", size=SIDE, seed=0, note=""):
    rng = np.random.default_rng(seed + number)
    thumb = rng.integers(0, 256, (size, size), dtype=np.uint8)
    return Example(reason, f"P_r{number:06d}_c000000", thumb, np.ones((size, size), bool), note)


@pytest.mark.parametrize("size", [20, 25])
def test_thumbnail_is_the_area_mean_of_valid_pixels_stretched(size):
    rng = np.random.default_rng(size)
    stored = rng.integers(0, 4000, (size, size)).astype(np.uint16)
    valid = rng.random((size, size)) > 0.3
    valid[:4, :4] = False
    mean, share = plain_area_mean(stored, valid, 10)
    low, high = np.percentile(mean[share > 0], (1, 99))
    expected = np.where(share > 0, np.clip((mean - low) / (high - low) * 255, 0, 255).round(), 0)
    found = thumbnail(stored, valid, side=10)
    assert found.dtype == np.uint8 and found.shape == (10, 10)
    assert np.abs(found.astype(int) - expected).max() <= 1
    assert np.array_equal(thumbnail_mask(valid, side=10), share >= 0.5)


def test_thumbnail_of_a_flat_an_empty_and_a_small_window():
    flat, whole = np.full((50, 50), 7, np.uint16), np.ones((50, 50), bool)
    assert (thumbnail(flat, whole, side=13) == 128).all()
    assert (thumbnail(flat, ~whole) == 0).all() and not thumbnail_mask(~whole).any()
    assert thumbnail(flat, whole).shape == (50, 50)
    assert thumbnail(np.zeros((200, 100), np.uint8), np.ones((200, 100), bool)).shape == (96, 48)


def test_invalid_pixels_do_not_reach_the_stretch():
    stored = np.tile(np.arange(96, dtype=np.uint16), (96, 1))
    valid = np.ones((96, 96), bool)
    valid[:, :10] = False
    dirty = np.where(valid, stored, 60000)
    assert np.array_equal(thumbnail(dirty, valid), thumbnail(np.where(valid, stored, 0), valid))


def test_sheet_shows_pixels_masks_and_counts_and_is_deterministic(tmp_path):
    valid = np.ones((SIDE, SIDE), bool)
    valid[:, : SIDE // 2] = False
    half = Example("low valid", "P_r000001_c000000", np.full((SIDE, SIDE), 200, np.uint8), valid, "valid 0.50")
    examples = [half, *(example(n, note="valid 1.00") for n in range(20))]
    counts = {"kept": 20, "low valid": 1, "constant": 5}
    draw_contact_sheet(examples, counts, tmp_path / "a.png", title="CTX")
    draw_contact_sheet(examples[::-1], dict(reversed(counts.items())), tmp_path / "b.png", title="CTX")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    sheet = np.asarray(Image.open(tmp_path / "a.png").convert("RGB")).astype(int)
    masked = (np.abs(sheet - NOT_MEASURED).max(axis=2) <= 2).sum()
    # Half a thumbnail and the little square of the legend.
    assert masked == SIDE * SIDE // 2 + 144
    more = {**counts, "stripes": 3}
    draw_contact_sheet(examples, more, tmp_path / "c.png", title="CTX")
    assert Image.open(tmp_path / "c.png").height > Image.open(tmp_path / "a.png").height


def test_choice_depends_on_keys_alone_and_is_bounded(tmp_path):
    many = [example(n) for n in range(40)]
    draw_contact_sheet(many, {"kept": 40}, tmp_path / "a.png", per_reason=6, title="t")
    draw_contact_sheet(many[::-1], {"kept": 40}, tmp_path / "b.png", per_reason=6, title="t")
    draw_contact_sheet(many, {"kept": 40}, tmp_path / "c.png", per_reason=12, title="t")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert Image.open(tmp_path / "c.png").width > Image.open(tmp_path / "a.png").width


def test_noise_in_every_thumbnail_stays_below_the_limit(tmp_path):
    noisy = [example(n, reason=f"reason {n % 20}") for n in range(20 * 12)]
    draw_contact_sheet(noisy, {f"reason {n}": 12 for n in range(20)}, tmp_path / "a.png", title="noise")
    assert (tmp_path / "a.png").stat().st_size <= MAX_BYTES


def test_nothing_to_show_still_gives_a_sheet(tmp_path):
    draw_contact_sheet([], {}, tmp_path / "a.png", title="nothing " * 40)
    assert Image.open(tmp_path / "a.png").size[0] > 100


def test_wrong_example_is_refused():
    with pytest.raises(ValueError, match=r"a thumbnail is uint8 of at most 96 x 96, got \(97, 97\)"):
        Example("kept", "k", np.zeros((97, 97), np.uint8), np.zeros((97, 97), bool), "")
    with pytest.raises(ValueError, match=r"thumbnail \(4, 4\) and validity \(5, 5\) differ"):
        Example("kept", "k", np.zeros((4, 4), np.uint8), np.zeros((5, 5), bool), "")
