"""Runs of one rank that were killed, stopped or moved go on as if nothing had been."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal

import pytest

from momo.corpus import Corpus
from momo.errors import ConfigError, DataError
from momo.pretrain import pretrain
from momo.pretrain.checkpoint import latest_resumable
from momo.runs import find_checkpoints, read_checkpoints, read_metrics
from tests.conftest import write_corpus, write_weights
from tests.momo.pretrain_helper import incidents, make_config, same_weights, train_here


class Killed(BaseException):
    """Ends a run in the middle of a step, as a kill would."""


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
