"""A base from a timm model: its features are timm's, what is resampled or dropped is told, other models are refused."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from momo.errors import CheckpointError, ConfigError
from momo.models import Architecture, build_mae, load_encoder, load_mae
from momo.pretrain.timm_models import read_timm
from momo.weights import load_card, load_weights, sha256_tensors
from tests.conftest import PICO
from tests.momo.base_helper import PICO_SHAPES, make, vit


def timm_folder(folder: Path, model, **config) -> Path:
    """A folder as timm.save_for_hf writes it."""
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    args = PICO_SHAPES | config.pop("model_args", {})
    text = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 10,
        "model_args": args,
        "pretrained_cfg": {
            "input_size": [3, 32, 32],
            "fixed_input_size": True,
            "num_classes": 10,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "license": "apache-2.0",
            **config,
        },
    }
    (folder / "config.json").write_text(json.dumps(text))
    return folder


def grey(size=32, batch=2):
    generator = torch.Generator().manual_seed(5)
    return torch.randn(batch, 1, size, size, generator=generator)


@pytest.mark.parametrize("in_chans", [1, 3])
def test_features_of_the_base_are_those_of_the_timm_model(tmp_path, in_chans):
    model = vit()
    folder = make(tmp_path, timm=f"local-dir:{timm_folder(tmp_path / 'vit', model)}", in_chans=in_chans)
    encoder, card = load_encoder(folder)
    image = grey()
    with torch.no_grad():
        wanted = model.forward_features(image.expand(-1, 3, -1, -1))
        found = encoder.forward_features(image.expand(-1, in_chans, -1, -1))
    assert torch.allclose(found, wanted, atol=2e-5), (found - wanted).abs().max()
    assert card.architecture == Architecture(size="pico", image_size=32, patch_size=8, in_chans=in_chans).to_dict()
    weight = load_weights(folder)[0]["patch_embed.proj.weight"]
    source = model.patch_embed.proj.weight
    assert torch.equal(weight, source if in_chans == 3 else source.sum(dim=1, keepdim=True))


def test_the_card_and_the_screen_tell_what_the_base_consists_of(tmp_path, capsys):
    model = vit()
    folder = make(tmp_path, timm=f"local-dir:{timm_folder(tmp_path / 'vit', model)}", licence=None, seed=8)
    card = load_card(folder, check_hash=True)
    stored = {n: t for n, t in model.state_dict().items() if not n.startswith("head.")}
    assert card.parents == [{"role": "source", "name": "local-dir:vit", "sha256": sha256_tensors(stored)}]
    assert card.base_sha256 is None and card.licence == "Apache-2.0"
    assert card.method["dropped"] == ["head.bias", "head.weight"]
    assert card.method["decoder"] == "seed" and "mask_token" in card.method["fresh"]
    text = capsys.readouterr().out
    for piece in (
        "54 encoder tensors, 0 decoder",
        "head.bias, head.weight",
        "summed from 3 to 1",
        "seed 8",
        card.sha256,
    ):
        assert piece in text, piece
    decoder = build_mae(PICO, seed=8).state_dict()["decoder_pred.weight"]
    assert torch.equal(load_weights(folder)[0]["decoder_pred.weight"], decoder)
    assert str(tmp_path) not in json.dumps(card.to_dict())


def test_learned_positions_take_the_place_of_the_fixed_ones_and_stay_fixed(tmp_path):
    model = vit()
    folder = make(tmp_path, timm=f"local-dir:{timm_folder(tmp_path / 'vit', model)}")
    mae, _ = load_mae(folder)
    assert torch.equal(mae.pos_embed, model.pos_embed) and not mae.pos_embed.requires_grad


def test_a_timm_folder_given_as_file_is_a_timm_model(tmp_path):
    folder = timm_folder(tmp_path / "vit", vit())
    a, b = make(tmp_path, name="a", file=str(folder)), make(tmp_path, name="b", timm=f"local-dir:{folder}")
    assert load_card(a).sha256 != "" and load_weights(a)[0].keys() == load_weights(b)[0].keys()
    assert torch.equal(load_weights(a)[0]["norm.bias"], load_weights(b)[0]["norm.bias"])


def test_another_image_and_patch_size_resample_and_say_so(tmp_path, capsys):
    model = vit()
    source = f"local-dir:{timm_folder(tmp_path / 'vit', model)}"
    tensors, card = load_weights(make(tmp_path, timm=source, image_size=64, patch_size=16, in_chans=3))
    assert tensors["patch_embed.proj.weight"].shape == (96, 3, 16, 16) and tensors["pos_embed"].shape == (1, 17, 96)
    assert torch.equal(tensors["pos_embed"], model.pos_embed)
    assert "patches resampled from 8 to 16 pixels" in card.method["adapted"]
    tensors, card = load_weights(make(tmp_path, name="c", timm=source, image_size=64))
    assert tensors["pos_embed"].shape == (1, 65, 96) and tensors["decoder_pos_embed"].shape == (1, 65, 64)
    assert "positions resampled from 4 x 4 to 8 x 8" in capsys.readouterr().out
    # timm's own resampling is the reference
    bigger = vit(img_size=64)
    timm.models.load_pretrained(
        bigger,
        {"state_dict": dict(model.state_dict()), "num_classes": 10, "input_size": (3, 32, 32)},
        num_classes=10,
        filter_fn=timm.models.vision_transformer.checkpoint_filter_fn,
    )
    assert torch.equal(tensors["pos_embed"], bigger.pos_embed)


def test_average_pooling_models_have_no_final_norm(tmp_path, capsys):
    args = {"global_pool": "avg"}
    folder = timm_folder(tmp_path / "vit", vit(**args), model_args=args)
    tensors, card = load_weights(make(tmp_path, timm=f"local-dir:{folder}"))
    assert torch.equal(tensors["norm.weight"], torch.ones(96)) and torch.equal(tensors["norm.bias"], torch.zeros(96))
    assert {"norm.weight", "norm.bias"} <= set(card.method["fresh"])
    assert {"fc_norm.weight", "fc_norm.bias"} <= set(card.method["dropped"])
    assert "new       final norm (1 and 0)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reg_tokens": 2}, "register tokens"),
        ({"init_values": 0.1}, "layer scale"),
        ({"qk_norm": True}, "qk_norm"),
        ({"class_token": False, "global_pool": "avg"}, "no class token"),
        ({"pre_norm": True}, "CLIP norm_pre"),
        ({"global_pool": "map"}, "attention pooling"),
        ({"scale_attn_norm": True}, "norms inside the blocks"),
        ({"act_layer": "quick_gelu"}, "activation other than exact GELU"),
        ({"qkv_bias": False}, "no bias in queries"),
        ({"num_heads": 4}, r"width, depth and heads \(96, 4, 4\)"),
        ({"depth": 5}, r"width, depth and heads \(96, 5, 3\)"),
    ],
)
def test_other_features_are_refused_with_the_reason(tmp_path, options, message):
    folder = timm_folder(tmp_path / "vit", vit(**options), model_args=options)
    with pytest.raises(CheckpointError, match=f"not one that momo can start from.*{message}"):
        make(tmp_path, timm=f"local-dir:{folder}")
    assert not (tmp_path / "base").exists()


def test_other_models_and_names_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="it is a ResNet, not a VisionTransformer"):
        make(tmp_path, timm="resnet10t")
    with pytest.raises(ConfigError, match="timm has no such model: vit_base_patch16_224.nose.*did you mean vit_base"):
        make(tmp_path, timm="vit_base_patch16_224.nose")
    with pytest.raises(CheckpointError, match="could not be loaded: local-dir:.*config.json.*check the folder"):
        make(tmp_path, timm=f"local-dir:{tmp_path}")


def test_a_timm_file_that_lacks_or_adds_tensors_is_refused_though_timm_would_take_it(tmp_path):
    folder = timm_folder(tmp_path / "vit", vit())
    tensors = load_file(folder / "model.safetensors")
    del tensors["blocks.2.attn.qkv.weight"], tensors["norm.bias"]
    save_file(tensors | {"blocks.0.ls1.gamma": torch.ones(96)}, folder / "model.safetensors")
    found = "layer scale.*qkv.weight is missing; norm.bias is missing; blocks.0.ls1.gamma is unexpected"
    with pytest.raises(CheckpointError, match=found):
        make(tmp_path, timm=f"local-dir:{folder}")
    (folder / "model.safetensors").write_bytes(b"no such thing")
    with pytest.raises(CheckpointError, match="could not be loaded"):
        make(tmp_path, timm=f"local-dir:{folder}")


class Hub(BaseHTTPRequestHandler):
    """As much of the Hugging Face hub as a download of single files needs."""

    files: dict = {}  # noqa: RUF012 - set by the test

    def do_HEAD(self):
        self.do_GET(body=False)

    def do_GET(self, body=True):
        content = self.files.get(self.path)
        self.send_response(200 if content is not None else 404)
        if content is None:
            self.send_header("X-Error-Code", "EntryNotFound")
        content = content or b""
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", "b" * 40)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A local server in the place of the hub; the way there is timm's and huggingface_hub's own."""
    constants = pytest.importorskip("huggingface_hub").constants
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    Hub.files = {}
    yield Hub.files
    server.shutdown()
    server.server_close()


def test_timm_models_come_through_the_hub(tmp_path, hub):
    folder, model = timm_folder(tmp_path / "vit", vit(), license="cc-by-nc-4.0"), vit()
    for name in ("config.json", "model.safetensors"):
        hub[f"/me/pico/resolve/main/{name}"] = (folder / name).read_bytes()
    tensors, card = load_weights(make(tmp_path, timm="hf-hub:me/pico", licence=None))
    assert torch.equal(tensors["blocks.1.mlp.fc1.weight"], model.blocks[1].mlp.fc1.weight)
    assert card.licence == "CC-BY-NC-4.0" and card.parents[0]["name"] == "hf-hub:me/pico"


def test_models_that_timm_names_come_through_the_hub_too(tmp_path, hub):
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=5)
    save_file(model.state_dict(), tmp_path / "tiny.safetensors")
    name = "vit_tiny_patch16_224.augreg_in21k"
    hub[f"/timm/{name}/resolve/main/model.safetensors"] = (tmp_path / "tiny.safetensors").read_bytes()
    source = read_timm(name)
    assert (source.name, source.licence, source.layer_norm_eps) == (name, "Apache-2.0", 1e-6)
    assert source.dropped == ["head.bias", "head.weight"] and len(source.tensors) == 150
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in source.tensors.items())


def test_a_failed_download_says_what_to_do(tmp_path, hub):
    message = (
        r"could not be loaded: vit_tiny_patch16_224\.augreg_in21k: .*404.*download the weights of timm/vit_tiny.*file="
    )
    with pytest.raises(CheckpointError, match=message):
        make(tmp_path, timm="vit_tiny_patch16_224.augreg_in21k")
    with pytest.raises(CheckpointError, match=r"could not be loaded: hf-hub:me/none: .*404"):
        make(tmp_path, timm="hf-hub:me/none")
