"""Merging by streams: mapped parents in, one safetensors file out, a piece at a time."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

from momo.errors import MergeError
from momo.machine import keep_freed_memory, usable_cores
from momo.weights import TensorInfo

from .plan import MergePlan, is_finite
from .safetensors_file import BYTES, SafetensorsWriter, tensor_bytes
from .writer_process import RING

PIECE = 2**18  # entries worked on together; of float32 they fill a slot of the process that writes
# NaN and infinity of a parent always reach the result, so looking at that is enough.
_PROPAGATING = frozenset({"task_arithmetic", "average", "weighted_average"})
_LONG = 64 * 2**20  # bytes of a result that are worth a second process to write and hash them


def output_header(plan: MergePlan) -> dict[str, TensorInfo]:
    """Returns shapes and dtypes of the result in the order of the file: wide dtypes first, then by name.

    Raises:
        MergeError: A tensor has a dtype that cannot be written.
    """
    infos = {}
    for name in plan.names:
        info = plan.info(name)
        if info.dtype not in BYTES:
            raise MergeError(
                "a tensor has a dtype that momo cannot write",
                seen=f"{name}: {info.dtype}",
                fix="leave it out: exclude and rest=drop",
            )
        infos[name] = info
    return dict(sorted(infos.items(), key=lambda item: (-BYTES[item[1].dtype], item[0])))


def output_bytes(plan: MergePlan) -> int:
    """Returns the size of the tensors of the result."""
    return sum(tensor_bytes(info) for info in output_header(plan).values())


def memory_bytes(plan: MergePlan) -> int:
    """Returns about how much memory the tensors take at most while streaming; mapped files not counted."""
    width = 8 if plan.config.precision == "fp64" else 4
    ring = RING if _is_long(plan) else 0
    if plan.elementwise:
        return 3 * PIECE * width + ring
    return ring + 3 * width * max(tensor_bytes(info) // BYTES[info.dtype] for info in output_header(plan).values())


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
    with SafetensorsWriter(path, header, metadata, behind=_is_long(plan)) as writer, _threads(plan):
        for name in header:
            for piece in _pieces(plan, name, writer.buffer):
                if not is_finite(piece):
                    raise _not_finite(plan, name)
                writer.write(piece)
                advance(piece.numel() * piece.element_size())
        return writer.finish()


def _is_long(plan: MergePlan) -> bool:
    """Says whether a second process writes and hashes the result."""
    return usable_cores() > 1 and output_bytes(plan) >= _LONG


def _pieces(plan: MergePlan, name: str, buffer: Callable[[int, torch.dtype], torch.Tensor]) -> Iterator[torch.Tensor]:
    """Yields a tensor of the result in flat parts; each may lie in a buffer that is taken back for the next."""
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
        out = buffer(parts[0].numel(), plan.arithmetic)
        yield plan.method.apply(plan.piece(name, parts, fishers=of_fishers, out=out)).to(dtype)


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
