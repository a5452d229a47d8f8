"""What `momo merge diagnose` compares: its configuration, and the models opened and checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from momo.config import one_of, option, positive
from momo.errors import ConfigError, MergeError
from momo.extras import require
from momo.sensors import SENSORS
from momo.weights import Card

from ..audit import Parent
from ..config import SCOPES, MergeConfig
from ..plan import make_plan
from ..sources import Source, open_source

MERGED, BASE = "merged", "base"


@dataclass(kw_only=True)
class DiagnoseConfig:
    """Which weights are diagnosed, and on which tiles."""

    out: str = option(help="folder to make: report.html, figures, diagnosis.json")
    selection: str | None = option(None, "SELECTION file; gives base and checkpoints")
    base: str | None = option(None, "base weights, when there is no selection; without one there are no task vectors")
    checkpoints: list[str] = option([], "weights to compare, when there is no selection: as in momo merge")
    models: dict[str, str] = option({}, "the same with names of your own: {name: place}")
    merged: str | None = option(None, "WEIGHTS of a merge of them, to show where it lies")
    scope: str = option("all", f"part that is compared, one of {', '.join(SCOPES)}; losses need all")
    corpora: list[str] = option([], "corpus folders or URLs, one a sensor; empty: only the weights are looked at")
    samples: int = option(512, "tiles of each validation split for the losses, a fixed subset")
    batch_size: int = option(64, "tiles a forward pass")
    seed: int | None = option(None, "seed of subset and masks; null: that of momo pretrain")
    points: int = option(13, "positions on each line from -0.25 to 1.25; 0: no lines")
    grid: int = option(9, "positions on each side of the plane, 2 or more; 0: no plane")
    plane: list[str] = option([], "three names for the plane; empty: the first three checkpoints, or two and the base")
    cka_samples: int = option(256, "tiles of each validation split for CKA, 4 or more; 0: no CKA")
    cache_mb: int = option(2048, "memory to keep a corpus's tiles decoded")
    lpips_backbone: str | None = option(None, "AlexNet weights, for checkpoints whose loss has an LPIPS term")
    overwrite: bool = option(False, "take the place of an existing `out` once the new one is complete")

    def __post_init__(self) -> None:
        positive(samples=self.samples, batch_size=self.batch_size)
        one_of("scope", self.scope, SCOPES)
        for key, value, least in (("points", self.points, 2), ("grid", self.grid, 2), ("cka_samples", self.cka_samples, 4)):  # noqa: E501  # fmt: skip
            if value != 0 and value < least:
                raise ConfigError(f"{key} is out of range", seen=value, rule=f"0 for none, else {least} or more")
        if self.plane and len(set(self.plane)) != 3:
            raise ConfigError("plane cannot be read", seen=self.plane, rule="three different names")


@dataclass(frozen=True)
class Models:
    """Everything that is compared.

    Attributes:
        base: The common base, or None.
        parents: Checkpoint by name.
        merged: A merge of them, or None.
        names: Floating-point and other tensors that all hold.
    """

    base: Source | None
    parents: dict[str, Source]
    merged: Source | None
    names: list[str]

    @property
    def everyone(self) -> dict[str, Source]:
        """Parents, base and merge by name."""
        extra = {BASE: self.base, MERGED: self.merged}
        return self.parents | {name: source for name, source in extra.items() if source is not None}

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Every two parents."""
        names = list(self.parents)
        return [(one, two) for number, one in enumerate(names) for two in names[number + 1 :]]

    def role(self, name: str) -> str:
        """Says what a model is: `base`, `merged` or `checkpoint`."""
        return name if name in (BASE, MERGED) and name not in self.parents else "checkpoint"


def open_models(config: DiagnoseConfig) -> Models:
    """Opens and audits checkpoints, base and merge, from headers and cards alone.

    Raises:
        CheckpointError: Weights are missing or damaged.
        MergeError: They do not fit together, or a name has two meanings.
    """
    plan = make_plan(
        MergeConfig(
            selection=config.selection,
            base=config.base,
            checkpoints=config.checkpoints,
            models=config.models,
            scope=config.scope,
            method="average",
            dry_run=True,
        )
    )
    ordered: Sequence[Parent] = sorted(plan.parents, key=lambda parent: _usual_order(parent.name))
    parents = {parent.name: parent.source for parent in ordered}
    merged = None
    if config.merged is not None:
        if taken := {MERGED, BASE} & set(parents):
            raise MergeError(
                "a checkpoint has a name with another meaning",
                seen=", ".join(sorted(taken)),
                rule=f"{BASE} and {MERGED} are no checkpoints",
                fix="give names of your own: models={first: place, second: place}",
            )
        merged = open_source(config.merged)
        _check_fit(merged, next(iter(parents.values())), plan.merged)
    return Models(None if plan.base is None else plan.base.source, parents, merged, list(plan.merged))


def _usual_order(name: str) -> tuple[int, str]:
    """Sort key: momo's own sensors first, in their usual order."""
    return (list(SENSORS).index(name) if name in SENSORS else len(SENSORS), name)


def _check_fit(merged: Source, parent: Source, names: Sequence[str]) -> None:
    bad = [f"{name} is missing" for name in names if name not in merged.header]
    bad += [
        f"{name} is {merged.header[name].shape}, not {parent.header[name].shape}"
        for name in names
        if name in merged.header and merged.header[name].shape != parent.header[name].shape
    ]
    if bad:
        raise MergeError(
            "the merged weights do not fit the checkpoints",
            seen=f"{merged.place}: {'; '.join(bad[:4])}" + (f"; and {len(bad) - 4} more" if len(bad) > 4 else ""),
            rule="they hold every tensor that is compared, with its shape",
            fix="give a merge of these checkpoints, or compare less: scope=encoder",
        )


def joint_card(models: Models, notes: list[str]) -> Card | None:
    """Returns a card with the constants of every parent's sensors; None, with a note, when no parent has one."""
    cards = [source.card for source in models.parents.values() if source.card is not None]
    if not cards:
        notes.append("No losses and no CKA: no checkpoint has a card, which says how tiles are scaled.")
        return None
    policies = sorted({str(card.normalisation.get("policy")) for card in cards})
    if len(policies) > 1:
        notes.append(f"The checkpoints were fed in different ways ({', '.join(policies)}); {policies[0]} is used here.")
        cards.sort(key=lambda card: str(card.normalisation.get("policy")))
    sensors = {str(sensor["name"]): sensor for card in cards for sensor in card.sensors}
    return dataclasses.replace(cards[0], sensors=list(sensors.values()))


def count_entries(source: Source, names: Sequence[str]) -> int:
    """Returns the number of weights of the named tensors."""
    return sum(torch.Size(source.header[name].shape).numel() for name in names)


def progress_bar(what: str, total: int, unit: str) -> Any:
    """Returns a progress bar that shows on terminals alone."""
    return require("tqdm", "merge").tqdm(total=total, unit=unit, unit_scale=True, disable=None, desc=what)
