"""Pictures of tiles, reconstructions and segmentations: what is drawn where."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from momo.corpus import Corpus
from momo.errors import EvalError
from momo.eval import load_results
from momo.eval.config import DatasetConfig
from momo.eval.datasets import open_dataset
from momo.eval.report_figures import forest_plot, run_plot, selection_plots, short_count, slug
from momo.eval.report_images import (
    HATCH_DARK,
    HATCH_LIGHT,
    HIDDEN,
    MOSAIC_SIDE,
    display_range,
    fit,
    load_shown_model,
    montage,
    normalisation_for,
    reconstructions,
    resize_nearest,
    tile_mosaic,
    to_rgb,
)
from momo.eval.report_inputs import read_run, read_selection
from momo.eval.report_overlays import class_colour, draw_classes, outline, overlays
from momo.eval.report_scores import build_comparisons
from momo.eval.reporting import default_models
from momo.models import Architecture
from momo.weights import load_card
from tests.conftest import PICO, write_corpus, write_weights
from tests.eval.report_fixtures import circles, write_results, write_run, write_selection


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return Corpus(write_corpus(tmp_path_factory.mktemp("c") / "ctx", tiles=12, val=6))


@pytest.fixture(scope="module")
def results_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("r")
    weights = {n: write_weights(root / n, seed=k) for k, n in enumerate(("base", "merged", "CTX"))}
    return write_results(root / "results", weights)


def colours(png):
    image = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
    return {tuple(int(v) for v in colour) for colour in image.reshape(-1, 3)}


def near(image_HW3, colour, tolerance=6):
    return (np.abs(image_HW3.astype(int) - np.array(colour)) <= tolerance).all(axis=-1)


def test_invalid_pixels_are_hatched_and_valid_ones_grey():
    value = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    valid = np.ones((16, 16), dtype=bool)
    valid[:8, :8] = False
    value[0, 0] = np.nan
    image = to_rgb(value, valid, (0.0, 1.0), side=64)
    assert image.shape == (64, 64, 3)
    corner, rest = image[:32, :32], image[32:]
    assert {tuple(c) for c in corner.reshape(-1, 3).tolist()} == {HATCH_DARK, HATCH_LIGHT}
    assert (rest[..., 0] == rest[..., 1]).all() and (rest[..., 1] == rest[..., 2]).all()
    assert image[-1, -1, 0] == 255


def test_hidden_pixels_are_flat_but_never_cover_the_hatch():
    valid = np.ones((8, 8), dtype=bool)
    valid[0] = False
    hidden = np.zeros((8, 8), dtype=bool)
    hidden[:4] = True
    image = to_rgb(np.zeros((8, 8), np.float32), valid, (0.0, 1.0), side=32, hidden_HW=hidden)
    assert near(image[4:16], HIDDEN, 0).all() and not near(image[:4], HIDDEN, 0).any()
    assert (image[16:] == 0).all()


def test_display_range_ignores_invalid_pixels_and_flat_tiles():
    value = np.full((4, 4), 5.0, dtype=np.float32)
    value[0, 0] = 1e9
    valid = np.ones((4, 4), dtype=bool)
    valid[0, 0] = False
    assert display_range(value, valid) == (4.5, 5.5)
    assert display_range(value, np.zeros((4, 4), dtype=bool)) == (0.0, 1.0)


@pytest.mark.parametrize(("side", "shape"), [(32, (192, 192)), (100, (100, 100)), (500, (192, 192))])
def test_images_are_enlarged_in_whole_steps_and_large_ones_reduced(side, shape):
    assert fit(np.zeros((side, side, 3), dtype=np.uint8)).shape[:2] == shape
    assert fit(np.zeros((side, side // 2, 3), dtype=np.uint8)).shape[1] in (
        shape[1] // 2,
        side // 2 * (192 // side or 1),
    )


def test_masks_are_resized_by_pixel_centres():
    mask = np.array([[0, 1], [2, 3]])
    assert resize_nearest(mask, 4, 4).tolist() == mask.repeat(2, 0).repeat(2, 1).tolist()
    assert resize_nearest(mask.repeat(4, 0).repeat(4, 1), 2, 2).tolist() == mask.tolist()


def test_mosaic_shows_as_many_tiles_as_asked_drawn_by_the_seed(corpus):
    gallery = tile_mosaic(corpus, count=8, seed=0)
    panels = [panel for row in gallery.rows for panel in row]
    assert [len(row) for row in gallery.rows] == [6, 2]
    assert gallery.text == "8 of 18 tiles of 32 × 32 pixels, 5 m a pixel, drawn at random."
    assert {panel.note for panel in panels} == {"", "88% valid"}
    for panel in panels:
        assert Image.open(io.BytesIO(panel.png)).size == (MOSAIC_SIDE, MOSAIC_SIDE)
        assert ("100%" in panel.alt) == (panel.note == "")
    assert tile_mosaic(corpus, count=8, seed=0) == gallery != tile_mosaic(corpus, count=8, seed=1)
    assert sum(len(row) for row in tile_mosaic(corpus, count=99, seed=0).rows) == 18
    assert Image.open(io.BytesIO(montage(gallery))).size == (6 * 168 + 8, 2 * 168 + 8)


def test_reconstructions_show_the_models_of_the_sensor_with_their_loss(corpus, tmp_path):
    paths = {
        "ours": write_weights(tmp_path / "ours", sensors=[{"name": "CTX", "tiles": 1}]),
        "theirs": write_weights(tmp_path / "theirs", sensors=[{"name": "THEMIS", "tiles": 1}]),
        "large": write_weights(tmp_path / "large", architecture=Architecture("pico", 64, 8)),
    }
    models = [load_shown_model(name, path) for name, path in paths.items()]
    skipped: list[str] = []
    gallery = reconstructions(corpus, models, count=2, seed=0, skipped=skipped)
    assert gallery.columns == ["input", "masked", "ours"] and len(gallery.rows) == 2
    assert skipped == ["large is not shown on CTX: it takes 64 px, the tiles have 32 px."]
    assert reconstructions(corpus, models[1:], count=2, seed=0, skipped=[]) is None
    whole, masked, painted = gallery.rows[0]
    assert HIDDEN in colours(masked.png) and HIDDEN not in colours(whole.png)
    assert "75% of it hidden" in masked.alt
    key = whole.alt.split()[-1]
    tile = next(t for i in range(6) if (t := corpus.read("val", i)).key == key)
    from momo.models import mask_noise, sample_rng

    image = torch.from_numpy(normalisation_for(models[0].card, "CTX")(tile.value_HW, tile.valid_HW))[None, None]
    noise = torch.from_numpy(mask_noise(sample_rng(key, 0, "mask"), PICO.patches))[None]
    with torch.no_grad():
        loss = float(models[0].model(image, torch.from_numpy(tile.valid_HW)[None], noise)[0])
    assert painted.note == f"error {loss:.3f}"


def test_standardised_patches_are_not_passed_off_as_painted_brightness(corpus, tmp_path):
    texts = []
    for name, objective in (("plain", {}), ("standardised", {"norm_pix_loss": True})):
        shown = load_shown_model(name, write_weights(tmp_path / name, objective=objective))
        texts.append(reconstructions(corpus, [shown], count=1, seed=0, skipped=[]).text)
    assert "taken from the true patch" not in texts[0] and "taken from the true patch" in texts[1]


def test_sensor_constants_of_a_card_are_used(tmp_path):
    card = load_card(write_weights(tmp_path / "w"))
    card.normalisation = {"policy": "sensor_zscore", "mean": None, "std": None, "clip": 4.0}
    card.sensors = [{"name": "CTX", "mean": 2.0, "std": 3.0}, {"name": "THEMIS", "mean": 200.0, "std": 9.0}]
    assert (normalisation_for(card, "THEMIS").mean, normalisation_for(card, "THEMIS").std) == (200.0, 9.0)
    card.normalisation = {"policy": "per_tile_zscore", "mean": None, "std": None, "clip": 4.0}
    assert normalisation_for(card, "CTX").mean is None


def test_outline_is_the_border_of_a_region_and_not_of_the_image():
    mask = np.zeros((6, 6), dtype=bool)
    mask[1:4, 1:4] = True
    expected = mask.copy()
    expected[2, 2] = False
    assert (outline(mask) == expected).all()
    assert not outline(np.ones((4, 4), dtype=bool)).any()


def test_classes_are_outlined_in_their_colours_and_tinted_when_filled():
    image, mask = np.full((32, 32), 100, np.uint8), np.zeros((32, 32), np.uint8)
    mask[4:12, 4:12], mask[20:28, 20:28] = 1, 2
    drawn, filled = (draw_classes(image, mask, filled=fill) for fill in (False, True))
    for index in (1, 2):
        region = resize_nearest(mask == index, *drawn.shape[:2])
        assert near(drawn, class_colour(index), 0)[region].sum() == near(drawn, class_colour(index), 0).sum() > 0
    centre = (8 * 6, 8 * 6)
    assert drawn[centre].tolist() == [100] * 3 and filled[centre].tolist() != [100] * 3
    assert class_colour(7) == class_colour(1)


def test_overlays_compare_models_on_the_kept_images(results_root):
    results, notes = load_results(results_root), []
    (gallery,) = overlays(results, models=["merged", "base", "absent"], count=3, folders={}, missing=notes)
    assert gallery.columns == ["image", "truth", "merged", "base"] and len(gallery.rows) == 3 and notes == []
    assert all("labelled" in row[1].note and row[1].note != "0.0% labelled" for row in gallery.rows)
    every = overlays(results, models=["base"], count=99, folders={}, missing=notes)[0]
    assert every.rows[-1][2].note == "nothing to find, nothing found"
    run = next(r for r in results if r.protocol == "decoder" and r.model == "base" and r.seed == 0)
    counts = run.load_predictions().counts_NCC[1]
    expected = counts[1, 1] / (counts.sum() - counts[0, 0])
    assert every.rows[0][2].note == f"IoU {expected:.2f}"
    assert "data/test/images/01.png" in every.rows[0][0].alt


def test_without_examples_the_dataset_folder_is_read_when_it_is_the_same(results_root, tmp_path):
    root = tmp_path / "results"
    shutil.copytree(results_root, root)
    shutil.rmtree(root / "examples")
    notes: list[str] = []
    assert overlays(load_results(root), models=["base"], count=2, folders={}, missing=notes) == []
    assert notes[0].startswith("demo-crater_seg: no segmentation is shown, because the RESULTS folder has no example")

    folder = tmp_path / "demo-crater_seg"
    image, mask = circles(np.random.default_rng(7), 12, 32)
    for split in ("train", "val", "test"):
        for kind, array in (("images", image), ("masks", mask)):
            (folder / "data" / split / kind).mkdir(parents=True)
            for number, one in enumerate(array):
                Image.fromarray(np.roll(one, len(split), axis=0)).save(
                    folder / "data" / split / kind / f"{number:02d}.png"
                )
    (folder / "mapping.json").write_text(json.dumps({"0": "background", "1": "crater"}))
    found = {"demo-crater_seg": folder}
    with pytest.raises(EvalError, match=r"a labelled dataset is not the one that was evaluated: .* Rule: the results"):
        overlays(load_results(root), models=["base"], count=2, folders=found, missing=notes)

    fingerprint = open_dataset(DatasetConfig(path=str(folder)), report=lambda line: None).fingerprint
    same = [dataclasses.replace(r, dataset_fingerprint=fingerprint) for r in load_results(root)]
    (gallery,) = overlays(same, models=["base"], count=2, folders=found, missing=notes)
    assert len(gallery.rows) == 2 and "data/test/images/" in gallery.rows[0][0].alt


def test_models_outlined_by_default(results_root):
    results = load_results(results_root)
    names = {result.model for result in results}
    assert set(default_models(results, set())) == names and default_models(results, set())[0] == "random"
    base = next(r.weights["sha256"] for r in results if r.model == "base")

    def kind(result, model, kind_name):
        return dataclasses.replace(result, model=model, weights={"sha256": model, "kind": kind_name, "method": None})

    many = [dataclasses.replace(r, weights={**r.weights, "kind": "checkpoint"} if r.weights else None) for r in results]
    many += [kind(results[0], "evl", "merged"), kind(results[0], "other", "checkpoint")]
    assert default_models(many, {base}) == ["random", "base", "evl"]


def test_plots_say_in_words_what_they_show(tmp_path, results_root):
    base = write_weights(tmp_path / "base")
    runs = {
        sensor: write_run(tmp_path / sensor, [sensor], seed=k, base=base) for k, sensor in enumerate(("CTX", "THEMIS"))
    }
    selection = read_selection(write_selection(tmp_path / "selection.yaml", runs, base))
    read = [read_run(sensor, run) for sensor, run in runs.items()]
    pictures = [*selection_plots(read, selection), *map(run_plot, read), run_plot(read_run("j", write_run(
        tmp_path / "joint", ["CTX", "THEMIS"])))]  # fmt: skip
    pictures += [forest_plot(comparison) for comparison in build_comparisons(load_results(results_root), [])]
    assert len({picture.name for picture in pictures}) == len(pictures)
    for picture in pictures:
        image = Image.open(io.BytesIO(picture.png))
        assert image.width > 800 and picture.png.count(b"tEXt") == 0
    assert "CTX at 2800 samples" in pictures[0].alt and "epsilon" in pictures[0].caption
    assert "lowest" in pictures[2].alt and "merged" in pictures[-1].alt
    without = dataclasses.replace(selection, epsilon=None)
    assert "epsilon" not in selection_plots([], without)[0].caption


def test_names_and_counts():
    assert slug("Démo set, kNN") == "d-mo-set-knn" and slug("…") == "x"
    assert [short_count(n) for n in (800, 1200, 2_500_000)] == ["800", "1.2k", "2.5M"]
