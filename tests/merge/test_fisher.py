from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch.func import functional_call, grad, vmap

from momo.config import config_from_dict
from momo.corpus import Corpus
from momo.errors import CheckpointError, ConfigError, DataError, MergeError
from momo.files import sha256_file
from momo.merge import MergeConfig, merge
from momo.merge.fisher import FisherConfig, fisher, fisher_subset
from momo.models import Architecture, load_mae
from momo.models.masking import mask_noise, sample_rng
from momo.normalise import Normalisation
from momo.weights import load_card, load_weights, save_weights
from tests.conftest import PICO, write_corpus, write_weights

TILES = 9


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_corpus):
    """Weights that name the corpus as theirs."""
    fingerprint = Corpus(tiny_corpus).manifest.fingerprint
    return write_weights(tmp_path_factory.mktemp("fisher") / "w", seed=3, data_fingerprints={"CTX": fingerprint})


def run(weights, corpora, out, **options):
    return fisher(FisherConfig(weights=str(weights), corpora=[str(c) for c in corpora], out=str(out), **options))


def inputs(corpus, split, positions, seed):
    """Network input of tiles, from their physical values and the definition of the policy."""
    images, valids, noises = [], [], []
    for position in positions:
        tile = Corpus(corpus).read(split, int(position))
        images.append(Normalisation()(tile.value_HW, tile.valid_HW)[None])
        valids.append(tile.valid_HW)
        noises.append(mask_noise(sample_rng(tile.key, seed, "fisher mask"), PICO.patches))
    return tuple(torch.from_numpy(np.stack(part)) for part in (images, valids, noises))


def by_vmap(weights, image, valid, noise):
    """Mean squared per-sample gradients by torch.func, with the other attention kernel."""
    model, _ = load_mae(weights, attention="sdpa")
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(parameters, image_CHW, valid_HW, noise_N):
        return functional_call(model, parameters, (image_CHW[None], valid_HW[None], noise_N[None]))[0]

    gradients = vmap(grad(loss), in_dims=(None, 0, 0, 0))(trained, image, valid, noise)
    return {name: g.double().square().mean(dim=0) for name, g in gradients.items()}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("split", ["train", "val"])
def test_is_the_mean_of_squared_gradients_of_single_tiles(trained, tiny_corpus, tmp_path, split):
    count = TILES if split == "train" else 8
    found = load_file(run(trained, [tiny_corpus], tmp_path / "f.safetensors", samples=TILES, seed=5, split=split))
    positions = fisher_subset(Corpus(tiny_corpus), split, TILES, 5)
    assert len(set(positions.tolist())) == count
    expected = by_vmap(trained, *inputs(tiny_corpus, split, positions, 5))
    for name, square in expected.items():
        scale = square.max().clamp(min=1e-12)
        torch.testing.assert_close(found[name].double() / scale, square / scale, atol=2e-4, rtol=0, msg=name)
    assert all((tensor >= 0).all() and tensor.dtype == torch.float32 for tensor in found.values())


def test_tensors_that_are_not_trained_are_one_and_every_name_is_there(trained, tiny_corpus, tmp_path, capsys):
    found = load_file(run(trained, [tiny_corpus], tmp_path / "f.safetensors", samples=2))
    weights, _ = load_weights(trained)
    assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in weights.items()}
    ones = {name for name, tensor in found.items() if (tensor == 1).all()}
    assert ones == {"pos_embed", "decoder_pos_embed"}
    printed = capsys.readouterr().out
    assert "2 of" in printed and "are not trained: 1" in printed and "CTX" in printed and "OTHER TILES" not in printed


def test_metadata_names_checkpoint_and_tiles(trained, tiny_corpus, tmp_path):
    out = run(trained, [tiny_corpus], tmp_path / "f.safetensors", samples=3, seed=7)
    with safe_open(out, framework="pt") as file:
        told = json.loads(file.metadata()["momo_fisher"])
    assert told["checkpoint_sha256"] == sha256_file(trained / "model.safetensors")
    assert (told["samples"], told["seed"], told["split"]) == (3, 7, "train")
    fingerprint = Corpus(tiny_corpus).manifest.fingerprint
    assert told["corpora"] == [{"sensor": "CTX", "fingerprint": fingerprint, "samples": 3}]


def test_same_bytes_again_and_on_any_number_of_threads(trained, tiny_corpus, tmp_path):
    hashes = []
    for number, threads in enumerate((1, 1, 3)):
        torch.set_num_threads(threads)
        try:
            hashes.append(sha256_file(run(trained, [tiny_corpus], tmp_path / f"{number}.safetensors", samples=6)))
        finally:
            torch.set_num_threads(1)
    assert len(set(hashes)) == 1
    other = run(trained, [tiny_corpus], tmp_path / "other.safetensors", samples=6, seed=1)
    assert sha256_file(other) not in hashes


def test_tiles_of_several_corpora_count_alike(trained, tiny_corpus, tmp_path, capsys):
    second = write_corpus(tmp_path / "themis", sensor="THEMIS", tiles=4, val=2, seed=8)
    one = load_file(run(trained, [tiny_corpus], tmp_path / "1.safetensors", samples=8))
    two = load_file(run(trained, [second], tmp_path / "2.safetensors", samples=8))
    both = load_file(run(trained, [tiny_corpus, second], tmp_path / "b.safetensors", samples=8))
    for name in ("blocks.0.attn.qkv.weight", "decoder_pred.bias", "cls_token"):
        torch.testing.assert_close(both[name], (8 * one[name] + 4 * two[name]) / 12, rtol=1e-4, atol=1e-12)
    assert "THEMIS            4" in capsys.readouterr().out


def test_tiles_the_checkpoint_was_not_trained_on_are_said(trained, tmp_path, capsys):
    other = write_corpus(tmp_path / "ctx", tiles=3, val=2, seed=9)
    strange = write_corpus(tmp_path / "themis", sensor="THEMIS", tiles=3, val=2, seed=8)
    run(trained, [other, strange], tmp_path / "f.safetensors", samples=1)
    printed = capsys.readouterr().out
    assert "OTHER TILES than the checkpoint was trained on" in printed
    assert "NOT A SENSOR the checkpoint was trained on" in printed


def test_the_loss_of_the_card_is_used(tiny_corpus, tmp_path):
    plain = write_weights(tmp_path / "plain", seed=3)
    combined = write_weights(
        tmp_path / "combined", seed=3, objective={"mask_ratio": 0.75, "norm_pix_loss": False, "loss": {"gradient": 1.0}}
    )
    a, b = (load_file(run(w, [tiny_corpus], tmp_path / f"{w.name}.safetensors", samples=2)) for w in (plain, combined))
    assert not torch.allclose(a["decoder_pred.weight"], b["decoder_pred.weight"], rtol=0.1, atol=0)


def test_merging_by_the_files(tiny_corpus, tmp_path):
    folders = {name: write_weights(tmp_path / name, seed=seed) for name, seed in (("a", 3), ("b", 4))}
    files = {name: run(w, [tiny_corpus], tmp_path / f"{name}.safetensors", samples=4) for name, w in folders.items()}
    config = {"models": {name: str(w) for name, w in folders.items()}, "out": str(tmp_path / "merged")}
    out = merge(MergeConfig(**config, method="fisher", fisher={name: str(f) for name, f in files.items()}))
    merged, a, b = (load_weights(folder)[0] for folder in (out, *folders.values()))
    fisher_a, fisher_b = (load_file(file) for file in files.values())
    for name in ("decoder_pred.weight", "blocks.1.mlp.fc1.weight", "pos_embed"):
        f, g = (fisher[name].double().clamp(min=1e-12) for fisher in (fisher_a, fisher_b))
        torch.testing.assert_close(merged[name].double(), (f * a[name] + g * b[name]) / (f + g), rtol=1e-5, atol=1e-6)
    swapped = {"a": str(files["b"]), "b": str(files["a"])}
    with pytest.raises(MergeError, match="a Fisher file is of another checkpoint"):
        merge(MergeConfig(**(config | {"out": str(tmp_path / "m2")}), method="fisher", fisher=swapped))


def test_refusals_before_any_work(trained, tiny_corpus, tmp_path):
    out = tmp_path / "f.safetensors"
    encoder = tmp_path / "encoder"
    encoder.mkdir()
    tensors, card = load_weights(trained)
    card.contents = ["encoder"]
    save_weights(encoder, tensors, card)
    with pytest.raises(CheckpointError, match=r"the weights have no decoder: .*holds encoder.*give a checkpoint of a"):
        run(encoder, [tiny_corpus], out)
    wide = write_weights(tmp_path / "wide", architecture=Architecture(size="pico", image_size=64, patch_size=8))
    with pytest.raises(CheckpointError, match=r"do not fit the tiles: .*takes 64 pixels.*have 32.*tile_size=64"):
        run(wide, [tiny_corpus], out)
    empty = write_corpus(tmp_path / "empty", tiles=3, val=0)
    with pytest.raises(DataError, match="the corpus has no val tile"):
        run(trained, [empty], out, split="val")
    assert not out.exists()
    out.write_bytes(b"mine")
    with pytest.raises(DataError, match=r"the output exists already.*choose another `out`"):
        run(trained, [tiny_corpus], out)
    assert out.read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "samples is out of range: 0"),
        ({"split": "tests"}, "split has an unknown value: 'tests'"),
        ({"corpora": []}, "no corpus is given"),
        ({"out": "f.pt"}, "Fisher information is one file: f.pt"),
    ],
)
def test_bad_keys(options, message):
    with pytest.raises(ConfigError, match=message):
        config_from_dict(FisherConfig, {"weights": "w", "corpora": ["c"], "out": "f.safetensors"} | options)


def test_a_gradient_that_is_not_finite_is_an_error_and_leaves_no_file(trained, tiny_corpus, tmp_path):
    tensors, card = load_weights(trained)
    tensors["decoder_pred.weight"] = tensors["decoder_pred.weight"] * 1e30
    folder = tmp_path / "burst"
    folder.mkdir()
    save_weights(folder, tensors, card)
    with pytest.raises(CheckpointError, match=r"a gradient is not finite: .* on tile CTX_\d+, loss inf"):
        run(folder, [tiny_corpus], tmp_path / "f.safetensors", samples=2)
    assert not list(tmp_path.glob("*f.safetensors*"))
    assert load_card(folder).sha256
