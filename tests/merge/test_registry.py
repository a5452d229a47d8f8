"""What holds for every merge method: bits do not depend on threads or cuts, inputs stay, corner shapes work."""

import dataclasses
import hashlib
import re

import pytest
import torch

from momo.errors import MergeError
from momo.merge.methods import METHODS, Piece, dare_mask, ties
from momo.merge.methods.geometry import mean_cosine
from momo.merge.methods.registry import mask_seed

LONG = 1_200_007
WITH_BASE = [name for name, method in METHODS.items() if method.needs_base]
ELEMENTWISE = [name for name, method in METHODS.items() if method.elementwise]
WHOLE = [name for name in METHODS if name not in ELEMENTWISE]


def piece_for(name, shape=(50, 41), dtype=torch.float32, **changes):
    """A piece that any method can take, with a number of checkpoints that suits this one."""
    count = METHODS[name].parents or 3
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(shape, generator=generator)
    shared = 0.1 * torch.randn(shape, generator=generator)
    tuned = [base + shared + 0.1 * torch.randn(shape, generator=generator) for _ in range(count)]
    piece = Piece(
        name="blocks.0.attn.qkv.weight",
        base=base.to(dtype),
        tuned=[tensor.to(dtype) for tensor in tuned],
        coefficients=[0.75, 0.5, 0.25][:count],
        keys=["a" * 64, "b" * 64, "c" * 64][:count],
        fishers=[torch.rand(shape, generator=generator) for _ in range(count)],
        density=0.3,
        outliers=0.02,
        seed=4,
    )
    return dataclasses.replace(piece, **changes)


def merged(name, piece):
    return METHODS[name].apply(piece)


def inputs(piece):
    return [tensor for tensor in (piece.base, *piece.tuned, *piece.fishers) if tensor is not None]


def digest(tensor):
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def cut(piece, part):
    """The same part of every tensor of a piece."""
    return dataclasses.replace(
        piece,
        base=piece.base[part],
        tuned=[tensor[part] for tensor in piece.tuned],
        fishers=[tensor[part] for tensor in piece.fishers],
    )


def results_by_threads(compute):
    before = torch.get_num_threads()
    try:
        results = set()
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            results.add(compute())
        return results
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", METHODS)
def test_the_number_of_threads_changes_no_bit(name):
    piece = piece_for(name, (LONG,))
    assert len(results_by_threads(lambda: digest(merged(name, piece)))) == 1


def test_the_number_of_threads_changes_no_bit_of_an_angle():
    """The angle itself: in a merged float32 tensor a change of its last bits would be rounded away."""
    piece = piece_for("model_stock", (LONG,))
    cosines = results_by_threads(lambda: mean_cosine(piece.base, piece.tuned))
    assert len(cosines) == 1
    rows = torch.stack(piece.tuned) - piece.base
    expected = torch.corrcoef(rows.double())  # about the cosine: the vectors' means are nearly zero
    assert cosines.pop() == pytest.approx(expected[[0, 0, 1], [1, 2, 2]].mean().item(), abs=1e-4)


def in_parts(name, piece, cuts):
    slices = [slice(first, last) for first, last in zip([0, *cuts], [*cuts, LONG], strict=True)]
    return torch.cat([merged(name, cut(piece, part)) for part in slices])


CUTS = [1, 8, 15, 131_071, 262_144, 300_001, 1_100_000]


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_cutting_a_tensor_changes_no_bit_of_an_elementwise_method(name):
    piece = piece_for(name, (LONG,))
    assert torch.equal(in_parts(name, piece, CUTS), merged(name, piece))


@pytest.mark.parametrize("name", WHOLE)
def test_the_other_methods_need_the_whole_tensor(name):
    piece = piece_for(name, (LONG,))
    assert not torch.equal(in_parts(name, piece, CUTS), merged(name, piece))


def test_ties_with_thresholds_of_the_whole_model_may_be_cut():
    piece = piece_for("ties", (LONG,), thresholds=[0.2, 0.1, 0.15])
    assert torch.equal(in_parts("ties", piece, CUTS), merged("ties", piece))


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("name", METHODS)
def test_inputs_stay_and_the_result_is_new(name, dtype):
    for precision in (torch.float32, torch.float64):
        piece = dataclasses.replace(piece_for(name, dtype=dtype), dtype=precision)
        before = [digest(tensor) for tensor in inputs(piece)]
        result = merged(name, piece)
        assert [digest(tensor) for tensor in inputs(piece)] == before
        assert result.dtype == precision and result.shape == piece.tuned[0].shape
        storages = {tensor.untyped_storage().data_ptr() for tensor in inputs(piece)}
        assert result.untyped_storage().data_ptr() not in storages


@pytest.mark.parametrize("shape", ((), (1,), (1, 1, 1), (0,), (3, 0)))
@pytest.mark.parametrize("name", METHODS)
def test_corner_shapes(name, shape):
    result = merged(name, piece_for(name, shape))
    assert result.shape == shape and torch.isfinite(result).all()


@pytest.mark.parametrize("name", METHODS)
def test_a_scalar_is_merged_as_a_tensor_of_one_entry_is(name):
    scalar = piece_for(name, ())
    assert torch.equal(merged(name, scalar), merged(name, piece_for(name, (1,)))[0])


@pytest.mark.parametrize("name", WITH_BASE)
def test_zero_task_vectors_give_the_base(name):
    piece = piece_for(name)
    piece = dataclasses.replace(piece, tuned=[piece.base.clone() for _ in piece.tuned])
    assert torch.equal(merged(name, piece), piece.base)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in WITH_BASE])
def test_equal_checkpoints_give_themselves(name):
    piece = piece_for(name)
    piece = dataclasses.replace(piece, tuned=[piece.tuned[0]] * len(piece.tuned))
    torch.testing.assert_close(merged(name, piece), piece.tuned[0], atol=0, rtol=3e-7)


@pytest.mark.parametrize("name", WITH_BASE)
def test_methods_on_task_vectors_ask_for_a_base(name):
    with pytest.raises(MergeError, match=r"needs a base: blocks.0.attn.qkv.weight. .* Next: give base="):
        merged(name, piece_for(name, base=None))


@pytest.mark.parametrize("name", [name for name in METHODS if name not in WITH_BASE])
def test_the_other_methods_do_without_one(name):
    assert torch.equal(merged(name, piece_for(name, base=None)), merged(name, piece_for(name)))


@pytest.mark.parametrize("name", METHODS)
def test_a_method_declares_the_options_that_change_its_result(name):
    piece, method = piece_for(name), METHODS[name]
    plain = merged(name, piece)
    changes = {
        "coefficients": {"coefficients": [0.1, 0.9, 0.2][: len(piece.tuned)]},
        "density": {"density": 0.6},
        "outliers": {"outliers": 0.2},
        "trim": {"thresholds": [0.3] * len(piece.tuned)},
        "seed": {"seed": 5},
        "fisher": {"fishers": [tensor**2 for tensor in piece.fishers]},
    }
    changing = {o for o, c in changes.items() if not torch.equal(merged(name, dataclasses.replace(piece, **c)), plain)}
    assert changing == method.uses
    assert (method.default_density is not None) == ("density" in method.uses)
    assert (method.default_coefficient is not None) == ("coefficients" in method.uses)


def test_names_defaults_and_references():
    assert list(METHODS) == [
        *("average", "weighted_average", "task_arithmetic", "ties", "dare", "dare_ties", "magmax", "breadcrumbs"),
        *("model_stock", "slerp", "fisher"),
    ]
    assert all(name == method.name for name, method in METHODS.items())
    defaults = {name: method.default_coefficient for name, method in METHODS.items()}
    assert defaults == {
        **dict.fromkeys(("average", "model_stock")),
        **dict.fromkeys(("task_arithmetic", "dare", "magmax", "breadcrumbs"), 0.5),
        **dict.fromkeys(("weighted_average", "ties", "dare_ties", "slerp", "fisher"), 1.0),
    }
    for method in METHODS.values():
        assert re.fullmatch(r"arXiv \d{4}\.\d{5}|Shoemake 1985, doi \S+", method.reference)
        assert "\n" not in method.summary and 20 < len(method.summary) < 90


def test_masks_follow_the_checkpoint_and_the_tensor():
    piece = piece_for("dare", coefficients=[0.5] * 3)
    turned = dataclasses.replace(piece, tuned=piece.tuned[::-1], keys=piece.keys[::-1])
    torch.testing.assert_close(merged("dare", turned), merged("dare", piece), atol=1e-6, rtol=0)
    for change in ({"name": "blocks.1.attn.qkv.weight"}, {"keys": piece.keys[::-1]}, {"seed": 5}):
        assert not torch.allclose(merged("dare", dataclasses.replace(piece, **change)), merged("dare", piece))
    assert mask_seed(4, "a", "x") == int(hashlib.sha256(b"4/a/x").hexdigest()[:16], 16) // 2
    one = dataclasses.replace(piece, tuned=piece.tuned[:1], keys=piece.keys[:1], coefficients=[1.0])
    changed = merged("dare", one) != piece.base
    assert torch.equal(changed, dare_mask(piece.base.shape, 0.3, mask_seed(4, piece.keys[0], piece.name)))


def test_slerp_goes_by_the_share_of_the_second():
    piece = piece_for("slerp")
    assert torch.equal(merged("slerp", dataclasses.replace(piece, coefficients=[0, 3])), piece.tuned[1])
    assert torch.equal(merged("slerp", dataclasses.replace(piece, coefficients=[2, 0])), piece.tuned[0])
    quarter = [merged("slerp", dataclasses.replace(piece, coefficients=c)) for c in ([3, 1], [0.75, 0.25])]
    assert torch.equal(*quarter)
    halfway = merged("slerp", dataclasses.replace(piece, coefficients=[1, 1]))
    assert (quarter[0] - piece.tuned[0]).norm() < 0.6 * (halfway - piece.tuned[0]).norm()


def test_ties_is_given_its_thresholds():
    piece = piece_for("ties", thresholds=[0.2, 0.1, 0.15])
    direct = ties(piece.base, piece.tuned, piece.coefficients, density=1, thresholds=[0.2, 0.1, 0.15])
    assert torch.equal(merged("ties", piece), direct)


def test_wrong_numbers_of_checkpoints_are_refused():
    three = piece_for("average")
    with pytest.raises(
        MergeError, match="wrong number of checkpoints for this method: 3. Rule: slerp merges exactly 2"
    ):
        merged("slerp", three)
    with pytest.raises(MergeError, match="method: 1. Rule: model_stock merges 2 or more. Next: choose others or"):
        METHODS["model_stock"].check_parents(1)
    for name, method in METHODS.items():
        method.check_parents(2)
        if name != "slerp":
            method.check_parents(7)


@pytest.mark.parametrize("coefficients", ([0, 0], [-1, 2], [1], [float("nan"), 1], [1, float("inf")]))
def test_unusable_shares_of_slerp_are_refused(coefficients):
    with pytest.raises(MergeError, match="coefficients of slerp are not usable: .* Rule: two, none negative, at least"):
        merged("slerp", piece_for("slerp", coefficients=coefficients))


def test_missing_fisher_information_is_refused():
    with pytest.raises(MergeError, match="no Fisher information for this tensor: blocks.0.attn.qkv.weight. Rule: .*"):
        merged("fisher", piece_for("fisher", fishers=None))
