"""Calls of the launch scripts on a machine without GPUs, and stand-ins for SLURM's commands."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from pathlib import Path

SCRIPTS = Path(__file__).parents[1] / "scripts"
SLURM = SCRIPTS / "slurm"

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


def call(script: str, *arguments: object, env: dict[str, str], cwd: Path, **more: str):
    command = ["bash", str(SCRIPTS / script), *map(str, arguments)]
    return subprocess.run(command, env=env | more, cwd=cwd, capture_output=True, text=True, timeout=400, check=False)


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


def wait_until(condition, job: subprocess.Popen[str], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the job did not get there in time"
        assert job.poll() is None, "the job ended too early"
        time.sleep(0.02)
