"""`LossMeter`: the losses of weights in memory are those that `momo validate` finds in files."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from momo.config import load_config
from momo.corpus import Corpus
from momo.errors import CheckpointError, ConfigError
from momo.pretrain.losses_of import LossMeter
from momo.pretrain.validating import ValidateConfig, validate
from momo.weights import load_card, load_weights, save_weights
from tests.conftest import write_corpus, write_weights


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("corpora")
    ctx = write_corpus(folder / "ctx", tiles=4, val=11)
    themis = write_corpus(folder / "themis", sensor="THEMIS", tiles=4, val=5, seed=2, dtype="uint16")
    return [str(ctx), str(themis)]


def validated(weights: Path, corpora: list[str], *overrides: str) -> dict:
    given = [f"weights={weights}", f"corpora=[{','.join(corpora)}]", *overrides]
    (entry,) = validate(load_config(ValidateConfig, None, given))["checkpoints"]
    return entry["val_loss"]


SCALED = [{"name": "CTX", "mean": 1.5, "std": 0.4}, {"name": "THEMIS", "mean": 300.0, "std": 200.0}]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"objective": {"mask_ratio": 0.5, "norm_pix_loss": True, "loss": {"mse": 0.5, "gradient": 0.5}}},
        {
            "normalisation": {"policy": "sensor_zscore", "mean": None, "std": None, "clip": 3.0},
            "sensors": SCALED,
        },
    ],
    ids=["plain", "joined loss", "constants of each sensor"],
)
def test_the_losses_are_those_of_momo_validate(tmp_path, corpora, fields):
    weights = write_weights(tmp_path / "w", seed=3)
    tensors, card = load_weights(weights)
    save_weights(weights, tensors, dataclasses.replace(card, **fields))
    expected = validated(weights, corpora, "samples=8", "batch_size=4")
    meter = LossMeter.open(load_card(weights), corpora, 8, batch_size=4)
    other = {name: tensor + 0.05 for name, tensor in tensors.items()}
    meter.losses(other)  # what was measured before leaves no trace
    assert meter.measure(tensors) == expected
    found = meter.losses(tensors)
    assert list(found) == meter.sensors == ["CTX", "THEMIS"]
    for sensor, estimate in found.items():
        assert estimate.to_dict() == {key: expected["per_sensor"][sensor][key] for key in ("loss", "stderr", "count")}
    assert meter.mean(tensors) == pytest.approx((found["CTX"].loss + found["THEMIS"].loss) / 2, rel=1e-15)
    assert meter.tile_count == 13 and meter.protocol == expected["protocol"]


def test_another_seed_is_another_protocol_and_the_default_is_that_of_runs(pico_weights, corpora):
    tensors, card = load_weights(pico_weights)
    default, other = LossMeter.open(card, corpora, 8), LossMeter.open(card, corpora, 8, seed=7)
    assert default.measure(tensors) == validated(pico_weights, corpora, "samples=8")
    assert other.measure(tensors) == validated(pico_weights, corpora, "samples=8", "seed=7")
    assert default.protocol != other.protocol and default.identity() != other.identity()


def test_tiles_are_decoded_once_and_weights_are_only_read(pico_weights, corpora, monkeypatch):
    reads: list[int] = []
    read = Corpus.read_places
    monkeypatch.setattr(Corpus, "read_places", lambda self, places: reads.append(len(places)) or read(self, places))
    tensors, card = load_weights(pico_weights)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    meter = LossMeter.open(card, corpora, 8, batch_size=8)
    told: list[int] = []
    first = meter.losses(tensors, told.append)
    assert meter.losses({name: tensor * 1.5 for name, tensor in tensors.items()}) != first
    assert meter.losses(tensors) == first
    assert reads == [8, 5] and sum(told) == 13
    assert all(torch.equal(tensors[name], before[name]) for name in before)


def test_half_precision_weights_are_computed_in_float32(pico_weights, corpora):
    tensors, card = load_weights(pico_weights)
    halves = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    meter = LossMeter.open(card, corpora[:1], 8)
    assert meter.losses(halves) == meter.losses({name: half.float() for name, half in halves.items()})
    assert meter.losses(halves) != meter.losses(tensors)


def test_weights_that_do_not_fit_are_refused(pico_weights, corpora):
    tensors, card = load_weights(pico_weights)
    meter = LossMeter.open(card, corpora[:1], 8)
    gone = {name: tensor for name, tensor in tensors.items() if name != "norm.bias"}
    with pytest.raises(CheckpointError, match=r"do not fit the model: norm\.bias is missing\. Rule: every tensor"):
        meter.losses(gone)
    with pytest.raises(CheckpointError, match=r"head\.weight is unknown"):
        meter.losses(tensors | {"head.weight": torch.zeros(2)})
    with pytest.raises(CheckpointError, match=r"norm\.bias is \(3,\), not \(96,\)"):
        meter.losses(tensors | {"norm.bias": torch.zeros(3)})
    with pytest.raises(CheckpointError, match="the validation loss is not finite: 8 of 8 tiles"):
        meter.losses(tensors | {"norm.bias": torch.full((96,), torch.nan)})


def test_impossible_requests_are_refused(pico_weights, corpora, tmp_path):
    card = load_card(pico_weights)
    with pytest.raises(ConfigError, match=r"no corpus is given: corpora=\[\]"):
        LossMeter.open(card, [], 8)
    with pytest.raises(ConfigError, match="two corpora are of one sensor"):
        LossMeter.open(card, [corpora[0], corpora[0]], 8)
    with pytest.raises(ConfigError, match=r"samples is out of range: 0"):
        LossMeter.open(card, corpora, 0)
    with pytest.raises(CheckpointError, match="the weights have no decoder: they hold encoder"):
        LossMeter.open(dataclasses.replace(card, contents=["encoder"]), corpora, 8)
    large = write_corpus(tmp_path / "large", tiles=1, val=2, size=64)
    with pytest.raises(CheckpointError, match=r"do not fit the tiles: the model takes 32 pixels"):
        LossMeter.open(card, [str(large)], 8)
