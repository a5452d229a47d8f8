"""What a run says: JSON lines always, TensorBoard, a progress bar with images/s and ETA."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from ..extras import require
from ..files import write_text
from ..runs import METRICS_NAME, read_metrics


class RunLog:
    """The log of one run, kept by rank 0.

    Args:
        run: RUN folder.
        samples: Training samples consumed so far; later lines of an interrupted run are dropped, they come again.
        total: Training samples of the whole run.
        name: Label of the progress bar.
    """

    def __init__(self, run: Path, *, samples: int, total: int, name: str) -> None:
        self._path = run / METRICS_NAME
        if self._path.is_file():
            kept = [record for record in read_metrics(run) if record["samples"] <= samples]
            if samples == 0:
                kept = []
            write_text(self._path, "".join(json.dumps(record) + "\n" for record in kept))
        self._stream = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 - closed in close()
        writer = require("torch.utils.tensorboard", "pretrain").SummaryWriter
        self._board = writer(str(run / "tensorboard"), purge_step=samples)
        tqdm = require("tqdm", "pretrain").tqdm
        self._bar = tqdm(
            total=total, initial=samples, unit="img", desc=name, disable=None, smoothing=0.1, mininterval=0.5
        )

    def advance(self, samples: int) -> None:
        """Moves the progress bar on."""
        self._bar.update(samples)

    def train(self, record: dict[str, Any]) -> None:
        """Writes one train line; see `momo.runs` for the file."""
        self._write({"event": "train", **record})
        for name in ("loss", "lr", "grad_norm", "images_per_s"):
            self._board.add_scalar(f"train/{name}", record[name], record["samples"])
        self._bar.set_postfix(loss=f"{record['loss']:.4f}", refresh=False)

    def validation(self, samples: int, val_loss: dict[str, Any]) -> None:
        """Writes one val line and prints it."""
        self._write({"event": "val", "samples": samples, **val_loss})
        self._board.add_scalar("val/loss", val_loss["loss"], samples)
        for sensor, estimate in val_loss["per_sensor"].items():
            self._board.add_scalar(f"val/{sensor}", estimate["loss"], samples)
        error = val_loss["stderr"] if val_loss["stderr"] is not None else math.nan
        self._bar.write(
            f"  {samples:>9,} samples: val loss {val_loss['loss']:.4f} +- {error:.4f} ({val_loss['count']} tiles)"
        )

    def _write(self, record: dict[str, Any]) -> None:
        self._stream.write(json.dumps(record, allow_nan=False) + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Closes file, board and bar."""
        self._bar.close()
        self._board.close()
        self._stream.close()
