"""A process group of one, so that a trainer runs in the test's own process."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch.distributed as dist


@pytest.fixture(scope="module")
def _group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    # One group for the module: DeepSpeed remembers the first one it sees.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    store = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def one_rank(_group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process group of one in this process, so that a trainer runs without starting another."""
    for key, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(key, value)
