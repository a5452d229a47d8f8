"""The YAML files of configs/ are complete, known and say how they are used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from momo.cli.commands import COMMANDS
from momo.config import load_config

CONFIGS = Path(__file__).parents[1] / "configs"
STAGES = {path.stem.replace("_", " "): path for path in CONFIGS.glob("*.yaml")}


def test_every_command_has_an_example():
    assert set(STAGES) == set(COMMANDS)


@pytest.mark.parametrize("name", STAGES)
def test_example_loads(name):
    schema, _ = COMMANDS[name].load()
    required = ["out=somewhere"] if name == "pretrain" else []
    assert load_config(schema, STAGES[name], required)
    assert f"momo {name} --config configs/{STAGES[name].name}" in STAGES[name].read_text()


def test_the_recipe_of_the_paper_loads():
    schema, _ = COMMANDS["prep"].load()
    config = load_config(schema, CONFIGS / "recipe" / "prep_momo.yaml", ["products=[raw]", "out=corpus", "sensor=CTX"])
    assert config.strata.tiles == 4_000_000 and config.split.by == "healpix" and config.tile_size == 224


def test_joint_training_loads():
    schema, _ = COMMANDS["pretrain"].load()
    path = CONFIGS / "recipe" / "pretrain_joint.yaml"
    config = load_config(schema, path, ["base=b", "out=o", "train.samples=300"])
    assert len(config.data.corpora) == 3 and config.train.samples == 300 and config.base == "b"
    assert all(f"{key}=" in path.read_text() for key in ("base", "out", "train.samples"))


@pytest.mark.parametrize("path", sorted((CONFIGS / "real").glob("*.yaml")), ids=lambda path: path.stem)
def test_real_data_configs_load(path, monkeypatch):
    monkeypatch.setenv("MOMO_REAL_DATA", "somewhere")
    schema, _ = COMMANDS[path.stem.split("_")[0]].load()
    extra = ["data.corpora=[c]"] if path.stem == "pretrain" else []
    assert load_config(schema, path, ["out=corpus", *extra])


@pytest.mark.parametrize("path", sorted((CONFIGS / "deepspeed").glob("*.json")), ids=lambda path: path.stem)
def test_deepspeed_files_are_json_with_their_stage(path):
    zero = json.loads(path.read_text())["zero_optimization"]
    assert zero["stage"] == int(path.stem.removeprefix("zero").removesuffix("_offload"))
    assert ("offload_optimizer" in zero) == path.stem.endswith("_offload")
