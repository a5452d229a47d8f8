"""What the scripts that start pretraining make of options, signals and SLURM; momo is a stand-in."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time

import pytest

from tests.launch_helper import SCRIPTS, SLURM, call, environment, put, slurm, wait_until

SHELL = sorted([*SCRIPTS.glob("pretrain*.sh"), SCRIPTS / "bench" / "gpu.sh"])
ECHO = '#!/bin/bash\necho "$RANK/$WORLD_SIZE $LOCAL_RANK/$LOCAL_SIZE $CUDA_VISIBLE_DEVICES: $*"\n'


@pytest.fixture
def echo(tmp_path) -> dict[str, str]:
    """A momo that prints what it was given, for what a script makes of its options."""
    return environment(tmp_path / "bin", ECHO)


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
    out, _ = job.communicate(timeout=200)
    assert job.returncode == 0 and (tmp_path / "told").is_file()
    assert "stopped" in out and out.count("not started") == 2


# --- SLURM ----------------------------------------------------------------------------------------------------------


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
    _, err = job.communicate(timeout=200)
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
