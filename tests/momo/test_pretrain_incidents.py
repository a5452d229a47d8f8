"""Numbers that are not finite and damaged tiles: left out, told, bounded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from momo.errors import DataError, MomoError
from momo.pretrain.checkpoint import latest_resumable
from momo.pretrain.engine import Engine
from momo.pretrain.state import load_state
from momo.runs import find_checkpoints
from tests.momo.pretrain_helper import final_weights, incidents, make_config, same_weights, train_here


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


def overflow(image, valid, noise):
    return image * 1e18, valid, noise


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_step_left_out_under_fp16_lets_the_loss_scale_be(
    tiny_corpus, tmp_path, one_rank, interfere, stage, request, monkeypatch
):
    monkeypatch.chdir(request.config.rootpath)
    options = (
        "train.precision=fp16", f"deepspeed=configs/deepspeed/zero{stage}.json", "validation.every=64",
        "checkpoint.resume_every=40",
    )  # fmt: skip
    before = train_here(make_config(tmp_path / "before", tiny_corpus, *options), stop_after=40)
    config = make_config(tmp_path / "run", tiny_corpus, *options, "train.samples=48", "validation.every=48")
    assert interfere(config, 40, overflow)
    assert [told["kind"] for told in incidents(tmp_path / "run")] == ["skipped_step"]
    scales = [load_state(latest_resumable(run).path)[0].loss_scale for run in (before, tmp_path / "run")]
    assert scales[0] == scales[1] and scales[0]["cur_scale"] > 1 and scales[0]["cur_iter"] == 5


def test_a_step_can_be_left_out_at_the_floor_of_the_loss_scale(tiny_corpus, tmp_path, one_rank, interfere, monkeypatch):
    discard = Engine.discard_step

    def discard_at_the_floor(self):
        scaler = self.deepspeed.optimizer.loss_scaler
        scaler.cur_scale = scaler.min_scale
        discard(self)
        assert scaler.cur_scale == scaler.min_scale

    monkeypatch.setattr(Engine, "discard_step", discard_at_the_floor)
    assert interfere(make_config(tmp_path / "run", tiny_corpus, "train.precision=fp16"), 40, overflow)
    assert [told["kind"] for told in incidents(tmp_path / "run")] == ["skipped_step"]


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
