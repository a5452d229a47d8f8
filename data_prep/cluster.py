"""Where the work runs: in this process, on a local Dask cluster, on a running scheduler, or on SLURM jobs.

All four give the same results: a task is a function of its arguments and the shared work folder, and what the results
are used for does not depend on the order in which they come.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from momo.errors import ConfigError, DataError
from momo.extras import require
from momo.machine import usable_cores
from momo.version import __version__

from .config import PrepConfig

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")
_CONNECT_SECONDS = 20
_JOB_SECONDS = 3600
_ASK_SECONDS = 5.0


class Workers(Protocol):
    """Runs a function over items."""

    description: str

    def run(self, function: Callable[[ItemT], ResultT], items: Sequence[ItemT]) -> Iterator[tuple[int, Any]]:
        """Yields (position of the item, result) as they come; a lost worker gives a `DataError` as the result."""
        ...


class _Here:
    """Runs everything in this process."""

    description = "in this process"

    def run(self, function: Callable[[ItemT], ResultT], items: Sequence[ItemT]) -> Iterator[tuple[int, Any]]:
        for position, item in enumerate(items):
            yield position, function(item)


class _Dask:
    """Runs on the workers of a Dask client."""

    def __init__(self, client: Any, description: str) -> None:
        self._client, self.description = client, description
        self._asked, self._threads = -math.inf, 1

    def run(self, function: Callable[[ItemT], ResultT], items: Sequence[ItemT]) -> Iterator[tuple[int, Any]]:
        lost: list[int] = []
        for position, result in self._run(function, list(enumerate(items)), self._slots()):
            if isinstance(result, _Lost):
                lost.append(position)
            else:
                yield position, result
        # Whoever ran in the process that died counts as lost, so each is tried once more, alone.
        for position in lost:
            for _, result in self._run(function, [(position, items[position])], 1):
                yield position, _died(result) if isinstance(result, _Lost) else result

    def _slots(self) -> int:
        """Returns the threads of all workers; asked anew now and then, since SLURM jobs come one by one."""
        if time.monotonic() - self._asked > _ASK_SECONDS:
            self._asked, self._threads = time.monotonic(), max(1, sum(self._client.nthreads().values()))
        return self._threads

    def _run(
        self, function: Callable[[ItemT], ResultT], items: Sequence[tuple[int, ItemT]], ahead: int
    ) -> Iterator[tuple[int, Any]]:
        """Keeps as many tasks submitted as there are slots, so that none waits on a worker that may die."""
        distributed = require("distributed", "prep")
        waiting = iter(items)
        running: dict[Any, int] = {}

        def submit(position: int, item: ItemT) -> Any:
            future = self._client.submit(function, item, pure=False, key=f"momo-{position}-{uuid.uuid4().hex}")
            running[future] = position
            return future

        finished = distributed.as_completed([submit(*pair) for pair in itertools.islice(waiting, ahead)])
        for future in finished:
            position = running.pop(future)
            try:
                result: Any = future.result()
            except distributed.scheduler.KilledWorker as error:
                result = _Lost(" ".join(str(error).split()))
            future.release()
            for pair in itertools.islice(waiting, max(1, self._slots() - len(running))):
                finished.add(submit(*pair))
            yield position, result


@dataclass(frozen=True)
class _Lost:
    """The result of a task whose workers died."""

    reason: str


def _died(lost: _Lost) -> DataError:
    return DataError(
        "its worker died each time",
        seen=lost.reason[:300],
        rule="a product needs less memory than a worker has, and does not crash GDAL",
        fix="run it alone with workers=1 to see the crash, or give workers more memory",
    )


@contextlib.contextmanager
def open_workers(config: PrepConfig, tasks: int, shared: Path) -> Iterator[Workers]:
    """Opens the workers that the configuration names.

    Args:
        config: Settings; `workers`, `scheduler` and `slurm` count.
        tasks: Number of products: more local workers than that are not started.
        shared: Folder that every worker must see.

    Raises:
        ConfigError: The scheduler cannot be reached, has no worker, its workers have another momo, or do not see the
            folder.
    """
    if config.scheduler is not None:
        with _connect(config.scheduler) as client:
            yield _checked(client, f"scheduler {config.scheduler}", shared)
        return
    if config.slurm.jobs:
        with _slurm(config) as client:
            yield _checked(client, f"{config.slurm.jobs} SLURM {'job' if config.slurm.jobs == 1 else 'jobs'}", shared)
        return
    count = min(config.workers or usable_cores(), max(1, tasks))
    if count == 1:
        yield _Here()
        return
    with _local(count) as client:
        yield _Dask(client, f"{count} local workers")


@contextlib.contextmanager
def _local(count: int) -> Iterator[Any]:
    distributed, dask = require("distributed", "prep"), require("dask", "prep")
    # Workers that are stopped while a connection is open would print tracebacks that mean nothing.
    quiet = {"distributed.logging.distributed": "critical", "distributed.worker.memory.terminate": 0.95}
    with (
        dask.config.set(quiet),
        distributed.LocalCluster(
            n_workers=count, threads_per_worker=1, processes=True, dashboard_address="127.0.0.1:0",
            silence_logs=logging.CRITICAL,
        ) as cluster,
        distributed.Client(cluster) as client,
    ):  # fmt: skip
        yield client


@contextlib.contextmanager
def _connect(address: str) -> Iterator[Any]:
    distributed = require("distributed", "prep")
    try:
        client = distributed.Client(address, timeout=_CONNECT_SECONDS)
    except (OSError, ValueError) as error:
        raise ConfigError(
            "the scheduler cannot be reached",
            seen=f"{address}: {' '.join(str(error).split())[:200]}",
            rule="the address of a running scheduler, for example tcp://node1:8786",
            fix="start one with: dask scheduler; and workers with: dask worker ADDRESS --nthreads 1",
        ) from None
    with client:
        yield client


@contextlib.contextmanager
def _slurm(config: PrepConfig) -> Iterator[Any]:
    distributed, jobqueue = require("distributed", "prep"), require("dask_jobqueue", "slurm")
    slurm = config.slurm
    if shutil.which("sbatch") is None:
        raise _no_slurm("there is no sbatch on the path")
    try:
        cluster = jobqueue.SLURMCluster(
            cores=slurm.cores, processes=slurm.cores, memory=slurm.memory, walltime=slurm.walltime, queue=slurm.queue,
            account=slurm.account, job_script_prologue=list(slurm.prologue), job_name="momo-prep",
        )  # fmt: skip
        cluster.scale(jobs=slurm.jobs)
    except (OSError, RuntimeError, ValueError) as error:
        raise _no_slurm(" ".join(str(error).split())[:300]) from None
    with cluster, distributed.Client(cluster) as client:
        client.wait_for_workers(1, timeout=_JOB_SECONDS)
        yield client


def _no_slurm(reason: str) -> ConfigError:
    return ConfigError(
        "SLURM jobs cannot be submitted",
        seen=reason,
        rule="sbatch is on the path and takes the job",
        fix="run on a login node, or start workers by hand and give scheduler=tcp://...",
    )


def _checked(client: Any, description: str, shared: Path) -> _Dask:
    workers = client.nthreads()
    if not workers:
        raise ConfigError(
            "the scheduler has no worker", seen=description, fix="start some with: dask worker ADDRESS --nthreads 1"
        )
    versions = client.run(_version)
    if others := {address: found for address, found in versions.items() if found != __version__}:
        address, found = next(iter(sorted(others.items())))
        raise ConfigError(
            "a worker has another momo", seen=f"{address}: {found}", rule=f"the same on all: {__version__}"
        )
    shared.mkdir(parents=True, exist_ok=True)
    probe = shared / f".probe-{uuid.uuid4().hex}"
    probe.touch()
    try:
        seen = client.run(_sees, str(probe.resolve()))
    finally:
        probe.unlink()
    if blind := sorted(address for address, sees in seen.items() if not sees):
        raise ConfigError(
            "a worker does not see the work folder",
            seen=f"{blind[0]} (and {len(blind) - 1} more): {shared}",
            rule="products, work folder and output lie on a file system that every worker shares",
            fix="set `work` and `out` to such folders",
        )
    return _Dask(client, f"{description}, {len(workers)} {'worker' if len(workers) == 1 else 'workers'}")


def _version() -> str:
    return __version__


def _sees(path: str) -> bool:
    return Path(path).exists()
