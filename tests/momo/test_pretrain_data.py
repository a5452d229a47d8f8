"""Samples and network input: the same numbers as the plain way, wherever the scaling is done."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import DataLoader

from momo.config import load_config
from momo.corpus import Corpus
from momo.errors import ConfigError
from momo.normalise import POLICIES, Normalisation
from momo.pretrain import PretrainConfig
from momo.pretrain.data import Sources, TrainTiles, ValidationTiles, open_sources, to_inputs
from tests.conftest import write_corpus


def with_percentiles(path):
    """Gives every product its 1st and 99th percentile, as prep does."""
    corpus = Corpus(path)
    values = {}
    for split in ("train", "val"):
        for position in range(corpus.count(split)):
            tile = corpus.read(split, position)
            values.setdefault(tile.meta["product_id"], []).append(tile.value_HW[tile.valid_HW])
    ends = [np.percentile(np.concatenate(parts), [1, 99]) for parts in values.values()]
    columns = {
        "product_id": list(values),
        "percentile_low": [e[0] for e in ends],
        "percentile_high": [e[1] for e in ends],
    }
    pq.write_table(pa.table(columns), path / "products.parquet")
    return path


def config_of(path, *overrides):
    return load_config(PretrainConfig, None, ["out=o", f"data.corpora=[{path}]", *overrides])


def limits_of(tile):
    return tile.statistics.percentile_low, tile.statistics.percentile_high


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("policy", POLICIES)
def test_training_and_validation_input_equals_the_plain_way(tmp_path, policy, dtype):
    path = with_percentiles(write_corpus(tmp_path / "c", dtype=dtype, seed=2))
    sources = open_sources(config_of(path, f"data.normalisation={policy}"), verify=False)
    corpus, normalisation = sources.corpora[0], sources.normalisations[0]
    train = TrainTiles(sources, patches=16, augment=False, seed=0, cache_mb=1)
    val = ValidationTiles(corpus, normalisation, patches=16, limit=100, seed=0)
    for split, batch in (
        ("train", [train[(0, n)] for n in range(24)]),
        ("val", list(DataLoader(val, batch_size=None))),
    ):
        images, valid, noise = to_inputs(
            torch.utils.data.default_collate(batch), limit=normalisation.limit, in_chans=3, device="cpu"
        )
        assert images.shape[1:] == (3, 32, 32) and valid.shape[1:] == (32, 32) and noise.shape[1:] == (16,)
        for position, (image, mask) in enumerate(zip(images, valid, strict=True)):
            tile = corpus.read(split, position)
            plain = normalisation(tile.value_HW, tile.valid_HW, limits_of(corpus.read_stored(split, position)))
            assert np.array_equal(mask.numpy(), tile.valid_HW)
            for channel in image.numpy():
                np.testing.assert_allclose(channel, plain, atol=2e-5)
        assert float(images.std()) > 0.1


def test_symmetries_turn_pixels_and_validity_together(tmp_path):
    sources = Sources([Corpus(write_corpus(tmp_path / "c"))], [Normalisation()])
    straight, turned = (TrainTiles(sources, patches=16, augment=augment, seed=0) for augment in (False, True))
    kinds = set()
    for epoch in range(20):
        a, b = straight[(epoch, 0)], turned[(epoch, 0)]
        symmetries = [
            (k, m, np.rot90(a["stored"].numpy()[:, ::-1] if m else a["stored"].numpy(), k))
            for k in range(4)
            for m in (0, 1)
        ]
        (kind,) = {(k, m) for k, m, pixels in symmetries if np.array_equal(pixels, b["stored"].numpy())}
        kinds.add(kind)
        assert not b["stored"][~b["valid"]].any()
        assert int(b["valid"].sum()) == int(a["valid"].sum()) < a["valid"].numel()
        assert torch.equal(a["affine"], b["affine"])
    assert len(kinds) > 4


def test_corpora_of_8_and_16_bit_share_a_batch(tmp_path):
    types = {"CTX": "uint8", "HiRISE": "uint16"}
    paths = [write_corpus(tmp_path / name, sensor=name, dtype=dtype) for name, dtype in types.items()]
    joint = open_sources(config_of(f"{paths[0]},{paths[1]}"), verify=False)
    alone = Sources(joint.corpora[:1], joint.normalisations[:1])
    assert (joint.dtype, alone.dtype) == ("uint16", "uint8")
    samples = TrainTiles(joint, patches=16, augment=True, seed=0)
    batch = torch.utils.data.default_collate([samples[(0, n)] for n in (1, 30)])
    images, _, _ = to_inputs(batch, limit=4.0, in_chans=1, device="cpu")
    assert batch["stored"].dtype == torch.uint16 and batch["key"] == ["CTX_0001", "HiRISE_0006"]
    single = torch.utils.data.default_collate([TrainTiles(alone, patches=16, augment=True, seed=0)[(0, 1)]])
    assert single["stored"].dtype == torch.uint8
    assert torch.equal(to_inputs(single, limit=4.0, in_chans=1, device="cpu")[0][0], images[0])


def test_worker_processes_give_the_same_batches(tmp_path):
    sources = Sources([Corpus(write_corpus(tmp_path / "c", dtype="uint16"))], [Normalisation()])
    tiles = TrainTiles(sources, patches=16, augment=True, seed=0)
    places = [[(0, 1), (0, 5)], [(1, 7), (1, 0)]]
    here, there = (
        list(DataLoader(tiles, batch_sampler=places, num_workers=n, multiprocessing_context="spawn" if n else None))
        for n in (0, 1)
    )
    for a, b in zip(here, there, strict=True):
        assert a["key"] == b["key"] and all(torch.equal(a[k], b[k]) for k in ("stored", "valid", "affine", "noise"))


def test_the_cache_holds_stored_tiles_when_they_fit(tmp_path):
    sources = Sources(
        [Corpus(write_corpus(tmp_path / "c", tiles=600, val=1, size=32, invalid=False))], [Normalisation()]
    )
    # 600 tiles of 32 * 32 px, one byte a pixel and at worst one for its validity: 1.17 MB.
    none, some = (TrainTiles(sources, patches=16, augment=False, seed=0, cache_mb=mb) for mb in (1, 2))
    for tiles in (none, some):
        _ = tiles[(0, 3)]
    assert none._cache is None and list(some._cache) == [3] and some._cache[3].stored_HW.dtype == np.uint8


def test_sensor_zscore_refuses_mixed_units(tmp_path):
    path = write_corpus(tmp_path / "c")
    manifest = json.loads((path / "manifest.json").read_text()) | {"mixed_units": True}
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match="sensor_zscore needs one unit.*joins products of different units"):
        open_sources(config_of(path, "data.normalisation=sensor_zscore"), verify=False)
    assert open_sources(config_of(path), verify=False).normalisations == [Normalisation()]


def test_per_product_percentile_refuses_products_without(tmp_path):
    path = write_corpus(tmp_path / "c")
    with pytest.raises(ConfigError, match="needs percentiles of every product.*4 products without, for example P0, P1"):
        open_sources(config_of(path, "data.normalisation=per_product_percentile"), verify=False)
