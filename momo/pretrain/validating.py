"""`momo validate`: the validation loss of any checkpoint on any corpus, by sensor and geologic unit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from ..config import one_of, option, positive
from ..corpus import Corpus
from ..errors import CheckpointError, ConfigError, DataError
from ..extras import require
from ..files import write_json
from ..models import Architecture, MaskedAutoencoder
from ..normalise import POLICIES, Normalisation
from ..runs import CONFIG_NAME, read_checkpoints
from ..version import __version__
from ..weights import TENSORS_NAME, Card, load_card, load_weights
from .config import ValidationOptions
from .from_card import autoencoder_of
from .validation import protocol_hash, validate_model
from .validation_tiles import ValidationTiles

# Relative difference that another device or batch size makes in float32.
_ROUNDING = 1e-5


@dataclass(kw_only=True)
class ValidateConfig:
    """Which weights are validated on which tiles."""

    weights: str = option(help="checkpoint folder, RUN folder (each of its checkpoints) or weights file")
    corpora: list[str] = option([], "corpus folders or URLs, one a sensor; empty: those the run was trained on")
    out: str | None = option(None, "JSON file for the losses")
    samples: int | None = option(None, "tiles of each validation split used, a fixed subset; null: as the run, or 5000")
    batch_size: int | None = option(None, "tiles a forward pass; null: as the run, or 64")
    seed: int | None = option(None, "seed of subset and masks; null: as the run, or validation's default")
    normalisation: str | None = option(None, f"one of {', '.join(POLICIES)}; null: the card's")
    lpips_backbone: str | None = option(None, "AlexNet weights, for checkpoints whose loss has an LPIPS term")
    cache_mb: int = option(512, "memory to keep a corpus's tiles decoded between checkpoints")

    def __post_init__(self) -> None:
        given = {"samples": self.samples, "batch_size": self.batch_size}
        positive(**{key: value for key, value in given.items() if value is not None})
        if self.cache_mb < 0:
            raise ConfigError("cache_mb is out of range", seen=self.cache_mb, rule="0 or more")
        if self.normalisation is not None:
            one_of("normalisation", self.normalisation, POLICIES)
        if self.out is not None and Path(self.out).is_dir():
            raise ConfigError("out is a folder", seen=self.out, rule="it is a file", fix=f"use out={self.out}/val.json")


def validate(config: ValidateConfig) -> dict[str, Any]:
    """Computes, prints and stores validation losses.

    Args:
        config: See `ValidateConfig`.

    Returns:
        What `config.out` holds: `corpora` by sensor, `samples`, `batch_size`, `seed`, and for each entry of
        `checkpoints` its name, path, sha256, samples, normalisation, `val_loss` as in a card, `stored` by sensor (see
        `compare_with_card`) and the sensors `not_trained_on`.

    Raises:
        ConfigError: A corpus is missing or named twice, or a normalisation lacks constants.
        CheckpointError: Weights are missing, damaged or without a decoder, or do not fit the tiles.
        DataError: A corpus has no validation tile, or one cannot be read.
    """
    places = _checkpoints(Path(config.weights))
    cards = [_whole_card(path) for _, path in places]
    run = _run_options(Path(config.weights))
    options = _options(config, run)
    corpora = open_corpora(config, run)
    for (_, path), card in zip(places, cards, strict=True):
        for corpus in corpora:
            check_size(path, card, corpus)
            normalisation_for(card, corpus, config.normalisation)
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    shelf = _Shelf(corpora, options, config.cache_mb)
    total = sum(min(corpus.count("val"), options.samples) for corpus in corpora) * len(places)
    entries = []
    with require("tqdm", "pretrain").tqdm(total=total, unit="tile", disable=None, desc="validate") as bar:
        for line in (*(note for corpus in corpora for note in corpus.notes), _HEAD):
            bar.write(line)
        for (name, path), card in zip(places, cards, strict=True):
            tiles = shelf.tiles(card, config.normalisation)
            scaling = next(iter(tiles.values())).normalisation
            model = _load_model(path, card, scaling.limit, config.lpips_backbone, device)
            protocol = protocol_hash(model, scaling, options.seed)
            try:
                val_loss = validate_model(
                    model, tiles, protocol, batch_size=options.batch_size, device=device, advance=bar.update
                )
            except CheckpointError as error:
                seen = f"{path}: {error.seen}"
                raise CheckpointError(error.what, seen=seen, rule=error.rule, fix=error.fix) from None
            entry = _entry(name, path, card, corpora, scaling, val_loss)
            entries.append(entry)
            bar.write("\n".join(table_rows(entry)))
    result = {
        "momo_version": __version__,
        "corpora": {c.sensor: {"path": c.location, "fingerprint": c.manifest.fingerprint} for c in corpora},
        "samples": options.samples,
        "batch_size": options.batch_size,
        "seed": options.seed,
        "checkpoints": entries,
    }
    if config.out is not None:
        write_json(Path(config.out), result)
        print(f"written: {config.out}")
    return result


# --- weights --------------------------------------------------------------------------------------------------------


def _checkpoints(weights: Path) -> list[tuple[str, Path]]:
    """Returns name and path of what is to be validated."""
    if (weights / CONFIG_NAME).is_file() or (weights / "checkpoints").is_dir():
        return [(checkpoint.path.name, checkpoint.path) for checkpoint in read_checkpoints(weights)]
    return [(weights.name if weights.name != TENSORS_NAME else weights.parent.name, weights)]


def _whole_card(path: Path) -> Card:
    card = load_card(path)
    if "decoder" not in card.contents:
        raise CheckpointError(
            "the weights have no decoder",
            seen=f"{path} holds {', '.join(card.contents) or 'nothing'}",
            rule="the validation loss is that of the reconstruction, which the decoder makes",
            fix="give a checkpoint of a run, or a merge of whole checkpoints",
        )
    return card


def check_size(path: Path, card: Card, corpus: Corpus) -> None:
    """Refuses tiles of another size than the weights take.

    Raises:
        CheckpointError: The sizes differ.
    """
    size = Architecture.from_dict(card.architecture).image_size
    if size != corpus.manifest.tile_size:
        raise CheckpointError(
            "the weights do not fit the tiles",
            seen=f"{path} takes {size} pixels, tiles of {corpus.location} have {corpus.manifest.tile_size}",
            rule="tiles are used as they are, without resampling",
            fix=f"run momo prep with tile_size={size}",
        )


def _load_model(
    path: Path, card: Card, limit: float, lpips_backbone: str | None, device: torch.device
) -> MaskedAutoencoder:
    """Loads a whole autoencoder with the loss its card names."""
    model = autoencoder_of(card, limit=limit, lpips_backbone=lpips_backbone, device=device)
    model.load_state_dict(load_weights(path, expected=model.state_dict())[0])
    return model


# --- data -----------------------------------------------------------------------------------------------------------


def _run_options(weights: Path) -> dict[str, Any]:
    """Returns the configuration of the run the weights lie in; empty when they lie in none."""
    checkpoint = weights.parent if weights.is_file() else weights
    run = checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else weights
    path = run / CONFIG_NAME
    if not path.is_file():
        return {}
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError("the configuration of the run cannot be read", seen=f"{path}: {reason}") from None
    return values if isinstance(values, dict) else {}


def _options(config: ValidateConfig, run: dict[str, Any]) -> ValidationOptions:
    """Joins what was asked for, what the run did and the defaults, in this order."""
    values: dict[str, int] = {}
    for key in ("samples", "batch_size", "seed"):
        for source in (vars(config), run.get("validation") or {}):
            if source.get(key) is not None:
                values.setdefault(key, int(source[key]))
    return ValidationOptions(**values)


def open_corpora(config: ValidateConfig, run: dict[str, Any]) -> list[Corpus]:
    """Opens the corpora to validate on: those named, or those of the run.

    Args:
        config: The job.
        run: The run's configuration, or empty.

    Raises:
        ConfigError: No corpus is named, or two are of one sensor.
        DataError: One cannot be opened or has no validation tile.
    """
    paths = config.corpora or (run.get("data") or {}).get("corpora") or []
    if not paths:
        raise ConfigError(
            "no corpus is given",
            seen=f"corpora=[] and {config.weights} lies in no run",
            rule="at least one; a run's own are the default",
            fix="add corpora=[my/corpus]",
        )
    gone = [path for path in paths if "://" not in path and not Path(path).is_dir()]
    if gone and not config.corpora:
        raise ConfigError(
            "a corpus of the run is not there",
            seen=", ".join(gone),
            rule="without corpora=[...] the corpora of the run's config.yaml are used",
            fix="add corpora=[...] with where they are now",
        )
    corpora = [Corpus(path) for path in paths]
    sensors = [corpus.sensor for corpus in corpora]
    if len(set(sensors)) < len(sensors):
        raise ConfigError(
            "two corpora are of one sensor",
            seen=", ".join(f"{corpus.location} of {corpus.sensor}" for corpus in corpora),
            rule="losses are listed by sensor",
            fix="validate them one after the other",
        )
    for corpus in corpora:
        if corpus.count("val") == 0:
            raise DataError(
                "the corpus has no val tile", seen=corpus.location, fix="run momo prep with another val_fraction"
            )
    return corpora


def normalisation_for(card: Card, corpus: Corpus, policy: str | None = None) -> Normalisation:
    """Returns how tiles of a corpus become a model's input.

    Args:
        card: Of the model; its policy, and its constants of the sensor under `sensor_zscore`, are taken.
        corpus: The corpus.
        policy: Another policy than the card's.

    Raises:
        ConfigError: `sensor_zscore`, and the card has no constants for the sensor.
    """
    fields = {**card.normalisation, "policy": policy or card.normalisation["policy"]}
    if fields["policy"] != "sensor_zscore":
        return Normalisation.from_dict(fields | {"mean": None, "std": None})
    known = {entry["name"]: entry for entry in card.sensors if entry.get("std") is not None}
    if corpus.sensor not in known:
        raise ConfigError(
            "the card has no constants for the sensor",
            seen=f"{corpus.sensor} of {corpus.location}; constants are there for {', '.join(known) or 'none'}",
            rule="sensor_zscore scales with the mean and deviation that the model was trained with",
            fix="leave the corpus out, or see what the model does under normalisation=per_tile_zscore",
        )
    own = known[corpus.sensor]
    return Normalisation.from_dict(fields | {"mean": own["mean"], "std": own["std"]})


class _Shelf:
    """The validation tiles of each corpus, made anew only when a checkpoint scales or cuts them in another way."""

    def __init__(self, corpora: list[Corpus], options: ValidationOptions, cache_mb: int) -> None:
        self.corpora, self.options, self.cache_mb = corpora, options, cache_mb
        self._made: dict[str, ValidationTiles] = {}

    def tiles(self, card: Card, policy: str | None) -> dict[str, ValidationTiles]:
        """Returns the tiles by sensor."""
        patches = Architecture.from_dict(card.architecture).patches
        for corpus in self.corpora:
            scaling, made = normalisation_for(card, corpus, policy), self._made.get(corpus.sensor)
            if made is None or (made.normalisation, made.patches) != (scaling, patches):
                self._made[corpus.sensor] = ValidationTiles(
                    corpus,
                    scaling,
                    patches=patches,
                    limit=self.options.samples,
                    seed=self.options.seed,
                    cache_mb=self.cache_mb,
                )
        return self._made


# --- what is told ---------------------------------------------------------------------------------------------------


def compare_with_card(card: Card, corpus: Corpus, val_loss: dict[str, Any]) -> dict[str, Any]:
    """Compares a loss with the one the card stores for the sensor.

    Args:
        card: Of the weights.
        corpus: The tiles.
        val_loss: What was computed, see `momo.pretrain.validation.summarise`.

    Returns:
        `loss`, the stored one or None; `difference`, computed minus stored, or None when the two are of different
        things; `words`, one line.
    """
    own = val_loss["per_sensor"][corpus.sensor]
    stored = ((card.val_loss or {}).get("per_sensor") or {}).get(corpus.sensor)
    if card.val_loss is None or stored is None:
        return {"loss": None, "difference": None, "words": "none stored"}
    reasons = [
        (card.val_loss.get("protocol") != val_loss["protocol"], "another protocol"),
        (card.data_fingerprints.get(corpus.sensor) != corpus.manifest.fingerprint, "other tiles"),
        (stored.get("count") != own["count"], f"{stored.get('count')} tiles"),
    ]
    others = [reason for holds, reason in reasons if holds]
    if others:
        return {"loss": stored["loss"], "difference": None, "words": f"{stored['loss']:.4f}, of {' and '.join(others)}"}
    difference = own["loss"] - stored["loss"]
    if difference == 0:
        words = "equal"
    elif abs(difference) <= _ROUNDING * abs(stored["loss"]):
        words = f"equal within rounding ({difference:+.1e})"
    else:
        words = f"DIFFERS by {difference:+.2e}"
    return {"loss": stored["loss"], "difference": difference, "words": words}


def _entry(
    name: str, path: Path, card: Card, corpora: Sequence[Corpus], scaling: Normalisation, val_loss: dict[str, Any]
) -> dict[str, Any]:
    trained = {sensor["name"] for sensor in card.sensors}
    return {
        "name": name,
        "path": str(path),
        "sha256": card.sha256,
        "samples": card.samples,
        "normalisation": {"policy": scaling.policy, "clip": scaling.clip},
        "val_loss": val_loss,
        "stored": {corpus.sensor: compare_with_card(card, corpus, val_loss) for corpus in corpora},
        "not_trained_on": [corpus.sensor for corpus in corpora if corpus.sensor not in trained],
    }


_COLUMNS = ("sensor, unit", "loss", "+- stderr", "by products", "tiles")
_HEAD = "{:<20} {:<20} {:>9} {:>9} {:>11} {:>8}  in the card".format("checkpoint", *_COLUMNS)


def table_rows(entry: dict[str, Any]) -> list[str]:
    """Returns the lines of the table for one checkpoint: a line a sensor, below it one a geologic unit."""
    rows: list[str] = []
    for sensor, own in entry["val_loss"]["per_sensor"].items():
        remark = entry["stored"][sensor]["words"]
        if sensor in entry["not_trained_on"]:
            remark += "; a sensor it was not trained on"
        rows.append(f"{entry['name'] if not rows else '':<20} {_numbers(sensor, own)}  {remark}")
        rows += [f"{'':<20} {_numbers(f'  {unit}', of_unit)}" for unit, of_unit in own.get("per_unit", {}).items()]
    return rows


def _numbers(label: str, own: dict[str, Any]) -> str:
    errors = [math.nan if own.get(key) is None else own[key] for key in ("stderr", "stderr_products")]
    tile, product = ("" if math.isnan(error) else f"{error:.4f}" for error in errors)
    return f"{label:<20} {own['loss']:>9.4f} {tile:>9} {product:>11} {own['count']:>8,}"
