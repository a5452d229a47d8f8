"""Validation losses of weights in memory: for searches and landscapes that score many sets of weights in a row.

The model is built once and its tiles stay decoded, so that each set of weights costs its forward passes alone. The
numbers are those of `momo validate`: the same subset, masks, normalisation and batches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..corpus import Corpus
from ..errors import CheckpointError, ConfigError
from ..models import Architecture, MaskedAutoencoder
from ..weights import Card
from .config import ValidationOptions
from .from_card import autoencoder_of
from .validating import ValidateConfig, check_size, normalisation_for, open_corpora
from .validation import LossEstimate, measure_tiles, protocol_hash, validate_model
from .validation_tiles import ValidationTiles

_SHOWN = 8


class LossMeter:
    """Computes the validation loss of every sensor for one set of weights after another.

    Args:
        model: The autoencoder; its weights are replaced at each measurement.
        tiles: Sensor to its fixed tiles.
        seed: Of subset and masks.
        batch_size: Tiles a forward pass.

    Attributes:
        protocol: Hash of everything but weights and tiles that the losses depend on, as in cards.
    """

    def __init__(
        self, model: MaskedAutoencoder, tiles: Mapping[str, ValidationTiles], *, seed: int, batch_size: int
    ) -> None:
        self.model, self.tiles = model, dict(tiles)
        self.batch_size, self.seed = batch_size, seed
        self.protocol = protocol_hash(model, next(iter(self.tiles.values())).normalisation, seed)
        self._device = next(model.parameters()).device

    @classmethod
    def open(
        cls,
        card: Card,
        corpora: Sequence[str],
        samples: int,
        seed: int | None = None,
        batch_size: int = 64,
        *,
        cache_mb: int = 2048,
        lpips_backbone: str | None = None,
    ) -> LossMeter:
        """Opens corpora for the model that a card describes.

        Args:
            card: Of weights with encoder and decoder. It says how tiles are scaled; under `sensor_zscore` its
                `sensors` hold the constants of every corpus's sensor.
            corpora: Corpus folders or URLs, one a sensor.
            samples: Tiles of each validation split used at most; a fixed subset.
            seed: Of subset and masks; None: that of runs which name no other.
            batch_size: Tiles a forward pass; it changes a loss by rounding only.
            cache_mb: Memory for the decoded tiles of each corpus; a larger subset is read anew each time.
            lpips_backbone: AlexNet weights, for a loss with an LPIPS term.

        Raises:
            ConfigError: No corpus is given, two are of one sensor, `samples` or `batch_size` is not above 0, or the
                card lacks constants of a sensor.
            CheckpointError: The weights have no decoder, or the tiles have another size.
            DataError: A corpus cannot be opened or has no validation tile.
        """
        seed = ValidationOptions().seed if seed is None else seed
        if "decoder" not in card.contents:
            raise CheckpointError(
                "the weights have no decoder",
                seen=f"they hold {', '.join(card.contents) or 'nothing'}",
                rule="the validation loss is that of the reconstruction, which the decoder makes",
                fix="give whole checkpoints",
            )
        if not corpora:
            fix = "add corpora=[my/corpus]"
            raise ConfigError("no corpus is given", seen="corpora=[]", rule="one a sensor", fix=fix)
        asked = ValidateConfig(weights="", corpora=list(corpora), samples=samples, batch_size=batch_size, seed=seed)
        patches = Architecture.from_dict(card.architecture).patches
        tiles = {}
        for corpus in open_corpora(asked, {}):
            check_size(Path("the model"), card, corpus)
            tiles[corpus.sensor] = ValidationTiles(
                corpus, normalisation_for(card, corpus), patches=patches, limit=samples, seed=seed, cache_mb=cache_mb
            )
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        limit = next(iter(tiles.values())).normalisation.limit
        model = autoencoder_of(card, limit=limit, lpips_backbone=lpips_backbone, device=device)
        return cls(model, tiles, seed=seed, batch_size=batch_size)

    @property
    def sensors(self) -> list[str]:
        """The sensors, in the order of the corpora."""
        return list(self.tiles)

    @property
    def corpora(self) -> dict[str, Corpus]:
        """Corpus of each sensor."""
        return {sensor: tiles.corpus for sensor, tiles in self.tiles.items()}

    @property
    def tile_count(self) -> int:
        """Tiles of one measurement, over all sensors."""
        return sum(map(len, self.tiles.values()))

    def identity(self) -> dict[str, Any]:
        """Returns what two losses must share to be compared: protocol, batch size, fingerprint and tiles by sensor."""
        return {
            "protocol": self.protocol,
            "batch_size": self.batch_size,
            "tiles": {
                sensor: {"fingerprint": tiles.corpus.manifest.fingerprint, "count": len(tiles)}
                for sensor, tiles in self.tiles.items()
            },
        }

    def measure(
        self, state: Mapping[str, torch.Tensor], advance: Callable[[int], object] | None = None
    ) -> dict[str, Any]:
        """Computes the `val_loss` entry that a card of these weights would have.

        Args:
            state: Every tensor of the model by name; any floating dtype, computed in float32. It is only read.
            advance: Called with the number of tiles after each batch.

        Raises:
            CheckpointError: A tensor is missing, unknown or misshapen, or a loss is not finite.
            DataError: A tile cannot be read.
        """
        self._load(state)
        return validate_model(
            self.model, self.tiles, self.protocol, batch_size=self.batch_size, device=self._device, advance=advance
        )

    def losses(
        self, state: Mapping[str, torch.Tensor], advance: Callable[[int], object] | None = None
    ) -> dict[str, LossEstimate]:
        """Computes the loss of every sensor; see `measure`."""
        per_sensor = self.measure(state, advance)["per_sensor"]
        return {
            sensor: LossEstimate(own["loss"], float("nan") if own["stderr"] is None else own["stderr"], own["count"])
            for sensor, own in per_sensor.items()
        }

    def tile_losses(
        self, state: Mapping[str, torch.Tensor], advance: Callable[[int], object] | None = None
    ) -> dict[str, torch.Tensor]:
        """Computes the loss of every tile, for paired differences of two sets of weights; see `measure`.

        Returns:
            Sensor to float64 of shape (tiles,), in the order of `tiles`; not finite where the weights are too far off.
        """
        self._load(state)
        return {
            sensor: measure_tiles(
                self.model, tiles, batch_size=self.batch_size, device=self._device, advance=advance
            ).loss
            for sensor, tiles in self.tiles.items()
        }

    def mean(self, state: Mapping[str, torch.Tensor], advance: Callable[[int], object] | None = None) -> float:
        """Computes the mean over sensors of their losses, each sensor counted alike; see `measure`."""
        found = self.losses(state, advance)
        return sum(estimate.loss for estimate in found.values()) / len(found)

    def _load(self, state: Mapping[str, torch.Tensor]) -> None:
        own = self.model.state_dict()
        problems = [f"{name} is missing" for name in own if name not in state]
        problems += [f"{name} is unknown" for name in state if name not in own]
        problems += [
            f"{name} is {tuple(state[name].shape)}, not {tuple(tensor.shape)}"
            for name, tensor in own.items()
            if name in state and state[name].shape != tensor.shape
        ]
        if problems:
            more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
            raise CheckpointError(
                "the weights do not fit the model",
                seen="; ".join(problems[:_SHOWN]) + more,
                rule="every tensor of the model is there with its shape, and no other",
            )
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(state[name])
