"""Validation curves: what selection knows of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from momo.errors import CheckpointError, MergeError
from momo.runs import Checkpoint, read_checkpoints
from momo.sensors import SENSORS

from .evl import Candidate


@dataclass(frozen=True)
class Curve:
    """The checkpoints of one sensor's run with their validation losses."""

    sensor: str
    run: Path
    checkpoints: list[Checkpoint]

    @property
    def candidates(self) -> list[Candidate]:
        """The curve as the selection rules see it."""
        return [Candidate(c.samples, self.val_loss(i)["loss"]) for i, c in enumerate(self.checkpoints)]

    def val_loss(self, index: int) -> dict[str, Any]:
        """Returns loss, stderr and count of one checkpoint."""
        val_loss = self.checkpoints[index].card.val_loss
        assert val_loss is not None
        return val_loss


def read_curve(run: Path) -> Curve:
    """Reads the validation curve of a run of one sensor.

    Raises:
        CheckpointError: The run is missing or empty, or a checkpoint has no validation loss.
        MergeError: The run is of several sensors.
    """
    checkpoints = read_checkpoints(run)
    sensors = [sensor["name"] for sensor in checkpoints[-1].card.sensors]
    if len(sensors) != 1:
        raise MergeError(
            "a run is not of one sensor",
            seen=f"{run}: {', '.join(sensors) or 'none named'}",
            rule="selection is over runs of one sensor each",
            fix="leave the joint run out",
        )
    for checkpoint in checkpoints:
        if checkpoint.card.val_loss is None:
            raise CheckpointError("a checkpoint has no validation loss", seen=checkpoint.path)
    return Curve(sensors[0], run, checkpoints)


def sensor_order(name: str) -> tuple[int, str]:
    """Sort key: momo's own sensors first, in their usual order."""
    return (list(SENSORS).index(name) if name in SENSORS else len(SENSORS), name)
