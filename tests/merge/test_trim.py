"""The streamed threshold against torch.kthvalue on the whole, on friendly and on awkward values."""

import math

import pytest
import torch

from momo.errors import MergeError
from momo.merge import trim
from momo.merge.trim import kept_count, magnitude_threshold


def values(kind, count=200_003):
    generator = torch.Generator().manual_seed(3)
    normal = torch.randn(count, generator=generator)
    return {
        "normal": normal,
        "tiny spread": 1 + 1e-6 * normal,
        "many scales": normal * 10 ** (torch.rand(count, generator=generator) * 60 - 30),
        "many ties": (normal * 3).round(),
        "two values": torch.where(normal > 0, 0.25, -0.125),
        "one value": torch.full((count,), -0.7),
        "mostly zero": normal * (torch.rand(count, generator=generator) < 0.05),
        "denormal": normal * 1e-41,
        "zero and denormal": torch.where(normal > 1, torch.tensor(1e-45), torch.tensor(-0.0)),
        "huge": normal.sign() * torch.finfo(torch.float32).max,
    }[kind]


KINDS = (
    *("normal", "tiny spread", "many scales", "many ties", "two values", "one value", "mostly zero", "denormal"),
    *("zero and denormal", "huge"),
)


@pytest.mark.parametrize("kind", KINDS)
def test_equals_kthvalue_on_the_whole(kind):
    whole = values(kind)
    count = len(whole)
    cuts = [1, 2, 77_777, 120_000, 120_000]  # one piece is empty
    pieces = torch.tensor_split(whole, cuts)
    for keep in (1, 2, count // 1000, count // 5, count // 2, count - 1, count):
        expected = whole.abs().kthvalue(count - keep + 1).values.item()
        assert magnitude_threshold(lambda: pieces, count, keep) == expected
        at_least = int((whole.abs() >= expected).sum())
        assert int((whole.abs() > expected).sum()) < keep <= at_least


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float64))
def test_other_dtypes_are_read_as_float32(dtype):
    whole = values("normal").to(dtype)
    expected = whole.float().abs().sort(descending=True).values[999].item()
    assert magnitude_threshold(lambda: [whole.reshape(1, -1)], len(whole), 1000) == expected


def test_pieces_longer_than_a_chunk_and_any_number_of_threads():
    whole = values("normal", 2 * trim._CHUNK + 5)
    expected = whole.abs().sort(descending=True).values[300_000 - 1].item()
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            assert magnitude_threshold(lambda: [whole], len(whole), 300_000) == expected
    finally:
        torch.set_num_threads(before)


def test_every_rank_of_a_small_model():
    whole = torch.tensor([0.0, -0.0, 1e-45, -3.0, 3.0, 0.5, -7.0])
    ranked = sorted((abs(value) for value in whole.tolist()), reverse=True)
    found = [magnitude_threshold(lambda: whole.split(2), 7, keep) for keep in range(1, 8)]
    assert found == ranked


def test_the_model_is_never_held():
    """The pieces come from a generator that overwrites one buffer; the values of earlier pieces are gone."""
    whole = values("normal")
    buffer = torch.empty(1000)

    def pieces():
        for first in range(0, len(whole), 1000):
            part = whole[first : first + 1000]
            yield buffer[: len(part)].copy_(part)

    expected = whole.abs().sort(descending=True).values[4999].item()
    assert magnitude_threshold(pieces, len(whole), 5000) == expected


def test_the_pieces_are_not_changed():
    whole = values("normal")
    before = whole.clone()
    magnitude_threshold(lambda: [whole], len(whole), 10)
    assert torch.equal(whole, before)


@pytest.mark.parametrize("keep", (0, -1, 4))
def test_a_rank_out_of_range_is_refused(keep):
    with pytest.raises(MergeError, match=f"entries to keep is out of range: {keep}. Rule: 1 to 3"):
        magnitude_threshold(lambda: [torch.ones(3)], 3, keep)


def test_a_wrong_count_is_refused():
    with pytest.raises(MergeError, match="do not add up: 3 entries. Rule: 4 entries in every pass"):
        magnitude_threshold(lambda: [torch.ones(3)], 4, 1)


def test_pieces_that_differ_between_the_passes_are_refused():
    passes = iter([[torch.ones(3)], [torch.ones(2)]])
    with pytest.raises(MergeError, match="do not add up: 2 entries. Rule: 3 entries in every pass"):
        magnitude_threshold(lambda: next(passes), 3, 1)


@pytest.mark.parametrize("bad", (math.nan, -math.nan, math.inf, -math.inf))
def test_values_that_are_not_finite_are_refused(bad):
    with pytest.raises(MergeError, match="an entry to trim is NaN or infinite. Rule: only finite"):
        magnitude_threshold(lambda: [torch.tensor([1.0, bad, 2.0])], 3, 1)


def test_kept_count():
    assert [kept_count(10, density) for density in (0.01, 0.14, 0.15, 0.25, 0.999, 1)] == [1, 1, 2, 3, 10, 10]
    assert [kept_count(count, 0.2) for count in (0, 1, 2, 5)] == [0, 1, 1, 1]


@pytest.mark.parametrize("density", (0, -0.1, 1.1, math.nan))
def test_a_density_out_of_range_is_refused(density):
    with pytest.raises(MergeError, match=f"density is out of range: {density}. Rule: above 0 and at most 1; 1 keeps"):
        kept_count(10, density)
