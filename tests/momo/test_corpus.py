from __future__ import annotations

import shutil

import numpy as np
import pytest
import webdataset

from momo.corpus import Corpus
from momo.errors import DataError
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
    with pytest.raises(DataError, match="this is no corpus"):
        Corpus(tmp_path)
