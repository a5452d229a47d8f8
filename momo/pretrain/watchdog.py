"""Notices a run that hangs, and says which rank is to blame."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from ..errors import MomoError


class Watchdog:
    """Notices when this rank makes no progress, and says which rank is to blame.

    A collective waits for all ranks, so one that hangs stops the others without a word. Every rank publishes what it is
    doing; the first that has waited too long tells what it knows of the others. One thread talks with the store and
    another watches the clock: a store kept by a rank that hangs does not answer either.

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
        self._pause = min(5.0, timeout_s / 8)
        self._phase, self._samples, self._moment = "starting", 0, time.monotonic()
        self._count, self._answered = 0, self._moment
        self._over = threading.Event()
        # Rank -> (what it published last, when this rank first saw that).
        self._heard: dict[int, tuple[dict[str, Any], float]] = {}
        self._threads = [
            threading.Thread(target=work, name=f"momo-watchdog-{work.__name__.strip('_')}", daemon=True)
            for work in (self._talk, self._watch)
        ]

    def __enter__(self) -> Watchdog:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(timeout=5)

    def beat(self, phase: str, samples: int) -> None:
        """Says what this rank does now."""
        self._phase, self._samples, self._moment = phase, samples, time.monotonic()

    def _talk(self) -> None:
        while not self._over.wait(self._pause):
            try:
                self._publish()
                self._listen()
                self._answered = time.monotonic()
            except RuntimeError:
                # The store lives in rank 0, which may be gone: nothing new is heard then, which the verdict tells.
                pass

    def _watch(self) -> None:
        while not self._over.wait(self._pause):
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
        now, heard = time.monotonic(), dict(self._heard)
        lines, silent = [], []
        for rank in range(self._ranks):
            if rank == self._rank:
                lines.append(f"rank {rank} in '{self._phase}' at {self._samples:,} samples")
            elif rank not in heard:
                lines.append(f"rank {rank} was never heard of")
                silent.append(rank)
            else:
                news, moment = heard[rank]
                quiet = now - moment
                lines.append(
                    f"rank {rank} in '{news['phase']}' at {news['samples']:,} samples, heard {quiet:.0f} s ago"
                )
                if quiet > self._timeout / 2:
                    silent.append(rank)
        blamed = f"; silent: rank {', '.join(map(str, silent))}" if silent else ""
        if now - self._answered > self._timeout / 2:
            blamed += " (the ranks' common store does not answer; under a launcher rank 0 keeps it)"
        return MomoError(
            "no progress",
            seen=f"for {waited:.0f} s: {'; '.join(lines)}{blamed}",
            rule=f"a rank does something every timeout_s={self._timeout:g} seconds",
            fix="look at the silent or slowest rank's machine, disk and network, or raise timeout_s; start again with "
            "the same command: the run continues from its last state",
        )
