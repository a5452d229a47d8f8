"""A corpus behind a URL that fsspec knows: s3://, gs://, https://, memory://, ..."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from .corpus_format import ShardEntry
from .errors import ConfigError, DataError
from .extras import require
from .pipes import GivenUp, ShardBuffer
from .stores import Bytes, Patience, Run, Store

_REQUESTS = 32  # at the same time, of one process
_BYTES_PER_S = 1 << 20  # slower than this a transfer counts as hanging


class UrlStore(Store):
    """A URL that fsspec knows. Credentials and endpoints are fsspec's own (AWS_*, FSSPEC_* in the environment).

    Args:
        url: Of the corpus, the folder that holds manifest.json.
        buffer: Where whole shards are kept when the server ignores byte ranges.
        patience: How long a read is tried.

    Raises:
        ConfigError: fsspec or its part for this protocol is not installed, or the protocol is unknown.
    """

    gap = 1 << 16

    def __init__(self, url: str, *, buffer: ShardBuffer, patience: Patience) -> None:
        self.location, self._buffer, self._patience = url, buffer, patience
        self._connect()
        # Asked of a small file: two bytes, of which a server that knows no ranges sends all.
        probe = self._fetch([(self._path("manifest.json"), 0, 2)])[0]
        if isinstance(probe, Exception) and not isinstance(probe, FileNotFoundError):
            raise self._unreachable(self._path("manifest.json"), probe, None)
        if isinstance(probe, bytes) and len(probe) > 2:
            self.streamed = True
            self.note = f"{url}: the server ignores byte ranges, so whole shards are read and kept in a buffer"

    def _connect(self) -> None:
        self._given_up = GivenUp()
        fsspec = require("fsspec", "pretrain")
        options: dict[str, Any] = {}
        if self.location.startswith(("http://", "https://")):
            aiohttp = require("aiohttp", "pretrain")
            timeout = aiohttp.ClientTimeout(
                total=None, sock_connect=self._patience.timeout_s, sock_read=self._patience.timeout_s
            )
            # A byte range of a compressed answer would be no byte range of the file; a signature holds for the URL as
            # it is spelled.
            options = {
                "encoded": "%" in self.location,
                "client_kwargs": {"timeout": timeout, "trust_env": True},
                "headers": {"Accept-Encoding": "identity"},
            }
        try:
            self._system, self._root = fsspec.core.url_to_fs(self.location, **options)
        except (ImportError, ValueError) as error:
            raise ConfigError(
                "the corpus cannot be reached",
                seen=f"{self.location}: {error}",
                rule="a folder, or a URL of a protocol that fsspec knows and whose package is installed",
                fix="install the package it names, or use data.pipe",
            ) from None

    def read_bytes(self, name: str) -> bytes:
        """See `Store.read_bytes`."""
        path = self._path(name)
        found = self._fetch([(path, None, None)])[0]
        if isinstance(found, FileNotFoundError):
            raise FileNotFoundError(path)
        if isinstance(found, Exception):
            raise self._unreachable(path, found, None)
        return found

    def read(self, runs: Sequence[Run]) -> Iterator[Bytes | DataError]:
        """See `Store.read`."""
        if self.streamed:
            yield from self._buffer.read(self.location, runs, self._whole)
            return
        known = [self._given_up.get(run.shard.name) for run in runs]
        asked = [run for run, error in zip(runs, known, strict=True) if error is None]
        found = iter(
            self._fetch(
                [(self._path(f"shards/{shard.name}"), start, start + nbytes) for shard, start, nbytes in asked],
            )
        )
        for run, error in zip(runs, known, strict=True):
            yield error if error is not None else self._checked(run, next(found))

    def _checked(self, run: Run, found: bytes | Exception) -> bytes | DataError:
        shard, start, nbytes = run
        where = self._path(f"shards/{shard.name}")
        if isinstance(found, Exception):
            return self._given_up.add(shard.name, self._unreachable(where, found, run))
        if len(found) == nbytes:
            return found
        if len(found) > nbytes:
            error = DataError(
                "the server ignores byte ranges",
                seen=f"{where}: {nbytes} bytes asked for, {len(found)} came",
                rule="a tile is read by its place in the shard",
                fix="read whole shards: data.pipe='curl -sf {url}' data.order=shards",
            )
            return self._given_up.add(shard.name, error)
        return DataError("a shard ends early", seen=f"{where} at byte {start + len(found)}")

    def _whole(self, shard: ShardEntry) -> bytes:
        path = self._path(f"shards/{shard.name}")
        found = self._fetch([(path, None, None)], nbytes=shard.bytes)[0]
        if isinstance(found, Exception):
            raise self._unreachable(path, found, None)
        return found

    def _fetch(
        self, wanted: list[tuple[str, int | None, int | None]], nbytes: int | None = None
    ) -> list[bytes | Exception]:
        """Reads ranges at once, each again after a passing failure until the patience ends."""
        found: list[bytes | Exception] = [TimeoutError()] * len(wanted)
        open_places = list(range(len(wanted)))
        if nbytes is None:
            nbytes = sum(end - start for _, start, end in wanted if start is not None and end is not None)
        limit_s = self._patience.timeout_s + nbytes / _BYTES_PER_S
        for attempt in range(self._patience.attempts):
            answers = self._ask([wanted[place] for place in open_places], limit_s)
            for place, answer in zip(open_places, answers, strict=True):
                found[place] = answer
            open_places = [p for p in open_places if isinstance(found[p], Exception) and not _lasting(found[p])]
            if not open_places:
                break
            self._patience.pause(attempt)
        return found

    def _ask(self, wanted: list[tuple[str, int | None, int | None]], limit_s: float) -> list[bytes | Exception]:
        paths, starts, ends = ([request[part] for request in wanted] for part in range(3))
        system = self._system
        try:
            if system.async_impl:
                asyn = require("fsspec.asyn", "pretrain")
                answers: list[Any] = asyn.sync(
                    system.loop,
                    system._cat_ranges,
                    paths,
                    starts,
                    ends,
                    batch_size=_REQUESTS,
                    on_error="return",
                    timeout=limit_s,
                )
            else:
                answers = _in_time(lambda: system.cat_ranges(paths, starts, ends, on_error="return"), limit_s)
        except Exception as error:
            # A backend's own errors have no common class; each becomes a DataError once the tries are used up.
            return [error] * len(wanted)
        return answers

    def _unreachable(self, where: str, error: Exception, run: Run | None) -> DataError:
        span = "" if run is None else f", bytes {run.start} to {run.start + run.nbytes - 1}"
        tries = 1 if _lasting(error) else self._patience.attempts
        reason = str(error).strip() or "no answer in time"
        return DataError(
            "a shard cannot be read" if "/shards/" in where else "a file of the corpus cannot be read",
            seen=f"{where}{span}: {type(error).__name__}: {reason} ({tries} {'try' if tries == 1 else 'tries'})",
            fix="look whether the address and the credentials are right and the server answers",
        )

    def _path(self, name: str) -> str:
        # A signed URL keeps its signature behind the path.
        if "?" not in self._root:
            return f"{self._root.rstrip('/')}/{name}"
        parts = urlsplit(self._root)
        return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name}"))

    def __getstate__(self) -> dict[str, Any]:
        kept = ("location", "_buffer", "_patience", "streamed", "note")
        return {name: getattr(self, name) for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._connect()


def _lasting(error: object) -> bool:
    """Says whether another try would fail as well."""
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return 400 <= status < 500 and status not in (408, 425, 429)
    return isinstance(
        error, (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, ValueError, TypeError)
    )


def _in_time(call: Callable[[], Any], limit_s: float) -> Any:
    """Calls what has no time limit of its own; a call that hangs is left to its thread."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append((call(), None))
        except Exception as error:
            outcome.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(limit_s)
    if not outcome:
        raise TimeoutError(f"no answer within {limit_s:.0f} s")
    value, error = outcome[0]
    if error is not None:
        raise error
    return value
