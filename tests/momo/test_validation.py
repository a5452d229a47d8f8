"""Validation: a function of weights and tiles alone, how tiles are read, and the same over real ranks."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils.data import DataLoader

from momo.corpus import Corpus
from momo.errors import CheckpointError, DataError
from momo.models import MaskedAutoencoder, build_mae
from momo.models.masking import mask_noise, sample_rng
from momo.normalise import POLICIES, Normalisation, normalise_batch
from momo.pretrain.exact import exact_float32, map_exactly
from momo.pretrain.validation import measure_tiles, tile_losses, validate_model
from momo.pretrain.validation_tiles import ValidationTiles
from tests.conftest import PICO, write_corpus
from tests.momo.validation_helper import TwoTerms, damage, set_units, tiles_of


class SlowTerms(TwoTerms):
    """Leaves other threads the time to call it too before its terms are read."""

    def __call__(self, *arguments):
        loss_B = super().__call__(*arguments)
        time.sleep(0.05)
        return loss_B


# --- a function of weights and tiles alone ----------------------------------------------------------------------


def test_validation_loss_is_a_function_of_the_weights_alone(tiny_corpus, model):
    tiles = tiles_of(tiny_corpus)
    model.train()
    first = tile_losses(model, tiles, batch_size=3)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert torch.equal(first, tile_losses(model, tiles, batch_size=3)) and model.training
    assert torch.equal(state, torch.get_rng_state())
    assert first.dtype == torch.float64 and first.shape == (8,) and (first > 0).all()
    torch.testing.assert_close(first, tile_losses(model, tiles, batch_size=8), rtol=1e-5, atol=1e-6)
    assert not torch.equal(first, tile_losses(build_mae(PICO, seed=1), tiles, batch_size=3))


def plain_losses(model: MaskedAutoencoder, tiles: ValidationTiles, batch_size: int) -> list[float]:
    """The same in plain words: tile by tile, nothing ahead, nothing kept."""
    losses: list[float] = []
    for first in range(0, len(tiles), batch_size):
        read = [tiles.corpus.read_stored("val", p) for p in tiles.positions[first : first + batch_size]]
        stored = torch.stack([torch.from_numpy(tile.stored_HW) for tile in read])
        valid = torch.stack([torch.from_numpy(tile.valid) for tile in read])
        affine = torch.stack([torch.from_numpy(tiles.normalisation.affine(tile.statistics)) for tile in read])
        noise = [mask_noise(sample_rng(tile.key, tiles.seed, "validation mask"), tiles.patches) for tile in read]
        image = normalise_batch(stored, valid, affine, tiles.normalisation.limit)
        with torch.no_grad():
            losses += model.eval()(image, valid, torch.from_numpy(np.stack(noise))).tolist()
    return losses


@pytest.mark.parametrize("policy", [policy for policy in POLICIES if policy != "per_product_percentile"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_losses_equal_the_plain_ones_bit_for_bit(tmp_path, model, policy, dtype):
    corpus = write_corpus(tmp_path / "c", tiles=4, val=11, dtype=dtype)
    tiles = tiles_of(corpus, normalisation=Normalisation(policy, mean=1.5, std=0.5), limit=10)
    assert tile_losses(model, tiles, batch_size=4).tolist() == plain_losses(model, tiles, 4)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_shares_of_the_ranks_add_up_bit_for_bit(tiny_corpus, model, ranks):
    tiles = tiles_of(tiny_corpus)
    whole = tile_losses(model, tiles, batch_size=3)
    shares = [tile_losses(model, tiles, batch_size=3, rank=rank, ranks=ranks) for rank in range(ranks)]
    assert torch.equal(torch.stack(shares).sum(dim=0), whole)
    assert (torch.stack(shares) > 0).sum(dim=0).tolist() == [1] * 8


def test_subset_is_fixed_and_of_the_size_asked_for(tiny_corpus):
    picks = [tiles_of(tiny_corpus, limit=5, seed=seed).positions for seed in (1, 1, 2)]
    assert picks[0] == picks[1] != picks[2] and len(set(picks[0])) == 5
    assert picks[0] == [1, 3, 4, 5, 7], "the subset of a stored run must stay what it was"


def test_masks_come_from_key_and_seed_alone(tiny_corpus):
    few, all_of_them = tiles_of(tiny_corpus, limit=5), tiles_of(tiny_corpus)
    noise = {all_of_them[place]["key"]: all_of_them[place]["noise"] for place in range(8)}
    assert all(torch.equal(noise[few[place]["key"]], few[place]["noise"]) for place in range(5))
    assert not torch.equal(tiles_of(tiny_corpus, seed=2)[0]["noise"], all_of_them[0]["noise"])


def test_computed_in_float32_whatever_the_surroundings(tiny_corpus, model):
    tiles = tiles_of(tiny_corpus)
    plain = tile_losses(model, tiles, batch_size=3)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(plain, tile_losses(model, tiles, batch_size=3))
            assert torch.is_autocast_enabled("cpu")
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("own_terms", [False, True])
def test_losses_do_not_depend_on_the_number_of_threads(wide_corpus, own_terms):
    # Wide enough that the products of one batch are split among threads, and their sums with them.
    model = build_mae(dataclasses.replace(PICO, size="tiny"), seed=0)
    if own_terms:
        model.objective = SlowTerms()
    measured = []
    for threads in (1, 3, 8):
        torch.set_num_threads(threads)
        try:
            measured.append(measure_tiles(model, tiles_of(wide_corpus), batch_size=4))
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(1)
    for other in measured[1:]:
        assert torch.equal(measured[0].loss, other.loss)
        assert all(torch.equal(term, other.terms[name]) for name, term in measured[0].terms.items())


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_map_keeps_the_order_and_passes_errors_on(kind):
    def halve(number: int) -> tuple[int, bool, int]:
        if number % 2:
            raise DataError("odd")
        return number // 2, torch.is_grad_enabled(), torch.get_num_threads()

    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        inside = 1 if kind == "cpu" else 3
        assert list(map_exactly(halve, range(0, 40, 2), kind)) == [(n, False, inside) for n in range(20)]
        with pytest.raises(DataError, match="odd"):
            list(map_exactly(halve, [2, 4, 5, 6], kind))
        assert torch.get_num_threads() == 3 and torch.is_grad_enabled()
    finally:
        torch.set_num_threads(threads)


def precision_switches() -> list[Any]:
    backends = torch.backends
    leaves = [backends.cuda.matmul, getattr(backends.cudnn, "conv", None), backends.mkldnn]
    return [
        torch.get_float32_matmul_precision(), backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32,
        backends.cudnn.benchmark, backends.cudnn.deterministic,
        *(leaf.fp32_precision for leaf in leaves if hasattr(leaf, "fp32_precision")),
    ]  # fmt: skip


@pytest.mark.parametrize("matmul", ["highest", "high", "medium"])
@pytest.mark.parametrize("convolutions", [True, False])
def test_precision_is_exact_inside_and_as_before_outside(matmul, convolutions):
    start = (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark)
    torch.set_float32_matmul_precision(matmul)
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = convolutions, True
    try:
        before = precision_switches()
        with pytest.raises(KeyError), exact_float32("cpu"):
            inside = precision_switches()
            raise KeyError
        assert precision_switches() == before
        assert inside[:5] == ["highest", False, False, False, True]
    finally:
        torch.set_float32_matmul_precision(start[0])
        torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = start[1:]


def test_half_precision_weights_are_refused(tiny_corpus, model):
    with pytest.raises(CheckpointError, match=r"validation needs float32 weights: cls_token is torch.bfloat16\."):
        tile_losses(model.bfloat16(), tiles_of(tiny_corpus), batch_size=3)


# --- reading ----------------------------------------------------------------------------------------------------


def test_lazy_and_whole_validation_agree(wide_corpus, model, monkeypatch):
    lazy, whole = tiles_of(wide_corpus, limit=18), tiles_of(wide_corpus, limit=18, cache_mb=1)
    first = tile_losses(model, whole, batch_size=4)
    monkeypatch.setattr(whole.corpus, "read_places", lambda places: pytest.fail("a kept tile was read again"))
    for batch_size in (4, 7):
        expected = tile_losses(model, lazy, batch_size=batch_size)
        assert torch.equal(tile_losses(model, whole, batch_size=batch_size), expected)
    assert torch.equal(first, tile_losses(model, lazy, batch_size=4))


def test_a_corpus_behind_a_url_gives_the_same(tmp_path, model):
    memory = pytest.importorskip("fsspec").filesystem("memory")
    folder = write_corpus(tmp_path / "c", tiles=2, val=9)
    set_units(folder, {"CTX_0003": "Hnv", "CTX_0007": "Ahv"})
    memory.put(str(folder), "/validation-corpus", recursive=True)
    try:
        here, there = tiles_of(folder), tiles_of("memory://validation-corpus")
        entries = [validate_model(model, {"CTX": tiles}, "p", batch_size=4) for tiles in (here, there)]
    finally:
        memory.rm("/validation-corpus", recursive=True)
    assert entries[0] == entries[1] and set(entries[1]["per_sensor"]["CTX"]["per_unit"]) == {"Ahv", "Hnv"}


def test_a_large_subset_is_not_kept(wide_corpus, monkeypatch):
    tiles = tiles_of(wide_corpus, cache_mb=0)
    reads = []
    read = tiles.corpus.read_places
    monkeypatch.setattr(tiles.corpus, "read_places", lambda places: reads.append(len(places)) or read(places))
    for _ in range(2):
        tiles.batch(range(3, 6))
    assert reads == [3, 3]


def test_a_rank_keeps_its_own_tiles_only(wide_corpus, model):
    tiles = tiles_of(wide_corpus, cache_mb=1)
    tile_losses(model, tiles, batch_size=4, rank=1, ranks=2)
    assert sorted(tiles._kept) == [4, 5, 6, 7, 12, 13, 14, 15]


def test_the_next_batch_is_read_while_one_is_computed(wide_corpus, monkeypatch):
    tiles = tiles_of(wide_corpus)
    threads, second, computed, overlapped = [], threading.Event(), threading.Event(), []
    read = tiles.corpus.read_places

    def noted(places):
        threads.append(threading.current_thread())
        if len(threads) == 2:
            second.set()
            overlapped.append(computed.wait(10))
        return read(places)

    monkeypatch.setattr(tiles.corpus, "read_places", noted)
    batches = tiles.batches([range(0, 4), range(4, 8), range(8, 12)])
    assert next(batches).keys == tiles.keys([0, 1, 2, 3])
    assert second.wait(10), "the second batch is read before it is asked for"
    computed.set()
    assert len(threads) == 2 and threading.current_thread() not in threads
    assert [batch.keys for batch in batches] == [tiles.keys([4, 5, 6, 7]), tiles.keys([8, 9, 10, 11])]
    assert overlapped == [True], "the first batch is there before the second is"
    assert not any(thread.is_alive() for thread in threads)


def test_tiles_join_in_a_data_loader(tiny_corpus):
    (batch,) = DataLoader(tiles_of(tiny_corpus), batch_size=8)
    expected = tiles_of(tiny_corpus).batch(range(8))
    assert torch.equal(batch["stored"], expected.stored_BHW) and torch.equal(batch["valid"], expected.valid_BHW)
    assert torch.equal(batch["affine"], expected.affine_B3) and batch["key"] == expected.keys


def test_a_damaged_tile_stops_validation_and_is_named(tmp_path, model):
    corpus = Corpus(write_corpus(tmp_path / "c", tiles=4, val=8))
    damage(corpus, 5)
    tiles = tiles_of(corpus.path)
    with pytest.raises(DataError, match=r"a validation tile cannot be read: CTX_0009 of .*decoded.*whole fixed subset"):
        tile_losses(model.train(), tiles, batch_size=3)
    assert model.training
    assert torch.get_float32_matmul_precision() == "highest"


# --- real ranks -------------------------------------------------------------------------------------------------


def validate_on_rank(rank: int, folder: Path, corpora: list[Path], damaged: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        model = build_mae(PICO, seed=0)
        tiles = {"CTX": tiles_of(corpora[0], cache_mb=1), "THEMIS": tiles_of(corpora[1])}
        results = [validate_model(model, tiles, "p", batch_size=3, rank=rank, ranks=2) for _ in range(2)]
        # One batch: the second rank has none and does not know the terms.
        model.objective = TwoTerms()
        results.append(validate_model(model, tiles, "p", batch_size=20, rank=rank, ranks=2))
        try:
            validate_model(model, {"CTX": tiles_of(damaged)}, "p", batch_size=20, rank=rank, ranks=2)
        except DataError as error:
            results.append(str(error))
        (folder / f"rank{rank}.json").write_text(json.dumps(results))
    finally:
        dist.destroy_process_group()


def test_two_ranks_give_the_numbers_of_one_and_fail_together(wide_corpus, tmp_path, model):
    themis = write_corpus(tmp_path / "t", sensor="THEMIS", tiles=2, val=5)
    bad = Corpus(write_corpus(tmp_path / "bad", tiles=2, val=6))
    damage(bad, 2)
    mp.spawn(validate_on_rank, args=(tmp_path, [wide_corpus, themis], bad.path), nprocs=2)
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first == second and len(first) == 4
    tiles = {"CTX": tiles_of(wide_corpus), "THEMIS": tiles_of(themis)}
    assert first[0] == first[1] == validate_model(model, tiles, "p", batch_size=3)
    assert sorted(first[2]["per_sensor"]["THEMIS"]["terms"]) == ["bright", "rough"]
    assert "CTX_0004 of" in first[3]
