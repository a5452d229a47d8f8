"""What this process may use of the machine: cores and memory."""

from __future__ import annotations

import ctypes
import os

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # mallopt's numbers, malloc.h of glibc


def keep_freed_memory() -> bool:
    """Asks the C library to keep freed memory in the process instead of handing it back to the system.

    Tensors of megabytes are otherwise mapped, zeroed and unmapped at every use: 3 to 8 % of a pretraining step of
    ViT-B/16 at batch 16 on a CPU (docs/performance.md).

    Returns:
        False where the C library is not glibc; nothing is changed then.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_MMAP_THRESHOLD, 2**30) and mallopt(_TRIM_THRESHOLD, 2**31 - 1))


def usable_cores() -> int:
    """Returns the cores this process may use, which a batch system or taskset may have limited."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
