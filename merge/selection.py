"""SELECTION: one YAML file that says which checkpoint of each sensor is merged, and why.

Keys are only ever added, with a default, so the version stays and older files are read.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from momo.errors import MergeError
from momo.files import write_text

FORMAT = "momo-selection"
FORMAT_VERSION = 1
_TIMM = "timm:"  # a place that is no path


@dataclass(kw_only=True)
class Chosen:
    """The checkpoint of one run.

    Attributes:
        run: RUN folder, or the curve file.
        checkpoint: Checkpoint folder or file.
        sha256: Hash of its tensors file; empty when it was not there and that was let through.
        samples: Training samples it has seen.
        val_loss: Its validation loss as measured.
        val_stderr: Standard error of that loss; None with one tile.
        early_stop_samples: Samples of the run's lowest validation loss, after smoothing.
        val_loss_smoothed: The loss the rule saw; None without smoothing.
        sensor: The sensor, where the key is a name of the user's; else None.
    """

    run: str
    checkpoint: str
    sha256: str
    samples: int
    val_loss: float
    val_stderr: float | None
    early_stop_samples: int
    val_loss_smoothed: float | None = None
    sensor: str | None = None


@dataclass(kw_only=True)
class Selection:
    """What was selected. Paths are relative to the file's folder, so a whole project folder can be moved.

    Attributes:
        rule: `evl`, `early_stop`, `last`, `at_samples` or `at_loss`.
        epsilon: Largest difference between the chosen losses that counted as equal.
        epsilon_requested: The user's epsilon; None when it came from the standard errors.
        distance: Mean distance from the early-stopping checkpoints, in `distance_unit`.
        base: `path` and `sha256` of the shared base.
        sensors: Sensor, or name of the run, to its checkpoint.
        rejected: Every other checkpoint with the reason.
        notes: What a reader must know, in sentences.
        distance_unit: `samples` or `steps`.
        smoothing: What the rule saw of the curves: `none`, `running_min` or `isotonic`.
        sweep: For `evl`, ranges of epsilon around the one used, each with what it picks: `low` (included), `high`
            (excluded; None: no end), `distance` and `samples` by sensor.
        format: `momo-selection`.
        format_version: Version of this layout.
    """

    rule: str
    epsilon: float
    epsilon_requested: float | None
    distance: float
    base: dict[str, str]
    sensors: dict[str, Chosen]
    rejected: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    distance_unit: str = "samples"
    smoothing: str = "none"
    sweep: list[dict[str, Any]] = field(default_factory=list)
    format: str = FORMAT
    format_version: int = FORMAT_VERSION

    def write(self, path: Path) -> None:
        """Writes the file in one step, with paths made relative to its folder."""
        fields = dataclasses.asdict(self)
        if not fields["base"]["path"].startswith(_TIMM):
            fields["base"]["path"] = os.path.relpath(fields["base"]["path"], path.parent)
        for chosen in fields["sensors"].values():
            for key in ("run", "checkpoint"):
                chosen[key] = os.path.relpath(chosen[key], path.parent)
        write_text(path, yaml.safe_dump(fields, sort_keys=False, allow_unicode=True))


def is_selection(path: Path) -> bool:
    """Says whether a file is a SELECTION of any version."""
    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, OSError, UnicodeDecodeError):
        return False
    return isinstance(fields, dict) and fields.get("format") == FORMAT


def read_selection(path: Path) -> Selection:
    """Reads a SELECTION file; its paths come back relative to the working folder.

    Raises:
        MergeError: The file is missing, not YAML, of another format, or lacks a field.
    """
    try:
        fields = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MergeError("the selection does not exist", seen=path, fix="make it with momo select") from None
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise MergeError("the selection is not YAML", seen=f"{path}: {' '.join(str(error).split())}") from None
    if not isinstance(fields, dict) or fields.get("format") != FORMAT or fields.get("format_version") != FORMAT_VERSION:
        raise MergeError(
            "this is no selection",
            seen=path,
            rule=f"format: {FORMAT}, format_version: {FORMAT_VERSION}",
            fix="make it with momo select",
        )
    folder = Path(path).parent
    try:
        if not fields["base"]["path"].startswith(_TIMM):
            fields["base"]["path"] = str(folder / fields["base"]["path"])
        for name, chosen in fields["sensors"].items():
            chosen["run"], chosen["checkpoint"] = (str(folder / chosen[key]) for key in ("run", "checkpoint"))
            fields["sensors"][name] = Chosen(**chosen)
        return Selection(**fields)
    except (TypeError, KeyError, AttributeError) as error:
        raise MergeError("the selection lacks a field or has an unknown one", seen=f"{path}: {error}") from None
