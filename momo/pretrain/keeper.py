"""What a run keeps: validated checkpoints, states in between, copies of them, the account of its work."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runs import CHECKPOINTS_NAME, RESUME_NAME
from ..weights import Card
from .checkpoint import thin_out, write_checkpoint
from .config import CheckpointOptions
from .engine import OptimizerState
from .probe import KnnProbe
from .reconstruction import Reconstructions
from .summary import RunSummary
from .upload import Uploader
from .validation import protocol_hash, validate_model
from .validation_tiles import ValidationTiles

# A SLURM job that was told to end has some minutes; what is not copied then is copied by the next start.
UPLOAD_PATIENCE_S = 120.0

if TYPE_CHECKING:
    from .trainer import Trainer


class Keeper:
    """Validates and saves for a trainer; all ranks call its methods together, rank 0 writes.

    Args:
        trainer: The loop, whose weights are kept.
        card: What the checkpoints' cards share.
    """

    def __init__(self, trainer: Trainer, card: Card) -> None:
        self._trainer, self._card, self._config = trainer, card, trainer.config
        sources, model, options = trainer.sources, trainer.reference, trainer.config.validation
        self._protocol = protocol_hash(model, sources.normalisations[0], options.seed)
        self._tiles = {
            corpus.sensor: ValidationTiles(
                corpus,
                normalisation,
                patches=model.architecture.patches,
                limit=options.samples,
                seed=options.seed,
                cache_mb=trainer.config.data.cache_mb,
            )
            for corpus, normalisation in zip(sources.corpora, sources.normalisations, strict=True)
        }
        self._extras_made = False
        self._pictures: Reconstructions | None = None
        self._probe: KnnProbe | None = None
        self._uploader: Uploader | None = None
        if trainer.main and self._config.checkpoint.upload is not None:
            keep = trainer.config.checkpoint
            self._uploader = make_uploader(keep, trainer.run)
            self._uploader.catch_up(trainer.run)

    def validate(self) -> dict[str, Any]:
        """Validates the weights as they are and logs the loss.

        Returns:
            The `val_loss` entry of a card, the same on every rank.
        """
        trainer = self._trainer
        assert trainer.engine is not None
        trainer.engine.copy_weights(trainer.reference)
        val_loss = validate_model(
            trainer.reference,
            self._tiles,
            self._protocol,
            batch_size=self._config.validation.batch_size,
            rank=trainer.rank,
            ranks=trainer.ranks,
            device=trainer.device,
            advance=lambda _: trainer.beat("validation", trainer.samples),
        )
        trainer.control.do_on_main(lambda: self._tell(val_loss))
        return val_loss

    def _tell(self, val_loss: dict[str, Any]) -> None:
        trainer = self._trainer
        assert trainer.log is not None
        trainer.log.validation(trainer.samples, val_loss)
        if not self._extras_made:
            self._make_extras()
        if self._pictures is not None:
            picture_HW = self._pictures.picture(trainer.reference)
            if picture_HW is not None:
                trainer.log.reconstructions(trainer.samples, picture_HW)
        if self._probe is not None:
            trainer.log.probe(trainer.samples, self._probe.run(trainer.reference).to_dict())

    def _make_extras(self) -> None:
        """Pictures and probe, on rank 0 alone and at first use."""
        self._extras_made = True
        trainer, options = self._trainer, self._config.telemetry
        if options.reconstructions:
            in_chans = trainer.reference.architecture.in_chans
            self._pictures = Reconstructions(self._tiles, options.reconstructions, in_chans=in_chans)
        if options.probe is not None:
            normalisation = trainer.sources.normalisations[0]
            self._probe = KnnProbe(Path(options.probe), normalisation, neighbours=options.probe_neighbours)

    def checkpoint(self, *, complete: bool) -> None:
        """Validates and writes a checkpoint for selection, with the state for resuming.

        Args:
            complete: True at the end of the run.
        """
        val_loss = self.validate()
        card = dataclasses.replace(self._card, samples=self._trainer.samples, val_loss=val_loss)
        self._write(CHECKPOINTS_NAME, card, complete=complete)

    def save_between(self) -> None:
        """Writes a state for resuming that selection does not see."""
        trainer = self._trainer
        assert trainer.engine is not None
        trainer.engine.copy_weights(trainer.reference)
        self._write(RESUME_NAME, dataclasses.replace(self._card, samples=trainer.samples), complete=False)

    def _write(self, folder: str, card: Card, *, complete: bool) -> None:
        trainer = self._trainer
        assert trainer.engine is not None
        optimizer = trainer.engine.optimizer_state(keep=trainer.main)
        trainer.control.do_on_main(lambda: self._write_on_main(folder, card, optimizer, complete=complete))

    def _write_on_main(self, folder: str, card: Card, optimizer: OptimizerState | None, *, complete: bool) -> None:
        trainer = self._trainer
        assert optimizer is not None
        trainer.clock()
        state = (optimizer, trainer.run_state())
        path = write_checkpoint(
            trainer.run / folder, trainer.samples, trainer.reference.state_dict(), copy.copy(card), state
        )
        thin_out(trainer.run, self._config.checkpoint.keep_engine)
        RunSummary.of(trainer.totals, trainer.reference, tiles=trainer.tiles, complete=complete).write(trainer.run)
        if self._uploader is not None:
            if folder == CHECKPOINTS_NAME:
                self._uploader.submit(path)
            self._tell_uploads(self._uploader.poll())

    def _tell_uploads(self, events: list[dict[str, Any]]) -> None:
        for event in events:
            self._trainer.incident(event.pop("kind"), **event)

    def close(self) -> None:
        """Waits for copies that are under way (rank 0)."""
        if self._uploader is not None:
            self._tell_uploads(self._uploader.close(UPLOAD_PATIENCE_S))


def make_uploader(options: CheckpointOptions, run: Path) -> Uploader:
    """Makes what copies the checkpoints of a run.

    Args:
        options: With `upload` set.
        run: RUN folder.
    """
    return Uploader(str(options.upload), run.name, with_engine=options.upload_engine, keep_engine=options.keep_engine)
