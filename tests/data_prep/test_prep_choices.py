"""Units, strata, leakage, split by product and archives through the whole stage, as a user gives them."""

from __future__ import annotations

import zipfile
from collections import Counter

import numpy as np
import pytest
from osgeo import ogr

from momo.data_prep import tiling
from momo.errors import DataError
from tests.data_prep.prep_helper import LOCATED, decisions, ground, index, products_of, run, tiles
from tests.data_prep.products import mars_crs, write_raster

DEGREE = np.degrees(10.0 / 3396190.0)  # of one pixel of LOCATED


def write_units(path):
    """Two units that meet under column 64 of the scene, in the projection of the scene."""
    source = ogr.GetDriverByName("GPKG").CreateDataSource(str(path))
    layer = source.CreateLayer("geology", mars_crs(), ogr.wkbPolygon)
    layer.CreateField(ogr.FieldDefn("Unit", ogr.OFTString))
    for name, west, east in (("AHv", -100, 640), ("lNh", 640, 5000)):
        feature = ogr.Feature(layer.GetLayerDefn())
        feature.SetField("Unit", name)
        ring = f"{west} 100, {east} 100, {east} -5000, {west} -5000, {west} 100"
        feature.SetGeometry(ogr.CreateGeometryFromWkt(f"POLYGON (({ring}))"))
        layer.CreateFeature(feature)
    return str(path)


def test_units_reach_the_index_and_the_samples_and_rule_the_sampling(tmp_path):
    path = str(write_raster(tmp_path / "s.tif", ground(256, 256), **LOCATED))
    units = {"units": write_units(tmp_path / "units.gpkg"), "column": "Unit"}
    everything, _ = run(path, tmp_path / "all", strata=units, split={"val_fraction": 0.0})
    expected = {(row["row"], row["col"]): "AHv" if row["col"] + 16 < 64 else "lNh" for row in index(everything)}
    assert {(row["row"], row["col"]): row["unit"] for row in index(everything)} == expected
    assert {(tile.meta["row"], tile.meta["col"]): tile.meta["unit"] for tile in tiles(everything)} == expected
    assert Counter(expected.values()) == {"AHv": 16, "lNh": 48}
    strata = units | {"by": "unit", "plan": "uniform", "tiles": 20}
    drawn, text = run(path, tmp_path / "drawn", strata=strata, split={"val_fraction": 0.0})
    assert Counter(row["unit"] for row in index(drawn)) == {"AHv": 10, "lNh": 10}
    table = {row["name"]: (row["available"], row["taken"]) for row in decisions(drawn)["strata"]["table"]}
    assert table == {"AHv": (16, 10), "lNh": (48, 10)} and "44 not drawn by the sampling plan" in text


def test_benchmark_ground_is_kept_out_or_stops_the_run(tmp_path):
    path = str(write_raster(tmp_path / "s.tif", ground(128, 128), **LOCATED))
    lon, lat = 48 * DEGREE, -48 * DEGREE  # the centre of the window at row 32, column 32
    (tmp_path / "test.csv").write_text(f"lon,lat,size_m\n{lon},{lat},100\n")
    leakage = {"footprints": str(tmp_path / "test.csv")}
    corpus, text = run(path, tmp_path / "out", leakage=leakage, split={"val_fraction": 0.0})
    places = {(row["row"], row["col"]) for row in index(corpus)}
    assert len(places) == 15 and (32, 32) not in places
    assert decisions(corpus)["leakage"]["tiles"] == 1 and "1 on ground of the given footprints" in text
    with pytest.raises(DataError, match="tiles lie on ground that must not be trained on: 1 tiles; the first: s_r0"):
        run(path, tmp_path / "stop", leakage=leakage | {"on_overlap": "stop"}, split={"val_fraction": 0.0})


def test_split_by_product_shares_no_ground(tmp_path):
    for number in range(4):  # each half over the one before
        place = {"crs": LOCATED["crs"], "transform": (number * 640.0, 10.0, 0.0, 0.0, 0.0, -10.0)}
        write_raster(tmp_path / f"p{number}.tif", ground(128, 128, seed=number), **place)
    corpus, text = run(str(tmp_path / "*.tif"), tmp_path / "out", split={"by": "product", "val_fraction": 0.3})
    splits = {row["product_id"]: row["split"] for row in index(corpus)}
    assert set(splits.values()) == {"train", "val"}
    ground_of = {"train": set(), "val": set()}
    for row in index(corpus):
        assert row["split"] == splits[row["product_id"]] and row["block"] == row["product_id"]
        first = int(row["product_id"][1:]) * 64 + row["col"]
        ground_of[row["split"]] |= {(row["row"], column) for column in range(first, first + 32)}
    assert not ground_of["train"] & ground_of["val"] and "overlaps validation ground" in text


def test_an_archive_and_a_list_give_the_corpus_of_the_files(tmp_path):
    folder = tmp_path / "in"
    for number in range(2):
        write_raster(folder / f"s{number}.tif", ground(seed=number), **LOCATED)
    with zipfile.ZipFile(tmp_path / "raw.zip", "w") as archive:
        for file in sorted(folder.iterdir()):
            archive.write(file, f"deep/{file.name}")
    (tmp_path / "list.txt").write_text("# two scenes\nin/s0.tif\nin/s1.tif\n")
    plain, _ = run(str(folder), tmp_path / "plain")
    for name in ("raw.zip", "list.txt"):
        other, _ = run(str(tmp_path / name), tmp_path / name.replace(".", "-"))
        assert other.manifest.fingerprint == plain.manifest.fingerprint
        hashes = [[entry["sha256"] for entry in products_of(corpus)] for corpus in (plain, other)]
        assert hashes[0] == hashes[1]


def test_another_split_or_sampling_cuts_nothing_again(tmp_path, monkeypatch):
    path = str(write_raster(tmp_path / "s.tif", ground(256, 256), **LOCATED))
    work = str(tmp_path / "work")
    first, _ = run(path, tmp_path / "a", work=work, keep_work=True)
    monkeypatch.setattr(tiling, "_cut_into", lambda *_: pytest.fail("cut again"))
    strata = {"by": "latitude", "latitude_deg": 0.01, "plan": "capped", "cap": 5}
    second, _ = run(path, tmp_path / "b", work=work, keep_work=True, split={"seed": 1}, strata=strata)
    assert len(index(second)) < len(index(first)) and first.manifest.fingerprint != second.manifest.fingerprint
    run(path, tmp_path / "c", work=work)
    assert not (tmp_path / "work").exists()


def test_statistics_are_those_of_the_training_pixels_of_all_products(tmp_path):
    for number, level in enumerate((0, 60, 120)):
        image = (ground(seed=number, high=50) + level).astype(np.uint8)
        image[:20, :9] = 0
        write_raster(tmp_path / f"p{number}.tif", image, nodata=0, scale=0.5, offset=-3.0)
    corpus, _ = run(str(tmp_path / "*.tif"), tmp_path / "out", split={"block_tiles": 1})
    train = [corpus.read("train", n) for n in range(corpus.count("train"))]
    pixels = np.concatenate([tile.value_HW[tile.valid_HW] for tile in train]).astype(np.float64)
    assert corpus.stats["count"] == pixels.size and len({tile.meta["product_id"] for tile in train}) == 3
    assert corpus.stats["mean"] == pytest.approx(pixels.mean(), rel=1e-9)
    assert corpus.stats["std"] == pytest.approx(pixels.std(), rel=1e-9)
    assert (corpus.stats["min"], corpus.stats["max"]) == (pixels.min(), pixels.max())
    for share, value in corpus.stats["percentiles"].items():
        assert value == pytest.approx(np.percentile(pixels, float(share)), abs=2.0), share
