"""Arithmetic that gives the same bits whatever the surroundings: IEEE float32, and one thread to an operation."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch

_ItemT = TypeVar("_ItemT")
_ResultT = TypeVar("_ResultT")


@contextlib.contextmanager
def exact_float32(device_type: str) -> Iterator[None]:
    """Computes in IEEE float32 inside: no autocast, no TF32 or bfloat16 products, no choice of kernels by timing.

    Args:
        device_type: `cpu` or `cuda`.
    """
    backends = torch.backends
    # Since torch 2.9 each operator has a setting of its own beside the older switches. Both are set, the older first,
    # because torch refuses to read a switch that contradicts its operators.
    leaves: list[Any] = [backends.cuda.matmul, getattr(backends.cudnn, "conv", None)]
    leaves += [getattr(backends.mkldnn, name, None) for name in ("matmul", "conv")]
    leaves = [leaf for leaf in leaves if hasattr(leaf, "fp32_precision")]
    operators = [leaf.fp32_precision for leaf in leaves]
    matmul, chosen = torch.get_float32_matmul_precision(), (backends.cudnn.benchmark, backends.cudnn.deterministic)
    convolutions: bool | None = None
    with contextlib.suppress(RuntimeError):
        convolutions = backends.cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision("highest")
        if convolutions is not None:
            backends.cudnn.allow_tf32 = False
        for leaf in leaves:
            leaf.fp32_precision = "ieee"
        backends.cudnn.benchmark, backends.cudnn.deterministic = False, True
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        if convolutions is not None:
            backends.cudnn.allow_tf32 = convolutions
        for leaf, precision in zip(leaves, operators, strict=True):
            leaf.fp32_precision = precision
        backends.cudnn.benchmark, backends.cudnn.deterministic = chosen


def map_exactly(
    function: Callable[[_ItemT], _ResultT], items: Iterable[_ItemT], device_type: str
) -> Iterator[_ResultT]:
    """Yields what a function makes of each item, in order; on a CPU several items are computed at once.

    A matrix product split among threads is summed in another order for another number of them, which depends on the
    cores and ranks of a machine. So here each item has one thread, and the threads share out the items: the same bits
    on any number of threads, at the price of as many items in memory.

    Args:
        function: Called in other threads on a CPU, without gradients.
        items: What it is called with.
        device_type: `cpu`, or another, where items are computed one after another.
    """
    if device_type != "cpu":
        yield from map(torch.no_grad()(function), items)
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads that start from now on keep to it
    try:
        with ThreadPoolExecutor(threads, thread_name_prefix="exact") as pool:
            waiting: deque[Future[_ResultT]] = deque()
            for item in items:
                waiting.append(pool.submit(torch.no_grad()(function), item))
                if len(waiting) > threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
    finally:
        torch.set_num_threads(threads)
