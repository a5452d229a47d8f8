"""The training loop of one rank: steps, incidents, states to resume from."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..machine import keep_freed_memory
from ..weights import load_weights
from .checkpoint import clean_partials, latest_resumable
from .config import PretrainConfig
from .control import Control, StopRequest, lost_rank
from .data import Sources, open_sources, to_inputs
from .engine import Engine, OptimizerState
from .flops import flops_per_sample, peak_tflops
from .guard import NonFinite, Reload, after_nonfinite, bad_groups, bad_keys, check_corrupt
from .keeper import Keeper
from .loader import make_loader
from .metrics import RunLog
from .optimisation import learning_rate
from .setup import engine_config, make_card, make_model, make_start
from .state import RunState, load_state
from .summary import Totals
from .telemetry import StepTimer, gradient_norms, peak_memory_gib, throughput

Beat = Callable[[str, int], None]


class Trainer:
    """Trains one rank's share under DeepSpeed.

    Args:
        config: The job, with `ranks` resolved.
        rank: This rank; rank 0 writes.
        ranks: Number of ranks.
        beat: Told what this rank does and at which sample, for the watchdog.
        stop_request: Knows of signals that came before training began.

    The process group must exist (see `momo.pretrain.launch`).
    """

    def __init__(
        self,
        config: PretrainConfig,
        *,
        rank: int,
        ranks: int,
        beat: Beat | None = None,
        stop_request: StopRequest | None = None,
    ) -> None:
        self.config, self.rank, self.ranks = config, rank, ranks
        self.run = Path(config.out)
        self.main = rank == 0
        self.beat = beat or (lambda phase, samples: None)
        cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
        if not cuda:
            keep_freed_memory()
        self._since = time.monotonic()
        self._log: RunLog | None = None
        self._norm, self._norms = math.nan, dict[str, float]()
        self.control = Control(rank, ranks, config.timeout_s)
        self.stop_request = stop_request or StopRequest()
        # The launching process has verified the hashes already.
        self.sources: Sources = open_sources(config, verify=False)
        self.tiles = int(self.sources.bounds[-1])
        self.engine: Engine | None = None
        self.totals = Totals()
        self.left_out: list[int] = []
        self.timer = StepTimer(self.device)
        # Whole batches only, so that every rank takes the same number of steps.
        self.stop = config.train.samples - config.train.samples % config.train.batch_size
        self._restore()
        self.keeper = Keeper(self, make_card(config, self.sources, self.start))
        self._flops = flops_per_sample(self.reference.architecture, self.reference.mask_ratio)
        name = torch.cuda.get_device_name(self.device) if cuda else "cpu"
        self._peak = config.telemetry.peak_tflops or peak_tflops(name, config.train.precision)

    # --- state ----------------------------------------------------------------------------------------------------

    def _restore(self) -> None:
        """Goes to the newest state of the run, or to its start. Rank 0 reads; the others need no shared disk."""
        config = self.config
        self.start = make_start(config, self.sources.corpora[0].manifest.tile_size)
        # Kept in float32 beside the engine's model: what is validated and saved.
        self.reference = self.start.model.to(self.device)
        optimizer, state = self.control.do_on_main(self._read_newest)
        if state is not None:
            self._share_reference()
        if self.engine is not None:
            self.engine.close()
        model = make_model(config, self.sources, self.reference, self.device)
        if optimizer is not None and self.main:
            optimizer = self._whole_optimizer
        self.engine = Engine(model, config, engine_config(config), optimizer)
        self.samples = state.samples if state is not None else 0
        self.left_out = sorted({*self.left_out, *(state.left_out if state is not None else [])})
        self.totals = Totals.from_dict(state.totals) if state is not None else Totals()
        self.totals.skipped_steps = len(self.left_out)
        if state is not None:
            self.totals.add(restarts=1)

    def _read_newest(self) -> tuple[OptimizerState | None, RunState | None]:
        """Reads the newest state on rank 0; returns what the other ranks are to know of it."""
        newest = latest_resumable(self.run)
        if newest is None:
            return None, None
        tensors, _ = load_weights(newest.path, expected=self.reference.state_dict())
        self.reference.load_state_dict(tensors)
        self._whole_optimizer, state = load_state(newest.path)
        return OptimizerState({}, self._whole_optimizer.steps, self._whole_optimizer.loss_scale), state

    def _share_reference(self) -> None:
        if self.ranks > 1:
            for tensor in self.reference.state_dict().values():
                dist.broadcast(tensor, 0)

    def clock(self) -> None:
        """Adds the time since it was last asked, or since the start, to the wall time of the run."""
        now = time.monotonic()
        self.totals.add(wall_seconds=now - self._since)
        self._since = now

    def run_state(self) -> RunState:
        """Returns the counts that go into the state on disk."""
        return RunState(samples=self.samples, left_out=self.left_out, totals=self.totals.to_dict())

    # --- loop -----------------------------------------------------------------------------------------------------

    def train(self) -> bool:
        """Runs from the newest state (or the start) to the end of the run.

        Returns:
            True when the run is complete, False when a signal stopped it after saving its state.

        Raises:
            MomoError: The numbers are not finite or tiles are damaged beyond the budget, a state cannot be written, or
                another rank was lost.
        """
        if self.samples >= self.stop:
            return True
        if self.main:
            clean_partials(self.run)
            self._log = RunLog(self.run, samples=self.samples, total=self.stop, name=self.run.name)
        try:
            with self.stop_request.listening():
                return self._train()
        except RuntimeError as error:
            lost = lost_rank(error, f"rank {self.rank} at {self.samples:,} samples")
            if lost is None:
                raise
            raise lost from None
        finally:
            self.keeper.close()
            if self._log is not None:
                self._log.close()

    def _train(self) -> bool:
        if self.totals.restarts:
            self.incident("resumed", ranks=self.ranks)
        if self.samples == 0:
            self.keeper.validate()
        while True:
            try:
                return self._steps()
            except Reload as request:
                self._restore()
                if self._log is not None:
                    self._log.rewind(self.samples)
                self.incident("reloaded", **request.found.to_dict())

    def _steps(self) -> bool:
        """Steps until the end (True) or a signal (False)."""
        config, size = self.config, self.config.train.batch_size
        self.timer.restart()
        batches = self.timer.wait(self._loader())
        window = _Window(self.device)
        while self.samples < self.stop:
            started = time.monotonic()
            after = self.samples + size
            at_checkpoint = _crosses(self.samples, after, config.validation.every) or after == self.stop
            logged = at_checkpoint or window.steps + 1 >= config.train.log_every
            rate = learning_rate(config.train, self.samples)
            stopped = self._step(batches, rate, window, measure=logged)
            self.samples = after
            self.totals.add(samples=size, steps=1, train_seconds=time.monotonic() - started)
            if self._log is not None:
                self._log.advance(size)
            if logged:
                self._write_train_line(window, rate)
                window = _Window(self.device)
            if at_checkpoint:
                self.beat("validation and checkpoint", self.samples)
                self.keeper.checkpoint(complete=after == self.stop)
                self.timer.restart()
            elif stopped or _crosses(self.samples - size, after, config.checkpoint.resume_every):
                self.beat("saving the state", self.samples)
                self.keeper.save_between()
                self.timer.restart()
            if stopped and after < self.stop:
                self.incident("signal", name=self.stop_request.name or "on another rank")
                return False
        return True

    def _loader(self) -> Iterator[dict[str, Any]]:
        return iter(
            make_loader(
                self.sources,
                self.config,
                patches=self.reference.architecture.patches,
                start=self.samples,
                stop=self.stop,
                rank=self.rank,
                ranks=self.ranks,
                device=self.device,
            )
        )

    # --- one step -------------------------------------------------------------------------------------------------

    def _step(self, batches: Iterator[dict[str, Any]], rate: float, window: _Window, *, measure: bool) -> bool:
        """Takes one step; returns whether a rank was asked to stop."""
        leave_out = self.samples in self.left_out
        micro_batches, losses = [], []
        for number in range(self.config.accumulation):
            self.beat("waiting for data", self.samples)
            batch = next(batches)
            micro_batches.append(batch)
            if not leave_out:
                self.beat("forward and backward", self.samples)
                losses.append(self._micro_step(batch, last=number + 1 == self.config.accumulation))
        corrupt = [pair for batch in micro_batches for pair in batch["corrupt"]]
        finite = all(bool(torch.isfinite(loss_B).all()) for loss_B in losses)
        self.beat("agreement of the ranks", self.samples)
        asked, nonfinite, damaged = self.control.any(self.stop_request.name is not None, not finite, bool(corrupt))
        if damaged:
            self._tell_corrupt(corrupt)
        if not leave_out:
            self._update(micro_batches, losses, rate, nonfinite=nonfinite, measure=measure)
            window.add(losses, corrupt=len(corrupt))
        window.steps += 1
        self.timer.step(self.config.train.batch_size)
        return asked

    def _micro_step(self, batch: dict[str, Any], *, last: bool) -> torch.Tensor:
        assert self.engine is not None
        limit, in_chans = self.sources.normalisations[0].limit, self.reference.architecture.in_chans
        inputs = to_inputs(batch, limit=limit, in_chans=in_chans, device=self.device)
        return self.engine.micro_step(*inputs, last=last, enter=self.timer.enter)

    def _update(
        self,
        micro_batches: list[dict[str, Any]],
        losses: list[torch.Tensor],
        rate: float,
        *,
        nonfinite: bool,
        measure: bool,
    ) -> None:
        """Updates the weights, or leaves the step out and follows the policy when a number is not finite."""
        assert self.engine is not None
        squares = self.engine.gradient_squares() if measure or nonfinite else {}
        self.timer.enter("optimizer")
        self.beat("optimizer step", self.samples)
        if nonfinite:
            self.engine.discard_step()
            norm = math.nan
        else:
            norm = self.engine.finish_step(rate)
        self.timer.enter("other")
        if measure:
            self._norm, self._norms = norm, gradient_norms(squares)
        if math.isfinite(norm):
            return
        if not nonfinite and self.config.train.precision == "fp16":
            return  # the loss scale was too high and has been lowered
        self._leave_out(micro_batches, losses, squares)

    def _leave_out(
        self, micro_batches: list[dict[str, Any]], losses: list[torch.Tensor], squares: dict[str, float]
    ) -> None:
        if not squares:
            squares = self._gradients_again(micro_batches)
        mine = bad_keys(losses, [batch["keys"] for batch in micro_batches])
        by_rank = self.control.gather(mine)
        found = NonFinite(
            samples=self.samples,
            step=self.samples // self.config.train.batch_size,
            ranks=[rank for rank, keys in enumerate(by_rank) if keys],
            keys=[key for keys in by_rank for key in keys],
            groups=bad_groups(squares),
        )
        count = len(self.left_out)
        self.left_out.append(self.samples)
        self.totals.skipped_steps = len(self.left_out)
        self.incident("skipped_step", **found.to_dict())
        after_nonfinite(found, self.config, count)

    def _gradients_again(self, micro_batches: list[dict[str, Any]]) -> dict[str, float]:
        """Computes a step once more to see which gradients were no numbers: they are gone when that is known."""
        assert self.engine is not None
        for number, batch in enumerate(micro_batches, start=1):
            self._micro_step(batch, last=number == len(micro_batches))
        squares = self.engine.gradient_squares()
        self.engine.discard_step()
        return squares

    def _tell_corrupt(self, mine: list[tuple[str, str]]) -> None:
        newest = [pair for pairs in self.control.gather(mine) for pair in pairs]
        self.totals.add(corrupt_tiles=len(newest))
        for key, reason in newest:
            self.incident("corrupt_tile", key=key, reason=reason)
        check_corrupt(self.totals.corrupt_tiles, newest, self.config)

    # --- telling --------------------------------------------------------------------------------------------------

    def incident(self, kind: str, **fields: Any) -> None:
        """Writes an incident into the log of the run (rank 0)."""
        if self._log is not None:
            self._log.incident(kind, self.samples, **fields)

    @property
    def log(self) -> RunLog | None:
        """The log of the run, on rank 0."""
        return self._log

    def _write_train_line(self, window: _Window, rate: float) -> None:
        total, count = window.loss, window.count
        if self.ranks > 1:
            both = torch.stack([total, count])
            dist.all_reduce(both)
            total, count = both
        timing = self.timer.window()
        if self._log is None:
            return
        self._log.train(
            {
                "samples": self.samples,
                "step": self.samples // self.config.train.batch_size,
                "epoch": self.samples / self.tiles,
                "loss": float(total / count) if float(count) else math.nan,
                "lr": rate,
                "grad_norm": self._norm,
                "grad_norms": self._norms,
                **timing.to_dict(),
                **throughput(timing.images_per_s, self._flops, self.ranks, self._peak),
                "peak_memory_gib": peak_memory_gib(self.device),
            }
        )


class _Window:
    """Losses since the last train line, summed on the device: reading each would stall a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.loss = torch.zeros((), device=device, dtype=torch.float64)
        self.count = torch.zeros((), device=device, dtype=torch.float64)
        self.steps = 0

    def add(self, losses: list[torch.Tensor], *, corrupt: int) -> None:
        for loss_B in losses:
            self.loss += loss_B.double().nansum()
            self.count += len(loss_B)
        self.count -= corrupt


def _crosses(before: int, after: int, every: int | None) -> bool:
    return every is not None and after // every > before // every
