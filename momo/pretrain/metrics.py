"""What a run says: JSON lines always, TensorBoard, a progress bar with images/s and ETA."""

from __future__ import annotations

import contextlib
import json
import math
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import MomoError
from ..extras import require
from ..files import write_text
from ..runs import METRICS_NAME, read_metrics

# Incidents of the data and of the arithmetic: they come again when their samples do. All others are history.
_REPEATED = ("skipped_step", "corrupt_tile")
_NOT_PLOTTED = ("samples", "step", "seconds")


class RunLog:
    """The log of one run, kept by rank 0.

    A line of metrics.jsonl is an `event` at a number of `samples`:

        train      means over the steps since the last one: `loss`, `lr`, `grad_norm`, `images_per_s` and what else the
                   trainer measures; numbers and {name: number} groups of them go to TensorBoard under their names
        val        the fixed-mask validation: `loss`, `stderr`, `count`, `per_sensor`, ...
        probe      the kNN probe: `accuracy`, `weighted_f1`, ...
        incident   what went otherwise than planned, `kind` says what: `skipped_step`, `corrupt_tile`, `reloaded`,
                   `resumed`, `signal`, `upload_failed`, ...

    Each line is on disk (as far as the operating system goes) when its method returns. A number that is not finite is
    written as null, in an incident as text.

    Args:
        run: RUN folder.
        samples: Training samples consumed so far; later lines of an interrupted run are dropped, they come again.
            Incidents that do not come again with the samples are kept.
        total: Training samples of the whole run.
        name: Label of the progress bar.

    Raises:
        MomoError: The file cannot be written, for example because the disk is full; the lines before are intact.
        CheckpointError: A line other than the last is not JSON.
    """

    def __init__(self, run: Path, *, samples: int, total: int, name: str) -> None:
        self._run, self._path = run, run / METRICS_NAME
        self._drop_after(samples)
        with _disk_errors(self._path):
            # Unbuffered: what cannot be written now must not come out later, behind other lines.
            self._stream = open(self._path, "ab", buffering=0)  # noqa: SIM115 - closed in close()
        tqdm = require("tqdm", "pretrain").tqdm
        # Its own lock is a semaphore of the system, which a rank that gives up would leave behind with a warning.
        tqdm.set_lock(threading.RLock())
        self._bar = tqdm(
            total=total, initial=samples, unit="img", desc=name, disable=None, smoothing=0.1, mininterval=0.5
        )
        self._board: Any = None
        self._open_board(samples)

    def rewind(self, samples: int) -> None:
        """Goes back to an earlier number of samples, as after a reload of the last good state."""
        self._stream.close()
        self._drop_after(samples)
        with _disk_errors(self._path):
            self._stream = open(self._path, "ab", buffering=0)  # noqa: SIM115 - closed in close()
        self._on_board("close")
        self._open_board(samples)
        self._bar.n = samples
        self._bar.refresh()

    def advance(self, samples: int) -> None:
        """Moves the progress bar on."""
        self._bar.update(samples)

    def say(self, text: str) -> None:
        """Prints a line above the progress bar."""
        self._bar.write(text)

    def train(self, record: Mapping[str, Any]) -> None:
        """Writes one train line.

        Args:
            record: At least `samples`, `loss`, `lr`, `grad_norm` and `images_per_s`.
        """
        self._write({"event": "train", **record})
        self._plot("train", {key: value for key, value in record.items() if key not in _NOT_PLOTTED}, record["samples"])
        rest = {"wait": f"{record['data_wait']:.0%}"} if "data_wait" in record else {}
        self._bar.set_postfix(loss=f"{record['loss']:.4f}", **rest, refresh=False)

    def validation(self, samples: int, val_loss: Mapping[str, Any]) -> None:
        """Writes one val line and prints it.

        Args:
            samples: Training samples consumed.
            val_loss: What `momo.pretrain.validation.summarise` returns.
        """
        self._write({"event": "val", "samples": samples, **val_loss})
        self._plot("val", {"loss": val_loss["loss"]}, samples)
        for sensor, part in val_loss["per_sensor"].items():
            units = {unit: estimate["loss"] for unit, estimate in part.get("per_unit", {}).items()}
            self._plot("val", {sensor: part["loss"]}, samples)
            self._plot(f"val_units_{sensor}", units, samples)
            self._plot(f"val_terms_{sensor}", part.get("terms", {}), samples)
        error = val_loss["stderr"] if val_loss["stderr"] is not None else math.nan
        self.say(f"  {samples:>9,} samples: val loss {val_loss['loss']:.4f} +- {error:.4f} ({val_loss['count']} tiles)")

    def probe(self, samples: int, result: Mapping[str, Any]) -> None:
        """Writes one probe line and prints it.

        Args:
            samples: Training samples consumed.
            result: `KnnResult.to_dict()`.
        """
        self._write({"event": "probe", "samples": samples, **result})
        self._plot("probe", {name: result[name] for name in ("accuracy", "weighted_f1")}, samples)
        self.say(
            f"  {samples:>9,} samples: kNN probe accuracy {result['accuracy']:.3f}, "
            f"weighted F1 {result['weighted_f1']:.3f} ({result['val_images']} images)"
        )

    def incident(self, kind: str, samples: int, **fields: Any) -> None:
        """Writes one incident line and prints it.

        Args:
            kind: What happened; see the class.
            samples: Training samples consumed.
            fields: What belongs to it: step, keys, reason, counts.
        """
        fields = {name: _said(value) for name, value in fields.items()}
        self._write({"event": "incident", "kind": kind, "samples": samples, **fields})
        detail = ", ".join(f"{name} {value}" for name, value in fields.items())
        self.say(f"  {samples:>9,} samples: {kind.replace('_', ' ')}" + (f": {detail}" if detail else ""))

    def reconstructions(self, samples: int, picture_HW: torch.Tensor) -> None:
        """Shows a picture on TensorBoard.

        Args:
            samples: Training samples consumed.
            picture_HW: Grey values in [0, 1], see `momo.pretrain.reconstruction`.
        """
        self._on_board("add_image", "reconstructions", picture_HW, samples, dataformats="HW")

    def close(self) -> None:
        """Closes file, board and bar."""
        self._bar.close()
        self._on_board("close")
        self._stream.close()

    def _drop_after(self, samples: int) -> None:
        if not self._path.is_file():
            return
        text = self._path.read_text(encoding="utf-8", errors="replace")
        kept = "".join(json.dumps(record) + "\n" for record in read_metrics(self._run) if _stays(record, samples))
        # As a rule nothing is dropped, and then a full disk is no reason not to go on.
        if kept != text:
            with _disk_errors(self._path):
                write_text(self._path, kept)

    def _write(self, record: dict[str, Any]) -> None:
        line = (json.dumps(_finite(record), allow_nan=False) + "\n").encode()
        size = os.fstat(self._stream.fileno()).st_size
        with _disk_errors(self._path):
            try:
                written = self._stream.write(line)
                if written != len(line):
                    self._stream.write(line[written:])
            except OSError:
                # Half a line would damage the next one; to cut it off needs no space.
                with contextlib.suppress(OSError):
                    os.ftruncate(self._stream.fileno(), size)
                raise

    def _open_board(self, samples: int) -> None:
        writer = require("torch.utils.tensorboard", "pretrain").SummaryWriter
        # TensorBoard hides what was written from purge_step on; the lines at `samples` themselves stay.
        purge = samples + 1 if samples else 0
        try:
            self._board = writer(str(self._run / "tensorboard"), purge_step=purge)
        except OSError as error:
            self._without_board(error)

    def _plot(self, where: str, values: Mapping[str, Any], samples: int) -> None:
        for name, value in values.items():
            if isinstance(value, Mapping):
                self._plot(f"{where}_{name}", value, samples)
            elif isinstance(value, (int, float)) and math.isfinite(value):
                self._on_board("add_scalar", f"{where}/{name}", float(value), samples)

    def _on_board(self, method: str, *values: Any, **options: Any) -> None:
        if self._board is None:
            return
        try:
            getattr(self._board, method)(*values, **options)
        except OSError as error:
            self._without_board(error)

    def _without_board(self, error: OSError) -> None:
        """TensorBoard repeats what metrics.jsonl says: its failure is told and does not stop a run."""
        self._board = None
        self.say(f"  TensorBoard is off until the run is started again: {error}")


@contextlib.contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise MomoError(
            "the metrics of the run cannot be written",
            seen=f"{path}: {error.strerror or error}",
            rule="the disk of `out` has space and can be written to; the lines so far are intact",
            fix="free some space, then start again with the same command: the run continues from its last checkpoint",
        ) from error


def _stays(record: Mapping[str, Any], samples: int) -> bool:
    if record.get("event") == "incident" and record.get("kind") not in _REPEATED:
        return True
    # The validation before the first step comes again, too.
    return samples > 0 and record.get("samples", 0) <= samples


def _finite(value: Any) -> Any:
    """Takes what JSON has no number for out of a record."""
    if isinstance(value, Mapping):
        return {name: _finite(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _said(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, (int, float, bool, str, list, tuple, Mapping)) or value is None else str(value)
