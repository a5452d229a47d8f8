"""Checks a finished corpus to the last pixel: every hash, every member of every shard, every row of the index."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import time
from collections.abc import Callable, Generator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from momo.config import option, positive
from momo.corpus import read_manifest
from momo.corpus_format import SPLITS, Manifest, ShardEntry
from momo.errors import DataError
from momo.extras import require
from momo.files import sha256_file

from .statistics import PixelStatistics
from .verify_members import DamagedMember, Sample, SampleFormat, check_sample, one_line, walk_samples
from .verify_tables import (
    CHECKED_COLUMNS,
    Problem,
    index_problems,
    manifest_problems,
    open_table,
    statistics_problems,
    table_problems,
)

MAX_LISTED = 100


@dataclass(kw_only=True)
class VerifyConfig:
    """What `momo prep verify` needs."""

    corpus: str = option(help="corpus folder to check")
    all: bool = option(False, f"list every bad member (at most {MAX_LISTED}) instead of stopping at the first")
    workers: int = option(1, "processes, each checking one shard at a time; the result is the same for any number")

    def __post_init__(self) -> None:
        positive(workers=self.workers)


@dataclass(frozen=True)
class _Task:
    """What a process needs to check one shard."""

    folder: Path
    shard: ShardEntry
    format: SampleFormat
    row_groups: tuple[int, ...]
    stop_at_first: bool


@dataclass
class _ShardResult:
    """What was found in one shard; the pixel statistics are those of its training tiles, one entry a tile."""

    samples: int = 0
    bytes: int = 0
    problems: list[Problem] = field(default_factory=list)
    unlisted: int = 0
    count: list[int] = field(default_factory=list)
    mean: list[float] = field(default_factory=list)
    std: list[float] = field(default_factory=list)
    low: float = np.inf
    high: float = -np.inf

    def add(self, problem: Problem) -> None:
        """Notes a problem; beyond `MAX_LISTED` only their number."""
        if len(self.problems) < MAX_LISTED:
            self.problems.append(problem)
        else:
            self.unlisted += 1


def verify(config: VerifyConfig, report: Callable[[str], None] = print) -> Path:
    """Checks every hash of a corpus, decodes every tile and mask, and compares them with the index and the statistics.

    Args:
        config: Settings; see `VerifyConfig`.
        report: Gets the totals.

    Returns:
        The corpus folder.

    Raises:
        DataError: The folder is no corpus, or something in it is damaged; the message names the first bad member, or
            with `all` every one.
    """
    started = time.perf_counter()
    folder = Path(config.corpus)
    manifest = read_manifest(folder)
    total = _ShardResult()
    statistics = PixelStatistics()
    with contextlib.closing(_checks(folder, manifest, config, statistics)) as checks:
        for found in checks:
            for problem in found.problems:
                total.add(problem)
            total.unlisted += found.unlisted
            total.samples, total.bytes = total.samples + found.samples, total.bytes + found.bytes
            if total.problems and not config.all:
                break
    if total.problems:
        raise _damaged(folder, total, listed=config.all)
    seconds = time.perf_counter() - started
    counts = ", ".join(f"{split} {manifest.splits.get(split, 0)}" for split in SPLITS)
    report(
        f"{folder}: {manifest.sensor}, {total.samples} tiles ({counts}) in {len(manifest.shards)} shards decoded, "
        f"{total.bytes / 1e6:.1f} MB; {seconds:.1f} s, {total.samples / seconds:.0f} tiles/s"
    )
    report(
        "every hash, member, index row and the statistics agree; "
        f"mean {statistics.mean:.6g}, std {np.sqrt(statistics.squares / max(1, statistics.count)):.6g}"
    )
    return folder


def _damaged(folder: Path, total: _ShardResult, *, listed: bool) -> DataError:
    number = len(total.problems) + total.unlisted
    lines = [f"{problem.place}: {problem.what}" for problem in total.problems]
    if listed and number > 1:
        more = [f"and {total.unlisted} more"] if total.unlisted else []
        seen = f"{folder}, {number} problems\n  " + "\n  ".join([*lines, *more]) + "\n"
    else:
        seen = f"{folder}, {lines[0]}"
    return DataError(
        "the corpus is damaged",
        seen=seen,
        rule="every file is what manifest and index say",
        fix="copy the named file again, or run momo prep again" + ("" if listed else "; all=true lists every problem"),
    )


def _checks(
    folder: Path, manifest: Manifest, config: VerifyConfig, statistics: PixelStatistics
) -> Generator[_ShardResult, None, None]:
    """Yields what each check found, in a fixed order: tables, shards in the manifest's order, statistics."""
    tables = _ShardResult(problems=[*manifest_problems(folder, manifest), *table_problems(folder, manifest)])
    yield tables
    groups, problems = index_problems(folder, manifest)
    yield _ShardResult(problems=problems)
    form = SampleFormat(manifest.sensor, manifest.tile_size, manifest.dtype, manifest.codec)
    tasks = [_Task(folder, shard, form, tuple(groups.get(shard.name, ())), not config.all) for shard in manifest.shards]
    whole = True
    samples = sum(shard.samples for shard in manifest.shards)
    bar = require("tqdm", "prep").tqdm(total=samples, unit=" tiles", disable=None)
    with bar, contextlib.closing(_in_processes(tasks, config.workers)) as results:
        for result in results:
            bar.update(result.samples)
            whole = whole and not result.problems
            if result.count:
                arrays = np.array(result.count), np.array(result.mean), np.array(result.std)
                statistics.add(*arrays, result.low, result.high)
            yield result
    if whole and not tables.problems:
        yield _ShardResult(problems=statistics_problems(folder, statistics))


def _in_processes(tasks: list[_Task], workers: int) -> Generator[_ShardResult, None, None]:
    workers = min(workers, len(tasks))
    if workers <= 1:
        _index_group.cache_clear()
        yield from map(_check_shard, tasks)
        return
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    try:
        yield from pool.map(_check_shard, tasks)
    except BrokenProcessPool as error:
        raise DataError("a checking process died", seen=error, fix="is memory short? Try workers=1") from error
    finally:
        pool.shutdown(cancel_futures=True)


@functools.lru_cache(maxsize=4)  # neighbouring shards have their rows in the same groups
def _index_group(path: Path, number: int) -> Any:
    return open_table(path).read_row_group(number, columns=CHECKED_COLUMNS)


def _rows_of(task: _Task) -> list[dict[str, Any]]:
    """Returns the index rows of a shard, by offset."""
    compute = require("pyarrow.compute", "prep")
    rows: list[dict[str, Any]] = []
    for number in task.row_groups:
        table = _index_group(task.folder / "index.parquet", number)
        rows += table.filter(compute.equal(table["shard"], task.shard.name)).to_pylist()
    if any(row[name] is None for row in rows for name in ("key", "offset", "nbytes", "scale", "offset_value")):
        raise ValueError(f"a row of {task.shard.name} lacks key, offset, nbytes, scale or offset_value")
    return sorted(rows, key=lambda row: (row["offset"], row["key"]))


def _check_shard(task: _Task) -> _ShardResult:
    """Checks one shard: its members in order, then its size and hash."""
    path, shard, result = task.folder / "shards" / task.shard.name, task.shard, _ShardResult()
    if not path.is_file():
        result.add(Problem(f"shards/{shard.name}", "the shard is missing"))
        return result
    try:
        rows = _rows_of(task)
    except (OSError, ValueError) as error:
        result.add(Problem("index.parquet", f"it cannot be read: {one_line(error)}"))
        return result
    _walk_shard(path, task, rows, result)
    if result.problems and task.stop_at_first:
        return result
    result.bytes = path.stat().st_size
    if result.bytes != shard.bytes:
        result.add(Problem(f"shards/{shard.name}", f"{result.bytes} bytes, the manifest says {shard.bytes}"))
    elif (found := sha256_file(path)) != shard.sha256:
        said = f"sha256 {found[:12]}..., the manifest says {shard.sha256[:12]}..."
        result.add(Problem(f"shards/{shard.name}", f"it was altered: {said}"))
    if not result.problems and result.samples != shard.samples:
        said = f"{result.samples} samples, the manifest says {shard.samples}"
        result.add(Problem(f"shards/{shard.name}", said))
    return result


def _walk_shard(path: Path, task: _Task, rows: list[dict[str, Any]], result: _ShardResult) -> None:
    """Checks the samples one after another; behind damage it goes on where the index says the next one begins."""
    open_rows = {row["key"]: row for row in rows}
    seen: set[str] = set()
    start: int | None = 0
    size = path.stat().st_size
    with open(path, "rb") as stream:
        while start is not None:
            try:
                for sample in walk_samples(stream, start, task.format):
                    _check_one(sample, task, open_rows, seen, result)
                    if result.problems and task.stop_at_first:
                        return
                break
            except DamagedMember as damage:
                result.add(Problem(f"{task.shard.name}, {damage.member} at byte {damage.offset}", damage.what))
                if task.stop_at_first:
                    return
                for row in rows:
                    if row["offset"] <= damage.offset < row["offset"] + row["nbytes"]:
                        open_rows.pop(row["key"], None)
                start = next((row["offset"] for row in rows if damage.offset < row["offset"] < size), None)
    for row in rows:
        if row["key"] in open_rows:
            place = f"{task.shard.name}, sample {row['key']} at byte {row['offset']}"
            result.add(Problem(place, "the index has it, the shard does not"))
            if task.stop_at_first:
                return


def _check_one(sample: Sample, task: _Task, open_rows: dict[str, Any], seen: set[str], result: _ShardResult) -> None:
    result.samples += 1
    if sample.key in seen:
        place = f"{task.shard.name}, sample {sample.key} at byte {sample.offset}"
        result.add(Problem(place, "the shard holds it twice"))
        return
    seen.add(sample.key)
    row = open_rows.pop(sample.key, None)
    try:
        if row is not None and row["split"] != task.shard.split:
            what = f"the index says {row['split']}, the shard is {task.shard.split}"
            raise DamagedMember(f"sample {sample.key}", sample.offset, what)
        pixels = check_sample(sample, row, task.format)
    except DamagedMember as damage:
        result.add(Problem(f"{task.shard.name}, {damage.member} at byte {damage.offset}", damage.what))
        return
    if row is not None and row["split"] == "train" and pixels.count:
        result.count.append(pixels.count)
        result.mean.append(pixels.mean)
        result.std.append(pixels.std)
        result.low, result.high = min(result.low, pixels.low), max(result.high, pixels.high)
