"""Real runs of the launch scripts and the GPU bench, with stand-ins only for what is not here: GPUs, ssh, SLURM."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from momo.runs import read_checkpoints, read_metrics
from tests.conftest import write_corpus
from tests.launch_helper import SCRIPTS, SLURM, call, environment, free_port, put, slurm, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
REAL = f'#!/bin/bash\nexec {sys.executable} -m momo "$@"\n'
JOB = [
    "model.size=pico", "model.patch_size=8", "train.batch_size=8", "train.precision=fp32", "train.log_every=2",
    "train.warmup_samples=8", "train.samples=1200", "validation.every=600", "validation.batch_size=4",
    "telemetry.reconstructions=0",
]  # fmt: skip


@pytest.fixture
def real(tmp_path) -> dict[str, str]:
    return environment(tmp_path / "bin", REAL, OMP_NUM_THREADS="1")


def seen(run: Path) -> int:
    """Samples in the last train line of a run."""
    path = run / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()[:-1]] if path.is_file() else []
    return max((line["samples"] for line in lines if line["event"] == "train"), default=0)


def saved(run: Path) -> int:
    return int(json.loads((run / "summary.json").read_text())["samples"])


def stopped(command: list[object], run: Path, env: dict[str, str], cwd: Path, stop) -> str:
    """Starts a job, stops it when it trains, and returns what it printed; it must exit with 0."""
    before = saved(run) if run.is_dir() else 0
    job = subprocess.Popen(
        ["bash", *map(str, command)], env=env, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wait_until(lambda: seen(run) > before, job)
    stop(job)
    out, _ = job.communicate(timeout=200)
    assert job.returncode == 0, out
    assert before < saved(run) < 1200 and "Traceback" not in out, out
    return out


def hashes(run: Path) -> list[str | None]:
    return [checkpoint.card.sha256 for checkpoint in read_checkpoints(run)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpora") / "corpus", tiles=48)


@pytest.fixture(scope="module")
def straight(tmp_path_factory, corpus) -> list[str | None]:
    """Hashes of the checkpoints of a run of two ranks on one machine that nothing disturbs."""
    folder = tmp_path_factory.mktemp("straight")
    env = environment(folder / "bin", REAL, OMP_NUM_THREADS="1")
    job = [*JOB, f"data.corpora=[{corpus}]", "out=straight"]
    done = call("pretrain.sh", "--ranks", 2, *job, env=env, cwd=folder)
    assert done.returncode == 0, done.stderr
    return hashes(folder / "straight")


def test_moved_from_launcher_to_launcher_a_run_keeps_its_bytes(tmp_path, real, corpus, straight):
    """One run, stopped by signals under pretrain.sh, on two nodes by ssh, and under SLURM."""
    run, ours = tmp_path / "moved", ["out=moved", *JOB, f"data.corpora=[{corpus}]"]
    command = [SCRIPTS / "pretrain.sh", "--ranks", 2, *ours]
    out = stopped(command, run, real, tmp_path, lambda job: job.send_signal(signal.SIGUSR1))
    assert f"at {saved(run):,} samples; the same command continues the run" in out

    # ssh runs its words in a shell on the host; here all hosts are this machine.
    put(
        tmp_path / "bin" / "ssh",
        '#!/bin/bash\nwhile [[ $1 == -o ]]; do shift 2; done\necho "$1" >>hosts\nexec bash -c "$2"\n',
    )
    (tmp_path / "hostfile").write_text("# two nodes\n127.0.0.1 slots=1\nlocalhost slots=1\n")
    command = [SCRIPTS / "pretrain_multinode.sh", "--hostfile", "hostfile", "--master_port", free_port(), *ours]
    stopped(command, run, real, tmp_path, lambda job: job.send_signal(signal.SIGTERM))
    assert sorted((tmp_path / "hosts").read_text().split()) == ["127.0.0.1", "localhost"]

    def signal_step(_: subprocess.Popen[str]) -> None:
        for pid in (tmp_path / "tasks").read_text().split():
            os.kill(int(pid), signal.SIGUSR1)

    cluster = slurm(tmp_path, real, 2)
    stopped([SLURM / "pretrain.sbatch", *ours], run, cluster, tmp_path, signal_step)
    assert (tmp_path / "requeued").read_text() == f"requeue {cluster['SLURM_JOB_ID']}\n"
    done = call("slurm/pretrain.sbatch", *ours, env=cluster, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "requeued").read_text().splitlines()) == 1

    assert hashes(run) == straight and len(straight) == 2
    kinds = [record["kind"] for record in read_metrics(run) if record["event"] == "incident"]
    assert kinds == ["signal", "resumed"] * 3


def test_two_nodes_in_one_go_equal_one(tmp_path, real, corpus, straight):
    job = [*JOB, f"data.corpora=[{corpus}]"]
    where = ["--no_ssh", "--nnodes", 2, "--master_addr", "127.0.0.1", "--master_port", free_port(), "--ranks", 1]
    nodes = [
        subprocess.Popen(
            [*map(str, ["bash", SCRIPTS / "pretrain_multinode.sh", *where, "--node_rank", node, "out=two", *job])],
            env=real,
            cwd=tmp_path,
        )
        for node in range(2)
    ]
    assert [node.wait(500) for node in nodes] == [0, 0]
    assert hashes(tmp_path / "two") == straight


def test_sensors_side_by_side_from_one_base(tmp_path, real, pico_weights):
    for name, sensor in {"ctx": "CTX", "themis": "THEMIS"}.items():
        write_corpus(tmp_path / "c" / name, sensor=sensor)
    where = ["--corpora", "c", "--runs", "r", "--base", pico_weights, "--sensors", "ctx,hirise,themis", "--parallel"]
    job = [item for item in JOB if not item.startswith("model.")]
    done = call("pretrain_sensors.sh", *where, *job, "train.samples=160", env=real, cwd=tmp_path)
    table = [line.split() for line in done.stdout.rpartition("---\n")[2].splitlines()]
    assert done.returncode == 2 and [line[1] for line in table] == ["complete", "FAILED", "complete"], done.stdout
    assert "this is no corpus: c/hirise" in (tmp_path / "r" / "hirise.log").read_text()
    bases = {
        json.loads((path / "card.json").read_text())["parents"][0]["sha256"]
        for path in tmp_path.glob("r/*/checkpoints/*")
    }
    assert len(bases) == 1


# --- the bench ------------------------------------------------------------------------------------------------------


def test_the_gpu_bench_runs_on_the_cpu(tmp_path, real):
    env = real | {"MOMO_PYTHON": sys.executable, "DS_ACCELERATOR": "cpu"}
    arguments = ["--device", "cpu", "--modes", "plain,checkpointing", "--tiles", "16", "--out", "out"]
    done = call("bench/gpu.sh", *arguments, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert [(row["mode"], row["batch"]) for row in report["steps"]][:2] == [("plain", 4), ("plain", 8)]
    assert {row["mode"] for row in report["steps"]} == {"plain", "checkpointing"}
    assert all(row["fits"] and row["images_per_s"] > 0 for row in report["steps"] + report["trainer"])
    assert [row["workers"] for row in report["loader"]] == [0, 1]
    text = (tmp_path / "out" / "gpu.md").read_text()
    assert "without a GPU" in text and "bound by" in text and text.count("| pico |") == len(report["steps"]) + 1


def test_the_gpu_bench_says_when_there_is_no_gpu(real, tmp_path):
    done = call("bench/gpu.sh", env=real | {"MOMO_PYTHON": sys.executable}, cwd=tmp_path)
    assert done.returncode == 2 and "there is no GPU" in done.stderr and "--device cpu" in done.stderr
    done = call("bench/gpu.sh", "--wheels", "none", env=real, cwd=tmp_path)
    assert done.returncode == 2 and "there are no wheels: none" in done.stderr
    done = call("bench/gpu.sh", "--out", env=real, cwd=tmp_path)
    assert done.returncode == 2 and "an option has no value: --out" in done.stderr
