"""What is written whole or not at all, what may be replaced, and locks."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys

import pytest

from momo.errors import DataError
from momo.files import atomic_folder, holds_only, locked


def fill(final, **options):
    with atomic_folder(final, **options) as folder:
        (folder / "new").write_text("new")


def is_own(folder):
    return holds_only(folder, "new", "*.png")


def test_an_own_or_empty_folder_is_replaced(tmp_path):
    (tmp_path / "empty").mkdir()
    fill(tmp_path / "empty", replaces=is_own)
    fill(tmp_path / "own")
    (tmp_path / "own/old.png").touch()
    fill(tmp_path / "own", replaces=is_own)
    for name in ("empty", "own"):
        assert [path.name for path in (tmp_path / name).iterdir()] == ["new"]
    assert sorted(os.listdir(tmp_path)) == ["empty", "own"]


def test_what_fails_leaves_the_old_one(tmp_path):
    fill(tmp_path / "own")
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "own", replaces=is_own) as folder:
        (folder / "half").write_text(str(1 / 0))
    assert os.listdir(tmp_path) == ["own"] and os.listdir(tmp_path / "own") == ["new"]


@pytest.mark.parametrize("name", ["foreign", "file", "link", "dangling"])
def test_nothing_else_is_replaced(tmp_path, name):
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/thesis.txt").write_text("years of work")
    (tmp_path / "foreign/new").touch()
    (tmp_path / "file").write_text("mine")
    fill(tmp_path / "own")
    (tmp_path / "link").symlink_to("own")
    (tmp_path / "dangling").symlink_to("nowhere")
    before = sorted(tmp_path.rglob("*"))
    for options, message in (
        ({}, "the output exists already: .*Next: choose another `out`, or remove the folder"),
        ({"replaces": is_own}, "the output is something else than an older one of this command: .*remove it yourself"),
    ):
        with pytest.raises(DataError, match=message):
            fill(tmp_path / name, **options)
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("name", [".", "..", ""])
def test_the_folder_one_works_in_stays(tmp_path, name, monkeypatch):
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "inner")
    with pytest.raises(DataError, match="the output is something else than an older one"):
        fill(tmp_path / "inner" / name, replaces=lambda _: True)
    with pytest.raises(DataError, match="the output exists already"):
        fill(os.path.join(name, ""))
    assert os.listdir(tmp_path) == ["inner"]


HOLD = """
import sys
from pathlib import Path
from momo.files import locked
with locked(Path(sys.argv[1]), what="the run", wait_s=0):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_lock_is_held_by_one_process_and_ends_with_it(tmp_path):
    path = tmp_path / "run" / ".lock"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    message = rf"the run is being written by another process: .*run: process {holder.pid} on .*or choose another `out`"
    with pytest.raises(DataError, match=message), locked(path, what="the run", wait_s=0.2):
        pass
    holder.kill()
    holder.wait(20)
    with locked(path, what="the run", wait_s=20):
        assert path.read_text().startswith(f"process {os.getpid()} on ")


def test_where_there_are_no_locks_nothing_is_held(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOTSUP, "not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locked(tmp_path / ".lock", what="the run", wait_s=0), locked(tmp_path / ".lock", what="the run", wait_s=0):
        pass
