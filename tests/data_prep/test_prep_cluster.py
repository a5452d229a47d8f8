"""The same corpus on one process, local workers, a running scheduler and SLURM jobs; lost workers; kill and resume."""

from __future__ import annotations

import functools
import logging
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from distributed import Client, LocalCluster

from momo.config import config_from_dict
from momo.corpus import Corpus
from momo.data_prep import PrepConfig, cluster, prep
from momo.data_prep.cluster import open_workers
from momo.errors import ConfigError, DataError
from tests.data_prep.prep_helper import LOCATED, config_of, ground
from tests.data_prep.products import write_raster


def scenes(folder: Path, count: int = 4) -> str:
    for number in range(count):
        write_raster(folder / f"s{number}.tif", ground(seed=number), **LOCATED)
    return str(folder)


def contents(corpus: Path) -> dict[str, bytes]:
    """Every file of a corpus but the manifest, which holds the number of workers in its configuration."""
    return {
        str(path.relative_to(corpus)): path.read_bytes()
        for path in sorted(corpus.rglob("*"))
        if path.is_file() and path.name != "manifest.json"
    }


def square(item: int) -> int:
    return item * item


def die_once(marker: Path, item: int) -> int:
    """Kills its own process the first time it meets item 3."""
    if item == 3 and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def die_always(item: int) -> int:
    if item == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def workers_config(**values: object) -> PrepConfig:
    return config_from_dict(PrepConfig, {"products": ["x"], "out": "x", **values})


def test_two_workers_make_the_same_corpus_as_none(tmp_path):
    folder = scenes(tmp_path / "in")
    lines: list[str] = []
    for workers in (1, 2):
        prep(config_of(folder, tmp_path / f"w{workers}", workers=workers), report=lines.append)
    assert any("4 files, in this process" in line for line in lines)
    assert any("4 files, 2 local workers" in line for line in lines)
    assert contents(tmp_path / "w1") == contents(tmp_path / "w2")
    one, two = (Corpus(tmp_path / f"w{n}").manifest for n in (1, 2))
    assert one.fingerprint == two.fingerprint and one.tables == two.tables


def test_results_come_with_their_positions(tmp_path):
    with open_workers(workers_config(workers=2), 9, tmp_path) as workers:
        assert dict(workers.run(square, range(30))) == {n: n * n for n in range(30)}
        assert list(workers.run(square, [])) == []


def test_no_more_workers_than_products(tmp_path):
    with open_workers(workers_config(workers=8), 1, tmp_path) as workers:
        assert workers.description == "in this process"


def test_a_lost_workers_product_is_done_by_another(tmp_path):
    task = functools.partial(die_once, tmp_path / "died")
    with open_workers(workers_config(workers=2), 9, tmp_path) as workers:
        assert dict(workers.run(task, range(6))) == {n: n for n in range(6)}
    assert (tmp_path / "died").exists()


def test_a_product_that_kills_its_workers_is_a_failure_and_the_others_go_on(tmp_path, monkeypatch):
    with open_workers(workers_config(workers=2), 9, tmp_path) as workers:
        results = dict(workers.run(die_always, range(4)))
    assert [results[n] for n in (0, 2, 3)] == [0, 2, 3]
    assert isinstance(results[1], DataError)
    assert "its worker died each time" in str(results[1]) and "workers=1" in str(results[1])


def test_on_a_running_scheduler(tmp_path):
    folder = scenes(tmp_path / "in")
    prep(config_of(folder, tmp_path / "here"), report=print)
    with LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None, silence_logs=logging.CRITICAL) as own:
        lines: list[str] = []
        config = config_of(folder, tmp_path / "there", scheduler=own.scheduler_address)
        prep(config, report=lines.append)
        assert f"scheduler {own.scheduler_address}, 1 worker" in lines[0]
        with Client(own) as client, pytest.raises(ConfigError, match="a worker does not see the work folder"):
            monkey = pytest.MonkeyPatch()
            with monkey.context() as patch:
                patch.setattr(cluster, "_sees", lambda path: False)
                cluster._checked(client, "test", tmp_path)
        with Client(own) as client, pytest.MonkeyPatch.context() as patch:
            patch.setattr(cluster, "_version", lambda: "0.0")
            with pytest.raises(ConfigError, match=r"a worker has another momo: .*: 0\.0"):
                cluster._checked(client, "test", tmp_path)
    assert contents(tmp_path / "here") == contents(tmp_path / "there")


def test_a_scheduler_that_is_not_there_is_told_soon(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "_CONNECT_SECONDS", 1)
    started = time.monotonic()
    config = workers_config(scheduler="tcp://127.0.0.1:9")
    with pytest.raises(ConfigError, match=r"the scheduler cannot be reached: tcp://127\.0\.0\.1:9"):
        open_workers(config, 1, tmp_path).__enter__()
    assert time.monotonic() - started < 20


def test_a_scheduler_without_workers_is_refused(tmp_path):
    with LocalCluster(n_workers=0, dashboard_address=None, silence_logs=logging.CRITICAL) as own:
        config = workers_config(scheduler=own.scheduler_address)
        with pytest.raises(ConfigError, match="the scheduler has no worker"):
            open_workers(config, 1, tmp_path).__enter__()


def test_slurm_jobs(tmp_path, monkeypatch):
    """A stand-in for sbatch starts the job script on this machine, so everything but SLURM itself is real."""
    tools, log = tmp_path / "bin", tmp_path / "job.sh"
    tools.mkdir()
    (tools / "sbatch").write_text(
        f'#!/bin/bash\ncp "${{@: -1}}" {log}\nsetsid bash {log} >{tmp_path}/job.log 2>&1 </dev/null &\n'
        f"echo $! >{tmp_path}/pid\necho Submitted batch job 17\n"
    )
    (tools / "scancel").write_text(f"#!/bin/bash\nkill -- -$(cat {tmp_path}/pid)\n")
    for tool in tools.iterdir():
        tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    folder = scenes(tmp_path / "in", 2)
    lines: list[str] = []
    slurm = {
        "jobs": 1,
        "cores": 1,
        "memory": "1GB",
        "walltime": "00:10:00",
        "queue": "short",
        "prologue": ["echo hello"],
    }
    prep(config_of(folder, tmp_path / "jobs", slurm=slurm), report=lines.append)
    prep(config_of(folder, tmp_path / "here"), report=print)
    assert "1 SLURM job, 1 worker" in lines[0]
    script = log.read_text()
    assert "#SBATCH -p short" in script and "#SBATCH -t 00:10:00" in script and "echo hello" in script
    assert contents(tmp_path / "jobs") == contents(tmp_path / "here")


def test_without_sbatch_the_error_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="SLURM jobs cannot be submitted"):
        open_workers(workers_config(slurm={"jobs": 1}), 1, tmp_path).__enter__()


def test_killed_and_started_again_it_continues(tmp_path):
    """Kill -9 while products are cut: finished pieces are used again, and the corpus is that of a run in one go."""
    folder = scenes(tmp_path / "in", 6)
    prep(config_of(folder, tmp_path / "whole"), report=print)
    config = config_of(folder, tmp_path / "killed")
    code = (
        "import sys, time; from momo.data_prep import tiling, prep, PrepConfig\n"
        "from momo.config import config_from_dict\n"
        "original = tiling._cut_into\n"
        "def slow(*a):\n    time.sleep(0.3)\n    return original(*a)\n"
        "tiling._cut_into = slow\n"
        "from omegaconf import OmegaConf\n"
        "prep(config_from_dict(PrepConfig, OmegaConf.to_container(OmegaConf.load(sys.argv[1]))))\n"
    )
    from momo.config import to_yaml

    (tmp_path / "config.yaml").write_text(to_yaml(config))
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "config.yaml")], stdout=subprocess.PIPE)
    pieces = tmp_path / "killed.work" / "pieces"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and len([p for p in pieces.glob("*") if not p.name.startswith(".")]) < 2:
        time.sleep(0.02)
    process.kill()
    process.communicate()
    stamps = {p.name: p.stat().st_mtime_ns for p in pieces.iterdir() if not p.name.startswith(".")}
    assert 2 <= len(stamps) < 6 and not (tmp_path / "killed").exists()
    cut: list[str] = []
    from momo.data_prep import tiling

    original = tiling._cut_into
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiling, "_cut_into", lambda f, product, s: cut.append(product.key) or original(f, product, s))
        prep(config, report=print)
    assert len(cut) == 6 - len(stamps)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert not (tmp_path / "killed.work").exists()
