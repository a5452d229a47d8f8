"""Losses of the merges of a search: on one half of the validation tiles to choose, on the other to tell the gain."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from momo.corpus import Corpus
from momo.errors import MergeError
from momo.models.masking import sample_rng
from momo.pretrain.losses_of import LossMeter
from momo.pretrain.validation import LossEstimate, product_stderr
from momo.pretrain.validation_tiles import ValidationTiles
from momo.weights import Card

from ..plan import MergePlan
from .config import SearchConfig

TileLosses = dict[str, torch.Tensor]
SEARCHED, HELD_OUT = "searched", "held_out"
_LEAST_SHARE = 0.25  # of the tiles in the smaller half, when halves are made of whole products
_LEAST_TILES = 4
_LABELLED = ("annotation.csv", "mapping.json", "dataset.json")  # of Mars-Bench datasets


@dataclass(frozen=True)
class Halves:
    """The validation tiles of one sensor cut in two.

    Attributes:
        places: Places in the fixed subset of each half, by `searched` and `held_out`.
        by: `product`, or `tile` when too few products would make the halves too unequal.
    """

    places: Mapping[str, list[int]]
    by: str


def split_halves(products: Sequence[str], sensor: str, seed: int) -> Halves:
    """Cuts tiles in two halves that share no product where that can be.

    Tiles of a product are alike, so a half of the same products would tell too large a gain.

    Args:
        products: Product of each tile.
        sensor: Its tiles are cut independently of other sensors'.
        seed: Of the cut.

    Raises:
        MergeError: There are too few tiles.
    """
    if len(products) < _LEAST_TILES:
        raise MergeError(
            "too few validation tiles for two halves",
            seen=f"{len(products)} of {sensor}",
            rule=f"{_LEAST_TILES} or more of each sensor",
            fix="raise samples, or cut the corpus with a larger val_fraction",
        )
    rng = sample_rng(sensor, seed, "halves of a merge search")
    members: dict[str, list[int]] = {}
    for place, product in enumerate(products):
        members.setdefault(product, []).append(place)
    shuffled = [members[name] for name in rng.permutation(sorted(members)).tolist()]
    halves: tuple[list[int], list[int]] = ([], [])
    for places in sorted(shuffled, key=len, reverse=True):
        halves[len(halves[1]) < len(halves[0])].extend(places)
    by = "product"
    if min(map(len, halves)) < max(2, _LEAST_SHARE * len(products)):
        order = rng.permutation(len(products)).tolist()
        halves, by = (order[0::2], order[1::2]), "tile"
    return Halves({SEARCHED: sorted(halves[0]), HELD_OUT: sorted(halves[1])}, by)


class Bench:
    """Scores sets of weights in memory.

    Args:
        plan: A merge of the search; its parents say what the tiles are scaled by and whose they are.
        config: The search.

    Attributes:
        halves: The cut of each sensor's tiles.
        owners: Sensor to the names of the checkpoints that were trained on this very corpus.

    Raises:
        MergeError: A corpus is a labelled dataset or not one of a checkpoint's, or a sensor has none.
        CheckpointError: The weights have no decoder or do not fit the tiles.
        DataError: A corpus cannot be read.
        ConfigError: The card lacks constants of a sensor.
    """

    def __init__(self, plan: MergePlan, config: SearchConfig) -> None:
        _refuse_labelled(config.corpora)
        self.objective, self.relative = config.objective, config.relative
        self._plan = plan
        whole = LossMeter.open(
            meter_card(plan),
            config.corpora,
            config.samples,
            config.validation_seed,
            config.batch_size,
            lpips_backbone=config.lpips_backbone,
        )
        self.owners = find_owners(plan, whole.corpora, config.allow)
        self.halves = {sensor: split_halves(t.products, sensor, config.seed) for sensor, t in whole.tiles.items()}
        self.meters = {
            half: LossMeter(
                whole.model,
                {sensor: _part(t, self.halves[sensor].places[half]) for sensor, t in whole.tiles.items()},
                seed=whole.seed,
                batch_size=whole.batch_size,
            )
            for half in (SEARCHED, HELD_OUT)
        }
        self._references: dict[str, dict[str, float]] = {}
        if self.relative and (without := [sensor for sensor in self.sensors if not self.owners[sensor]]):
            raise MergeError(
                "a sensor has no checkpoint of its own",
                seen=", ".join(without),
                rule="relative=true divides by the loss of the checkpoint that was trained on the sensor",
                fix="set relative=false, or leave the corpus out",
            )

    @property
    def sensors(self) -> list[str]:
        """The sensors, in the order of the corpora."""
        return self.meters[SEARCHED].sensors

    def identity(self) -> dict[str, Any]:
        """Returns what the losses depend on besides the weights."""
        return {half: meter.identity() for half, meter in self.meters.items()} | {
            "objective": self.objective,
            "relative": self.relative,
        }

    def losses(self, half: str, state: Mapping[str, torch.Tensor]) -> TileLosses:
        """Returns the loss of each tile of a half; not finite where the weights are too far off."""
        return self.meters[half].tile_losses(state)

    def own_losses(self, half: str) -> TileLosses:
        """Returns the losses of each sensor's own checkpoint on a half, of the best one where there are several."""
        found: TileLosses = {}
        meter = self.meters[half]
        for sensor, names in self.owners.items():
            single = LossMeter(meter.model, {sensor: meter.tiles[sensor]}, seed=meter.seed, batch_size=meter.batch_size)
            for parent in self._plan.parents:
                if parent.name in names:
                    state = {name: parent.source.tensor(name) for name in meter.model.state_dict()}
                    losses = single.tile_losses(state)[sensor]
                    if sensor not in found or losses.mean() < found[sensor].mean():
                        found[sensor] = losses
        return found

    def weights(self, half: str) -> dict[str, float]:
        """Returns the factor of each sensor's loss before sensors are joined."""
        if not self.relative:
            return dict.fromkeys(self.sensors, 1.0)
        if half not in self._references:
            own = self.own_losses(half)
            self._references[half] = {sensor: 1 / float(losses.mean()) for sensor, losses in own.items()}
        return self._references[half]

    def score(self, half: str, losses: TileLosses) -> float:
        """Joins the losses of the sensors: their mean, or the worst of them."""
        weights = self.weights(half)
        values = [weights[sensor] * float(own.mean()) for sensor, own in losses.items()]
        return max(values) if self.objective == "worst" else sum(values) / len(values)

    def gain(self, half: str, found: TileLosses, other: TileLosses) -> dict[str, Any]:
        """Compares two merges on the same tiles of a half.

        Returns:
            `gain`, by how much the objective of `found` is lower; its standard error, `stderr` over tiles and
            `stderr_products` (see `momo.pretrain.validation.product_stderr`; None with a single product); and in
            `per_sensor` the same of each loss, with the `count` of tiles and of `products`. Errors are those of the
            paired difference; when the worst sensors of the two merges differ, of a difference of independent tiles.
        """
        weights = self.weights(half)
        products = {sensor: tiles.products for sensor, tiles in self.meters[half].tiles.items()}
        per_sensor = {sensor: _difference(other[sensor] - found[sensor], products[sensor]) for sensor in found}
        if self.objective == "mean":
            parts = [(weights[sensor] / len(found), per_sensor[sensor]) for sensor in found]
            total = sum(weight * own["gain"] for weight, own in parts)
        else:
            ours, theirs = self._worst(half, found), self._worst(half, other)
            total = self.score(half, other) - self.score(half, found)
            if ours == theirs:
                parts = [(weights[ours], per_sensor[ours])]
            else:
                parts = [
                    (weights[sensor], _difference(losses[sensor], products[sensor]))
                    for sensor, losses in ((ours, found), (theirs, other))
                ]
        errors = {key: _joined(parts, key) for key in ("stderr", "stderr_products")}
        return {"gain": total, **errors, "per_sensor": per_sensor}

    def _worst(self, half: str, losses: TileLosses) -> str:
        weights = self.weights(half)
        return max(losses, key=lambda sensor: weights[sensor] * float(losses[sensor].mean()))


def _difference(losses: torch.Tensor, products: list[str]) -> dict[str, Any]:
    estimate = LossEstimate.of(losses)
    return {
        "gain": estimate.loss,
        "stderr": estimate.stderr,
        "stderr_products": product_stderr(losses, products),
        "count": estimate.count,
        "products": len(set(products)),
    }


def _joined(parts: Sequence[tuple[float, dict[str, Any]]], key: str) -> float | None:
    """Standard error of a weighted sum of independent differences."""
    errors = [(weight, own[key]) for weight, own in parts]
    if any(error is None for _, error in errors):
        return None
    return math.hypot(*(weight * error for weight, error in errors))


def _part(tiles: ValidationTiles, places: Sequence[int]) -> ValidationTiles:
    part = ValidationTiles(
        tiles.corpus,
        tiles.normalisation,
        patches=tiles.patches,
        limit=len(tiles),
        seed=tiles.seed,
        cache_mb=2048,
    )
    part.positions = [tiles.positions[place] for place in places]
    return part


def meter_card(plan: MergePlan) -> Card:
    """Returns a card that feeds a merge: that of a checkpoint, with the constants of every checkpoint's sensors.

    Raises:
        MergeError: A checkpoint has no card.
    """
    cards = [parent.card for parent in plan.parents if parent.card is not None]
    if len(cards) < len(plan.parents):
        raise MergeError(
            "a checkpoint has no card",
            seen=", ".join(parent.name for parent in plan.parents if parent.card is None),
            rule="the search scores merges on the data the checkpoints were trained on, which their cards name",
            fix="search among checkpoints of momo pretrain",
        )
    sensors = {entry["name"]: entry for card in cards for entry in card.sensors}
    scaling = cards[0].normalisation | {"mean": None, "std": None}
    return dataclasses.replace(cards[0], sensors=list(sensors.values()), normalisation=scaling)


def find_owners(plan: MergePlan, corpora: Mapping[str, Corpus], allow: Sequence[str]) -> dict[str, list[str]]:
    """Finds the checkpoints that were trained on each corpus.

    Args:
        plan: A merge of the search.
        corpora: Corpus by sensor.
        allow: Sensors for which the rules do not hold.

    Returns:
        Sensor to the names of checkpoints; none for an allowed stranger.

    Raises:
        MergeError: No checkpoint was trained on a corpus, or a sensor of a checkpoint has no corpus.
    """
    known = {parent.name: parent.card.data_fingerprints for parent in plan.parents if parent.card is not None}
    trained = sorted({sensor for fingerprints in known.values() for sensor in fingerprints})
    if unknown := sorted(set(allow) - set(trained) - set(corpora)):
        raise MergeError("allow names an unknown sensor", seen=", ".join(unknown), rule=f"one of {', '.join(trained)}")
    owners = {
        sensor: [name for name, own in known.items() if own.get(sensor) == corpus.manifest.fingerprint]
        for sensor, corpus in corpora.items()
    }
    strange = [sensor for sensor, names in owners.items() if not names and sensor not in allow]
    if strange:
        raise MergeError(
            "a corpus is not one that a checkpoint was trained on",
            seen=", ".join(f"{corpora[sensor].location} of {sensor}" for sensor in strange),
            rule="coefficients are chosen on the checkpoints' own validation sets, never on test data",
            fix=f"give the corpora of the runs, or add allow=[{','.join(strange)}] if this is no test data",
        )
    if missing := [sensor for sensor in trained if sensor not in corpora and sensor not in allow]:
        raise MergeError(
            "a sensor of a checkpoint has no corpus",
            seen=", ".join(missing),
            rule="a merge chosen without a sensor's loss may forget the sensor",
            fix=f"add its corpus, or allow=[{','.join(missing)}]",
        )
    return owners


def _refuse_labelled(corpora: Sequence[str]) -> None:
    for place in corpora:
        folder = Path(place)
        if any((folder / name).is_file() for name in _LABELLED) and not (folder / "manifest.json").is_file():
            raise MergeError(
                "this is a labelled dataset of test tasks",
                seen=place,
                rule="coefficients are chosen by the sensors' own validation losses, never by test tasks",
                fix="give the corpora the checkpoints were trained on",
            )
