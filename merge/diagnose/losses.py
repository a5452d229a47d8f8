"""Losses of the models of a diagnosis, along lines and on a plane between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from momo.errors import CheckpointError, ConfigError
from momo.pretrain.losses_of import LossMeter
from momo.weights import Card

from .landscape import (
    Factors,
    LossCache,
    Losses,
    Plane,
    barrier,
    combine,
    inner_products,
    line_factors,
    line_positions,
    lowest,
    mean_loss,
    plane_through,
)
from .models import BASE, DiagnoseConfig, Models, count_entries, progress_bar

MEAN = "mean"
CACHE_SUFFIX = ".losses.jsonl"


@dataclass
class _Scorer:
    """Measures points, or finds them among those measured before."""

    models: Models
    meter: LossMeter
    cache: LossCache

    def __call__(self, factors: Factors, advance: Callable[[int], object]) -> None:
        if self.cache.get(factors) is not None:
            return
        # The whole autoencoder, fixed position embeddings too.
        state = dict(combine(self.models.everyone, factors, self.models.names))
        try:
            estimates = self.meter.losses(state, advance)
        except CheckpointError as error:
            if error.what != "the validation loss is not finite":
                raise
            estimates = {}
        self.cache.put(factors, {sensor: estimate.to_dict() for sensor, estimate in estimates.items()})

    def found(self, factors: Factors) -> Losses:
        """Returns what was measured at a point."""
        losses = self.cache.get(factors)
        assert losses is not None
        return losses


def measure_losses(
    config: DiagnoseConfig, models: Models, card: Card | None, notes: list[str]
) -> dict[str, Any] | None:
    """Measures the losses of the models themselves, along lines and on a plane.

    Args:
        config: Which points.
        models: What is compared.
        card: How tiles are scaled; None when no model says.
        notes: Gets a line for what is left out.

    Returns:
        `models` (losses by model and sensor), `lines`, `plane`, and what the losses depend on; None without corpora.
    """
    if not config.corpora or card is None:
        if not config.corpora:
            notes.append("No losses and no CKA: no corpora are given.")
        return None
    if config.scope != "all" or "decoder" not in card.contents:
        notes.append(f"No losses: they need whole autoencoders (scope={config.scope}, {'+'.join(card.contents)}).")
        return None
    meter = LossMeter.open(
        card,
        config.corpora,
        config.samples,
        config.seed,
        config.batch_size,
        cache_mb=config.cache_mb,
        lpips_backbone=config.lpips_backbone,
    )
    out = Path(config.out)
    hashes = {name: source.sha256 for name, source in models.everyone.items()}
    cache = LossCache(out.with_name(out.name + CACHE_SUFFIX), meter.identity(), hashes)
    if cache.unreadable:
        notes.append(f"{cache.unreadable} line(s) of {cache.path.name} could not be read and were measured again.")
    positions = line_positions(config.points) if config.points else []
    plane = _plane(config, models, notes)
    axes = plane.axes(config.grid) if plane is not None else ([], [])
    ends = [{name: 1.0} for name in models.everyone]
    on_lines = [[line_factors(*pair, a) for a in positions] for pair in models.pairs]
    on_plane = [[plane.factors(x, y) for x in axes[0]] for y in axes[1]] if plane is not None else []
    scorer = _Scorer(models, meter, cache)
    _measure(scorer, [*ends, *(f for line in on_lines for f in line), *(f for row in on_plane for f in row)])
    found: dict[str, Any] = {
        "identity": meter.identity(),
        "samples": config.samples,
        "seed": meter.seed,
        "sensors": meter.sensors,
        "models": {name: scorer.found({name: 1.0}) for name in models.everyone},
        "lines": [
            _line(pair, positions, [scorer.found(f) for f in line], meter.sensors)
            for pair, line in zip(models.pairs, on_lines, strict=True)
            if positions
        ],
        "plane": None,
    }
    if plane is not None:
        found["plane"] = {
            "corners": list(plane.corners),
            **{key: getattr(plane, key) for key in ("u", "slope", "v")},
            "marks": [vars(mark) for mark in plane.marks],
            "x": axes[0],
            "y": axes[1],
            "losses": [[scorer.found(f) for f in row] for row in on_plane],
        }
    return found


def _plane(config: DiagnoseConfig, models: Models, notes: list[str]) -> Plane | None:
    if not config.grid:
        return None
    known = models.everyone
    if unknown := [name for name in config.plane if name not in known]:
        raise ConfigError(
            "plane names a model that is not there", seen=", ".join(unknown), rule=f"three of {', '.join(known)}"
        )
    corners = config.plane or [*models.parents, *([BASE] if models.base is not None else [])][:3]
    if len(corners) < 3:
        notes.append("No plane: it needs three checkpoints, or two and a base.")
        return None
    with progress_bar("distances", count_entries(known[corners[0]], models.names), "entry") as bar:
        inner = inner_products(known, corners[0], models.names, bar.update)
    return plane_through(corners, list(known), inner)


def _measure(scorer: _Scorer, points: Sequence[Factors]) -> None:
    waiting = {scorer.cache.key(point): point for point in points if scorer.cache.get(point) is None}
    known = len({scorer.cache.key(point) for point in points}) - len(waiting)
    tiles = scorer.meter.tile_count
    print(
        f"losses: {known + len(waiting)} sets of weights x {tiles:,} tiles"
        + (f", {known} of them measured before ({scorer.cache.path})" if known else "")
    )
    with progress_bar("losses", len(waiting) * tiles, "tile") as bar:
        for point in waiting.values():
            scorer(point, bar.update)


def _line(pair: tuple[str, str], positions: list[float], losses: list[Losses], sensors: list[str]) -> dict[str, Any]:
    barriers = {
        sensor: barrier(positions, [own[sensor]["loss"] if own else None for own in losses]) for sensor in sensors
    }
    mean = [mean_loss(own) for own in losses]
    return {
        "first": pair[0],
        "second": pair[1],
        "positions": positions,
        "losses": losses,
        "barrier": barriers | {MEAN: barrier(positions, mean)},
        "lowest_mean": lowest(positions, mean),
    }
