"""RUN: what a pretraining job leaves, reading side.

config.yaml                      resolved configuration
metrics.jsonl                    one JSON object a line, `event` is `train`, `val`, `probe` or `incident`
tensorboard/                     the same as scalars
summary.json                     work done, see `momo.pretrain.summary`
checkpoints/samples-000400000/   model.safetensors, card.json (last), engine/ (optimizer state, newest ones only)
resume/samples-000412000/        the same between two checkpoints, for resuming alone; not for selection
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import CheckpointError
from .weights import CARD_NAME, Card, load_card

METRICS_NAME = "metrics.jsonl"
CONFIG_NAME = "config.yaml"
CHECKPOINTS_NAME = "checkpoints"
RESUME_NAME = "resume"


@dataclass(frozen=True)
class Checkpoint:
    """One complete checkpoint of a run."""

    path: Path
    samples: int
    card: Card

    @property
    def engine(self) -> Path:
        """Folder of the optimizer's state; it exists only in the newest checkpoints."""
        return self.path / "engine"


def checkpoint_name(samples: int) -> str:
    """Returns the folder name of the checkpoint taken after so many training samples."""
    return f"samples-{samples:09d}"


def read_checkpoints(run: Path) -> list[Checkpoint]:
    """Lists the complete checkpoints of a run, oldest first.

    Raises:
        CheckpointError: The folder is no run, or holds no complete checkpoint.
    """
    run = Path(run)
    if not (run / CONFIG_NAME).is_file():
        raise CheckpointError(
            "this is no run",
            seen=run,
            rule=f"a run is a folder with {CONFIG_NAME} and checkpoints/",
            fix="give the `out` folder of momo pretrain",
        )
    found = find_checkpoints(run)
    if not found:
        raise CheckpointError(
            "the run has no checkpoints",
            seen=run / "checkpoints",
            rule="a checkpoint is complete when it has a card.json",
            fix="run momo pretrain with the same `out` until its first validation",
        )
    return found


def find_checkpoints(run: Path, folder: str = CHECKPOINTS_NAME) -> list[Checkpoint]:
    """Lists the complete checkpoints in a folder of a run, oldest first; an empty list when there is none."""
    cards = sorted((Path(run) / folder).glob(f"samples-*/{CARD_NAME}"))
    return [Checkpoint(c.parent, int(c.parent.name.removeprefix("samples-")), load_card(c.parent)) for c in cards]


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Reads the metrics of a run; a last line cut off by a kill is left out.

    Raises:
        CheckpointError: The file is missing or a line other than the last is not JSON.
    """
    path = Path(run) / METRICS_NAME
    if not path.is_file():
        raise CheckpointError("the run has no metrics", seen=path, rule=f"a run holds {METRICS_NAME}")
    lines = path.read_text(encoding="utf-8").splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise CheckpointError("a line of the metrics is not JSON", seen=f"{path}, line {number}: {error}") from None
    return records
