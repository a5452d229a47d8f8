"""Steps of float32 masters against torch's AdamW on float32 weights."""

from __future__ import annotations

import pytest
import torch

from momo.pretrain import masters as masters_file
from momo.pretrain.masters import MasterAdamW

BETAS = (0.9, 0.95)


def make(shapes, seed=0):
    """Weights in bfloat16, the second laid out by columns, and their float32 values."""
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randn(shape, generator=generator) for shape in shapes]
    weights = [torch.nn.Parameter(value.bfloat16()) for value in values]
    weights[1].data = weights[1].data.t().contiguous().t()
    groups = [
        {"params": weights[:2], "weight_decay": 0.05, "lr": 0.01},
        {"params": weights[2:], "weight_decay": 0.0, "lr": 0.02},
    ]
    stepped = MasterAdamW(groups, {w: v.clone() for w, v in zip(weights, values, strict=True)}, betas=BETAS)
    stepped.follow_layout()
    for master in stepped.masters.values():
        stepped.inner.state[master] = {
            "step": torch.zeros(()),
            "exp_avg": torch.zeros_like(master),
            "exp_avg_sq": torch.zeros_like(master),
        }
    return weights, values, stepped


@pytest.mark.parametrize("clip", [0.0, 1.0, 1000.0])
@pytest.mark.parametrize("bucket", [8, 2**20])
def test_steps_equal_adamw_in_float32(clip, bucket, monkeypatch):
    monkeypatch.setattr(masters_file, "_BUCKET", bucket)
    weights, values, stepped = make([(5, 7), (12, 3), (4,), (9,)])
    plain = [torch.nn.Parameter(value.clone()) for value in values]
    groups = [
        {"params": plain[:2], "weight_decay": 0.05, "lr": 0.01},
        {"params": plain[2:], "weight_decay": 0.0, "lr": 0.02},
    ]
    reference = torch.optim.AdamW(groups, betas=BETAS, foreach=False)
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        for weight, exact in zip(weights, plain, strict=True):
            weight.grad = torch.randn(weight.shape, generator=generator).bfloat16()
            exact.grad = weight.grad.float()
        expected = torch.nn.utils.get_total_norm([exact.grad for exact in plain])
        if clip:
            torch.nn.utils.clip_grad_norm_(plain, clip)
        assert stepped.gather(clip) == pytest.approx(float(expected), rel=1e-6)
        stepped.step()
        reference.step()
        for weight, exact, master in zip(weights, plain, stepped.masters.values(), strict=True):
            torch.testing.assert_close(master, exact.detach(), rtol=1e-5, atol=1e-6)
            assert torch.equal(weight.detach(), master.bfloat16())
            assert master.stride() == weight.stride()


def test_a_gradient_that_is_no_number_shows_in_the_norm():
    weights, _, stepped = make([(5, 7), (12, 3)])
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    weights[0].grad[0, 0] = float("nan")
    assert not torch.isfinite(torch.tensor(stepped.gather(1.0)))


def test_a_missing_gradient_is_an_error():
    weights, _, stepped = make([(5, 7), (12, 3)])
    weights[0].grad = torch.ones_like(weights[0])
    with pytest.raises(RuntimeError, match="a weight has no gradient"):
        stepped.gather(1.0)
