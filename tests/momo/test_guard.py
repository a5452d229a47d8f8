"""Numbers that are not finite and damaged tiles: named, counted, bounded."""

from __future__ import annotations

import math

import pytest
import torch

from momo.config import load_config
from momo.errors import DataError, MomoError
from momo.pretrain import PretrainConfig
from momo.pretrain.guard import NonFinite, Reload, after_nonfinite, bad_groups, bad_keys, check_corrupt

FOUND = NonFinite(samples=640, step=40, ranks=[1], keys=["a_r0_c0"], groups=["blocks.3", "decoder"])


def config(*overrides: str) -> PretrainConfig:
    return load_config(PretrainConfig, None, ["out=o", "data.corpora=[c]", *overrides])


def test_keys_and_groups_are_named():
    losses = [torch.tensor([1.0, math.nan]), torch.tensor([math.inf, 0.0])]
    assert bad_keys(losses, [["a", "b"], ["c", "d"]]) == ["b", "c"]
    squares = {"blocks.0.norm1.weight": 1.0, "blocks.3.mlp.fc1.weight": math.inf, "blocks.3.mlp.fc1.bias": math.nan}
    assert bad_groups(squares | {"decoder_pred.weight": math.nan}) == ["blocks.3", "decoder"]
    text = "loss on rank 1 at step 40 (640 samples); tiles a_r0_c0; gradients of blocks.3, decoder"
    assert str(FOUND) == text
    assert str(NonFinite(0, 0, [], [], ["embed"])) == "gradients at step 0 (0 samples); gradients of embed"
    assert FOUND.to_dict() == {"step": 40, "ranks": [1], "keys": ["a_r0_c0"], "groups": ["blocks.3", "decoder"]}


def test_policies():
    after_nonfinite(FOUND, config("train.nonfinite_budget=1"), 0)
    with pytest.raises(Reload):
        after_nonfinite(FOUND, config("train.on_nonfinite=reload"), 2)
    for options, count in ((["train.nonfinite_budget=2"], 2), (["train.on_nonfinite=stop"], 0),
                           (["train.on_nonfinite=reload", "train.nonfinite_budget=0"], 0)):  # fmt: skip
        with pytest.raises(MomoError, match=r"training diverged: .*rank 1 at step 40 .*tiles a_r0_c0.*Next: look at"):
            after_nonfinite(FOUND, config(*options), count)


def test_damaged_tiles_are_bounded():
    newest = [("a", "cut short"), ("b", "bad checksum")]
    check_corrupt(2, newest, config("data.corrupt_budget=2"))
    with pytest.raises(DataError, match=r"too many damaged tiles: 3; the last: a \(cut short\), b \(bad checksum\)"):
        check_corrupt(3, newest, config("data.corrupt_budget=2"))
    many = [(str(n), "r") for n in range(8)]
    with pytest.raises(DataError, match=r"4 \(r\) and 3 more"):
        check_corrupt(8, many, config("data.corrupt_budget=0"))
