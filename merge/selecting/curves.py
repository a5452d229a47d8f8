"""Validation curves: what selection knows of a run."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from momo.errors import CheckpointError, MergeError
from momo.runs import CONFIG_NAME, Checkpoint, read_checkpoints
from momo.sensors import SENSORS
from momo.weights import Card

from .evl import Candidate
from .smoothing import smooth


@dataclass(frozen=True)
class Point:
    """One checkpoint with its validation loss.

    Attributes:
        checkpoint: Its folder or file.
        samples: Training samples it has seen.
        loss: Validation loss as measured.
        stderr: Standard error of the loss; None when there is none.
        stderr_products: The same with tiles of one product taken as alike (`momo.pretrain.validation`), or None.
        protocol: Hash of masks, normalisation and loss; None when not known.
        base_sha256: Hash of the base; None when not known.
        card: Its card; None when the curve comes from a file.
    """

    checkpoint: Path
    samples: int
    loss: float
    stderr: float | None
    stderr_products: float | None = None
    protocol: str | None = None
    base_sha256: str | None = None
    card: Card | None = None

    def error(self, over: str) -> float | None:
        """Returns the standard error over `tiles` or `products`; None when there is none of the kind."""
        return self.stderr if over == "tiles" else self.stderr_products


@dataclass(frozen=True)
class Curve:
    """The checkpoints of one run, oldest first.

    Attributes:
        name: Key in the SELECTION: the sensor, or the name the user gave.
        sensor: The sensor.
        place: RUN folder, or the CSV or JSON file.
        points: Checkpoints in order of samples; at least one.
        smoothed: Losses as the rules see them, one a point; the raw ones without smoothing.
        base_path: Where the run took its base from, or None.
        settings: Resolved configuration of a RUN; empty for a file.
        notes: What was left out on reading.
    """

    name: str
    sensor: str
    place: Path
    points: tuple[Point, ...]
    smoothed: tuple[float, ...]
    base_path: str | None = None
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def candidates(self, unit: str = "samples") -> list[Candidate]:
        """Returns the curve as the rules see it.

        Args:
            unit: `samples`, or `steps`: distances count positions among the checkpoints, so that unevenly spaced
                checkpoints count alike.
        """
        places = [point.samples for point in self.points] if unit == "samples" else range(1, len(self.points) + 1)
        return [Candidate(place, loss) for place, loss in zip(places, self.smoothed, strict=True)]


def smoothed_curve(curve: Curve, smoothing: str) -> Curve:
    """Returns the curve with `smoothed` filled in; see `momo.merge.selecting.smoothing.smooth`."""
    losses = smooth([p.loss for p in curve.points], [p.stderr for p in curve.points], smoothing)
    return dataclasses.replace(curve, smoothed=tuple(losses))


def read_curve(place: Path, name: str | None = None) -> Curve:
    """Reads a validation curve from a RUN folder or a CSV or JSON file.

    Args:
        place: Where it is.
        name: Key in the SELECTION; None: the sensor.

    Raises:
        CheckpointError: The run is missing or empty, or a checkpoint has no usable validation loss.
        MergeError: The run is of several sensors, or the file cannot be read.
    """
    place = Path(place)
    if place.suffix.lower() in (".csv", ".json") and not place.is_dir():
        from .curve_files import read_curve_file

        curve = read_curve_file(place)
    else:
        curve = _read_run(place)
    return curve if name is None else dataclasses.replace(curve, name=name)


def _read_run(run: Path) -> Curve:
    checkpoints = read_checkpoints(run)
    sensors = [sensor["name"] for sensor in checkpoints[-1].card.sensors]
    if len(sensors) != 1:
        raise MergeError(
            "a run is not of one sensor",
            seen=f"{run}: {', '.join(sensors) or 'none named'}",
            rule="selection is over runs of one sensor each",
            fix="leave the joint run out",
        )
    points = tuple(sorted((_point(checkpoint) for checkpoint in checkpoints), key=lambda point: point.samples))
    settings = _settings(run)
    base = settings.get("base")
    return Curve(
        name=sensors[0],
        sensor=sensors[0],
        place=run,
        points=points,
        smoothed=tuple(point.loss for point in points),
        base_path=str(base) if base else None,
        settings=settings,
    )


def _point(checkpoint: Checkpoint) -> Point:
    val_loss = checkpoint.card.val_loss
    if val_loss is None:
        raise CheckpointError(
            "a checkpoint has no validation loss",
            seen=checkpoint.path,
            rule="selection compares validation losses",
            fix="validate it with momo validate, or give the curve as a CSV file",
        )
    try:
        errors = [None if e is None else float(e) for e in (val_loss["stderr"], val_loss.get("stderr_products"))]
        loss, protocol = float(val_loss["loss"]), str(val_loss["protocol"])
        int(val_loss["count"])
        if not all(math.isfinite(number) for number in (loss, *(e for e in errors if e is not None))):
            raise ValueError(f"loss {loss}, standard errors {errors}")
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            "the validation loss in a card cannot be read",
            seen=f"{checkpoint.path}: {type(error).__name__} {error}",
            rule="loss, stderr, count and protocol, with finite numbers",
            fix="validate the checkpoint again",
        ) from None
    card = checkpoint.card
    return Point(checkpoint.path, checkpoint.samples, loss, errors[0], errors[1], protocol, card.base_sha256, card)


def _settings(run: Path) -> dict[str, Any]:
    try:
        stored = yaml.safe_load((run / CONFIG_NAME).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            "the configuration of a run cannot be read", seen=f"{run / CONFIG_NAME}: {reason}", rule="it is YAML"
        ) from None
    return stored if isinstance(stored, dict) else {}


def curve_order(curve: Curve) -> tuple[int, str, str]:
    """Sort key: momo's own sensors first, in their usual order, then by name."""
    known = list(SENSORS).index(curve.sensor) if curve.sensor in SENSORS else len(SENSORS)
    return (known, curve.sensor, curve.name)
