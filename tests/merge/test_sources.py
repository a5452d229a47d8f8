"""Opening the weights of a merge: every kind of place, and every way to be damaged."""

from __future__ import annotations

import json
import os
import pickle

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from momo.errors import CheckpointError, ConfigError
from momo.files import sha256_file
from momo.merge import MergeConfig, merge, open_source
from momo.weights import load_card, load_weights
from tests.conftest import write_weights


@pytest.fixture
def weights(tmp_path):
    return write_weights(tmp_path / "weights")


def test_a_folder_and_its_file_are_the_same(weights):
    tensors, card = load_weights(weights)
    for place in (weights, str(weights / "model.safetensors")):
        source = open_source(place)
        assert source.sha256 == card.sha256 and source.licence == card.licence
        assert source.header.keys() == tensors.keys()
        assert all(torch.equal(source.tensor(name), tensor) for name, tensor in tensors.items())


def test_a_file_without_card_is_hashed(weights, tmp_path):
    (tmp_path / "plain").mkdir()
    path = tmp_path / "plain/some.safetensors"
    os.link(weights / "model.safetensors", path)
    source = open_source(path.parent)
    assert source.card is None and source.licence is None and source.sha256 == sha256_file(path)


def shard(weights, folder):
    tensors = load_file(weights / "model.safetensors")
    folder.mkdir()
    names = sorted(tensors)
    parts = {"a-1.safetensors": names[::2], "a-2.safetensors": names[1::2]}
    for file, chosen in parts.items():
        save_file({name: tensors[name] for name in chosen}, folder / file)
    index = {"weight_map": {name: file for file, chosen in parts.items() for name in chosen}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return tensors, index


def test_shards_with_an_index(weights, tmp_path):
    tensors, _ = shard(weights, tmp_path / "shards")
    source = open_source(tmp_path / "shards")
    assert source.header.keys() == tensors.keys() and len(source.sha256) == 64
    assert all(torch.equal(source.tensor(name), tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("changed", ["a-1.safetensors", "a-2.safetensors"])
def test_every_shard_counts_for_the_hash(weights, tmp_path, changed):
    shard(weights, tmp_path / "shards")
    before = open_source(tmp_path / "shards").sha256
    path = tmp_path / "shards" / changed
    save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path)
    assert open_source(tmp_path / "shards").sha256 != before


def test_shards_merge_like_one_file(weights, tmp_path):
    other = write_weights(tmp_path / "other", seed=1)
    shard(weights, tmp_path / "shards")
    merged = []
    for number, place in enumerate((weights, tmp_path / "shards")):
        out = tmp_path / f"merged{number}"
        merge(MergeConfig(models={"a": str(place), "b": str(other)}, method="average", out=str(out)))
        merged.append(load_weights(out)[0])
    assert all(torch.equal(merged[1][name], tensor) for name, tensor in merged[0].items())
    assert load_card(out).licence == "CC-BY-4.0 AND NOASSERTION"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder, index: (folder / "a-1.safetensors").unlink(), "shards are missing: .*a-1.safetensors"),
        (lambda folder, index: index["weight_map"].pop("cls_token"), "the index and its shards differ: .*cls_token"),
        (lambda folder, index: index.pop("weight_map"), "the index of shards cannot be read"),
    ],
)
def test_damaged_shards(weights, tmp_path, change, message):
    folder = tmp_path / "shards"
    _, index = shard(weights, folder)
    change(folder, index)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=message):
        open_source(folder)


def test_a_timm_model(tmp_path):
    torch.manual_seed(0)
    name = "vit_tiny_patch16_224"
    model = timm.create_model(name, num_classes=0)
    folder = tmp_path / "tiny"
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    config = {"architecture": name, "num_classes": 0, "pretrained_cfg": {"license": "apache-2.0"}}
    (folder / "config.json").write_text(json.dumps(config))
    source = open_source(f"timm:local-dir:{folder}")
    assert source.licence == "Apache-2.0" and source.header["cls_token"].shape == (1, 1, 192)
    assert torch.equal(source.tensor("norm.weight"), model.state_dict()["norm.weight"])


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_a_state_dict_of_torch_and_one_with_code(weights, tmp_path):
    tensors = load_file(weights / "model.safetensors")
    torch.save(tensors, tmp_path / "plain.pth")
    assert torch.equal(open_source(tmp_path / "plain.pth").tensor("cls_token"), tensors["cls_token"])
    content = {"cls_token": tensors["cls_token"], "more": Evil(str(tmp_path / "ran"))}
    torch.save(content, tmp_path / "zip.pth")
    (tmp_path / "bare.pth").write_bytes(pickle.dumps(content))
    for name in ("zip.pth", "bare.pth"):
        with pytest.raises(CheckpointError, match="the file holds more than data and was not read"):
            open_source(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_a_pickle_called_safetensors(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(CheckpointError, match="the weights file cannot be read"):
        open_source(tmp_path / "x.safetensors")


@pytest.mark.parametrize("kept", [4, 100, -1])
def test_a_truncated_file(weights, kept):
    path = weights / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match="the weights file cannot be read"):
        open_source(weights)


def test_places_that_are_not_clear(weights, tmp_path):
    with pytest.raises(CheckpointError, match="the weights are not there"):
        open_source(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="it is not clear which weights are meant: .*no safetensors file"):
        open_source(tmp_path / "empty")
    for name in ("a", "b"):
        os.link(weights / "model.safetensors", tmp_path / f"empty/{name}.safetensors")
    with pytest.raises(
        CheckpointError, match="it is not clear which weights are meant: .*a.safetensors, b.safetensors"
    ):
        open_source(tmp_path / "empty")
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/config.yaml").touch()
    with pytest.raises(CheckpointError, match="this is a run, not a checkpoint"):
        open_source(tmp_path / "run")
    with pytest.raises(ConfigError, match="no_such_model"):
        open_source("timm:no_such_model")
