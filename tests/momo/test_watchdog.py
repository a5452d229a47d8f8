"""A run that hangs is noticed, and the silent rank is named."""

from __future__ import annotations

import datetime
import threading
import time
from pathlib import Path

import torch.distributed as dist
import torch.multiprocessing

from momo.errors import MomoError
from momo.pretrain.control import Control, collective_timeout
from momo.pretrain.watchdog import Watchdog


def watch(timeout_s: float, seconds: float, *, beats: bool, other: str | None) -> list[MomoError]:
    """Runs rank 0's watchdog beside a second rank that published `other` once."""
    store, told = dist.HashStore(), []
    if other is not None:
        store.set("momo/beat/1", other)
    with Watchdog(store, 0, 2, timeout_s, told.append) as dog:
        end = time.monotonic() + seconds
        dog.beat("agreement of the ranks", 128)
        while time.monotonic() < end and not told:
            time.sleep(0.05)
            if beats:
                dog.beat("forward and backward", 128)
    return told


def test_a_rank_that_goes_on_is_left_alone():
    assert watch(0.4, 1.2, beats=True, other=None) == []


def test_a_silent_rank_is_named():
    told = watch(0.6, 10, beats=False, other='{"count": 1, "phase": "waiting for data", "samples": 64}')
    assert len(told) == 1
    text = str(told[0])
    assert text.startswith("no progress: for ") and "rank 0 in 'agreement of the ranks' at 128 samples" in text
    assert "rank 1 in 'waiting for data' at 64 samples, heard" in text and "silent: rank 1." in text
    assert "timeout_s=0.6" in text


def test_a_rank_that_never_spoke_is_named():
    assert "rank 1 was never heard of; silent: rank 1" in str(watch(0.5, 10, beats=False, other=None)[0])


class BlockingStore:
    """Store whose keeper hangs once two calls have been answered."""

    def __init__(self) -> None:
        self.inner, self.calls, self.free = dist.HashStore(), 0, threading.Event()

    def set(self, key: str, value: str) -> None:
        self.calls += 1
        if self.calls > 2:
            self.free.wait(30)
        self.inner.set(key, value)

    def check(self, keys: list[str]) -> bool:
        return self.inner.check(keys)

    def get(self, key: str) -> bytes:
        return self.inner.get(key)


def test_a_store_that_does_not_answer_cannot_silence_the_watchdog():
    store, told = BlockingStore(), []
    store.inner.set("momo/beat/1", '{"count": 1, "phase": "optimizer step", "samples": 64}')
    dog = Watchdog(store, 0, 2, 0.8, told.append)
    with dog:
        deadline = time.monotonic() + 20
        while not told and time.monotonic() < deadline:
            time.sleep(0.05)
        store.free.set()
    assert "silent: rank 1 (the ranks' common store does not answer; under a launcher rank 0 keeps it)" in str(told[0])
    assert "rank 1 in 'optimizer step'" in str(told[0])


def _waiting(rank: int, ranks: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    done = Path(folder, "done")
    control = Control(rank, ranks, 1)

    def tell(error: MomoError) -> None:
        Path(folder, "told").write_text(str(error))
        done.touch()

    store = dist.distributed_c10d._get_default_store()
    control.any(True)
    if rank == 0:
        with Watchdog(store, rank, ranks, 1, tell):
            control.any(True)
    else:
        while not done.exists():
            time.sleep(0.05)
        control.any(True)
    dist.destroy_process_group()


def test_it_speaks_before_the_agreement_of_the_ranks_times_out(tmp_path):
    torch.multiprocessing.start_processes(_waiting, args=(2, str(tmp_path)), nprocs=2, start_method="spawn")
    assert "no progress: for" in (tmp_path / "told").read_text()
    assert "rank 1 was never heard of; silent: rank 1" in (tmp_path / "told").read_text()


def test_collectives_wait_for_longer_than_the_watchdog():
    for timeout_s in (0.5, 4, 1800):
        assert collective_timeout(timeout_s) >= datetime.timedelta(seconds=timeout_s + 60)
    assert collective_timeout(1800) == datetime.timedelta(hours=1)
