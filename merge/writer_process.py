"""A file that a second process writes and hashes, a few pieces behind the one that makes them.

A second thread would not do: it and the arithmetic, which is made of many short calls, would wait for each other's turn
with the interpreter thousands of times a merge (docs/performance.md, "Merging").

As a script, `python writer_process.py RING FILE`, this file is that process. Both are open file descriptors. Its input
has the lengths of the pieces, one a line; each lies in the next slot of the ring. It answers a dot for each piece
written, then the SHA-256 of all, or `!` and the number of the error that stopped it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Iterable

SLOT = 2**20
"""Bytes of a slot of the ring."""
_SLOTS = 4
RING = _SLOTS * SLOT
"""Bytes of memory that both processes share."""
_DONE, _FAILED = b".", b"!"


class WriterProcess:
    """Writes bytes front to back and hashes them, in a second process.

    Args:
        file: Descriptor of the open file; the caller closes it, after this.

    Raises:
        OSError: A process or shared memory cannot be had.
    """

    def __init__(self, file: int) -> None:
        self._put = self._done = 0
        self._answer = b""
        ring = os.memfd_create("momo-ring")
        try:
            os.ftruncate(ring, RING)
            self._slots = memoryview(mmap.mmap(ring, RING))
            self._process = subprocess.Popen(
                # Isolated and without site-packages it starts in some 20 ms.
                [sys.executable or "", "-I", "-S", __file__, str(ring), str(file)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                pass_fds=(ring, file),
                bufsize=0,
            )
        finally:
            os.close(ring)

    def slot(self) -> memoryview:
        """Returns the memory of the next piece, `SLOT` bytes, once what was in it is written.

        Raises:
            OSError: What was put before could not be written.
        """
        while self._put - self._done == _SLOTS:
            self._listen()
        start = self._put % _SLOTS * SLOT
        return self._slots[start : start + SLOT]

    def put(self, length: int) -> None:
        """Hands the first bytes of the next slot over.

        Raises:
            OSError: What was put before could not be written.
        """
        assert self._process.stdin is not None
        self._put += 1
        try:
            self._process.stdin.write(b"%d\n" % length)
        except BrokenPipeError:
            self._listen_to_the_end()

    def write(self, piece: memoryview) -> None:
        """Copies bytes of any number into slots and hands them over.

        Raises:
            OSError: What was put before could not be written.
        """
        for first in range(0, len(piece), SLOT):
            part = piece[first : first + SLOT]
            self.slot()[: len(part)] = part
            self.put(len(part))

    def finish(self) -> str:
        """Returns the SHA-256 of all that was put, once it is written.

        Raises:
            OSError: It could not be written.
        """
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._listen_to_the_end()
        return self._answer.decode()

    def close(self) -> None:
        """Ends the second process, done or not."""
        self._process.kill()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            with contextlib.suppress(OSError):
                stream.close()
        self._process.wait()

    def _listen_to_the_end(self) -> None:
        while self._listen():
            pass
        if self._process.wait() or self._done != self._put:
            raise OSError(errno.EPIPE, "the process that writes it died")

    def _listen(self) -> bool:
        """Waits for an answer; returns False after the last."""
        assert self._process.stdout is not None
        heard = os.read(self._process.stdout.fileno(), 4096)
        dots, failed, number = heard.partition(_FAILED)
        if failed:
            raise OSError(int(number), os.strerror(int(number)))
        self._done += dots.count(_DONE)
        self._answer += dots.replace(_DONE, b"")
        if not heard and self._done != self._put:
            raise OSError(errno.EPIPE, "the process that writes it died")
        return bool(heard)


def _serve(ring: int, file: int, lengths: Iterable[str]) -> None:
    """Is the second process."""
    digest = hashlib.sha256()
    with mmap.mmap(ring, 0) as slots, memoryview(slots) as view:
        for number, length in enumerate(lengths):
            start = number % _SLOTS * SLOT
            with view[start : start + int(length)] as piece:
                _write_whole(file, piece)
                digest.update(piece)
            os.write(sys.stdout.fileno(), _DONE)
    os.write(sys.stdout.fileno(), digest.hexdigest().encode())


def _write_whole(file: int, piece: memoryview) -> None:
    done = 0
    while done < len(piece):
        done += os.write(file, piece[done:])


if __name__ == "__main__":
    # Ctrl-C is for the process that started this one, which then ends it or its input.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        _serve(int(sys.argv[1]), int(sys.argv[2]), sys.stdin)
    except OSError as error:
        os.write(sys.stdout.fileno(), _FAILED + str(error.errno).encode())
