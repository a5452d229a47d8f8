"""Shards that come whole: the command that writes one, and the bounded buffer they are kept in."""

from __future__ import annotations

import contextlib
import hashlib
import os
import selectors
import shlex
import shutil
import signal
import subprocess
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from .corpus_format import ShardEntry
from .errors import ConfigError, DataError

_SHELL_SIGNS = frozenset("|&;<>$`")
_BLOCK = 1 << 20
_STDERR_KEPT = 4096

_GIVEN_UP_S = 300.0

Loader = Callable[[ShardEntry], "bytes | bytearray"]


class GivenUp:
    """Shards whose reading failed lately: they are not tried again for some minutes."""

    def __init__(self) -> None:
        self._errors: dict[object, tuple[float, DataError]] = {}

    def get(self, shard: object) -> DataError | None:
        """Returns why a shard was given up, None when it may be tried."""
        until, error = self._errors.get(shard, (0.0, None))
        return error if time.monotonic() < until else None

    def add(self, shard: object, error: DataError) -> DataError:
        """Gives a shard up; returns the error."""
        self._errors[shard] = (time.monotonic() + _GIVEN_UP_S, error)
        return error


class ShardBuffer:
    """Whole shards in memory, the least recently used dropped first. Threads may share it.

    Args:
        megabytes: Memory of the shards together, MiB.
    """

    def __init__(self, megabytes: int) -> None:
        self.megabytes = megabytes
        self._kept: OrderedDict[tuple[str, str], memoryview] = OrderedDict()
        self._given_up = GivenUp()
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Memory taken now, bytes."""
        return sum(shard.nbytes for shard in self._kept.values())

    def read(
        self, location: str, runs: Sequence[tuple[ShardEntry, int, int]], load: Loader
    ) -> Iterator[memoryview | DataError]:
        """Yields the bytes of runs (shard, first byte, bytes) in order, or why there are none.

        Args:
            location: Corpus of the shards, so that two may have shards of one name.
            runs: What is wanted; runs of one shard should follow one another.
            load: Gets a shard that is not here; its bytes are compared with the manifest.
        """
        for shard, start, nbytes in runs:
            try:
                whole = self._shard(location, shard, load)
            except DataError as error:
                yield error
            else:
                yield whole[start : start + nbytes]

    def _shard(self, location: str, shard: ShardEntry, load: Loader) -> memoryview:
        place = (location, shard.name)
        with self._lock:
            if place in self._kept:
                self._kept.move_to_end(place)
                return self._kept[place]
            if (known := self._given_up.get(place)) is not None:
                raise known
            limit = self.megabytes << 20
            if shard.bytes > limit:
                raise DataError(
                    "a shard is larger than the buffer",
                    seen=f"{location}/shards/{shard.name}: {shard.bytes:,} bytes, data.buffer_mb={self.megabytes}",
                    rule="shards that can only be streamed are held whole",
                    fix=f"data.buffer_mb={-(-shard.bytes >> 20)} or more, or prep with fewer tiles a shard",
                )
            # Dropped before the new one comes, so that the limit holds while it does.
            while self._kept and self.nbytes + shard.bytes > limit:
                self._kept.popitem(last=False)
            try:
                whole = memoryview(load(shard))
                _compare(location, shard, whole)
            except DataError as error:
                raise self._given_up.add(place, error) from None
            self._kept[place] = whole
            return whole

    def __getstate__(self) -> dict[str, Any]:
        return {"megabytes": self.megabytes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["megabytes"])  # type: ignore[misc]


def _compare(location: str, shard: ShardEntry, whole: memoryview) -> None:
    where = f"{location}/shards/{shard.name}"
    if whole.nbytes != shard.bytes:
        raise DataError(
            "a shard has another size than the manifest says",
            seen=f"{where}: {whole.nbytes} bytes",
            rule=f"{shard.bytes} bytes",
            fix="copy it again, or run momo prep again",
        )
    if (found := hashlib.sha256(whole).hexdigest()) != shard.sha256:
        raise DataError(
            "a shard was altered",
            seen=f"{where} has sha256 {found[:12]}...",
            rule=f"the manifest says {shard.sha256[:12]}...",
            fix="copy it again, or run momo prep again",
        )


class Command:
    """A command line that writes one shard to its output.

    A plain command is started without a shell. One with a shell's signs (a pipe between two programs, a variable) is
    given to the shell, the shard's address quoted.

    Args:
        line: With `{url}` or `{name}` where the shard belongs.

    Raises:
        ConfigError: The line is empty or a quotation mark is missing.
    """

    def __init__(self, line: str) -> None:
        self._line = line
        bare = line.replace("{url}", "").replace("{name}", "")
        self._shell = bool(_SHELL_SIGNS & set(bare))
        try:
            self._words = shlex.split(line)
        except ValueError as error:
            raise ConfigError("data.pipe is no command", seen=f"{line}: {error}") from None
        if not self._words:
            raise ConfigError("data.pipe is no command", seen=repr(line), rule="a program and its arguments")

    def arguments(self, url: str, name: str) -> list[str]:
        """Returns program and arguments for one shard."""
        if not self._shell:
            return [word.replace("{url}", url).replace("{name}", name) for word in self._words]
        line = self._line.replace("{url}", shlex.quote(url)).replace("{name}", shlex.quote(name))
        # Without pipefail the failure of all but the last program of a pipe would go unseen.
        bash = shutil.which("bash")
        return [bash, "-o", "pipefail", "-c", line] if bash else ["/bin/sh", "-c", line]

    def read(self, url: str, shard: ShardEntry, *, timeout_s: float) -> bytearray:
        """Runs the command for one shard and returns what it wrote.

        Args:
            url: Address of the shard.
            shard: Its entry in the manifest; more bytes than it says are not read.
            timeout_s: Seconds without a byte after which the command is ended.

        Raises:
            DataError: The command cannot be started, fails, hangs or writes more or less than the shard.
        """
        arguments = self.arguments(url, shard.name)
        try:
            # A group of its own, so that a hanging command ends with the programs it started.
            process = subprocess.Popen(
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        except OSError as error:
            raise self._failed(f"{arguments[0]}: {error.strerror}", url) from None
        try:
            whole, stderr, state = _drain(process, shard.bytes, timeout_s)
        finally:
            _end(process)
        last = (stderr.decode("utf-8", "replace").strip().splitlines() or ["nothing on stderr"])[-1]
        if state == "hangs":
            raise self._failed(f"no byte for {timeout_s:g} s after {len(whole)} of {shard.bytes}; {last}", url)
        if state == "more":
            raise self._failed(f"it writes more than the {shard.bytes} bytes of the shard", url)
        if process.returncode:
            raise self._failed(f"exit code {process.returncode}: {last}", url)
        if len(whole) != shard.bytes:
            raise self._failed(f"it wrote {len(whole)} of {shard.bytes} bytes; {last}", url)
        return whole

    def _failed(self, reason: str, url: str) -> DataError:
        return DataError(
            "data.pipe failed",
            seen=f"{self._line} for {url}: {reason}",
            rule="it writes the shard to its output and exits 0",
            fix="run the command by hand for this shard",
        )


def _drain(process: subprocess.Popen[bytes], expected: int, timeout_s: float) -> tuple[bytearray, bytes, str]:
    """Reads output and errors to their end; returns both and `ended`, `hangs` or `more`."""
    assert process.stdout is not None and process.stderr is not None
    whole, stderr = bytearray(), b""
    streams = {process.stdout.fileno(): "out", process.stderr.fileno(): "err"}
    with selectors.DefaultSelector() as selector:
        for descriptor in streams:
            selector.register(descriptor, selectors.EVENT_READ)
        last = time.monotonic()
        while streams:
            ready = selector.select(max(0.0, last + timeout_s - time.monotonic()))
            for key, _ in ready:
                block = os.read(key.fd, _BLOCK)
                if not block:
                    selector.unregister(key.fd)
                    del streams[key.fd]
                elif streams[key.fd] == "err":
                    stderr = (stderr + block)[-_STDERR_KEPT:]
                else:
                    whole += block
                    last = time.monotonic()
            if len(whole) > expected:
                return whole, stderr, "more"
            if streams and time.monotonic() - last >= timeout_s:
                return whole, stderr, "hangs"
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        return whole, stderr, "hangs"
    return whole, stderr, "ended"


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    for stream in (process.stdout, process.stderr):
        if stream is not None:
            stream.close()
