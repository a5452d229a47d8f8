from __future__ import annotations

import numpy as np
import pytest
import torch

from momo.errors import CheckpointError, EvalError
from momo.eval.config import DatasetConfig, ModelConfig
from momo.eval.datasets import open_dataset
from momo.eval.features import depth_indices, open_models, patch_tokens, pooled_features, prepare
from momo.eval.images import read_image, to_channels
from momo.models import Architecture, random_encoder
from momo.weights import load_card
from tests.conftest import PICO, write_weights
from tests.eval.labelled import write_classification

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = write_classification(tmp_path_factory.mktemp("sets") / "cls", size=20)
    return open_dataset(DatasetConfig(path=str(folder)))


def test_features_do_not_depend_on_the_batch_size(dataset, pico_weights):
    prepared = prepare(load_card(pico_weights), dataset, None)
    encoder = open_models([ModelConfig("a", weights=str(pico_weights))])[0].load(0, CPU)
    samples = dataset.splits["val"]
    one, many = (pooled_features(encoder, samples, prepared, pooling="mean", batch_size=size) for size in (1, 64))
    assert one.shape == (12, 96) and one == pytest.approx(many, abs=1e-5)
    cls = pooled_features(encoder, samples, prepared, pooling="cls", batch_size=64)
    assert np.abs(cls - many).max() > 0.01


def test_pooled_features_are_timms(dataset, pico_weights):
    prepared = prepare(load_card(pico_weights), dataset, None)
    encoder = open_models([ModelConfig("a", weights=str(pico_weights))])[0].load(0, CPU)
    image = torch.from_numpy(prepared(dataset.splits["val"][0]))[None]
    with torch.no_grad():
        padded = torch.nn.functional.pad(image, (0, 4, 0, 4))
        tokens = encoder.forward_features(padded)
    mean = pooled_features(encoder, dataset.splits["val"][:1], prepared, pooling="mean", batch_size=1)
    assert mean[0] == pytest.approx(tokens[0, 1:].mean(dim=0).numpy(), abs=1e-5)


def test_images_of_several_sizes_keep_their_order(dataset, pico_weights):
    prepared = prepare(load_card(pico_weights), dataset, None)
    encoder = open_models([ModelConfig("a", weights=str(pico_weights))])[0].load(0, CPU)
    small, large = dataset.splits["val"][:3], dataset.splits["test"][:3]
    mixed = [sample for pair in zip(small, large, strict=True) for sample in pair]

    def resized(sample):
        image = prepared(sample)
        return image[:, :16, :16] if sample in small else image

    expected = np.concatenate(
        [pooled_features(encoder, [sample], resized, pooling="mean", batch_size=1) for sample in mixed]
    )
    found = pooled_features(encoder, mixed, resized, pooling="mean", batch_size=4)
    assert found == pytest.approx(expected, abs=1e-5)


def test_random_models_vary_with_the_seed_alone(pico_weights):
    model = open_models([ModelConfig("trained", weights=str(pico_weights)), ModelConfig("random", random_init=True)])[1]
    first, again, other = (model.load(seed, CPU).state_dict()["blocks.0.mlp.fc1.weight"] for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert model.architecture == PICO and model.weights is None


def test_models_that_cannot_be_had(tmp_path, pico_weights):
    with pytest.raises(EvalError, match="a random model has nothing to be like: random.*set like"):
        open_models([ModelConfig("random", random_init=True)])
    with pytest.raises(CheckpointError, match="the weights are not there or not complete: .*none"):
        open_models([ModelConfig("a", weights=str(tmp_path / "none"))])
    folder = write_weights(tmp_path / "w")
    raw = bytearray((folder / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (folder / "model.safetensors").write_bytes(raw)
    with pytest.raises(CheckpointError, match="altered or damaged"):
        open_models([ModelConfig("a", weights=str(folder))])


def test_normalisation_comes_from_the_card(dataset, pico_weights):
    card = load_card(pico_weights)
    prepared = prepare(card, dataset, None)
    image = prepared(dataset.splits["train"][0])
    assert prepared.to_dict()["constants_from"] == "each image" and image.shape == (1, 20, 20)
    assert image.mean() == pytest.approx(0, abs=1e-5) and image.std() == pytest.approx(1, abs=0.02)


def test_sensor_constants_are_replaced_by_the_training_split(dataset, pico_weights):
    card = load_card(pico_weights)
    card.normalisation = {"policy": "sensor_zscore", "mean": 250.0, "std": 3.0, "clip": 4.0}
    said = prepare(card, dataset, None).to_dict()
    pixels = np.stack([read_image(sample.image)[0] for sample in dataset.splits["train"]]).astype(np.float64)
    assert said["constants_from"] == "training split of the dataset"
    assert said["mean"] == pytest.approx(pixels.mean()) and said["std"] == pytest.approx(pixels.std())


def test_channels():
    rgb = np.stack([np.full((2, 2), value, np.float32) for value in (10, 20, 30)])
    assert to_channels(rgb, 1)[0, 0, 0] == pytest.approx(0.299 * 10 + 0.587 * 20 + 0.114 * 30)
    assert to_channels(rgb, 3) is rgb
    assert to_channels(rgb[:1], 3).tolist() == [rgb[0].tolist()] * 3


def test_image_size_resizes_image_and_mask(dataset, pico_weights):
    prepared = prepare(load_card(pico_weights), dataset, 32)
    assert prepared(dataset.splits["train"][0]).shape == (1, 32, 32)


def test_tokens_of_several_depths():
    encoder = random_encoder(PICO, seed=0)
    assert depth_indices(encoder, 2) == [1, 3] and depth_indices(encoder, 3) == [0, 2, 3]
    assert depth_indices(encoder, 9) == [0, 1, 2, 3]
    image = torch.randn(2, 1, 20, 27)
    tokens = patch_tokens(encoder, image, 2)
    assert tokens.shape == (2, 3, 4, 2 * 96)
    last = encoder.forward_intermediates(image, indices=[3], intermediates_only=True, output_fmt="NCHW")[0]
    normed = torch.nn.functional.layer_norm(last.permute(0, 2, 3, 1), (96,))
    assert torch.allclose(tokens[..., 96:], normed, atol=1e-5)


def test_sizes_of_released_models():
    encoder = random_encoder(Architecture(size="tiny", image_size=32, patch_size=16), seed=0)
    assert depth_indices(encoder, 4) == [2, 5, 8, 11]
