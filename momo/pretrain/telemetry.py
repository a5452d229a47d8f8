"""Where the time of a step goes, how near the device's peak it is, and how large gradients are, part by part."""

from __future__ import annotations

import math
import re
import resource
import statistics
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from .flops import Flops, mfu

PHASES = ("data", "forward", "backward", "optimizer", "other")
_GIB = 2**30
_Batch = TypeVar("_Batch")


@dataclass(frozen=True)
class StepWindow:
    """What `StepTimer` saw between two train lines.

    Attributes:
        steps: Steps completed.
        samples: Their samples, over all ranks.
        seconds: Wall time of the window.
        step_seconds: Median time of a step.
        data_wait: Share of the wall time in which this process stood waiting for the loader, in [0, 1].
        shares: Share of each of `PHASES` in the time of the steps, on the device's clock; they add up to 1. On a GPU
            `data` is the time it stood idle for want of data: less than `data_wait`, as it works through a queue.
    """

    steps: int
    samples: int
    seconds: float
    step_seconds: float
    data_wait: float
    shares: dict[str, float]

    @property
    def images_per_s(self) -> float:
        """Images a second over all ranks."""
        return self.samples / self.seconds if self.seconds > 0 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields of a train line."""
        return {
            "images_per_s": self.images_per_s,
            "seconds": self.seconds,
            "step_seconds": self.step_seconds,
            "data_wait": self.data_wait,
            "shares": self.shares,
        }


class StepTimer:
    """Takes the time of the phases of each step.

    On the CPU by the clock; on a GPU by events in its stream, which are read when they are done or, for a train line,
    waited for: no step waits for the device because it is timed. One enters phases in any order and as often as
    needed (accumulation), and closes each step:

        for batch in timer.wait(loader):        # "data" while it waits, "other" after
            timer.enter("forward")
            ...
            timer.step(samples)
        line = timer.window().to_dict()         # and a new window begins

    Args:
        device: Where the model computes.
    """

    def __init__(self, device: torch.device | str) -> None:
        self._cuda = torch.device(device).type == "cuda"
        self._spare: list[Any] = []
        self.restart()

    def restart(self) -> None:
        """Begins a new window now and forgets what was not read, for example after a validation."""
        self._marks: deque[tuple[Any, str, bool]] = deque()
        self._phase = "other"
        self._last = self._now()
        self._step, self._waited, self._steps, self._samples = 0.0, 0.0, 0, 0
        self._sums = dict.fromkeys(PHASES, 0.0)
        self._durations: list[float] = []
        self._started = self._entered = time.perf_counter()

    def enter(self, phase: str) -> None:
        """Ends the phase in progress and begins another of `PHASES`."""
        self._leave(phase, ends_step=False)

    def step(self, samples: int) -> None:
        """Ends the step.

        Args:
            samples: Samples of the step, over all ranks.
        """
        self._leave("other", ends_step=True)
        self._steps += 1
        self._samples += samples
        self._read(wait=False)

    def wait(self, batches: Iterable[_Batch]) -> Iterator[_Batch]:
        """Passes batches on and counts as `data` the time until each arrives."""
        source = iter(batches)
        while True:
            self.enter("data")
            try:
                batch = next(source)
            except StopIteration:
                return
            finally:
                self.enter("other")
            yield batch

    def window(self) -> StepWindow:
        """Sums up the steps since the last window, waiting for the device, and begins a new window."""
        self._read(wait=True)
        seconds = time.perf_counter() - self._started
        total = sum(self._sums.values())
        window = StepWindow(
            steps=self._steps,
            samples=self._samples,
            seconds=seconds,
            step_seconds=statistics.median(self._durations) if self._durations else 0.0,
            data_wait=self._waited / seconds if seconds > 0 else 0.0,
            shares={phase: spent / total if total > 0 else 0.0 for phase, spent in self._sums.items()},
        )
        self.restart()
        return window

    def _leave(self, phase: str, *, ends_step: bool) -> None:
        self._marks.append((self._now(), self._phase, ends_step))
        now = time.perf_counter()
        if self._phase == "data":
            self._waited += now - self._entered
        self._entered, self._phase = now, phase

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = self._spare.pop() if self._spare else torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _read(self, *, wait: bool) -> None:
        """Adds up the marks the device has passed, all of them when `wait`."""
        if wait and self._cuda and self._marks:
            self._marks[-1][0].synchronize()
        while self._marks:
            mark, phase, ends_step = self._marks[0]
            if self._cuda and not mark.query():
                return
            self._marks.popleft()
            elapsed = self._last.elapsed_time(mark) / 1e3 if self._cuda else mark - self._last
            if self._cuda:
                self._spare.append(self._last)
            self._last = mark
            self._sums[phase] += elapsed
            self._step += elapsed
            if ends_step:
                self._durations.append(self._step)
                self._step = 0.0


def peak_memory_gib(device: torch.device | str) -> float:
    """Returns the most memory this process has held so far: of the GPU's, or else of the machine's, in GiB."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / _GIB
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / _GIB


def throughput(images_per_s: float, flops: Flops, devices: int, peak: float | None) -> dict[str, float | None]:
    """Returns the fields `tflops` (reached by one device) and `mfu` (None when the peak is unknown) of a train line.

    Args:
        images_per_s: Over all devices.
        flops: Of one sample.
        devices: Number of devices.
        peak: Of one device, in TFLOP/s.
    """
    return {
        "tflops": images_per_s * flops.total / devices / 1e12,
        "mfu": mfu(images_per_s, flops.total, devices, peak),
    }


def group_of(name: str) -> str:
    """Returns the part of the model a parameter belongs to: `embed`, `blocks.0` to `blocks.n`, `norm` or `decoder`."""
    if block := re.match(r"blocks\.\d+", name):
        return block.group()
    if name.startswith(("decoder", "mask_token")):
        return "decoder"
    return "norm" if name.startswith("norm.") else "embed"


def gradient_norms(squares: Mapping[str, float]) -> dict[str, float]:
    """Joins the gradients of parameters into norms of the model's parts.

    Args:
        squares: Parameter name to the sum of squares of its gradient (see `Engine.gradient_squares`).

    Returns:
        L2 norm by part (see `group_of`), and of all as `total`; not finite where a gradient is not.
    """
    parts: dict[str, float] = {}
    for name, square in squares.items():
        parts[group_of(name)] = parts.get(group_of(name), 0.0) + square
    return {part: math.sqrt(square) for part, square in {**parts, "total": sum(parts.values())}.items()}
