"""A process group of one, so that a trainer runs in the test's own process, and a hand in its steps."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch.distributed as dist


@pytest.fixture(scope="session")
def _group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    # One group for the session: DeepSpeed remembers the first one it sees.
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


@pytest.fixture
def interfere(monkeypatch):
    """Runs a job and calls a function with the inputs of the step that begins at a sample."""
    from momo.pretrain import trainer as module
    from momo.pretrain.setup import store_config

    def run(config, at: int, act) -> bool:
        store_config(config)
        trainer = module.Trainer(config, rank=0, ranks=1)
        plain = module.to_inputs
        with monkeypatch.context() as patch:
            patch.setattr(
                module,
                "to_inputs",
                lambda batch, **o: act(*plain(batch, **o)) if trainer.samples == at else plain(batch, **o),
            )
            return trainer.train()

    return run
