"""Runs of one rank in this process: what they leave, what they refuse."""

from __future__ import annotations

import json
import random
import shutil

import numpy as np
import pytest
import torch

from momo.corpus import Corpus
from momo.errors import CheckpointError, ConfigError, DataError
from momo.models import load_mae
from momo.normalise import Normalisation
from momo.pretrain import pretrain
from momo.pretrain.data import open_sources
from momo.pretrain.validation import summarise, tile_losses
from momo.pretrain.validation_tiles import ValidationTiles
from momo.runs import read_checkpoints, read_metrics
from momo.weights import load_card, load_weights
from tests.conftest import write_corpus, write_weights
from tests.momo.pretrain_helper import final_weights, make_config, train_here

# --- what a run leaves ------------------------------------------------------------------------------------------


def test_run_leaves_the_artefact_the_house_describes(tiny_corpus, tmp_path, one_rank):
    base = write_weights(tmp_path / "base", seed=4)
    config = make_config(
        tmp_path / "run", tiny_corpus, f"base={base}", "model.size=null", "model.patch_size=null",
        "telemetry.reconstructions=2",
    )  # fmt: skip
    run = train_here(config)
    checkpoints = read_checkpoints(run)
    assert [c.samples for c in checkpoints] == [16, 32, 48, 64]
    assert [c.engine.is_dir() for c in checkpoints] == [False, False, False, True]
    assert not list((run / "checkpoints").glob(".*")) and not list(run.glob("resume/*"))
    card = checkpoints[-1].card
    assert card.base_sha256 == load_card(base).sha256 and card.synthetic and card.contents == ["encoder", "decoder"]
    assert card.sensors == [{"name": "CTX", "tiles": 24}]
    assert card.data_fingerprints == {"CTX": Corpus(tiny_corpus).manifest.fingerprint}
    assert card.val_loss["count"] == 8 and card.val_loss["stderr"] > 0
    model, _ = load_mae(checkpoints[-1].path)
    assert torch.equal(model.pos_embed, load_mae(base)[0].pos_embed)
    tiles = ValidationTiles(Corpus(tiny_corpus), Normalisation(), patches=16, limit=100, seed=config.validation.seed)
    again = summarise({"CTX": tile_losses(model, tiles, batch_size=4)}, "p")
    assert again["loss"] == card.val_loss["loss"]
    records = read_metrics(run)
    assert [r["samples"] for r in records if r["event"] == "val"] == [0, 16, 32, 48, 64]
    train = [r for r in records if r["event"] == "train"]
    assert [r["samples"] for r in train] == list(range(16, 65, 16))
    assert records[0]["loss"] > records[-1]["loss"]
    assert all(r["grad_norm"] > 0 and 0 <= r["data_wait"] <= 1 and r["tflops"] > 0 for r in train)
    assert list((run / "tensorboard").glob("events*")) and "mask_ratio" in (run / "config.yaml").read_text()
    summary = json.loads((run / "summary.json").read_text())
    assert summary["complete"] and summary["samples"] == 64 and summary["steps"] == 8 and summary["restarts"] == 0


@pytest.mark.parametrize(
    ("base", "licence", "expected"),
    [
        (None, None, "CC-BY-4.0"),
        ("CC-BY-NC-4.0", None, "CC-BY-NC-4.0"),
        ("CC-BY-NC-4.0", "LicenseRef-agreed", "LicenseRef-agreed"),
        (None, "CC0-1.0", "CC0-1.0"),
    ],
)
def test_weights_have_the_licence_of_their_base(tiny_corpus, tmp_path, one_rank, base, licence, expected):
    options = [f"licence={licence}"] if licence else []
    if base is not None:
        write_weights(tmp_path / "base", licence=base)
        options += [f"base={tmp_path}/base", "model.size=null", "model.patch_size=null"]
    run = train_here(make_config(tmp_path / "run", tiny_corpus, *options), stop_after=16)
    assert [checkpoint.card.licence for checkpoint in read_checkpoints(run)] == [expected]


@pytest.mark.parametrize(
    "options",
    [
        ["train.precision=bf16"],
        ["deepspeed=configs/deepspeed/zero1.json"],
        ["deepspeed=configs/deepspeed/zero2.json"],
        ["deepspeed=configs/deepspeed/zero3.json"],
        ["train.micro_batch=2"],
        ["model.activation_checkpointing=true"],
        ["model.attention=plain"],
        ["data.workers=1"],
    ],
)
def test_ways_of_computing_learn_what_plain_fp32_learns(tiny_corpus, tmp_path, one_rank, options, request, monkeypatch):
    monkeypatch.chdir(request.config.rootpath)
    plain = final_weights(train_here(make_config(tmp_path / "a", tiny_corpus)))
    other = final_weights(train_here(make_config(tmp_path / "b", tiny_corpus, *options)))
    tolerance = 2e-2 if "bf16" in options[0] else 2e-5
    for name, tensor in plain.items():
        assert tensor.dtype == other[name].dtype == torch.float32
        torch.testing.assert_close(tensor, other[name], rtol=0, atol=tolerance)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_compiled_blocks_learn_the_same(tiny_corpus, tmp_path, one_rank):
    plain = final_weights(train_here(make_config(tmp_path / "a", tiny_corpus, "train.samples=16")))
    other = final_weights(
        train_here(make_config(tmp_path / "b", tiny_corpus, "train.samples=16", "model.compile=true"))
    )
    assert plain.keys() == other.keys()
    for name, tensor in plain.items():
        torch.testing.assert_close(tensor, other[name], rtol=0, atol=1e-4)


def test_combined_loss_and_crops_train(tiny_corpus, tmp_path, one_rank):
    weights = ("loss.mse=0.5", "loss.ssim=0.25", "loss.gradient=0.25", "augment.crop_min=0.5", "augment.gsd_jitter=0.3")
    run = train_here(make_config(tmp_path / "run", tiny_corpus, *weights))
    values = [r for r in read_metrics(run) if r["event"] == "val"]
    assert values[-1]["loss"] < values[0]["loss"]
    assert set(values[-1]["per_sensor"]["CTX"]["terms"]) == {"mse", "ssim", "gradient"}
    plain = train_here(make_config(tmp_path / "plain", tiny_corpus))
    assert read_checkpoints(plain)[0].card.val_loss["protocol"] != values[-1]["protocol"]


def test_training_draws_from_no_global_generator(tiny_corpus, tmp_path, one_rank):
    from momo.pretrain.setup import store_config
    from momo.pretrain.trainer import Trainer

    config = make_config(tmp_path / "run", tiny_corpus, "augment.crop_min=0.5")
    store_config(config)
    trainer = Trainer(config, rank=0, ranks=1)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    trainer.train()
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all() and before[2] == random.getstate()


# --- bad input --------------------------------------------------------------------------------------------------


def refuse(tmp_path, error, message, corpus, *overrides):
    with pytest.raises(error, match=message):
        pretrain(make_config(tmp_path / "run", corpus, *overrides))
    assert not (tmp_path / "run").exists()


def test_bad_input_is_refused_before_anything_is_written(tiny_corpus, tmp_path):
    refuse(tmp_path, DataError, "this is no corpus", tmp_path / "nothing")
    refuse(tmp_path, CheckpointError, "the weights are not there", tiny_corpus, "base=nowhere")
    refuse(tmp_path, ConfigError, "the input size is not the tile size", tiny_corpus, "model.image_size=64")
    refuse(tmp_path, ConfigError, "the DeepSpeed file does not exist", tiny_corpus, "deepspeed=none.json")
    base = write_weights(tmp_path / "base")
    refuse(tmp_path, ConfigError, "model.patch_size contradicts the base", tiny_corpus, f"base={base}",
           "model.patch_size=4")  # fmt: skip
    empty = write_corpus(tmp_path / "noval", val=0)
    refuse(tmp_path, DataError, "the corpus has no val tile", empty)
    other = write_corpus(tmp_path / "other", size=40, sensor="HiRISE")
    refuse(tmp_path, ConfigError, "different tile sizes", tiny_corpus, f"data.corpora=[{tiny_corpus},{other}]")
    twin = write_corpus(tmp_path / "twin")
    refuse(tmp_path, ConfigError, "two corpora are of one sensor", tiny_corpus, f"data.corpora=[{tiny_corpus},{twin}]")


def test_altered_shard_is_refused(tiny_corpus, tmp_path):
    shutil.copytree(tiny_corpus, tmp_path / "c")
    shard = tmp_path / "c/shards/train-000000.tar"
    raw = bytearray(shard.read_bytes())
    raw[600] ^= 255
    shard.write_bytes(raw)
    refuse(tmp_path, DataError, "a shard was altered", tmp_path / "c")


def test_encoder_only_base_is_refused(tiny_corpus, tmp_path):
    from momo.weights import save_weights

    base = write_weights(tmp_path / "base")
    tensors, card = load_weights(base)
    save_weights(base, {k: v for k, v in tensors.items() if not k.startswith("decoder")}, card)
    refuse(tmp_path, CheckpointError, "decoder_embed.weight is missing", tiny_corpus, f"base={base}")


def test_continuing_with_another_configuration_is_refused(tiny_corpus, tmp_path, one_rank):
    from momo.pretrain.setup import store_config

    assert store_config(make_config(tmp_path / "run", tiny_corpus)) == []
    free = make_config(tmp_path / "run", tiny_corpus, "ranks=2", "checkpoint.keep_engine=3", "train.micro_batch=2")
    assert store_config(free) == []
    told = store_config(make_config(tmp_path / "run", tiny_corpus, "train.precision=bf16"))
    assert told == ["train.precision was fp32, is bf16"]
    with pytest.raises(ConfigError, match=r"another configuration.*seed was 0, is 1; train.base_lr was 0.001, is 0.01"):
        store_config(make_config(tmp_path / "run", tiny_corpus, "seed=1", "train.base_lr=0.01"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.batch_size=6", r"the batch cannot be dealt evenly: train.batch_size=6, ranks=4.*train.batch_size=8"),
        ("train.micro_batch=3", "the batch cannot be dealt evenly: .*train.micro_batch=3"),
        ("train.micro_batch=0", "train.micro_batch is out of range"),
        ("train.samples=4", "the run is shorter than one step"),
        ("train.precision=fp8", "train.precision has an unknown value"),
        ("train.on_nonfinite=ignore", "train.on_nonfinite has an unknown value"),
        ("train.nonfinite_budget=-1", "train.nonfinite_budget is out of range"),
        ("model.size=huge", "model.size has an unknown value"),
        ("model.attention=flash", "model.attention has an unknown value"),
        ("model.mask_ratio=1.0", "model.mask_ratio is out of range"),
        ("loss.mse=0", "every term of the loss weighs nothing"),
        ("loss.ssim=-1", "loss.ssim is out of range"),
        ("augment.crop_min=0", "augment.crop_min is out of range"),
        ("data.corpora=[]", "no corpus is given"),
        ("data.corpora=[a,a]", "a corpus is named twice"),
        ("data.normalisation=minmax", "did you mean 'per_tile_minmax'"),
        ("data.order=random", "data.order has an unknown value"),
        ("data.pipe=cat", r"data.pipe names no shard: cat\. Rule: \{url\}"),
        ("data.workers=-1", "data.workers is out of range"),
        ("data.cache_mb=-1", "data.cache_mb is out of range"),
        ("resume=yes_please", "resume has an unknown value"),
        ("timeout_s=0", "timeout_s is out of range"),
        ("checkpoint.resume_every=0", "checkpoint.resume_every is out of range"),
        ("train.sample=10", "did you mean 'train.samples'"),
    ],
)
def test_configuration_errors(tmp_path, override, message):
    with pytest.raises(ConfigError, match=message):
        make_config(tmp_path / "r", tmp_path / "c", "ranks=4", override)


def test_launcher_with_another_number_of_ranks(tiny_corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    message = "the launcher started another number of ranks: WORLD_SIZE=2, ranks=4"
    refuse(tmp_path, ConfigError, message, tiny_corpus, "ranks=4")


def test_sources_of_two_sensors_share_one_order(tiny_corpus, tmp_path):
    other = write_corpus(tmp_path / "h", sensor="HiRISE", tiles=6, val=2)
    sources = open_sources(
        make_config(tmp_path / "r", tiny_corpus, f"data.corpora=[{tiny_corpus},{other}]"), verify=True
    )
    assert sources.bounds.tolist() == [0, 24, 30]
    assert json.loads(json.dumps(sources.card_sensors())) == [
        {"name": "CTX", "tiles": 24},
        {"name": "HiRISE", "tiles": 6},
    ]
