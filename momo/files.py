"""Hashes and all-or-nothing writing: a killed job leaves the old artefact or none."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
def atomic_folder(final: Path, *, replace: bool = False) -> Iterator[Path]:
    """Gives a temporary folder to fill; on success it is renamed to `final`, on failure removed.

    Args:
        final: The folder to make.
        replace: Take the place of an existing folder (the old one stays whole until the new one is complete).

    Raises:
        DataError: `final` exists and `replace` is false.
    """
    if final.exists() and not replace:
        raise DataError(
            "the output exists already",
            seen=final,
            rule="an artefact is never overwritten in passing",
            fix="choose another `out`, or remove the folder",
        )
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
