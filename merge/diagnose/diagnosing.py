"""`momo merge diagnose`: what stands between several checkpoints, in their weights, their losses and their features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from momo.config import to_dict
from momo.corpus import Corpus
from momo.extras import require
from momo.files import atomic_folder, holds_only, write_json
from momo.models.architecture import Architecture
from momo.pretrain.config import ValidationOptions
from momo.pretrain.validating import normalisation_for
from momo.pretrain.validation_tiles import ValidationTiles
from momo.version import __version__
from momo.weights import Card

from .cka import LEAST_TILES, block_grams, compare, encoder_of
from .landscape import mean_loss
from .losses import MEAN, measure_losses
from .models import DiagnoseConfig, Models, count_entries, joint_card, open_models, progress_bar
from .task_vectors import measure_task_vectors

__all__ = ["DiagnoseConfig", "diagnose"]


def diagnose(config: DiagnoseConfig) -> Path:
    """Compares checkpoints and writes a page, its figures and every number.

    Losses are kept in `OUT.losses.jsonl` beside the folder as they are measured, so that a stopped diagnosis goes on
    where it was, and one with a finer grid measures only the new points.

    Args:
        config: See `DiagnoseConfig`.

    Returns:
        The folder made.

    Raises:
        CheckpointError: Weights are missing or damaged, or do not fit the tiles.
        MergeError: The models do not fit together, hold NaN, or span no plane.
        ConfigError: A name or option fits nothing, or a package is missing.
        DataError: `out` exists, or a corpus cannot be read.
    """
    from .page import write_report

    for module in ("matplotlib", "jinja2"):
        require(module, "merge")
    out = Path(config.out)
    with atomic_folder(out, replaces=_is_diagnosis if config.overwrite else None) as folder:
        models = open_models(config)
        notes: list[str] = []
        report: dict[str, Any] = {
            "momo_version": __version__,
            "config": to_dict(config),
            "models": {
                name: {"role": models.role(name), "place": source.place, "sha256": source.sha256}
                for name, source in models.everyone.items()
            },
            "synthetic": any(s.card is not None and s.card.synthetic for s in models.everyone.values()),
            "notes": notes,
        }
        report["task_vectors"] = _weights_part(models, notes)
        card = joint_card(models, notes)
        report["losses"] = measure_losses(config, models, card, notes)
        report["cka"] = _features_part(config, models, card, notes)
        write_json(folder / "diagnosis.json", report)
        write_report(report, folder)
    print("\n".join([*summary(report), f"written: {out / 'report.html'}"]))
    return out


def _is_diagnosis(folder: Path) -> bool:
    return (folder / "diagnosis.json").is_file() and holds_only(folder, "diagnosis.json", "report.html", "*.png")


# --- weights --------------------------------------------------------------------------------------------------------


def _weights_part(models: Models, notes: list[str]) -> dict[str, Any] | None:
    if models.base is None:
        notes.append("No task vectors: they are differences from a base, and none is given.")
        return None
    with progress_bar("task vectors", count_entries(models.base, models.names), "entry") as bar:
        return measure_task_vectors(models.base, models.parents, models.names, bar.update).to_dict()


# --- features -------------------------------------------------------------------------------------------------------


def _features_part(
    config: DiagnoseConfig, models: Models, card: Card | None, notes: list[str]
) -> dict[str, Any] | None:
    if not config.corpora or not config.cka_samples or card is None:
        return None
    if config.scope == "decoder":
        notes.append("No CKA: it compares encoders, and scope=decoder.")
        return None
    architecture = Architecture.from_dict(card.architecture)
    seed = ValidationOptions().seed if config.seed is None else config.seed
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    found: dict[str, Any] = {}
    for place in config.corpora:
        corpus = Corpus(place)
        if corpus.count("val") < LEAST_TILES:
            notes.append(f"No CKA on {corpus.sensor}: {corpus.count('val')} val tile(s), {LEAST_TILES} are needed.")
            continue
        tiles = ValidationTiles(
            corpus,
            normalisation_for(card, corpus),
            patches=architecture.patches,
            limit=config.cka_samples,
            seed=seed,
            cache_mb=config.cache_mb,
        )
        grams = {}
        with progress_bar(f"CKA on {corpus.sensor}", len(models.everyone), "model") as bar:
            for name, source in models.everyone.items():
                encoder = encoder_of(architecture, {tensor: source.tensor(tensor) for tensor in models.names})
                grams[name] = block_grams(
                    encoder.to(device), tiles, in_chans=architecture.in_chans, batch_size=config.batch_size
                )
                bar.update()
        found[corpus.sensor] = {"samples": len(tiles), **compare(grams)}
    return found or None


# --- what is told ---------------------------------------------------------------------------------------------------


def summary(report: dict[str, Any]) -> list[str]:
    """Returns the lines that the command prints."""
    lines: list[str] = []
    if (vectors := report["task_vectors"]) is not None:
        own, names = vectors["overall"], vectors["parents"]
        lines.append(f"{'task vector':<16} {'norm':>9} {'of base':>9}   cosine with {', '.join(names)}")
        for number, name in enumerate(names):
            cosines = "  ".join("-" if value is None else f"{value:.3f}" for value in own["cosine"][number])
            share = own["relative"][number]
            lines.append(
                f"{name:<16} {own['norm'][number]:>9.4g} {'-' if share is None else f'{share:.2%}':>9}   {cosines}"
            )
        if own["sign_conflict"] is not None:
            lines.append(
                f"sign conflict: {own['sign_conflict']:.1%} of changed weights, "
                f"{own['sign_conflict_by_magnitude']:.1%} by magnitude; a plain sum cancels {own['cancelled']:.1%}"
            )
    if (losses := report["losses"]) is not None:
        lines.append(f"{'loss':<16} " + " ".join(f"{sensor:>10}" for sensor in [*losses["sensors"], MEAN]))
        for name, own in losses["models"].items():
            cells = [own[sensor]["loss"] if own else None for sensor in losses["sensors"]]
            lines.append(f"{name:<16} " + " ".join(f"{_number(cell):>10}" for cell in [*cells, mean_loss(own)]))
        for line in losses["lines"]:
            label = f"barrier {line['first']} - {line['second']}"
            lines.append(f"{label}: " + ", ".join(f"{key} {_number(value)}" for key, value in line["barrier"].items()))
    return lines + [f"note: {note}" for note in report["notes"]]


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"
