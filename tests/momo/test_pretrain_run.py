"""Runs of one rank in this process: what they leave, how they go on, what they refuse."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from momo.corpus import Corpus
from momo.errors import CheckpointError, ConfigError, DataError, MomoError
from momo.models import load_mae
from momo.normalise import Normalisation
from momo.pretrain import pretrain
from momo.pretrain.checkpoint import latest_resumable
from momo.pretrain.data import open_sources
from momo.pretrain.validation import summarise, tile_losses
from momo.pretrain.validation_tiles import ValidationTiles
from momo.runs import find_checkpoints, read_checkpoints, read_metrics
from momo.weights import load_card, load_weights
from tests.conftest import write_corpus, write_weights
from tests.momo.pretrain_helper import final_weights, make_config, same_weights, train_here


def incidents(run: Path) -> list[dict]:
    return [record for record in read_metrics(run) if record["event"] == "incident"]


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


# --- going on ---------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Ends a run in the middle of a step, as a kill would."""


@pytest.fixture
def interfere(monkeypatch):
    """Runs a job and calls a function with the inputs of the step that begins at a sample."""
    from momo.pretrain import trainer as module
    from momo.pretrain.setup import store_config

    def run(config, at: int, act) -> bool:
        store_config(config)
        trainer = module.Trainer(config, rank=0, ranks=1)
        plain = module.to_inputs
        with monkeypatch.context() as patch:
            patch.setattr(
                module,
                "to_inputs",
                lambda batch, **o: act(*plain(batch, **o)) if trainer.samples == at else plain(batch, **o),
            )
            return trainer.train()

    return run


def kill(*_inputs):
    raise Killed


@pytest.mark.parametrize("options", [[], ["train.precision=bf16", "deepspeed=configs/deepspeed/zero3.json"]])
def test_killed_run_equals_the_straight_one(tiny_corpus, tmp_path, one_rank, options, request, monkeypatch, interfere):
    monkeypatch.chdir(request.config.rootpath)
    straight = train_here(make_config(tmp_path / "a", tiny_corpus, *options))
    config = make_config(tmp_path / "b", tiny_corpus, "checkpoint.keep_engine=2", *options)
    with pytest.raises(Killed):
        interfere(config, 56, kill)
    assert [c.engine.is_dir() for c in find_checkpoints(tmp_path / "b")] == [False, True, True]
    resumed = train_here(config)
    assert same_weights(straight, resumed)
    lines = [
        [(r["samples"], r["loss"]) for r in read_metrics(run) if r["event"] != "incident"]
        for run in (straight, resumed)
    ]
    assert lines[0] == lines[1]
    assert [r["kind"] for r in incidents(resumed)] == ["resumed"]
    assert json.loads((resumed / "summary.json").read_text())["restarts"] == 1


@pytest.mark.parametrize("at", [8, 24, 32, 40])
def test_states_between_checkpoints_are_resumed_and_not_selected(tiny_corpus, tmp_path, one_rank, at, interfere):
    straight = train_here(make_config(tmp_path / "a", tiny_corpus))
    config = make_config(tmp_path / "b", tiny_corpus, "checkpoint.resume_every=8", "validation.every=32")
    with pytest.raises(Killed):
        interfere(config, at, kill)
    assert latest_resumable(tmp_path / "b").samples == at
    assert [path.name for path in (tmp_path / "b/resume").glob("*")] == [f"samples-{at:09d}"] * (at != 32)
    train_here(config)
    assert [c.samples for c in read_checkpoints(tmp_path / "b")] == [32, 64]
    assert not list((tmp_path / "b/resume").glob("*"))
    assert same_weights(straight, tmp_path / "b")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_the_state_and_the_run_goes_on(tiny_corpus, tmp_path, one_rank, interfere, number):
    straight = train_here(make_config(tmp_path / "a", tiny_corpus))
    config = make_config(tmp_path / "b", tiny_corpus)

    def send(*inputs):
        os.kill(os.getpid(), number)
        return inputs

    assert interfere(config, 32, send) is False
    assert latest_resumable(tmp_path / "b").path == tmp_path / "b/resume/samples-000000040"
    (told,) = incidents(tmp_path / "b")
    assert (told["kind"], told["samples"], told["name"]) == ("signal", 40, number.name)
    assert not json.loads((tmp_path / "b/summary.json").read_text())["complete"]
    assert same_weights(straight, train_here(config))


def test_resume_never_and_must(tiny_corpus, tmp_path, one_rank, monkeypatch):
    for key in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(key)
    with pytest.raises(ConfigError, match="there is nothing to resume"):
        pretrain(make_config(tmp_path / "run", tiny_corpus, "resume=must"))
    train_here(make_config(tmp_path / "run", tiny_corpus))
    with pytest.raises(ConfigError, match="there is a run already"):
        pretrain(make_config(tmp_path / "run", tiny_corpus, "resume=never"))
    pretrain(make_config(tmp_path / "run", tiny_corpus, "resume=must"))


def test_a_moved_run_and_corpus_go_on(tiny_corpus, tmp_path, one_rank):
    straight = train_here(make_config(tmp_path / "a", tiny_corpus))
    train_here(make_config(tmp_path / "b", tiny_corpus), stop_after=32)
    shutil.move(tmp_path / "b", tmp_path / "moved")
    shutil.copytree(tiny_corpus, tmp_path / "corpus")
    assert same_weights(straight, train_here(make_config(tmp_path / "moved", tmp_path / "corpus")))


def test_a_run_goes_on_from_its_uploaded_copy(tiny_corpus, tmp_path, one_rank):
    straight = train_here(make_config(tmp_path / "a", tiny_corpus))
    config = make_config(tmp_path / "b", tiny_corpus, f"checkpoint.upload={tmp_path}/copy")
    train_here(config, stop_after=32)
    shutil.rmtree(tmp_path / "b")
    (copied,) = [path.parent for path in (tmp_path / "copy").rglob("config.yaml")]
    shutil.copytree(copied, tmp_path / "b")
    assert latest_resumable(tmp_path / "b").samples == 32
    assert same_weights(straight, train_here(config))
    assert [r["checkpoint"] for r in incidents(tmp_path / "b") if r["kind"] == "uploaded"]


def test_exchanged_corpus_or_base_is_not_continued(tmp_path, one_rank, monkeypatch):
    corpus, base = write_corpus(tmp_path / "c"), write_weights(tmp_path / "base")
    config = make_config(tmp_path / "run", corpus, f"base={base}", "model.size=null", "model.patch_size=null")
    train_here(config, stop_after=16)
    for key in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(key)
    shutil.rmtree(corpus)
    write_corpus(corpus, seed=9)
    with pytest.raises(DataError, match=r"started on other data or another base: CTX was \w{12}, is \w{12}\."):
        pretrain(config)
    accepting = dataclasses.replace(config, data=dataclasses.replace(config.data, accept_changed_corpus=True))
    train_here(accepting, stop_after=32)
    assert read_checkpoints(tmp_path / "run")[-1].card.data_fingerprints == {"CTX": Corpus(corpus).manifest.fingerprint}
    shutil.rmtree(base)
    write_weights(base, seed=9)
    with pytest.raises(DataError, match=r"base was \w{12}, is \w{12}"):
        pretrain(accepting)


def test_finished_run_is_left_alone(tiny_corpus, tmp_path, one_rank, capsys, monkeypatch):
    config = make_config(tmp_path / "run", tiny_corpus)
    run = train_here(config)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    for key in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(key)
    assert pretrain(config) == run
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    assert "complete already" in capsys.readouterr().out


# --- numbers that are not finite, damaged tiles ------------------------------------------------------------------


def poison(image, valid, noise):
    """Makes the second tile of each micro-batch NaN, as a broken memory cell would."""
    image = image.clone()
    image[1, :, :4] = float("nan")
    return image, valid, noise


@pytest.mark.parametrize("policy", ["skip", "reload"])
@pytest.mark.parametrize("stage", [0, 2])
def test_a_poisoned_step_is_left_out_told_and_the_run_goes_on(
    tiny_corpus, tmp_path, one_rank, interfere, policy, stage, request, monkeypatch
):
    monkeypatch.chdir(request.config.rootpath)
    run = tmp_path / "run"
    options = (f"train.on_nonfinite={policy}", f"deepspeed=configs/deepspeed/zero{stage}.json", "train.micro_batch=4")
    assert interfere(make_config(run, tiny_corpus, *options), 40, poison)
    assert all(torch.isfinite(tensor).all() for tensor in final_weights(run).values())
    (told,) = incidents(run)
    assert told["kind"] == ("skipped_step" if policy == "skip" else "reloaded")
    assert (told["samples"], told["step"], told["ranks"]) == (40 if policy == "skip" else 32, 5, [0])
    assert len(told["keys"]) == 2 and all(key.startswith("CTX_") for key in told["keys"])
    assert {"decoder", "blocks.0"} <= set(told["groups"])
    state = json.loads((run / "checkpoints/samples-000000064/engine/state.json").read_text())
    assert state["left_out"] == [40] and state["optimizer_steps"] == 7 and state["totals"]["skipped_steps"] == 1
    # Both policies end with the weights of a run that never took the step, also when it is resumed later.
    other = make_config(tmp_path / "other", tiny_corpus, *options, "checkpoint.resume_every=8")
    calls = []

    def poison_once_then_kill(*inputs):
        calls.append(inputs)
        return poison(*inputs)

    interfere(other, 40, poison_once_then_kill)
    assert calls and same_weights(run, tmp_path / "other")


@pytest.mark.parametrize("options", [
    ["train.precision=fp32"], ["deepspeed=configs/deepspeed/zero2.json"], ["deepspeed=configs/deepspeed/zero3.json"],
    ["train.precision=bf16"],
])  # fmt: skip
def test_an_infinite_loss_with_finite_gradients_is_left_out_too(
    tiny_corpus, tmp_path, one_rank, interfere, options, request, monkeypatch
):
    monkeypatch.chdir(request.config.rootpath)
    config = make_config(tmp_path / "run", tiny_corpus, "train.samples=48", "validation.every=48", *options)

    def huge(image, valid, noise):
        # The sum of squares is no float32 number; its derivative is.
        return image * 1e18, valid, noise

    assert interfere(config, 40, huge)
    (told,) = incidents(tmp_path / "run")
    assert told["kind"] == "skipped_step" and told["ranks"] == [0] and len(told["keys"]) == 8
    state = json.loads((tmp_path / "run/checkpoints/samples-000000048/engine/state.json").read_text())
    assert state["optimizer_steps"] == 5 and state["left_out"] == [40]


def test_gradients_that_are_no_numbers_are_named_by_part(tiny_corpus, tmp_path, one_rank, interfere, monkeypatch):
    from momo.pretrain import trainer as module

    config = make_config(tmp_path / "run", tiny_corpus)
    hooks = []

    class Watched(module.Trainer):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            bias = self.engine.model.decoder_norm.bias
            hooks.append(bias.register_hook(lambda g: g * float("nan") if self.samples == 40 else g))

    monkeypatch.setattr(module, "Trainer", Watched)
    assert interfere(config, -1, poison)
    (told,) = incidents(tmp_path / "run")
    assert hooks and told["kind"] == "skipped_step" and (told["ranks"], told["groups"]) == ([], ["decoder"])


def test_policy_stop_and_the_budget_end_the_run(tiny_corpus, tmp_path, one_rank, interfere):
    for options in (["train.on_nonfinite=stop"], ["train.nonfinite_budget=0"]):
        config = make_config(tmp_path / options[0], tiny_corpus, *options)
        with pytest.raises(MomoError, match=r"training diverged: .*rank 0 at step 5 \(40 samples\); tiles CTX_\d+"):
            interfere(config, 40, poison)
        assert [c.samples for c in find_checkpoints(Path(config.out))] == [16, 32]


@pytest.mark.parametrize("stage", [0, 2])
def test_divergence_is_told_and_old_checkpoints_stay(tiny_corpus, tmp_path, one_rank, stage, request, monkeypatch):
    monkeypatch.chdir(request.config.rootpath)
    train_here(make_config(tmp_path / "run", tiny_corpus), stop_after=16)
    (tmp_path / "run/config.yaml").unlink()
    zero = f"deepspeed=configs/deepspeed/zero{stage}.json"
    with pytest.raises(MomoError, match=r"not finite|diverged"):
        train_here(make_config(tmp_path / "run", tiny_corpus, "train.base_lr=1e38", zero))
    assert [c.samples for c in find_checkpoints(tmp_path / "run")] == [16]


def damaged(corpus: Path, folder: Path) -> Path:
    shutil.copytree(corpus, folder)
    shard = folder / "shards/train-000000.tar"
    raw = bytearray(shard.read_bytes())
    raw[1536:1700] = b"\xff" * 164
    shard.write_bytes(raw)
    return folder


def test_damaged_tiles_are_skipped_counted_and_bounded(tiny_corpus, tmp_path, one_rank):
    corpus = damaged(tiny_corpus, tmp_path / "c")
    run = train_here(make_config(tmp_path / "skip", corpus))
    told = [r for r in incidents(run) if r["kind"] == "corrupt_tile"]
    assert told and {r["key"] for r in told} == {"CTX_0000"} and all(r["reason"] for r in told)
    assert json.loads((run / "summary.json").read_text())["corrupt_tiles"] == len(told)
    with pytest.raises(
        DataError, match=r"too many damaged tiles: 1; the last: CTX_0000 \(.+\)\. Rule: at most data.corr"
    ):
        train_here(make_config(tmp_path / "budget", corpus, "data.corrupt_budget=0"))
    with pytest.raises(DataError, match="CTX_0000"):
        train_here(make_config(tmp_path / "stop", corpus, "data.on_corrupt=stop"))


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
