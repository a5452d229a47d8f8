"""Prints a table of select rule x merge method x validation loss of every sensor.

python scripts/merge_table.py runs=[runs/hirise,runs/ctx] corpora=[corpora/hirise,corpora/ctx] out=table.md
python scripts/merge_table.py ... joint=runs/joint/checkpoints/samples-000060000 samples=2000

Every merge is made and scored in memory by the fixed-mask validation of the runs. Nothing is tuned: each method has
its own default coefficient, and task arithmetic is tried with 1/n, 0.5 and 1. The last column is the mean over the
sensors less that of the plain average of the same checkpoints, with the standard error of that difference tile by
tile. The references above the merges are the base, each sensor's own checkpoint of lowest loss, and joint training.
"""

from __future__ import annotations

import contextlib
import io
import math
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from momo.config import load_config, option
from momo.errors import MomoError
from momo.files import write_text
from momo.merge import MergeConfig, SelectConfig, Selection, make_plan, merged_state, read_selection, select
from momo.pretrain.losses_of import LossMeter
from momo.pretrain.validation import LossEstimate
from momo.weights import load_weights

METHODS = ("task_arithmetic", "ties", "dare", "dare_ties", "magmax", "breadcrumbs", "model_stock")
TileLosses = Mapping[str, torch.Tensor]


@dataclass(kw_only=True)
class TableConfig:
    """What is compared on which tiles."""

    runs: list[str] = option([], "RUN folders, one a sensor")
    corpora: list[str] = option([], "their corpora")
    rules: list[str] = option(["evl", "early_stop", "last"], "rules of momo select")
    joint: str | None = option(None, "weights trained on all sensors together, for comparison")
    samples: int = option(5000, "validation tiles of each sensor")
    out: str | None = option(None, "Markdown file for the table")


def main(arguments: list[str]) -> int:
    """Makes the table."""
    config = load_config(TableConfig, None, arguments)
    with tempfile.TemporaryDirectory() as folder:
        chosen = {rule: _select(config, rule, Path(folder)) for rule in config.rules}
        first = next(iter(chosen.values()))
        base, _ = load_weights(Path(read_selection(first).base["path"]))
        trained = load_weights(Path(next(iter(read_selection(first).sensors.values())).checkpoint))[1]
        meter = LossMeter.open(trained, config.corpora, config.samples)
        rows = [("", "base", meter.tile_losses(base), None), *_references(config, meter, chosen)]
        seen: dict[str, str] = {}
        for rule, path in chosen.items():
            picked = _picked(read_selection(path))
            if picked in seen:
                rows.append((rule, f"the checkpoints of {seen[picked]}", {}, None))
                continue
            seen[picked] = rule
            rows += _merges(meter, rule, path, picked)
    text = "\n".join(_lines(meter, rows))
    print(text)
    if config.out is not None:
        write_text(Path(config.out), text + "\n")
    return 0


def _select(config: TableConfig, rule: str, folder: Path) -> Path:
    with contextlib.redirect_stdout(io.StringIO()):
        return select(SelectConfig(runs=list(config.runs), rule=rule, out=str(folder / f"{rule}.yaml")))


_Row = tuple[str, str, TileLosses, TileLosses | None]


def _references(config: TableConfig, meter: LossMeter, chosen: Mapping[str, Path]) -> Iterator[_Row]:
    if "early_stop" in chosen:
        for sensor, pick in read_selection(chosen["early_stop"]).sensors.items():
            yield "", f"{sensor} alone, {pick.samples:,} samples", _losses(meter, pick.checkpoint), None
    if config.joint is not None:
        yield "", "joint training", _losses(meter, config.joint), None


def _losses(meter: LossMeter, place: str) -> TileLosses:
    return meter.tile_losses(load_weights(Path(place))[0])


def _merges(meter: LossMeter, rule: str, path: Path, picked: str) -> Iterator[_Row]:
    plan = make_plan(MergeConfig(selection=str(path), method="average", dry_run=True))
    average = meter.tile_losses(merged_state(plan))
    yield f"{rule} ({picked})", "average", average, None
    shares = {"task_arithmetic": (0.5, 1.0)}
    for method in METHODS:
        for coefficient in shares.get(method, (None,)):
            merged = plan.replaced(method=method, coefficient=coefficient)
            label = method if coefficient is None else f"{method} {coefficient:g}"
            yield rule, label, meter.tile_losses(merged_state(merged)), average


def _picked(selection: Selection) -> str:
    return ", ".join(f"{name} {chosen.samples:,}" for name, chosen in selection.sensors.items())


def _lines(meter: LossMeter, rows: list[_Row]) -> Iterator[str]:
    yield f"| checkpoints | merge | {' | '.join(meter.sensors)} | mean | mean less the average's |"
    yield "|" + "---|" * (len(meter.sensors) + 4)
    for rule, label, losses, reference in rows:
        if not losses:
            yield f"| {rule} | {label} |" + " |" * (len(meter.sensors) + 2)
            continue
        found = {sensor: LossEstimate.of(losses[sensor]) for sensor in meter.sensors}
        cells = [f"{estimate.loss:.4f} +- {estimate.stderr:.4f}" for estimate in found.values()]
        mean = sum(estimate.loss for estimate in found.values()) / len(found)
        yield f"| {rule} | {label} | {' | '.join(cells)} | {mean:.4f} | {_gain(losses, reference)} |"


def _gain(losses: TileLosses, reference: TileLosses | None) -> str:
    if reference is None:
        return ""
    apart = [LossEstimate.of(losses[sensor].double() - reference[sensor].double()) for sensor in losses]
    error = math.sqrt(sum(estimate.stderr**2 for estimate in apart)) / len(apart)
    return f"{sum(estimate.loss for estimate in apart) / len(apart):+.4f} +- {error:.4f}"


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except MomoError as error:
        sys.exit(f"merge_table: {error}")
