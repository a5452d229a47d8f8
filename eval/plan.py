"""Which runs an evaluation consists of, and which of them are there already."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from momo.config import to_dict
from momo.errors import EvalError
from momo.files import sha256_file, sha256_json
from momo.models import sample_rng

from .config import MIN_SEEDS, DatasetConfig, EvalConfig
from .datasets import LabelledDataset, Sample
from .features import Model
from .results import load_result, run_name


@dataclass(frozen=True)
class PlannedRun:
    """One run that is wanted, with the file it makes."""

    dataset: LabelledDataset
    dataset_config: DatasetConfig
    protocol: str
    model: Model
    seed: int
    settings: dict[str, Any]
    path: Path


def plan_runs(
    config: EvalConfig, dataset: LabelledDataset, entry: DatasetConfig, models: list[Model], out: Path
) -> list[PlannedRun]:
    """Lists every run of one dataset, in the order they are shown."""
    runs = []
    for model in models:
        for protocol in getattr(config.protocols, dataset.task):
            settings = _settings(config, entry, dataset, protocol)
            for seed in config.seeds:
                name = run_name(dataset.name, protocol, model.name, seed, config.fraction, entry.train_subset)
                path = out / "runs" / f"{name}.json"
                runs.append(PlannedRun(dataset, entry, protocol, model, seed, settings, path))
    return runs


def _settings(config: EvalConfig, entry: DatasetConfig, dataset: LabelledDataset, protocol: str) -> dict[str, Any]:
    """Returns the options a run's numbers depend on (not batch sizes of encoding, cache sizes or paths)."""
    own = to_dict(getattr(config, protocol))
    own.pop("cache_gb", None)
    subset = entry.train_subset
    return {
        protocol: own,
        "pooling": config.pooling if dataset.task == "classification" else None,
        "image_size": config.image_size,
        "bands": entry.bands,
        "train_draw": config.train_draw,
        "fraction": config.fraction,
        "train_subset": {"file": subset, "sha256": sha256_file(dataset.root / subset)} if subset else None,
        "bootstrap_draws": config.bootstrap_draws,
        "few_seeds": len(config.seeds) < MIN_SEEDS,
    }


def is_done(run: PlannedRun) -> bool:
    """Tells whether the run is there, and refuses a file of the same name that was made from something else."""
    if not run.path.exists():
        return False
    found = load_result(run.path)
    wanted = {
        "dataset fingerprint": run.dataset.fingerprint,
        "weights sha256": run.model.card.sha256 if run.model.weights else None,
        "architecture": run.model.card.architecture,
        "normalisation policy": run.model.card.normalisation["policy"],
        "config hash": sha256_json(run.settings),
    }
    there = found.identity()
    other = [f"{key} {_short(there[key])}, now {_short(value)}" for key, value in wanted.items() if there[key] != value]
    other += [
        f"option {key} {found.settings.get(key)}, now {value}"
        for key, value in run.settings.items()
        if found.settings.get(key) != value
    ]
    if other:
        raise EvalError(
            "a run of this name was made from something else",
            seen=f"{run.path}: {'; '.join(other)}",
            rule="results are never overwritten",
            fix="choose another `out`, or remove the old results folder",
        )
    if found.predictions is not None and not (run.path.parent.parent / found.predictions["file"]).is_file():
        raise EvalError(
            "a run lacks its predictions",
            seen=run.path,
            rule=f"it names {found.predictions['file']}",
            fix="remove the run's JSON and run momo eval again",
        )
    return True


def _short(value: object) -> object:
    return value[:12] + "..." if isinstance(value, str) and len(value) == 64 else value


def draw_train(samples: list[Sample], share: float, seed: int) -> list[int]:
    """Draws training images without replacement, the same share of every stratum and at least one.

    Args:
        samples: Training images.
        share: Share to draw, in (0, 1]; 1 draws all of them.
        seed: Seed of the run.

    Returns:
        Sorted positions. A smaller share of the same seed is a subset of a larger one.
    """
    stratum_N = np.array([sample.stratum for sample in samples])
    chosen: list[int] = []
    for stratum in np.unique(stratum_N):
        members = np.flatnonzero(stratum_N == stratum)
        order = sample_rng(str(stratum), seed, "train draw").permutation(members)
        chosen += [int(position) for position in order[: max(1, round(share * len(members)))]]
    return sorted(chosen)
