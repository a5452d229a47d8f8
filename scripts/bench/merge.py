"""Times merging ViT-L checkpoints against reading and writing the files, whole state dicts and mergekit.

python scripts/bench/merge.py                                   # three ViT-L and their base, 5.3 GB in all
python scripts/bench/merge.py --size base --rounds 5
python scripts/bench/merge.py --methods task_arithmetic,ties,dare
python scripts/bench/merge.py --mergekit VENV/bin/mergekit-pytorch

A round is one run of each, one after another, on files in the page cache:

    cat        the inputs to /dev/null and one of them to a new file: reading and writing once
    momo       `momo.merge.merge` in a process that has imported it; every method of --methods
    whole      the same task arithmetic with all state dicts in memory, written by safetensors
    mergekit   the same by mergekit in its own environment, from process start to end

Memory is what belongs to the processes alone (RssAnon and RssShmem, sampled every 5 ms), without mapped files, with
the interpreter and PyTorch in it. `momo` and `whole` also say how long the whole command takes, imports included.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from momo.models import Architecture, build_mae
from momo.normalise import Normalisation
from momo.weights import TENSORS_NAME, Card, save_weights

SENSORS = ("hirise", "ctx", "themis")
MOMO = """
import sys, time
from momo.merge import MergeConfig, merge
base, out, method, *models = sys.argv[1:]
config = MergeConfig(base=base, checkpoints=models, out=out, method=method)
started = time.perf_counter()
merge(config)
print("seconds", time.perf_counter() - started)
"""
WHOLE = """
import sys, time
import torch
from safetensors.torch import load_file, save_file
base, out, method, *models = sys.argv[1:]
started = time.perf_counter()
start, tuned = load_file(base), [load_file(model) for model in models]
merged = {}
for name, tensor in start.items():
    merged[name] = tensor + 0.5 * torch.stack([model[name] - tensor for model in tuned]).sum(0)
save_file(merged, out + ".safetensors")
print("seconds", time.perf_counter() - started)
"""


@dataclass
class Measured:
    """Runs of one contender: seconds of the work, of the whole command, and peak memory in MB."""

    work: list[float] = field(default_factory=list)
    command: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)


def make_models(folder: Path, size: str) -> list[Path]:
    """Writes a base and three checkpoints near it, as WEIGHTS; returns their tensor files, the base first."""
    architecture = Architecture(size=size)
    start = build_mae(architecture, seed=0).state_dict()
    parents: list[dict[str, str]] = []
    paths = []
    for number, name in enumerate(("base", *SENSORS)):
        generator = torch.Generator().manual_seed(number)
        step = 0.01 if number else 0.0
        card = Card(
            kind="checkpoint" if number else "base",
            architecture=architecture.to_dict(),
            contents=["encoder", "decoder"],
            normalisation=Normalisation().to_dict(),
            sensors=[{"name": name}] if number else [],
            parents=list(parents),
        )
        (folder / name).mkdir()
        tensors = {k: t + step * torch.randn(t.shape, generator=generator) for k, t in start.items()}
        sha256 = save_weights(folder / name, tensors, card)
        parents = parents or [{"role": "base", "name": "base", "sha256": sha256}]
        paths.append(folder / name / TENSORS_NAME)
    largest = max(tensor.numel() for tensor in start.values()) * 4 / 1e6
    print(f"ViT-{size} autoencoder: {paths[0].stat().st_size / 1e9:.2f} GB a file, largest tensor {largest:.1f} MB")
    return paths


def watch(command: list[str]) -> tuple[str, float, float]:
    """Runs a command; returns what it printed, its seconds and the peak of its own memory in MB."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    peak = [0.0]

    def sample() -> None:
        while process.poll() is None:
            peak[0] = max(peak[0], own_memory(process.pid))
            time.sleep(0.005)

    thread = threading.Thread(target=sample)
    thread.start()
    printed, errors = process.communicate()
    seconds = time.perf_counter() - started
    thread.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(command[:2])} failed:\n{errors[-2000:]}")
    return printed, seconds, peak[0]


def own_memory(pid: int) -> float:
    """Returns RssAnon + RssShmem of a process and those it started in MB; 0 when it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        program = Path(f"/proc/{pid}/cmdline").read_bytes()
        # Between fork and exec a child still is its parent, and would count it twice.
        children = [child for child in children if Path(f"/proc/{child}/cmdline").read_bytes() != program]
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    own = sum(float(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssShmem"))) * 1024 / 1e6
    return own + sum(own_memory(int(child)) for child in children)


def run_cat(paths: list[Path], out: Path, found: Measured) -> None:
    """Reads all files and writes one."""
    script = f"cat {' '.join(map(str, paths))} > /dev/null && cat {paths[0]} > {out}"
    _, seconds, _ = watch(["sh", "-c", script])
    found.work.append(seconds)


def run_python(code: str, method: str, paths: list[Path], out: Path, found: Measured) -> None:
    """Runs one of the scripts above."""
    printed, seconds, memory = watch(
        [sys.executable, "-c", code, str(paths[0]), str(out), method, *map(str, paths[1:])]
    )
    found.work.append(float(printed.rsplit("seconds", 1)[1]))
    found.command.append(seconds)
    found.memory.append(memory)


def run_mergekit(program: str, paths: list[Path], out: Path, found: Measured) -> None:
    """Runs mergekit's command for models of any architecture."""
    models = "\n".join(f"  - model: {path}\n    parameters: {{weight: 0.5}}" for path in paths[1:])
    config = out.with_suffix(".yaml")
    config.write_text(f"merge_method: task_arithmetic\nbase_model: {paths[0]}\nmodels:\n{models}\ndtype: float32\n")
    _, seconds, memory = watch([program, str(config), str(out)])
    found.work.append(seconds)
    found.command.append(seconds)
    found.memory.append(memory)


def remove(out: Path) -> None:
    """Removes whatever a contender wrote."""
    subprocess.run(["rm", "-rf", str(out), str(out) + ".safetensors", str(out.with_suffix(".yaml"))], check=True)


def main() -> None:
    """Measures all contenders in turn and prints ratios to `cat`, round by round."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="large")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--methods", default="task_arithmetic", help="divided by commas")
    parser.add_argument("--mergekit", help="the program mergekit-pytorch of another environment")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths, out = make_models(folder, given.size), folder / "merged"
        runs: dict[str, Callable[[Measured], None]] = {"cat": lambda found: run_cat(paths, out, found)}
        for method in given.methods.split(","):
            runs[f"momo {method}"] = lambda found, method=method: run_python(MOMO, method, paths, out, found)  # type: ignore[misc]
        runs["whole"] = lambda found: run_python(WHOLE, "task_arithmetic", paths, out, found)
        if given.mergekit:
            runs["mergekit"] = lambda found: run_mergekit(given.mergekit, paths, out, found)
        measured = {name: Measured() for name in runs}
        for _ in range(given.rounds):
            for name, run in runs.items():
                run(measured[name])
                remove(out)
    print(f"{'':<22} {'seconds':>8} {'to cat':>7} {'command':>8} {'memory':>9}")
    for name, found in measured.items():
        ratio = statistics.median(a / b for a, b in zip(found.work, measured["cat"].work, strict=True))
        command = f"{statistics.median(found.command):6.2f} s" if found.command else ""
        memory = f"{max(found.memory):6.0f} MB" if found.memory else ""
        print(f"{name:<22} {statistics.median(found.work):6.2f} s {ratio:7.2f} {command:>8} {memory:>9}")


if __name__ == "__main__":
    main()
