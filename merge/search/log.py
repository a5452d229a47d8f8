"""The trials of a search on disk: one line of JSON a finished trial, so that a killed search goes on where it was.

<out>-trials.jsonl   first line: what the search is of; then one line a trial, in order, written when it is finished
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from momo.errors import MergeError
from momo.files import write_text

from .space import Point

FORMAT = "momo-search-trials"


@dataclass(frozen=True)
class Trial:
    """One scored merge.

    Attributes:
        number: From 0, in the order of the search.
        point: The merge.
        losses: Mean loss by sensor on the searched half; None where it is not finite.
        score: The objective, smaller is better; None when it is not finite.
        parameters: What the optimiser chose, unrounded, or would have chosen; None for points it cannot choose.
    """

    number: int
    point: Point
    losses: dict[str, float | None]
    score: float | None
    parameters: dict[str, Any] | None = None

    def to_line(self) -> str:
        """Returns the trial as a line of JSON; floats keep all their bits."""
        point = {"method": self.point.method, "values": dict(self.point.values), "label": self.point.label}
        fields = {"trial": self.number, **point, "score": self.score, "losses": self.losses}
        return json.dumps({**fields, "parameters": self.parameters}, allow_nan=False) + "\n"

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> Trial:
        """Builds a trial from its line."""
        point = Point(fields["method"], fields["values"], fields["label"])
        return cls(fields["trial"], point, fields["losses"], fields["score"], fields["parameters"])


@dataclass
class TrialLog:
    """The trials of one search.

    Attributes:
        path: The file.
        trials: Finished trials in order.
    """

    path: Path
    trials: list[Trial] = field(default_factory=list)
    _size: int = 0

    @classmethod
    def open(cls, path: Path, identity: dict[str, Any]) -> TrialLog:
        """Opens the file of a search, or starts it.

        A last line that a kill has cut off is taken away: its trial is scored again.

        Args:
            path: The file.
            identity: All that the trials depend on but their number.

        Raises:
            MergeError: The file is of another search, or damaged.
        """
        head = {"format": FORMAT, "identity": json.loads(json.dumps(identity))}
        if not path.is_file():
            write_text(path, json.dumps(head) + "\n")
            return cls(path, [], path.stat().st_size)
        try:
            raw = path.read_text(encoding="utf-8")
            whole = raw[: raw.rfind("\n") + 1]
            stored, *lines = [json.loads(line) for line in whole.splitlines()]
            known = dict(stored["identity"])
            if stored["format"] != FORMAT:
                raise ValueError(stored["format"])
            trials = [Trial.from_fields(fields) for fields in lines]
            if [trial.number for trial in trials] != list(range(len(trials))):
                raise ValueError("trials are not in order")
        except (ValueError, KeyError, TypeError) as error:
            raise MergeError(
                "the trials of a search cannot be read",
                seen=f"{path}: {error!r}",
                rule="one line of JSON a trial, in order",
                fix="remove the file to search anew",
            ) from None
        _check_identity(path, known, head["identity"])
        if whole != raw:
            write_text(path, whole)
        return cls(path, trials, path.stat().st_size)

    def add(self, trial: Trial) -> None:
        """Writes a trial to the disk.

        Raises:
            MergeError: Another process has written to the file.
        """
        if self.path.stat().st_size != self._size:
            raise MergeError(
                "another search writes to the same file",
                seen=self.path,
                rule="one search at a time",
                fix="wait for it, or give another `out`",
            )
        with open(self.path, "a", encoding="utf-8") as stream:
            stream.write(trial.to_line())
            stream.flush()
            os.fsync(stream.fileno())
            self._size = stream.tell()
        self.trials.append(trial)


def _check_identity(path: Path, stored: dict[str, Any], wanted: dict[str, Any]) -> None:
    different = sorted(key for key in {*stored, *wanted} if stored.get(key) != wanted.get(key))
    if different:
        raise MergeError(
            "the trials beside the output are of another search",
            seen=f"{path} differs in {', '.join(different)}",
            rule="a search goes on only with the weights, tiles, range, objective and seed it began with",
            fix=f"give another `out`, or remove {path.name}",
        )
