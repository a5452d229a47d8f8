"""The order of samples, and the arithmetic of the start."""

from __future__ import annotations

import numpy as np
import pytest

from momo.config import load_config
from momo.errors import ConfigError
from momo.models.masking import sample_rng
from momo.pretrain import PretrainConfig
from momo.pretrain.plan import SamplePlan, Supply, check_arithmetic

SHARDS = [5, 3, 7, 1, 4, 6, 2]
SIZE = sum(SHARDS)
ORDERS = {
    "global": {},
    "shards": {"order": "shards", "shards": SHARDS, "window_shards": 2},
    "one window": {"order": "shards", "shards": SHARDS, "window_shards": 99},
}


def plan_of(kind, *, fingerprint="f", seed=3):
    return SamplePlan(fingerprint, SIZE, seed, **ORDERS[kind])


@pytest.fixture(params=ORDERS)
def kind(request):
    return request.param


def test_the_global_order_is_numpys_permutation_of_the_epoch():
    order = sample_rng("f", 3, "order of epoch 2").permutation(SIZE)
    plan = plan_of("global")
    assert plan.span(2 * SIZE, 3 * SIZE) == [(2, tile) for tile in order.tolist()]
    assert plan._order.dtype == np.int8


def test_an_epoch_holds_every_tile_once_and_no_two_are_alike(kind):
    plan = plan_of(kind)
    epochs = [plan.span(n * SIZE, (n + 1) * SIZE) for n in range(3)]
    assert all(sorted(epoch) == [(n, tile) for tile in range(SIZE)] for n, epoch in enumerate(epochs))
    assert len({tuple(tile for _, tile in epoch) for epoch in epochs}) == 3
    for other in (plan_of(kind, fingerprint="g"), plan_of(kind, seed=4)):
        assert other.span(0, SIZE) != epochs[0]
    assert [plan.locate(n) for n in range(SIZE - 2, SIZE + 2)] == [*epochs[0][-2:], *epochs[1][:2]]


def test_windows_of_shards_come_one_after_another_and_are_mixed_inside():
    owner = np.repeat(np.arange(len(SHARDS)), SHARDS)
    seen = set()
    for epoch in range(4):
        tiles = plan_of("shards").tiles(epoch, 0, SIZE)
        shards = [
            sample_rng("f", 3, f"order of shards of epoch {epoch}").permutation(len(SHARDS))[n : n + 2]
            for n in (0, 2, 4, 6)
        ]
        first = 0
        for window in shards:
            count = sum(SHARDS[n] for n in window)
            assert set(owner[tiles[first : first + count]]) == set(window)
            first += count
        seen.add(tuple(shards[0]))
        changes = np.count_nonzero(np.diff(owner[tiles]))
        assert changes > len(SHARDS)
    assert len(seen) > 1


@pytest.mark.parametrize(("ranks", "micro"), [(1, None), (2, None), (4, None), (1, 4), (2, 2), (4, 1), (1, 12)])
def test_batches_do_not_depend_on_ranks_or_micro_batches(kind, ranks, micro):
    whole = plan_of(kind).span(0, 96)
    shares = [
        list(plan_of(kind).batches(start=0, stop=100, batch_size=12, rank=r, ranks=ranks, micro_batch=micro))
        for r in range(ranks)
    ]
    each = 12 // ranks // (micro or 12 // ranks)
    assert {len(share) for share in shares} == {8 * each}
    joined = []
    for batch in range(8):
        for share in shares:
            for part in share[batch * each : (batch + 1) * each]:
                assert len(part) == (micro or 12 // ranks)
                joined += part
    assert joined == whole


@pytest.mark.parametrize("start", [0, 12, SIZE - 1, SIZE, SIZE + 1, 2 * SIZE - 1, 2 * SIZE, 2 * SIZE + 1, 53])
def test_a_run_goes_on_anywhere_with_the_samples_that_were_due(kind, start):
    whole = plan_of(kind).span(0, start + 40)
    rest = [
        place
        for part in plan_of(kind).batches(start=start, stop=start + 40, batch_size=8, rank=0, ranks=1)
        for place in part
    ]
    assert rest == whole[start:]
    # One plan may be asked for places in any order.
    plan = plan_of(kind)
    assert plan.span(start, start + 40) == rest and plan.span(0, start + 40) == whole


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 0}, "cannot be planned: 0 tiles"),
        ({"window_shards": 0}, "data.window_shards=0"),
        ({"order": "none"}, "data.order=none"),
        ({"shards": [1, 2]}, "3 tiles in 2 shards"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(change, message):
    fields = {"size": SIZE, "order": "shards", "shards": SHARDS, "window_shards": 2} | change
    with pytest.raises(ConfigError, match=message):
        SamplePlan("f", fields.pop("size"), 0, **fields)


# --- arithmetic -----------------------------------------------------------------------------------------------

MB = 1 << 20


def config_of(*overrides):
    base = ["out=o", "data.corpora=[c]", "train.batch_size=64", "train.samples=6400"]
    return load_config(PretrainConfig, None, [*base, *overrides])


def supply(shards=20, nbytes=100 * MB, streamed=True, tiles=1000, other=(), name="CTX"):
    return Supply(name, [tiles] * shards, [nbytes] * shards, list(other), streamed)


def test_what_works_is_said_in_numbers():
    lines = check_arithmetic(config_of(), [supply(streamed=False)])
    assert lines == ["20,000 tiles in 20 shards, mixed over all tiles of an epoch; read in the training process"]
    joint = [supply(), supply(shards=10, streamed=False, name="THEMIS")]
    lines = check_arithmetic(config_of("data.order=shards", "data.workers=3", "ranks=2"), joint)
    assert lines == [
        "30,000 tiles in 30 shards, mixed over windows of 16 shards; 3 reading processes a rank",
        "whole shards are streamed: 2,000 MB an epoch to each of 6 reading processes, which keep 4,096 MB each",
    ]


@pytest.mark.parametrize(
    ("overrides", "given", "line"),
    [
        ([], supply(2, tiles=20, streamed=False), "an epoch has 40 tiles, fewer than train.batch_size=64"),
        (["data.order=shards"], supply(4, streamed=False), "data.window_shards=16 covers all 4 shards"),
        (["data.order=shards"], supply(tiles=5, streamed=False), "has about 80 tiles for batches of 64"),
        (["train.samples=128", "data.workers=5"], supply(streamed=False), "2 micro-batches in all: 3 of its 5"),
    ],
)
def test_what_may_surprise_is_a_line(overrides, given, line):
    assert any(line in found for found in check_arithmetic(config_of(*overrides), [given]))


@pytest.mark.parametrize(
    ("overrides", "given", "message"),
    [
        (
            ["data.buffer_mb=500"],
            [supply()],
            "order=global cannot be streamed: 20 shards of 2,000 MB together, data.buffer_mb=500.*"
            "data.order=shards data.window_shards=5, or data.buffer_mb=2000",
        ),
        (
            ["data.buffer_mb=500", "data.order=shards"],
            [supply()],
            "the window of shards does not fit the buffer: data.window_shards=16 take up to 1,600 MB.*"
            "data.window_shards=5, or data.buffer_mb=1600",
        ),
        (
            ["data.buffer_mb=1700", "data.order=shards"],
            [supply(), supply(4, nbytes=200 * MB, name="THEMIS")],
            "window_shards=16 take up to 2,000 MB.*data.window_shards=13, or data.buffer_mb=2000",
        ),
        (
            ["data.buffer_mb=90", "data.order=shards"],
            [supply()],
            "a shard does not fit the buffer: CTX: a shard of 100 MB, data.buffer_mb=90.*data.buffer_mb=100, or prep",
        ),
        (["data.buffer_mb=200"], [supply(1, other=[300 * MB])], "a shard of 300 MB"),
        ([], [supply(0)], "there is no training tile: 1 corpora"),
    ],
)
def test_what_cannot_work_is_refused_with_numbers_and_what_helps(overrides, given, message):
    with pytest.raises(ConfigError, match=message):
        check_arithmetic(config_of(*overrides), given)


def test_what_the_refusals_advise_works():
    for fix in (["data.order=shards", "data.window_shards=5"], ["data.buffer_mb=2000"]):
        assert check_arithmetic(config_of("data.buffer_mb=500", *fix), [supply()])
    joint = [supply(), supply(4, nbytes=200 * MB)]
    for fix in (["data.window_shards=13"], ["data.buffer_mb=2000"]):
        assert check_arithmetic(config_of("data.buffer_mb=1700", "data.order=shards", *fix), joint)
