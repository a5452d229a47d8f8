"""Small runs for the tests of pretraining."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from momo.config import load_config, to_yaml
from momo.pretrain import PretrainConfig
from momo.runs import read_checkpoints, read_metrics
from momo.weights import load_weights


def make_config(out: Path, corpus: Path, *overrides: str) -> PretrainConfig:
    """A run of eight steps of eight tiles, with four checkpoints."""
    items = [
        f"out={out}", f"data.corpora=[{corpus}]", "model.size=pico", "model.patch_size=8", "train.samples=64",
        "train.batch_size=8", "train.precision=fp32", "train.log_every=2", "train.warmup_samples=8",
        "validation.every=16", "validation.batch_size=4", "telemetry.reconstructions=0",
    ]  # fmt: skip
    return load_config(PretrainConfig, None, [*items, *overrides])


def train_here(config: PretrainConfig, *, stop_after: int | None = None) -> Path:
    """Trains in this process, of which there is a group of one (fixture `one_rank`)."""
    from momo.pretrain.setup import store_config
    from momo.pretrain.trainer import Trainer

    store_config(config)
    trainer = Trainer(config, rank=0, ranks=1)
    if stop_after is not None:
        trainer.stop = stop_after
    trainer.train()
    return Path(config.out)


def final_weights(run: Path) -> dict[str, torch.Tensor]:
    """Weights of the last checkpoint."""
    return load_weights(read_checkpoints(run)[-1].path)[0]


def same_weights(first: Path, second: Path) -> bool:
    """Says whether the last checkpoints of two runs are equal bit for bit."""
    one, two = final_weights(first), final_weights(second)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def incidents(run: Path) -> list[dict[str, Any]]:
    """Incidents in the log of a run."""
    return [record for record in read_metrics(run) if record["event"] == "incident"]


SCRIPT = """
import sys
from momo.cli import main
if __name__ == "__main__":
    sys.exit(main(["pretrain", "--config", *sys.argv[1:]]))
"""


def start_job(folder: Path, config: PretrainConfig, *overrides: str, **popen: object) -> subprocess.Popen[str]:
    """Starts `momo pretrain` as a user would, in a process group of its own."""
    path = folder / f"{Path(config.out).name}.yaml"
    path.write_text(to_yaml(config))
    (folder / "job.py").write_text(SCRIPT)
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    command = [sys.executable, str(folder / "job.py"), str(path), *overrides]
    return subprocess.Popen(command, env=environment, start_new_session=True, text=True, **popen)  # type: ignore[call-overload]
