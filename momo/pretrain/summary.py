"""The account of a run: what it has seen and used, over all its restarts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..files import write_json
from ..models import MaskedAutoencoder
from ..models.mae import ENCODER_PREFIXES
from .flops import flops_per_sample, shown_patches

SUMMARY_NAME = "summary.json"


@dataclass
class Totals:
    """What a run has used so far; it travels in the state for resuming, so that restarts add up.

    Work that a kill undid is not in it: after a resume the counts go on from the state that was resumed.

    Attributes:
        samples: Training samples consumed.
        steps: Optimizer steps, those left out included.
        train_seconds: Wall time of the steps.
        wall_seconds: Wall time of the training processes, with start, validation and checkpoints.
        skipped_steps: Steps left out for a loss or gradient that was no number.
        corrupt_tiles: Tiles that could not be read.
        restarts: Times the run was resumed.
    """

    samples: int = 0
    steps: int = 0
    train_seconds: float = 0.0
    wall_seconds: float = 0.0
    skipped_steps: int = 0
    corrupt_tiles: int = 0
    restarts: int = 0

    def add(self, **amounts: float) -> None:
        """Adds to fields by name."""
        for name, amount in amounts.items():
            setattr(self, name, getattr(self, name) + amount)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for the state."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Totals:
        """Builds the object back; what an older state does not have is 0.

        Raises:
            CheckpointError: A field is unknown or no number.
        """
        known = {entry.name for entry in dataclasses.fields(cls)}
        bad = {k: v for k, v in fields.items() if k not in known or not isinstance(v, (int, float)) or v < 0}
        if bad:
            raise CheckpointError(
                "the state of the run holds counts momo does not know",
                seen=bad,
                rule=f"numbers from 0 on, named {', '.join(sorted(known))}",
                fix="continue the run with the version of momo that wrote the state",
            )
        return cls(**fields)


@dataclass(frozen=True)
class RunSummary:
    """The account of a run, for the reader who compares models by what they cost; RUN/summary.json.

    Attributes:
        totals: See `Totals`.
        epochs: Training samples over training tiles.
        images_per_s: Training samples over `totals.train_seconds`.
        flops: Of all training samples, forward and backward (see `flops_per_sample`).
        patch_tokens: Patches of all training samples.
        patch_tokens_shown: Those of them the encoder has seen.
        parameters: Trainable parameters, encoder and decoder.
        encoder_parameters: Those of the encoder.
        per_parameter: `samples`, `patch_tokens`, `patch_tokens_shown` and `flops` divided by `parameters`.
        complete: The run has reached its end.
        extra: Further entries, for example `peak_memory_gib`.
    """

    totals: Totals
    epochs: float
    images_per_s: float | None
    flops_per_sample: dict[str, int]
    flops: int
    patch_tokens: int
    patch_tokens_shown: int
    parameters: int
    encoder_parameters: int
    per_parameter: dict[str, float]
    complete: bool = False
    extra: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls, totals: Totals, model: MaskedAutoencoder, *, tiles: int, complete: bool = False, **extra: Any
    ) -> RunSummary:
        """Draws up the account.

        Args:
            totals: Counts so far.
            model: The autoencoder; only shapes are looked at.
            tiles: Training tiles of all corpora.
            complete: The run has reached its end.
            extra: Further entries.
        """
        shapes = model.architecture
        trainable = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
        parameters = sum(trainable.values())
        flops = flops_per_sample(shapes, model.mask_ratio)
        counts = {
            "samples": totals.samples,
            "patch_tokens": totals.samples * shapes.patches,
            "patch_tokens_shown": totals.samples * shown_patches(shapes, model.mask_ratio),
            "flops": totals.samples * flops.total,
        }
        return cls(
            totals=totals,
            epochs=totals.samples / tiles,
            images_per_s=totals.samples / totals.train_seconds if totals.train_seconds > 0 else None,
            flops_per_sample=flops.to_dict(),
            flops=counts["flops"],
            patch_tokens=counts["patch_tokens"],
            patch_tokens_shown=counts["patch_tokens_shown"],
            parameters=parameters,
            encoder_parameters=sum(n for name, n in trainable.items() if name.startswith(ENCODER_PREFIXES)),
            per_parameter={name: count / parameters for name, count in counts.items()},
            complete=complete,
            extra=extra,
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns one flat level of plain values, but for what belongs together."""
        fields = dataclasses.asdict(self)
        return {**fields.pop("totals"), **fields.pop("extra"), **fields}

    def write(self, run: Path) -> None:
        """Writes RUN/summary.json in one step."""
        write_json(run / SUMMARY_NAME, self.to_dict())
