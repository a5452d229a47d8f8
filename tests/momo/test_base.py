"""A base from a seed or from a file of weights, and what `momo init` refuses."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from momo.errors import CheckpointError, ConfigError, DataError
from momo.models import Architecture, build_mae
from momo.pretrain.base import InitConfig, init
from momo.pretrain.timm_models import spdx
from momo.weights import load_card, load_weights
from tests.conftest import PICO, write_weights
from tests.momo.base_helper import make, vit

RGB = Architecture(size="pico", image_size=32, patch_size=8, in_chans=3)


def mae_file(path: Path, architecture=RGB, *, seed=3, args=None, **extra) -> Path:
    """A checkpoint as the MAE paper's and MOMO's code write them."""
    model = dict(build_mae(architecture, seed=seed).state_dict()) | extra
    content = {"model": model, "optimizer": {"state": {}}, "epoch": 3}
    torch.save(content | ({"args": argparse.Namespace(**args)} if args else {}), path)
    return path


# --- from a seed


def test_a_seed_alone_gives_the_seeds_model_and_the_same_bytes(tmp_path, capsys):
    shapes = {"size": "pico", "image_size": 32, "patch_size": 8}
    folder = init(InitConfig(out=str(tmp_path / "a"), seed=4, **shapes))
    expected = build_mae(PICO, seed=4).state_dict()
    tensors, card = load_weights(folder)
    assert tensors.keys() == expected.keys() and all(torch.equal(tensors[n], expected[n]) for n in expected)
    assert card.kind == "base" and card.contents == ["encoder", "decoder"] and card.parents == []
    assert card.method == {"name": "init", "source": None, "seed": 4, "decoder": "seed"}
    assert card.sha256 in capsys.readouterr().out
    again = init(InitConfig(out=str(tmp_path / "b"), seed=4, **shapes))
    assert (again / "card.json").read_bytes() == (folder / "card.json").read_bytes()


# --- from files


def test_a_file_of_momo_keeps_its_decoder_and_its_epsilon(tmp_path, capsys):
    args = {"which_instrument": ["CTX"], "mask_ratio": 0.75, "norm_pix_loss": False, "output_dir": "x"}
    path = mae_file(tmp_path / "m.pth", args=args, **{"lpips_fn.net.weight": torch.ones(3)})
    folder = make(tmp_path, file=str(path), in_chans=3, decoder="file")
    tensors, card = load_weights(folder)
    expected = build_mae(RGB, seed=3).state_dict()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    assert card.architecture["layer_norm_eps"] == 1e-5 and "MOMO" in card.method["layer_norm_eps"]
    assert card.objective == {"mask_ratio": 0.75, "norm_pix_loss": False}
    assert card.method["decoder"] == "file" and card.method["fresh"] == []
    assert {"lpips_fn.net.weight", "args (not weights)", "optimizer (not weights)"} <= set(card.method["dropped"])
    assert card.parents == [{"role": "source", "name": "m.pth", "sha256": card.parents[0]["sha256"]}]
    assert f"{len(expected) - 54} decoder tensors" in capsys.readouterr().out


def test_epsilon_of_other_files_is_timms_and_can_be_given(tmp_path):
    path = mae_file(tmp_path / "m.pth", args={"mask_ratio": 0.75})
    card = load_card(make(tmp_path, name="a", file=str(path)))
    assert card.architecture["layer_norm_eps"] == 1e-6 and "the file does not say" in card.method["layer_norm_eps"]
    card = load_card(make(tmp_path, name="b", file=str(path), layer_norm_eps=1e-5))
    assert card.architecture["layer_norm_eps"] == 1e-5 and card.method["layer_norm_eps"] == "given"


def test_a_decoder_that_does_not_fit_is_drawn_from_the_seed_or_refused(tmp_path, capsys):
    path = mae_file(tmp_path / "m.pth")
    tensors, card = load_weights(make(tmp_path, file=str(path), seed=6))
    assert torch.equal(tensors["decoder_embed.weight"], build_mae(PICO, seed=6).state_dict()["decoder_embed.weight"])
    assert card.method["decoder"] == "seed" and "decoder_pred.weight" in card.method["dropped"]
    assert "decoder not taken (decoder_pred.weight is (192, 64), not (64, 64)" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match=r"no decoder that fits: m\.pth: decoder_pred.weight is \(192, 64\)"):
        make(tmp_path, name="c", file=str(path), decoder="file")
    tensors, card = load_weights(make(tmp_path, name="d", file=str(path), in_chans=3, decoder="seed", seed=6))
    assert card.method["decoder"] == "seed" and "decoder not taken (decoder=seed)" in card.method["adapted"]


def test_a_decoder_moves_to_another_grid(tmp_path):
    path = mae_file(tmp_path / "m.pth")
    tensors, card = load_weights(make(tmp_path, file=str(path), in_chans=3, image_size=64))
    bigger = Architecture(size="pico", image_size=64, patch_size=8, in_chans=3)
    assert torch.equal(tensors["decoder_pos_embed"], build_mae(bigger, seed=0).state_dict()["decoder_pos_embed"])
    assert torch.equal(tensors["decoder_pred.weight"], build_mae(RGB, seed=3).state_dict()["decoder_pred.weight"])
    assert card.method["decoder"] == "file" and "decoder positions computed for 8 x 8" in card.method["adapted"]


def test_an_encoder_file_has_no_decoder_to_give(tmp_path):
    save_file(vit(num_classes=0).state_dict(), tmp_path / "e.safetensors")
    with pytest.raises(CheckpointError, match=r"no decoder that fits: e\.safetensors: no decoder tensors"):
        make(tmp_path, file=str(tmp_path / "e.safetensors"), decoder="file")


@pytest.mark.parametrize("prefix", ["", "module.", "encoder.", "module.backbone.", "_orig_mod."])
@pytest.mark.parametrize("nest", [[], ["model"], ["state_dict"], ["model", "state_dict"]])
def test_wrappers_and_prefixes_are_stripped(tmp_path, prefix, nest):
    content = {prefix + name: tensor for name, tensor in vit().state_dict().items()}
    for key in nest:
        content = {key: content}
    torch.save(content, tmp_path / "x.pt")
    tensors, card = load_weights(make(tmp_path, file=str(tmp_path / "x.pt"), in_chans=3))
    assert torch.equal(tensors["pos_embed"], vit().pos_embed)
    assert card.method["dropped"] == ["head.bias", "head.weight"]


def test_half_precision_is_converted_and_said(tmp_path):
    save_file({n: t.bfloat16() for n, t in vit().state_dict().items()}, tmp_path / "h.safetensors")
    tensors, card = load_weights(make(tmp_path, file=str(tmp_path / "h.safetensors")))
    assert tensors["norm.bias"].dtype == torch.float32
    assert "torch.bfloat16 converted to torch.float32" in card.method["adapted"]


def test_weights_of_momo_keep_what_their_card_says(tmp_path):
    old = write_weights(
        tmp_path / "old",
        seed=5,
        licence="CC0-1.0",
        samples=100,
        data_fingerprints={"CTX": "f"},
        objective={"mask_ratio": 0.6},
    )
    folder = make(tmp_path, file=str(old), licence=None)
    tensors, card = load_weights(folder)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in load_weights(old)[0].items())
    assert (card.licence, card.samples, card.synthetic, card.data_fingerprints) == ("CC0-1.0", 100, True, {"CTX": "f"})
    assert card.parents == [{"role": "source", "name": "old", "sha256": load_card(old).sha256}]
    assert card.kind == "base" and card.objective == {"mask_ratio": 0.6}
    same = load_card(make(tmp_path, name="by_file", file=str(old / "model.safetensors"), licence=None))
    assert same.parents[0]["sha256"] == card.parents[0]["sha256"]


# --- refusals


class Exploit:
    def __reduce__(self):
        return (os.system, ("touch hacked",))


def test_a_pickle_that_would_run_code_is_not_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": vit().state_dict(), "args": Exploit()}, tmp_path / "bad.pth")
    with pytest.raises(CheckpointError, match=r"holds more than data and was not read: .*asks for posix\.system"):
        make(tmp_path, file=str(tmp_path / "bad.pth"))
    torch.save(Exploit(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"holds more than data and was not read.*argparse\.Namespace"):
        make(tmp_path, file=str(tmp_path / "old.pth"))
    assert not (tmp_path / "hacked").exists() and not (tmp_path / "base").exists()


def test_every_problem_of_a_state_dict_is_listed(tmp_path):
    state = dict(vit().state_dict())
    del state["blocks.1.norm1.weight"], state["norm.bias"]
    state["blocks.2.mlp.fc1.weight"] = torch.zeros(96, 96)
    state["blocks.3.attn.qkv.bias"] = torch.full((288,), float("nan"))
    state["blocks.0.norm1.bias"] = torch.zeros(96, dtype=torch.int64)
    state["blocks.0.attn.q_norm.weight"] = torch.ones(32)
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(CheckpointError) as caught:
        make(tmp_path, file=str(tmp_path / "x.pth"))
    for piece in (
        "blocks.1.norm1.weight is missing",
        "norm.bias is missing",
        "blocks.2.mlp.fc1.weight is (96, 96), not (384, 96)",
        "blocks.3.attn.qkv.bias holds NaN or infinity",
        "blocks.0.norm1.bias is torch.int64, not floating point",
        "blocks.0.attn.q_norm.weight is unexpected",
        "normalised queries and keys (qk_norm)",
    ):
        assert piece in str(caught.value), piece


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("cls_token", None, "no class token.*cls_token is missing"),
        ("pos_embed", torch.zeros(1, 16, 96), r"pos_embed is \(1, 16, 96\), not \(1, 1 \+ a square"),
        ("pos_embed", torch.zeros(1, 17, 64), "pos_embed is of width 64, not 96"),
        ("patch_embed.proj.weight", torch.zeros(96, 4, 8, 8), "not .width, 1 or 3, side, side."),
        ("patch_embed.proj.weight", torch.zeros(64, 3, 8, 8), "proj.weight is of width 64, not 96"),
        ("cls_token", torch.zeros(1, 1, 100), "of no size that momo has: x.pth: width 100, depth 4"),
    ],
)
def test_shapes_that_cannot_be_a_plain_vit(tmp_path, name, tensor, message):
    state = dict(vit().state_dict())
    state.pop(name)
    torch.save(state | ({} if tensor is None else {name: tensor}), tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=message):
        make(tmp_path, file=str(tmp_path / "x.pth"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "no state dict was found: .*holds a list"),
        ({"a": 1, "b": torch.ones(1)}, "values that are no tensors: a"),
        ({}, "no tensors"),
        ({"x.w": torch.ones(1), "module.x.w": torch.ones(1)}, "same name once prefixes are stripped: x.w"),
    ],
)
def test_files_without_a_state_dict(tmp_path, content, message):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=message):
        make(tmp_path, file=str(tmp_path / "x.pth"))


def test_files_that_are_missing_damaged_or_of_another_kind(tmp_path):
    for name, content, message in (
        ("gone.pth", None, "the weights file does not exist"),
        ("a.npz", b"x", "of an unknown kind"),
        ("a.pth", b"x", "cannot be read|holds more than data"),
        ("a.pt", b"", "cannot be read"),
        ("a.safetensors", b"\x08\0\0\0\0\0\0\0{}", "cannot be read"),
    ):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            make(tmp_path, file=str(tmp_path / name))
    whole = mae_file(tmp_path / "m.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="cannot be read"):
        make(tmp_path, file=str(tmp_path / "cut.pth"))
    with pytest.raises(CheckpointError, match=r"does not name one weights file: .*a\.pth"):
        make(tmp_path, file=str(tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timm": "a", "file": "b"}, "a base has one source: timm=a and file=b"),
        ({"in_chans": 2}, "in_chans is out of range: 2"),
        ({"normalisation": "sensor_zscore"}, "a base has no sensor"),
        ({"decoder": "new"}, "decoder has an unknown value"),
        ({"size": "huge"}, "size has an unknown value"),
        ({"layer_norm_eps": 0.0}, "layer_norm_eps is out of range"),
    ],
)
def test_options_that_make_no_sense(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        make(tmp_path, **options)


def test_a_licence_is_needed_and_an_existing_base_stays(tmp_path):
    path = str(mae_file(tmp_path / "m.pth"))
    with pytest.raises(ConfigError, match="licence of the source is not known: file=.*add licence="):
        make(tmp_path, file=path, licence=None)
    with pytest.raises(ConfigError, match=r"size contradicts the source: size=base, m\.pth is pico"):
        make(tmp_path, file=path, size="base")
    folder = make(tmp_path, file=path)
    before = load_card(folder).sha256
    with pytest.raises(DataError, match="exists already"):
        make(tmp_path, file=path, seed=1)
    assert load_card(folder, check_hash=True).sha256 == before


def test_licences_become_spdx():
    assert [spdx(text) for text in ("apache-2.0", "mit", "apple amlr", None)] == [
        "Apache-2.0",
        "MIT",
        "LicenseRef-apple-amlr",
        None,
    ]


def test_the_same_source_gives_the_same_bytes(tmp_path):
    path = str(mae_file(tmp_path / "m.pth", args={"which_instrument": ["CTX"]}))
    a, b = (make(tmp_path, name=name, file=path, image_size=64) for name in "ab")
    assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()
    assert (a / "card.json").read_bytes() == (b / "card.json").read_bytes()
