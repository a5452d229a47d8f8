from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter

from momo.config import config_from_dict, load_config
from momo.corpus import Corpus
from momo.data_prep import PrepConfig, prep, resample, tiling
from momo.errors import ConfigError, DataError
from tests.data_prep.products import earth_crs, mars_crs, terrain, write_pds3, write_raster

LOCATED = {"crs": mars_crs(), "transform": (0.0, 10.0, 0.0, 0.0, 0.0, -10.0)}


def ground(height=128, width=160, seed=0, dtype="uint8", high=200):
    return (terrain(height, width, seed) * high + 10).astype(dtype)


DEFAULTS = {
    "sensor": "CTX", "tile_size": 32, "workers": 1, "on_error": "stop", "split": {"val_fraction": 0.3, "block_tiles": 2},
    "duplicates": {"max_overlap": None, "max_distance": None},
}  # fmt: skip


def config_of(products, out, **settings):
    """A small configuration; nested groups are merged over the defaults."""
    values = dict(DEFAULTS)
    for key, value in settings.items():
        old = values.get(key)
        values[key] = old | value if isinstance(old, dict) and isinstance(value, dict) else value
    products = [products] if isinstance(products, str) else products
    return config_from_dict(PrepConfig, {"products": products, "out": str(out), **values})


def run(products, out, **settings):
    lines: list[str] = []
    result = prep(config_of(products, out, **settings), report=lines.append)
    return Corpus(result.path, verify=True), "\n".join(lines)


def tiles(corpus):
    return [corpus.read(split, i) for split in ("train", "val") for i in range(corpus.count(split))]


def index(corpus):
    return parquet.read_table(corpus.path / "index.parquet").to_pylist()


def products_of(corpus):
    return parquet.read_table(corpus.path / "products.parquet").to_pylist()


def decisions(corpus):
    return json.loads((corpus.path / "report.json").read_text())


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
    corpus, text = run(
        str(path), tmp_path / "out", nodata=0, quality={"min_structure": 0.5}, split={"block_tiles": 1}
    )
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
         "acquired": "2007-01-02T03:04:05"},
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
    assert (one["band"], one["licence"]) == (1, "unknown") and np.isnan(one["gsd_m"])
    assert sum(not tile.valid_HW.all() for tile in tiles(corpus)) == 2
    assert any("rule 'x*' matches no product" in line for line in lines)
    assert corpus.manifest.sensor == "CTX"


def test_sensor_is_read_from_labels(tmp_path):
    path = write_pds3(tmp_path / "edr.IMG", ground(64, 64), suffix=5)
    corpus, text = run(str(path), tmp_path / "out", sensor="auto", split={"block_tiles": 1})
    assert corpus.sensor == "HiRISE" and "not all skipped by GDAL" in text and "255 by the label" in text
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


BAD = {
    "missing": "a product does not exist",
    "unreadable": "GDAL cannot open the product",
    "empty": "the product has no valid pixel",
    "small": "the product is smaller than a tile",
    "earth": "this product is on Earth",
    "truncated": "a product is damaged",
}


def bad_product(folder: Path, kind: str) -> Path:
    path = folder / f"bad_{kind}.tif"
    if kind == "unreadable":
        path.write_bytes(b"no raster")
    elif kind == "empty":
        write_raster(path, np.zeros((64, 64), np.uint8), nodata=0)
    elif kind == "small":
        write_raster(path, ground(20, 64))
    elif kind == "earth":
        write_raster(path, ground(64, 64), crs=earth_crs(), transform=(5e5, 10, 0, 5e6, 0, -10))
    elif kind == "truncated":
        write_raster(path, ground(64, 64))
        path.write_bytes(path.read_bytes()[:2500])
    return path


@pytest.mark.parametrize("kind", list(BAD))
def test_bad_product_stops_with_nothing_half_written(tmp_path, kind):
    write_raster(tmp_path / "a_good.tif", ground(), **LOCATED)
    bad = bad_product(tmp_path, kind)
    with pytest.raises(DataError, match=rf"{BAD[kind]}: .*bad_{kind}\.tif.*Next: "):
        run([str(tmp_path / "a_good.tif"), str(bad)], tmp_path / "corpora" / "out")
    assert not [path for path in (tmp_path / "corpora").iterdir() if path.name != "out.work"]


def test_bad_products_are_skipped_listed_and_done_again_when_mended(tmp_path, monkeypatch):
    write_raster(tmp_path / "a_good.tif", ground(), **LOCATED)
    products = [str(tmp_path / "a_good.tif"), *(str(bad_product(tmp_path, kind)) for kind in BAD)]
    lines: list[str] = []
    result = prep(config_of(products, tmp_path / "out", on_error="skip"), report=lines.append)
    corpus, text = Corpus(result.path, verify=True), "\n".join(lines)
    failures = {entry["source"]: entry["reason"] for entry in corpus.manifest.failures}
    assert {f"bad_{kind}.tif" for kind in BAD} == set(failures) and result.exit_code == 3
    for kind, message in BAD.items():
        assert failures[f"bad_{kind}.tif"].startswith(message) and f"FAILED bad_{kind}.tif: {message}" in text
    assert "6 products FAILED:" in text and "redoes these products only" in text
    for seed, kind in enumerate(BAD, start=1):
        write_raster(tmp_path / f"bad_{kind}.tif", ground(seed=seed), **LOCATED)
    lines.clear()
    work, cuts, original = tmp_path / "out.work", [], tiling._cut_into
    monkeypatch.setattr(tiling, "_cut_into", lambda f, product, s: cuts.append(product.key) or original(f, product, s))
    mended = prep(config_of(products, tmp_path / "out2", on_error="skip", work=str(work)), report=lines.append)
    assert mended.exit_code == 0 and Corpus(mended.path).manifest.products == 7
    assert "a_good" not in cuts and len(cuts) == 6


def test_the_same_command_again_redoes_failures_only(tmp_path, monkeypatch):
    write_raster(tmp_path / "in" / "a.tif", ground(), **LOCATED)
    (tmp_path / "in" / "b.tif").write_bytes(b"no raster")
    config = config_of(str(tmp_path / "in"), tmp_path / "out", on_error="skip")
    assert prep(config, report=lambda line: None).exit_code == 3
    cuts = []
    original = tiling._cut_into
    monkeypatch.setattr(tiling, "_cut_into", lambda f, product, s: cuts.append(product.key) or original(f, product, s))
    again = prep(config, report=lambda line: None)
    assert again.exit_code == 3 and cuts == []
    assert prep(config_of(str(tmp_path / "in"), tmp_path / "out", on_error="skip"), report=print).failures
    with pytest.raises(DataError, match="the output exists already"):
        run(str(tmp_path / "in"), tmp_path / "out", on_error="skip", stride=16)


def test_a_complete_corpus_is_left_alone(tmp_path):
    path = str(write_raster(tmp_path / "a.tif", ground(), **LOCATED))
    corpus, _ = run(path, tmp_path / "out")
    before = (corpus.path / "manifest.json").stat().st_mtime_ns
    _, text = run(path, tmp_path / "out")
    assert "is complete already" in text and (corpus.path / "manifest.json").stat().st_mtime_ns == before
    write_raster(tmp_path / "a.tif", ground(seed=5), **LOCATED)
    with pytest.raises(DataError, match="the output exists already"):
        run(path, tmp_path / "out")


def test_damage_half_way_keeps_the_good_rows_and_says_so(tmp_path):
    path = write_raster(tmp_path / "a.tif", ground(256, 64), options=["BLOCKYSIZE=8"])
    path.write_bytes(path.read_bytes()[: 64 * 150])
    corpus, text = run(str(path), tmp_path / "out", on_error="skip", split={"block_tiles": 1})
    (entry,) = products_of(corpus)
    assert 0 < entry["tiles"] == len(tiles(corpus)) < 16 and entry["damage"].startswith("a product is damaged")
    assert "FAILED a.tif: a product is damaged: rows" in text
    with pytest.raises(DataError, match=r"a product is damaged: .*a\.tif"):
        run(str(path), tmp_path / "stop", split={"block_tiles": 1})


def test_nothing_left_nothing_found_and_existing_output(tmp_path):
    bad = bad_product(tmp_path, "small")
    with pytest.raises(DataError, match="no tile is left: 0 products without a tile, 1 failed, the last: the product is"):
        run(str(bad), tmp_path / "out", on_error="skip")
    with pytest.raises(DataError, match=r"no product is found: .*\*\.cub"):
        run(str(tmp_path / "*.cub"), tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no product is found: .*empty"):
        run(str(tmp_path / "empty"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError, match="the output exists already"):
        run(str(bad), tmp_path / "out")


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


@pytest.mark.real_data
@pytest.mark.parametrize("sensor", ["hirise", "ctx", "themis"])
def test_real_products_become_corpora(real_mars, tmp_path, monkeypatch, sensor):
    monkeypatch.setenv("MOMO_REAL_DATA", str(real_mars))
    recipe = Path(__file__).resolve().parents[2] / "configs" / "real" / f"prep_{sensor}.yaml"
    lines: list[str] = []
    config = load_config(PrepConfig, recipe, [f"out={tmp_path}/out", "workers=2"])
    corpus = Corpus(prep(config, report=lines.append).path, verify=True)
    assert corpus.count("train") > 1000 and corpus.count("val") > 50
    scores = np.array([row["quality"] for row in index(corpus)])
    assert (scores > 0.5).mean() > 0.3
    text = "\n".join(lines)
    if sensor == "hirise":
        assert "each line has 18 + 16 extra bytes, not all skipped by GDAL" in text
        located = [row for row in index(corpus) if row["product_id"] == "PSP_001892_1715_COLOR_crop"]
        assert all(abs(row["lat"] + 8.25) < 0.1 and row["gsd_m"] == pytest.approx(0.25) for row in located)
        # The last four digits of a HiRISE id are ten times the latitude plus 180, to half a degree.
        for row in index(corpus):
            if row["cell"] >= 0 and row["product_id"].split("_")[0] in ("ESP", "PSP"):
                assert row["lat"] == pytest.approx(int(row["product_id"].split("_")[2]) / 10 - 180, abs=0.75)


@pytest.mark.real_data
def test_real_products_that_cannot_be_used_are_named(real_mars, tmp_path):
    with open(real_mars / "MANIFEST.csv", newline="") as stream:
        sizes = {row["path"]: (row["width"], row["height"]) for row in csv.DictReader(stream)}
    null = "raw/hirise/ESP_042252_1930_3-BAND_COLOR_50cm_o_cropped.cub"
    assert sizes[null] == ("40", "50")
    with pytest.raises(DataError, match="the product has no valid pixel"):
        run(str(real_mars / null), tmp_path / "a", sensor="HiRISE")
    with pytest.raises(DataError, match=r"the product's CRS cannot be used: .*k_0"):
        run(str(real_mars / "raw/other/Mars_MGS_MOLA_ClrShade_MAP2_90.0N0.0_POLA.tif"), tmp_path / "b")
    with pytest.raises(DataError, match=r"GDAL cannot open the product: .*give the label"):
        run(str(real_mars / "raw/other/megt90n000cb.img"), tmp_path / "c")
