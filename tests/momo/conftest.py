"""A process group of one, so that a trainer runs in the test's own process; models and a corpus that files share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from momo.models import MaskedAutoencoder, build_mae
from momo.models.lpips import BACKBONE_FILE
from tests.conftest import PICO, write_corpus
from tests.momo.objective_helper import random_alexnet


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


@pytest.fixture(scope="session")
def wide_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 validation tiles of the products P3, P4 and P5."""
    return write_corpus(tmp_path_factory.mktemp("wide") / "c", val=20)


@pytest.fixture
def model() -> MaskedAutoencoder:
    return build_mae(PICO, seed=0)


@pytest.fixture(scope="session")
def alexnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("lpips", reason='the heads of LPIPS need pip install "momo[pretrain]"')
    path = tmp_path_factory.mktemp("alexnet") / BACKBONE_FILE
    torch.save(random_alexnet(), path)
    return path
