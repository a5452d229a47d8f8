"""momo prep verify: a sound corpus passes; every kind of damage is named with shard, member and byte."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pyarrow", reason="pyarrow is not installed (extra prep)")
import pyarrow.parquet as parquet

from momo.codecs import encode_mask, encode_tile
from momo.corpus_format import ShardEntry, fingerprint
from momo.data_prep.shards import CorpusWriter, TileRecord
from momo.data_prep.verifying import VerifyConfig, verify
from momo.errors import ConfigError, DataError
from momo.files import sha256_file

SIZE = 32


def make(folder: Path, *, codec="zstd", dtype="uint16", tiles=12, val=4) -> Path:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(7)
    writer = CorpusWriter(
        folder, sensor="CTX", tile_size=SIZE, dtype=dtype, synthetic=True, tiles_per_shard=5, codec=codec
    )
    for number in range(tiles + val):
        valid = np.ones((SIZE, SIZE), bool)
        valid[: SIZE // 2, :5] = number % 3 != 0
        stored = rng.integers(1, np.iinfo(dtype).max, (SIZE, SIZE)).astype(dtype)
        meta = {"product_id": f"P{number % 2}", "row": 0, "col": number * SIZE, "scale": -0.5, "offset_value": 3.0}
        meta |= {"gsd_m": 5.0, "lon": float("nan"), "lat": float("nan"), "unit": "lNh", "block": ""}
        split = "train" if number < tiles else "val"
        writer.add(TileRecord(key=f"P_{number:04d}", split=split, stored_HW=stored, valid_HW=valid, meta=meta))
    products = [{"product_id": name, "source": f"{name}.IMG", "tiles": 8} for name in ("P0", "P1")]
    writer.finish(products=products, prep={}, licence="CC0-1.0")
    return folder


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = make(tmp_path_factory.mktemp("sound") / "corpus")
    for path in (folder / "shards").glob("*.tar"):
        rewrite(path, lambda content: content)
    refit(folder)
    return folder


@pytest.fixture
def corpus(sound, tmp_path):
    return Path(shutil.copytree(sound, tmp_path / "corpus"))


def seal(folder: Path, **changes) -> None:
    """Makes sizes, hashes, tables and fingerprint fit the files, so that only the content is wrong."""
    path = folder / "manifest.json"
    fields = json.loads(path.read_text())
    for shard in fields["shards"]:
        file = folder / "shards" / shard["name"]
        shard |= {"bytes": file.stat().st_size, "sha256": sha256_file(file)}
    fields["tables"] = {name: sha256_file(folder / name) for name in fields["tables"]}
    fields |= changes
    fields["fingerprint"] = fingerprint([ShardEntry(**shard) for shard in fields["shards"]])
    path.write_text(json.dumps(fields))


def members(path: Path) -> dict[str, tuple[int, int, int]]:
    """Name -> offset of the header, of the data, size."""
    with tarfile.open(path) as tar:
        return {member.name: (member.offset, member.offset_data, member.size) for member in tar}


def patch(path: Path, at: int, data: bytes) -> None:
    with open(path, "r+b") as stream:
        stream.seek(at)
        stream.write(data)


def rewrite(path: Path, edit) -> None:
    """Writes a shard again with its (name, data) list edited; members of the same length keep their offsets."""
    with tarfile.open(path) as tar:
        content = [(member.name, tar.extractfile(member).read()) for member in tar]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in edit(content):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    path.write_bytes(buffer.getvalue())


def replaced(name: str, data: bytes):
    return lambda content: [(n, data if n == name else d) for n, d in content]


def edit_index(folder: Path, edit) -> None:
    path = folder / "index.parquet"
    table = parquet.read_table(path)
    rows = edit(table.to_pylist())
    parquet.write_table(type(table).from_pylist(rows, schema=table.schema), path)


def refit(folder: Path) -> None:
    """Brings offsets and lengths of the index, and all hashes, in line with the shards."""
    places: dict[str, list[tuple[int, int]]] = {}
    for path in (folder / "shards").glob("*.tar"):
        for name, (offset, data, size) in members(path).items():
            places.setdefault(name.partition(".")[0], []).append((offset, data + -(-size // 512) * 512))

    def fitted(row):
        here = places[row["key"]]
        return row | {"offset": here[0][0], "nbytes": here[-1][1] - here[0][0]}

    edit_index(folder, lambda rows: [fitted(row) for row in rows])
    seal(folder)


def failure(folder: Path, **options) -> str:
    with pytest.raises(DataError, match="the corpus is damaged") as caught:
        verify(VerifyConfig(corpus=str(folder), **options), lambda line: None)
    return str(caught.value)


@pytest.mark.parametrize(("codec", "dtype"), [("zstd", "uint16"), ("zstd", "uint8"), ("png", "uint16")])
def test_a_sound_corpus_passes_and_totals_are_printed(tmp_path, codec, dtype):
    folder = make(tmp_path / "corpus", codec=codec, dtype=dtype)
    lines: list[str] = []
    assert verify(VerifyConfig(corpus=str(folder)), lines.append) == folder
    assert "16 tiles (train 12, val 4) in 4 shards decoded" in lines[0] and "tiles/s" in lines[0]
    stats = json.loads((folder / "stats.json").read_text())
    assert f"mean {stats['mean']:.6g}, std {stats['std']:.6g}" in lines[1]


def test_workers_change_nothing(corpus):
    path = corpus / "shards" / "train-000001.tar"
    offset, data, _ = members(path)["P_0006.zst"]
    patch(path, data + 30, b"\xff\x00\xff")
    one, two = failure(corpus), failure(corpus, workers=2)
    assert one == two
    assert f"train-000001.tar, P_0006.zst at byte {offset}: it cannot be decoded" in one
    assert failure(corpus, all=True) == failure(corpus, all=True, workers=2)


def test_not_a_corpus(tmp_path):
    with pytest.raises(DataError, match="this is no corpus"):
        verify(VerifyConfig(corpus=str(tmp_path)))
    with pytest.raises(ConfigError, match="workers is out of range: 0"):
        VerifyConfig(corpus="x", workers=0)


def test_altered_manifest(corpus):
    text = (corpus / "manifest.json").read_text()
    (corpus / "manifest.json").write_text(text.replace('"samples": 5', '"samples": 6', 1))
    with pytest.raises(DataError, match="the manifest was altered"):
        verify(VerifyConfig(corpus=str(corpus)))


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("../outside.tar", "a shard is called '../outside.tar'"),
        ("train-000000.zip", "the manifest names a shard that cannot be one: 'train-000000.zip'"),
        ("train-000001.tar", "the manifest names a shard that cannot be one: 'train-000001.tar'"),
    ],
)
def test_shard_name_that_cannot_be(corpus, name, what):
    shards = json.loads((corpus / "manifest.json").read_text())["shards"]
    path = corpus / "manifest.json"
    shards[0]["name"] = name
    mark = fingerprint([ShardEntry(**shard) for shard in shards])
    path.write_text(json.dumps(json.loads(path.read_text()) | {"shards": shards, "fingerprint": mark}))
    with pytest.raises(DataError, match=what):
        verify(VerifyConfig(corpus=str(corpus)))


def test_tables_missing_altered_or_unknown(corpus):
    (corpus / "products.parquet").rename(corpus / "gone")
    assert "products.parquet: the file is missing" in failure(corpus)
    (corpus / "gone").rename(corpus / "products.parquet")
    (corpus / "stats.json").write_text((corpus / "stats.json").read_text() + " ")
    assert "stats.json: it was altered: sha256" in failure(corpus)
    seal(corpus, tables={})
    assert "manifest.json: it has no hash of index.parquet" in failure(corpus)


def test_damaged_table_is_a_message(corpus):
    (corpus / "index.parquet").write_bytes(b"PAR1" + bytes(100))
    seal(corpus)
    assert "index.parquet or products.parquet: it cannot be read" in failure(corpus)


def test_shards_missing_or_unlisted_or_miscounted(corpus):
    shutil.copy(corpus / "shards" / "val-000000.tar", corpus / "shards" / "val-000009.tar")
    assert "shards/val-000009.tar: the manifest does not list this shard" in failure(corpus)
    (corpus / "shards" / "val-000009.tar").unlink()
    seal(corpus, splits={"train": 11, "val": 4})
    assert "manifest.json: split 'train' has 11 tiles, its shards 12" in failure(corpus)
    seal(corpus, splits={"train": 12, "val": 4})
    (corpus / "shards" / "val-000000.tar").unlink()
    assert "shards/val-000000.tar: the shard is missing" in failure(corpus)


def test_truncated_shard_names_the_member_that_is_cut(corpus):
    path = corpus / "shards" / "train-000001.tar"
    places = members(path)
    offset = places["P_0008.zst"][0]
    with open(path, "r+b") as stream:
        stream.truncate(offset + 700)
    text = failure(corpus)
    assert f"train-000001.tar, P_0008.zst at byte {offset}: the file ends inside it, at byte {offset + 700}" in text
    everything = failure(corpus, all=True)
    assert "shards/train-000001.tar: " in everything and "bytes, the manifest says" in everything
    assert f"sample P_0009 at byte {places['P_0009.json'][0]}: the index has it, the shard does not" in everything


@pytest.mark.parametrize(("keep", "what"), [(0, "it was cut"), (512, "half an end mark")])
def test_missing_end_mark(corpus, keep, what):
    path = corpus / "shards" / "val-000000.tar"
    _, data, size = list(members(path).values())[-1]
    end = data + -(-size // 512) * 512
    with open(path, "r+b") as stream:
        stream.truncate(end + keep)
    assert f"val-000000.tar, the end of the archive at byte {end}: " in failure(corpus)
    assert what in failure(corpus)


def test_damaged_header_does_not_end_the_check(corpus):
    path = corpus / "shards" / "train-000000.tar"
    places = members(path)
    first, later = places["P_0001.zst"][0], places["P_0003.json"]
    patch(path, first + 3, b"#")
    patch(path, later[1], b"[")
    assert f"train-000000.tar, a member at byte {first}: no tar header there: bad checksum" in failure(corpus)
    everything = failure(corpus, all=True)
    assert "3 problems" in everything  # the header, the JSON behind it, and the hash
    assert f"P_0003.json at byte {later[0]}: no JSON" in everything


def test_a_flipped_pixel_is_named_even_when_it_decodes(tmp_path):
    folder = make(tmp_path / "corpus", codec="zstd", dtype="uint8", tiles=2, val=1)
    path = folder / "shards" / "train-000000.tar"
    _, data, size = members(path)["P_0001.zst"]
    raw = path.read_bytes()
    from momo.codecs import decode_tile

    tile = decode_tile(raw[data : data + size], "zstd", "uint8", SIZE).copy()
    tile[20, 20] ^= 64
    rewrite(path, replaced("P_0001.zst", encode_tile(tile, "zstd")))
    refit(folder)
    offset = members(path)["P_0001.zst"][0]
    assert f"P_0001.zst at byte {offset}: its stored_m" in failure(folder)


def test_altered_padding_is_an_altered_shard(corpus):
    path = corpus / "shards" / "train-000000.tar"
    _, data, size = members(path)["P_0001.json"]
    patch(path, data + size, b"\x01")
    assert "shards/train-000000.tar: it was altered: sha256" in failure(corpus)


def sealed_failure(corpus, name, data, shard="train-000000.tar"):
    """Replaces a member, makes hashes and index offsets fit, and returns the message."""
    rewrite(corpus / "shards" / shard, replaced(name, data))
    refit(corpus)
    return failure(corpus)


def meta_of(corpus, name, changes):
    with tarfile.open(corpus / "shards" / "train-000000.tar") as tar:
        meta = json.loads(tar.extractfile(f"{name}.json").read())
    meta |= changes
    return json.dumps({field: value for field, value in meta.items() if value != "drop"}).encode()


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"key": "other"}, "key is 'other', the index says 'P_0002'"),
        ({"split": "val"}, "split is 'val', the index says 'train'"),
        ({"scale": 0.25}, "scale is 0.25, the index says -0.5"),
        ({"lon": 12.0}, "lon is 12.0, the index says nan|lon is 12.0, the index says None"),
        ({"offset_value": "drop"}, "it has no offset_value"),
    ],
)
def test_json_that_disagrees_with_the_index(corpus, changes, what):
    text = sealed_failure(corpus, "P_0002.json", meta_of(corpus, "P_0002", changes))
    assert "train-000000.tar, P_0002.json at byte " in text
    assert any(form in text for form in what.split("|"))


def test_contents_of_another_size_or_kind(corpus):
    assert "P_0002.json at byte" in (text := sealed_failure(corpus, "P_0002.json", b"[1]")) and "is no object" in text


def test_tile_of_another_size(corpus):
    text = sealed_failure(corpus, "P_0002.zst", encode_tile(np.zeros((16, 16), np.uint16), "zstd"))
    assert "P_0002.zst at byte" in text and "it cannot be decoded: " in text


def test_mask_of_another_size(corpus):
    text = sealed_failure(corpus, "P_0003.valid.zst", encode_mask(np.ones((16, 16), bool), "zstd"))
    assert "P_0003.valid.zst at byte" in text and "it cannot be decoded: " in text


def test_invalid_pixel_that_is_not_zero_and_tile_without_valid_pixel(corpus):
    stored = np.full((SIZE, SIZE), 9, np.uint16)
    assert "an invalid pixel is not 0" in sealed_failure(corpus, "P_0003.zst", encode_tile(stored, "zstd"))
    nothing = encode_mask(np.zeros((SIZE, SIZE), bool), "zstd")
    sealed_failure(corpus, "P_0003.zst", encode_tile(np.zeros_like(stored), "zstd"))
    assert "no pixel is valid" in sealed_failure(corpus, "P_0003.valid.zst", nothing)


@pytest.mark.parametrize("name", ["../P_0002.zst", "/P_0002.zst", "P_0002.exe", "P_0002", "sub/P_0002.zst"])
def test_member_names_that_cannot_be(corpus, name):
    path = corpus / "shards" / "train-000000.tar"
    rewrite(path, lambda content: [(name if n == "P_0002.zst" else n, d) for n, d in content])
    seal(corpus)
    text = failure(corpus)
    assert f"{name} at byte" in text and "no name of a member; there are <key>.json, <key>.zst, <key>.valid.zst" in text


def test_links_and_huge_members_are_refused(corpus):
    path = corpus / "shards" / "train-000000.tar"
    whole = path.read_bytes()
    place = members(path)["P_0002.zst"][0]
    link = tarfile.TarInfo("P_0002.zst")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    patch(path, place, link.tobuf(tarfile.USTAR_FORMAT))
    assert "no plain file, tar type b'2'" in failure(corpus)
    path.write_bytes(whole)
    huge = tarfile.TarInfo("P_0002.zst")
    huge.size = 1 << 32
    patch(path, place, huge.tobuf(tarfile.USTAR_FORMAT))
    assert f"{1 << 32} bytes, at most" in failure(corpus)


def test_sample_missing_extra_twice_or_elsewhere(corpus):
    path = corpus / "shards" / "train-000000.tar"
    whole = path.read_bytes()
    rewrite(path, lambda content: [item for item in content if not item[0].startswith("P_0004")])
    seal(corpus)
    assert "sample P_0004 at byte" in (text := failure(corpus)) and "the index has it, the shard does not" in text
    rewrite(path, lambda content: [*content, ("P_9999.json", b"{}"), ("P_9999.zst", b"x")])
    seal(corpus)
    assert "sample P_9999 at byte" in (text := failure(corpus)) and "the index does not have it" in text
    path.write_bytes(whole)
    rewrite(path, lambda content: content + content[:2])
    seal(corpus)
    assert "sample P_0000 at byte" in (text := failure(corpus)) and "the shard holds it twice" in text
    path.write_bytes(whole)
    rewrite(path, lambda content: content[:1] + content[2:])
    seal(corpus)
    assert "sample P_0000 at byte 0: " in (text := failure(corpus)) and "the index says" in text


def test_index_rows_that_cannot_be(corpus):
    saved = (corpus / "index.parquet").read_bytes()

    def broken(edit):
        (corpus / "index.parquet").write_bytes(saved)
        edit_index(corpus, edit)
        seal(corpus)
        return failure(corpus)

    assert "1 values of key stand in it twice, P_0000" in broken(lambda rows: [*rows, rows[0] | {"offset": 99}])
    text = broken(lambda rows: [*rows, rows[0] | {"key": "new", "shard": "train-000077.tar"}])
    assert "rows of the shard train-000077.tar, which the manifest does not list" in text
    text = broken(lambda rows: [row | {"product_id": "P7"} for row in rows])
    assert "products.parquet: 1 products of the index are missing, for example P7" in text
    assert "index.parquet: it cannot be read: a row of train-000000.tar lacks" in broken(
        lambda rows: [rows[0] | {"offset": None}, *rows[1:]]
    )
    assert "the index says val, the shard is train" in broken(lambda rows: [rows[0] | {"split": "val"}, *rows[1:]])
    (corpus / "index.parquet").write_bytes(saved)
    seal(corpus, products=5)
    assert "products.parquet: 2 rows, the manifest says 5" in failure(corpus)


def test_statistics_that_disagree(corpus):
    stats = json.loads((corpus / "stats.json").read_text())
    (corpus / "stats.json").write_text(json.dumps(stats | {"std": stats["std"] * 1.001}))
    seal(corpus)
    assert "stats.json: std is" in (text := failure(corpus)) and "the training tiles give" in text
    (corpus / "stats.json").write_text("[")
    seal(corpus)
    assert "stats.json: it cannot be read" in failure(corpus)


def test_long_names_of_pax_archives_are_read(tmp_path):
    from momo.data_prep.verify_members import SampleFormat, walk_samples

    path, key = tmp_path / "a.tar", "K" * 180
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for suffix in ("json", "zst"):
            info = tarfile.TarInfo(f"{key}.{suffix}")
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
    with open(path, "rb") as stream:
        (sample,) = walk_samples(stream, 0, SampleFormat("CTX", 32, "uint8", "zstd"))
    assert sample.key == key and set(sample.members) == {"json", "zst"} and sample.offset == 0


def test_any_flipped_byte_is_found(sound, tmp_path):
    """Seeded damage at 60 places: always a message that names the shard, never a crash."""
    rng = np.random.default_rng(0)
    path = sound / "shards" / "val-000000.tar"
    whole = path.read_bytes()
    copy = Path(shutil.copytree(sound, tmp_path / "corpus"))
    for place in rng.integers(0, len(whole), 60).tolist():
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(rng.integers(8))
        (copy / "shards" / "val-000000.tar").write_bytes(damaged)
        assert "val-000000.tar" in failure(copy)
