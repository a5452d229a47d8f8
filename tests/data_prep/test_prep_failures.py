"""Bad products, damaged products, and the same command again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from momo.corpus import Corpus
from momo.data_prep import prep, tiling
from momo.data_prep.sources import Source
from momo.errors import DataError
from tests.data_prep.prep_helper import LOCATED, config_of, ground, products_of, run, tiles
from tests.data_prep.products import earth_crs, write_raster

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


def test_a_product_without_a_window_does_not_widen_the_tiles(tmp_path):
    write_raster(tmp_path / "a.tif", ground(), **LOCATED)
    write_raster(tmp_path / "b.tif", ground(20, 20).astype("float32"))
    corpus, _ = run(str(tmp_path / "*.tif"), tmp_path / "out", on_error="skip")
    assert corpus.manifest.dtype == "uint8" and len(corpus.manifest.failures) == 1


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
    write_raster(tmp_path / "in" / "b.tif", ground(seed=1), **LOCATED)
    mended = prep(config, report=lambda line: None)
    assert mended.exit_code == 0 and cuts == ["b"] and Corpus(mended.path).manifest.products == 2
    assert not (tmp_path / "out.work").exists()


def test_an_unexpected_error_is_a_failure_of_its_product(tmp_path, monkeypatch):
    for name in "ab":
        write_raster(tmp_path / f"{name}.tif", ground(seed=ord(name)), **LOCATED)
    original = tiling._cut_into

    def broken(folder, product, settings):
        if product.key == "a":
            raise ZeroDivisionError("by zero")
        return original(folder, product, settings)

    monkeypatch.setattr(tiling, "_cut_into", broken)
    corpus, text = run(str(tmp_path / "*.tif"), tmp_path / "out", on_error="skip")
    assert [entry["product_id"] for entry in products_of(corpus)] == ["b"]
    assert "FAILED a.tif: an unexpected error, a bug in momo: ZeroDivisionError: by zero" in text
    with pytest.raises(DataError, match="an unexpected error, a bug in momo: a.tif: ZeroDivisionError"):
        run(str(tmp_path / "*.tif"), tmp_path / "stop")


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
    with pytest.raises(DataError, match="no tile is left: 0 products without a tile, 1 failed, the last: the prod"):
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


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"strata": {"units": "none.gpkg", "column": "Unit"}}, r"a vector file does not exist: none\.gpkg"),
     ({"leakage": {"footprints": "none.csv"}}, r"a table of footprints cannot be read: none\.csv")],
)  # fmt: skip
def test_vector_files_are_read_before_anything_is_cut(tmp_path, settings, message):
    path = str(write_raster(tmp_path / "s.tif", ground(), **LOCATED))
    with pytest.raises(DataError, match=message):
        run(path, tmp_path / "out", **settings)
    assert [p.name for p in tmp_path.iterdir()] == ["s.tif"]


def test_reasons_do_not_repeat_the_product(tmp_path):
    source = Source(name="/data/a.tif", display="a.tif", path=Path("/data/a.tif"))
    for seen, text in [("/data/a.tif: no header", "it is bad: no header"), ("a.tif: 3 rows", "it is bad: 3 rows"),
                       ("`/data/a.tif' is no file", "it is bad: `a.tif' is no file"), ("/data/a.tif", "it is bad"),
                       (None, "it is bad")]:  # fmt: skip
        assert tiling.short_reason(DataError("it is bad", seen=seen), source) == text
