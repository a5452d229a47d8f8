"""Written by a second process, a file is what one process writes; and what happens when it cannot go on."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import random
import signal

import pytest
import torch

from momo.errors import MergeError
from momo.merge.safetensors_file import SafetensorsWriter
from momo.merge.writer_process import RING, SLOT, WriterProcess, _write_whole
from momo.weights import TensorInfo

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs shared memory by descriptor (Linux)")


@pytest.fixture
def opened(tmp_path):
    """A process that writes to a file."""
    with open(tmp_path / "file", "wb", buffering=0) as file:
        process = WriterProcess(file.fileno())
        try:
            yield process
        finally:
            process.close()


def test_the_file_and_its_hash_are_those_of_the_bytes(opened, tmp_path):
    rng = random.Random(0)
    pieces = [rng.randbytes(size) for size in (0, 1, 4097, SLOT, 3 * SLOT + 5, RING + 7)]
    for piece in pieces:
        opened.write(memoryview(piece))
    opened.slot()[:3] = b"end"
    opened.put(3)
    expected = b"".join([*pieces, b"end"])
    assert opened.finish() == hashlib.sha256(expected).hexdigest()
    assert (tmp_path / "file").read_bytes() == expected


def test_nothing_is_written(opened, tmp_path):
    assert opened.finish() == hashlib.sha256(b"").hexdigest()
    assert (tmp_path / "file").read_bytes() == b""


def test_ctrl_c_is_left_to_the_first_process(opened):
    opened.write(memoryview(b"one"))
    opened.slot()  # it has started by the time it has answered
    while not opened._done:
        opened._listen()
    os.kill(opened._process.pid, signal.SIGINT)
    opened.write(memoryview(b"two"))
    assert opened.finish() == hashlib.sha256(b"onetwo").hexdigest()


@pytest.mark.parametrize("pieces", [1, 20])
def test_a_full_disk_reaches_the_first_process(pieces):
    with open("/dev/full", "wb", buffering=0) as file:
        process = WriterProcess(file.fileno())
        with pytest.raises(OSError) as caught:
            for _ in range(pieces):
                process.write(memoryview(bytes(SLOT)))
            process.finish()
        process.close()
    assert caught.value.errno == errno.ENOSPC


@pytest.mark.parametrize("after", [0, 1, 20])
def test_a_process_that_was_killed_is_told(opened, after):
    opened.write(memoryview(bytes(10)))
    os.kill(opened._process.pid, signal.SIGKILL)
    opened._process.wait()
    with pytest.raises(OSError, match="the process that writes it died"):
        for _ in range(after):
            opened.write(memoryview(bytes(SLOT)))
        opened.finish()


def test_killed_after_the_last_piece_it_has_no_hash(opened):
    opened.write(memoryview(bytes(10)))
    while not opened._done:
        opened._listen()
    os.kill(opened._process.pid, signal.SIGKILL)
    with pytest.raises(OSError, match="the process that writes it died"):
        opened.finish()


def test_short_writes_are_continued(tmp_path, monkeypatch):
    whole = os.write
    monkeypatch.setattr("os.write", lambda file, piece: whole(file, piece[:3]))
    with open(tmp_path / "file", "wb", buffering=0) as file:
        _write_whole(file.fileno(), memoryview(b"0123456789"))
    monkeypatch.undo()
    assert (tmp_path / "file").read_bytes() == b"0123456789"


def test_it_ends_with_its_owner(opened):
    opened.write(memoryview(bytes(10)))
    opened.close()
    assert opened._process.returncode is not None


HEADER = {"a": TensorInfo((70, 9), "F32"), "b": TensorInfo((5,), "F32")}


def write(path, *, behind: bool) -> str:
    first = torch.randn(70, 9, generator=torch.Generator().manual_seed(0))
    with SafetensorsWriter(path, HEADER, {"format": "pt"}, behind=behind) as writer:
        for part in first.reshape(-1).split(100):
            writer.write(writer.buffer(len(part), torch.float32).copy_(part))
        writer.buffer(5, torch.float32)  # asked for and not used
        writer.write(torch.arange(5.0))
        assert (writer._behind is not None) == behind
        return writer.finish()


def test_a_safetensors_file_is_the_same_either_way(tmp_path):
    hashes = {write(tmp_path / "here", behind=False), write(tmp_path / "behind", behind=True)}
    contents = {(tmp_path / name).read_bytes() for name in ("here", "behind")}
    assert len(contents) == 1 and hashes == {hashlib.sha256(contents.pop()).hexdigest()}


def test_a_buffer_too_long_for_the_shared_memory_is_one_of_its_own(tmp_path):
    count = SLOT // 4 + 1
    with SafetensorsWriter(tmp_path / "file", {"a": TensorInfo((count,), "F32")}, {}, behind=True) as writer:
        writer.write(writer.buffer(count, torch.float32).fill_(1.5))
        digest = writer.finish()
    written = (tmp_path / "file").read_bytes()
    assert digest == hashlib.sha256(written).hexdigest()
    assert torch.equal(
        torch.frombuffer(bytearray(written[-4 * count :]), dtype=torch.float32), torch.full((count,), 1.5)
    )


@pytest.mark.parametrize("lacking", ["interpreter", "memory"])
def test_without_a_second_process_the_first_writes(tmp_path, monkeypatch, lacking, capsys):
    if lacking == "interpreter":
        monkeypatch.setattr("sys.executable", None)
    else:
        monkeypatch.delattr("os.memfd_create")
    with SafetensorsWriter(tmp_path / "file", HEADER, {}, behind=True) as writer:
        assert writer._behind is None
        digest = writer.finish()
    # A system without such memory is as it is; a failure is told.
    told = "note: no second process to write" in capsys.readouterr().err
    assert told == (lacking == "interpreter")
    assert digest == hashlib.sha256((tmp_path / "file").read_bytes()).hexdigest()


@pytest.mark.parametrize("when", ["writing", "the end"])
def test_a_full_disk_is_told_as_such(tmp_path, when):
    (tmp_path / "file").symlink_to("/dev/full")
    with (
        pytest.raises(MergeError, match="the disk is full: .*No space left on device"),
        SafetensorsWriter(tmp_path / "file", HEADER, {}, behind=True) as writer,
    ):
        if when == "writing":
            for _ in range(100):
                writer.write(writer.buffer(5, torch.float32))
        assert writer.finish()


class ShortWrites(io.FileIO):
    """Takes few bytes at a time, as a disk that fills up or a pipe does."""

    def write(self, piece):
        return super().write(piece[:7])


def test_short_writes_are_continued_and_hashed_once(tmp_path):
    with SafetensorsWriter(tmp_path / "file", {}, {}) as writer:
        writer._stream.close()
        writer._stream = ShortWrites(tmp_path / "file", "ab")
        writer.write(torch.arange(20.0))
        digest = writer.finish()
    written = (tmp_path / "file").read_bytes()
    assert written.endswith(torch.arange(20.0).numpy().tobytes()) and digest == hashlib.sha256(written).hexdigest()


def test_a_buffer_written_twice_is_there_twice(tmp_path):
    with SafetensorsWriter(tmp_path / "file", {}, {}, behind=True) as writer:
        lent = writer.buffer(4, torch.float32).copy_(torch.arange(1.0, 5.0))
        writer.write(lent)
        writer.write(lent)
        assert writer.finish()
    assert (tmp_path / "file").read_bytes().endswith(2 * torch.arange(1.0, 5.0).numpy().tobytes())
