"""Copies of a run's checkpoints in a folder or bucket, made in the background while training goes on.

<destination>/<run name>/ has the layout of a RUN (`momo.runs`), so that a copy of it can be merged or continued. The
card of a checkpoint is copied last: what has a card is whole there too. A failed copy is reported, never raised.
"""

from __future__ import annotations

import contextlib
import io
import json
import threading
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import ConfigError
from ..runs import CONFIG_NAME, METRICS_NAME
from ..weights import CARD_NAME, TENSORS_NAME
from .remote import Gone, Remote, Stopped, one_line

_SUMMARY_NAME = "summary.json"
_ENGINE = "engine"


@dataclass(frozen=True)
class _Job:
    """A checkpoint and the files of its engine when it was queued, before the run's retention can remove them."""

    folder: Path
    engine: list[Path]


class Uploader:
    """Copies checkpoints one after another in a thread of its own; use it on the main rank only.

    Args:
        destination: Folder, or URL that fsspec knows (`s3://bucket/folder`, `memory://x`).
        run_name: Name of the folder made there, the last part of the run's `out`.
        with_engine: Copy the optimizer's state too, so that the run can go on from the copy.
        keep_engine: Newest complete copies that keep that state; it is removed from older ones.
        attempts: How often a file is tried before its checkpoint counts as failed.
        pause_s: Seconds before the second attempt; doubled each time, at most 60.

    Raises:
        ConfigError: The destination's kind is unknown or needs a package that is not installed.
    """

    def __init__(
        self,
        destination: str,
        run_name: str,
        *,
        with_engine: bool,
        keep_engine: int = 1,
        attempts: int = 5,
        pause_s: float = 2.0,
    ) -> None:
        if not run_name or run_name in (".", "..") or "/" in run_name or "\\" in run_name:
            raise ConfigError("the run has no name to upload under", seen=repr(run_name), rule="one folder name")
        self.destination = destination
        self._remote = Remote(destination, run_name, attempts=attempts, pause_s=pause_s)
        self._with_engine, self._keep_engine = with_engine, keep_engine
        self._wake = threading.Condition()
        self._jobs: deque[_Job] = deque()
        self._failed: list[_Job] = []
        self._newest: deque[str] = deque(maxlen=keep_engine)
        self._events: list[dict[str, Any]] = []
        self._closing = False
        self._thread: threading.Thread | None = None
        self._active: _Job | None = None

    def check(self, run: Path | None = None, *, timeout_s: float = 60.0) -> None:
        """Writes and removes a small file at the destination.

        Args:
            run: RUN folder; when it holds no checkpoint yet, the destination must not hold one either.
            timeout_s: How long the destination may take.

        Raises:
            ConfigError: It cannot be written, does not answer, is the run itself, or holds another run's checkpoints.
        """
        if run is not None and self._remote.local and Path(self._remote.root).resolve() == Path(run).resolve():
            raise ConfigError(
                "the run would be copied onto itself",
                seen=f"checkpoint.upload={self.destination}",
                rule="copies go to another folder or a bucket",
                fix="give another folder; the run's own name is added to it",
            )
        outcome: list[list[str] | BaseException] = []

        def probe() -> None:
            try:
                self._remote.probe()
                outcome.append(self._remote.glob(f"checkpoints/samples-*/{CARD_NAME}"))
            except BaseException as error:
                outcome.append(error)

        thread = threading.Thread(target=probe, name="upload-check", daemon=True)
        thread.start()
        thread.join(timeout_s)
        there = outcome[0] if outcome else TimeoutError(f"no answer within {timeout_s:g} s")
        if isinstance(there, BaseException):
            raise ConfigError(
                "the upload destination cannot be written",
                seen=f"checkpoint.upload={self.destination}: {one_line(there)}",
                rule="a small file was to be written and removed there, now rather than after hours of training",
                fix="check path, credentials and network, or leave checkpoint.upload out",
            ) from there
        if there and run is not None and not _cards(Path(run)):
            raise ConfigError(
                "the upload destination holds another run of this name",
                seen=f"{len(there)} checkpoint(s) in {self._remote.root}, none in {run}",
                rule="a new run never overwrites the copies of an old one",
                fix="copy that folder back to continue it, or choose another `out` or checkpoint.upload",
            )

    def submit(self, checkpoint: Path) -> None:
        """Queues one complete checkpoint (RUN/checkpoints/samples-...); returns at once."""
        folder = Path(checkpoint)
        engine = sorted(p.relative_to(folder) for p in (folder / _ENGINE).rglob("*") if p.is_file())
        with self._wake:
            self._jobs.append(_Job(folder, engine))
            if folder.name not in self._newest:
                self._newest.append(folder.name)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="upload", daemon=True)
                self._thread.start()
            self._wake.notify_all()

    def catch_up(self, run: Path) -> None:
        """Queues every complete checkpoint of a run, for a start after a kill; those that are there are left alone."""
        for card in _cards(run):
            self.submit(card.parent)

    def poll(self) -> list[dict[str, Any]]:
        """Returns what happened since the last call, never blocking.

        Returns:
            One dictionary an event: `kind` (`uploaded` or `upload_failed`), `checkpoint` (folder name), `seconds`,
            `reason` (empty when all went well), `bytes`, and `engine` (True when the copy can be resumed from).
        """
        with self._wake:
            events, self._events = self._events, []
        return events

    def close(self, timeout: float) -> list[dict[str, Any]]:
        """Waits for what is left, copies the final metrics and ends the thread.

        Args:
            timeout: Seconds to wait; what is not copied by then is reported as failed.

        Returns:
            The events since the last `poll`.
        """
        if self._thread is not None:
            with self._wake:
                self._closing = True
                self._wake.notify_all()
            self._thread.join(timeout)
            if self._thread.is_alive():
                self._remote.stop.set()
                self._thread.join(min(1.0, timeout))
                with self._wake:
                    left = ([self._active] if self._active is not None else []) + list(self._jobs)
                    self._jobs.clear()
                    self._active = None
                for job in left:
                    self._report("upload_failed", job, 0.0, f"not finished {timeout:g} s after the run's end")
        return self.poll()

    def _work(self) -> None:
        run: Path | None = None
        while True:
            with self._wake:
                while not self._jobs and not self._closing:
                    self._wake.wait()
                if not self._jobs or self._remote.stop.is_set():
                    break
                self._active = job = self._jobs.popleft()
            run = job.folder.parent.parent
            begin = time.monotonic()
            try:
                size, engine, reason = self._copy_checkpoint(job)
            except Stopped:
                return
            except Gone as error:
                self._finish("upload_failed", job, begin, str(error))
            except Exception as error:  # whatever a remote file system raises must not end training
                self._failed.append(job)
                self._finish("upload_failed", job, begin, one_line(error))
            else:
                if size:
                    self._finish("uploaded", job, begin, reason, size, engine)
                # The destination answers again, so the ones that failed before are worth another try.
                with self._wake:
                    self._active = None
                    self._jobs.extendleft(reversed(self._failed))
                    self._failed = []
        if run is not None and not self._remote.stop.is_set():
            with contextlib.suppress(Exception):  # the checkpoints are safe; these lines are also in the run
                self._copy_logs(run)

    def _finish(self, kind: str, job: _Job, begin: float, reason: str, size: int = 0, engine: bool = False) -> None:
        with self._wake:
            if self._active is None:
                return  # `close` has given it up and reported it
            self._active = None
        self._report(kind, job, time.monotonic() - begin, reason, size, engine)

    def _report(self, kind: str, job: _Job, seconds: float, reason: str, size: int = 0, engine: bool = False) -> None:
        event = {"kind": kind, "checkpoint": job.folder.name, "seconds": round(seconds, 3), "reason": reason}
        with self._wake:
            self._events.append(event | {"bytes": size, "engine": engine})

    def _copy_checkpoint(self, job: _Job) -> tuple[int, bool, str]:
        """Copies one checkpoint; returns its bytes (0: it was there), whether its engine went along, and a remark."""
        folder = job.folder
        card = _read(folder / CARD_NAME)
        place = f"checkpoints/{folder.name}"
        wanted = self._with_engine and folder.name in self._newest and bool(job.engine)
        there = self._remote.read(f"{place}/{CARD_NAME}")
        if there == card and (not wanted or self._remote.exists(f"{place}/{_ENGINE}")):
            return 0, wanted, ""
        if there is not None:
            # Without its card an old copy that is being replaced counts as incomplete.
            self._remote.remove(f"{place}/{CARD_NAME}")
        self._copy_logs(folder.parent.parent)
        size = self._copy_file(folder / TENSORS_NAME, f"{place}/{TENSORS_NAME}", sha256=json.loads(card)["sha256"])
        for path in _files(folder):
            if path.name not in (CARD_NAME, TENSORS_NAME):
                size += self._copy_file(path, f"{place}/{path.name}")
        self._remote.remove(f"{place}/{_ENGINE}")
        engine = self._copy_engine(job, place) if wanted else 0
        size += engine + self._remote.write(f"{place}/{CARD_NAME}", lambda: io.BytesIO(card))
        if engine:
            self._drop_old_engines()
        lost = wanted and not engine
        return size, engine > 0, "the run removed the optimizer's state before it was copied" if lost else ""

    def _copy_engine(self, job: _Job, place: str) -> int:
        """Copies the engine's folder; returns its bytes, 0 when the run removed it meanwhile."""
        try:
            return sum(self._copy_file(job.folder / name, f"{place}/{name.as_posix()}") for name in job.engine)
        except Gone:
            self._remote.remove(f"{place}/{_ENGINE}")
            return 0

    def _drop_old_engines(self) -> None:
        """Removes the engine of all but the newest complete copies that have one; weights always stay."""
        complete = [name.rpartition("/")[0] for name in self._remote.glob(f"checkpoints/samples-*/{CARD_NAME}")]
        having = [place for place in complete if self._remote.exists(f"{place}/{_ENGINE}")]
        for place in having[: -self._keep_engine]:
            self._remote.remove(f"{place}/{_ENGINE}")

    def _copy_logs(self, run: Path) -> None:
        for name in (CONFIG_NAME, METRICS_NAME, _SUMMARY_NAME):
            with contextlib.suppress(Gone):
                text = _read(run / name)
                if name == METRICS_NAME:
                    text = text[: text.rfind(b"\n") + 1]  # training may be in the middle of a line
                self._remote.write(name, lambda text=text: io.BytesIO(text))  # type: ignore[misc]

    def _copy_file(self, path: Path, name: str, *, sha256: str | None = None) -> int:
        def opened() -> BinaryIO:
            try:
                return open(path, "rb")
            except (FileNotFoundError, NotADirectoryError):
                raise Gone(f"{path.name} is no longer in the run") from None

        return self._remote.write(name, opened, sha256=sha256)


def _cards(run: Path) -> list[Path]:
    return sorted((Path(run) / "checkpoints").glob(f"samples-*/{CARD_NAME}"))


def _files(folder: Path) -> list[Path]:
    try:
        return sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    except FileNotFoundError:
        raise Gone(f"{folder.name} is no longer in the run") from None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise Gone(f"{path.name} is no longer in the run") from None
