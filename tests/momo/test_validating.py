"""`momo validate`: any checkpoint on any corpus, what it says of the card's value, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from momo.config import load_config
from momo.corpus import Corpus
from momo.errors import CheckpointError, ConfigError, DataError
from momo.models import load_mae
from momo.normalise import Normalisation
from momo.pretrain.validating import ValidateConfig, normalisation_for, validate
from momo.pretrain.validation import protocol_hash, summarise, tile_losses
from momo.pretrain.validation_tiles import ValidationTiles
from momo.weights import Card, load_card, load_weights, save_weights
from tests.conftest import PICO, write_corpus, write_weights
from tests.momo.validation_helper import damage, set_units

OPTIONS = {"samples": 6, "batch_size": 4, "seed": 9}


def job(weights: Path, *overrides: str) -> ValidateConfig:
    return load_config(ValidateConfig, None, [f"weights={weights}", *overrides])


def stored_loss(weights: Path, corpora: list[Path], normalisation: Normalisation) -> dict[str, Any]:
    """What a run with `OPTIONS` writes into the card."""
    model, _ = load_mae(weights)
    losses = {}
    for path in corpora:
        corpus = Corpus(path)
        tiles = ValidationTiles(
            corpus, normalisation, patches=PICO.patches, limit=OPTIONS["samples"], seed=OPTIONS["seed"]
        )
        losses[corpus.sensor] = tile_losses(model, tiles, batch_size=OPTIONS["batch_size"])
    return summarise(losses, protocol_hash(model, normalisation, OPTIONS["seed"]))


def rewrite_card(weights: Path, **fields: object) -> None:
    card = dataclasses.replace(load_card(weights), **fields)
    (weights / "card.json").write_text(json.dumps(card.to_dict()))


def write_run(run: Path, corpora: list[Path], *, steps: int = 2) -> Path:
    for number in range(1, steps + 1):
        weights = write_weights(
            run / "checkpoints" / f"samples-{16 * number:09d}",
            seed=number,
            samples=16 * number,
            sensors=[{"name": Corpus(path).sensor, "tiles": 24} for path in corpora],
            data_fingerprints={Corpus(path).sensor: Corpus(path).manifest.fingerprint for path in corpora},
        )
        rewrite_card(weights, val_loss=stored_loss(weights, corpora, Normalisation()))
    config = {"data": {"corpora": [str(path) for path in corpora]}, "validation": {"every": 16, **OPTIONS}}
    (run / "config.yaml").write_text(json.dumps(config))
    return run


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("corpora")
    ctx = write_corpus(folder / "ctx", tiles=24, val=20)
    set_units(ctx, {f"CTX_{number:04d}": ("Hnv", "Ahv", "")[number % 3] for number in range(44)})
    themis = write_corpus(folder / "themis", sensor="THEMIS", tiles=6, val=5, seed=2, dtype="uint16")
    return {"CTX": ctx, "THEMIS": themis}


@pytest.fixture(scope="module")
def run(tmp_path_factory, corpora) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "ctx", [corpora["CTX"]])


# --- what it computes and tells -----------------------------------------------------------------------------------


def test_a_run_gives_the_values_of_its_cards(run, tmp_path, capsys):
    out = tmp_path / "new" / "losses.json"
    result = validate(job(run, f"out={out}"))
    assert json.loads(out.read_text()) == result and not list(out.parent.glob(".*"))
    assert [entry["name"] for entry in result["checkpoints"]] == ["samples-000000016", "samples-000000032"]
    assert {key: result[key] for key in OPTIONS} == OPTIONS, "the options of the run are the default"
    for entry in result["checkpoints"]:
        card = load_card(Path(entry["path"]))
        assert entry["val_loss"]["loss"] == card.val_loss["loss"] and entry["sha256"] == card.sha256
        assert entry["stored"]["CTX"] == {"loss": card.val_loss["loss"], "difference": 0.0, "words": "equal"}
        own = entry["val_loss"]["per_sensor"]["CTX"]
        assert own["count"] == 6 and set(own["per_unit"]) <= {"Ahv", "Hnv"} and own["stderr_products"] > 0
        assert entry["not_trained_on"] == []
    text = capsys.readouterr().out
    loss, stderr = (own[key] for key in ("loss", "stderr"))
    (line,) = [line for line in text.splitlines() if line.startswith("samples-000000032")]
    assert line.split()[:4] == ["samples-000000032", "CTX", f"{loss:.4f}", f"{stderr:.4f}"]
    assert line.split()[-2:] == ["6", "equal"]
    assert f"{'':<20} {'  Hnv':<20}" in text and f"written: {out}" in text


@pytest.mark.parametrize("as_file", [False, True])
def test_a_checkpoint_of_a_run_finds_the_corpora_of_the_run(run, as_file):
    weights = run / "checkpoints" / "samples-000000032"
    result = validate(job(weights / "model.safetensors" if as_file else weights))
    (entry,) = result["checkpoints"]
    assert entry["name"] == "samples-000000032" and entry["stored"]["CTX"]["words"] == "equal"


def test_checkpoints_share_decoded_tiles(run, monkeypatch):
    reads: list[int] = []
    read = Corpus.read_places
    monkeypatch.setattr(Corpus, "read_places", lambda self, places: reads.append(len(places)) or read(self, places))
    kept = validate(job(run))
    assert reads == [4, 2]
    anew = validate(job(run, "cache_mb=0"))
    assert reads == [4, 2] * 3 and anew == kept


def test_a_value_that_differs_is_told(run, corpora, tmp_path, capsys):
    weights = write_weights(tmp_path / "w", seed=1, data_fingerprints=load_card(_last(run)).data_fingerprints)
    stored = stored_loss(weights, [corpora["CTX"]], Normalisation())
    overrides = [f"corpora=[{corpora['CTX']}]", *(f"{key}={value}" for key, value in OPTIONS.items())]

    def words(change: dict[str, Any] | None = None, own: dict[str, Any] | None = None, *more: str) -> str:
        entry = json.loads(json.dumps(stored)) | (change or {})
        entry["per_sensor"]["CTX"] |= own or {}
        rewrite_card(weights, val_loss=entry)
        (found,) = validate(job(weights, *overrides, *more))["checkpoints"]
        return found["stored"]["CTX"]["words"]

    loss = stored["per_sensor"]["CTX"]["loss"]
    assert words() == "equal"
    assert words(own={"loss": loss + 0.25}) == "DIFFERS by -2.50e-01"
    assert words(own={"loss": loss * (1 + 1e-7)}).startswith("equal within rounding (-")
    assert words({"protocol": "q"}) == f"{loss:.4f}, of another protocol"
    assert words({}, None, "seed=10") == f"{loss:.4f}, of another protocol"
    assert words(None, None, "samples=5") == f"{loss:.4f}, of 6 tiles"
    assert "not trained on" in capsys.readouterr().out
    rewrite_card(weights, data_fingerprints={"CTX": "f" * 64})
    (entry,) = validate(job(weights, *overrides))["checkpoints"]
    assert entry["stored"]["CTX"]["words"] == f"{loss:.4f}, of other tiles"
    assert entry["stored"]["CTX"]["difference"] is None
    rewrite_card(weights, val_loss=None)
    (entry,) = validate(job(weights, *overrides))["checkpoints"]
    assert entry["stored"]["CTX"] == {"loss": None, "difference": None, "words": "none stored"}


def _last(run: Path) -> Path:
    return run / "checkpoints" / "samples-000000032"


def test_other_sensors_and_several_corpora_are_fine(run, corpora, capsys):
    given = f"corpora=[{corpora['CTX']},{corpora['THEMIS']}]"
    (entry,) = validate(job(_last(run), given))["checkpoints"]
    own = entry["val_loss"]["per_sensor"]
    assert list(own) == ["CTX", "THEMIS"] and entry["not_trained_on"] == ["THEMIS"]
    assert own["THEMIS"]["count"] == 5 and "per_unit" not in own["THEMIS"]
    assert entry["val_loss"]["count"] == 11
    assert entry["stored"]["CTX"]["words"] == "equal" and entry["stored"]["THEMIS"]["words"] == "none stored"
    line = next(line for line in capsys.readouterr().out.splitlines() if "THEMIS" in line)
    assert line.startswith(" " * 20) and line.endswith("none stored; a sensor it was not trained on")


def test_another_normalisation_is_another_protocol(run):
    (entry,) = validate(job(_last(run), "normalisation=per_tile_minmax"))["checkpoints"]
    assert entry["normalisation"]["policy"] == "per_tile_minmax"
    assert entry["stored"]["CTX"]["words"].endswith("of another protocol")


def test_constants_of_a_sensor_come_from_the_card(corpora):
    sensors = [{"name": "CTX", "tiles": 24, "mean": 2.0, "std": 0.5}, {"name": "HiRISE", "tiles": 2}]
    fields = {"policy": "sensor_zscore", "mean": None, "std": None, "clip": 3.0}
    card = Card(kind="checkpoint", architecture={}, contents=[], normalisation=fields, sensors=sensors)
    expected = Normalisation("sensor_zscore", mean=2.0, std=0.5, clip=3.0)
    assert normalisation_for(card, Corpus(corpora["CTX"])) == expected
    assert normalisation_for(card, Corpus(corpora["CTX"]), "per_tile_minmax") == Normalisation(
        "per_tile_minmax", clip=3.0
    )
    with pytest.raises(
        ConfigError, match=r"no constants for the sensor: THEMIS of .*; constants are there for CTX\..*per_tile_zscore"
    ):
        normalisation_for(card, Corpus(corpora["THEMIS"]))


def test_the_loss_a_card_names_is_the_one_computed(run, tmp_path, corpora):
    tensors, card = load_weights(_last(run))
    results = {}
    for name, loss in {"plain": {"mse": 1.0}, "half": {"mse": 0.5}, "joined": {"mse": 0.5, "gradient": 0.5}}.items():
        weights = tmp_path / name
        weights.mkdir()
        objective = {"mask_ratio": 0.75, "norm_pix_loss": False, "loss": loss}
        save_weights(weights, tensors, dataclasses.replace(card, objective=objective))
        options = [f"corpora=[{corpora['CTX']}]", *(f"{key}={value}" for key, value in OPTIONS.items())]
        (results[name],) = validate(job(weights, *options))["checkpoints"]
    plain, half, joined = (results[name]["val_loss"] for name in ("plain", "half", "joined"))
    assert results["plain"]["stored"]["CTX"]["words"] == "equal"
    assert half["loss"] == pytest.approx(plain["loss"] / 2)
    assert len({entry["protocol"] for entry in (plain, half, joined)}) == 3
    terms = joined["per_sensor"]["CTX"]["terms"]
    assert terms["mse"] == pytest.approx(plain["loss"]) and terms["gradient"] > 0
    assert joined["loss"] == pytest.approx((terms["mse"] + terms["gradient"]) / 2)


# --- what it refuses ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("samples=0", r"samples is out of range: 0\."),
        ("batch_size=-1", r"batch_size is out of range: -1\."),
        ("cache_mb=-1", r"cache_mb is out of range: -1\. Rule: 0 or more"),
        ("normalisation=zscore", "normalisation has an unknown value: 'zscore'"),
        ("weight=x", "unknown configuration key: weight "),
    ],
)
def test_impossible_options_are_refused(run, override, message):
    with pytest.raises(ConfigError, match=message):
        job(run, override)


def test_a_folder_for_out_is_refused_before_anything_is_computed(run, tmp_path):
    with pytest.raises(ConfigError, match=rf"out is a folder: {tmp_path}\. .*use out={tmp_path}/val.json"):
        job(run, f"out={tmp_path}")


def test_weights_that_are_not_there_or_no_run_are_refused(tmp_path, corpora):
    with pytest.raises(CheckpointError, match="the weights are not there or not complete"):
        validate(job(tmp_path / "none", f"corpora=[{corpora['CTX']}]"))
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="this is no run"):
        validate(job(tmp_path / "run"))
    (tmp_path / "run" / "config.yaml").write_text("{}")
    with pytest.raises(CheckpointError, match="the run has no checkpoints"):
        validate(job(tmp_path / "run"))


def test_an_encoder_alone_is_refused(run, tmp_path, corpora):
    tensors, card = load_weights(_last(run))
    encoder = {name: tensor for name, tensor in tensors.items() if not name.startswith(("decoder", "mask"))}
    (tmp_path / "e").mkdir()
    save_weights(tmp_path / "e", encoder, dataclasses.replace(card, contents=["encoder"]))
    with pytest.raises(CheckpointError, match=r"the weights have no decoder: .*e holds encoder\..*checkpoint of a run"):
        validate(job(tmp_path / "e", f"corpora=[{corpora['CTX']}]"))


def test_altered_weights_are_refused(tmp_path, corpora):
    weights = write_weights(tmp_path / "w")
    raw = bytearray((weights / "model.safetensors").read_bytes())
    raw[-5] ^= 1
    (weights / "model.safetensors").write_bytes(raw)
    with pytest.raises(CheckpointError, match="the weights file was altered or damaged"):
        validate(job(weights, f"corpora=[{corpora['CTX']}]"))


def test_without_a_corpus_and_a_run_it_says_so(pico_weights):
    with pytest.raises(ConfigError, match=r"no corpus is given: corpora=\[\] and .*pico lies in no run"):
        validate(job(pico_weights))


def test_corpora_of_the_run_that_moved_are_named(corpora, tmp_path):
    run = write_run(tmp_path / "run", [corpora["CTX"]], steps=1)
    config = json.loads((run / "config.yaml").read_text())
    config["data"]["corpora"].append("gone/themis")
    (run / "config.yaml").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"a corpus of the run is not there: gone/themis\..*where they are now"):
        validate(job(run))
    assert validate(job(run, f"corpora=[{corpora['CTX']}]"))["checkpoints"][0]["stored"]["CTX"]["words"] == "equal"
    (run / "config.yaml").write_text("data: [")
    with pytest.raises(ConfigError, match=r"the configuration of the run cannot be read: .*config\.yaml"):
        validate(job(run))


def test_no_corpus_at_the_given_place_is_told(run, tmp_path):
    with pytest.raises(DataError, match="this is no corpus"):
        validate(job(run, f"corpora=[{tmp_path}]"))


def test_two_corpora_of_one_sensor_are_refused(run, corpora, tiny_corpus):
    with pytest.raises(ConfigError, match="two corpora are of one sensor: .* of CTX, .* of CTX"):
        validate(job(run, f"corpora=[{corpora['CTX']},{tiny_corpus}]"))


def test_tiles_of_another_size_are_refused(run, tmp_path):
    large = write_corpus(tmp_path / "large", tiles=2, val=2, size=64)
    with pytest.raises(CheckpointError, match=r"do not fit the tiles: .* takes 32 pixels, tiles of .*large have 64\."):
        validate(job(run, f"corpora=[{large}]"))


def test_a_corpus_without_validation_tiles_is_refused(run, tmp_path):
    empty = write_corpus(tmp_path / "empty", tiles=3, val=0)
    with pytest.raises(DataError, match="the corpus has no val tile: .*empty"):
        validate(job(run, f"corpora=[{empty}]"))


def test_missing_constants_are_refused_before_anything_is_computed(run):
    with pytest.raises(ConfigError, match="no constants for the sensor: CTX .*; constants are there for none"):
        validate(job(run, "normalisation=sensor_zscore"))


def test_a_damaged_tile_leaves_no_result(run, tmp_path):
    bad = Corpus(write_corpus(tmp_path / "bad", tiles=2, val=6))
    damage(bad, 2)
    with pytest.raises(DataError, match=r"a validation tile cannot be read: CTX_0004 of .*bad"):
        validate(job(run, f"corpora=[{bad.path}]", f"out={tmp_path / 'o.json'}"))
    assert not (tmp_path / "o.json").exists()


def test_a_loss_that_is_no_number_names_checkpoint_and_tile(tmp_path, corpora):
    weights = write_weights(tmp_path / "w")
    tensors, card = load_weights(weights)
    # Finite weights, but the products overflow.
    tensors["decoder_pred.weight"] = torch.full_like(tensors["decoder_pred.weight"], 3e38)
    save_weights(weights, tensors, card)
    with pytest.raises(CheckpointError, match=r"loss is not finite: .*/w: 20 of 20 tiles, for example CTX_0024"):
        validate(job(weights, f"corpora=[{corpora['CTX']}]"))


def test_pico_weights_need_no_card_of_a_run(pico_weights, tiny_corpus):
    (entry,) = validate(job(pico_weights, f"corpora=[{tiny_corpus}]"))["checkpoints"]
    assert entry["name"] == "pico" and entry["samples"] is None and entry["val_loss"]["count"] == 8
