"""`momo eval`: every (dataset, protocol, model, seed) once, one JSON each.

What a seed changes is written into every result (`seed_varies`): the stratified draw of training images; for a random
model its initialisation; for the decoder its initialisation and batch order. Test and validation images, trained
encoders and bootstrap resamples are the same for all seeds, so the spread over seeds is that of these things alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from timm.models.vision_transformer import VisionTransformer

from momo.config import to_yaml
from momo.errors import ConfigError
from momo.extras import require
from momo.files import remove_leftovers, sha256_json, write_text

from .config import MIN_SEEDS, EvalConfig
from .datasets import SPLITS, open_dataset
from .features import Preparation, open_models, pooled_features, prepare
from .metrics import HEADLINE, METRICS
from .pictures import example_indices, pad_masks, write_examples
from .plan import PlannedRun, draw_train, is_done, plan_runs
from .probes import Outcome, run_knn, run_linear
from .results import Predictions, Result, Score, load_result, write_result
from .segmentation import TokenSource, run_decoder, token_gib
from .statistics import LEVEL, Summary, bootstrap_interval, summarise

Report = Callable[[str], None]
BOOTSTRAP_SEED = 0


def evaluate(config: EvalConfig, *, report: Report = print) -> Path:
    """Scores every model on every dataset and fills the RESULTS folder.

    Runs that are there already with the same dataset, weights and options are kept, so a killed evaluation continues.

    Args:
        config: What to evaluate.
        report: Takes the lines the user should see.

    Returns:
        The RESULTS folder.

    Raises:
        DataError: A dataset is missing or damaged (see `open_dataset`).
        CheckpointError: Weights are missing or damaged.
        EvalError: The folder holds a run of the same name made from other data, weights or options.
        ConfigError: Two datasets have one name, or the device is not there.
    """
    out = Path(config.out)
    device = _device(config.device)
    models = open_models(config.models)
    datasets = [open_dataset(entry, report=report) for entry in config.datasets]
    names = [dataset.name for dataset in datasets]
    if len(set(names)) < len(names):
        raise ConfigError(
            "two datasets have one name", seen=", ".join(names), rule="names are unique", fix="set datasets.name"
        )
    plan = [
        run for pair in zip(datasets, config.datasets, strict=True) for run in plan_runs(config, *pair, models, out)
    ]
    pending = [run for run in plan if not is_done(run)]
    report(
        f"eval: {len(plan)} runs ({len(datasets)} datasets, {len(models)} models, {len(config.seeds)} seeds), "
        f"{len(plan) - len(pending)} there already; {device.type}; results in {out}"
    )
    if len(config.seeds) < MIN_SEEDS:
        report(
            f"WARNING: only {len(config.seeds)} seeds; the spread needs at least {MIN_SEEDS}, "
            "and every result is marked few_seeds"
        )
    if pending:
        write_text(out / "config.yaml", to_yaml(config))
        for folder in ("runs", "predictions", "examples"):
            remove_leftovers(out / folder)
        _carry_out(pending, config, out, device, report)
    results = [load_result(run.path) for run in plan]
    for line in summary_table(summarise(results)):
        report(line)
    return out


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("there is no CUDA device", seen="device=cuda", fix="use device=cpu or device=auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


# ---- carrying out


def _carry_out(pending: list[PlannedRun], config: EvalConfig, out: Path, device: torch.device, report: Report) -> None:
    groups: dict[tuple[str, str, int | None], list[PlannedRun]] = {}
    for run in pending:
        # A trained encoder is the same for all seeds; a random one is made anew for each.
        shared = None if run.model.weights is not None else run.seed
        groups.setdefault((run.dataset.name, run.model.name, shared), []).append(run)
    prepared: dict[tuple[str, str], Preparation] = {}
    written: set[str] = set()
    with require("tqdm", "eval").tqdm(total=len(pending), unit="run", disable=None, desc="eval") as bar:
        for (dataset_name, model_name, _), runs in groups.items():
            first = runs[0]
            dataset, model = first.dataset, first.model
            key = dataset_name, sha256_json([model.card.normalisation, model.architecture.in_chans])
            if key not in prepared:
                prepared[key] = prepare(model.card, dataset, config.image_size)
            if dataset_name not in written:
                write_examples(out, dataset, prepared[key], config.saved_masks)
                written.add(dataset_name)
            bar.set_postfix_str(f"{dataset_name} {model_name}")
            encoder = model.load(first.seed, device)
            carry = _classify if dataset.task == "classification" else _segment
            for run, finished in zip(runs, carry(runs, encoder, prepared[key], config, report), strict=True):
                _write(run, finished, prepared[key], config, out, device)
                bar.update()


@dataclass
class Finished:
    """What one run hands over to be written."""

    predictions: Predictions
    hyper_parameters: dict[str, Any]
    grid: list[dict[str, Any]]
    n_train: int
    seconds: float


def _classify(
    runs: list[PlannedRun], encoder: VisionTransformer, prepared: Preparation, config: EvalConfig, report: Report
) -> Iterator[Finished]:
    """Yields the finished runs of one encoder on one classification dataset."""
    dataset = runs[0].dataset
    classes = len(dataset.classes)
    features = {
        split: pooled_features(
            encoder, dataset.splits[split], prepared, pooling=config.pooling, batch_size=config.batch_size
        )
        for split in SPLITS
    }
    labels = {split: np.array([sample.label for sample in dataset.splits[split]]) for split in SPLITS}
    keys = [sample.key for sample in dataset.splits["test"]]
    for run in runs:
        start = time.perf_counter()
        drawn = draw_train(dataset.splits["train"], config.fraction * config.train_draw, run.seed)
        own_features = features | {"train": features["train"][drawn]}
        own_labels = labels | {"train": labels["train"][drawn]}
        outcome: Outcome
        if run.protocol == "knn":
            outcome = run_knn(own_features, own_labels, config.knn, classes)
        else:
            outcome = run_linear(own_features, own_labels, config.linear, classes)
            if not outcome.hyper_parameters["converged"]:
                report(
                    f"WARNING: {run.path.stem}: logistic regression stopped at linear.max_iter="
                    f"{config.linear.max_iter} before it converged"
                )
        predictions = Predictions.of_classes(keys, labels["test"], outcome.prediction_N, classes)
        seconds = time.perf_counter() - start
        yield Finished(predictions, outcome.hyper_parameters, outcome.grid, len(drawn), seconds)


def _segment(
    runs: list[PlannedRun], encoder: VisionTransformer, prepared: Preparation, config: EvalConfig, report: Report
) -> Iterator[Finished]:
    """Yields the finished runs of one encoder on one segmentation dataset."""
    dataset = runs[0].dataset
    images = sum(len(samples) for samples in dataset.splits.values())
    size = prepared.mask(dataset.splits["train"][0]).shape
    needed = token_gib(images, size, encoder, config.decoder.depths)
    cache = config.decoder.freeze_encoder and needed <= config.decoder.cache_gb
    if config.decoder.freeze_encoder and not cache:
        report(
            f"{dataset.name}: tokens take {needed:.1f} GiB, decoder.cache_gb is {config.decoder.cache_gb:g}: "
            "images are encoded anew at each step (slower, same result)"
        )
    sources = {
        split: TokenSource(
            encoder,
            dataset.splits[split],
            prepared,
            depths=config.decoder.depths,
            batch_size=config.batch_size,
            cache=cache,
        )
        for split in SPLITS
    }
    keys = np.array([sample.key for sample in dataset.splits["test"]])
    kept = example_indices(len(keys), config.saved_masks)
    for run in runs:
        start = time.perf_counter()
        drawn = draw_train(dataset.splits["train"], config.fraction * config.train_draw, run.seed)
        outcome = run_decoder(sources, drawn, config.decoder, classes=len(dataset.classes), seed=run.seed)
        mask_MHW, size_M2 = pad_masks([outcome.masks[index] for index in kept])
        predictions = Predictions(
            key_N=keys, counts_NCC=outcome.counts_NCC, index_M=kept, mask_MHW=mask_MHW, size_M2=size_M2
        )
        seconds = time.perf_counter() - start
        yield Finished(predictions, outcome.hyper_parameters, outcome.grid, len(drawn), seconds)


def _seed_varies(run: PlannedRun, config: EvalConfig) -> list[str]:
    share = config.fraction * config.train_draw
    varies = [f"which {share:.0%} of the training images are used"] if share < 1 else []
    if run.model.weights is None:
        varies.append("initialisation of the encoder")
    if run.protocol == "decoder":
        varies += ["initialisation of the decoder", "order of the batches"]
    return varies


def _write(
    run: PlannedRun,
    finished: Finished,
    prepared: Preparation,
    config: EvalConfig,
    out: Path,
    device: torch.device,
) -> None:
    dataset, card = run.dataset, run.model.card
    trained = run.model.weights is not None
    file = f"predictions/{run.path.stem}.npz"
    result = Result(
        task=dataset.task,
        dataset=dataset.name,
        dataset_fingerprint=dataset.fingerprint,
        dataset_info={
            "classes": dataset.classes,
            "splits": {split: len(dataset.splits[split]) for split in SPLITS},
            "duplicates_across_splits": len(dataset.duplicates),
            **{key: dataset.info.get(key) for key in ("sensor", "gsd_m", "licence")},
        },
        synthetic=dataset.synthetic,
        protocol=run.protocol,
        model=run.model.name,
        weights={
            "file": _file_name(run.model.weights),
            "sha256": card.sha256,
            "kind": card.kind,
            "method": card.method,
        }
        if run.model.weights
        else None,
        architecture=card.architecture,
        sensors=[str(sensor["name"]) for sensor in card.sensors] if trained else [],
        pretrained_on_synthetic=card.synthetic if trained else None,
        seed=run.seed,
        seed_varies=_seed_varies(run, config),
        fraction=config.fraction,
        train_draw=config.train_draw,
        train_subset=run.dataset_config.train_subset,
        n_train=finished.n_train,
        n_val=len(dataset.splits["val"]),
        n_test=len(dataset.splits["test"]),
        image_size=config.image_size,
        normalisation=prepared.to_dict(),
        hyper_parameters=finished.hyper_parameters,
        grid=finished.grid,
        headline=HEADLINE[dataset.task],
        metrics=_scores(dataset.task, finished.predictions.counts_NCC, config.bootstrap_draws),
        bootstrap={"draws": config.bootstrap_draws, "level": LEVEL, "unit": "test image", "seed": BOOTSTRAP_SEED},
        predictions={"file": file, "sha256": finished.predictions.write(out / file)},
        few_seeds=len(config.seeds) < MIN_SEEDS,
        device=device.type,
        wall_seconds=round(finished.seconds, 3),
        settings=run.settings,
        config_hash=sha256_json(run.settings),
    )
    write_result(out, result)


def _file_name(weights: Path) -> str:
    """Names a weights file by its folder too: every file of a run is called model.safetensors."""
    return f"{weights.parent.name}/{weights.name}"


def _scores(task: str, counts_NCC: npt.NDArray[np.int64], draws: int) -> dict[str, Score]:
    scores = {}
    for metric in METRICS[task]:
        interval = bootstrap_interval(counts_NCC, metric, draws=draws, seed=BOOTSTRAP_SEED)
        numbers = (interval.value, interval.low, interval.high)
        value, low, high = (float(number) if np.isfinite(number) else None for number in numbers)
        scores[metric] = Score(value=value, ci_low=low, ci_high=high)
    return scores


# ---- showing


def summary_table(summaries: list[Summary]) -> list[str]:
    """Returns a text table: one line a (dataset, protocol, model) with mean, spread over seeds and interval.

    Args:
        summaries: As `summarise` returns them.
    """
    header = ("dataset", "protocol", "model", "metric", "mean +- std", "95 % interval", "n_test", "seeds")
    rows = [header, *(_row(summary) for summary in summaries)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _row(summary: Summary) -> tuple[str, ...]:
    std = f"{summary.std:.3f}" if np.isfinite(summary.std) else "?"
    interval = f"[{summary.low:.3f}, {summary.high:.3f}]" if np.isfinite(summary.low) else "-"
    seeds = f"{summary.n_runs} (FEW)" if summary.few_seeds else str(summary.n_runs)
    budget = f" {summary.fraction:g}x" if summary.fraction != 1 else ""
    protocol = summary.protocol + budget + (f" {summary.train_subset}" if summary.train_subset else "")
    mean = f"{summary.mean:.3f} +- {std}"
    return (summary.dataset, protocol, summary.model, summary.metric, mean, interval, str(summary.n_test), seeds)
