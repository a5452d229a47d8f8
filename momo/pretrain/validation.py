"""Fixed-mask validation: the loss of a checkpoint, comparable between checkpoints and sensors, with its error.

Equal-validation-loss selection compares these numbers, so each is a function of the weights and the data alone: a
fixed subset, masks drawn from tile keys, one normalisation, float32, every tile counted once, the same batches and on
a CPU the same bits whatever the number of ranks and threads. `momo.pretrain.validating` is the command.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ..errors import CheckpointError, MomoError
from ..files import sha256_json
from ..models import MaskedAutoencoder
from ..models.objective import PixelObjective
from ..normalise import Normalisation
from .exact import exact_float32, map_exactly
from .validation_tiles import TileBatch, ValidationTiles


@dataclass(frozen=True)
class LossEstimate:
    """A mean loss over tiles.

    Attributes:
        loss: Mean over tiles of the tile's loss.
        stderr: Standard error of that mean over tiles, s / sqrt(n) with s the sample standard deviation. It takes the
            tiles for independent; see `product_stderr`.
        count: Number of tiles n.
    """

    loss: float
    stderr: float
    count: int

    @classmethod
    def of(cls, losses: torch.Tensor) -> LossEstimate:
        """Summarises the losses of tiles, shape (n,)."""
        losses = losses.double()
        count = losses.numel()
        spread = float(losses.std(unbiased=True)) if count > 1 else math.nan
        return cls(float(losses.mean()), spread / math.sqrt(count), count)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values; an undefined standard error (one tile) becomes None."""
        return {"loss": self.loss, "stderr": self.stderr if math.isfinite(self.stderr) else None, "count": self.count}


def product_stderr(losses: torch.Tensor, products: Sequence[str]) -> float | None:
    """Computes the standard error of a mean over tiles whose errors may be alike within a product.

    Tiles of one product share terrain, illumination and camera state, so the error of independent tiles is too small.
    This is the cluster-robust variance of Cameron & Miller (2015, Journal of Human Resources 50(2), 317-372) for a
    regression on a constant, with their correction for few clusters: with n tiles in G products and the mean m,

        variance = G / (G - 1) * sum over products g of (sum over tiles i of g of (loss_i - m))^2 / n^2

    With one tile a product it equals s^2 / n. It is itself a rough figure below some 30 products.

    Args:
        losses: Shape (n,).
        products: Product of each tile.

    Returns:
        The standard error, or None with fewer than two products.
    """
    names, members = np.unique(np.asarray(products, dtype=object), return_inverse=True)
    if len(names) < 2:
        return None
    values = losses.double().numpy()
    sums = np.bincount(members, weights=values - values.mean())
    return math.sqrt(len(names) / (len(names) - 1) * float(np.square(sums).sum())) / len(values)


def protocol_hash(model: MaskedAutoencoder, normalisation: Normalisation, seed: int) -> str:
    """Returns a hash of everything but weights and tiles that the loss depends on.

    Two losses may be compared only when their protocols are equal.
    """
    architecture = model.architecture
    fields: dict[str, Any] = {
        "loss": "mean squared error over valid pixels of hidden patches, mean over tiles, float32",
        "norm_pix_loss": model.norm_pix_loss,
        "mask_ratio": model.mask_ratio,
        "mask_seed": seed,
        "normalisation": {"policy": normalisation.policy, "clip": normalisation.clip},
        "image_size": architecture.image_size,
        "patch_size": architecture.patch_size,
        "in_chans": architecture.in_chans,
    }
    objective: Any = model.objective
    if not isinstance(objective, PixelObjective):
        fields |= {"loss": "mean over tiles, float32", "objective": objective.describe()}
    return sha256_json(fields)


@dataclass
class TileLosses:
    """Losses of the tiles of one corpus, float64 of shape (n,).

    Attributes:
        loss: The loss of each tile; 0 for tiles of other ranks.
        terms: The terms of a loss that joins several, by name; else empty.
    """

    loss: torch.Tensor
    terms: dict[str, torch.Tensor] = field(default_factory=dict)


def tile_losses(
    model: MaskedAutoencoder,
    tiles: ValidationTiles,
    *,
    batch_size: int,
    rank: int = 0,
    ranks: int = 1,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Computes the loss of this rank's batches; see `measure_tiles`.

    Returns:
        float64 of shape (len(tiles),): losses of this rank's tiles, 0 for the others; the sum over ranks is complete.
    """
    return measure_tiles(model, tiles, batch_size=batch_size, rank=rank, ranks=ranks, device=device).loss


def measure_tiles(
    model: MaskedAutoencoder,
    tiles: ValidationTiles,
    *,
    batch_size: int,
    rank: int = 0,
    ranks: int = 1,
    device: torch.device | str = "cpu",
    advance: Callable[[int], object] | None = None,
) -> TileLosses:
    """Computes losses, and their terms, of this rank's batches with the model's own objective.

    Args:
        model: The autoencoder with float32 weights; its mode is left as found.
        tiles: Fixed tiles.
        batch_size: Tiles a forward pass. Batch j goes to rank j % ranks whole, so no loss depends on `ranks`.
        rank: This rank.
        ranks: Number of ranks.
        device: Where the model is.
        advance: Called with the number of tiles after each batch.

    On a CPU as many batches as there are threads are in memory at once (see `map_exactly`).

    Raises:
        CheckpointError: The weights are not float32.
        DataError: A tile cannot be read.
    """
    _check_float32(model)
    firsts = range(0, len(tiles), batch_size)[rank::ranks]
    spans = [range(first, min(first + batch_size, len(tiles))) for first in firsts]
    limit, in_chans = tiles.normalisation.limit, model.architecture.in_chans
    losses = TileLosses(torch.zeros(len(tiles), dtype=torch.float64))
    kind = torch.device(device).type

    def compute(batch: TileBatch) -> dict[str, torch.Tensor]:
        return _losses_of(model, batch.to_inputs(limit=limit, in_chans=in_chans, device=device))

    was_training = model.training
    model.eval()
    try:
        with exact_float32(kind):
            for span, found in zip(spans, map_exactly(compute, tiles.batches(spans), kind), strict=True):
                here = slice(span.start, span.stop)
                losses.loss[here] = found.pop("")
                for name, term_B in found.items():
                    losses.terms.setdefault(name, torch.zeros_like(losses.loss))[here] = term_B
                if advance is not None:
                    advance(len(span))
    finally:
        model.train(was_training)
    return losses


def _check_float32(model: MaskedAutoencoder) -> None:
    others = [f"{name} is {p.dtype}" for name, p in model.named_parameters() if p.dtype != torch.float32]
    if others:
        raise CheckpointError(
            "validation needs float32 weights",
            seen=others[0],
            rule="a loss is compared with others, so all of it is computed in float32",
            fix="validate a float32 copy of the weights",
        )


def _losses_of(
    model: MaskedAutoencoder, inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The loss of each tile under the name "" and its terms; none when there is only one, which is the loss itself."""
    # An objective keeps the terms of its last call, and other threads are calling it.
    own, objective = copy.copy(model), copy.copy(model.objective)
    object.__setattr__(own, "objective", objective)  # the dictionary of submodules is shared with the model
    loss_B = own(*inputs)
    terms: dict[str, torch.Tensor] = getattr(objective, "terms", {})
    terms = terms if len(terms) > 1 else {}
    return {name: values.cpu().double() for name, values in {"": loss_B, **terms}.items()}


def validate_model(
    model: MaskedAutoencoder,
    tiles_by_sensor: Mapping[str, ValidationTiles],
    protocol: str,
    *,
    batch_size: int,
    rank: int = 0,
    ranks: int = 1,
    device: torch.device | str = "cpu",
    advance: Callable[[int], object] | None = None,
) -> dict[str, Any]:
    """Computes the `val_loss` entry of a card; with several ranks, of the process group, all call it together.

    Args:
        model: See `measure_tiles`; the same weights on every rank.
        tiles_by_sensor: Sensor name to its fixed tiles.
        protocol: See `protocol_hash`.
        batch_size: See `measure_tiles`.
        rank: This rank.
        ranks: Number of ranks.
        device: Where the model is.
        advance: See `measure_tiles`.

    Returns:
        See `summarise`; the same on every rank.

    Raises:
        MomoError: What `measure_tiles` and `summarise` raise; on every rank when one of them meets it.
    """
    shares: dict[str, TileLosses] = {}
    failure: MomoError | None = None
    try:
        for sensor, tiles in tiles_by_sensor.items():
            shares[sensor] = measure_tiles(
                model, tiles, batch_size=batch_size, rank=rank, ranks=ranks, device=device, advance=advance
            )
    except MomoError as error:
        failure = error
    if ranks > 1:
        shares = _sum_over_ranks(shares, failure, ranks, device)
    elif failure is not None:
        raise failure
    return summarise(shares, protocol, tiles_by_sensor)


def _sum_over_ranks(
    shares: dict[str, TileLosses], failure: MomoError | None, ranks: int, device: torch.device | str
) -> dict[str, TileLosses]:
    """Adds the ranks' shares; exact, because every tile is 0 on all ranks but one."""
    outcomes: list[Any] = [None] * ranks
    # A rank that failed would leave the others waiting in the sum, and one without a batch does not know the terms.
    dist.all_gather_object(outcomes, (failure, {sensor: list(share.terms) for sensor, share in shares.items()}))
    for told, _ in outcomes:
        if told is not None:
            raise told
    joined = {}
    for sensor, share in shares.items():
        names = sorted({name for _, terms in outcomes for name in terms[sensor]})
        parts = [share.loss, *(share.terms.get(name, torch.zeros_like(share.loss)) for name in names)]
        whole = torch.stack(parts).to(device)
        dist.all_reduce(whole)
        loss, *terms = whole.cpu()
        joined[sensor] = TileLosses(loss, dict(zip(names, terms, strict=True)))
    return joined


def summarise(
    losses_by_sensor: Mapping[str, TileLosses | torch.Tensor],
    protocol: str,
    tiles_by_sensor: Mapping[str, ValidationTiles] | None = None,
) -> dict[str, Any]:
    """Joins complete per-tile losses into the `val_loss` entry of a card.

    Args:
        losses_by_sensor: Sensor name to the losses of its tiles; a tensor stands for losses without terms.
        protocol: See `protocol_hash`.
        tiles_by_sensor: The tiles, which know their products and geologic units.

    Returns:
        `loss`, `stderr`, `count` over all tiles, `protocol`, and `per_sensor` with the same three by sensor name. With
        `tiles_by_sensor` also, overall and by sensor, `stderr_products` (see `product_stderr`), and by sensor, where
        the corpus names geologic units, `per_unit`: the same three by unit. Where a loss joins several terms, `terms`:
        their means by name.

    Raises:
        CheckpointError: A loss is NaN or infinite.
    """
    losses = {
        sensor: TileLosses(share) if isinstance(share, torch.Tensor) else share
        for sensor, share in losses_by_sensor.items()
    }
    _check_finite(losses, tiles_by_sensor)
    whole = torch.cat([share.loss for share in losses.values()])
    entry = {**LossEstimate.of(whole).to_dict(), "protocol": protocol, "per_sensor": {}}
    for sensor, share in losses.items():
        own = entry["per_sensor"][sensor] = LossEstimate.of(share.loss).to_dict()
        if share.terms:
            own["terms"] = {name: float(term.mean()) for name, term in sorted(share.terms.items())}
        if tiles_by_sensor is not None:
            tiles = tiles_by_sensor[sensor]
            own["stderr_products"] = product_stderr(share.loss, tiles.products)
            if tiles.units is not None:
                own["per_unit"] = _per_unit(share.loss, tiles.units)
    if tiles_by_sensor is not None:
        products = [f"{sensor} {product}" for sensor in losses for product in tiles_by_sensor[sensor].products]
        entry["stderr_products"] = product_stderr(whole, products)
    return entry


def _per_unit(losses: torch.Tensor, units: Sequence[str]) -> dict[str, dict[str, Any]]:
    places: dict[str, list[int]] = defaultdict(list)
    for place, unit in enumerate(units):
        if unit:
            places[unit].append(place)
    return {unit: LossEstimate.of(losses[places[unit]]).to_dict() for unit in sorted(places)}


def _check_finite(losses: dict[str, TileLosses], tiles_by_sensor: Mapping[str, ValidationTiles] | None) -> None:
    bad, examples, count = 0, [], 0
    for sensor, share in losses.items():
        finite = torch.isfinite(torch.stack([share.loss, *share.terms.values()])).all(dim=0)
        places = torch.nonzero(~finite).flatten().tolist()
        bad, count = bad + len(places), count + len(finite)
        if places and tiles_by_sensor is not None:
            examples += tiles_by_sensor[sensor].keys(places[:3])
    if bad:
        raise CheckpointError(
            "the validation loss is not finite",
            seen=f"{bad} of {count} tiles" + (f", for example {', '.join(examples[:3])}" if examples else ""),
            rule="every tile has a finite loss",
            fix="train with a lower train.base_lr or train.precision=fp32; checkpoints before this one are intact",
        )
