"""What ranks tell each other beside gradients: stop signals, decisions and errors."""

from __future__ import annotations

import contextlib
import datetime
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from ..errors import LostRankError, MomoError

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
        # A rank is started with Ctrl-C held back; one that came meanwhile arrives now.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
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


def collective_timeout(timeout_s: float) -> datetime.timedelta:
    """Returns how long a collective waits for silent ranks: the watchdog, which knows them, has to speak before."""
    return datetime.timedelta(seconds=timeout_s + max(timeout_s, 60.0))


class Control:
    """Agreement between the ranks on the CPU, so that no device has to be waited for.

    Args:
        rank: This rank.
        ranks: Number of ranks.
        timeout_s: Seconds after which the watchdog counts a silent rank as lost.
    """

    def __init__(self, rank: int, ranks: int, timeout_s: float) -> None:
        self.rank, self.ranks = rank, ranks
        self._group = None
        if ranks > 1:
            self._group = dist.new_group(backend="gloo", timeout=collective_timeout(timeout_s))

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


def lost_rank(error: RuntimeError, where: str) -> LostRankError | None:
    """Returns the message for a collective that failed because a rank is gone, or None when it is another error."""
    text = str(error).splitlines()[0] if str(error) else ""
    if not any(word in text.lower() for word in _LOST):
        return None
    return LostRankError(
        "the connection to another rank was lost",
        seen=f"{where}: {text[:200]}",
        rule="all ranks run to the end",
        fix="look at what the other ranks printed last; start again with the same command: the run continues from its "
        "last state",
    )
