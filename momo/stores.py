"""Where the files of a corpus come from: a folder, any URL that fsspec knows, or a command that writes shards.

    LocalStore   a folder: positioned reads of open files
    UrlStore     s3://, gs://, https://, memory://, ...: byte ranges of a batch at once, with retries
                 (`momo.url_store`)
    PipeStore    a command of the user's for each shard (`momo.pipes`), kept in a bounded `ShardBuffer`

A server that ignores byte ranges is noticed when the corpus is opened, and read as a pipe is: whole shards, kept in the
same bounded buffer. What cannot be read is handed back as a `DataError` in the place of its bytes, so that the reader
decides what a damaged shard means; a shard that was given up is not tried again for some minutes, so that it costs its
retries once and not for each of its tiles.
"""

from __future__ import annotations

import os
import threading
import time
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from .corpus_format import ShardEntry
from .errors import DataError
from .pipes import Command, ShardBuffer

_OPEN_FILES = 256  # a process may often have 1024; a corpus of millions of tiles has more shards than that
_DEFAULT_BUFFER_MB = 4096

Bytes = bytes | memoryview


@dataclass(frozen=True)
class Patience:
    """How long a remote read is tried.

    Attributes:
        attempts: Tries before a read is given up, 1 or more.
        pause_s: Seconds before the second try; doubled before each further one.
        timeout_s: Seconds without an answer (of a command: without a byte) after which a try is given up.
    """

    attempts: int = 6
    pause_s: float = 0.5
    timeout_s: float = 60.0

    def pause(self, attempt: int) -> None:
        """Waits after the failed try number `attempt`, from 0; not after the last."""
        if attempt + 1 < self.attempts:
            time.sleep(self.pause_s * 2**attempt)


class Run(NamedTuple):
    """Bytes of a shard to be read at once."""

    shard: ShardEntry
    start: int
    nbytes: int


class Store(ABC):
    """The files of one corpus.

    Attributes:
        location: Folder or URL, for messages.
        streamed: Shards come whole, none in part.
        gap: Bytes between two wanted samples that are rather read along than left out.
        note: A line about how it is read that the user should see; empty when there is nothing to say.
    """

    location: str
    streamed = False
    gap = 0
    note = ""

    @abstractmethod
    def read_bytes(self, name: str) -> bytes:
        """Reads a file of the corpus that is no shard.

        Raises:
            FileNotFoundError: There is none.
            DataError: It cannot be read.
        """

    @abstractmethod
    def read(self, runs: Sequence[Run]) -> Iterator[Bytes | DataError]:
        """Yields the bytes of each run in order, or why there are none. Runs of one shard should follow one another."""

    @property
    def folder(self) -> Path | None:
        """The folder on this machine, None when there is none."""
        return None

    @property
    def shards_here(self) -> bool:
        """Shards lie in `folder`."""
        return False


class LocalStore(Store):
    """A folder on this machine.

    Args:
        folder: The corpus folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.location = str(folder)
        self._files: OrderedDict[str, _File] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def folder(self) -> Path:
        """The folder."""
        return self._folder

    @property
    def shards_here(self) -> bool:
        """True."""
        return True

    def read_bytes(self, name: str) -> bytes:
        """See `Store.read_bytes`."""
        try:
            return (self._folder / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise FileNotFoundError(name) from None
        except OSError as error:
            raise _unreadable(self._folder / name, error.strerror) from None

    def read(self, runs: Sequence[Run]) -> Iterator[Bytes | DataError]:
        """See `Store.read`."""
        for shard, start, nbytes in runs:
            try:
                yield self._file(shard.name).read(start, nbytes)
            except DataError as error:
                yield error

    def _file(self, name: str) -> _File:
        # Held for the table alone: reading goes on beside it, and a file closes when its last reader lets go of it.
        with self._lock:
            file = self._files.get(name)
            if file is None:
                file = self._files[name] = _File(self._folder / "shards" / name)
                if len(self._files) > _OPEN_FILES:
                    self._files.popitem(last=False)
            return file

    def __getstate__(self) -> dict[str, Any]:
        return {"_folder": self._folder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["_folder"])  # type: ignore[misc]


class _File:
    """An open shard. Reading takes no file position, so threads and forked workers may share it."""

    def __init__(self, path: Path) -> None:
        self._descriptor = -1
        self._path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise DataError("a shard cannot be opened", seen=f"{path}: {error.strerror}") from None

    def read(self, offset: int, nbytes: int) -> bytes:
        raw = b""
        while len(raw) < nbytes:
            try:
                more = os.pread(self._descriptor, nbytes - len(raw), offset + len(raw))
            except OSError as error:
                raise _unreadable(self._path, error.strerror) from None
            if not more:
                raise DataError("a shard ends early", seen=f"{self._path} at byte {offset + len(raw)}")
            raw = raw + more if raw else more
        return raw

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)


def _unreadable(where: object, reason: object) -> DataError:
    return DataError("a file of the corpus cannot be read", seen=f"{where}: {reason}")


class PipeStore(Store):
    """Shards from a command, everything else from a folder or URL.

    Args:
        base: Store of the manifest and the tables.
        command: `data.pipe`; `{url}` becomes location and shard, `{name}` the shard's file name.
        buffer: Where shards are kept.
        patience: How long a shard is tried.
    """

    streamed = True

    def __init__(self, base: Store, command: str, *, buffer: ShardBuffer, patience: Patience) -> None:
        self.location, self._base, self._buffer, self._patience = base.location, base, buffer, patience
        self._command = Command(command)

    @property
    def folder(self) -> Path | None:
        """Folder of the manifest and the tables."""
        return self._base.folder

    def read_bytes(self, name: str) -> bytes:
        """See `Store.read_bytes`."""
        return self._base.read_bytes(name)

    def read(self, runs: Sequence[Run]) -> Iterator[Bytes | DataError]:
        """See `Store.read`."""
        yield from self._buffer.read(self.location, runs, self._whole)

    def _whole(self, shard: ShardEntry) -> bytearray:
        url = f"{self.location.rstrip('/')}/shards/{shard.name}"
        attempts = self._patience.attempts
        for attempt in range(attempts):
            try:
                return self._command.read(url, shard, timeout_s=self._patience.timeout_s)
            except DataError as error:
                last = DataError(error.what, seen=f"{error.seen} ({attempts} tries)", rule=error.rule, fix=error.fix)
            self._patience.pause(attempt)
        raise last


def open_store(
    location: Path | str,
    *,
    pipe: str | None = None,
    buffer: ShardBuffer | None = None,
    patience: Patience | None = None,
) -> Store:
    """Opens the store of a corpus.

    Args:
        location: Corpus folder or URL.
        pipe: Command that writes a shard to its output, see `PipeStore`.
        buffer: Where whole shards are kept; several corpora may share one. None: one of 4 GB.
        patience: How long remote reads are tried. None: six tries, three of a command.

    Raises:
        ConfigError: The URL's protocol is unknown or its package is not installed.
    """
    buffer = buffer or ShardBuffer(_DEFAULT_BUFFER_MB)
    store: Store
    if isinstance(location, str) and location.startswith("file://"):
        location = Path(unquote(urlsplit(location).path))
    if isinstance(location, str) and "://" in location:
        from .url_store import UrlStore

        store = UrlStore(location, buffer=buffer, patience=patience or Patience())
    else:
        store = LocalStore(Path(location))
    return store if pipe is None else PipeStore(store, pipe, buffer=buffer, patience=patience or Patience(attempts=3))
