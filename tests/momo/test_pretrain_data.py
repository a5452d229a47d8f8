"""Micro-batches and network input: the same numbers as the plain way, whoever reads and wherever from."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from momo.config import load_config
from momo.corpus import Corpus
from momo.errors import ConfigError, DataError
from momo.models.masking import augmentation_rng, mask_noise
from momo.normalise import POLICIES, Normalisation
from momo.pretrain import PretrainConfig
from momo.pretrain.data import Sources, open_sources, to_inputs
from momo.pretrain.loader import _tells_of_death, make_loader, make_plan
from tests.conftest import write_corpus

PATCHES = 16


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
    base = ["out=o", f"data.corpora=[{path}]", "train.batch_size=8", "train.samples=40", "data.workers=0"]
    return load_config(PretrainConfig, None, [*base, *overrides])


def sources_of(config):
    return open_sources(config, verify=False)


def loader_of(config, sources=None, *, start=0, stop=40, rank=0, ranks=1):
    sources = sources or sources_of(config)
    return make_loader(sources, config, patches=PATCHES, start=start, stop=stop, rank=rank, ranks=ranks, device="cpu")


def equal(a, b):
    for name in ("stored", "valid", "affine", "noise", "views"):
        one, other = a[name], b[name]
        if not (torch.equal(one, other) if isinstance(one, torch.Tensor) else one is other):
            return False
    return a["keys"] == b["keys"] and a["corrupt"] == b["corrupt"]


def assert_equal(batches, others):
    batches, others = list(batches), list(others)
    assert len(batches) == len(others) and all(equal(a, b) for a, b in zip(batches, others, strict=True))


def plain_sample(sources, epoch, tile, *, symmetries, seed=0):
    """One training sample made tile by tile with NumPy: pixels in physical units, turned, scaled; validity; noise."""
    number = int(np.searchsorted(sources.bounds, tile, side="right")) - 1
    corpus, position = sources.corpora[number], tile - int(sources.bounds[number])
    plain, stored = corpus.read("train", position), corpus.read_stored("train", position)
    limits = stored.statistics.percentile_low, stored.statistics.percentile_high
    image, valid = sources.normalisations[number](plain.value_HW, plain.valid_HW, limits), plain.valid_HW
    rng = augmentation_rng(plain.key, seed, epoch)
    if symmetries:
        turns, mirror = int(rng.integers(4)), bool(rng.integers(2))
        image, valid = (np.rot90(array[:, ::-1] if mirror else array, turns) for array in (image, valid))
    return plain.key, image, valid, mask_noise(rng, PATCHES)


@pytest.mark.parametrize("symmetries", [False, True])
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("policy", POLICIES)
def test_training_input_equals_the_plain_way(tmp_path, policy, dtype, symmetries):
    path = with_percentiles(write_corpus(tmp_path / "c", dtype=dtype, seed=2))
    config = config_of(path, f"data.normalisation={policy}", f"augment.symmetries={symmetries}")
    sources = sources_of(config)
    plan = make_plan(sources, config).batches(start=0, stop=40, batch_size=8, rank=0, ranks=1)
    for places, batch in zip(plan, loader_of(config, sources), strict=True):
        images, valid, noise = to_inputs(batch, limit=sources.normalisations[0].limit, in_chans=3, device="cpu")
        assert images.shape == (8, 3, 32, 32) and images.dtype == torch.float32 and valid.dtype == torch.bool
        assert (batch["views"] is None) == (not symmetries) and batch["corrupt"] == []
        for slot, place in enumerate(places):
            key, image, mask, draws = plain_sample(sources, *place, symmetries=symmetries)
            assert batch["keys"][slot] == key and np.array_equal(noise[slot].numpy(), draws)
            assert np.array_equal(valid[slot].numpy(), mask)
            for channel in images[slot].numpy():
                np.testing.assert_allclose(channel, image, atol=2e-5)
        assert float(images.std()) > 0.1


def test_batches_without_invalid_pixels_carry_no_validity(tmp_path):
    config = config_of(write_corpus(tmp_path / "c", invalid=False))
    for batch in loader_of(config):
        assert batch["valid"] is None
        _, valid, _ = to_inputs(batch, limit=4.0, in_chans=1, device="cpu")
        assert valid.shape == (8, 32, 32) and valid.dtype == torch.bool and valid.all()


def test_corpora_of_8_and_16_bit_share_a_batch(tmp_path):
    types = {"CTX": "uint8", "HiRISE": "uint16"}
    paths = [write_corpus(tmp_path / name, sensor=name, dtype=dtype) for name, dtype in types.items()]
    config = config_of(f"{paths[0]},{paths[1]}", "data.cache_mb=0")
    joint = sources_of(config)
    assert (joint.dtype, Sources(joint.corpora[:1], joint.normalisations[:1]).dtype) == ("uint16", "uint8")
    plan = make_plan(joint, config).batches(start=0, stop=96, batch_size=8, rank=0, ranks=1)
    mixed = 0
    for places, batch in zip(plan, loader_of(config, joint, stop=96), strict=True):
        images, _, _ = to_inputs(batch, limit=4.0, in_chans=1, device="cpu")
        assert batch["stored"].dtype == torch.uint16
        mixed += len({key[:3] for key in batch["keys"]}) == 2
        for slot, place in enumerate(places):
            key, image, _, _ = plain_sample(joint, *place, symmetries=True)
            assert batch["keys"][slot] == key
            np.testing.assert_allclose(images[slot, 0].numpy(), image, atol=2e-5)
    assert mixed > 6
    assert_equal(loader_of(config_of(f"{paths[0]},{paths[1]}"), stop=96), loader_of(config, joint, stop=96))


@pytest.mark.parametrize("order", ["global", "shards"])
def test_ranks_micro_batches_and_resuming_give_the_same_samples(tiny_corpus, order):
    options = [f"data.order={order}", "data.window_shards=1", "augment.crop_min=0.5"]
    whole = list(loader_of(config_of(tiny_corpus, *options)))
    config = config_of(tiny_corpus, *options, "train.micro_batch=2", "ranks=2")
    shares = [list(loader_of(config, rank=rank, ranks=2)) for rank in range(2)]
    assert [len(share) for share in shares] == [10, 10] == [len(loader_of(config, rank=r, ranks=2)) for r in range(2)]
    for number, batch in enumerate(whole):
        parts = [part for share in shares for part in share[2 * number : 2 * number + 2]]
        assert [key for part in parts for key in part["keys"]] == batch["keys"]
        for name in ("stored", "affine", "noise", "views"):
            assert torch.equal(torch.cat([part[name] for part in parts]), batch[name])
    assert_equal(loader_of(config_of(tiny_corpus, *options), start=24), whole[3:])
    assert list(loader_of(config_of(tiny_corpus), start=40)) == [] and len(loader_of(config, start=40)) == 0


def test_every_way_of_reading_gives_the_same_batches_and_touches_no_global_generator(tiny_corpus):
    def states():
        numpy = np.random.get_state()
        return torch.get_rng_state().tolist(), [numpy[1].tolist(), *numpy[2:]], random.getstate()

    options, before = ["augment.crop_min=0.5", "data.order=shards"], states()
    kept = list(loader_of(config_of(tiny_corpus, *options)))
    for overrides in (["data.cache_mb=0"], ["data.pipe='cat {url}'"], ["data.workers=2", "data.pipe='cat {url}'"]):
        batches = list(loader_of(config_of(tiny_corpus, *options, *overrides)))
        assert_equal(batches, kept)
        for batch in batches:
            to_inputs(batch, limit=4.0, in_chans=1, device="cpu")
    assert states() == before


def test_a_loader_may_be_left_in_the_middle(tiny_corpus):
    whole = list(loader_of(config_of(tiny_corpus)))
    for overrides in ([], ["data.cache_mb=0"]):
        loader = loader_of(config_of(tiny_corpus, *overrides))
        batches = iter(loader)
        next(batches)
        batches.close()
        assert_equal(loader, whole)


def test_tiles_are_kept_when_they_fit(tmp_path):
    # 600 tiles of 32 * 32 px, one byte a pixel and at worst one for its validity: 1.17 MB.
    path = write_corpus(tmp_path / "c", tiles=600, val=1, size=32)
    none, some = (config_of(path, f"data.cache_mb={mb}") for mb in (1, 2))
    assert loader_of(none)._reader.kept is None
    loader, sources = loader_of(some, stop=1280), sources_of(some)
    batches = list(loader)
    kept = loader._reader.kept
    assert kept.there.all() and kept._stored.dtype == np.uint8
    assert_equal(batches, loader_of(none, stop=1280))
    shutil.rmtree(path / "shards")
    assert_equal(loader, batches)
    with pytest.raises(DataError, match="a shard cannot be opened"):
        sources.corpora[0].read("train", 0)


# --- damage -----------------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(tiny_corpus, tmp_path):
    """A copy with one tile damaged (train 3) and, once opened, a shard that is gone (train 10 to 19)."""
    path = shutil.copytree(tiny_corpus, tmp_path / "damaged")
    _, offset, nbytes = Corpus(path).index["train"].place(3)
    shard = path / "shards" / "train-000000.tar"
    raw = bytearray(shard.read_bytes())
    raw[offset + nbytes // 2 : offset + nbytes // 2 + 40] = bytes(40)
    shard.write_bytes(raw)
    return path


@pytest.mark.parametrize("overrides", [[], ["data.cache_mb=0"], ["data.workers=1"], ["augment.symmetries=false"]])
def test_a_damaged_tile_becomes_an_invalid_one_in_its_place(tiny_corpus, damaged, overrides):
    augment = [option for option in overrides if option.startswith("augment")]
    whole = list(loader_of(config_of(tiny_corpus, *augment), stop=96))
    config = config_of(damaged, *overrides)
    sources = sources_of(config)
    (damaged / "shards" / "train-000001.tar").rename(damaged / "gone.tar")
    bad, seen = {"CTX_0003", *(f"CTX_{n:04d}" for n in range(10, 20))}, []
    for expected, batch in zip(whole, loader_of(config, sources, stop=96), strict=True):
        assert batch["keys"] == expected["keys"]
        assert all(torch.equal(batch[name], expected[name]) for name in ("affine", "noise"))
        assert batch["views"] is expected["views"] or torch.equal(batch["views"], expected["views"])
        image, valid, _ = to_inputs(batch, limit=4.0, in_chans=1, device="cpu")
        healthy, whole_valid, _ = to_inputs(expected, limit=4.0, in_chans=1, device="cpu")
        for slot, key in enumerate(batch["keys"]):
            if key in bad:
                assert not valid[slot].any() and not image[slot].any()
            else:
                assert torch.equal(image[slot], healthy[slot]) and torch.equal(valid[slot], whole_valid[slot])
        assert [key for key, _ in batch["corrupt"]] == [key for key in batch["keys"] if key in bad]
        seen += batch["corrupt"]
    # Each of the four epochs meets each of them.
    assert sorted(key for key, _ in seen) == sorted(list(bad) * 4)
    reasons = dict(seen)
    assert "train-000000.tar at byte" in reasons["CTX_0003"] and "a tile cannot be decoded" in reasons["CTX_0003"]
    assert "train-000001.tar at byte" in reasons["CTX_0012"] and "cannot be opened" in reasons["CTX_0012"]


def test_a_mended_tile_is_read_again(tiny_corpus, damaged):
    config = config_of(damaged)
    sources = sources_of(config)
    loader = loader_of(config, sources, stop=24)
    assert sum(len(batch["corrupt"]) for batch in loader) == 1
    shutil.copy(tiny_corpus / "shards" / "train-000000.tar", damaged / "shards" / "train-000000.tar")
    assert_equal(loader, loader_of(config_of(tiny_corpus), stop=24))


def test_a_damaged_tile_stops_the_run_when_asked_to(damaged):
    _, offset, _ = Corpus(damaged).index["train"].place(3)
    config = config_of(damaged, "data.on_corrupt=stop")
    message = f"a training tile cannot be read: CTX_0003 of {damaged}, train-000000.tar at byte {offset}: a tile cannot"
    with pytest.raises(DataError, match=f"{message}.*on_corrupt=stop.*momo prep verify.*on_corrupt=skip"):
        list(loader_of(config, stop=24))


def test_the_death_of_a_reading_process_is_told_from_an_error_inside_one():
    deaths = [
        RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"),
        RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."),
        EOFError(),
        ConnectionResetError(104, "Connection reset by peer"),
    ]
    others = [
        RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback"),
        RuntimeError("shape mismatch"),
        OSError(5, "Input/output error"),
    ]
    assert all(map(_tells_of_death, deaths)) and not any(map(_tells_of_death, others))


@pytest.mark.parametrize("cache_mb", [0, 1])
def test_errors_that_are_no_damage_stop_the_run_whatever_the_policy(tiny_corpus, monkeypatch, cache_mb):
    def without_package(corpus, places):
        raise ConfigError("the package 'zstandard' cannot be imported")

    monkeypatch.setattr(Corpus, "read_places", without_package)
    with pytest.raises(ConfigError, match="'zstandard' cannot be imported"):
        list(loader_of(config_of(tiny_corpus, f"data.cache_mb={cache_mb}")))


# The socket that the last batch of the dead process was to come through.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_dead_reading_process_is_named_and_signals_of_a_cluster_are_left_to_the_trainer(tmp_path):
    path = write_corpus(tmp_path / "c", tiles=400, val=1)
    loader = loader_of(config_of(path, "data.workers=1", "train.samples=4000"), stop=4000)
    batches = iter(loader)
    next(batches)
    (worker,) = multiprocessing.active_children()
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        os.kill(worker.pid, number)
    for _ in range(20):
        next(batches)
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(DataError, match="a reading process died: .*Next: .*shared memory"):
        list(batches)


# --- what is refused at the start ---------------------------------------------------------------------------------


def test_sensor_zscore_refuses_mixed_units(tmp_path):
    path = write_corpus(tmp_path / "c")
    manifest = json.loads((path / "manifest.json").read_text()) | {"mixed_units": True}
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match="sensor_zscore needs one unit.*joins products of different units"):
        sources_of(config_of(path, "data.normalisation=sensor_zscore"))
    assert sources_of(config_of(path)).normalisations == [Normalisation()]


def test_per_product_percentile_refuses_products_without(tmp_path):
    path = write_corpus(tmp_path / "c")
    with pytest.raises(ConfigError, match="needs percentiles of every product.*4 products without, for example P0, P1"):
        sources_of(config_of(path, "data.normalisation=per_product_percentile"))


def test_corpora_that_do_not_go_together_are_refused(tiny_corpus, tmp_path):
    other = write_corpus(tmp_path / "other", sensor="THEMIS", size=16)
    with pytest.raises(ConfigError, match="different tile sizes.*32.*16"):
        sources_of(config_of(f"{tiny_corpus},{other}"))
    with pytest.raises(ConfigError, match="two corpora are of one sensor: CTX, CTX"):
        sources_of(config_of(f"{tiny_corpus},{write_corpus(tmp_path / 'twin', seed=5)}"))
    with pytest.raises(DataError, match="has no val tile.*both splits are needed"):
        sources_of(config_of(write_corpus(tmp_path / "bare", val=0)))


def test_corpora_share_one_buffer_and_tell_what_they_bring(tiny_corpus, tmp_path):
    other = write_corpus(tmp_path / "other", sensor="THEMIS", tiles=11)
    config = config_of(f"{tiny_corpus},{other}", "data.pipe='cat {url}'", "data.buffer_mb=1")
    sources = open_sources(config, verify=True)
    list(loader_of(config, sources))
    first, second = (corpus.store._buffer for corpus in sources.corpora)
    assert first is second and 0 < first.nbytes <= 1 << 20
    ctx, themis = sources.supplies()
    assert (ctx.name, ctx.tiles, ctx.streamed, themis.tiles) == ("CTX", [10, 10, 4], True, [10, 1])
    sizes = [shard.bytes for shard in sources.corpora[0].manifest.shards]
    assert sorted([*ctx.nbytes, *ctx.other_nbytes]) == sorted(sizes) and len(ctx.other_nbytes) == 1
    assert len(sources.notes) == 2 and all("as they arrive" in note for note in sources.notes)
