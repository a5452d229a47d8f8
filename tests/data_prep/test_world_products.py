"""The synthetic products: formats, georeference, no-data habits, and the same ground in all cameras."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from momo.data_prep.world import WorldConfig, make_world
from momo.data_prep.world.ground import Ground
from momo.data_prep.world.products import ORIGIN_EASTING_M, ORIGIN_NORTHING_M
from momo.errors import ConfigError, DataError

gdal = pytest.importorskip("osgeo.gdal")
osr = pytest.importorskip("osgeo.osr")
gdal.UseExceptions()

SEED = 8
SMALL = {"products": 2, "tiles_per_product": 48, "crater_images": 10, "landform_images": 14, "crater_density": 0.05}
KINDS = {
    "HiRISE": ("ISIS3", "UInt16", 1.0, 0),
    "CTX": ("PDS4", "Byte", 6.0, 0),
    "THEMIS": ("GTiff", "Float32", 36.0, -32768),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(WorldConfig(out=tmp_path_factory.mktemp("world") / "w", seed=SEED, **SMALL))


@pytest.fixture(scope="module")
def facts(world: Path) -> dict:
    return json.loads((world / "world.json").read_text())


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_same_seed_same_bytes_and_another_seed_other_bytes(world: Path, tmp_path: Path):
    again = make_world(WorldConfig(out=tmp_path / "elsewhere" / "again", seed=SEED, **SMALL))
    assert hashes(again) == hashes(world)
    other = hashes(make_world(WorldConfig(out=tmp_path / "other", seed=SEED + 1, **SMALL)))
    pixels = [name for name in hashes(world) if name.endswith((".cub", ".img", ".tif"))]
    assert len(pixels) == 6 and all(other[name] != hashes(world)[name] for name in pixels)


def test_world_json_lists_every_file_with_its_hash_and_says_synthetic(world: Path, facts: dict):
    found = hashes(world)
    del found["world.json"]
    assert facts["files"] == found
    assert facts["synthetic"] is True and "SYNTHETIC" in facts["description"]
    assert facts["licence"] == "CC0-1.0" and facts["seed"] == SEED and "out" not in facts["config"]
    assert str(world) not in (world / "world.json").read_text()


@pytest.mark.parametrize("sensor", sorted(KINDS))
def test_gdal_opens_each_product_on_mars(world: Path, facts: dict, sensor: str):
    driver, dtype, gsd, nodata = KINDS[sensor]
    products = [product for product in facts["products"] if product["sensor"] == sensor]
    assert len(products) == 2
    for product in products:
        dataset = gdal.Open(str(world / product["path"]))
        band = dataset.GetRasterBand(1)
        assert dataset.GetDriver().ShortName == driver
        assert gdal.GetDataTypeName(band.DataType) == dtype
        assert band.GetNoDataValue() == nodata
        crs = osr.SpatialReference(wkt=dataset.GetProjection())
        assert crs.GetSemiMajor() == crs.GetSemiMinor() == 3396190.0
        assert crs.GetAttrValue("PROJECTION") == "Equirectangular" and crs.GetAuthorityCode(None) is None
        west, pixel_x, _, north, _, pixel_y = dataset.GetGeoTransform()
        assert pixel_x == gsd == -pixel_y == product["gsd_m"]
        xs, ys = zip(*product["footprint"], strict=True)
        assert west <= min(xs) and max(xs) <= west + dataset.RasterXSize * gsd
        assert max(ys) == pytest.approx(north) and min(ys) == pytest.approx(north - dataset.RasterYSize * gsd)
        assert "synthetic" in product["path"]


def test_labels_say_synthetic_and_name_the_instrument(world: Path):
    cube = gdal.Open(str(world / "products/hirise/synthetic_hirise_00.cub"))
    label = json.loads(cube.GetMetadata_List("json:ISIS3")[0])["IsisCube"]
    assert label["Instrument"]["InstrumentId"] == "HIRISE"
    assert label["Archive"]["Note"].startswith("SYNTHETIC")
    xml = (world / "products/ctx/synthetic_ctx_00.xml").read_text()
    assert "SYNTHETIC" in xml and "<name>CTX</name>" in xml and "${" not in xml
    thermal = gdal.Open(str(world / "products/themis/synthetic_themis_00.tif")).GetMetadata()
    assert thermal["INSTRUMENT_ID"] == "THEMIS_IR" and thermal["NOTE"].startswith("SYNTHETIC")


def test_hirise_is_ten_bit_with_null_margins_and_special_pixels(world: Path, facts: dict):
    saturated = 0
    for product in (p for p in facts["products"] if p["sensor"] == "HiRISE"):
        pixels = gdal.Open(str(world / product["path"])).ReadAsArray()
        special = list(product["special_values"].values())
        ordinary = pixels[~np.isin(pixels, special)]
        assert ordinary.min() >= 3 and ordinary.max() <= 1022
        assert (pixels[:, 0] == 0).all() and (pixels[:, -1] == 0).all()
        assert 0.7 < (pixels != 0).mean() < 0.98
        saturated += int((pixels >= 65534).sum())
    assert saturated > 0


def test_ctx_swath_slants_and_leaves_two_corners_empty(world: Path):
    pixels = gdal.Open(str(world / "products/ctx/synthetic_ctx_00.xml")).ReadAsArray()
    imaged = pixels > 0
    left = imaged.argmax(axis=1)
    assert not imaged[0, 0] and not imaged[-1, -1] and imaged[0, -2] and imaged[-1, 1]
    assert (np.diff(left) <= 0).all() and left[0] > left[-1] + 10
    middle = imaged[len(imaged) // 2]
    assert middle[middle.argmax() : len(middle) - middle[::-1].argmax()].all()


def test_themis_is_a_plausible_temperature(world: Path):
    pixels = gdal.Open(str(world / "products/themis/synthetic_themis_01.tif")).ReadAsArray()
    kelvin = pixels[pixels != -32768]
    assert 0.7 < kelvin.size / pixels.size < 1
    assert kelvin.min() > 150 and kelvin.max() < 300 and kelvin.std() > 1


def test_scale_and_offset_give_reflectance(world: Path):
    for name in ("hirise/synthetic_hirise_00.cub", "ctx/synthetic_ctx_00.xml"):
        dataset = gdal.Open(str(world / "products" / name))
        band = dataset.GetRasterBand(1)
        pixels = band.ReadAsArray().astype(float)
        reflectance = pixels[(pixels > 2) & (pixels < 60000)] * band.GetScale() + band.GetOffset()
        assert 0.05 < reflectance.mean() < 0.35


@pytest.mark.parametrize(("fine", "coarse"), [("hirise", "ctx"), ("ctx", "themis")])
def test_craters_of_the_catalogue_are_at_the_same_ground_in_two_cameras(
    world: Path, facts: dict, fine: str, coarse: str
):
    """Fresh craters of more than five coarse pixels look alike in both, with lit and shaded walls in place."""
    ground = Ground(SEED, facts["config"]["crater_density"])
    products = {product["product_id"]: product for product in facts["products"]}
    alike, lit = [], []
    for index in range(2):
        pair = [products[f"synthetic_{name}_{index:02d}"] for name in (fine, coarse)]
        pictures = [Picture(world, pair[0], average=5), Picture(world, pair[1], average=1)]
        xs, ys = zip(*pair[0]["footprint"], strict=True)
        box = (
            min(xs) - ORIGIN_EASTING_M,
            min(ys) - ORIGIN_NORTHING_M,
            max(xs) - ORIGIN_EASTING_M,
            max(ys) - ORIGIN_NORTHING_M,
        )
        smallest = 5 * pair[1]["gsd_m"]
        craters = ground.craters(box, smallest, reach=0.0)
        craters = craters.where((craters.age < 0.7) & (craters.diameter > 1.1 * smallest))
        for number in range(len(craters)):
            x, y = ORIGIN_EASTING_M + craters.x[number], ORIGIN_NORTHING_M + craters.y[number]
            radius = craters.diameter[number] / 2
            steps = np.arange(-1.4, 1.41, 0.2) * radius
            seen = [picture.at(x + steps[None, :], y + steps[:, None]) for picture in pictures]
            if any(patch is None for patch in seen):
                continue
            alike.append(np.corrcoef(seen[0].ravel(), seen[1].ravel())[0, 1])
            # The sun stands in the west, so the western wall lies in shade and the eastern one is lit.
            lit.extend(patch[7, 10:13].mean() > patch[7, 2:5].mean() for patch in seen)
            for east, north in ((1, 0), (-1, 0), (0, 1), (0, -1)):  # one radius off must fit worse
                off = pictures[1].at(x + east * radius + steps[None, :], y + north * radius + steps[:, None])
                if off is not None:
                    assert np.corrcoef(seen[0].ravel(), off.ravel())[0, 1] < alike[-1]
    assert len(alike) >= 3
    assert np.median(alike) > 0.6 and min(alike) > 0 and np.mean(lit) > 0.8


class Picture:
    def __init__(self, world: Path, product: dict, average: int):
        dataset = gdal.Open(str(world / product["path"]))
        self.pixels, self.transform = dataset.ReadAsArray().astype(float), dataset.GetGeoTransform()
        self.invalid, self.half = [product["nodata"], *product["special_values"].values()], average // 2

    def at(self, x: np.ndarray, y: np.ndarray) -> np.ndarray | None:
        """Returns averages of the pixels around projected coordinates; None off the swath."""
        west, gsd, _, north, _, _ = self.transform
        half = self.half
        column, row = np.broadcast_arrays(np.floor((x - west) / gsd), np.floor((north - y) / gsd))
        column, row = column.astype(int), row.astype(int)
        rows, columns = self.pixels.shape
        if column.min() < half or row.min() < half or column.max() >= columns - half or row.max() >= rows - half:
            return None
        shifts = range(-half, half + 1)
        stack = np.stack([self.pixels[row + dy, column + dx] for dy in shifts for dx in shifts])
        return None if np.isin(stack, self.invalid).any() else stack.mean(axis=0)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"seed": -1}, r"seed is out of range: -1\. Rule: 0 to"),
        ({"tile_size": 16}, r"tile_size is out of range: 16\. Rule: 32 to 512"),
        ({"products": 0}, r"products is out of range: 0\. Rule: 1 to 20"),
        ({"tiles_per_product": 5}, r"tiles_per_product is out of range: 5\. Rule: 12 to"),
        ({"crater_images": 1}, r"crater_images is out of range: 1\. Rule: 6 to"),
        ({"landform_images": 2}, r"landform_images is out of range: 2\. Rule: 7 to"),
        ({"crater_density": 0.5}, r"crater_density is out of range: 0\.5\. Rule: 0\.002 to 0\.1"),
    ],
)
def test_bad_values_are_named(tmp_path: Path, values: dict, text: str):
    with pytest.raises(ConfigError, match=text):
        WorldConfig(out=tmp_path / "w", **values)


def test_an_existing_folder_is_not_overwritten(tmp_path: Path):
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "mine.txt").write_text("keep")
    with pytest.raises(DataError, match="the output exists already"):
        make_world(WorldConfig(out=tmp_path / "w", **SMALL))
    assert [path.name for path in tmp_path.rglob("*")] == ["w", "mine.txt"]


def test_nothing_is_left_when_generation_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("momo.data_prep.world.labelled._MOST_ROWS", 1)
    with pytest.raises(DataError, match="too few places of a class.*ask for fewer labelled images"):
        make_world(WorldConfig(out=tmp_path / "w", **{**SMALL, "crater_images": 300}))
    assert list(tmp_path.iterdir()) == []
