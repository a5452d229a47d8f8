"""Writing a safetensors file front to back, so that no more of it than the present piece is in memory."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from momo.errors import MergeError
from momo.weights import TensorInfo

from .writer_process import SLOT, WriterProcess

BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "U8": 1, "I8": 1, "BOOL": 1}
"""Width of the dtypes that can be written."""


class SafetensorsWriter:
    """Writes a safetensors file front to back and hashes what it writes.

    Args:
        path: File to write.
        header: Shape and dtype of every tensor, in the order in which they will come.
        metadata: Texts for the file's metadata.
        behind: Leave writing and hashing to a second process, where the system has what it takes.
    """

    def __init__(
        self, path: Path, header: Mapping[str, TensorInfo], metadata: Mapping[str, str], *, behind: bool = False
    ) -> None:
        self._path = path
        self._stream = open(path, "wb", buffering=0)  # noqa: SIM115 - closed in __exit__
        self._digest = hashlib.sha256()
        self._behind: WriterProcess | None = None
        if behind and hasattr(os, "memfd_create"):
            try:
                self._behind = WriterProcess(self._stream.fileno())
            except OSError as error:
                print(f"note: no second process to write ({error}); this one does, which takes longer", file=sys.stderr)
        self._lent: int | None = None
        self._put(memoryview(_header_bytes(header, metadata)))

    def buffer(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        """Returns an uninitialised tensor (count,) to fill and write: best filled where it is written from.

        It may be used until the next call, or until it has been written.

        Raises:
            MergeError: What was written before could not be.
        """
        if self._behind is None or count * dtype.itemsize > SLOT:
            return torch.empty(count, dtype=dtype)
        with self._telling():
            slot = torch.frombuffer(self._behind.slot(), dtype=dtype, count=count)
        self._lent = slot.data_ptr()
        return slot

    def write(self, tensor: torch.Tensor) -> None:
        """Appends a tensor or a part of one.

        Raises:
            MergeError: It cannot be written.
        """
        if self._behind is not None and tensor.data_ptr() == self._lent:
            with self._telling():
                self._behind.put(tensor.numel() * tensor.element_size())
        else:
            self._put(tensor.detach().reshape(-1).contiguous().view(torch.uint8).numpy().data)
        self._lent = None

    def finish(self) -> str:
        """Returns the SHA-256 of the file, once all of it is written; nothing can be written after.

        Raises:
            MergeError: Something could not be written.
        """
        if self._behind is None:
            return self._digest.hexdigest()
        with self._telling():
            return self._behind.finish()

    def _put(self, piece: memoryview) -> None:
        with self._telling():
            if self._behind is not None:
                self._behind.write(piece)
                return
            while len(piece):
                done = self._stream.write(piece)
                assert done is not None
                self._digest.update(piece[:done])
                piece = piece[done:]

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
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
        if self._behind is not None:
            self._behind.close()
        self._stream.close()


def _header_bytes(header: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> bytes:
    content: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name, info in header.items():
        start, end = end, end + tensor_bytes(info)
        content[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [start, end]}
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    return len(text).to_bytes(8, "little") + text


def tensor_bytes(info: TensorInfo) -> int:
    """Returns the size of a tensor in a file."""
    size = BYTES[info.dtype]
    for side in info.shape:
        size *= side
    return size
