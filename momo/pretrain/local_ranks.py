"""Ranks as processes of this machine: started together, told to stop together, their errors raised once."""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing.connection
import multiprocessing.resource_tracker
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch.multiprocessing

from .. import errors
from ..errors import LostRankError, MomoError
from ..files import write_json
from .control import STOP_SIGNALS

# When one rank fails the others may sit in a collective and not hear SIGTERM.
_GRACE_S = 5

RankMain = Callable[[int, int, str, dict[str, Any]], Any]


def run_ranks(main: RankMain, ranks: int, fields: dict[str, Any]) -> list[int]:
    """Runs ranks as processes of this machine until all have ended.

    Args:
        main: What a rank does; gets rank, ranks, the rendezvous file and `fields`. It leaves its error with `tell`, in
            the folder of that file.
        ranks: Number of ranks.
        fields: The configuration.

    Returns:
        The signals to stop that came; the ranks have been told of them.

    Raises:
        MomoError: A rank told an error, or died.
        KeyboardInterrupt: Ctrl-C came a second time.
    """
    # What it says of ending ranks is told below, once.
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
    stop = _StopSignals()
    killed: dict[int, int] = {}
    with tempfile.TemporaryDirectory() as folder, stop.listening():
        with stop.held_back():
            context = torch.multiprocessing.start_processes(
                main, args=(ranks, str(Path(folder) / "store"), fields), nprocs=ranks, join=False, start_method="spawn"
            )
        stop.pass_on_to(context.processes)
        try:
            while context.sentinels:
                ended = multiprocessing.connection.wait(context.sentinels)
                # Who died of a signal is seen before the others are ended by one.
                for sentinel in ended:
                    context.processes[context.sentinels[sentinel]].join()
                killed = killed or _killed(context.processes)
                context.join(grace_period=_GRACE_S)
        except (torch.multiprocessing.ProcessExitedException, torch.multiprocessing.ProcessRaisedException) as error:
            cause = _cause(error, killed, _told(Path(folder)), stopping=bool(stop.received))
            if cause is not None:
                raise cause from None
    return stop.received


def _cause(error: Exception, killed: dict[int, int], told: MomoError | None, *, stopping: bool) -> Exception | None:
    """Returns what ended the ranks, None when it was the signal to stop. A lost connection is a consequence."""
    if told is not None and not isinstance(told, LostRankError):
        return told
    if isinstance(error, torch.multiprocessing.ProcessRaisedException):
        return error
    if killed:
        if stopping and {signal.SIGTERM, signal.SIGINT}.issuperset(killed.values()):
            return None  # it came while a rank was still starting and had nothing to save
        return _died(", ".join(f"rank {rank}, {_name(number)}" for rank, number in sorted(killed.items())))
    if told is not None:
        return told
    assert isinstance(error, torch.multiprocessing.ProcessExitedException)
    return _died(f"rank {error.error_index}, exit code {error.exit_code}")


def _died(who: str) -> MomoError:
    return MomoError(
        "a training process died",
        seen=who,
        rule="all ranks run to the end",
        fix="start again with the same command: the run continues from its last state",
    )


def _killed(processes: Sequence[Any]) -> dict[int, int]:
    """Returns rank -> signal of the ranks that died of one."""
    codes = {rank: process.exitcode for rank, process in enumerate(processes)}
    return {rank: -code for rank, code in codes.items() if code is not None and code < 0}


def _name(number: int) -> str:
    # Linux's out-of-memory killer sends SIGKILL, and says so only in the kernel's log.
    memory = " (the machine may be out of memory)" if number == signal.SIGKILL else ""
    known = {member.value: member.name for member in signal.Signals}
    return f"{known.get(number, f'signal {number}')}{memory}"


class _StopSignals:
    """Passes signals to stop on to the ranks, which save their state and end; a second Ctrl-C kills them.

    Attributes:
        received: The signals that came.
    """

    def __init__(self) -> None:
        self.received: list[int] = []
        self._processes: Sequence[Any] = []
        self._active = threading.current_thread() is threading.main_thread()

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Takes the signals while the block runs; outside the main thread nothing is taken."""
        if not self._active:
            yield
            return
        before = {number: signal.signal(number, self._receive) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def held_back(self) -> Iterator[None]:
        """Ctrl-C waits until the block is over, in processes started in it until they listen for it.

        It would end their imports with a traceback each.
        """
        if not self._active:
            yield
            return
        # The tracker unblocks signals when it starts, so it has to be there before.
        multiprocessing.resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})

    def pass_on_to(self, processes: Sequence[Any]) -> None:
        """Passes on what comes from now on, and what came already."""
        self._processes = processes
        if self.received:
            self._stop_ranks()

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and number in self.received:
            for process in self._processes:
                process.kill()
            raise KeyboardInterrupt
        self.received.append(number)
        self._stop_ranks()

    def _stop_ranks(self) -> None:
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGTERM)


def tell(error: MomoError, store: Path, rank: int) -> None:
    """Leaves an error of a rank for the launching process, which raises it once."""
    seen = None if error.seen is None else str(error.seen)
    fields = {"kind": type(error).__name__, "what": error.what, "seen": seen, "rule": error.rule, "fix": error.fix}
    write_json(store.parent / f"error-{rank:05d}.json", fields)


def _told(folder: Path) -> MomoError | None:
    """Returns what the first rank told that is more than the loss of another rank, else the first of those."""
    found: list[MomoError] = []
    for path in sorted(folder.glob("error-*.json")):
        fields = json.loads(path.read_text(encoding="utf-8"))
        found.append(getattr(errors, fields.pop("kind"))(fields.pop("what"), **fields))
    return min(found, key=lambda error: isinstance(error, LostRankError), default=None)
