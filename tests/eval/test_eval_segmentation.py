from __future__ import annotations

import numpy as np
import pytest
import torch

from momo.errors import ConfigError
from momo.eval.config import DatasetConfig, DecoderConfig
from momo.eval.datasets import open_dataset
from momo.eval.features import prepare
from momo.eval.metrics import score
from momo.eval.segmentation import TokenDecoder, TokenSource, run_decoder, segmentation_loss, token_gib
from momo.models import random_encoder
from momo.weights import load_card
from tests.conftest import PICO
from tests.eval.labelled import write_segmentation

QUICK = DecoderConfig(steps=60, batch_size=8, lr_grid=[0.004], width=32, validations=3)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    # 28 x 36 pixels: neither side is a multiple of the patch.
    folder = write_segmentation(tmp_path_factory.mktemp("sets") / "seg")
    return open_dataset(DatasetConfig(path=str(folder)))


def sources(dataset, pico_weights, *, cache: bool = True, encoder=None) -> dict[str, TokenSource]:
    prepared = prepare(load_card(pico_weights), dataset, None)
    encoder = encoder or random_encoder(PICO, seed=0)
    return {
        split: TokenSource(encoder, samples, prepared, depths=2, batch_size=16, cache=cache)
        for split, samples in dataset.splits.items()
    }


def test_decoder_learns_discs_at_native_size(dataset, pico_weights):
    given = sources(dataset, pico_weights)
    outcome = run_decoder(given, range(24), QUICK, classes=2, seed=0)
    assert outcome.masks[0].shape == (28, 36) and outcome.counts_NCC.sum(axis=(1, 2)).tolist() == [28 * 36] * 15
    assert score("iou_fg", outcome.counts_NCC)[0] > 0.7
    assert outcome.grid == [{"lr": 0.004, "val_score": outcome.grid[0]["val_score"], "step": outcome.grid[0]["step"]}]
    assert outcome.hyper_parameters["encoder"] == "frozen"


def test_decoder_is_a_function_of_its_seed(dataset, pico_weights):
    config = DecoderConfig(steps=6, batch_size=8, lr_grid=[0.004, 0.001], width=16, validations=2)
    runs = [run_decoder(sources(dataset, pico_weights), range(24), config, classes=2, seed=seed) for seed in (1, 1, 2)]
    same = [np.array_equal(np.stack(runs[0].masks), np.stack(run.masks)) for run in runs]
    assert same == [True, True, False] and runs[0].grid == runs[1].grid
    assert [entry["lr"] for entry in runs[0].grid] == [0.001, 0.004]
    best = max(runs[0].grid, key=lambda entry: entry["val_score"])
    assert (runs[0].hyper_parameters["lr"], runs[0].hyper_parameters["step"]) == (best["lr"], best["step"])


def test_cached_and_fresh_tokens_agree(dataset, pico_weights):
    cached, fresh = (sources(dataset, pico_weights, cache=cache)["val"] for cache in (True, False))
    assert torch.allclose(cached.tokens([3, 0, 7]), fresh.tokens([3, 0, 7]), atol=1e-5)
    assert cached.tokens([3]).shape == (1, 4, 5, 2 * 96)


def test_frozen_encoder_stays_and_trained_one_is_a_copy(dataset, pico_weights):
    encoder = random_encoder(PICO, seed=0)
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    config = DecoderConfig(steps=4, batch_size=8, lr_grid=[0.004], width=16, freeze_encoder=False, encoder_lr_scale=1.0)
    given = sources(dataset, pico_weights, cache=False, encoder=encoder)
    trained = run_decoder(given, range(24), config, classes=2, seed=0)
    assert trained.hyper_parameters["encoder"] == "trained"
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())
    config.freeze_encoder = True
    frozen = run_decoder(given, range(24), config, classes=2, seed=0)
    assert not np.array_equal(np.stack(frozen.masks), np.stack(trained.masks))


def test_only_the_drawn_images_are_learned_from(dataset, pico_weights):
    given = sources(dataset, pico_weights)
    drawn = [0, 3, 5, 8, 11, 20]
    seen: set[int] = set()
    original = given["train"].tokens
    given["train"].tokens = lambda indices, encoder=None: seen.update(indices) or original(indices, encoder)
    run_decoder(given, drawn, DecoderConfig(steps=5, batch_size=4, lr_grid=[0.01], width=16), classes=2, seed=0)
    assert seen == set(drawn)


def test_batches_hold_one_size_and_every_image_once(dataset, pico_weights):
    source = sources(dataset, pico_weights, cache=False)["train"]
    source.masks = [np.zeros((8, 8 + n % 3), np.uint8) for n in range(24)]
    batches = list(source.batches(range(24), 5))
    assert sorted(index for batch in batches for index in batch) == list(range(24))
    assert all(len({index % 3 for index in batch}) == 1 and len(batch) <= 5 for batch in batches)


def test_decoder_crops_what_the_encoder_padded():
    decoder = TokenDecoder(12, 16, 5, 8)
    assert decoder(torch.zeros(2, 2, 3, 12), (19, 47)).shape == (2, 5, 19, 47)


def test_pixels_land_where_their_patch_is():
    """A decoder without context paints patch (r, c) from token (r, c) and pixels in row order."""
    decoder = TokenDecoder(4, 8, 2, 8)
    token = torch.randn(1, 2, 3, 4)
    moved = token.clone()
    moved[0, 1, 2] += 3
    changed = (decoder(token, (16, 24)) != decoder(moved, (16, 24))).any(dim=1)[0]
    assert changed[8:, 16:].all() and not changed[:, :7].any()


def test_loss_counted_by_hand():
    logits = torch.zeros(1, 2, 2, 2)
    mask = torch.tensor([[[1, 0], [0, 0]]])
    # Every probability is 1/2: cross-entropy log 2; Dice (2 * 0.5 + 1) / (2 + 1 + 1).
    assert float(segmentation_loss(logits, mask)) == pytest.approx(np.log(2) + 1 - 2 / 4)
    sure = torch.stack([-20.0 * (2 * mask - 1), 20.0 * (2 * mask - 1)], dim=1)
    assert float(segmentation_loss(sure, mask)) == pytest.approx(0, abs=1e-5)


def test_token_memory():
    encoder = random_encoder(PICO, seed=0)
    assert token_gib(1000, (28, 36), encoder, 2) * 2**30 == 1000 * 4 * 5 * 96 * 2 * 4


def test_decoder_options_are_checked():
    with pytest.raises(ConfigError, match=r"decoder\.steps is out of range: 0"):
        DecoderConfig(steps=0)
    with pytest.raises(ConfigError, match="decoder option is out of range: weight_decay=-1"):
        DecoderConfig(weight_decay=-1)
