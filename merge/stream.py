"""Merging by streams: mapped parents in, one safetensors file out, a piece at a time."""

from __future__ import annotations

import collections
import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from momo.errors import MergeError
from momo.memory import keep_freed_memory
from momo.weights import TensorInfo

from .plan import MergePlan, is_finite

PIECE = 2**18  # entries worked on together: pieces of all parents stay in the cache
# NaN and infinity of a parent always reach the result, so looking at that is enough.
_PROPAGATING = frozenset({"task_arithmetic", "average", "weighted_average"})
_AHEAD = 4  # pieces that may wait for the disk; of whole tensors one


class SafetensorsWriter:
    """Writes a safetensors file front to back and hashes what it writes.

    Args:
        path: File to write.
        header: Shape and dtype of every tensor, in the order in which they will come.
        metadata: Texts for the file's metadata.
    """

    def __init__(self, path: Path, header: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> None:
        self._path = path
        self._digest = hashlib.sha256()
        self._stream = open(path, "wb", buffering=0)  # noqa: SIM115 - closed in __exit__
        self._put(memoryview(_header_bytes(header, metadata)))

    def write(self, tensor: torch.Tensor) -> None:
        """Appends a tensor or a part of one.

        Raises:
            MergeError: It cannot be written.
        """
        self._put(tensor.detach().reshape(-1).contiguous().view(torch.uint8).numpy().data)

    @property
    def sha256(self) -> str:
        """SHA-256 of what was written."""
        return self._digest.hexdigest()

    def _put(self, piece: memoryview) -> None:
        try:
            while len(piece):
                done = self._stream.write(piece)
                assert done is not None
                self._digest.update(piece[:done])
                piece = piece[done:]
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            raise MergeError(
                "the disk is full" if full else "the merged weights cannot be written",
                seen=f"{self._path.parent}: {error.strerror}",
                rule="the file is written beside its final place, so what was there before is untouched",
                fix="make room or choose another out=, and merge again",
            ) from error

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._stream.close()


def _header_bytes(header: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> bytes:
    content: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name, info in header.items():
        start, end = end, end + _size(info)
        content[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [start, end]}
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    return len(text).to_bytes(8, "little") + text


_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "U8": 1, "I8": 1, "BOOL": 1}


def _size(info: TensorInfo) -> int:
    size = _BYTES[info.dtype]
    for side in info.shape:
        size *= side
    return size


def output_header(plan: MergePlan) -> dict[str, TensorInfo]:
    """Returns shapes and dtypes of the result in the order of the file: wide dtypes first, then by name.

    Raises:
        MergeError: A tensor has a dtype that cannot be written.
    """
    infos = {}
    for name in plan.names:
        info = plan.info(name)
        if info.dtype not in _BYTES:
            raise MergeError(
                "a tensor has a dtype that momo cannot write",
                seen=f"{name}: {info.dtype}",
                fix="leave it out: exclude and rest=drop",
            )
        infos[name] = info
    return dict(sorted(infos.items(), key=lambda item: (-_BYTES[item[1].dtype], item[0])))


def output_bytes(plan: MergePlan) -> int:
    """Returns the size of the tensors of the result."""
    return sum(_size(info) for info in output_header(plan).values())


def memory_bytes(plan: MergePlan) -> int:
    """Returns about how much memory the tensors take at most while streaming; mapped files not counted."""
    width = 8 if plan.config.precision == "fp64" else 4
    if plan.elementwise:
        return (3 + _ahead(plan)) * PIECE * width
    return (3 + _ahead(plan)) * width * max(_size(info) // _BYTES[info.dtype] for info in output_header(plan).values())


def _ahead(plan: MergePlan) -> int:
    return _AHEAD if plan.elementwise else 1


def write_merged(
    plan: MergePlan, path: Path, metadata: Mapping[str, str], advance: Callable[[int], object] = lambda size: None
) -> str:
    """Streams the merged tensors into a file.

    Equal to writing `merged_state(plan)` bit for bit: a method whose result is the same in parts works on parts of
    tensors, the others on one tensor at a time.

    Args:
        plan: The merge.
        path: safetensors file to write.
        metadata: Texts for its metadata.
        advance: Told how many bytes of the result are made.

    Returns:
        The SHA-256 of the file.

    Raises:
        MergeError: A parent is not finite, the disk is full, or the result is not finite.
    """
    header = output_header(plan)
    keep_freed_memory()
    with (
        SafetensorsWriter(path, header, metadata) as writer,
        _Behind(writer.write, _ahead(plan)) as disk,
        _threads(plan),
    ):
        for name in header:
            for piece in _pieces(plan, name):
                if not is_finite(piece):
                    raise _not_finite(plan, name)
                disk.put(piece)
                advance(piece.numel() * piece.element_size())
        disk.wait()
        return writer.sha256


def _pieces(plan: MergePlan, name: str) -> Iterator[torch.Tensor]:
    """Yields a tensor of the result in flat parts."""
    if name in plan.rest or not plan.elementwise or not plan.is_floating(name):
        yield plan.tensor(name)
        return
    dtype = plan.dtype(name)
    stored = [tensor.reshape(-1) for tensor in plan.stored(name)]
    fishers = plan.fishers(name)
    flat_fishers = None if fishers is None else [tensor.reshape(-1) for tensor in fishers]
    for first in range(0, stored[0].numel(), PIECE):
        part = slice(first, first + PIECE)
        parts = [tensor[part] for tensor in stored]
        if plan.method.name not in _PROPAGATING:
            plan.check_finite(name, parts)
        of_fishers = None if flat_fishers is None else [tensor[part] for tensor in flat_fishers]
        yield plan.method.apply(plan.piece(name, parts, fishers=of_fishers)).to(dtype)


class _Behind:
    """Does something with pieces on a thread of its own, a few pieces behind the caller; errors reach the caller."""

    def __init__(self, work: Callable[[torch.Tensor], None], ahead: int) -> None:
        self._work, self._ahead = work, ahead
        self._pool = ThreadPoolExecutor(1, "merge")
        self._waiting: collections.deque[Future[None]] = collections.deque()

    def put(self, piece: torch.Tensor) -> None:
        """Hands a piece over."""
        self._waiting.append(self._pool.submit(self._work, piece))
        if len(self._waiting) > self._ahead:
            self._waiting.popleft().result()

    def wait(self) -> None:
        """Waits until all is done."""
        while self._waiting:
            self._waiting.popleft().result()

    def __enter__(self) -> _Behind:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _threads(plan: MergePlan) -> Iterator[None]:
    """Leaves a core to writing and hashing: pieces in the cache gain little from a second thread."""
    before = torch.get_num_threads()
    if plan.elementwise:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _not_finite(plan: MergePlan, name: str) -> MergeError:
    """Returns the error for a result that is no number; raises it for the parent that is none."""
    plan.check_finite(name, plan.stored(name))
    return MergeError(
        "the merged weights are not finite",
        seen=name,
        rule="no NaN or infinity",
        fix="use smaller coefficients, or dtype=float32",
    )


def free_bytes(folder: Path) -> int:
    """Returns the room on the disk of a folder, or of the nearest parent that exists."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    found = os.statvfs(place)
    return found.f_bavail * found.f_frsize
