"""Factors of checkpoints and layers."""

from __future__ import annotations

import pytest

from momo.errors import MergeError
from momo.merge.coefficients import depths, layer_factors, parent_factors
from momo.models import build_mae
from tests.conftest import PICO

NAMES = ["cls_token", "blocks.0.x", "blocks.1.x", "blocks.2.x", "norm.weight", "decoder_embed.weight",
         "decoder_blocks.0.x", "decoder_blocks.1.x", "decoder_pred.weight"]  # fmt: skip


def test_depth_goes_from_0_to_1_in_encoder_and_decoder():
    assert depths(NAMES) == dict(zip(NAMES, [0, 0, 0.5, 1, 1, 0, 0, 1, 1], strict=True))


def test_every_tensor_of_a_model_has_a_depth():
    found = depths(build_mae(PICO, seed=0).state_dict())
    assert found["pos_embed"] == found["patch_embed.proj.weight"] == found["mask_token"] == 0
    assert found["norm.bias"] == found["decoder_norm.weight"] == 1
    assert {found[name] for name in found if name.startswith("blocks.")} == {0, 1 / 3, 2 / 3, 1}


def test_one_block_has_depth_0():
    assert depths(["blocks.0.x", "norm.weight"]) == {"blocks.0.x": 0, "norm.weight": 1}


def test_ramp():
    assert layer_factors(NAMES, {}, [0.2, 0.6])["blocks.1.x"] == pytest.approx(0.4)
    assert layer_factors(NAMES, {}, [0.2, 0.6])["decoder_pred.weight"] == pytest.approx(0.6)


def test_the_last_glob_that_matches_counts():
    found = layer_factors(NAMES, {"*blocks.*": 0.5, "blocks.2.*": 0.1}, [])
    names = ("norm.weight", "blocks.0.x", "blocks.2.x", "decoder_blocks.0.x")
    assert [found[name] for name in names] == [1, 0.5, 0.1, 0.5]


def test_unknown_names():
    with pytest.raises(MergeError, match=r"layers names layers that are not there: block.\*.*names are like cls_token"):
        layer_factors(NAMES, {"block.*": 0.5}, [])
    with pytest.raises(MergeError, match="coefficients names a checkpoint that is not merged: c.*are a, b"):
        parent_factors(["a", "b"], 0.5, {"c": 1.0})
    assert parent_factors(["a", "b"], 0.5, {"b": 1.0}) == {"a": 0.5, "b": 1.0}
