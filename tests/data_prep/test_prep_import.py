"""Import of MOMO's published layout: pixels and splits kept, every kind of bad row counted with its line."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pyarrow", reason="pyarrow is not installed (extra prep)")
import pyarrow.parquet as parquet
from PIL import Image

from momo.corpus import Corpus
from momo.data_prep.importing import ImportConfig, import_momo
from momo.data_prep.verifying import VerifyConfig, verify
from momo.errors import ConfigError, DataError

SIZE = 24
HEAD = ["which_instrument", "GMoM_Unit_acronym", "Filename", "Split"]


def pixels(number, dtype=np.uint8):
    return np.random.default_rng(number).integers(1, np.iinfo(dtype).max, (SIZE, SIZE)).astype(dtype)


def put(root: Path, row, image) -> None:
    path = root / row[0] / "processed_data" / row[1] / row[2]
    path.parent.mkdir(parents=True, exist_ok=True)
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(path)


def write_csv(path: Path, rows, head=HEAD) -> Path:
    with open(path, "w", newline="", encoding="utf-8-sig") as stream:
        csv.writer(stream).writerows([head, *rows])
    return path


@pytest.fixture
def momo(tmp_path):
    """Six CTX tiles in two units and one HiRISE tile, in the published layout."""
    rows = [["CTX", ("lNh", "eAb")[n % 2], f"tile.{n}.png", ("train", "train", "val")[n % 3]] for n in range(6)]
    rows.insert(2, ["HiRISE", "lNh", "other.png", "train"])
    for number, row in enumerate(rows):
        put(tmp_path / "data", row, pixels(number))
    write_csv(tmp_path / "tiles.csv", rows)
    return tmp_path


def run(folder: Path, **options):
    lines: list[str] = []
    values = {"root": str(folder / "data"), "csv": str(folder / "tiles.csv"), "out": str(folder / "out"),
              "sensor": "CTX", "tiles_per_shard": 2, **options}  # fmt: skip
    return import_momo(ImportConfig(**values), lines.append), lines


def extend(folder: Path, *rows) -> None:
    with open(folder / "tiles.csv", "a", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows(rows)


def test_tiles_splits_units_and_provenance_are_kept(momo):
    result, lines = run(momo)
    assert result.exit_code == 0 and result.path == momo / "out"
    verify(VerifyConfig(corpus=str(momo / "out")), lambda line: None)
    corpus = Corpus(momo / "out")
    assert (corpus.count("train"), corpus.count("val")) == (4, 2)
    tile = corpus.read("val", 0)
    assert tile.key == "lNh__tile_2" and tile.meta["unit"] == "lNh" and tile.meta["gsd_m"] == 5.0
    assert np.array_equal(tile.value_HW, pixels(3).astype(np.float32)) and tile.valid_HW.all()
    rows = parquet.read_table(momo / "out" / "index.parquet").to_pylist()
    assert {row["cell"] for row in rows} == {-1} and {row["block"] for row in rows} == {""}
    products = parquet.read_table(momo / "out" / "products.parquet").to_pylist()
    assert [row["product_id"] for row in products] == [f"tile.{n}" for n in range(6)]
    assert products[0]["source"] == "CTX/processed_data/lNh/tile.0.png" and len(products[0]["sha256"]) == 64
    manifest = corpus.manifest
    assert manifest.prep["imported"] == "MOMO's published layout" and manifest.licence == "CC-BY-4.0"
    assert not (momo / "out" / "products.jsonl").exists()
    assert "  1 HiRISE rows passed over" in lines
    assert "6 of 6 rows became tiles of 24 px, uint8 (train 4, val 2); bad rows: none" in lines[-1]


def test_same_input_gives_the_same_bytes(momo):
    run(momo)
    run(momo, out=str(momo / "again"))
    for name in ("index.parquet", "shards/train-000000.tar", "stats.json"):
        assert (momo / "out" / name).read_bytes() == (momo / "again" / name).read_bytes()


def test_one_split_alone(momo):
    _, lines = run(momo, split="train")
    assert "  2 val rows passed over" in lines and Corpus(momo / "out").count("val") == 0


@pytest.mark.parametrize("codec", ["zstd", "png"])
def test_sixteen_bit_rgb_and_nodata(tmp_path, codec):
    grey = pixels(0, np.uint16)
    grey[:4] = 0
    put(tmp_path / "data", ["THEMIS", "u", "a.png", "train"], grey)
    write_csv(tmp_path / "tiles.csv", [["THEMIS", "u", "a.png", "Train"]])
    run(tmp_path, sensor="themis", nodata=0, gsd_m=90.0, codec=codec)
    tile = Corpus(tmp_path / "out").read("train", 0)
    assert np.array_equal(tile.value_HW, grey) and not tile.valid_HW[:4].any() and tile.valid_HW[4:].all()
    assert tile.meta["gsd_m"] == 90.0
    put(tmp_path / "data", ["CTX", "u", "b.png", "train"], np.repeat(pixels(1)[..., None], 3, axis=2))
    write_csv(tmp_path / "tiles.csv", [["CTX", "u", "b.png", "train"]])
    run(tmp_path, out=str(tmp_path / "rgb"))
    assert np.array_equal(Corpus(tmp_path / "rgb").read("train", 0).value_HW, pixels(1))


def bad_cases(root: Path):
    colour = np.repeat(pixels(1)[..., None], 3, axis=2)
    colour[0, 0, 1] ^= 1
    nan = np.full((SIZE, SIZE), np.nan, np.float32)
    images = {
        "flat.png": np.full((SIZE, SIZE), 7, np.uint8),
        "deep.png": pixels(2, np.uint16),
        "small.png": pixels(3)[:8, :8],
        "wide.png": pixels(3)[:8],
        "colour.png": colour,
        "nan.tif": Image.fromarray(nan, mode="F"),
        "alpha.png": Image.fromarray(np.repeat(pixels(4)[..., None], 4, axis=2)),
    }
    for name, image in images.items():
        put(root, ["CTX", "bad", name], image)
    (root / "CTX/processed_data/bad/torn.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(30))
    return {
        ("CTX", "bad", "flat.png", "train"): "constant: every valid pixel is 7",
        ("CTX", "bad", "deep.png", "train"): "another bit depth: uint16, the first image is uint8",
        ("CTX", "bad", "small.png", "train"): "another size: 8 x 8 pixels, expected 24 x 24",
        ("CTX", "bad", "wide.png", "train"): "another size: 24 x 8 pixels, expected 24 x 24",
        ("CTX", "bad", "colour.png", "train"): "coloured image: its three channels differ",
        ("CTX", "bad", "nan.tif", "train"): "not 8 or 16 bit: floating-point pixels, NaN among them",
        ("CTX", "bad", "alpha.png", "train"): "not 8 or 16 bit: image mode RGBA",
        ("CTX", "bad", "torn.png", "train"): "image cannot be decoded",
        ("CTX", "bad", "gone.png", "train"): "file missing",
        ("CTX", "lNh", "tile.0.png", "train"): "listed twice: the tile of line 2 has this unit and name",
        ("CTX", "lNh", "tile.1.png", "test"): "unknown split: 'test', train or val",
        ("CTX", "../..", "tile.1.png", "train"): "no plain names: unit and file are names inside root",
        ("CTX", "lNh", "/etc/passwd", "train"): "no plain names",
        ("CTX", "", "tile.1.png", "train"): "no plain names",
        ("MOC", "lNh", "tile.1.png", "train"): "unknown instrument: 'MOC', one of HiRISE, CTX, THEMIS",
    }


def test_bad_rows_are_counted_and_named_by_line(momo):
    cases = bad_cases(momo / "data")
    extend(momo, *cases)
    result, lines = run(momo)
    assert result.exit_code == 3
    for line, (row, reason) in enumerate(cases.items(), start=9):
        source = f"line {line}: {row[0]}/processed_data/{row[1]}/{row[2]}"
        (found,) = [failure for failure in result.failures if failure["source"] == source]
        assert found["reason"].startswith(reason)
        assert f"  {source}: {found['reason']}" in lines
    corpus = Corpus(momo / "out")
    assert corpus.count("train") + corpus.count("val") == 6
    assert corpus.manifest.failures == result.failures
    counted = json.loads((momo / "out" / "report.json").read_text())["cutting"]["dropped"]
    assert counted["another size"] == 2 and counted["no plain names"] == 3 and sum(counted.values()) == len(cases)
    assert "bad rows: 1 another bit depth, 2 another size" in lines[-1]


def test_on_error_stop_names_the_row_and_leaves_nothing(momo):
    for row, reason in bad_cases(momo / "data").items():
        (momo / "tiles.csv").write_text(",".join(HEAD) + "\nCTX,lNh,tile.0.png,train\n" + ",".join(row) + "\n")
        with pytest.raises(DataError, match="a row cannot be imported") as caught:
            run(momo, on_error="stop")
        assert f"tiles.csv, line 3 ({row[0]}/processed_data/" in str(caught.value) and reason in str(caught.value)
        assert not (momo / "out").exists() and not list(momo.glob(".out*"))


def test_more_bad_rows_than_are_listed(momo):
    extend(momo, *[["CTX", "lNh", f"gone{n}.png", "train"] for n in range(30)])
    result, lines = run(momo)
    assert len(result.failures) == 20 and "  and 10 more bad rows" in lines and "30 file missing" in lines[-1]


def test_same_stem_in_two_units_gives_two_products(momo):
    put(momo / "data", ["CTX", "eAb", "tile.0.png"], pixels(50))
    extend(momo, ["CTX", "eAb", "tile.0.png", "train"])
    assert run(momo)[0].exit_code == 0
    verify(VerifyConfig(corpus=str(momo / "out")), lambda line: None)
    products = parquet.read_table(momo / "out" / "products.parquet", columns=["product_id"])["product_id"].to_pylist()
    assert {"lNh/tile.0", "eAb/tile.0", "tile.1"} <= set(products) and len(set(products)) == 7


def test_very_long_names_stay_unique(momo):
    names = [f"{'x' * 120}{n}.png" for n in range(2)]
    for n, name in enumerate(names):
        put(momo / "data", ["CTX", "lNh", name], pixels(60 + n))
    extend(momo, *[["CTX", "lNh", name, "train"] for name in names])
    result, _ = run(momo)
    keys = parquet.read_table(momo / "out" / "index.parquet", columns=["key"])["key"].to_pylist()
    assert result.exit_code == 0 and len(set(keys)) == 8 and max(map(len, keys)) <= 90


def test_unusable_input_is_a_message(momo):
    with pytest.raises(DataError, match="the root folder does not exist"):
        run(momo, root=str(momo / "nowhere"))
    with pytest.raises(DataError, match="the CSV does not exist"):
        run(momo, csv=str(momo / "nowhere.csv"))
    with pytest.raises(DataError, match="the CSV has no row to import: .*tiles.csv for THEMIS, split all"):
        run(momo, sensor="THEMIS")
    write_csv(momo / "short.csv", [["CTX", "a"]], head=HEAD[:2])
    with pytest.raises(DataError, match="the CSV lacks columns: Filename, Split in .*; it has which_instrument, GMoM"):
        run(momo, csv=str(momo / "short.csv"))
    (momo / "latin.csv").write_bytes(",".join(HEAD).encode() + b"\nCTX,\xff\xfe,a,train\n")
    with pytest.raises(DataError, match="the CSV cannot be read: .*latin.csv, after line 1"):
        run(momo, csv=str(momo / "latin.csv"))
    write_csv(momo / "gone.csv", [["CTX", "lNh", "gone.png", "train"]])
    with pytest.raises(DataError, match="no row gives a tile: 1 bad rows, the last listed: line 2: .*file missing"):
        run(momo, csv=str(momo / "gone.csv"))
    (momo / "out").mkdir()
    with pytest.raises(DataError, match="the output exists already"):
        run(momo)


@pytest.mark.parametrize(
    ("option", "what"),
    [
        ({"sensor": "MOC"}, "sensor has an unknown value"),
        ({"split": "test"}, "split has an unknown value"),
        ({"nodata": -1}, "nodata is out of range: -1"),
        ({"gsd_m": float("inf")}, "gsd_m is out of range: inf"),
        ({"tiles_per_shard": 0}, "tiles_per_shard is out of range: 0"),
        ({"on_error": "stopp"}, "did you mean 'stop'"),
        ({"codec": "jpeg"}, "codec has an unknown value"),
    ],
)
def test_wrong_settings(option, what):
    with pytest.raises(ConfigError, match=what):
        ImportConfig(**{"root": "r", "csv": "c", "out": "o", "sensor": "CTX"} | option)
