"""A folder or bucket that files are copied to: whole or not at all, retried, sizes compared."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from ..errors import ConfigError
from ..extras import require
from ..files import atomic_file

_BLOCK = 16 << 20
_LONGEST_PAUSE_S = 60.0
ResultT = TypeVar("ResultT")


class Gone(Exception):
    """What was to be copied is no longer there, or no longer what it was."""


class Stopped(Exception):
    """The copying was told to end."""


class Remote:
    """One folder of any file system that fsspec knows.

    Args:
        destination: Folder or URL.
        name: Folder below it, made when something is written.
        attempts: How often an action is tried.
        pause_s: Seconds before the second attempt; doubled each time, at most 60.

    Raises:
        ConfigError: The kind of file system is unknown or needs a package that is not installed.
    """

    def __init__(self, destination: str, name: str, *, attempts: int, pause_s: float) -> None:
        self._fs, root = _open_file_system(destination)
        self.local = bool(getattr(self._fs, "local_file", False))
        self.root = f"{root.rstrip('/')}/{name}"
        self._attempts, self._pause_s = attempts, pause_s
        self.stop = threading.Event()

    def write(self, name: str, source: Callable[[], BinaryIO], *, sha256: str | None = None) -> int:
        """Copies a stream to a file, then compares the size.

        Args:
            name: File below the folder.
            source: Opens the stream anew for each attempt; raises Gone when there is nothing to copy.
            sha256: Hash that the stream must have.

        Returns:
            Bytes written.

        Raises:
            Gone: The source is not there, or has another hash.
            Stopped: `stop` was set.
            Exception: Whatever the file system raised at the last attempt.
        """

        def once() -> int:
            digest, size = hashlib.sha256(), 0
            with source() as stream, self._writing(name) as out:
                while block := stream.read(_BLOCK):
                    if self.stop.is_set():
                        raise Stopped
                    digest.update(block)
                    size += len(block)
                    out.write(block)
                if sha256 is not None and digest.hexdigest() != sha256:
                    raise Gone(f"{name.rpartition('/')[2]} is not the file that its card describes")
            if (found := self._size(name)) != size:
                raise OSError(f"{name} has {found} bytes after the copy, not {size}")
            return size

        return self._retry(once)

    def read(self, name: str) -> bytes | None:
        """Returns the content of a small file, or None when there is none."""

        def once() -> bytes | None:
            self._fs.invalidate_cache()
            try:
                return bytes(self._fs.cat_file(f"{self.root}/{name}"))
            except FileNotFoundError:
                return None

        return self._retry(once)

    def exists(self, name: str) -> bool:
        """Returns whether a file or a folder with something in it is there."""

        def once() -> bool:
            self._fs.invalidate_cache()
            return bool(self._fs.exists(f"{self.root}/{name}"))

        return self._retry(once)

    def remove(self, name: str) -> None:
        """Removes a file or a whole folder when it is there."""

        def once() -> None:
            self._fs.invalidate_cache()
            with contextlib.suppress(FileNotFoundError):
                self._fs.rm(f"{self.root}/{name}", recursive=True)

        self._retry(once)

    def glob(self, pattern: str) -> list[str]:
        """Returns the sorted names below the folder that fit a pattern."""

        def once() -> list[str]:
            self._fs.invalidate_cache()
            found = [str(path) for path in self._fs.glob(f"{self.root}/{pattern}")]
            parts = pattern.count("/") + 1
            return sorted("/".join(path.split("/")[-parts:]) for path in found)

        return self._retry(once)

    def probe(self) -> None:
        """Writes a small file and removes it, without a second attempt."""
        name = f".probe-{socket.gethostname()}-{os.getpid()}"
        with self._writing(name) as stream:
            stream.write(b"momo")
        if (size := self._size(name)) != 4:
            raise OSError(f"{name} has {size} bytes after 4 were written")
        self._fs.rm_file(f"{self.root}/{name}")

    def _size(self, name: str) -> int:
        self._fs.invalidate_cache()
        return int(self._fs.info(f"{self.root}/{name}")["size"])

    @contextlib.contextmanager
    def _writing(self, name: str) -> Iterator[Any]:
        """Opens a file for writing; after an error the part that was written does not pass for the file."""
        path = f"{self.root}/{name}"
        if self.local:
            with atomic_file(Path(path)) as partial, open(partial, "wb") as stream:
                yield stream
            return
        try:
            remote = self._fs.open(path, "wb", block_size=_BLOCK)
        except FileNotFoundError:
            # Only file systems with real folders ask for this; asked always, it could make a bucket.
            self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            remote = self._fs.open(path, "wb", block_size=_BLOCK)
        try:
            yield remote
        except BaseException:
            # Closing would commit the part.
            with contextlib.suppress(Exception):
                remote.discard()
            with contextlib.suppress(Exception):
                remote.closed = True
            raise
        remote.close()

    def _retry(self, action: Callable[[], ResultT]) -> ResultT:
        pause = self._pause_s
        for left in range(self._attempts - 1, -1, -1):
            if self.stop.is_set():
                break
            try:
                return action()
            except (Gone, Stopped):
                raise
            except Exception:  # a file system's own errors have no common class; the last one is raised
                if not left:
                    raise
            self.stop.wait(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)
        raise Stopped


def one_line(error: BaseException) -> str:
    """Returns kind and text of an error in one line of at most 300 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _open_file_system(destination: str) -> tuple[Any, str]:
    core = require("fsspec.core", "pretrain")
    try:
        # An instance of its own: the loader may use another in other threads at the same time.
        fs, root = core.url_to_fs(destination, skip_instance_cache=True)
    except ImportError as error:
        protocol = destination.partition("://")[0]
        raise ConfigError(
            "the upload destination needs a package that is not installed",
            seen=f"checkpoint.upload={destination}: {error}",
            rule=f"fsspec opens {protocol}:// through it",
            fix="pip install s3fs" if protocol in ("s3", "s3a") else "install the package named above",
        ) from error
    except Exception as error:
        raise ConfigError(
            "the upload destination cannot be opened",
            seen=f"checkpoint.upload={destination}: {one_line(error)}",
            rule="a folder, or a URL of a file system that fsspec knows",
            fix="for example checkpoint.upload=/mnt/archive or checkpoint.upload=s3://bucket/runs",
        ) from error
    return fs, str(root)
