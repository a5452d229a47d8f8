"""What the report page reads: pretraining runs and a selection, as plain records.

Nothing here trains, merges or scores; a wrong or missing input is an error that names the file, while an input that
was not asked for is simply absent (the page says so).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from momo.errors import CheckpointError, MergeError
from momo.runs import CONFIG_NAME, METRICS_NAME, find_checkpoints, read_metrics
from momo.weights import Card

SELECTION_FORMAT = "momo-selection"
SELECTION_VERSION = 1
RULES = {"evl": "equal validation loss", "early_stop": "early stopping", "last": "last checkpoint"}


@dataclass(frozen=True)
class ValPoint:
    """One validation: samples seen, mean loss, its standard error, tiles scored, and (loss, stderr) by sensor."""

    samples: int
    loss: float
    stderr: float | None
    count: int
    per_sensor: dict[str, tuple[float, float | None]]


@dataclass(frozen=True)
class Run:
    """One pretraining job as its folder tells it.

    Attributes:
        name: Name on the page.
        path: The folder.
        train: (samples, loss) of the logged steps, in order of samples.
        val: Validations in order of samples; at least one.
        protocol: Hash of masks, normalisation and loss; equal hashes make losses comparable. Empty when not logged.
        config_text: The resolved configuration as YAML; empty when the folder has none.
        card: Card of the last whole checkpoint, or None.
        torn: True when the last line of metrics.jsonl was cut off by a kill and left out.
    """

    name: str
    path: Path
    train: list[tuple[int, float]]
    val: list[ValPoint]
    protocol: str
    config_text: str
    card: Card | None
    torn: bool

    @property
    def sensors(self) -> list[str]:
        """Sensors whose validation tiles were scored, else those of the last card."""
        seen = {sensor for point in self.val for sensor in point.per_sensor}
        if not seen and self.card is not None:
            seen = {str(entry["name"]) for entry in self.card.sensors}
        return sorted(seen)

    @property
    def early_stop(self) -> ValPoint:
        """The validation with the lowest loss; the earlier one on a tie."""
        return min(self.val, key=lambda point: (point.loss, point.samples))

    @property
    def last(self) -> ValPoint:
        """The final validation."""
        return self.val[-1]


def read_run(name: str, path: Path) -> Run:
    """Reads the metrics, configuration and last card of a RUN folder.

    Raises:
        CheckpointError: The folder or its metrics are missing, a line cannot be read, or nothing was validated.
    """
    metrics = path / METRICS_NAME
    if not metrics.is_file():
        raise CheckpointError(
            "the run is not there",
            seen=metrics if path.is_dir() else path,
            rule=f"a run is a folder with {METRICS_NAME}, written by momo pretrain",
            fix="correct runs in the report's configuration, or run momo pretrain first",
        )
    records = read_metrics(path)
    train: dict[int, float] = {}
    val: dict[int, ValPoint] = {}
    protocols: dict[str, None] = {}
    # A run resumed from a checkpoint logs the same sample counts again; the later line is the one that counts.
    for number, record in enumerate(records, start=1):
        try:
            if record["event"] == "train":
                if record["loss"] is not None:  # every step of the window was left out
                    train[int(record["samples"])] = float(record["loss"])
            elif record["event"] == "val":
                val[int(record["samples"])] = _val_point(record)
                protocols[str(record.get("protocol", ""))] = None
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                "a line of the metrics cannot be read",
                seen=f"{metrics}, line {number}: {type(error).__name__} {error}",
                rule="train lines have samples and loss; val lines have samples, loss, stderr and count",
            ) from None
    if not val:
        raise CheckpointError(
            "the run has no validation loss",
            seen=metrics,
            rule="its loss curve is drawn from lines with event val",
            fix="let the run reach its first validation, or leave it out of runs",
        )
    if len(protocols) > 1:
        raise CheckpointError(
            "the run changed its validation protocol on the way",
            seen=f"{metrics}: {', '.join(protocol[:12] or '(none)' for protocol in protocols)}",
            rule="losses are compared only under one protocol",
            fix="train it again without changing masks, loss or normalisation",
        )
    config, checkpoints = path / CONFIG_NAME, find_checkpoints(path)
    return Run(
        name=name,
        path=path,
        train=sorted(train.items()),
        val=[val[samples] for samples in sorted(val)],
        protocol=next(iter(protocols)),
        config_text=config.read_text(encoding="utf-8") if config.is_file() else "",
        card=checkpoints[-1].card if checkpoints else None,
        torn=len(records) < len(metrics.read_text(encoding="utf-8").splitlines()),
    )


def _val_point(record: dict[str, Any]) -> ValPoint:
    per_sensor = {
        str(sensor): (_finite(entry["loss"]), _stderr(entry["stderr"]))
        for sensor, entry in (record.get("per_sensor") or {}).items()
    }
    loss, stderr = _finite(record["loss"]), _stderr(record["stderr"])
    return ValPoint(int(record["samples"]), loss, stderr, int(record["count"]), per_sensor)


def _finite(value: Any) -> float:
    if not math.isfinite(number := float(value)):
        raise ValueError(f"{number} is not finite")
    return number


def _stderr(value: Any) -> float | None:
    """Returns a standard error; None where it is undefined (one tile)."""
    return None if value is None else _finite(value)


def with_error(loss: float, stderr: float | None, digits: int = 4) -> str:
    """Writes a loss with its standard error, when it has one."""
    return f"{loss:.{digits}f}" + ("" if stderr is None else f" ± {stderr:.{digits}f}")


@dataclass(frozen=True)
class Pick:
    """The checkpoint chosen for one sensor."""

    sensor: str
    run: Path
    checkpoint: Path
    sha256: str
    samples: int
    val_loss: float
    val_stderr: float | None
    early_stop_samples: int


@dataclass(frozen=True)
class Selection:
    """A SELECTION file with its paths resolved against its own folder."""

    path: Path
    rule: str
    epsilon: float | None
    epsilon_requested: float | None
    distance: float | None
    base_path: Path
    base_sha256: str
    picks: dict[str, Pick]
    rejected: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def rule_words(self) -> str:
        """The rule in words."""
        return RULES.get(self.rule, self.rule)

    @property
    def spread(self) -> float:
        """Largest difference between the validation losses of two picks."""
        losses = [pick.val_loss for pick in self.picks.values()]
        return max(losses) - min(losses)


def read_selection(path: Path) -> Selection:
    """Reads a SELECTION file.

    Raises:
        MergeError: The file is missing, not YAML, of another format version, or a field is missing.
    """
    try:
        fields = OmegaConf.to_container(OmegaConf.load(path))
    except FileNotFoundError:
        raise MergeError(
            "the selection is not there",
            seen=path,
            fix="run momo select first, or correct selection in the configuration",
        ) from None
    except Exception as error:
        reason = " ".join(str(error).split())
        raise MergeError("the selection cannot be read", seen=f"{path}: {reason}", rule="it is YAML") from None
    if not isinstance(fields, dict) or fields.get("format") != SELECTION_FORMAT:
        found = fields.get("format") if isinstance(fields, dict) else type(fields).__name__
        raise MergeError("this is no selection", seen=f"{path}: format {found}", rule=f"format is {SELECTION_FORMAT}")
    if fields.get("format_version") != SELECTION_VERSION:
        raise MergeError(
            "the selection has another format version",
            seen=f"{fields.get('format_version')} in {path}",
            rule=f"this momo reads version {SELECTION_VERSION}",
            fix="run momo select again",
        )
    try:
        return _selection(path, {str(key): value for key, value in fields.items()})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise MergeError(
            "a field of the selection is missing or wrong",
            seen=f"{path}: {type(error).__name__} {error}",
            rule="momo select writes base, rule, epsilon and one entry for each sensor",
            fix="run momo select again",
        ) from None


def _selection(path: Path, fields: dict[str, Any]) -> Selection:
    folder = path.parent
    picks = {
        str(sensor): Pick(
            sensor=str(sensor),
            run=folder / entry["run"],
            checkpoint=folder / entry["checkpoint"],
            sha256=str(entry["sha256"]),
            samples=int(entry["samples"]),
            val_loss=float(entry["val_loss"]),
            val_stderr=_stderr(entry["val_stderr"]),
            early_stop_samples=int(entry["early_stop_samples"]),
        )
        for sensor, entry in fields["sensors"].items()
    }
    if not picks:
        raise ValueError("sensors is empty")
    return Selection(
        path=path,
        rule=str(fields["rule"]),
        epsilon=_number(fields.get("epsilon")),
        epsilon_requested=_number(fields.get("epsilon_requested")),
        distance=_number(fields.get("distance")),
        base_path=folder / fields["base"]["path"],
        base_sha256=str(fields["base"]["sha256"]),
        picks=picks,
        rejected=list(fields.get("rejected") or []),
        notes=[str(note) for note in fields.get("notes") or []],
    )


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def run_of_pick(pick: Pick, runs: list[Run]) -> Run | None:
    """Returns the run a pick was taken from: the same folder, else the only run of that sensor alone."""
    for run in runs:
        if run.path.resolve() == pick.run.resolve():
            return run
    alone = [run for run in runs if run.sensors == [pick.sensor]]
    return alone[0] if len(alone) == 1 else None
