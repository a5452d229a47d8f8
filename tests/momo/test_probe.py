"""The kNN probe and the reconstructions: what is seen of a model while it learns."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import accuracy_score, f1_score

from momo.corpus import Corpus
from momo.errors import ConfigError, DataError
from momo.eval.config import KnnConfig
from momo.eval.probes import knn_predict as eval_knn_predict
from momo.models import build_mae
from momo.normalise import Normalisation
from momo.pretrain.probe import KnnProbe, knn_predict, read_grey, scores
from momo.pretrain.reconstruction import Reconstructions, picture_of
from momo.pretrain.validation_tiles import ValidationTiles
from tests.conftest import PICO

# --- kNN --------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Two classes that differ in the direction of their stripes, 12 + 6 images each."""
    rng = np.random.default_rng(0)
    wave = 127 + 80 * np.sin(np.arange(32) * 1.3)
    for split, count in (("train", 12), ("val", 6)):
        for name in ("across", "along"):
            (tmp_path / "set" / split / name).mkdir(parents=True)
            for number in range(count):
                image = np.tile(np.roll(wave, int(rng.integers(32))), (32, 1)) + rng.normal(scale=20, size=(32, 32))
                image = np.clip(image if name == "across" else image.T, 0, 255).astype(np.uint8)
                Image.fromarray(image).save(tmp_path / "set" / split / name / f"{number:03d}.png")
    return tmp_path / "set"


def test_probe_tells_classes_apart_and_gives_the_same_twice(folder):
    model = build_mae(PICO, seed=0).train()
    probe = KnnProbe(folder, Normalisation(), neighbours=5)
    found = probe.run(model)
    assert probe.classes == ["across", "along"]
    assert (found.train_images, found.val_images, found.classes, found.neighbours) == (24, 12, 2, 5)
    assert found.accuracy > 0.7 and found.weighted_f1 > 0.7
    assert model.training
    assert KnnProbe(folder, Normalisation(), neighbours=5).run(model) == found
    assert found.to_dict()["accuracy"] == found.accuracy


def test_features_are_the_mean_of_the_normed_patch_tokens(folder):
    model = build_mae(PICO, seed=0).eval()
    probe = KnnProbe(folder, Normalisation("per_tile_minmax"), neighbours=5)
    features = probe._features(model, "val")
    first = np.asarray(Image.open(folder / "val/across/000.png"), dtype=np.float32)
    image = torch.from_numpy(Normalisation("per_tile_minmax")(first, np.ones((32, 32), dtype=bool)))[None, None]
    with torch.no_grad():
        tokens = model.patch_embed(image) + model.pos_embed[:, 1:]
        tokens = torch.cat([model.cls_token + model.pos_embed[:, :1], tokens], dim=1)
        expected = model.norm(model.blocks(tokens))[0, 1:].mean(dim=0)
    assert features.shape == (12, 96)
    torch.testing.assert_close(features[0], expected, rtol=1e-4, atol=1e-5)


def test_three_channels_and_more_neighbours_than_images(folder):
    from momo.models import Architecture

    model = build_mae(Architecture(size="pico", image_size=32, patch_size=8, in_chans=3), seed=0)
    assert KnnProbe(folder, Normalisation(), neighbours=99).run(model).neighbours == 24


@pytest.mark.parametrize("k", [1, 4, 5, 20, 500])
def test_votes_are_those_of_the_evaluation(k):
    rng = np.random.default_rng(k)
    train, query = (rng.normal(size=(n, 6)).astype(np.float32) for n in (80, 1100))
    label = rng.integers(0, 5, 80)
    ours = knn_predict(torch.from_numpy(train), torch.from_numpy(label), torch.from_numpy(query), k=k, classes=5)
    assert np.array_equal(ours.numpy(), eval_knn_predict(train, label, query, KnnConfig(k=k, metric="cosine"), 5))


def test_a_tie_goes_to_the_nearest():
    train = torch.tensor([[1.0, 0.1], [1.0, 0.3], [1.0, 0.2], [1.0, 0.4]])
    predicted = knn_predict(train, torch.tensor([1, 0, 0, 1]), torch.tensor([[2.0, 0.0]]), k=4, classes=2)
    assert predicted.tolist() == [1]


def test_scores_are_those_of_sklearn():
    rng = np.random.default_rng(0)
    label, predicted = rng.integers(0, 4, 200), rng.integers(0, 3, 200)
    accuracy, weighted_f1 = scores(torch.from_numpy(label), torch.from_numpy(predicted), 4)
    assert accuracy == pytest.approx(accuracy_score(label, predicted))
    assert weighted_f1 == pytest.approx(f1_score(label, predicted, average="weighted"))


def test_images_of_every_kind_become_grey(tmp_path):
    grey = np.linspace(0, 255, 64, dtype=np.uint8).reshape(8, 8)
    alpha = np.full((8, 8), 255, dtype=np.uint8)
    alpha[0] = 0
    Image.fromarray(np.stack([grey, alpha], axis=-1), mode="LA").save(tmp_path / "alpha.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    Image.fromarray(np.stack([grey] * 3, axis=-1)).save(tmp_path / "rgb.png")
    value, valid = read_grey(tmp_path / "alpha.png", 8)
    assert not valid[0].any() and valid[1:].all() and (value[0] == 0).all() and (value[1:] == grey[1:]).all()
    assert read_grey(tmp_path / "deep.png", 8)[0].max() == 65535
    assert np.array_equal(read_grey(tmp_path / "rgb.png", 8)[0], grey)
    small, valid = read_grey(tmp_path / "alpha.png", 4)
    assert small.shape == valid.shape == (4, 4) and valid[1:].all()


def test_constants_of_a_sensor_are_refused(folder):
    with pytest.raises(ConfigError, match=r"cannot normalise its images.*sensor_zscore.*Next: leave telemetry\.probe"):
        KnnProbe(folder, Normalisation("sensor_zscore", mean=1.0, std=1.0), neighbours=5)


def test_a_folder_that_is_none_is_told(tmp_path, folder):
    def probe(path):
        return KnnProbe(path, Normalisation(), neighbours=5)

    with pytest.raises(DataError, match=r"folder has no classes: .*nowhere/train\. Rule: train/<class>/ and val/"):
        probe(tmp_path / "nowhere")
    (folder / "val/along").rename(folder / "val/dunes")
    with pytest.raises(DataError, match="splits have other classes: along, dunes"):
        probe(folder)
    (folder / "val/dunes").rename(folder / "val/along")
    for path in (folder / "val/along").iterdir():
        path.rename(path.with_suffix(".txt"))
    with pytest.raises(DataError, match="a class of the probe has no images: .*val/along"):
        probe(folder)
    for split in ("train", "val"):
        (folder / split / "along").rename(tmp_path / split)
    with pytest.raises(DataError, match="one class only: across"):
        probe(folder)


def test_a_damaged_image_is_told(folder):
    path = folder / "val/along/003.png"
    path.write_bytes(path.read_bytes()[:60])
    probe = KnnProbe(folder, Normalisation(), neighbours=5)
    with pytest.raises(DataError, match=r"an image of the probe cannot be read: .*val/along/003\.png"):
        probe.run(build_mae(PICO, seed=0))


# --- reconstructions --------------------------------------------------------------------------------------------


def subset(corpus, limit=8, **options):
    return ValidationTiles(Corpus(corpus), Normalisation(), patches=16, limit=limit, seed=1, **options)


def test_a_picture_shows_target_masked_and_painted(tiny_corpus):
    tiles = {"CTX": subset(tiny_corpus)}
    model = build_mae(PICO, seed=0).train()
    shown = Reconstructions(tiles, 3, in_chans=1)
    picture = shown.picture(model)
    assert picture.shape == (3 * 32 + 2 * 2, 3 * 32 + 2 * 2)
    assert picture.dtype == torch.float32 and picture.min() >= 0 and picture.max() <= 1
    assert torch.equal(picture, Reconstructions(tiles, 3, in_chans=1).picture(model)) and model.training
    assert len(set(shown.keys)) == 3
    target, masked, painted = (picture[:32, start : start + 32] for start in (0, 34, 68))
    assert not torch.equal(target, masked) and not torch.equal(painted, masked)
    # 12 of the 16 patches of 8 x 8 pixels are hidden, two of them are invalid and black.
    assert int((masked == 0.5).sum()) == 640
    unlearned = build_mae(PICO, seed=1)
    assert not torch.equal(shown.picture(unlearned)[:32, 68:100], painted)


def test_panels_hold_what_they_say():
    image = torch.arange(16.0).reshape(1, 1, 4, 4)
    valid = torch.ones(1, 4, 4, dtype=torch.bool)
    hidden = torch.zeros(1, 4, 4, dtype=torch.bool)
    valid[0, 0, 0], hidden[0, 3] = False, True
    picture = picture_of(image, torch.where(hidden[:, None], 100.0, image), valid, hidden)
    target, masked, painted = (picture[:, start : start + 4] for start in (0, 6, 12))
    assert picture.shape == (4, 16) and (picture[:, 4:6] == 1).all()
    assert target[0, 0] == masked[0, 0] == painted[0, 0] == 0
    assert (masked[3] == 0.5).all() and (painted[3] == 1).all()
    assert torch.equal(target[1:3], masked[1:3]) and torch.equal(target[1:3], painted[1:3])
    assert (target.flatten()[1:].diff() >= 0).all()


def test_a_flat_and_an_invalid_tile_can_be_shown():
    image = torch.ones(2, 1, 4, 4)
    valid = torch.ones(2, 4, 4, dtype=torch.bool)
    valid[1] = False
    picture = picture_of(image, image, valid, torch.zeros(2, 4, 4, dtype=torch.bool))
    assert (picture[:4, :4] == 0.5).all() and (picture[6:, :4] == 0).all()


def test_tiles_are_dealt_to_sensors_and_spread(tiny_corpus):
    tiles = {"CTX": subset(tiny_corpus), "THEMIS": subset(tiny_corpus, limit=2)}
    shown = Reconstructions(tiles, 6, in_chans=1)
    assert [key.split()[0] for key in shown.keys] == ["CTX"] * 4 + ["THEMIS"] * 2
    places = [tiles["CTX"].batch(range(p, p + 1)).keys[0] for p in (0, 2, 4, 6)]
    assert [key.split()[1] for key in shown.keys[:4]] == places
    assert len(Reconstructions(tiles, 99, in_chans=1).keys) == 10
    assert Reconstructions(tiles, 0, in_chans=1).picture(build_mae(PICO, seed=0)) is None
