"""The labelled synthetic sets: Mars-Bench layout, true masks, ground of their own."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from momo.data_prep.world import WorldConfig, make_world
from momo.data_prep.world.config import LANDFORM_CLASSES
from momo.data_prep.world.craters import rim_distance
from momo.data_prep.world.ground import Ground
from momo.data_prep.world.labelled import CRATER_SET, LANDFORM_SET, crater_mask, photograph
from momo.data_prep.world.noise import Grid
from momo.data_prep.world.products import ORIGIN_EASTING_M, ORIGIN_NORTHING_M

pytest.importorskip("osgeo.gdal")
SPLITS = ("train", "val", "test")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("world") / "w"
    return make_world(
        WorldConfig(out=out, seed=5, products=1, tiles_per_product=12, crater_images=20, landform_images=35)
    )


@pytest.fixture(scope="module")
def facts(world: Path) -> dict:
    return json.loads((world / "world.json").read_text())


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def test_segmentation_layout_is_that_of_mars_bench(world: Path):
    root = world / "labelled" / CRATER_SET
    assert json.loads((root / "mapping.json").read_text()) == {"0": "background", "1": "crater"}
    assert sorted(path.name for path in root.iterdir()) == [
        "README.txt",
        "data",
        "dataset.json",
        "mapping.json",
        "partitions",
    ]
    for split, count in zip(SPLITS, (20, 6, 10), strict=True):
        images = sorted(path.name for path in (root / "data" / split / "images").iterdir())
        masks = sorted(path.name for path in (root / "data" / split / "masks").iterdir())
        assert images == masks and len(images) == count
        for name in images:
            picture = Image.open(root / "data" / split / "images" / name)
            mask = np.asarray(Image.open(root / "data" / split / "masks" / name))
            assert picture.mode == "L" and picture.size == (64, 64)
            assert mask.shape == (64, 64) and mask.dtype == np.uint8 and set(np.unique(mask)) <= {0, 1}
    half = rows_of(root / "partitions" / "0.50x_partition.csv")
    assert list(half[0]) == ["file_id", "split"]
    assert [sum(row["split"] == split for row in half) for split in SPLITS] == [10, 6, 10]


def test_most_segmentation_images_hold_a_crater_and_some_none(world: Path):
    masks = [np.asarray(Image.open(p)) for p in (world / "labelled" / CRATER_SET).glob("data/*/masks/*.png")]
    filled = [mask.any() for mask in masks]
    assert 0.7 < np.mean(filled) < 0.9
    assert all(mask.mean() < 0.7 for mask in masks)


@pytest.mark.parametrize("name", [CRATER_SET, LANDFORM_SET])
def test_sets_say_that_they_are_synthetic(world: Path, name: str):
    facts = json.loads((world / "labelled" / name / "dataset.json").read_text())
    assert facts == {"synthetic": True, "sensor": "CTX", "gsd_m": 6.0, "licence": "CC0-1.0"}


def test_masks_are_the_rims_of_the_catalogue(world: Path, facts: dict):
    ground = Ground(5, facts["config"]["crater_density"])
    entry = next(entry for entry in facts["labelled"] if entry["dataset"] == CRATER_SET)
    checked = 0
    for image in entry["images"]:
        west, north = image["footprint"][0][0] - ORIGIN_EASTING_M, image["footprint"][0][1] - ORIGIN_NORTHING_M
        expected = np.zeros((64, 64), dtype=bool)
        craters = ground.craters((west, north - 384, west + 384, north), 30.0, reach=2.0)
        craters = craters.where(craters.age <= 0.7)
        x = west + (np.arange(64) + 0.5)[None, :] * 6
        y = north - (np.arange(64) + 0.5)[:, None] * 6
        for n in range(len(craters)):
            dx, dy = x - craters.x[n], y - craters.y[n]
            angle = np.arctan2(dy, dx)
            outline = 1 + craters.c2[n] * np.cos(2 * angle) + craters.s2[n] * np.sin(2 * angle)
            outline = outline + craters.c3[n] * np.cos(3 * angle)
            expected |= np.hypot(dx, dy) < craters.diameter[n] / 2 * outline
        path = world / "labelled" / CRATER_SET / "data" / image["split"] / "masks" / image["file_id"]
        mask = np.asarray(Image.open(path)) == 1
        assert (mask != expected).sum() <= 1  # float32 on the rim itself
        checked += int(mask.any())
    assert checked > 20


def test_crater_floor_is_darker_towards_the_sun_in_the_labelled_images(world: Path, facts: dict):
    """Image and mask fit each other: the lit wall lies away from the sun inside the mask's largest craters."""
    ground = Ground(5, facts["config"]["crater_density"])
    entry = next(entry for entry in facts["labelled"] if entry["dataset"] == CRATER_SET)
    agree = []
    for image in entry["images"]:
        west, north = image["footprint"][0][0] - ORIGIN_EASTING_M, image["footprint"][0][1] - ORIGIN_NORTHING_M
        grid = Grid.of(west, north, 6.0, 64, 64)
        craters = ground.craters(grid.bounds, 48.0, reach=-1.0)
        craters = craters.where(craters.age < 0.7)
        path = world / "labelled" / CRATER_SET / "data" / image["split"] / "images" / image["file_id"]
        picture = np.asarray(Image.open(path)).astype(float)
        azimuth = np.radians(image["sun_azimuth_deg"])
        for n in range(len(craters)):
            found = rim_distance(craters, n, grid, 1.0)
            assert found is not None
            window, distance = found
            part = grid.part(*window)
            towards = (part.x_W - craters.x[n])[None, :] * np.sin(azimuth)
            towards = towards + (part.y_H - craters.y[n])[:, None] * np.cos(azimuth)
            wall = (distance > 0.4) & (distance < 0.95)
            lit = picture[window][wall & (towards < 0)].mean()
            agree.append(lit > picture[window][wall & (towards > 0)].mean())
    assert len(agree) > 5 and np.mean(agree) > 0.9


def test_classification_layout_is_that_of_mars_bench(world: Path):
    root = world / "labelled" / LANDFORM_SET
    rows = rows_of(root / "annotation.csv")
    assert list(rows[0]) == ["file_id", "feature_name", "label", "split"]
    mapping = json.loads((root / "mapping.json").read_text())
    assert list(mapping.values()) == list(LANDFORM_CLASSES)
    listed = set()
    for row in rows:
        assert mapping[row["label"]] == row["feature_name"]
        path = root / "data" / row["split"] / row["feature_name"] / row["file_id"]
        picture = Image.open(path)
        assert picture.mode == "L" and picture.size == (64, 64)
        listed.add(path)
    assert listed == set(root.glob("data/*/*/*.png"))
    for split in SPLITS:
        counts = [sum(r["split"] == split and r["feature_name"] == c for r in rows) for c in LANDFORM_CLASSES]
        assert min(counts) >= 1 and max(counts) - min(counts) <= 1


def test_few_shot_and_partition_tables(world: Path):
    root = world / "labelled" / LANDFORM_SET
    full = rows_of(root / "annotation.csv")
    rest = [row for row in full if row["split"] != "train"]
    assert sorted(path.name for path in (root / "few_shot").iterdir()) == ["1_shot.csv", "2_shot.csv", "5_shot.csv"]
    for shots in (1, 2, 5):
        rows = rows_of(root / "few_shot" / f"{shots}_shot.csv")
        train = [row for row in rows if row["split"] == "train"]
        assert [row for row in rows if row["split"] != "train"] == rest
        assert all(row in full for row in train)
        assert [sum(r["feature_name"] == c for r in train) for c in LANDFORM_CLASSES] == [shots] * 7
    names = sorted(path.name for path in (root / "partitions").iterdir())
    assert names == [f"{f}x_partition.csv" for f in ("0.01", "0.02", "0.05", "0.10", "0.20", "0.25", "0.50")]
    assert len(rows_of(root / "partitions" / "0.20x_partition.csv")) == 7 + len(rest)


def box(footprint: list[list[float]]) -> tuple[float, float, float, float]:
    xs, ys = zip(*footprint, strict=True)
    return min(xs), min(ys), max(xs), max(ys)


def overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def test_labelled_ground_is_disjoint_from_products_and_between_splits(facts: dict):
    products = [box(product["footprint"]) for product in facts["products"]]
    sets = facts["labelled"]
    images = [(i["split"], entry["dataset"], box(i["footprint"])) for entry in sets for i in entry["images"]]
    assert not any(overlap(image, product) for _, _, image in images for product in products)
    for number, (split, dataset, one) in enumerate(images):
        for other_split, other_dataset, other in images[:number]:
            if split != other_split or dataset == other_dataset:
                assert not overlap(one, other)


def test_mean_and_contrast_do_not_tell_the_class(world: Path):
    """Nearest class mean over (mean, standard deviation) stays near chance."""
    root = world / "labelled" / LANDFORM_SET
    rows = rows_of(root / "annotation.csv")
    pixels = [np.asarray(Image.open(root / "data" / r["split"] / r["feature_name"] / r["file_id"])) for r in rows]
    features = np.array([(p.mean(), p.std()) for p in pixels])
    features = (features - features.mean(axis=0)) / features.std(axis=0)
    labels, train = np.array([int(r["label"]) for r in rows]), np.array([r["split"] == "train" for r in rows])
    centres = np.stack([features[train & (labels == c)].mean(axis=0) for c in range(7)])
    distance = np.square(features[~train, None] - centres[None]).sum(axis=2)
    assert (distance.argmin(axis=1) == labels[~train]).mean() < 0.4


def test_photograph_of_one_place_varies_with_sun_and_exposure_but_not_with_the_same_seed():
    ground, grid = Ground(0, 0.02), Grid.of(5000.0, 5000.0, 6.0, 64, 64)
    first, sun = photograph(ground, grid, np.random.default_rng(1))
    again, _ = photograph(ground, grid, np.random.default_rng(1))
    other, other_sun = photograph(ground, grid, np.random.default_rng(2))
    assert np.array_equal(first, again) and first.dtype == np.uint8
    assert sun != other_sun and not np.array_equal(first, other)


def test_mask_of_a_grid_without_craters_is_empty():
    ground = Ground(0, 0.002)
    craters = ground.craters((0.0, 0.0, 3000.0, 3000.0), 30.0)
    empty = 0
    for west in np.arange(0.0, 3000.0, 300.0):
        grid = Grid.of(west, 300.0, 6.0, 30, 30)
        clear = not ((np.abs(craters.x - west - 90) < 90 + craters.diameter) & (craters.y < 400)).any()
        if clear:
            assert not crater_mask(ground, grid).any()
            empty += 1
    assert empty >= 2
