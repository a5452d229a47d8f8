from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter

from momo.config import config_from_dict, load_config
from momo.corpus import Corpus
from momo.data_prep import PrepConfig, prep, resample
from momo.errors import ConfigError, DataError
from tests.data_prep.prep_helper import LOCATED, decisions, ground, index, products_of, run, tiles
from tests.data_prep.products import terrain, write_pds3, write_raster


def test_corpus_holds_the_product_pixel_for_pixel(tmp_path):
    image = ground()
    image[:40, :10] = 0
    write_raster(tmp_path / "in" / "scene.tif", image, nodata=0, scale=0.5, offset=1.0, **LOCATED)
    corpus, text = run(str(tmp_path / "in"), tmp_path / "out")
    assert corpus.manifest.dtype == "uint8" and corpus.count("train") > 0 and corpus.count("val") > 0
    for tile in tiles(corpus):
        row, col = tile.meta["row"], tile.meta["col"]
        window = image[row : row + 32, col : col + 32]
        np.testing.assert_array_equal(tile.valid_HW, window != 0)
        np.testing.assert_array_equal(tile.value_HW[tile.valid_HW], window[window != 0] * 0.5 + 1.0)
        assert tile.key == f"scene_r{row:06d}_c{col:06d}"
    across = decisions(corpus)["planning"]["dropped"]["across train and val ground"]
    assert len(tiles(corpus)) + across == 20 and across < 15
    rows = index(corpus)
    assert all(row["gsd_m"] == pytest.approx(10.0) and row["cell"] >= 0 for row in rows)
    for row in rows:
        assert row["lon"] == pytest.approx((row["col"] + 16) * 10 / 3396190.0 * 180 / np.pi)
        assert row["lat"] == pytest.approx(-(row["row"] + 16) * 10 / 3396190.0 * 180 / np.pi)
        assert row["footprint"][0] == pytest.approx(row["lon"] - 160 / 3396190.0 * 180 / np.pi)
        stored = image[row["row"] : row["row"] + 32, row["col"] : row["col"] + 32]
        stored = stored[stored != 0].astype(np.float64)
        assert row["stored_mean"] == pytest.approx(stored.mean()) and row["stored_max"] == stored.max()
        assert row["valid_fraction"] == pytest.approx(stored.size / 1024) and 0 < row["quality"] < 1
    assert "scene: 160 x 128 uint8, CTX, 10 m/px, Mars equirectangular; 20 of 20 windows good" in text
    assert f"CTX: {20 - across} tiles of 32 px" in text and "tiles/s" in text
    assert not (tmp_path / "out.work").exists()


def test_both_codecs_hold_the_same_pixels(tmp_path):
    image = ground(dtype="uint16", high=4000)
    image[:20] = 0
    path = str(write_raster(tmp_path / "s.tif", image, nodata=0, **LOCATED))
    fast, plain = (run(path, tmp_path / codec, codec=codec)[0] for codec in ("zstd", "png"))
    for a, b in zip(tiles(fast), tiles(plain), strict=True):
        assert a.key == b.key and a.meta == b.meta
        np.testing.assert_array_equal(a.value_HW, b.value_HW)
        np.testing.assert_array_equal(a.valid_HW, b.valid_HW)
    assert fast.stats == plain.stats


def test_manifest_and_products_say_where_everything_came_from(tmp_path):
    path = write_raster(tmp_path / "scene.tif", ground(), **LOCATED)
    corpus, _ = run(str(path), tmp_path / "out", licence="CC0-1.0", synthetic=True)
    (entry,) = products_of(corpus)
    assert entry["source"] == "scene.tif" and len(entry["sha256"]) == 64 and entry["tiles"] == len(tiles(corpus))
    assert entry["licence"] == corpus.manifest.licence == "CC0-1.0" and corpus.manifest.synthetic
    assert entry["percentile_low"] < entry["mean"] < entry["percentile_high"] and "Mars" in entry["crs_wkt"]
    assert corpus.manifest.prep["tile_size"] == 32 and corpus.manifest.failures == []
    assert corpus.manifest.products == 1 and corpus.manifest.healpix_order > 0
    sheet = Image.open(corpus.path / "contact_sheet.png")
    assert min(sheet.size) > 50


def test_same_input_gives_the_same_bytes_in_any_order(tmp_path):
    for number in range(3):
        write_raster(tmp_path / "in" / f"s{number}.tif", ground(seed=number), **LOCATED)
    files = sorted(str(p) for p in (tmp_path / "in").iterdir())
    a, _ = run(files, tmp_path / "a")
    b, _ = run([str(tmp_path / "in" / "*.tif"), *reversed(files)], tmp_path / "b")
    assert a.manifest.fingerprint == b.manifest.fingerprint
    assert a.manifest.tables == b.manifest.tables
    for name in ("index.parquet", "stats.json", "products.parquet", "report.json", "contact_sheet.png"):
        assert (a.path / name).read_bytes() == (b.path / name).read_bytes()


def test_at_most_one_row_of_windows_is_read_at_a_time(tmp_path, monkeypatch):
    path = write_raster(tmp_path / "s.tif", ground(), **LOCATED)
    heights = []
    original = resample.read_window

    def spy(dataset, product, col, row, width, height):
        heights.append(height)
        return original(dataset, product, col, row, width, height)

    monkeypatch.setattr(resample, "read_window", spy)
    run(str(path), tmp_path / "out")
    assert heights == [32] * 4


def test_mixed_types_are_widened_exactly_and_said(tmp_path):
    eight, sixteen = ground(dtype="uint8"), ground(seed=1, dtype="int16", high=9000) - 5000
    real = terrain(128, 160, 2).astype(np.float32)
    for name, image in (("a", eight), ("b", sixteen), ("c", real)):
        write_raster(tmp_path / f"{name}.tif", image)
    corpus, text = run(str(tmp_path / "*.tif"), tmp_path / "out")
    assert corpus.manifest.dtype == "uint16" and "products of different units? Means from" in text
    assert corpus.manifest.mixed_units
    limit = products_of(corpus)[2]["max_rounding_error"]
    assert 0 < limit < 1e-5 and "largest error" in text
    for tile in tiles(corpus):
        row, col = tile.meta["row"], tile.meta["col"]
        image = {"a": eight, "b": sixteen, "c": real}[tile.meta["product_id"]]
        error = np.abs(tile.value_HW - image[row : row + 32, col : col + 32]).max()
        assert error <= (limit * 1.05 if tile.meta["product_id"] == "c" else 0)


def test_windows_without_use_are_dropped_and_counted(tmp_path):
    image = ground(96, 128)
    image[:32, :32] = 0
    image[:32, 32:64] = 77
    image[:20, 64:96] = 0
    image[32:64, :32] = np.random.default_rng(0).integers(1, 255, (32, 32))
    path = write_raster(tmp_path / "s.tif", image)
    corpus, text = run(str(path), tmp_path / "out", nodata=0, quality={"min_structure": 0.5}, split={"block_tiles": 1})
    dropped = json.loads(products_of(corpus)[0]["dropped"])
    assert dropped == {"too few valid pixels": 2, "constant": 1, "little structure": 1}
    assert "dropped 1 constant, 1 little structure, 2 too few valid pixels" in text and len(tiles(corpus)) == 8
    assert decisions(corpus)["cutting"] == {"windows": 12, "good": 8, "dropped": dropped}


@pytest.mark.parametrize(
    ("limit", "reason"),
    [("max_noise", "noisy"), ("max_blur", "blurred"), ("max_stripes", "striped"), ("max_saturation", "saturated"),
     ("max_dead_lines", "too many dead lines")],
)  # fmt: skip
def test_each_limit_drops_what_it_names(tmp_path, limit, reason):
    rng = np.random.default_rng(0)
    image = ground(64, 64, dtype="float32")
    if limit == "max_blur":
        image = image + gaussian_filter(rng.normal(0, 60, image.shape), 0.7)
    high = np.quantile(image, 0.6)
    spoilt = {
        "max_noise": lambda a: a + rng.normal(0, 30, a.shape),
        "max_blur": lambda a: gaussian_filter(a, 4),
        "max_stripes": lambda a: a + rng.normal(0, 30, a.shape[1]),
        "max_saturation": lambda a: np.where(a > high, 255, a),
        "max_dead_lines": lambda a: np.where(np.arange(a.shape[0])[:, None] == 10, 99, a),
    }[limit]
    for name, values in (("good", image), ("spoilt", spoilt(image))):
        write_raster(tmp_path / f"{name}.tif", values.clip(1, 255).astype(np.uint8))
    value = {"max_dead_lines": 0, "max_blur": 0.5}.get(limit, 0.3)
    corpus, text = run(str(tmp_path / "*.tif"), tmp_path / "out", quality={limit: value}, split={"block_tiles": 1})
    dropped = {entry["product_id"]: json.loads(entry["dropped"]) for entry in products_of(corpus)}
    assert dropped["good"] == {} and dropped["spoilt"].get(reason, 0) > 0, dropped
    assert reason in text


def test_lost_rows_across_windows_are_masked_and_counted(tmp_path):
    image = ground(128, 160)
    image[28:36] = 3  # a lost packet over the border of the first and the second row of windows
    path = write_raster(tmp_path / "s.tif", image, **LOCATED)
    corpus, _ = run(str(path), tmp_path / "out", split={"val_fraction": 0.0})
    for row in index(corpus):
        assert row["dead_lines"] == (4 if row["row"] in (0, 32) else 0)
    for tile in tiles(corpus):
        first = tile.meta["row"]
        lost = [first + n for n in np.flatnonzero(~tile.valid_HW.any(axis=1))]
        assert lost == [n for n in range(28, 36) if first <= n < first + 32]


def test_overlapping_tiles_never_share_ground_between_splits(tmp_path):
    path = write_raster(tmp_path / "s.tif", ground(256, 256))
    corpus, text = run(str(path), tmp_path / "out", stride=16, split={"block_tiles": 3})
    cover = {split: np.zeros((256, 256), dtype=bool) for split in ("train", "val")}
    for row in index(corpus):
        cover[row["split"]][row["row"] : row["row"] + 32, row["col"] : row["col"] + 32] = True
    assert cover["train"].any() and cover["val"].any() and not (cover["train"] & cover["val"]).any()
    assert decisions(corpus)["planning"]["dropped"]["across train and val ground"] > 0
    assert "across train and val ground" in text


def test_before_and_after_images_of_one_place_share_their_split(tmp_path):
    for name in ("before", "after"):
        write_raster(tmp_path / f"{name}.tif", ground(seed=len(name)), **LOCATED)
    corpus, _ = run(str(tmp_path / "*.tif"), tmp_path / "out")
    split = {(row["product_id"], row["row"], row["col"]): row["split"] for row in index(corpus)}
    places = {(row, col) for _, row, col in split}
    assert len(split) == 2 * len(places)
    assert all(split["before", r, c] == split["after", r, c] for r, c in places)
    once, text = run(str(tmp_path / "*.tif"), tmp_path / "once", duplicates={"max_overlap": 0.5})
    assert len({(row["row"], row["col"]) for row in index(once)}) == len(index(once)) == len(places)
    assert decisions(once)["planning"]["dropped"] and "left out" in text


def test_tiles_of_one_gsd(tmp_path):
    image = ground(256, 320)
    write_raster(tmp_path / "fine.tif", image, **LOCATED)
    corpus, text = run(str(tmp_path / "fine.tif"), tmp_path / "out", resample={"gsd_m": 20.0})
    blocks = np.rint(image.reshape(128, 2, 160, 2).mean(axis=(1, 3)))
    for tile in tiles(corpus):
        row, col = tile.meta["row"], tile.meta["col"]
        np.testing.assert_array_equal(tile.value_HW, blocks[row : row + 32, col : col + 32])
    (entry,) = products_of(corpus)
    assert (entry["gsd_m"], entry["native_gsd_m"], entry["kernel"]) == (20.0, pytest.approx(10.0), "average")
    assert "20 m/px (resampled from 10, average)" in text


def test_rules_set_band_nodata_gsd_and_licence_by_name(tmp_path):
    black, image = np.zeros((64, 64), np.uint8), ground(64, 64)
    image[:8] = 0
    write_raster(tmp_path / "two.tif", [black, image])
    write_raster(tmp_path / "one.tif", ground(64, 64, seed=2))
    rules = [
        {"match": "two*", "band": 2, "nodata": 0, "gsd_m": 7.5, "licence": "CC-BY-4.0", "product_id": "T",
         "acquired": "2007-01-02T03:04:05", "incidence_deg": 61.5},
        {"match": "x*", "band": 9},
    ]  # fmt: skip
    config = load_config(PrepConfig, None, [f"products=[{tmp_path}/*.tif]", f"out={tmp_path}/out", "sensor=ctx",
                                            "tile_size=32", f"rules={json.dumps(rules)}", "split.block_tiles=1",
                                            "workers=1"])  # fmt: skip
    lines: list[str] = []
    corpus = Corpus(prep(config, report=lines.append).path)
    one, two = products_of(corpus)
    assert (two["band"], two["gsd_m"], two["licence"]) == (2, 7.5, "CC-BY-4.0")
    assert (two["product_id"], two["acquired"]) == ("T", "2007-01-02T03:04:05")
    assert two["incidence_deg"] == 61.5 and np.isnan(two["phase_deg"]) and np.isnan(one["incidence_deg"])
    assert (one["band"], one["licence"]) == (1, "unknown") and np.isnan(one["gsd_m"])
    assert sum(not tile.valid_HW.all() for tile in tiles(corpus)) == 2
    assert any("rule 'x*' matches no product" in line for line in lines)
    assert corpus.manifest.sensor == "CTX"


def test_sensor_is_read_from_labels(tmp_path):
    path = write_pds3(tmp_path / "edr.IMG", ground(64, 64), suffix=5)
    corpus, text = run(str(path), tmp_path / "out", sensor="auto", split={"block_tiles": 1})
    assert corpus.sensor == "HiRISE" and "not all skipped by GDAL" in text
    with pytest.raises(DataError, match=r"a product is of another sensor: .*edr\.IMG: its label says HIRISE"):
        run(str(path), tmp_path / "ctx", sensor="CTX")
    plain = write_raster(tmp_path / "plain.tif", ground())
    with pytest.raises(ConfigError, match=r"the sensor cannot be read from the label: .*plain\.tif"):
        run(str(plain), tmp_path / "auto", sensor="auto")


def test_products_of_two_sensors_are_refused(tmp_path):
    a = write_pds3(tmp_path / "a.IMG", ground(64, 64))
    b = tmp_path / "b.IMG"
    b.write_bytes(a.read_bytes().replace(b'"HIRISE"', b'"CTX"   '))
    with pytest.raises(DataError, match=r"of several sensors: CTX \(b\.IMG\), HiRISE \(a\.IMG\)"):
        run([str(a), str(b)], tmp_path / "out", sensor="auto")


def test_same_bytes_and_same_ids_are_said(tmp_path):
    a = write_pds3(tmp_path / "a.IMG", ground(64, 64))
    shutil.copy(a, tmp_path / "b.IMG")
    write_pds3(tmp_path / "c.IMG", ground(64, 64, seed=1))
    corpus, text = run(str(tmp_path / "*.IMG"), tmp_path / "out", sensor="HiRISE", split={"block_tiles": 1})
    assert "b.IMG has the same bytes as a.IMG: left out" in text
    assert "product id PSP_TEST_RED is taken: c.IMG becomes PSP_TEST_RED-3" in text
    assert [entry["product_id"] for entry in products_of(corpus)] == ["PSP_TEST_RED", "PSP_TEST_RED-3"]


def test_folders_are_searched_and_detached_data_is_read_once(tmp_path):
    folder = tmp_path / "in"
    write_raster(folder / "deep" / "p.xml", ground(64, 64), driver="PDS4", options=["IMAGE_FORMAT=RAW"])
    write_raster(folder / "t.tif", ground(64, 64, seed=1))
    (folder / "notes.txt").write_text("no raster")
    (folder / "t.tif.aux.xml").write_text("<PAMDataset/>")
    assert (folder / "deep" / "p.img").is_file()
    corpus, text = run(str(folder), tmp_path / "out", split={"block_tiles": 1})
    assert sorted(entry["source"] for entry in products_of(corpus)) == ["p.xml", "t.tif"]
    assert "2 files in the folders are no rasters" in text and corpus.manifest.failures == []


def test_empty_validation_is_said_loudly(tmp_path):
    path = write_raster(tmp_path / "s.tif", ground(64, 64))
    _, text = run(str(path), tmp_path / "out", split={"block_tiles": 8, "val_fraction": 1e-6})
    assert "WARNING: no validation tile" in text and "make cells smaller" in text


def test_forced_block_is_said(tmp_path):
    path = write_raster(tmp_path / "s.tif", ground(128, 128))
    corpus, text = run(str(path), tmp_path / "out", split={"val_fraction": 1e-6})
    assert "left val empty" in text and corpus.count("val") == 4


@pytest.mark.parametrize(
    ("setting", "message"),
    [({"quality": {"min_valid": 0.0}}, "quality.min_valid is out of range: 0.0"),
     ({"quality": {"min_valid": 1.5}}, "quality.min_valid is out of range: 1.5"),
     ({"stride": 0}, "stride is out of range"), ({"sensor": "CTXX"}, "did you mean 'CTX'"),
     ({"split": {"val_fraction": 1.0}}, "split.val_fraction is out of range"),
     ({"split": {"order": 30}}, "split.order is out of range"), ({"split": {"by": "tile"}}, "split.by has an unknown"),
     ({"nodata": "black"}, "nodata cannot be read: 'black'"), ({"collar": "on"}, "collar has an unknown value"),
     ({"on_error": "ignore"}, "on_error has an unknown value"), ({"products": []}, "products is empty"),
     ({"products": 3}, "products cannot be read"), ({"tile_size": 0}, "tile_size is out of range"),
     ({"rules": [{"match": "a", "incidence_deg": 200}]}, "rules.incidence_deg is out of range: 200"),
     ({"codec": "jpeg"}, "codec has an unknown value"), ({"workers": 0}, "workers is out of range"),
     ({"resample": {"kernel": "magic"}}, "resample.kernel has an unknown"),
     ({"resample": {"gsd_m": -1}}, "resample.gsd_m is out of range"),
     ({"strata": {"by": "unit"}}, "strata.units is missing"), ({"strata": {"units": "u"}}, "strata.column is missing"),
     ({"strata": {"plan": "sqrt"}}, "a sampling plan needs strata"),
     ({"strata": {"by": "latitude", "plan": "capped"}}, "strata.cap is missing"),
     ({"duplicates": {"max_distance": 9}}, "duplicates.max_distance is out of range"),
     ({"leakage": {"on_overlap": "pray"}}, "leakage.on_overlap has an unknown")],
)  # fmt: skip
def test_settings_out_of_range_are_named(tmp_path, setting, message):
    with pytest.raises(ConfigError, match=message):
        config_from_dict(PrepConfig, {"products": ["a"], "out": "b"} | setting)


def test_importing_the_package_needs_no_gdal():
    code = "import sys; sys.modules['osgeo'] = None; from momo.data_prep import PrepConfig, prep; print('fine'); "
    code += "assert 'torch' not in sys.modules; prep(PrepConfig(products='a', out='b', workers=1, on_error='stop'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("fine\n"), done.stderr
    assert "the package 'osgeo' cannot be imported" in done.stderr
