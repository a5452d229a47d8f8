"""Hashes and all-or-nothing writing: a killed job leaves the old artefact or none."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from .errors import DataError

_PARTIAL = ".partial-"


def sha256_file(path: Path) -> str:
    """Returns the SHA-256 of a file as 64 hexadecimal digits."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(stream)


def _digest(stream: Any) -> str:
    digest = hashlib.sha256()
    while block := stream.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def sha256_json(value: Any) -> str:
    """Returns the SHA-256 of a JSON value written with sorted keys and no spaces."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def partial_name(final: Path) -> Path:
    """Returns a temporary name beside `final` that tells which process on which machine is writing it."""
    return final.with_name(f".{final.name}{_PARTIAL}{socket.gethostname()}-{os.getpid()}")


def remove_leftovers(folder: Path) -> list[Path]:
    """Removes partial artefacts in `folder` whose writer, a process of this machine, is gone.

    Returns:
        The paths removed.
    """
    removed = []
    for path in folder.glob(f".*{_PARTIAL}{socket.gethostname()}-*"):
        pid = path.name.rpartition("-")[2]
        if pid.isdigit() and int(pid) != os.getpid() and not _alive(int(pid)):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            removed.append(path)
    return removed


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextlib.contextmanager
def locked(path: Path, *, what: str, wait_s: float) -> Iterator[None]:
    """Holds a lock that ends with this process; on file systems without locks nothing is held.

    Args:
        path: The lock's file, made where it is missing and left behind.
        what: What it protects, for the message.
        wait_s: Seconds to wait for another process.

    Raises:
        DataError: Another process still has it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + wait_s
    with open(path, "a+", encoding="utf-8") as stream:
        while not _lock(stream):
            if time.monotonic() > deadline:
                stream.seek(0)
                raise DataError(
                    f"{what} is being written by another process",
                    seen=f"{path.parent}: {stream.read().strip() or 'unknown'}",
                    rule="one process at a time",
                    fix="wait for it or end it, then start again; or choose another `out`",
                )
            time.sleep(0.1)
        stream.truncate(0)
        stream.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        stream.flush()
        yield


def _lock(stream: IO[str]) -> bool:
    import fcntl  # not on Windows, where weights can be read

    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL):
            raise
    return True


@contextlib.contextmanager
def atomic_file(final: Path) -> Iterator[Path]:
    """Gives a temporary path to write; on success it is renamed to `final`, on failure removed."""
    final.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_name(final)
    try:
        yield partial
        with open(partial, "rb+") as stream:
            os.fsync(stream.fileno())
        os.replace(partial, final)
    finally:
        partial.unlink(missing_ok=True)


def write_text(final: Path, text: str) -> None:
    """Writes a text file in one step (see `atomic_file`)."""
    with atomic_file(final) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(final: Path, value: Any) -> None:
    """Writes a JSON file in one step; NaN and infinity are refused because JSON has no such numbers."""
    write_text(final, json.dumps(value, indent=2, allow_nan=False) + "\n")


@contextlib.contextmanager
def atomic_folder(final: Path, *, replaces: Callable[[Path], bool] | None = None) -> Iterator[Path]:
    """Gives a temporary folder to fill; on success it is renamed to `final`, on failure removed.

    Args:
        final: The folder to make.
        replaces: Says of an existing folder whether it is an older artefact of the same kind. The new one takes its
            place, and that of an empty folder; the old one stays whole until then. None: nothing is replaced.

    Raises:
        DataError: `final` exists and is not replaced.
    """
    final = Path(os.path.abspath(final))
    if os.path.lexists(final):
        _check_replaced(final, replaces)
    final.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(final.parent)
    partial = partial_name(final)
    partial.mkdir()
    try:
        yield partial
        if final.exists():
            old = partial.with_name(partial.name + "-old")
            os.rename(final, old)
            os.rename(partial, final)
            shutil.rmtree(old)
        else:
            os.rename(partial, final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_replaced(final: Path, replaces: Callable[[Path], bool] | None) -> None:
    if replaces is None:
        raise DataError(
            "the output exists already",
            seen=final,
            rule="an artefact is never overwritten in passing",
            fix="choose another `out`, or remove the folder",
        )
    here = Path.cwd()
    own = final.is_dir() and not final.is_symlink() and final not in (here, *here.parents)
    if not own or (any(final.iterdir()) and not replaces(final)):
        raise DataError(
            "the output is something else than an older one of this command",
            seen=final,
            rule="only a folder, no link, that the same command made and that holds nothing else is replaced",
            fix="choose another `out`, or remove it yourself",
        )


def holds_only(folder: Path, *names: str) -> bool:
    """Says whether all entries of a folder are among the names, which may have wildcards."""
    return all(any(entry.match(name) for name in names) for entry in folder.iterdir())
