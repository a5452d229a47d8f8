"""What the CPU does quicker against what it stands for."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch

from momo.models import build_mae
from momo.models.cpu import Linear, lay_out_for_training
from tests.conftest import PICO


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 7, 24), (5, 24)])
def test_linear_layers_equal_torchs(dtype, shape):
    torch.manual_seed(0)
    plain = torch.nn.Linear(24, 40).to(dtype)
    quick = Linear(copy.deepcopy(plain))
    given, above = torch.randn(shape).to(dtype), torch.randn(*shape[:-1], 40).to(dtype)
    results = []
    for layer in (plain, quick):
        entry = given.clone().requires_grad_()
        result = layer(entry)
        result.backward(above)
        results.append([result.detach(), entry.grad, layer.weight.grad, layer.bias.grad])
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 0.01, torch.float16: 0.002}[dtype]
    for seen, expected in zip(*results, strict=True):
        assert seen.dtype == dtype and seen.shape == expected.shape
        torch.testing.assert_close(seen, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))
    assert quick.state_dict().keys() == plain.state_dict().keys()


def test_linear_layers_are_used_and_need_no_gradient_of_their_input():
    layers = [m for m in build_mae(PICO, seed=0).modules() if isinstance(m, Linear)]
    assert len(layers) == 4 * (4 + 2)
    layer = Linear(torch.nn.Linear(8, 4).bfloat16())
    layer(torch.randn(3, 8).bfloat16()).sum().backward()
    assert layer.weight.grad.shape == (4, 8)


def relative(seen, exact):
    return float((seen.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("laid_out", [False, True])
@pytest.mark.parametrize("columns", [(24, 40), (40, 24), (32, 32), (32, 768), (768, 32)], ids=str)
@pytest.mark.parametrize("rows", [6, 801])  # 801: halved where oneDNN would use one of two threads
def test_bfloat16_layers_equal_float64(rows, columns, laid_out):
    torch.manual_seed(0)
    layer = Linear(torch.nn.Linear(*columns).bfloat16())
    if laid_out:
        lay_out_for_training(layer)
        assert layer.weight.is_contiguous() == (columns[0] >= columns[1])
    entry, above = torch.randn(rows, columns[0]).bfloat16().requires_grad_(), torch.randn(rows, columns[1]).bfloat16()
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        result = layer(entry)
        result.backward(above)
    finally:
        torch.set_num_threads(threads)
    weight, given, gradient = layer.weight.detach().double(), entry.detach().double(), above.double()
    assert relative(result.detach(), given @ weight.T + layer.bias.detach().double()) < 0.004
    assert relative(entry.grad, gradient @ weight) < 0.004
    assert relative(layer.weight.grad, gradient.T @ given) < 0.004
    assert relative(layer.bias.grad, gradient.sum(dim=0)) < 0.004
    assert layer.weight.grad.stride() == layer.weight.stride()


def test_the_layout_of_weights_changes_no_value():
    model = build_mae(PICO, seed=0).bfloat16()
    before = copy.deepcopy(model.state_dict())
    lay_out_for_training(model)
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    changed = {name.split(".", 2)[2] for name, value in after.items() if not value.is_contiguous()}
    assert changed == {"attn.qkv.weight", "mlp.fc1.weight"}


def test_only_bfloat16_weights_are_laid_out():
    model = build_mae(PICO, seed=0)
    lay_out_for_training(model)
    assert all(value.is_contiguous() for value in model.state_dict().values())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_freed_memory_is_kept():
    code = """if True:
        import resource, sys, torch
        from momo.machine import keep_freed_memory

        def faults():
            for step in range(34):  # aligned chunks fit freed ones only after these have grown together
                if step == 30:
                    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
                torch.ones(10_000_000)
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

        print(faults(), keep_freed_memory(), faults())"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, kept, after = done.stdout.split()
    if kept == "False":
        pytest.skip("not glibc")
    assert int(after) < 100 < int(before)
