"""The training loop of one rank."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from ..errors import MomoError
from ..extras import require
from ..runs import Checkpoint
from .checkpoint import clean_partials, drop_old_engines, latest_resumable, write_checkpoint
from .config import PretrainConfig
from .data import Sources, TrainTiles, ValidationTiles, open_sources, to_inputs
from .metrics import RunLog
from .optimisation import learning_rate, parameter_groups
from .plan import SamplePlan
from .setup import engine_config, make_card, make_start
from .validation import protocol_hash, summarise, tile_losses

_ENGINE_TAG = "engine"


class Trainer:
    """Trains one rank's share under DeepSpeed.

    Args:
        config: The job.
        rank: This rank; rank 0 writes.
        ranks: Number of ranks.

    The process group must exist (see `momo.pretrain.launch`).
    """

    def __init__(self, config: PretrainConfig, *, rank: int, ranks: int) -> None:
        self.config, self.rank, self.ranks = config, rank, ranks
        self.run = Path(config.out)
        self.main = rank == 0
        cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
        # The launching process has verified the hashes already.
        self.sources: Sources = open_sources(config, verify=False)
        start = make_start(config, self.sources.corpora[0].manifest.tile_size)
        self.model = start.model.to(self.device)
        self.card = make_card(config, self.sources, start)
        self.protocol = protocol_hash(self.model, self.sources.normalisations[0], config.validation.seed)
        self.validation_tiles = self._validation_tiles()
        self.engine = self._make_engine()
        self.samples = self._resume()
        # Whole batches only, so that every rank takes the same number of steps.
        self.stop = config.train.samples - config.train.samples % config.train.batch_size

    def _validation_tiles(self) -> dict[str, ValidationTiles]:
        shapes, options = self.model.architecture, self.config.validation
        return {
            corpus.sensor: ValidationTiles(
                corpus,
                normalisation,
                patches=shapes.patches,
                limit=options.samples,
                seed=options.seed,
            )
            for corpus, normalisation in zip(self.sources.corpora, self.sources.normalisations, strict=True)
        }

    def _make_engine(self) -> Any:
        deepspeed = require("deepspeed", "pretrain")
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        options = self.config.train
        optimizer = torch.optim.AdamW(
            parameter_groups(self.model, options.weight_decay),
            lr=learning_rate(options, 0),
            betas=(options.beta1, options.beta2),
            fused=True,
        )
        engine, *_ = deepspeed.initialize(model=self.model, optimizer=optimizer, config=engine_config(self.config))
        return engine

    def _resume(self) -> int:
        checkpoint: Checkpoint | None = latest_resumable(self.run)
        if checkpoint is None:
            return 0
        self.engine.load_checkpoint(str(checkpoint.path), tag=_ENGINE_TAG)
        return checkpoint.samples

    def train(self) -> None:
        """Runs from the newest checkpoint (or the start) to the end of the run.

        Raises:
            MomoError: The training or validation loss is not finite.
        """
        if self.samples >= self.stop:
            return
        if self.main:
            clean_partials(self.run)
        log = None
        if self.main:
            log = RunLog(self.run, samples=self.samples, total=self.stop, name=self.run.name)
        try:
            if self.samples == 0:
                self._validate(log)
            self._steps(log)
        finally:
            if log is not None:
                log.close()

    def _loader(self) -> DataLoader[Any]:
        options, shapes = self.config.train, self.model.architecture
        plan = SamplePlan(self.sources.fingerprint, int(self.sources.bounds[-1]), self.config.seed)
        tiles = TrainTiles(
            self.sources,
            patches=shapes.patches,
            augment=options.augment,
            seed=self.config.seed,
            cache_mb=self.config.data.cache_mb,
        )
        batches = plan.batches(
            start=self.samples, stop=self.stop, batch_size=options.batch_size, rank=self.rank, ranks=self.ranks
        )
        workers = self.config.data.workers
        return DataLoader(
            tiles,
            batch_sampler=batches,
            num_workers=workers,
            pin_memory=self.device.type == "cuda",
            multiprocessing_context="spawn" if workers else None,
            persistent_workers=bool(workers),
        )

    def _steps(self, log: RunLog | None) -> None:
        options = self.config.train
        every = self.config.validation.every
        window = _Window()
        for batch in self._loader():
            rate = learning_rate(options, self.samples)
            for group in self.engine.optimizer.param_groups:
                group["lr"] = rate
            after = self.samples + options.batch_size
            at_checkpoint = after // every > self.samples // every or after == self.stop
            logged = at_checkpoint or window.steps + 1 == options.log_every
            loss = self._step(batch, measure=logged)
            self.samples = after
            window.add(loss, options.batch_size)
            if log is not None:
                log.advance(options.batch_size)
            if logged:
                record = self._record(window, rate, batch["key"])
                if log is not None:
                    log.train(record)
                window = _Window()
            if at_checkpoint:
                self._checkpoint(log)
                window = _Window()

    def _step(self, batch: dict[str, Any], *, measure: bool) -> torch.Tensor:
        limit, in_chans = self.sources.normalisations[0].limit, self.model.architecture.in_chans
        image, valid, noise = to_inputs(batch, limit=limit, in_chans=in_chans, device=self.device)
        half = self.config.train.precision == "bf16"
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=half):
            loss = self.engine(image, valid, noise).mean()
        self.engine.backward(loss)
        if measure:
            self._grad_norm = self._gradient_norm()
        self.engine.step()
        return loss.detach()

    def _gradient_norm(self) -> torch.Tensor | None:
        """Norm before clipping; under ZeRO 1 and 2 DeepSpeed itself knows it, after the step."""
        if self.engine.zero_optimization():
            return None
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients)

    def _record(self, window: _Window, rate: float, keys: list[str]) -> dict[str, Any]:
        loss = window.loss / window.steps
        dist.all_reduce(loss)
        mean = float(loss) / self.ranks
        norm = self._grad_norm if self._grad_norm is not None else self.engine.get_global_grad_norm()
        norm = float(norm)
        if not (math.isfinite(mean) and math.isfinite(norm)):
            raise MomoError(
                "training diverged",
                seen=f"loss {mean}, gradient norm {norm} at {self.samples} samples; last tiles {', '.join(keys[:3])}",
                rule="loss and gradients are finite numbers",
                fix="lower train.base_lr or use train.precision=fp32, then start again: the last checkpoint is intact",
            )
        seconds = time.monotonic() - window.started
        return {
            "samples": self.samples,
            "step": self.samples // self.config.train.batch_size,
            "epoch": self.samples / int(self.sources.bounds[-1]),
            "loss": mean,
            "lr": rate,
            "grad_norm": norm,
            "images_per_s": window.samples / seconds,
            "seconds": seconds,
        }

    def _validate(self, log: RunLog | None) -> dict[str, Any]:
        losses = {}
        for sensor, tiles in self.validation_tiles.items():
            share = tile_losses(
                self.model,
                tiles,
                batch_size=self.config.validation.batch_size,
                rank=self.rank,
                ranks=self.ranks,
                device=self.device,
            ).to(self.device)
            dist.all_reduce(share)
            losses[sensor] = share.cpu()
        val_loss = summarise(losses, self.protocol)
        if log is not None:
            log.validation(self.samples, val_loss)
        return val_loss

    def _checkpoint(self, log: RunLog | None) -> None:
        card = dataclasses.replace(self.card, samples=self.samples, val_loss=self._validate(log))
        write_checkpoint(
            self.run,
            self.samples,
            self.model.state_dict() if self.main else {},
            card,
            save_engine=lambda folder: self.engine.save_checkpoint(str(folder), tag=_ENGINE_TAG, save_latest=False),
            is_main=self.main,
            barrier=dist.barrier,
        )
        if self.main:
            drop_old_engines(self.run, self.config.keep_engine)


class _Window:
    """Losses and time since the last train line."""

    def __init__(self) -> None:
        self.loss: torch.Tensor = torch.zeros(())
        self.steps = 0
        self.samples = 0
        self.started = time.monotonic()

    def add(self, loss: torch.Tensor, samples: int) -> None:
        # Summed on the device: reading the value every step would stall a GPU.
        self.loss = self.loss.to(loss.device) + loss.float()
        self.steps += 1
        self.samples += samples
