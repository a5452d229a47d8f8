"""Jobs of real processes: killed, resized, stopped, hung, out of disk.

MOMO_KILLS sets how often the run of two ranks is killed; 20 take about ten minutes.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from momo.config import to_yaml
from momo.errors import DataError, MomoError
from momo.files import locked
from momo.pretrain import PretrainConfig, launch, pretrain
from momo.pretrain.checkpoint import latest_resumable
from momo.runs import find_checkpoints, read_checkpoints, read_metrics
from tests.conftest import write_corpus
from tests.momo.pretrain_helper import SCRIPT, final_weights, make_config, same_weights, start_job

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
KILLS = int(os.environ.get("MOMO_KILLS", "2"))
LONG = ("train.samples=960", "validation.every=240", "checkpoint.resume_every=80", "train.log_every=10")


def step_of(run: Path) -> int:
    newest = latest_resumable(run) if run.is_dir() else None
    return newest.samples if newest is not None else 0


def wait_until(condition, job: subprocess.Popen[str], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the job did not get there in time"
        assert job.poll() is None, "the job ended too early"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpora") / "c", tiles=48, val=8)


@pytest.fixture(scope="module")
def straight(tmp_path_factory, corpus) -> Path:
    """The run of two ranks that nothing disturbs."""
    folder = tmp_path_factory.mktemp("straight")
    config = make_config(folder / "run", corpus, *LONG, "ranks=2")
    assert start_job(folder, config).wait(500) == 0
    return folder / "run"


def kill_at_random(folder: Path, corpus: Path, seed: int, kills: int, *options: str) -> Path:
    """Kills a run at random moments, all its processes at once, and lets it end."""
    rng = random.Random(seed)
    config = make_config(folder / "killed", corpus, *LONG, *options)
    for _ in range(kills):
        job = start_job(folder, config, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        before = step_of(folder / "killed")
        if before < 800:
            wait_until(lambda before=before: step_of(folder / "killed") > before, job)
        time.sleep(rng.uniform(0, 1.0))
        os.killpg(job.pid, signal.SIGKILL)
        job.wait(30)
    assert start_job(folder, config).wait(500) == 0
    return folder / "killed"


def test_killed_at_random_steps_the_final_bytes_are_the_same(tmp_path, corpus, straight):
    killed = kill_at_random(tmp_path, corpus, 1, KILLS, "ranks=2")
    hashes = [[c.card.sha256 for c in read_checkpoints(run)] for run in (straight, killed)]
    assert hashes[0] == hashes[1] and len(hashes[0]) == 4
    vals = [[r for r in read_metrics(run) if r["event"] == "val"] for run in (straight, killed)]
    assert vals[0] == vals[1]
    kinds = [r["kind"] for r in read_metrics(killed) if r["event"] == "incident"]
    assert kinds.count("resumed") >= 1


def test_two_one_two_ranks_equal_two_within_tolerance(tmp_path, corpus, straight):
    folder = tmp_path / "moved"
    for ranks, until in ((2, 240), (1, 560)):
        config = make_config(folder, corpus, *LONG, f"ranks={ranks}")
        job = start_job(tmp_path, config)
        wait_until(lambda until=until: step_of(folder) >= until, job)
        job.send_signal(signal.SIGTERM)
        assert job.wait(200) == 0
    config = make_config(folder, corpus, *LONG, "ranks=2", "deepspeed=" + zero_file(tmp_path, 2))
    assert start_job(tmp_path, config).wait(500) == 0
    first, second = final_weights(straight), final_weights(folder)
    # 120 steps of float32 sums in another order; weights are of order 0.1, updates of order 0.01.
    worst = max(float((first[name] - second[name]).abs().max()) for name in first)
    assert 0 < worst < 5e-3
    losses = [[c.card.val_loss["loss"] for c in read_checkpoints(run)] for run in (straight, folder)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert [r["ranks"] for r in read_metrics(folder) if r.get("kind") == "resumed"] == [1, 2]


def zero_file(folder: Path, stage: int) -> str:
    path = folder / f"zero{stage}.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    return str(path)


def test_sigterm_to_the_command_saves_and_exits_0(tmp_path, corpus, straight):
    config = make_config(tmp_path / "run", corpus, *LONG, "ranks=2", "checkpoint.resume_every=null")
    job = start_job(tmp_path, config, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_until(lambda: (tmp_path / "run/metrics.jsonl").is_file(), job)
    time.sleep(0.1)
    job.send_signal(signal.SIGTERM)
    out, err = job.communicate(timeout=200)
    assert job.returncode == 0, err
    saved = step_of(tmp_path / "run")
    assert f"momo: stopped by a signal at {saved:,} samples; the same command continues the run" in err
    assert "Traceback" not in err and "resume" not in out
    assert saved > 0 and saved % 8 == 0
    assert start_job(tmp_path, config).wait(500) == 0
    assert same_weights(straight, tmp_path / "run")


@pytest.mark.parametrize("ahead", [False, True])
def test_ctrl_c_saves_and_exits_130(tmp_path, corpus, ahead):
    config = make_config(tmp_path / "run", corpus, *LONG, "ranks=2", "checkpoint.resume_every=null")
    job = start_job(tmp_path, config, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_until(lambda: (tmp_path / "run/metrics.jsonl").is_file(), job)
    if ahead:  # the launching process may pass it on, as SIGTERM, before the terminal's own signal arrives
        os.kill(ranks_of(job.pid)[1], signal.SIGTERM)
        time.sleep(0.03)
    os.killpg(job.pid, signal.SIGINT)  # a terminal sends it to all processes
    _, err = job.communicate(timeout=200)
    assert job.returncode == 130, err
    assert "momo: interrupted" in err and "Traceback" not in err
    assert step_of(tmp_path / "run") > 0


def test_a_stopped_rank_is_named_and_the_run_ends(tmp_path, corpus):
    config = make_config(tmp_path / "run", corpus, *LONG, "ranks=2", "timeout_s=8")
    job = start_job(tmp_path, config, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_until(lambda: step_of(tmp_path / "run") > 0, job)
    ranks = ranks_of(job.pid)
    os.kill(ranks[1], signal.SIGSTOP)
    try:
        _, err = job.communicate(timeout=200)
    finally:
        for pid in ranks.values():
            if Path(f"/proc/{pid}").exists():
                os.kill(pid, signal.SIGKILL)
    assert job.returncode == 2
    assert "momo: error: no progress: for" in err and "silent: rank 1" in err and "Traceback" not in err


def ranks_of(pid: int) -> dict[int, int]:
    """Process of each rank of a job, from the environment each process was given or the order of their start."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    started = sorted(int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes())
    return dict(enumerate(started))


def test_a_killed_rank_is_told(tmp_path, corpus):
    config = make_config(tmp_path / "run", corpus, *LONG, "ranks=2")
    job = start_job(tmp_path, config, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_until(lambda: step_of(tmp_path / "run") > 0, job)
    os.kill(ranks_of(job.pid)[1], signal.SIGKILL)
    _, err = job.communicate(timeout=200)
    assert job.returncode == 2 and "Traceback" not in err
    assert "momo: error: a training process died: rank 1, SIGKILL (the machine may be out of memory)" in err
    assert "the run continues from its last state" in err


def test_an_error_of_a_rank_is_told_once_by_the_launching_process(tiny_corpus, tmp_path, capfd):
    config = make_config(tmp_path / "run", tiny_corpus, "ranks=2", "train.base_lr=1e38", "train.warmup_samples=1000")
    with pytest.raises(MomoError, match=r"not finite|diverged"):
        pretrain(config)
    out, err = capfd.readouterr()
    assert "Traceback" not in out + err


LIMITED = """
import resource, sys
from momo.cli import main
if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
    sys.exit(main(["pretrain", "--config", *sys.argv[2:]]))
"""


def test_a_full_disk_keeps_the_old_checkpoint(tmp_path, corpus):
    run = tmp_path / "run"
    config = make_config(run, corpus, "train.samples=480", "validation.every=32")
    job = start_job(tmp_path, config)
    wait_until(lambda: len(find_checkpoints(run)) >= 2, job)
    job.send_signal(signal.SIGTERM)
    assert job.wait(200) == 0
    before = {c.path.name: c.card.sha256 for c in find_checkpoints(run)}
    saved = step_of(run)
    (tmp_path / "limited.py").write_text(LIMITED)
    path = tmp_path / "again.yaml"
    path.write_text(to_yaml(config))
    # Files may grow to 1.5 MB: the metrics can be written, the weights (2.3 MB) cannot.
    command = [sys.executable, str(tmp_path / "limited.py"), "1500000", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 2, done.stderr
    assert "a checkpoint could not be written" in done.stderr and "free" in done.stderr
    assert {c.path.name: c.card.sha256 for c in find_checkpoints(run)} == before and step_of(run) == saved
    assert not list(run.glob("*/.samples*"))
    assert start_job(tmp_path, config).wait(500) == 0
    assert find_checkpoints(run)[-1].samples == 480


def start_nodes(folder: Path, config: PretrainConfig, **popen: object) -> list[subprocess.Popen[str]]:
    """Two launchers with node ranks 0 and 1 on loopback, as on two machines with one process each."""
    (folder / "job.yaml").write_text(to_yaml(config))
    (folder / "job.py").write_text(SCRIPT)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    nodes = []
    for node in range(2):
        environment = os.environ | {
            "RANK": str(node), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        command = [sys.executable, str(folder / "job.py"), str(folder / "job.yaml")]
        nodes.append(subprocess.Popen(command, env=environment, text=True, **popen))  # type: ignore[call-overload]
    return nodes


def test_a_run_is_written_by_one_process_at_a_time(tmp_path, corpus, monkeypatch):
    config = make_config(tmp_path / "run", corpus, *LONG, "train.samples=96000", "validation.every=48000", "ranks=2")
    first = start_job(tmp_path, config)
    wait_until(lambda: (tmp_path / "run/metrics.jsonl").is_file(), first)
    monkeypatch.setattr(launch, "_LOCK_WAIT_S", 0.2)
    with pytest.raises(DataError, match=r"the run is being written by another process: .*run: process \d+ on "):
        pretrain(config)
    first.send_signal(signal.SIGTERM)
    assert first.wait(200) == 0
    with locked(tmp_path / "run/.lock", what="the run", wait_s=0):
        pass


def test_two_launchers_as_two_nodes(tmp_path, corpus, straight):
    nodes = start_nodes(tmp_path, make_config(tmp_path / "run", corpus, *LONG))
    assert [node.wait(500) for node in nodes] == [0, 0]
    assert torch.equal(final_weights(tmp_path / "run")["cls_token"], final_weights(straight)["cls_token"])


def test_a_stopped_node_is_named_though_it_keeps_the_store(tmp_path, corpus):
    config = make_config(tmp_path / "run", corpus, *LONG, "timeout_s=8")
    nodes = start_nodes(tmp_path, config, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    try:
        wait_until(lambda: step_of(tmp_path / "run") > 0, nodes[0])
        nodes[0].send_signal(signal.SIGSTOP)
        _, err = nodes[1].communicate(timeout=200)
    finally:
        for node in nodes:
            node.kill()
            node.wait(30)
    assert nodes[1].returncode == 2
    assert "momo: error: no progress: for" in err and "silent: rank 0" in err and "Traceback" not in err
