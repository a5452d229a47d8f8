from __future__ import annotations

import json
import os
import pickle
import shutil
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset

from momo import corpus as corpus_module
from momo import stores
from momo.codecs import CODECS
from momo.corpus import Corpus
from momo.corpus_format import FORMAT_VERSION, PRODUCT_COLUMNS, fingerprint
from momo.data_prep.shards import CorpusWriter, TileRecord
from momo.errors import DataError
from momo.files import sha256_json
from tests.conftest import write_corpus


def test_tiles_come_back_as_written(tmp_path):
    corpus = Corpus(write_corpus(tmp_path / "c", dtype="uint16", seed=3), verify=True)
    assert corpus.count("train") == 24 and corpus.count("val") == 8
    tiles = [corpus.read("train", i) for i in range(24)]
    assert [t.key for t in tiles] == [f"CTX_{n:04d}" for n in range(24)]
    assert not tiles[0].valid_HW[0, 0] and tiles[1].valid_HW.all()
    high = max(float(t.value_HW.max()) for t in tiles)
    assert high == pytest.approx(65535 * 0.01 + 1.0, rel=1e-4)
    values = np.concatenate([t.value_HW[t.valid_HW] for t in tiles]).astype(np.float64)
    assert corpus.stats["mean"] == pytest.approx(values.mean(), rel=1e-6)
    assert corpus.stats["std"] == pytest.approx(values.std(), rel=1e-4)
    assert corpus.stats["count"] == values.size


def test_webdataset_reads_the_shards(tiny_corpus):
    shards = sorted(str(p) for p in (tiny_corpus / "shards").glob("train-*.tar"))
    keys = [s["__key__"] for s in webdataset.WebDataset(shards, shardshuffle=False, empty_check=False)]
    corpus = Corpus(tiny_corpus)
    assert keys == [corpus.read("train", i).key for i in range(corpus.count("train"))]


def test_same_tiles_give_the_same_bytes(tmp_path):
    first, second = (Corpus(write_corpus(tmp_path / name)) for name in "ab")
    assert first.manifest.fingerprint == second.manifest.fingerprint


def damage(path, how):
    target = path / "shards" / "train-000001.tar"
    raw = bytearray(target.read_bytes())
    if how == "altered":
        raw[700] ^= 1
    elif how == "short":
        raw = raw[:-512]
    target.write_bytes(raw)
    if how == "missing":
        target.unlink()


@pytest.mark.parametrize(
    ("how", "message"),
    [("altered", "a shard was altered"), ("short", "another size"), ("missing", "a shard is missing")],
)
def test_damaged_shard_is_named(tiny_corpus, tmp_path, how, message):
    shutil.copytree(tiny_corpus, tmp_path / "c")
    damage(tmp_path / "c", how)
    with pytest.raises(DataError, match=f"{message}.*train-000001.tar"):
        Corpus(tmp_path / "c", verify=True)


def test_altered_manifest_and_no_corpus(tiny_corpus, tmp_path):
    shutil.copytree(tiny_corpus, tmp_path / "c")
    manifest = tmp_path / "c" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"samples": 10', '"samples": 9', 1))
    with pytest.raises(DataError, match="the manifest was altered"):
        Corpus(tmp_path / "c")
    manifest.write_text("{")
    with pytest.raises(DataError, match="is not JSON"):
        Corpus(tmp_path / "c")
    manifest.write_text("[]")
    with pytest.raises(DataError, match="this is no corpus.*its format is momo-corpus"):
        Corpus(tmp_path / "c")
    with pytest.raises(DataError, match="this is no corpus"):
        Corpus(tmp_path)


def change_manifest(path, **fields):
    manifest = json.loads((path / "manifest.json").read_text()) | fields
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture
def copy(tiny_corpus, tmp_path):
    return shutil.copytree(tiny_corpus, tmp_path / "copy")


def test_an_older_format_is_refused_with_what_to_do(copy):
    change_manifest(copy, format_version=1)
    with pytest.raises(DataError, match=f"version 1.*reads version {FORMAT_VERSION}.*run momo prep again"):
        Corpus(copy)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dtype": "float32"}, "dtype float32"),
        ({"codec": "jpeg"}, "codec jpeg"),
        ({"tile_size": 0}, "tile_size 0"),
        ({"shards": [{"name": "../x.tar", "split": "train", "samples": 1, "bytes": 1, "sha256": ""}]}, "called '../x"),
        ({"shards": [{"name": "x.tar"}]}, "missing 4 required"),
        ({"colour": 1}, "unexpected keyword argument 'colour'"),
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused(copy, fields, message):
    change_manifest(copy, **fields)
    with pytest.raises(DataError, match=f"the manifest cannot be read.*{message}"):
        Corpus(copy)


@pytest.mark.parametrize("table", ["index.parquet", "products.parquet", "stats.json"])
def test_altered_and_missing_tables_are_named(copy, table):
    raw = bytearray((copy / table).read_bytes())
    raw[len(raw) // 2] ^= 1
    (copy / table).write_bytes(raw)
    with pytest.raises(DataError, match=f"a table was altered.*{table}"):
        Corpus(copy, verify=True)
    (copy / table).unlink()
    with pytest.raises(DataError, match=f"a table of the corpus is missing.*{table}"):
        Corpus(copy, verify=True)


# --- stored tiles -----------------------------------------------------------------------------------------------


def smooth_tiles(dtype, count=12, size=24):
    rng = np.random.default_rng(7)
    top = np.iinfo(dtype).max
    for number in range(count):
        ramp = np.add.outer(np.arange(size) * rng.normal(), np.arange(size) * rng.normal())
        field = ramp + rng.normal(size=(size, size))
        valid = np.ones((size, size), dtype=bool)
        if number % 3 == 0:
            valid[: number + 1, 2:] = False
        yield (np.where(valid, (field - field.min()) / np.ptp(field), 0) * top).astype(dtype), valid


def write_tiles(folder, codec="zstd", dtype="uint8", percentiles=True):
    """Two products with stretches of their own, three tiles a shard."""
    folder.mkdir(parents=True)
    form = {"sensor": "HiRISE", "tile_size": 24, "dtype": dtype, "synthetic": True, "tiles_per_shard": 3}
    writer = CorpusWriter(folder, codec=codec, **form)
    for number, (stored, valid) in enumerate(smooth_tiles(dtype)):
        product = number % 2
        meta = {"product_id": f"P{product}", "row": 0, "col": number, "scale": 0.1 + product, "offset_value": -product}
        split = "val" if number % 5 == 4 else "train"
        writer.add(TileRecord(key=f"k{number:02d}", split=split, stored_HW=stored, valid_HW=valid, meta=meta))
    rows = [{"product_id": f"P{n}", "percentile_low": n + 1.0, "percentile_high": n + 9.0} for n in (1, 0)]
    writer.finish(products=rows if percentiles else [{"product_id": "P0"}], prep={}, licence="CC0-1.0")
    return folder


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_stored_tiles_and_their_statistics_are_those_of_the_pixels(tmp_path, codec, dtype):
    corpus = Corpus(write_tiles(tmp_path / "c", codec, dtype), verify=True)
    written = list(smooth_tiles(dtype))
    seen = []
    for split in ("train", "val"):
        for position in range(corpus.count(split)):
            plain, tile = corpus.read(split, position), corpus.read_stored(split, position)
            number = int(tile.key[1:])
            stored, valid = written[number]
            seen.append(number)
            assert tile.key == plain.key and tile.product_id == plain.meta["product_id"] == f"P{number % 2}"
            assert tile.stored_HW.dtype == dtype and np.array_equal(tile.stored_HW, stored)
            assert (tile.valid_HW is None) == valid.all() and np.array_equal(tile.valid, valid)
            assert np.array_equal(plain.valid_HW, valid) and np.array_equal(plain.value_HW, tile.value_HW)
            values, s = stored[valid].astype(np.float64), tile.statistics
            assert (s.low, s.high) == (values.min(), values.max())
            assert s.mean == pytest.approx(values.mean(), rel=1e-6) and s.std == pytest.approx(values.std(), rel=1e-5)
            assert (s.scale, s.offset_value) == (0.1 + number % 2, -(number % 2))
            assert (s.percentile_low, s.percentile_high) == (number % 2 + 1, number % 2 + 9)
    assert sorted(seen) == list(range(12))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("positions", [[0, 1, 2, 3, 4, 5, 6, 7, 8], [7, 2, 8, 2, 0], [1], []])
def test_a_batch_equals_its_tiles_one_by_one(tmp_path, monkeypatch, codec, dtype, positions):
    corpus = Corpus(write_tiles(tmp_path / "c", codec, dtype))
    for run_bytes in (1 << 20, 1):
        monkeypatch.setattr(corpus_module, "_RUN_BYTES", run_bytes)
        batch = corpus.read_batch("train", positions)
        tiles = [corpus.read_stored("train", position) for position in positions]
        assert batch.keys == [tile.key for tile in tiles]
        assert batch.product_ids == [tile.product_id for tile in tiles]
        assert batch.stored_BHW.shape == (len(positions), 24, 24) and batch.stored_BHW.dtype == dtype
        assert all(np.array_equal(row, tile.stored_HW) for row, tile in zip(batch.stored_BHW, tiles, strict=True))
        if all(tile.valid_HW is None for tile in tiles):
            assert batch.valid_BHW is None
        else:
            assert all(np.array_equal(row, tile.valid) for row, tile in zip(batch.valid_BHW, tiles, strict=True))
        for name, column in vars(batch.statistics).items():
            assert column.shape == (len(positions),) and column.dtype == np.float64
            assert column.tolist() == [getattr(tile.statistics, name) for tile in tiles]


def test_neighbours_are_read_at_once_and_few_files_stay_open(tmp_path, monkeypatch):
    corpus = Corpus(write_tiles(tmp_path / "c"))
    sizes = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, size, offset: sizes.append(size) or pread(fd, size, offset))
    whole = corpus.read_batch("train", range(9))
    assert len(sizes) == 3 == len(corpus.store._files)
    monkeypatch.setattr(stores, "_OPEN_FILES", 1)
    corpus = Corpus(tmp_path / "c")
    assert [corpus.read_stored("train", position).key for position in range(9)] == whole.keys
    assert len(corpus.store._files) == 1


def test_short_reads_are_continued(tmp_path, monkeypatch):
    corpus = Corpus(write_tiles(tmp_path / "c"))
    keys = corpus.read_batch("train", range(9)).keys
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, size, offset: pread(fd, min(size, 700), offset))
    assert corpus.read_batch("train", range(9)).keys == keys
    monkeypatch.setattr(os, "pread", lambda fd, size, offset: b"")
    with pytest.raises(DataError, match="a shard ends early.*train-000000.tar at byte 0"):
        corpus.read_stored("train", 0)

    def broken(fd, size, offset):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pread", broken)
    with pytest.raises(DataError, match="cannot be read: .*train-000000.tar: Input/output error"):
        corpus.read_stored("train", 0)


def test_a_corpus_goes_to_another_process(tmp_path):
    corpus = Corpus(write_tiles(tmp_path / "c"))
    tile = corpus.read_stored("train", 4)
    assert "index" not in pickle.loads(pickle.dumps(corpus)).__dict__
    again = pickle.loads(pickle.dumps(corpus)).read_stored("train", 4)
    assert again.key == tile.key and np.array_equal(again.stored_HW, tile.stored_HW)


def test_products_have_a_table_of_their_own(tmp_path):
    corpus = Corpus(write_tiles(tmp_path / "c"))
    assert [row["product_id"] for row in corpus.products] == ["P1", "P0"] and corpus.manifest.products == 2
    assert set(corpus.products[0]) == set(PRODUCT_COLUMNS)
    bare = Corpus(write_tiles(tmp_path / "bare", percentiles=False))
    assert all(np.isnan(bare.read_stored("train", n).statistics.percentile_low) for n in range(4))
    (tmp_path / "c" / "products.parquet").unlink()
    with pytest.raises(DataError, match="a table of the corpus is missing.*products.parquet"):
        _ = corpus.products
    with pytest.raises(DataError, match="a table of the corpus is missing.*products.parquet"):
        Corpus(tmp_path / "c").read_stored("train", 0)


def test_a_tile_that_cannot_be_decoded_is_named(tmp_path):
    path = write_tiles(tmp_path / "c")
    corpus = Corpus(path)
    _, offset, _nbytes = corpus.index["train"].place(1)
    shard = path / "shards" / "train-000000.tar"
    raw = bytearray(shard.read_bytes())
    with tarfile.open(shard) as tar:
        member = next(m for m in tar if m.name == "k01.zst")
    raw[member.offset_data + 20] ^= 0xFF
    shard.write_bytes(raw)
    for read in (corpus.read, corpus.read_stored, lambda split, number: corpus.read_batch(split, [0, number])):
        with pytest.raises(
            DataError, match=f"cannot be decoded: train-000000.tar at byte {offset}: .*momo prep verify"
        ):
            read("train", 1)
    assert corpus.read("train", 2).key == "k02"
    tiles = corpus.read_places(corpus.index["train"].places(np.array([2, 1, 0])))
    (bad,) = tiles.unreadable
    assert (bad.slot, bad.shard, bad.offset) == (1, "train-000000.tar", offset) and "cannot be decoded" in str(
        bad.error
    )
    assert tiles.keys == ["k02", "", "k00"] and not tiles.stored_BHW[1].any() and not tiles.valid_BHW[1].any()
    assert corpus.keys_at([(bad.shard, bad.offset), ("none.tar", 5)]) == ["k01", "none.tar at byte 5"]
    (path / "index.parquet").unlink()
    assert corpus.keys_at([(bad.shard, bad.offset)]) == [f"train-000000.tar at byte {offset}"]


# --- index ------------------------------------------------------------------------------------------------------


def change_index(path, change, name="index.parquet"):
    table = change(pq.read_table(path / name))
    pq.write_table(table, path / name)


def with_value(name, row, value):
    def change(table):
        column = table[name].to_pylist()
        column[row] = value
        place = table.schema.get_field_index(name)
        return table.set_column(place, table.schema.field(name), pa.array(column, type=table.schema.field(name).type))

    return change


def test_rows_in_any_order_give_the_same_tiles(tmp_path):
    path = write_tiles(tmp_path / "c")
    keys = [Corpus(path).read_stored("train", n).key for n in range(9)]
    statistics = [Corpus(path).read_stored("train", n).statistics for n in range(9)]
    change_index(path, lambda table: table.take(np.random.default_rng(0).permutation(len(table))))
    corpus = Corpus(path)
    assert [corpus.read_stored("train", n).key for n in range(9)] == keys
    assert [corpus.read_stored("train", n).statistics for n in range(9)] == statistics


@pytest.mark.parametrize("batch", [1, 5, 1 << 18])
def test_the_index_does_not_depend_on_how_it_is_read(tmp_path, monkeypatch, batch):
    path = write_tiles(tmp_path / "c")
    expected = Corpus(path).index
    monkeypatch.setattr("momo.corpus_index._BATCH", batch)
    index = Corpus(path).index
    for split, rows in expected.items():
        everything = np.arange(len(rows))
        for name, column in vars(rows.statistics_of(everything)).items():
            np.testing.assert_array_equal(getattr(index[split].statistics_of(everything), name), column)
        assert [rows.place(n) for n in everything] == [index[split].place(n) for n in everything]
        assert rows.nbytes <= 32 * len(rows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_value("offset", 3, 100), "the index points outside a shard.*row 3: byte 100"),
        (with_value("nbytes", 2, 1 << 30), "the index points outside a shard.*row 2"),
        (with_value("offset", 1, -512), "the index points outside a shard.*row 1"),
        (with_value("shard", 0, "train-000009.tar"), "names a shard that the manifest has not.*train-000009.tar"),
        (with_value("split", 0, "test"), "names a split that the manifest has not.*test"),
        (with_value("split", 0, "val"), "index and manifest disagree: 9 train rows, 10 in the manifest"),
        (with_value("stored_mean", 5, None), "has gaps.*stored_mean"),
        (with_value("stored_std", 5, float("nan")), "has gaps.*stored_std"),
        (with_value("scale", 5, float("inf")), "has gaps.*scale"),
        (with_value("product_id", 5, None), "has gaps.*product_id"),
        (with_value("stored_max", 5, 70000), "a stored value is out of range.*stored_max"),
        (lambda table: table.drop_columns(["stored_mean"]), "lacks a column.*stored_mean"),
        (with_value("offset", 1, 0), "two tiles of the index are one sample"),
    ],
)
def test_an_index_that_contradicts_the_corpus_is_refused(tmp_path, change, message):
    path = write_tiles(tmp_path / "c")
    change_index(path, change)
    with pytest.raises(DataError, match=message):
        Corpus(path).read_stored("train", 0)


def test_damaged_and_missing_index(tmp_path):
    path = write_tiles(tmp_path / "c")
    (path / "index.parquet").write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(DataError, match="a table of the corpus cannot be read.*index.parquet"):
        Corpus(path).read_stored("train", 0)
    (path / "index.parquet").unlink()
    with pytest.raises(DataError, match="a table of the corpus is missing.*index.parquet"):
        Corpus(path).read("train", 0)


def test_the_fingerprint_is_the_hash_of_the_shard_list(tiny_corpus):
    manifest = json.loads((tiny_corpus / "manifest.json").read_text())
    assert (
        sha256_json(manifest["shards"]) == manifest["fingerprint"] == fingerprint(Corpus(tiny_corpus).manifest.shards)
    )
