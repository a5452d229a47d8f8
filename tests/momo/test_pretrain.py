"""Pretraining: order, masks, validation, and kill-and-resume with real ranks under DeepSpeed."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from momo.config import load_config
from momo.corpus import Corpus
from momo.errors import CheckpointError, ConfigError, DataError, MomoError
from momo.models import build_mae, load_mae
from momo.normalise import Normalisation
from momo.pretrain import PretrainConfig, pretrain
from momo.pretrain.data import TrainTiles, ValidationTiles, open_sources
from momo.pretrain.optimisation import learning_rate, parameter_groups
from momo.pretrain.plan import SamplePlan
from momo.pretrain.validation import LossEstimate, protocol_hash, summarise, tile_losses
from momo.runs import find_checkpoints, read_checkpoints, read_metrics
from momo.weights import load_card, load_weights
from tests.conftest import PICO, write_corpus, write_weights


def make_config(out: Path, corpus: Path, *overrides: str) -> PretrainConfig:
    items = [
        f"out={out}", f"data.corpora=[{corpus}]", "model.size=pico", "model.patch_size=8", "train.samples=64",
        "train.batch_size=8", "train.precision=fp32", "train.log_every=2", "train.warmup_samples=8",
        "validation.every=16", "validation.batch_size=4",
    ]  # fmt: skip
    return load_config(PretrainConfig, None, [*items, *overrides])


@pytest.fixture(scope="module")
def _group(tmp_path_factory):
    # One group for the module: DeepSpeed remembers the first one it sees.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    store = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def one_rank(_group, monkeypatch):
    """A process group of one in this process, so that a trainer runs without starting another."""
    for key, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(key, value)


def train_here(config: PretrainConfig, *, stop_after: int | None = None) -> Path:
    from momo.pretrain.setup import store_config
    from momo.pretrain.trainer import Trainer

    store_config(config)
    trainer = Trainer(config, rank=0, ranks=1)
    if stop_after is not None:
        trainer.stop = stop_after
    trainer.train()
    return Path(config.out)


def final_weights(run: Path) -> dict[str, torch.Tensor]:
    return load_weights(read_checkpoints(run)[-1].path)[0]


# --- order ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_global_batches_do_not_depend_on_ranks(ranks):
    plan = SamplePlan("f", 11, seed=3)
    shares = [list(plan.batches(start=0, stop=40, batch_size=8, rank=r, ranks=ranks)) for r in range(ranks)]
    joined = [[place for share in step for place in share] for step in zip(*shares, strict=True)]
    assert joined == list(SamplePlan("f", 11, seed=3).batches(start=0, stop=40, batch_size=8, rank=0, ranks=1))
    visited = [tile for step in joined for _, tile in step]
    assert sorted(visited[:11]) == sorted(visited[11:22]) == list(range(11)) and visited[:11] != visited[11:22]


@pytest.mark.parametrize("start", [8, 16, 24])
def test_plan_resumes_at_any_step_and_across_an_epoch(start):
    whole = list(SamplePlan("f", 12, 0).batches(start=0, stop=48, batch_size=8, rank=0, ranks=1))
    rest = list(SamplePlan("f", 12, 0).batches(start=start, stop=48, batch_size=8, rank=0, ranks=1))
    assert rest == whole[start // 8 :]


def test_learning_rate_follows_the_schedule():
    options = load_config(PretrainConfig, None, ["out=o", "data.corpora=[c]", "train.samples=1000",
                          "train.batch_size=128", "train.warmup_samples=100", "train.base_lr=0.002"]).train  # fmt: skip
    assert learning_rate(options, 0) == 0
    assert learning_rate(options, 50) == pytest.approx(0.0005)
    assert learning_rate(options, 100) == pytest.approx(0.001)
    assert learning_rate(options, 550) == pytest.approx(0.0005)
    assert learning_rate(options, 1000) == pytest.approx(0)


def test_biases_norms_and_tokens_are_not_decayed():
    model = build_mae(PICO, seed=0)
    decayed, plain = (group["params"] for group in parameter_groups(model, 0.05))
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)] for p in plain} >= {"cls_token", "mask_token", "norm.weight", "decoder_pred.bias"}
    assert all(p.ndim > 1 for p in decayed)
    fixed = {"pos_embed", "decoder_pos_embed"}
    assert len(decayed) + len(plain) == len(list(model.parameters())) - len(fixed)


def test_cached_tiles_equal_tiles_read_anew(tiny_corpus, tmp_path):
    sources = open_sources(make_config(tmp_path / "r", tiny_corpus), verify=False)
    plain, cached = (TrainTiles(sources, patches=16, augment=True, seed=1, cache_mb=megabytes) for megabytes in (0, 1))
    for place in [(0, 3), (0, 4), (1, 3), (2, 3), (1, 4)]:
        first, second = plain[place], cached[place]
        assert first["key"] == second["key"]
        assert all(torch.equal(first[name], second[name]) for name in ("stored", "valid", "affine", "noise"))
    assert not torch.equal(plain[(0, 3)]["noise"], plain[(1, 3)]["noise"])


# --- validation -------------------------------------------------------------------------------------------------


@pytest.fixture
def validation_tiles(tiny_corpus):
    return ValidationTiles(Corpus(tiny_corpus), Normalisation(), patches=16, limit=100, seed=1)


def test_validation_loss_is_a_function_of_the_weights_alone(validation_tiles):
    model = build_mae(PICO, seed=0).train()
    first = tile_losses(model, validation_tiles, batch_size=3)
    torch.manual_seed(99)
    assert torch.equal(first, tile_losses(model, validation_tiles, batch_size=3)) and model.training
    torch.testing.assert_close(first, tile_losses(model, validation_tiles, batch_size=8), rtol=1e-5, atol=1e-6)
    other = tile_losses(build_mae(PICO, seed=1), validation_tiles, batch_size=3)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("ranks", [2, 3])
def test_shares_of_the_ranks_add_up_bit_for_bit(validation_tiles, ranks):
    model = build_mae(PICO, seed=0)
    whole = tile_losses(model, validation_tiles, batch_size=3)
    shares = [tile_losses(model, validation_tiles, batch_size=3, rank=r, ranks=ranks) for r in range(ranks)]
    assert torch.equal(sum(shares), whole)


def test_subset_is_fixed_and_of_the_size_asked_for(tiny_corpus):
    picks = [
        ValidationTiles(Corpus(tiny_corpus), Normalisation(), patches=16, limit=5, seed=s).positions for s in (1, 1, 2)
    ]
    assert picks[0] == picks[1] != picks[2] and len(set(picks[0])) == 5


def test_mean_and_standard_error_by_hand():
    estimate = LossEstimate.of(torch.tensor([1.0, 2.0, 3.0, 6.0]))
    assert (estimate.loss, estimate.count) == (3.0, 4)
    assert estimate.stderr == pytest.approx(np.std([1, 2, 3, 6], ddof=1) / 2)
    assert LossEstimate.of(torch.tensor([1.0])).to_dict()["stderr"] is None


def test_protocol_changes_with_everything_but_the_weights():
    model = build_mae(PICO, seed=0)
    base = protocol_hash(model, Normalisation(), 1)
    assert base == protocol_hash(build_mae(PICO, seed=5), Normalisation(), 1)
    changed = [
        protocol_hash(model, Normalisation(), 2),
        protocol_hash(model, Normalisation("per_tile_minmax"), 1),
        protocol_hash(build_mae(PICO, seed=0, mask_ratio=0.5), Normalisation(), 1),
        protocol_hash(build_mae(PICO, seed=0, norm_pix_loss=True), Normalisation(), 1),
        protocol_hash(build_mae(dataclasses.replace(PICO, in_chans=3), seed=0), Normalisation(), 1),
    ]
    assert len({base, *changed}) == 6


def test_non_finite_validation_loss_is_refused():
    with pytest.raises(CheckpointError, match="the validation loss is not finite: 1 of 2 tiles"):
        summarise({"CTX": torch.tensor([1.0, float("nan")])}, "p")


# --- one rank, in this process ----------------------------------------------------------------------------------


def test_run_leaves_the_artefact_the_house_describes(tiny_corpus, tmp_path, one_rank):
    base = write_weights(tmp_path / "base", seed=4)
    config = make_config(tmp_path / "run", tiny_corpus, f"base={base}", "model.size=null", "model.patch_size=null")
    run = train_here(config)
    checkpoints = read_checkpoints(run)
    assert [c.samples for c in checkpoints] == [16, 32, 48, 64]
    assert [c.engine.is_dir() for c in checkpoints] == [False, False, False, True]
    assert not list((run / "checkpoints").glob(".*"))
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
    assert [r["samples"] for r in records if r["event"] == "train"] == list(range(16, 65, 16))
    assert records[0]["loss"] > records[-1]["loss"]
    assert list((run / "tensorboard").glob("events*")) and "mask_ratio" in (run / "config.yaml").read_text()


def test_interrupted_run_equals_the_straight_one(tiny_corpus, tmp_path, one_rank):
    straight = train_here(make_config(tmp_path / "a", tiny_corpus))
    train_here(make_config(tmp_path / "b", tiny_corpus, "keep_engine=2"), stop_after=40)
    # As if killed after the checkpoint at 32: the one at 40 is due to the early stop alone.
    shutil.rmtree(tmp_path / "b/checkpoints/samples-000000040")
    assert [c.engine.is_dir() for c in find_checkpoints(tmp_path / "b")] == [False, True]
    resumed = train_here(make_config(tmp_path / "b", tiny_corpus))
    first, second = final_weights(straight), final_weights(resumed)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("options", [["train.precision=bf16"], ["deepspeed=configs/deepspeed/zero1.json"],
                                     ["deepspeed=configs/deepspeed/zero2.json"]])  # fmt: skip
def test_bf16_and_zero_stages_learn_what_plain_fp32_learns(
    tiny_corpus, tmp_path, one_rank, options, request, monkeypatch
):
    monkeypatch.chdir(request.config.rootpath)
    plain = final_weights(train_here(make_config(tmp_path / "a", tiny_corpus)))
    other = final_weights(train_here(make_config(tmp_path / "b", tiny_corpus, *options)))
    tolerance = 2e-2 if "bf16" in options[0] else 1e-5
    for name, tensor in plain.items():
        assert tensor.dtype == other[name].dtype == torch.float32
        torch.testing.assert_close(tensor, other[name], rtol=0, atol=tolerance)


def test_divergence_is_told_and_old_checkpoints_stay(tiny_corpus, tmp_path, one_rank):
    config = make_config(tmp_path / "run", tiny_corpus)
    train_here(config, stop_after=16)
    (tmp_path / "run/config.yaml").unlink()
    with pytest.raises(MomoError, match=r"not finite|diverged"):
        train_here(make_config(tmp_path / "run", tiny_corpus, "train.base_lr=1e38"))
    assert [c.samples for c in find_checkpoints(tmp_path / "run")] == [16]


# --- real ranks -------------------------------------------------------------------------------------------------

SCRIPT = """
import sys
from pathlib import Path
from momo.pretrain import PretrainConfig, pretrain
from momo.config import load_config
if __name__ == "__main__":
    pretrain(load_config(PretrainConfig, Path(sys.argv[1]), sys.argv[2:]))
"""


def start_job(folder: Path, config: PretrainConfig, *overrides: str) -> subprocess.Popen[bytes]:
    from momo.config import to_yaml

    (folder / "job.py").write_text(SCRIPT)
    (folder / "job.yaml").write_text(to_yaml(config))
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    command = [sys.executable, str(folder / "job.py"), str(folder / "job.yaml"), *overrides]
    return subprocess.Popen(command, env=environment, start_new_session=True)


@pytest.mark.slow
def test_two_ranks_killed_and_resumed_give_the_same_bytes(tmp_path):
    corpus = write_corpus(tmp_path / "c", tiles=48, val=8)
    sizes = ("ranks=2", "train.samples=960", "validation.every=240")
    assert start_job(tmp_path, make_config(tmp_path / "straight", corpus, *sizes)).wait(200) == 0
    job = start_job(tmp_path, make_config(tmp_path / "killed", corpus, *sizes))
    deadline = time.monotonic() + 120
    while not find_checkpoints(tmp_path / "killed") and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(job.pid, signal.SIGKILL)
    job.wait(30)
    done = [c.samples for c in find_checkpoints(tmp_path / "killed")]
    assert done and done[-1] < 960, "the job must be killed between its first and last checkpoint"
    assert start_job(tmp_path, make_config(tmp_path / "killed", corpus, *sizes)).wait(200) == 0
    hashes = [[c.card.sha256 for c in read_checkpoints(tmp_path / name)] for name in ("straight", "killed")]
    assert hashes[0] == hashes[1] and len(hashes[0]) == 4
    vals = [[r for r in read_metrics(tmp_path / n) if r["event"] == "val"] for n in ("straight", "killed")]
    assert vals[0] == vals[1]


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
    shutil.rmtree(base)
    write_weights(base, seed=9)
    with pytest.raises(DataError, match=r"CTX was .*; base was \w{12}, is \w{12}"):
        pretrain(config)


@pytest.mark.slow
def test_an_error_of_a_rank_is_told_once_by_the_launching_process(tiny_corpus, tmp_path, capfd):
    config = make_config(tmp_path / "run", tiny_corpus, "ranks=2", "train.base_lr=1e38", "train.warmup_samples=1000")
    with pytest.raises(MomoError, match=r"not finite|diverged"):
        pretrain(config)
    out, err = capfd.readouterr()
    assert "Traceback" not in out + err
    assert "train.warmup_samples=1,000 is cut to a tenth of the run" in out


def test_finished_run_is_left_alone(tiny_corpus, tmp_path, one_rank, capsys, monkeypatch):
    config = make_config(tmp_path / "run", tiny_corpus)
    run = train_here(config)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    for key in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(key)
    assert pretrain(config) == run
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    assert "complete already" in capsys.readouterr().out


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

    store_config(make_config(tmp_path / "run", tiny_corpus))
    store_config(make_config(tmp_path / "run", tiny_corpus, "ranks=2", "keep_engine=3"))
    with pytest.raises(ConfigError, match=r"another configuration.*seed was 0, is 1; train.base_lr was 0.001, is 0.01"):
        store_config(make_config(tmp_path / "run", tiny_corpus, "seed=1", "train.base_lr=0.01"))


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "not JSON"), ('{"bf16": {}}', "sets what momo fills in: bf16"),
     ('{"zero_optimization": {"stage": 3}}', "the ZeRO stage is not supported: 3")],
)  # fmt: skip
def test_bad_deepspeed_json(tiny_corpus, tmp_path, content, message):
    (tmp_path / "ds.json").write_text(content)
    refuse(tmp_path, ConfigError, message, tiny_corpus, f"deepspeed={tmp_path}/ds.json")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.batch_size=6", "the batch cannot be dealt evenly"),
        ("train.samples=4", "the run is shorter than one step"),
        ("train.precision=fp8", "train.precision has an unknown value"),
        ("model.size=huge", "model.size has an unknown value"),
        ("model.mask_ratio=1.0", "model.mask_ratio is out of range"),
        ("data.corpora=[]", "no corpus is given"),
        ("data.corpora=[a,a]", "a corpus is named twice"),
        ("data.normalisation=minmax", "did you mean 'per_tile_minmax'"),
        ("data.workers=-1", "data.workers is out of range"),
        ("data.cache_mb=-1", "data.cache_mb is out of range"),
        ("train.sample=10", "did you mean 'train.samples'"),
    ],
)
def test_configuration_errors(tmp_path, override, message):
    with pytest.raises(ConfigError, match=message):
        make_config(tmp_path / "r", tmp_path / "c", "ranks=4", override)


def test_launcher_with_another_number_of_ranks(tiny_corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    refuse(tmp_path, ConfigError, "the launcher started another number of ranks: WORLD_SIZE=2, ranks=1", tiny_corpus)


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
