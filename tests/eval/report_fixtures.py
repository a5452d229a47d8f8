"""A small world for the report: corpora, runs, a selection, weights and results, all seeded."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import yaml

from momo.eval.metrics import HEADLINE, confusion_counts
from momo.eval.results import Examples, Predictions, Result, run_name, write_result
from momo.eval.run import _scores
from momo.runs import checkpoint_name
from momo.weights import load_card
from tests.conftest import PICO, write_corpus, write_weights

SENSORS = ("HiRISE", "CTX", "THEMIS")
# Model name -> share of test pixels or images it gets wrong.
ERRORS = {"random": 0.45, "base": 0.22, "CTX": 0.15, "merged": 0.14}


def write_run(run: Path, sensors: list[str], *, seed: int = 0, base: Path | None = None, points: int = 8) -> Path:
    """Writes a run with falling losses and three checkpoints; its metrics are those of `momo pretrain`."""
    rng = np.random.default_rng(seed)
    run.mkdir(parents=True)
    parents = [{"role": "base", "name": base.name, "sha256": load_card(base).sha256}] if base else []
    records = []
    for number in range(points):
        samples = 400 * (number + 1)
        level = 0.35 + 0.6 * np.exp(-number / 2) + 0.004 * max(0, number - 5) ** 2
        for step in range(4):
            loss = float(level + rng.normal(scale=0.03))
            records.append({"event": "train", "samples": samples - 300 + 100 * step, "step": 4 * number + step,
                            "epoch": 0.1, "loss": loss, "lr": 1e-3, "grad_norm": 1.0, "images_per_s": 100.0,
                            "seconds": 1.0})  # fmt: skip
        losses = {s: {"loss": float(level + 0.02 * k + rng.normal(scale=0.004)), "stderr": 0.012, "count": 8}
                  for k, s in enumerate(sensors)}  # fmt: skip
        mean = float(np.mean([entry["loss"] for entry in losses.values()]))
        val = {"loss": mean, "stderr": 0.011, "count": 8 * len(sensors), "protocol": "ab" * 32, "per_sensor": losses}
        records.append({"event": "val", "samples": samples, **val})
        if number >= points - 3:
            write_weights(
                run / "checkpoints" / checkpoint_name(samples), seed=seed + number, samples=samples, val_loss=val,
                sensors=[{"name": s, "tiles": 24} for s in sensors], parents=parents,
            )  # fmt: skip
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (run / "config.yaml").write_text(f"out: {run.name}\ntrain:\n  samples: {400 * points}\n")
    return run


def write_selection(path: Path, runs: dict[str, Path], base: Path, **changes: object) -> Path:
    """Writes a SELECTION that takes the second-last checkpoint of each run."""
    sensors = {}
    for sensor, run in runs.items():
        vals = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        vals = [value for value in vals if value["event"] == "val"]
        pick = vals[-2]
        checkpoint = run / "checkpoints" / checkpoint_name(pick["samples"])
        sensors[sensor] = {
            "run": str(run.relative_to(path.parent)),
            "checkpoint": str(checkpoint.relative_to(path.parent)),
            "sha256": load_card(checkpoint).sha256,
            "samples": pick["samples"],
            "val_loss": pick["loss"],
            "val_stderr": pick["stderr"],
            "early_stop_samples": min(vals, key=lambda value: value["loss"])["samples"],
        }
    fields = {
        "format": "momo-selection", "format_version": 1, "rule": "evl", "epsilon": 0.02, "epsilon_requested": 0.01,
        "distance": 133.3, "distance_unit": "samples",
        "base": {"path": str(base.relative_to(path.parent)), "sha256": load_card(base).sha256},
        "sensors": sensors,
        "rejected": [{"sensor": "CTX", "samples": 400, "val_loss": 0.95, "reason": "beyond epsilon"}],
        "notes": ["epsilon was widened"],
    }  # fmt: skip
    path.write_text(yaml.safe_dump(fields | changes, sort_keys=False))
    return path


def circles(rng: np.random.Generator, images: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns noisy images with bright discs and their masks; the first image has no disc."""
    row, col = np.indices((side, side))
    image = rng.normal(110, 14, size=(images, side, side))
    mask = np.zeros((images, side, side), dtype=np.uint8)
    for number in range(1, images):
        for _ in range(2):
            y, x, radius = rng.uniform(6, side - 6), rng.uniform(6, side - 6), rng.uniform(3, 7)
            disc = (row - y) ** 2 + (col - x) ** 2 < radius**2
            mask[number][disc] = 1
            image[number][disc] += 60
    return np.clip(image, 0, 255).astype(np.uint8), mask


def write_results(root: Path, weights: dict[str, Path], *, seeds: tuple[int, ...] = (0, 1, 2), side: int = 32) -> Path:
    """Writes results of kNN and linear probes on a landform set and of decoders on a crater set."""
    rng = np.random.default_rng(7)
    label = rng.integers(0, 4, size=60)
    image, mask = circles(rng, 12, side)
    keys = [f"data/test/images/{n:02d}.png" for n in range(len(mask))]
    size = np.tile(np.array([[side, side]]), (len(mask), 1))
    Examples(key_M=np.array(keys), image_MHW=image, size_M2=size, mask_MHW=mask).write(
        root / "examples" / "demo-crater_seg.npz"
    )
    for model, wrong in ERRORS.items():
        for seed in seeds:
            draw = np.random.default_rng([seed, sorted(ERRORS).index(model)])
            for protocol in ("knn", "linear"):
                flip = draw.random(len(label)) < wrong * (1.2 if protocol == "knn" else 0.8)
                predicted = np.where(flip, (label + 1 + draw.integers(0, 3, size=len(label))) % 4, label)
                found = Predictions.of_classes([f"data/test/{n}.png" for n in range(len(label))], label, predicted, 4)
                _write(root, "classification", "demo-landform_cls", protocol, model, seed, found, weights.get(model))
            shift = round(wrong * 12)
            guess = np.roll(mask, (draw.integers(0, shift + 1), shift), axis=(1, 2))
            counts = np.stack([confusion_counts(a, b, 2) for a, b in zip(mask, guess, strict=True)])
            found = Predictions(
                key_N=np.array(keys), counts_NCC=counts, index_M=np.arange(len(mask)), mask_MHW=guess, size_M2=size
            )
            _write(root, "segmentation", "demo-crater_seg", "decoder", model, seed, found, weights.get(model))
    (root / "config.yaml").write_text("out: results\n")
    return root


def _write(
    root: Path, task: str, dataset: str, protocol: str, model: str, seed: int, found: Predictions, weights: Path | None
) -> None:
    classes = ["background", "crater"] if task == "segmentation" else ["crater", "dune", "cone", "plain"]
    card = load_card(weights) if weights else None
    file = f"predictions/{run_name(dataset, protocol, model, seed)}.npz"
    rates = [0.001, 0.004] if protocol == "decoder" else [0.01, 0.1, 1.0]
    write_result(
        root,
        Result(
            task=task,
            dataset=dataset,
            dataset_fingerprint="cd" * 32,
            dataset_info={
                "classes": classes, "splits": {"train": 40, "val": 20, "test": len(found.key_N)},
                "sensor": "CTX", "gsd_m": 5.0, "licence": "CC0-1.0", "duplicates_across_splits": 0,
            },
            synthetic=True,
            protocol=protocol,
            model=model,
            weights={"file": "w/model.safetensors", "sha256": card.sha256, "kind": card.kind, "method": card.method}
            if card
            else None,
            architecture=PICO.to_dict(),
            sensors=[entry["name"] for entry in card.sensors] if card else [],
            pretrained_on_synthetic=True if card else None,
            seed=seed,
            seed_varies=["which 80% of the training images are used"],
            fraction=1.0,
            train_draw=0.8,
            train_subset=None,
            n_train=32,
            n_val=20,
            n_test=len(found.key_N),
            image_size=None,
            normalisation={"policy": "per_tile_zscore"},
            hyper_parameters={"lr": rates[0]} if protocol == "decoder" else {"k": 5},
            grid=[{"lr": rate, "val_score": 0.5} for rate in rates] if protocol == "decoder" else [],
            headline=HEADLINE[task],
            metrics=_scores(task, found.counts_NCC, 100),
            bootstrap={"draws": 200, "level": 0.95, "unit": "test image", "seed": 0},
            predictions={"file": file, "sha256": found.write(root / file)},
            few_seeds=False,
            device="cpu",
            wall_seconds=0.5,
            settings={},
            config_hash="ef" * 32,
        ),
    )  # fmt: skip


def write_world(root: Path) -> dict[str, object]:
    """Writes everything a report can show and returns the fields of its configuration."""
    corpora = [
        write_corpus(root / "corpora" / sensor, sensor=sensor, seed=k, tiles=16, val=6)
        for k, sensor in enumerate(SENSORS)
    ]
    every = [{"name": sensor, "tiles": 24} for sensor in SENSORS]
    base = write_weights(root / "base", sensors=every)
    runs = {s: write_run(root / "runs" / s, [s], seed=10 + k, base=base) for k, s in enumerate(SENSORS)}
    joint = write_run(root / "runs" / "joint", list(SENSORS), seed=3)
    selection = write_selection(root / "selection.yaml", runs, base)
    picked = {s: run / "checkpoints" / checkpoint_name(2800) for s, run in runs.items()}
    parents = [{"role": "base", "name": "base", "sha256": load_card(base).sha256}]
    parents += [{"role": "checkpoint", "name": s, "sha256": load_card(path).sha256} for s, path in picked.items()]
    method = {"name": "task_arithmetic", "coefficient": 0.5}
    merged = write_weights(root / "merged", seed=5, sensors=every, parents=parents, method=method)
    weights = {"merged": merged, "base": base, "CTX": picked["CTX"]}
    results = write_results(root / "results", weights)
    shown = [{"name": f"{s} model", "path": str(path)} for s, path in picked.items()]
    return {
        "title": "A small world",
        "results": str(results),
        "runs": {"joint": str(joint)} | {s: str(run) for s, run in runs.items()},
        "selection": str(selection),
        "weights": [{"name": "base", "path": str(base)}, *shown, {"name": "merged", "path": str(merged)}],
        "corpora": [str(corpus) for corpus in corpora],
    }
