"""Ranks of one machine: what ended them is told once, and signals reach them at any moment."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch.multiprocessing

from momo.errors import DataError, LostRankError, MomoError
from momo.pretrain.local_ranks import _cause, _told, run_ranks, tell
from tests.conftest import write_corpus
from tests.momo.pretrain_helper import make_config, start_job


def die(rank: int, ranks: int, store: str, fields: dict[str, Any]) -> None:
    """A rank that ends as `fields` says; the others notice and say that they lost it."""
    ready = Path(store).with_name("ready")
    if rank != fields["rank"]:
        while not ready.exists():
            time.sleep(0.01)
        time.sleep(0.2)
        tell(LostRankError("the connection to another rank was lost", seen="peer"), Path(store), rank)
        os._exit(2)
    ready.touch()
    if fields["how"] == "error":
        time.sleep(0.6)  # the others speak before
        tell(DataError("the disk is full", seen="/d", rule="room", fix="make room"), Path(store), rank)
        os._exit(2)
    if fields["how"] == "code":
        os._exit(3)
    os.kill(os.getpid(), fields["how"])


@pytest.mark.parametrize(
    ("rank", "how", "text"),
    [
        (1, "error", "the disk is full: /d. Rule: room. Next: make room."),
        (
            1,
            signal.SIGKILL,
            "a training process died: rank {rank}, SIGKILL (the machine may be out of memory). Rule: all",
        ),
        (
            0,
            signal.SIGSEGV,
            "a training process died: rank {rank}, SIGSEGV. Rule: all ranks run to the end. Next: start",
        ),
    ],
)
def test_the_cause_is_told_and_not_its_consequence(rank, how, text):
    with pytest.raises(MomoError) as caught:
        run_ranks(die, 2, {"rank": rank, "how": how})
    assert str(caught.value).startswith(text.format(rank=rank))


def test_a_rank_that_ends_without_a_word():
    with pytest.raises(MomoError, match="a training process died: rank 0, exit code 3"):
        run_ranks(die, 1, {"rank": 0, "how": "code"})


EXITED = torch.multiprocessing.ProcessExitedException("", error_index=0, error_pid=1, exit_code=2)
LOST, FULL = LostRankError("lost"), DataError("full")


@pytest.mark.parametrize(
    ("killed", "told", "stopping", "expected"),
    [
        ({1: 9}, LOST, False, "a training process died: rank 1, SIGKILL"),
        ({1: 9}, LOST, True, "a training process died: rank 1, SIGKILL"),
        ({0: 11, 1: 11}, None, False, "a training process died: rank 0, SIGSEGV, rank 1, SIGSEGV"),
        ({0: 40}, None, False, "a training process died: rank 0, signal 40. Rule: "),
        ({1: 15}, LOST, False, "a training process died: rank 1, SIGTERM"),
        ({1: 15}, FULL, True, "full"),
        ({}, LOST, False, "lost"),
        ({}, None, True, "a training process died: rank 0, exit code 2"),
        ({1: 15}, LOST, True, None),
        ({0: 2, 1: 15}, None, True, None),
    ],
)
def test_what_ended_the_ranks(killed, told, stopping, expected):
    cause = _cause(EXITED, killed, told, stopping=stopping)
    assert cause is None if expected is None else str(cause).startswith(expected)


def test_a_bug_in_a_rank_is_not_hidden_by_the_loss_of_it():
    bug = torch.multiprocessing.ProcessRaisedException("traceback", 0, 1)
    assert _cause(bug, {1: 9}, LOST, stopping=True) is bug


def test_a_lost_rank_is_told_when_nobody_knows_more(tmp_path):
    assert _told(tmp_path) is None
    for rank, error in ((0, LOST), (2, LostRankError("second"))):
        tell(error, tmp_path / "store", rank)
    assert str(_told(tmp_path)) == "lost."
    tell(FULL, tmp_path / "store", 1)
    assert isinstance(_told(tmp_path), DataError)


# --- signals while the ranks start ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpora") / "c", tiles=48, val=8)


def start_until_ranks(folder: Path, corpus: Path) -> subprocess.Popen[str]:
    """Starts a job and returns as soon as its first rank is a process, long before that listens."""
    config = make_config(folder / "run", corpus, "train.samples=9600", "validation.every=4800", "ranks=2")
    job = start_job(folder, config, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 200
    while not ranks_of(job.pid):
        assert job.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    return job


def ranks_of(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wait_s", "number", "code", "text"),
    [
        (
            0.5,
            signal.SIGTERM,
            0,
            "momo: stopped by a signal before its first state; the same command continues the run\n",
        ),
        (0, signal.SIGINT, 130, "momo: interrupted; start the same command again to continue\n"),
    ],
)
def test_a_signal_while_the_ranks_start(tmp_path, corpus, wait_s, number, code, text):
    job = start_until_ranks(tmp_path, corpus)
    time.sleep(wait_s)
    if number == signal.SIGINT:
        os.killpg(job.pid, number)  # a terminal sends it to all processes
    else:
        job.send_signal(number)
    _, err = job.communicate(timeout=200)
    assert (job.returncode, err) == (code, text)


@pytest.mark.slow
def test_ranks_whose_launcher_died_while_they_start_end(tmp_path, corpus):
    job = start_until_ranks(tmp_path, corpus)
    time.sleep(0.3)
    ranks = ranks_of(job.pid)
    job.kill()
    job.wait(30)
    deadline = time.monotonic() + 200
    while any(Path(f"/proc/{rank}").exists() for rank in ranks):
        assert time.monotonic() < deadline, "a rank lives on without its launcher"
        time.sleep(0.05)
    assert ranks and not list((tmp_path / "run").rglob("*.safetensors"))
