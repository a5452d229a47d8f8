"""The writing side of a corpus: shards, tables, statistics, pieces."""

from __future__ import annotations

import hashlib
import io
import tarfile

import numpy as np
import pyarrow.parquet as parquet
import pytest

from momo.corpus_format import INDEX_COLUMNS, PRODUCT_COLUMNS
from momo.data_prep.assembly import in_order
from momo.data_prep.pieces import CutSettings, piece_id, read_info, read_table, tile_key
from momo.data_prep.products import inspect
from momo.data_prep.shards import CorpusWriter, ShardFile, TableFile, TileRecord
from momo.data_prep.sources import find_sources
from momo.data_prep.statistics import SAMPLE_TILES, PixelStatistics, value_sample
from momo.data_prep.tiling import cut
from momo.errors import DataError
from tests.conftest import write_corpus
from tests.data_prep.prep_helper import LOCATED, ground, run
from tests.data_prep.products import write_raster

QUALITY = {
    "min_valid": 0.5, "min_structure": 0.0, "max_noise": None, "max_blur": None, "max_stripes": None,
    "max_saturation": None, "max_dead_lines": None,
}  # fmt: skip
SETTINGS = CutSettings(32, 32, QUALITY, "zstd", "uint8", 8, 64)


def record(key="a", split="train", size=8, dtype="uint8", fill=None, **meta):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 200, (size, size)) if fill is None else np.full((size, size), fill)
    values = {"product_id": "P", "row": 0, "col": 0, "scale": 1.0, "offset_value": 0.0} | meta
    valid = np.ones((size, size), dtype=bool)
    return TileRecord(key=key, split=split, stored_HW=pixels.astype(dtype), valid_HW=valid, meta=values)


def writer(folder, **settings):
    folder.mkdir(exist_ok=True)
    values = {"sensor": "CTX", "tile_size": 8, "dtype": "uint8", "synthetic": True} | settings
    return CorpusWriter(folder, **values)


def product(tmp_path, seed=0):
    path = write_raster(tmp_path / "s.tif", ground(seed=seed), **LOCATED)
    (source,), _ = find_sources([str(path)])
    return inspect(source)


def test_a_shard_is_a_plain_tar_file_with_its_hash(tmp_path):
    shard = ShardFile(tmp_path, "train", 3, "zstd")
    first = shard.add("a", {"x": 1.5, "y": float("nan")}, b"pixels", None)
    second = shard.add("b", {}, b"p" * 600, b"mask")
    entry = shard.close()
    path = tmp_path / "train-000003.tar"
    assert (entry.name, entry.samples, entry.bytes) == (path.name, 2, path.stat().st_size)
    assert entry.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    with tarfile.open(path) as tar:
        members = {m.name: tar.extractfile(m).read() for m in tar}
        assert all((m.mtime, m.uname, m.mode) == (0, "momo", 0o444) for m in tar)
    assert list(members) == ["a.json", "a.zst", "b.json", "b.zst", "b.valid.zst"]
    assert members["a.json"] == b'{"x": 1.5, "y": null}' and members["b.valid.zst"] == b"mask"
    with tarfile.open(fileobj=io.BytesIO(path.read_bytes()[second[0] : sum(second)])) as part:
        assert part.getnames() == ["b.json", "b.zst", "b.valid.zst"]
    assert first[0] == 0 and sum(first) == second[0]


def test_index_and_products_have_their_columns_and_types(tmp_path):
    corpus = write_corpus(tmp_path / "c")
    for name, columns in (("index", INDEX_COLUMNS), ("products", PRODUCT_COLUMNS)):
        schema = parquet.read_schema(corpus / f"{name}.parquet")
        kinds = {field.name: str(field.type).replace("element", "item") for field in schema}
        wanted = {key: kind.replace("list<double>", "list<item: double>") for key, (kind, _) in columns.items()}
        assert {k: v.replace("double", "float64") for k, v in kinds.items()} == {
            k: v.replace("double", "float64") for k, v in wanted.items()
        }


def test_an_empty_table_is_a_table(tmp_path):
    table = TableFile(tmp_path / "t.parquet", PRODUCT_COLUMNS)
    table.close()
    table.close()
    assert parquet.read_table(tmp_path / "t.parquet").num_rows == 0


@pytest.mark.parametrize(
    ("tile", "message"),
    [(record(key="a.b"), r"a tile key cannot be used: a\.b"), (record(key="a/b"), "a tile key cannot be used: a/b"),
     (record(key="k" * 91), "1 to 90 ASCII characters"), (record(key=""), "a tile key cannot be used"),
     (record(key="ä"), "a tile key cannot be used"), (record(split="test"), "a tile has an unknown split: test"),
     (record(size=9), r"a tile does not fit the corpus: a: \(9, 9\) uint8"),
     (record(dtype="uint16"), r"a tile does not fit the corpus: .*uint16.*Rule: \(8, 8\) uint8")],
)  # fmt: skip
def test_tiles_that_do_not_fit_are_refused(tmp_path, tile, message):
    with writer(tmp_path / "c") as corpus, pytest.raises(DataError, match=message):
        corpus.add(tile)


def test_keys_are_unique_and_training_tiles_needed(tmp_path):
    with writer(tmp_path / "a") as twice:
        for _ in range(2):
            twice.add(record())
        with pytest.raises(DataError, match="a tile key was used twice"):
            twice.finish(products=[], prep={}, licence="x")
    with writer(tmp_path / "b") as empty:
        empty.add(record(split="val"))
        with pytest.raises(DataError, match="the corpus would have no training tile: 1 tiles in all"):
            empty.finish(products=[], prep={}, licence="x")


def test_statistics_equal_those_of_all_pixels_in_any_order():
    rng = np.random.default_rng(0)
    tiles = [rng.normal(rng.uniform(-50, 1e4), rng.uniform(0, 9), rng.integers(1, 200)) for _ in range(50)]
    found = []
    for order in (range(50), reversed(range(50))):
        statistics = PixelStatistics()
        for n in order:
            values = tiles[n]
            moments = (np.array([values.size]), np.array([values.mean()]), np.array([values.std()]))
            statistics.add(*moments, float(values.min()), float(values.max()))
            statistics.offer(n * 7919 % 50, values)
        found.append(statistics.to_dict())
    pixels = np.concatenate(tiles)
    for fields in found:
        assert fields["count"] == pixels.size and fields["mean"] == pytest.approx(pixels.mean(), rel=1e-12)
        assert fields["std"] == pytest.approx(pixels.std(), rel=1e-12)
        assert (fields["min"], fields["max"]) == (pixels.min(), pixels.max())
        assert fields["percentiles"]["50.0"] == pytest.approx(np.median(pixels))
    assert found[0]["percentiles"] == found[1]["percentiles"]


def test_statistics_keep_a_bounded_sample_chosen_by_priority():
    statistics = PixelStatistics()
    count = SAMPLE_TILES + 500
    statistics.add(np.array([count]), np.array([0.0]), np.array([1.0]), 0.0, 1.0)
    for n in np.random.default_rng(0).permutation(count):
        statistics.offer(int(n), np.array([float(n)]))
    kept = sorted(float(values[0]) for _, _, values in statistics._sample)
    assert kept == list(range(SAMPLE_TILES))


def test_value_sample_takes_valid_pixels_evenly():
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8)
    valid = pixels % 2 == 0
    assert value_sample(pixels, valid, 8).tolist() == list(range(0, 64, 8))
    assert value_sample(pixels, np.ones_like(valid), 100).size == 64
    assert value_sample(pixels, np.ones_like(valid), 8).base is None, "a view would keep the tile in memory"


def test_a_piece_is_found_again_by_product_and_settings(tmp_path):
    one = product(tmp_path)
    first = cut(one, SETTINGS, tmp_path / "work")
    assert first.folder is not None and first.seconds > 0 and first.info.tiles == 20
    again = cut(one, SETTINGS, tmp_path / "work")
    assert again.folder == first.folder and again.seconds == 0 and again.info == first.info
    ids = {piece_id(one, SETTINGS), piece_id(one, CutSettings(16, 16, QUALITY, "zstd", "uint8", 8, 64))}
    ids.add(piece_id(product(tmp_path, seed=1), SETTINGS))
    assert len(ids) == 3
    table = read_table(first.folder)
    assert table.num_rows == 20 and read_info(first.folder / "none") is None
    sizes = sum(table["tile_bytes"].to_pylist()) + sum(table["mask_bytes"].to_pylist())
    assert (first.folder / "tiles.bin").stat().st_size == sizes
    assert tile_key("P", 32, 64) == "P_r000032_c000064"


@pytest.mark.parametrize("name", ["piece.json", "table.arrow"])
def test_a_damaged_piece_is_named_with_what_to_do(tmp_path, name):
    done = cut(product(tmp_path), SETTINGS, tmp_path / "work")
    (done.folder / name).write_bytes(b"{")
    with pytest.raises(DataError, match=rf"in the work folder is damaged: .*{name}.*Next: remove"):
        read_info(done.folder) if name == "piece.json" else read_table(done.folder)


def test_a_named_work_folder_keeps_what_is_not_ours(tmp_path):
    path = str(write_raster(tmp_path / "s.tif", ground(), **LOCATED))
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "notes.txt").write_text("mine")
    run(path, tmp_path / "out", work=str(tmp_path / "work"))
    assert [p.name for p in (tmp_path / "work").iterdir()] == ["notes.txt"]


def test_results_are_used_in_their_order_as_soon_as_possible():
    taken = []
    results = iter([(1, "b"), (0, "a"), (3, "d"), (2, "c")])
    for value in in_order(results, 4):
        taken.append(value)
        if value == "b":
            assert next(results) == (3, "d")  # nothing beyond position 1 was asked for yet
            break
    assert taken == ["a", "b"]
    assert list(in_order(iter([(1, "b"), (0, "a")]), 2)) == ["a", "b"]
