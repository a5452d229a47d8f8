"""Shared fixtures: tiny seeded corpora and pico weights, made once a session."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from momo.data_prep.shards import CorpusWriter, TileRecord
from momo.models import Architecture, build_mae
from momo.normalise import Normalisation
from momo.weights import Card, save_weights

torch.set_num_threads(1)
PICO = Architecture(size="pico", image_size=32, patch_size=8)


def write_corpus(
    folder: Path,
    *,
    sensor: str = "CTX",
    tiles: int = 24,
    val: int = 8,
    size: int = 32,
    dtype: str = "uint8",
    seed: int = 0,
    invalid: bool = True,
) -> Path:
    """Writes a corpus of smooth random tiles; every fourth has an invalid corner."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    writer = CorpusWriter(folder, sensor=sensor, tile_size=size, dtype=dtype, synthetic=True, tiles_per_shard=10)
    top = np.iinfo(dtype).max
    for number in range(tiles + val):
        ramp = np.add.outer(np.arange(size) * rng.normal(), np.arange(size) * rng.normal())
        field = ramp + rng.normal(scale=2.0, size=(size, size))
        field = (field - field.min()) / np.ptp(field)
        valid = np.ones((size, size), dtype=bool)
        if invalid and number % 4 == 0:
            valid[: size // 2, : size // 4] = False
        writer.add(
            TileRecord(
                key=f"{sensor}_{number:04d}",
                split="train" if number < tiles else "val",
                stored_HW=(field * top).astype(dtype),
                valid_HW=valid,
                meta={
                    "product_id": f"P{number // 8}",
                    "row": 0,
                    "col": number * size,
                    "gsd_m": 5.0,
                    "crs": "",
                    "lon": float("nan"),
                    "lat": float("nan"),
                    "quality": 0.5,
                    "scale": 0.01,
                    "offset_value": 1.0,
                    "unit": "",
                    "block": f"b{number // 8}",
                },
            )
        )
    writer.finish(products=[{"product_id": "P0", "source": "generated"}], prep={}, licence="CC0-1.0")
    return folder


def write_weights(folder: Path, *, seed: int = 0, architecture: Architecture = PICO, **card_fields: object) -> Path:
    """Writes pico MAE weights with a card."""
    folder.mkdir(parents=True)
    card = Card(
        kind="base",
        architecture=architecture.to_dict(),
        contents=["encoder", "decoder"],
        normalisation=Normalisation().to_dict(),
        synthetic=True,
        **card_fields,
    )
    save_weights(folder, build_mae(architecture, seed=seed).state_dict(), card)
    return folder


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpora") / "ctx")


@pytest.fixture(scope="session")
def pico_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_weights(tmp_path_factory.mktemp("weights") / "pico")


@pytest.fixture(scope="session")
def real_mars() -> Path:
    """Folder of the real products, or skip."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data" / "real_mars"
    folder = Path(os.environ.get("MOMO_REAL_DATA", default))
    if not (folder / "MANIFEST.csv").is_file():
        pytest.skip("real products not found: set MOMO_REAL_DATA to a folder with MANIFEST.csv")
    return folder
