"""The scripts that start pretraining, with stand-ins only for what is not here: GPUs, ssh, SLURM."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from momo.runs import read_checkpoints, read_metrics
from tests.conftest import write_corpus

SCRIPTS = Path(__file__).parents[1] / "scripts"
SHELL = sorted([*SCRIPTS.glob("pretrain*.sh"), SCRIPTS / "bench" / "gpu.sh"])
SLURM = SCRIPTS / "slurm"
ECHO = '#!/bin/bash\necho "$RANK/$WORLD_SIZE $LOCAL_RANK/$LOCAL_SIZE $CUDA_VISIBLE_DEVICES: $*"\n'
REAL = f'#!/bin/bash\nexec {sys.executable} -m momo "$@"\n'
JOB = [
    "model.size=pico", "model.patch_size=8", "train.batch_size=8", "train.precision=fp32", "train.log_every=2",
    "train.warmup_samples=8", "train.samples=1200", "validation.every=600", "validation.batch_size=4",
    "telemetry.reconstructions=0",
]  # fmt: skip


def put(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def environment(tools: Path, momo: str, **more: str) -> dict[str, str]:
    """Of a machine without a GPU whose momo is `momo`, with stand-ins first on PATH."""
    put(tools / "momo", momo)
    ours = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "SENSORS", "MOMO", "MOMO_HOME", "MOMO_SSH")
    kept = {key: value for key, value in os.environ.items() if key not in ours and not key.startswith("SLURM")}
    return kept | {"CUDA_VISIBLE_DEVICES": "", "PATH": f"{tools}:{os.environ['PATH']}"} | more


@pytest.fixture
def echo(tmp_path) -> dict[str, str]:
    """A momo that prints what it was given, for what a script makes of its options."""
    return environment(tmp_path / "bin", ECHO)


@pytest.fixture
def real(tmp_path) -> dict[str, str]:
    return environment(tmp_path / "bin", REAL, OMP_NUM_THREADS="1")


def call(script: str, *arguments: object, env: dict[str, str], cwd: Path, **more: str):
    command = ["bash", str(SCRIPTS / script), *map(str, arguments)]
    return subprocess.run(command, env=env | more, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)


# --- what they make of their options --------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SHELL, ids=lambda path: path.name)
def test_help_is_one_screen(script, echo, tmp_path):
    done = call(script, "--help", env=echo, cwd=tmp_path)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and f"usage: scripts/{script.relative_to(SCRIPTS)}" in done.stdout
    assert len(lines) <= 32 and max(map(len, lines)) <= 120


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_is_silent():
    files = [*SHELL, SCRIPTS / "launch.bash", *SLURM.glob("*.sbatch")]
    done = subprocess.run(["shellcheck", *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("gpus", "arguments", "given"),
    [
        ("", ["seed=1"], "seed=1"),
        ("", ["seed=1", "--ranks", "2"], "seed=1 ranks=2"),
        ("0,1,3", ["seed=1"], "seed=1 ranks=3"),
        ("0,1,3", ["--gpus", "2", "seed=1"], "seed=1 ranks=2"),
        ("0,1,3", ["ranks=1"], "ranks=1 ranks=1"),
        ("", ["data.pipe=aws s3 cp {url} -"], "data.pipe=aws s3 cp {url} -"),
    ],
)
def test_one_rank_a_gpu(gpus, arguments, given, echo, tmp_path):
    done = call("pretrain.sh", *arguments, env=echo, cwd=tmp_path, CUDA_VISIBLE_DEVICES=gpus)
    assert done.stdout.strip().endswith(f": pretrain {given}")


def test_gpus_are_counted_by_nvidia_smi(echo, tmp_path):
    put(tmp_path / "bin" / "nvidia-smi", "#!/bin/bash\nprintf '0\\n1\\n'\n")
    del echo["CUDA_VISIBLE_DEVICES"]
    assert "pretrain a=1 ranks=2" in call("pretrain.sh", "a=1", env=echo, cwd=tmp_path).stdout


NODE = ["--no_ssh", "--nnodes", "2", "--node_rank"]
ERRORS = [
    ("pretrain.sh", ["--gpus", "3"], "there are not so many GPUs: --gpus 3, 2 found. Rule: one rank a GPU"),
    ("pretrain.sh", ["--ranks", "3"], "there are more ranks than GPUs: --ranks 3, 2 GPUs"),
    ("pretrain.sh", ["--gpus", "x"], "--gpus is no number: 'x'"),
    ("pretrain.sh", ["--gpus"], "an option has no value: --gpus"),
    ("pretrain.sh", ["--gpus", "1", "--ranks", "1"], "both --gpus and --ranks are given"),
    ("pretrain.sh", ["--gpus", "1", "ranks=2"], "the number of ranks is given twice: ranks=2 and 1"),
    ("pretrain.sh", ["MOMO=none"], "momo is not installed here: MOMO='/nowhere/momo'"),
    ("pretrain_multinode.sh", ["a=1"], "it is not said how the nodes are started"),
    (
        "pretrain_multinode.sh",
        ["--no_ssh", "--nnodes", "2"],
        "the nodes are not described: --nnodes '2' --node_rank ''",
    ),
    ("pretrain_multinode.sh", [*NODE, "2", "--master_addr", "a"], "--node_rank is out of range: 2. Rule: from 0 to 1"),
    (
        "pretrain_multinode.sh",
        [*NODE, "0", "--master_addr", "a", "--ranks", "1,2,3"],
        "ranks and nodes do not fit: --ranks 1,2,3, --nnodes 2",
    ),
    ("pretrain_multinode.sh", [*NODE, "0", "--master_addr", "a", "--gpus", "3"], "there are not so many GPUs: 3 ranks"),
    ("pretrain_multinode.sh", ["--hostfile", "none"], "the hostfile does not exist: none"),
    ("pretrain_multinode.sh", ["--hostfile", "bad"], "a line of the hostfile cannot be read: bad, line 2: 'two'"),
    ("pretrain_multinode.sh", ["--hostfile", "empty"], "the hostfile names no host"),
    ("pretrain_multinode.sh", ["--hostfile", "bad", "--gpus", "1"], "options do not fit together"),
    ("pretrain_sensors.sh", ["--runs", "r"], "the jobs are not described: --corpora '' --runs 'r' --base ''"),
    ("pretrain_sensors.sh", ["out=r"], "a key is the same for no two jobs, or for all: out=r"),
    (
        "pretrain_sensors.sh",
        ["--corpora", "c", "--runs", "r", "--base", "b", "--parallel"],
        "there are too few GPUs to run side by side: 2 for 3 jobs",
    ),
]


@pytest.mark.parametrize(("script", "arguments", "message"), ERRORS, ids=[message[:40] for *_, message in ERRORS])
def test_errors_say_what_to_do(script, arguments, message, echo, tmp_path):
    (tmp_path / "bad").write_text("one slots=2\ntwo\n")
    (tmp_path / "empty").write_text("# nothing\n")
    more = {"CUDA_VISIBLE_DEVICES": "0,1"} | ({"MOMO": "/nowhere/momo"} if "MOMO=none" in arguments else {})
    done = call(script, *arguments, env=echo, cwd=tmp_path, **more)
    assert done.returncode == 2 and f"momo: error: {message}" in done.stderr
    assert "Rule: " in done.stderr and "Next: " in done.stderr


def test_without_gpu_and_number_a_node_asks_for_it(echo, tmp_path):
    done = call("pretrain_multinode.sh", *NODE, 0, "--master_addr", "a", env=echo, cwd=tmp_path)
    assert done.returncode == 2 and "the number of ranks is not known: no GPU was found" in done.stderr


def test_ranks_are_numbered_node_by_node(echo, tmp_path):
    where = ["--no_ssh", "--nnodes", 3, "--master_addr", "127.0.0.1", "--ranks", "2,1,3", "a=1"]
    nodes = [call("pretrain_multinode.sh", *where, "--node_rank", n, env=echo, cwd=tmp_path) for n in range(3)]
    told = [sorted(node.stdout.splitlines()) for node in nodes]
    assert told == [
        ["0/6 0/2 : pretrain a=1 ranks=6", "1/6 1/2 : pretrain a=1 ranks=6"],
        ["2/6 0/1 : pretrain a=1 ranks=6"],
        [f"{rank}/6 {rank - 3}/3 : pretrain a=1 ranks=6" for rank in (3, 4, 5)],
    ]


def test_a_failing_rank_ends_its_node_with_its_code(tmp_path):
    waits = 'trap "echo told; exit 2" TERM\nfor i in {1..99}; do sleep 0.1; done\n'
    momo = "#!/bin/bash\n[[ $RANK == 0 ]] || { sleep 0.3; exit 7; }\n" + waits
    env = environment(tmp_path / "bin", momo)
    started = time.monotonic()
    node = ["--no_ssh", "--nnodes", 1, "--node_rank", 0, "--master_addr", "a", "--ranks", 2]
    done = call("pretrain_multinode.sh", *node, env=env, cwd=tmp_path)
    assert done.returncode == 7 and "told" in done.stdout and time.monotonic() - started < 8
    assert "the same command continues the run" in done.stderr


def test_a_killed_rank_is_named(tmp_path):
    env = environment(tmp_path / "bin", "#!/bin/bash\nkill -KILL $$\n")
    node = ["--no_ssh", "--nnodes", 1, "--node_rank", 0, "--master_addr", "a", "--ranks", 1]
    done = call("pretrain_multinode.sh", *node, env=env, cwd=tmp_path)
    assert done.returncode == 137 and "a process died: rank 0 on node 0" in done.stderr and "KILL" in done.stderr


# --- sensors --------------------------------------------------------------------------------------------------------

SENSOR_MOMO = """#!/bin/bash
for word in "$@"; do [[ $word != out=* ]] || run=${word#out=}; done
echo "$CUDA_VISIBLE_DEVICES: $*"
grep Cpus_allowed_list /proc/self/status
[[ $run != */ctx || ! -f broken ]] || exit 2
mkdir -p "$run"
printf '{\\n  "samples": 320,\\n  "complete": true\\n}\\n' >"$run/summary.json"
echo '{"event": "val", "samples": 320, "loss": 0.5, "per_sensor": {"X": {"loss": 0.7}}}' >"$run/metrics.jsonl"
"""
WHERE = ["--corpora", "c", "--runs", "my runs", "--base", "b", "seed=3"]


def test_a_failing_sensor_does_not_hide_the_others(tmp_path):
    env = environment(tmp_path / "bin", SENSOR_MOMO)
    (tmp_path / "broken").touch()
    done = call("pretrain_sensors.sh", *WHERE, env=env, cwd=tmp_path)
    table = done.stdout.rpartition("---\n")[2].splitlines()
    assert done.returncode == 2
    assert [line.split()[1] for line in table] == ["complete", "FAILED", "complete"]
    assert (
        "(exit code 2)" in table[1] and "320 samples  val loss 0.5" in table[2] and table[2].endswith("my runs/themis")
    )
    assert "pretrain seed=3 out=my runs/hirise data.corpora=[c/hirise] base=b" in done.stdout
    (tmp_path / "broken").unlink()
    again = call("pretrain_sensors.sh", *WHERE, "--sensors", "ctx", env=env, cwd=tmp_path)
    assert again.returncode == 0 and "complete" in again.stdout


def test_side_by_side_on_disjoint_gpus(tmp_path):
    env = environment(tmp_path / "bin", SENSOR_MOMO)
    devices = {"CUDA_VISIBLE_DEVICES": "0,1,2,5,6,7,8"}
    done = call("pretrain_sensors.sh", "--parallel", *WHERE, env=env, cwd=tmp_path, **devices)
    assert done.returncode == 0, done.stderr
    logs = [(tmp_path / "my runs" / f"{name}.log").read_text() for name in ("hirise", "ctx", "themis")]
    assert [log.partition(":")[0] for log in logs] == ["0,1", "2,5", "6,7"] and all("ranks=2" in log for log in logs)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2 or shutil.which("taskset") is None, reason="needs two cores")
def test_side_by_side_on_disjoint_cores(tmp_path):
    env = environment(tmp_path / "bin", SENSOR_MOMO)
    done = call("pretrain_sensors.sh", "--parallel", "--sensors", "a,b", *WHERE, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    logs = [(tmp_path / "my runs" / f"{name}.log").read_text() for name in ("a", "b")]
    lists = [log.partition("list:")[2].split()[0] for log in logs]
    assert lists[0] != lists[1]


def test_a_signal_ends_the_job_and_starts_no_more(tmp_path):
    momo = "#!/bin/bash\ntrap 'touch told; exit 0' TERM\ntouch started\nfor i in {1..99}; do sleep 0.1; done\n"
    env = environment(tmp_path / "bin", momo)
    command = ["bash", str(SCRIPTS / "pretrain_sensors.sh"), *WHERE]
    job = subprocess.Popen(command, env=env, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    wait_until((tmp_path / "started").is_file, job)
    job.send_signal(signal.SIGUSR1)
    out, _ = job.communicate(timeout=30)
    assert job.returncode == 0 and (tmp_path / "told").is_file()
    assert "stopped" in out and out.count("not started") == 2


# --- SLURM ----------------------------------------------------------------------------------------------------------

# As srun: so many tasks, each with its number; --kill-on-bad-exit; the exit code of the first that failed.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
for ((n = 0; n < SLURM_NTASKS; n++)); do SLURM_PROCID=$n SLURM_LOCALID=$n SLURM_NODEID=0 "$@" & echo $! >>tasks; done
code=0
for ((n = 0; n < SLURM_NTASKS; n++)); do
    status=0
    wait -n || status=$?
    ((code)) || code=$status
    ((!status)) || kill -KILL $(jobs -p) 2>/dev/null
done
rm tasks
exit $code
"""
SCONTROL = '#!/bin/bash\nif [[ $1 == show ]]; then echo 127.0.0.1; else echo "$*" >>requeued; fi\n'


def slurm(tmp_path: Path, env: dict[str, str], tasks: int) -> dict[str, str]:
    put(tmp_path / "bin" / "srun", SRUN)
    put(tmp_path / "bin" / "scontrol", SCONTROL)
    ids = {"SLURM_JOB_ID": str(free_port() - 20000), "SLURM_JOB_NODELIST": "n1", "SLURM_NTASKS": str(tasks)}
    return env | ids | {"SLURM_NNODES": "1", "SLURM_CPUS_PER_TASK": "1", "SLURM_SUBMIT_DIR": str(SCRIPTS.parent)}


def free_port() -> int:
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            if 20000 <= (port := probe.getsockname()[1]) < 40000:
                return port


# A momo of which each start gets `steps` further and ends with `code`.
SLURM_MOMO = """#!/bin/bash
if [[ $* == *--show-config* ]]; then [[ $* != *bad* ]] || exit 2; echo "out: 'run'"; exit 0; fi
echo "$RANK/$WORLD_SIZE $LOCAL_RANK/$LOCAL_SIZE: $*"
[[ $RANK == 0 ]] || exit 0
mkdir -p run
before=$(cat run/at 2>/dev/null || echo 0)
echo $((before + $(cat steps))) >run/at
printf '{\\n  "samples": %d,\\n  "complete": %s\\n}\\n' "$(cat run/at)" "$(cat complete)" >run/summary.json
exit "$(cat code)"
"""


@pytest.mark.parametrize(
    ("steps", "complete", "code", "queued"),
    [(8, "true", 0, False), (8, "false", 0, True), (8, "false", 2, True), (0, "false", 2, False)],
    ids=["complete", "stopped by a signal", "an error further on", "an error at the same place"],
)
def test_a_job_queues_itself_again_when_that_helps(steps, complete, code, queued, tmp_path):
    env = slurm(tmp_path, environment(tmp_path / "bin", SLURM_MOMO), 2)
    for name, value in {"steps": steps, "complete": complete, "code": code}.items():
        (tmp_path / name).write_text(str(value))
    done = call("slurm/pretrain.sbatch", "seed=3", env=env, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert sorted(done.stdout.split("\n"))[1] == "0/2 0/2: pretrain seed=3 ranks=2"
    queue = tmp_path / "requeued"
    assert queue.is_file() == queued
    if queued:
        assert queue.read_text() == f"requeue {env['SLURM_JOB_ID']}\n"


def test_a_bad_configuration_starts_nothing(tmp_path):
    env = slurm(tmp_path, environment(tmp_path / "bin", SLURM_MOMO), 2)
    done = call("slurm/pretrain.sbatch", "bad=3", env=env, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == "" and not (tmp_path / "requeued").exists()


def test_a_cancelled_job_stays_ended(tmp_path):
    momo = SLURM_MOMO.replace("mkdir", "touch started; sleep 2; mkdir", 1)
    env = slurm(tmp_path, environment(tmp_path / "bin", momo), 1)
    for name, value in {"steps": "8", "complete": "false", "code": "0"}.items():
        (tmp_path / name).write_text(value)
    command = ["bash", str(SLURM / "pretrain.sbatch"), "seed=3"]
    job = subprocess.Popen(command, env=env, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    wait_until((tmp_path / "started").is_file, job)
    job.send_signal(signal.SIGTERM)
    _, err = job.communicate(timeout=30)
    assert job.returncode == 0 and "ended by SLURM; submit the job again to continue" in err
    assert not (tmp_path / "requeued").exists()


def test_an_array_has_one_sensor_a_task(tmp_path):
    env = slurm(tmp_path, environment(tmp_path / "bin", SLURM_MOMO), 1)
    env |= {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}
    for name, value in {"steps": "8", "complete": "false", "code": "0"}.items():
        (tmp_path / name).write_text(value)
    done = call("slurm/pretrain_sensors.sbatch", "c", "r", "b", "seed=3", env=env, cwd=tmp_path)
    assert "pretrain seed=3 out=r/themis data.corpora=[c/themis] base=b ranks=1" in done.stdout, done.stderr
    assert (tmp_path / "requeued").read_text() == "requeue 7_2\n"
    bad = call("slurm/pretrain_sensors.sbatch", "c", "seed=3", env=env, cwd=tmp_path)
    assert bad.returncode == 2 and "the jobs are not described: 'c seed=3'. Rule: CORPORA RUNS BASE" in bad.stderr
    lost = call("slurm/pretrain_sensors.sbatch", "c", "r", "b", env=env | {"MOMO_HOME": "/nowhere"}, cwd=tmp_path)
    assert lost.returncode == 2 and "momo's repository is not here: /nowhere" in lost.stderr


@pytest.mark.parametrize("path", sorted(SLURM.glob("pretrain*.sbatch")), ids=lambda path: path.name)
def test_directives_name_no_site(path):
    directives = [line for line in path.read_text().splitlines() if line.startswith("#SBATCH")]
    for wanted in ("--requeue", "--signal=USR1@300", "--open-mode=append"):
        assert f"#SBATCH {wanted}" in directives
    assert not any(word in line for line in directives for word in ("partition", "account", "mail"))


# --- real runs ------------------------------------------------------------------------------------------------------


def wait_until(condition, job: subprocess.Popen[str], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the job did not get there in time"
        assert job.poll() is None, "the job ended too early"
        time.sleep(0.02)


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
    out, _ = job.communicate(timeout=60)
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_two_nodes_in_one_go_equal_one(tmp_path, real, corpus, straight):
    job = [*JOB, f"data.corpora=[{corpus}]"]
    where = [
        "--no_ssh",
        "--nnodes",
        "2",
        "--master_addr",
        "127.0.0.1",
        "--master_port",
        str(free_port()),
        "--ranks",
        "1",
    ]
    nodes = [
        subprocess.Popen(
            ["bash", str(SCRIPTS / "pretrain_multinode.sh"), *where, "--node_rank", str(node), "out=two", *job],
            env=real, cwd=tmp_path,
        )
        for node in range(2)
    ]  # fmt: skip
    assert [node.wait(120) for node in nodes] == [0, 0]
    assert hashes(tmp_path / "two") == straight


@pytest.mark.slow
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


@pytest.mark.slow
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
