from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors import safe_open

from momo.errors import CheckpointError
from momo.models import build_mae
from momo.weights import load_card, load_weights, read_header, save_weights, weights_paths
from tests.conftest import PICO, write_weights


def test_round_trip_keeps_every_tensor_and_the_card(tmp_path):
    folder = write_weights(tmp_path / "w", seed=2, licence="CC0-1.0")
    tensors, card = load_weights(folder)
    expected = build_mae(PICO, seed=2).state_dict()
    assert tensors.keys() == expected.keys() and "pos_embed" in tensors and "decoder_pos_embed" in tensors
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    assert card.licence == "CC0-1.0" and len(card.sha256) == 64
    assert read_header(folder)["cls_token"].shape == (1, 1, 96)


def test_card_stands_in_the_file_too(pico_weights):
    with safe_open(pico_weights / "model.safetensors", framework="pt") as file:
        inside = json.loads(file.metadata()["momo_card"])
        assert file.metadata()["format"] == "pt"
    card = load_card(pico_weights).to_dict()
    assert inside | {"sha256": card["sha256"]} == card


def test_same_weights_give_the_same_bytes(tmp_path):
    hashes = {load_card(write_weights(tmp_path / str(n))).sha256 for n in range(6)}
    assert len(hashes) == 1


def test_a_file_path_works_like_its_folder(pico_weights):
    assert weights_paths(pico_weights / "model.safetensors") == weights_paths(pico_weights)


def test_weights_that_are_not_finite_are_not_written(tmp_path, pico_weights):
    tensors, card = load_weights(pico_weights)
    tensors["norm.bias"][3] = float("inf")
    with pytest.raises(CheckpointError, match=r"refusing to write weights that are not finite: norm\.bias"):
        save_weights(tmp_path, tensors, card)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def copy(pico_weights, tmp_path):
    return shutil.copytree(pico_weights, tmp_path / "copy")


def test_missing_files(copy, tmp_path):
    with pytest.raises(CheckpointError, match=r"not there or not complete: .*model.safetensors"):
        load_card(tmp_path)
    (copy / "card.json").unlink()
    with pytest.raises(CheckpointError, match=r"not there or not complete: .*card.json"):
        load_card(copy)


def test_altered_truncated_and_foreign_files(copy):
    path = copy / "model.safetensors"
    raw = path.read_bytes()
    path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="altered or damaged"):
        load_weights(copy)
    path.write_bytes(raw[: len(raw) // 2])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_weights(copy, check_hash=False)
    path.write_bytes(b"\x80\x04\x95 a pickle")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_header(copy)


def test_unreadable_cards(copy):
    card = copy / "card.json"
    fields = json.loads(card.read_text())
    card.write_text(json.dumps(fields | {"format_version": 9}))
    with pytest.raises(CheckpointError, match="another format version: 9"):
        load_card(copy)
    card.write_text(json.dumps(fields | {"extra": 1}))
    with pytest.raises(CheckpointError, match=r"the card cannot be read.*extra"):
        load_card(copy)
    card.write_text("{")
    with pytest.raises(CheckpointError, match="the card is not JSON"):
        load_card(copy)


def test_a_card_that_is_no_object(tmp_path):
    folder = write_weights(tmp_path / "w")
    (folder / "card.json").write_text("[]")
    with pytest.raises(CheckpointError, match="the card cannot be read: .*card.json. Rule: it is one JSON object"):
        load_card(folder)
