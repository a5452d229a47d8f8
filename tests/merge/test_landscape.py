"""Points, distances and barriers against direct formulas, and the file of losses that survives a kill."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from momo.errors import MergeError
from momo.merge.diagnose.landscape import (
    LossCache,
    barrier,
    combine,
    inner_products,
    line_factors,
    line_positions,
    lowest,
    mean_loss,
    plane_through,
)
from tests.merge.test_task_vectors import Weights, near, pico, whole

NAMES = ["a", "b", "c", "base", "merged"]


@pytest.fixture(scope="module")
def models() -> dict[str, Weights]:
    base = pico(0)
    found = {"a": near(base, 1), "b": near(base, 2, 0.1), "c": near(base, 3, 0.02), "base": base}
    mean = {n: (found["a"].state[n] + found["b"].state[n] + found["c"].state[n]) / 3 for n in base.state}
    return found | {"merged": Weights(mean)}


@pytest.fixture(scope="module")
def plane(models):
    return plane_through(["a", "b", "c"], NAMES, inner_products(models, "a"))


def point(models: dict[str, Weights], factors: dict[str, float]) -> Weights:
    return Weights(dict(combine(models, factors, sorted(models["a"].header))))


# --- lines --------------------------------------------------------------------------------------------------------


def test_lines_reach_beyond_both_ends_and_hold_them():
    assert line_positions(13) == [-0.25 + 0.125 * i for i in range(13)]
    assert line_positions(4) == [-0.25, 0.0, 0.25, 0.75, 1.0, 1.25]
    assert line_factors("a", "b", 0.25) == {"a": 0.75, "b": 0.25}
    assert line_factors("a", "b", 1.0) == {"b": 1.0} and line_factors("a", "b", 0.0) == {"a": 1.0}


def test_points_are_the_weighted_sums(models):
    for position in (-0.25, 0.3):
        found = whole(point(models, line_factors("a", "b", position)))
        expected = (1 - position) * whole(models["a"]) + position * whole(models["b"])
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)


def test_ends_are_the_models_themselves_and_nothing_is_changed(models):
    before = whole(models["a"]).copy()
    assert np.array_equal(whole(point(models, {"a": 1.0})), before)
    point(models, {"a": 0.4, "b": 0.6})
    assert np.array_equal(whole(models["a"]), before)


def test_half_precision_is_summed_exactly_and_integers_are_kept():
    states = [{"w": torch.tensor(v).bfloat16(), "n": torch.tensor([3])} for v in ([1.0, 256.0], [3.0, 1.0])]
    mixed = dict(combine({"a": Weights(states[0]), "b": Weights(states[1])}, {"a": 0.5, "b": 0.5}, ["n", "w"]))
    assert mixed["w"].dtype == torch.float32 and mixed["w"].tolist() == [2.0, 128.5]
    assert mixed["n"].tolist() == [3]


def test_factors_add_to_one(models):
    with pytest.raises(MergeError, match=r"the factors of a point do not add to 1: \{'a': 0\.5, 'b': 0\.4\}"):
        point(models, {"a": 0.5, "b": 0.4})


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([9.0, 1.0, 2.0, 3.0, 9.0], 0.0),  # straight between the ends, whatever lies beyond them
        ([0.0, 1.0, 2.6, 3.0, 0.0], 0.6),
        ([0.0, 1.0, 0.5, 3.0, 0.0], 0.0),
        ([None, 1.0, 2.6, 3.0, None], 0.6),
        ([0.0, 1.0, None, 3.0, 0.0], None),
        ([0.0, None, 2.0, 3.0, 0.0], None),
    ],
)
def test_barriers(losses, expected):
    assert barrier([-0.25, 0.0, 0.5, 1.0, 1.25], losses) == pytest.approx(expected)


def test_the_lowest_point_may_lie_beyond_an_end():
    assert lowest([-0.25, 0.0, 1.0, 1.25], [3.0, 2.0, None, 1.0]) == (1.25, 1.0)
    assert lowest([0.0, 0.5, 1.0], [2.0, 1.0, 1.0]) == (0.5, 1.0)
    assert lowest([0.0, 1.0], [None, None]) is None


# --- planes -------------------------------------------------------------------------------------------------------


def test_inner_products_are_those_of_whole_vectors(models):
    shifted = np.stack([whole(models[name]) - whole(models["a"]) for name in NAMES])
    np.testing.assert_allclose(inner_products(models, "a"), shifted @ shifted.T, rtol=1e-10, atol=1e-10)


def test_marks_are_projections_with_their_distance(models, plane):
    a, b, c = (whole(models[name]) for name in "abc")
    first = (b - a) / np.linalg.norm(b - a)
    second = (c - a) - first * (first @ (c - a))
    second /= np.linalg.norm(second)
    assert [mark.name for mark in plane.marks] == NAMES
    for mark in plane.marks:
        shift = whole(models[mark.name]) - a
        assert (mark.x, mark.y) == pytest.approx((first @ shift, second @ shift), abs=1e-8)
        left = np.linalg.norm(shift - mark.x * first - mark.y * second)
        assert mark.distance == pytest.approx(left, rel=1e-6, abs=1e-3)
    by_name = {mark.name: mark for mark in plane.marks}
    assert not by_name["base"].on_plane and by_name["base"].distance > 1
    assert by_name["merged"].on_plane, "the mean of the corners lies between them"
    assert [by_name[name].distance for name in "abc"] == [0, 0, 0]


def test_points_of_the_plane_lie_where_they_should(models, plane):
    a = whole(models["a"])
    for mark in plane.marks[:3]:
        assert plane.factors(mark.x, mark.y) == pytest.approx({mark.name: 1.0})
    x, y = 1.5, -2.5
    shift = whole(point(models, plane.factors(x, y))) - a
    assert np.linalg.norm(shift) == pytest.approx(math.hypot(x, y), rel=1e-5)
    u = whole(models["b"]) - a
    assert shift @ u / np.linalg.norm(u) == pytest.approx(x, rel=1e-4)
    assert sum(plane.factors(x, y).values()) == pytest.approx(1, abs=1e-11)


def test_the_grid_holds_every_mark_with_room(plane):
    across, up = plane.axes(5)
    assert len(across) == len(up) == 5
    for mark in plane.marks:
        assert across[0] < mark.x < across[-1] and up[0] < mark.y < up[-1]
    assert np.allclose(np.diff(across), across[1] - across[0])
    assert across[0] == pytest.approx(min(m.x for m in plane.marks) - 0.25 * np.ptp([m.x for m in plane.marks]))


def test_models_on_a_line_span_no_plane(models):
    line = {"a": models["a"], "b": models["b"], "c": point(models, {"a": 0.5, "b": 0.5})}
    with pytest.raises(MergeError, match=r"lie on one line: a, b, c: sides .* height .*grid=0"):
        plane_through(["a", "b", "c"], list(line), inner_products(line, "a"))
    same = {"a": models["a"], "b": models["a"], "c": models["c"]}
    with pytest.raises(MergeError, match=r"lie on one line: a, b, c: sides 0 and"):
        plane_through(["a", "b", "c"], list(same), inner_products(same, "a"))
    with pytest.raises(MergeError, match=r"a plane goes through three models: a, b, a\. Rule: three different ones"):
        plane_through(["a", "b", "a"], list(line), inner_products(line, "a"))


# --- what was measured before -------------------------------------------------------------------------------------

LOSSES = {"CTX": {"loss": 0.5, "stderr": 0.1, "count": 3}}
HASHES = {"a": "1" * 64, "b": "2" * 64}


def cache(path, **changes) -> LossCache:
    return LossCache(path, **({"identity": {"protocol": "p"}, "hashes": HASHES} | changes))


def test_losses_are_found_again_whatever_the_models_are_called(tmp_path):
    path = tmp_path / "x.jsonl"
    cache(path).put({"a": 0.25, "b": 0.75}, LOSSES)
    assert cache(path).get({"b": 0.75, "a": 0.25}) == LOSSES
    renamed = cache(path, hashes={"first": "1" * 64, "second": "2" * 64})
    assert renamed.get({"first": 0.25, "second": 0.75}) == LOSSES
    assert renamed.get({"first": 0.75, "second": 0.25}) is None
    assert cache(path, hashes=HASHES | {"a": "3" * 64}).get({"a": 0.25, "b": 0.75}) is None
    assert cache(path, identity={"protocol": "q"}).get({"a": 0.25, "b": 0.75}) is None


def test_a_line_that_a_kill_cut_off_is_left_out(tmp_path):
    path = tmp_path / "x.jsonl"
    first = cache(path)
    first.put({"a": 1.0}, LOSSES)
    first.put({"b": 1.0}, {})
    first.put({"a": 0.5, "b": 0.5}, LOSSES)
    path.write_text(path.read_text()[:-20])
    again = cache(path)
    assert again.unreadable == 1
    assert again.get({"a": 1.0}) == LOSSES and again.get({"b": 1.0}) == {} and again.get({"a": 0.5, "b": 0.5}) is None
    again.put({"a": 0.5, "b": 0.5}, LOSSES)
    last = cache(path)
    assert last.get({"a": 0.5, "b": 0.5}) == LOSSES and last.unreadable == 1
    assert json.loads(path.read_text().splitlines()[-1])["losses"] == LOSSES


def test_lines_of_something_else_are_left_out(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('[1]\n{"key": "k"}\n{"key": "k", "losses": 3}\n{"key": "k", "losses": {"CTX": 3}}\n"x"\n')
    assert cache(path).unreadable == 5


def test_each_sensor_counts_alike():
    assert mean_loss({"CTX": {"loss": 1.0, "count": 1}, "THEMIS": {"loss": 2.0, "count": 99}}) == 1.5
    assert mean_loss({}) is None
