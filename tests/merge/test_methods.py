"""Every merge method against a formula in float64 numpy on stacked arrays, and its hand-made corner cases."""

import math

import numpy as np
import pytest
import torch

from momo.errors import MergeError
from momo.merge.methods import (
    average,
    breadcrumbs,
    dare,
    dare_mask,
    dare_ties,
    fisher_average,
    magmax,
    model_stock,
    slerp,
    task_arithmetic,
    task_vector,
    ties,
    weighted_average,
)
from momo.merge.methods.blocks import BLOCK

COUNTS = (2, 3, 5)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def models(count, shape=(37, 29), dtype=torch.float32, seed=0):
    """A base and `count` checkpoints near it."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator)
    shared = 0.1 * torch.randn(shape, generator=generator)
    tuned = [base + shared + 0.1 * torch.randn(shape, generator=generator) for _ in range(count)]
    return base.to(dtype), [tensor.to(dtype) for tensor in tuned]


def doubles(tensors):
    return np.stack([tensor.double().numpy() for tensor in tensors])


def vectors(base, tuned):
    return doubles(tuned) - base.double().numpy()


def factors(count):
    """Powers of two: where scaled entries cancel exactly, they do so in any precision."""
    return [0.5**i for i in range(count)]


def column(values, array):
    return np.reshape(values, (-1,) + (1,) * (array.ndim - 1))


def agree(merged, base, update, tolerance=1e-6):
    assert merged.dtype == torch.float32 and merged.shape == base.shape
    np.testing.assert_allclose(merged.double().numpy(), base.double().numpy() + update, atol=tolerance, rtol=tolerance)


def trimmed(array, keep):
    """The `keep` entries of largest magnitude, by a full sort."""
    smallest = np.sort(np.abs(array), axis=None)[-keep]
    return np.where(np.abs(array) >= smallest, array, 0.0)


def elected_mean(array):
    """TIES after trimming: sign of the sum, mean over the entries that have it."""
    sign = np.sign(array.sum(axis=0))
    agrees = (np.sign(array) == sign) & (array != 0)
    return np.where(agrees, array, 0.0).sum(axis=0) / np.maximum(agrees.sum(axis=0), 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", COUNTS)
class TestFormulas:
    def test_task_arithmetic(self, count, dtype):
        base, tuned = models(count, dtype=dtype)
        delta = vectors(base, tuned)
        update = (column(factors(count), delta) * delta).sum(axis=0)
        agree(task_arithmetic(base, tuned, factors(count)), base, update)
        agree(task_vector(base, tuned[0]), 0 * base, delta[0])

    def test_averages(self, count, dtype):
        _, tuned = models(count, dtype=dtype)
        array, none = doubles(tuned), torch.zeros(tuned[0].shape)
        agree(average(tuned), none, array.mean(axis=0))
        agree(weighted_average(tuned, factors(count)), none, np.average(array, axis=0, weights=factors(count)))

    def test_magmax(self, count, dtype):
        base, tuned = models(count, dtype=dtype)
        delta = vectors(base, tuned)
        winner = np.abs(delta).argmax(axis=0)
        update = np.take_along_axis(delta, winner[None], axis=0)[0] * np.array(factors(count))[winner]
        agree(magmax(base, tuned, factors(count)), base, update)

    def test_ties(self, count, dtype):
        base, tuned = models(count, dtype=dtype)
        delta = np.stack([trimmed(d, round(0.3 * d.size)) for d in vectors(base, tuned)])
        agree(ties(base, tuned, [0.7] * count, density=0.3), base, 0.7 * elected_mean(delta))
        scaled = column(factors(count), delta) * delta
        agree(ties(base, tuned, factors(count), density=0.3), base, elected_mean(scaled))

    def test_dare(self, count, dtype):
        base, tuned = models(count, dtype=dtype)
        delta, seeds = vectors(base, tuned), list(range(10, 10 + count))
        kept = np.stack([dare_mask(base.shape, 0.5, seed).numpy() for seed in seeds])
        delta = np.where(kept, delta / 0.5, 0.0)
        scaled = column(factors(count), delta) * delta
        agree(dare(base, tuned, factors(count), density=0.5, seeds=seeds), base, scaled.sum(axis=0))
        agree(dare_ties(base, tuned, factors(count), density=0.5, seeds=seeds), base, elected_mean(scaled))

    def test_breadcrumbs(self, count, dtype):
        base, tuned = models(count, dtype=dtype)
        delta = vectors(base, tuned)
        size = delta[0].size
        top, keep = int(0.05 * size), round(0.3 * size)
        for vector in delta:
            ranked = np.sort(np.abs(vector), axis=None)[::-1]
            magnitude = np.abs(vector)
            vector[(magnitude > ranked[top]) | (magnitude < ranked[top + keep - 1])] = 0
        update = (column(factors(count), delta) * delta).sum(axis=0)
        agree(breadcrumbs(base, tuned, factors(count), density=0.3, outliers=0.05), base, update)

    def test_model_stock(self, count, dtype):
        base, tuned = models(count, dtype=dtype)
        delta = vectors(base, tuned).reshape(count, -1)
        unit = delta / np.linalg.norm(delta, axis=1, keepdims=True)
        cosine = (unit @ unit.T)[np.triu_indices(count, 1)].mean()
        ratio = count * cosine / (1 + (count - 1) * cosine)
        assert 0.3 < cosine < 0.7
        agree(model_stock(base, tuned), base, ratio * delta.mean(axis=0).reshape(base.shape))

    def test_fisher(self, count, dtype):
        _, tuned = models(count, dtype=dtype)
        fishers = [torch.rand(37, 29, generator=torch.Generator().manual_seed(i)) ** 4 for i in range(count)]
        information = np.maximum(doubles(fishers), 1e-3)
        expected = np.average(doubles(tuned), axis=0, weights=information * column(factors(count), information))
        agree(fisher_average(tuned, fishers, factors(count), floor=1e-3), torch.zeros(37, 29), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("t", (0.0, 0.2, 0.5, 1.0))
def test_slerp(t, dtype):
    _, (first, second) = models(2, dtype=dtype)
    a, b = doubles([first, second]).reshape(2, -1)
    # The angle by its tangent, the arc by Gram-Schmidt: no acos and no ratio of sines.
    aside = b - (a @ b) / (a @ a) * a
    angle = math.atan2(np.linalg.norm(aside), (a @ b) / np.linalg.norm(a))
    length = np.linalg.norm(a)
    direction = aside / np.linalg.norm(aside)
    on_arc = math.cos(t * angle) * a / length + math.sin(t * angle) * direction
    # slerp is linear in the pair, so the second tensor's own length scales its share.
    second_share = math.sin(t * angle) / math.sin(angle)
    expected = length * on_arc + second_share * (1 - length / np.linalg.norm(b)) * b
    agree(slerp(first, second, t), torch.zeros(first.shape), expected.reshape(first.shape))


def test_float64_arithmetic_is_exact_where_float32_rounds():
    base, tuned = models(3)
    update = (0.3 * vectors(base, tuned)).sum(axis=0)
    expected = base.double().numpy() + update
    single, double = (task_arithmetic(base, tuned, [0.3] * 3, dtype=d) for d in (torch.float32, torch.float64))
    assert double.dtype == torch.float64
    assert np.abs(double.numpy() - expected).max() < 1e-14 < 1e-8 < np.abs(single.double().numpy() - expected).max()


def test_tensors_longer_than_a_block_have_no_seams():
    base, tuned = models(2, (BLOCK + 3,))
    seeds = [1, 2]
    agree(task_arithmetic(base, tuned, [1, 1]), base, vectors(base, tuned).sum(axis=0))
    kept = np.stack([dare_mask(base.shape, 0.5, seed).numpy() for seed in seeds])
    agree(dare(base, tuned, [1, 1], density=0.5, seeds=seeds), base, (kept * vectors(base, tuned) * 2).sum(axis=0))


INTO = {
    "average": lambda base, tuned, **into: average(tuned, **into),
    "weighted_average": lambda base, tuned, **into: weighted_average(tuned, [1, 2, 3], **into),
    "task_arithmetic": lambda base, tuned, **into: task_arithmetic(base, tuned, [0.5, 0.3, -1], **into),
    "magmax": lambda base, tuned, **into: magmax(base, tuned, [0.5, 0.3, -1], **into),
}


@pytest.mark.parametrize("name", INTO)
def test_a_result_can_be_put_where_it_is_wanted(name):
    base, tuned = models(3)
    before = [tensor.clone() for tensor in (base, *tuned)]
    place = torch.full(base.shape, float("nan"))
    assert INTO[name](base, tuned, out=place) is place
    assert torch.equal(place, INTO[name](base, tuned))
    assert all(torch.equal(old, new) for old, new in zip(before, (base, *tuned), strict=True))


@pytest.mark.parametrize("place", [torch.empty(3), torch.empty(2, 2), torch.empty(2, dtype=torch.float64)])
def test_a_place_that_does_not_fit_the_result(place):
    with pytest.raises(MergeError, match="the tensor for the result does not fit it: .* Rule: .2,. torch.float32"):
        average([torch.zeros(2)], out=place)
    with pytest.raises(MergeError, match="contiguous: False"):
        average([torch.zeros(2)], out=torch.empty(4)[::2])


def test_the_average_hardly_depends_on_the_order():
    _, tuned = models(5)
    torch.testing.assert_close(average(tuned), average(tuned[::-1]), atol=1e-6, rtol=0)


def test_only_the_ratio_of_weights_matters():
    _, tuned = models(3)
    assert torch.equal(weighted_average(tuned, [7e-30] * 3), average(tuned))
    assert torch.equal(weighted_average(tuned, [0, 2, 0]), tuned[1])


def test_magmax_takes_the_first_of_equals_and_compares_before_scaling():
    base, tuned = torch.zeros(3), [torch.tensor([2.0, 1.0, 0.0]), torch.tensor([-2.0, -3.0, 0.0])]
    assert magmax(base, tuned, [10, 0.1]).tolist() == pytest.approx([20, -0.3, 0])
    assert magmax(base, tuned[::-1], [10, 0.1]).tolist() == pytest.approx([-20, -30, 0])


TIES_VECTORS = [[4.0, -4.0, 1.0, 5.0], [2.0, 4.0, -8.0, 6.0], [-1.0, 0.5, 9.0, -7.0]]
"""Three task vectors; with density 0.75 the second's 2, the first's 1 and the third's 0.5 are trimmed."""


def test_ties_by_hand():
    base, tuned = torch.ones(4), [1 + torch.tensor(vector) for vector in TIES_VECTORS]
    # Columns after trimming: (4, 0, -1), (-4, 4, 0) without a winner, (0, -8, 9), (5, 6, -7).
    assert ties(base, tuned, [1, 1, 1], density=0.75).tolist() == [5, 1, 10, 6.5]
    assert ties(base, tuned, [0.5] * 3, density=0.75).tolist() == [3, 1, 5.5, 3.75]


def test_a_coefficient_enters_the_election():
    base, tuned = torch.zeros(4), [torch.tensor(vector) for vector in TIES_VECTORS]
    # The third task vector counts three times as much, which turns the last column.
    assert ties(base, tuned, [1, 1, 3], density=0.75).tolist() == [4, 0, 27, -21]
    without = ties(base, tuned[:2], [1, 1], density=0.75)
    assert torch.equal(ties(base, tuned, [1, 1, 0], density=0.75), without)


def test_entries_that_cancel_elect_no_sign_whatever_the_coefficient():
    steps = torch.arange(1.0, 1000.0)
    tuned = [3 * steps, -steps, -2 * steps]
    for coefficient in (0.1, 0.3, 0.7, 1.1):
        assert not ties(0 * steps, tuned, [coefficient] * 3, density=1).any()
    kept = torch.stack([dare_mask(steps.shape, 0.9, seed) for seed in (1, 2, 3)]).all(dim=0)
    merged = dare_ties(0 * steps, tuned, [0.7] * 3, density=0.9, seeds=[1, 2, 3])
    assert kept.sum() > 600 and not merged[kept].any() and merged[~kept].any()


def test_ties_keeps_all_that_equal_the_threshold():
    base, tuned = torch.zeros(4), [torch.tensor([3.0, -1.0, 1.0, 0.5])]
    assert ties(base, tuned, [1], density=0.5).tolist() == [3, -1, 1, 0]


def test_given_thresholds_take_the_place_of_the_density():
    base, tuned = torch.zeros(4), [torch.tensor([3.0, -1.0, 1.0, 0.5]), torch.tensor([0.0, 2.0, 0.5, 0.25])]
    assert ties(base, tuned, [1, 1], density=0.01, thresholds=[1.0, 0.5]).tolist() == [3, 2, 0.75, 0]


def test_a_float64_threshold_decision_is_that_of_float32():
    base = torch.zeros(3, dtype=torch.float64)
    tuned = [torch.tensor([1.0, 1.0 - 1e-12, 0.5], dtype=torch.float64)]
    for dtype in (torch.float32, torch.float64):
        merged = ties(base, tuned, [1], density=1 / 3, dtype=dtype)
        assert (merged != 0).tolist() == [True, True, False]


def test_density_one_is_task_arithmetic():
    base, tuned = models(3)
    plain = task_arithmetic(base, tuned, factors(3))
    assert torch.equal(dare(base, tuned, factors(3), density=1, seeds=[1, 2, 3]), plain)
    assert torch.equal(breadcrumbs(base, tuned, factors(3), density=1, outliers=0), plain)


def test_dare_masks_are_seeded_and_have_their_density():
    mask = dare_mask((400, 500), 0.3, seed=5)
    assert mask.dtype == torch.bool and torch.equal(mask, dare_mask((400, 500), 0.3, seed=5))
    assert abs(mask.double().mean().item() - 0.3) < 5 * math.sqrt(0.3 * 0.7 / 200_000)
    other = dare_mask((400, 500), 0.3, seed=6)
    assert abs((mask & other).double().mean().item() - 0.09) < 5 * math.sqrt(0.09 * 0.91 / 200_000)


def test_breadcrumbs_by_hand():
    base, tuned = torch.zeros(10), [torch.tensor([1.0, -2, 3, -4, 5, -6, 7, -8, 9, -10])]
    merged = breadcrumbs(base, tuned, [2], density=0.4, outliers=0.2)
    assert merged.tolist() == [0, 0, 0, 0, 10, -12, 14, -16, 0, 0]
    same = torch.full((10,), 3.0)
    assert torch.equal(breadcrumbs(base, [same], [1], density=0.4, outliers=0.2), same)
    hundred = torch.arange(1.0, 101.0)
    kept = breadcrumbs(torch.zeros(100), [hundred], [1], density=0.5, outliers=0.29)
    assert kept.nonzero().ravel().tolist() == list(range(21, 71))


def test_model_stock_by_angle():
    base = torch.tensor([1.0, 1.0])
    right, up = torch.tensor([2.0, 1.0]), torch.tensor([1.0, 2.0])
    sixty = base + torch.tensor([0.5, math.sqrt(0.75)])
    assert torch.equal(model_stock(base, [right, right]), right)
    assert torch.equal(model_stock(base, [right, up]), base)
    assert torch.equal(model_stock(base, [right, 2 * base - right]), base)
    torch.testing.assert_close(model_stock(base, [right, sixty]), base + 2 / 3 * (0.5 * (right + sixty) - base))
    # One of three task vectors is zero: the mean cosine is 1/3 and the ratio 3/5.
    torch.testing.assert_close(model_stock(base, [right, base, right]), base + torch.tensor([0.4, 0.0]))


def test_slerp_falls_back_to_linear():
    vector = torch.tensor([3.0, 4.0])
    assert slerp(vector, 3 * vector, 0.5).tolist() == [6, 8]
    assert slerp(vector, -vector, 0.25).tolist() == [1.5, 2]
    assert slerp(0 * vector, vector, 0.5).tolist() == [1.5, 2]
    halfway = slerp(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), 0.5)
    assert halfway.tolist() == pytest.approx([math.sqrt(0.5)] * 2)


def test_fisher_floor_and_weights():
    tuned, none = [torch.tensor([1.0, 1.0]), torch.tensor([4.0, 4.0])], torch.zeros(2)
    half_known = torch.tensor([0.0, 1.0])
    merged = fisher_average(tuned, [half_known, none], [2, 1], floor=1e-12)
    assert merged.tolist() == pytest.approx([2, 1])
    assert fisher_average(tuned, [half_known, none], [0, 1], floor=1e-12).tolist() == [4, 4]


def test_transposed_and_trained_tensors_are_read_as_they_are():
    base, tuned = models(2, (6, 4))
    plain = task_arithmetic(base, tuned, [1, 1])
    turned = task_arithmetic(base.T, [tensor.T.requires_grad_() for tensor in tuned], [1, 1])
    assert torch.equal(turned, plain.T) and not turned.requires_grad


ZEROS = [torch.zeros(2), torch.zeros(2)]
REFUSED = {
    "no checkpoint": (lambda: average([]), "there is no checkpoint to merge. Rule: one or more"),
    "shapes": (lambda: average([torch.zeros(2), torch.zeros(3)]), r"differ in shape: \[\(2,\), \(3,\)\]"),
    "base shape": (lambda: task_vector(torch.zeros(1), torch.zeros(2)), r"differ in shape: \[\(1,\), \(2,\)\]"),
    "integers": (lambda: average([torch.zeros(2, dtype=torch.int64)]), "not of floating point: .torch.int64"),
    "dtype": (lambda: average(ZEROS, dtype=torch.float16), "in this dtype: torch.float16. Rule: torch.float32 or"),
    "few coefficients": (lambda: magmax(ZEROS[0], ZEROS, [1]), "differ in number: 1 coefficients, 2 checkpoints"),
    "NaN": (lambda: task_arithmetic(ZEROS[0], ZEROS, [1, math.nan]), r"not a finite number: \[1, nan\]"),
    "negative": (lambda: weighted_average(ZEROS, [1, -1]), r"not usable: \[1, -1\]. Rule: none negative"),
    "all zero": (lambda: weighted_average(ZEROS, [0, 0]), r"not usable: \[0, 0\]. Rule: .* at least one above 0"),
    "ties 0": (lambda: ties(ZEROS[0], ZEROS, [1, 1], density=0), "density is out of range: 0. Rule: above 0"),
    "ties coefficients": (lambda: ties(ZEROS[0], ZEROS, [1], density=1), "1 coefficients, 2 checkpoints"),
    "thresholds": (lambda: ties(ZEROS[0], ZEROS, [1, 1], density=1, thresholds=[0]), "1 thresholds, 2 checkpoints"),
    "dare": (lambda: dare(ZEROS[0], ZEROS, [1, 1], density=1.5, seeds=[1, 2]), "density is out of range: 1.5"),
    "seeds": (lambda: dare_ties(ZEROS[0], ZEROS, [1, 1], density=0.5, seeds=[1]), "1 seeds, 2 checkpoints"),
    "mask": (lambda: dare_mask((2,), math.nan, 1), "density is out of range: nan"),
    "crumbs": (
        lambda: breadcrumbs(ZEROS[0], ZEROS, [1, 1], density=0.6, outliers=0.5),
        "outliers is out of range: outliers 0.5, density 0.6. Rule: .* at most 1",
    ),
    "outliers": (
        lambda: breadcrumbs(ZEROS[0], ZEROS, [1, 1], density=0.6, outliers=-0.1),
        "outliers -0.1, density 0.6. Rule: outliers at least 0",
    ),
    "one for stock": (lambda: model_stock(ZEROS[0], ZEROS[:1]), "angle between checkpoints: 1 checkpoint. Rule: two+"),
    "slerp": (lambda: slerp(*ZEROS, 1.5), "position between two checkpoints is out of range: 1.5. Rule: 0 to 1"),
    "fishers": (lambda: fisher_average(ZEROS, ZEROS[:1], [1, 1], floor=1), "1 Fisher tensors, 2 checkpoints"),
    "floor": (lambda: fisher_average(ZEROS, ZEROS, [1, 1], floor=0), "floor of the Fisher .* not above 0: 0"),
    "fisher": (
        lambda: fisher_average(ZEROS, [torch.tensor([1.0, -1.0])] * 2, [1, 1], floor=1),
        "Fisher information is negative or not finite: -1.0 to 1.0",
    ),
    "fisher NaN": (
        lambda: fisher_average(ZEROS, [torch.tensor([1.0, math.nan])] * 2, [1, 1], floor=1),
        "Fisher information is negative or not finite: nan",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused(case):
    call, text = REFUSED[case]
    with pytest.raises(MergeError, match=text):
        call()
