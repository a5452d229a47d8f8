"""What ranks tell each other beside gradients: stop signals, errors, and signs of life."""

from __future__ import annotations

import contextlib
import datetime
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from ..errors import MomoError

# SLURM sends SIGUSR1 ahead of the time limit when asked to (--signal=USR1@300), SIGTERM when it preempts.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

# How torch's back ends say that the other side is gone or silent.
_LOST = ("connection", "timed out", "timeout", "peer", "socket", "broken pipe", "nccl", "gloo")


class StopRequest:
    """Remembers a signal to stop until the step it came in is over; a second Ctrl-C interrupts at once.

    One Ctrl-C reaches a rank twice: from the terminal as SIGINT and from its launcher as SIGTERM, in either order.

    Attributes:
        name: The signal that came, SIGINT above the others; None when none has come.
    """

    def __init__(self) -> None:
        self.name: str | None = None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Takes the stop signals while the block runs; outside the main thread nothing is taken."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._receive) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if self.name != "SIGINT":
            self.name = signal.Signals(number).name
        elif number == signal.SIGINT:
            raise KeyboardInterrupt


class Control:
    """Agreement between the ranks on the CPU, so that no device has to be waited for.

    Args:
        rank: This rank.
        ranks: Number of ranks.
        timeout_s: Seconds after which a silent rank counts as lost.
    """

    def __init__(self, rank: int, ranks: int, timeout_s: float) -> None:
        self.rank, self.ranks = rank, ranks
        self._group = None
        if ranks > 1:
            self._group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout_s))

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Returns, flag by flag, whether it is up on any rank; all ranks call it."""
        if self._group is None:
            return flags
        raised = torch.tensor(flags, dtype=torch.uint8)
        dist.all_reduce(raised, dist.ReduceOp.MAX, group=self._group)
        return tuple(bool(flag) for flag in raised.tolist())

    def gather(self, value: Any) -> list[Any]:
        """Returns the values of all ranks, by rank."""
        if self._group is None:
            return [value]
        values: list[Any] = [None] * self.ranks
        dist.all_gather_object(values, value, group=self._group)
        return values

    def share(self, value: Any) -> Any:
        """Returns rank 0's value on every rank."""
        if self._group is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, 0, group=self._group)
        return box[0]

    def do_on_main(self, action: Callable[[], Any]) -> Any:
        """Runs an action on rank 0 while the others wait; all get its result, or raise its MomoError."""
        result, error = None, None
        if self.rank == 0:
            try:
                result = action()
            except MomoError as caught:
                error = caught
        result, error = self.share((result, error))
        if error is not None:
            raise error
        return result


def lost_rank(error: RuntimeError, where: str) -> MomoError | None:
    """Returns the message for a collective that failed because a rank is gone, or None when it is another error."""
    text = str(error).splitlines()[0] if str(error) else ""
    if not any(word in text.lower() for word in _LOST):
        return None
    return MomoError(
        "the connection to another rank was lost",
        seen=f"{where}: {text[:200]}",
        rule="all ranks run to the end",
        fix="look at what the other ranks printed last; start again with the same command: the run continues from its "
        "last state",
    )


class Watchdog:
    """Notices when this rank makes no progress, and says which rank is to blame.

    A collective waits for all ranks, so one that hangs stops the others without a word. Every rank publishes what it is
    doing; the first that has waited too long tells what it knows of the others.

    Args:
        store: Key-value store that all ranks reach.
        rank: This rank.
        ranks: Number of ranks.
        timeout_s: Seconds without `beat` after which the run is stopped.
        stop: Called with the error from the watching thread; it must end the process.
    """

    def __init__(
        self, store: dist.Store, rank: int, ranks: int, timeout_s: float, stop: Callable[[MomoError], None]
    ) -> None:
        self._store, self._rank, self._ranks, self._timeout, self._stop = store, rank, ranks, timeout_s, stop
        self._phase, self._samples, self._moment = "starting", 0, time.monotonic()
        self._count = 0
        self._over = threading.Event()
        # Rank -> (what it published last, when this rank first saw that).
        self._heard: dict[int, tuple[dict[str, Any], float]] = {}
        self._thread = threading.Thread(target=self._watch, name="momo-watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(timeout=5)

    def beat(self, phase: str, samples: int) -> None:
        """Says what this rank does now."""
        self._phase, self._samples, self._moment = phase, samples, time.monotonic()

    def _watch(self) -> None:
        while not self._over.wait(min(5.0, self._timeout / 8)):
            try:
                self._publish()
                self._listen()
            except RuntimeError:
                # The store lives in rank 0, which may be gone; the clock below still runs.
                pass
            waited = time.monotonic() - self._moment
            if waited > self._timeout:
                self._stop(self._verdict(waited))
                return

    def _publish(self) -> None:
        self._count += 1
        news = {"count": self._count, "phase": self._phase, "samples": self._samples}
        self._store.set(f"momo/beat/{self._rank}", json.dumps(news))

    def _listen(self) -> None:
        for rank in range(self._ranks):
            key = f"momo/beat/{rank}"
            if rank == self._rank or not self._store.check([key]):
                continue
            news = json.loads(self._store.get(key))
            if rank not in self._heard or self._heard[rank][0] != news:
                self._heard[rank] = (news, time.monotonic())

    def _verdict(self, waited: float) -> MomoError:
        now = time.monotonic()
        lines, silent = [], []
        for rank in range(self._ranks):
            if rank == self._rank:
                lines.append(f"rank {rank} in '{self._phase}' at {self._samples:,} samples")
            elif rank not in self._heard:
                lines.append(f"rank {rank} was never heard of")
                silent.append(rank)
            else:
                news, moment = self._heard[rank]
                quiet = now - moment
                lines.append(
                    f"rank {rank} in '{news['phase']}' at {news['samples']:,} samples, heard {quiet:.0f} s ago"
                )
                if quiet > self._timeout / 2:
                    silent.append(rank)
        blamed = f"; silent: rank {', '.join(map(str, silent))}" if silent else ""
        return MomoError(
            "no progress",
            seen=f"for {waited:.0f} s: {'; '.join(lines)}{blamed}",
            rule=f"a rank does something every timeout_s={self._timeout:g} seconds",
            fix="look at the silent or slowest rank's machine, disk and network, or raise timeout_s; start again with "
            "the same command: the run continues from its last state",
        )
