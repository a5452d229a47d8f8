"""CKA against a direct formula, its invariances, and the features of real encoders."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from momo.corpus import Corpus
from momo.errors import MergeError
from momo.merge.diagnose.cka import block_grams, compare, debiased_cka, encoder_of, gram, linear_cka
from momo.models import build_mae
from momo.normalise import Normalisation
from momo.pretrain.validation_tiles import ValidationTiles
from tests.conftest import PICO


def features(seed: int, count: int = 20, width: int = 7) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, width)) + rng.normal(size=width) * 3


def direct_cka(x: np.ndarray, y: np.ndarray) -> float:
    """Kornblith et al. 2019, section 3: norms of the cross-covariance of centred features."""
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    joint = np.linalg.norm(y.T @ x, "fro") ** 2
    return joint / (np.linalg.norm(x.T @ x, "fro") * np.linalg.norm(y.T @ y, "fro"))


def direct_hsic_1(k: np.ndarray, other: np.ndarray) -> float:
    """Song et al. 2012, theorem 2: the U-statistic over all ordered quadruples of different tiles."""
    total, count = 0.0, 0
    for i, j, q, r in itertools.permutations(range(len(k)), 4):
        total += k[i, j] * (other[i, j] + other[q, r] - 2 * other[i, q])
        count += 1
    return total / count


def test_it_equals_the_formula_on_features():
    x, y = features(1), features(2, width=4) + features(1)[:, :4]
    assert linear_cka(x @ x.T, y @ y.T) == pytest.approx(direct_cka(x, y), rel=1e-10)
    assert 0.2 < direct_cka(x, y) < 0.9


def test_the_unbiased_one_equals_the_u_statistic():
    x, y = features(1, count=7), features(2, count=7, width=4) + features(1, count=7)[:, :4]
    k, other = x @ x.T, y @ y.T
    expected = direct_hsic_1(k, other) / np.sqrt(direct_hsic_1(k, k) * direct_hsic_1(other, other))
    assert debiased_cka(k, other) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("measure", [linear_cka, debiased_cka])
def test_turning_scaling_and_shifting_change_nothing(measure):
    x, y = features(3), features(4) + 0.5 * features(3)
    turn, _ = np.linalg.qr(np.random.default_rng(5).normal(size=(7, 7)))
    expected = measure(x @ x.T, y @ y.T)
    other = 3.7 * x @ turn + 11
    assert measure(other @ other.T, y @ y.T) == pytest.approx(expected, rel=1e-9)
    assert measure(other @ other.T, x @ x.T) == pytest.approx(1, rel=1e-9)
    stretched = x * np.array([10, 1, 1, 1, 1, 1, 1])
    assert measure(stretched @ stretched.T, x @ x.T) < 0.9, "a stretch is no turn"
    grams = [gram(torch.from_numpy(f)) for f in (x, y)]
    assert measure(*grams) == pytest.approx(expected, rel=1e-9), "taking the mean off first changes nothing"


def test_unrelated_wide_features_are_alike_by_bias_alone():
    x, y = features(6, count=24, width=400), features(7, count=24, width=400)
    assert linear_cka(x @ x.T, y @ y.T) > 0.8
    assert abs(debiased_cka(x @ x.T, y @ y.T)) < 0.1


def test_equal_features_of_all_tiles_have_no_cka():
    flat = gram(torch.full((6, 3), 0.1))
    assert linear_cka(flat, flat) is None and debiased_cka(flat, flat) is None


def test_too_few_tiles_are_refused():
    with pytest.raises(MergeError, match=r"too few tiles for CKA: 3\. Rule: 4 or more\. Next: give a corpus"):
        debiased_cka(np.eye(3), np.eye(3))


# --- encoders -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiles(tiny_corpus) -> ValidationTiles:
    return ValidationTiles(Corpus(tiny_corpus), Normalisation(), patches=PICO.patches, limit=8, seed=1)


def test_features_are_means_over_patches_at_every_depth(tiles):
    state = build_mae(PICO, seed=1).state_dict()
    encoder = encoder_of(PICO, state)
    found = block_grams(encoder, tiles, in_chans=1, batch_size=3)
    assert list(found) == ["blocks.0", "blocks.1", "blocks.2", "blocks.3", "norm"]
    image, _, _ = tiles.batch(range(8)).to_inputs(limit=4.0, in_chans=1, device="cpu")
    with torch.no_grad():
        tokens = encoder._pos_embed(encoder.patch_embed(image))
        for number, block in enumerate(encoder.blocks):
            tokens = block(tokens)
            pooled = tokens[:, 1:].mean(dim=1).double()
            pooled = (pooled - pooled.mean(dim=0)).numpy()
            np.testing.assert_allclose(found[f"blocks.{number}"], pooled @ pooled.T, rtol=1e-3, atol=1e-5)
        pooled = encoder.norm(tokens)[:, 1:].mean(dim=1).double()
        pooled = (pooled - pooled.mean(dim=0)).numpy()
        np.testing.assert_allclose(found["norm"], pooled @ pooled.T, rtol=1e-3, atol=1e-5)


def test_an_encoder_is_like_itself_and_less_like_another(tiles):
    states = {name: build_mae(PICO, seed=seed).state_dict() for name, seed in {"a": 1, "b": 2, "again": 1}.items()}
    grams = {name: block_grams(encoder_of(PICO, state), tiles, in_chans=1) for name, state in states.items()}
    found = compare(grams)
    for kind in ("linear", "debiased"):
        assert found[kind]["blocks.2"]["a"]["again"] == pytest.approx(1, abs=1e-9)
        assert found[kind]["blocks.2"]["a"]["b"] == found[kind]["blocks.2"]["b"]["a"] < 1 - 1e-4


def test_an_encoder_that_does_not_fit_is_refused():
    state = build_mae(PICO, seed=1).state_dict()
    del state["norm.bias"]
    with pytest.raises(MergeError, match=r"the weights do not fit the encoder: norm\.bias\. Rule: every tensor"):
        encoder_of(PICO, state)
