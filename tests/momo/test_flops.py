"""Operation counts against PyTorch's own counter, and peaks."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from momo.errors import ConfigError
from momo.models import Architecture, build_mae
from momo.pretrain.flops import flops_per_sample, mfu, peak_tflops, shown_patches

BATCH = 3
CASES = [
    (Architecture(size="pico", image_size=32, patch_size=8), 0.75),
    (Architecture(size="pico", image_size=40, patch_size=8, in_chans=3), 0.6),
    (Architecture(size="tiny", image_size=64, patch_size=16), 0.75),
]


def counted(architecture: Architecture, mask_ratio: float, *, backward: bool) -> int:
    """Operations of one sample as PyTorch counts them, with plain attention (its counter has no fused one on CPUs)."""
    model = build_mae(architecture, seed=0, mask_ratio=mask_ratio)
    model.set_attention("plain")
    side = architecture.image_size
    image = torch.randn(BATCH, architecture.in_chans, side, side)
    valid = torch.ones(BATCH, side, side, dtype=torch.bool)
    with FlopCounterMode(display=False) as counter:
        loss = model(image, valid, torch.rand(BATCH, architecture.patches)).mean()
        if backward:
            loss.backward()
    assert counter.get_total_flops() % BATCH == 0
    return counter.get_total_flops() // BATCH


@pytest.mark.parametrize(("architecture", "mask_ratio"), CASES)
def test_forward_equals_pytorchs_count(architecture, mask_ratio):
    assert flops_per_sample(architecture, mask_ratio).forward == counted(architecture, mask_ratio, backward=False)


@pytest.mark.parametrize(("architecture", "mask_ratio"), CASES)
def test_backward_is_pytorchs_count_plus_the_gradient_of_the_image(architecture, mask_ratio):
    count = flops_per_sample(architecture, mask_ratio)
    pixels = architecture.patch_size**2 * architecture.in_chans
    not_computed = 2 * shown_patches(architecture, mask_ratio) * pixels * architecture.widths.dim
    assert count.total - not_computed == counted(architecture, mask_ratio, backward=True)
    assert not_computed < 0.01 * count.total


def test_options_count_what_other_implementations_compute_beside():
    architecture = Architecture(size="base")
    count = flops_per_sample(architecture, 0.75)
    more = flops_per_sample(architecture, 0.75, embed_hidden=True, predict_shown=True)
    assert more.encoder - count.encoder == 2 * (196 - 49) * 256 * 768
    rest = 197 - 147
    assert more.decoder - count.decoder == 2 * rest * 512 * 256 + rest * (4 * 197 * 512 + 2 * 9 * 512**2)


def test_parts_add_up_and_backward_is_twice_forward():
    count = flops_per_sample(Architecture(size="base"), 0.75)
    assert count.forward == count.encoder + count.decoder
    assert count.total == 3 * count.forward
    assert count.to_dict() == {
        "encoder": count.encoder,
        "decoder": count.decoder,
        "forward": count.forward,
        "backward": 2 * count.forward,
        "total": 3 * count.forward,
    }


def test_vit_base_costs_what_can_be_worked_out_by_hand():
    # Encoder: 50 tokens through 12 blocks of 12 * 768^2 weights, and 4 * 50^2 * 768 for attention each.
    count = flops_per_sample(Architecture(size="base", image_size=224, patch_size=16, in_chans=1), 0.75)
    assert count.encoder == 2 * 49 * 256 * 768 + 12 * (2 * 50 * 12 * 768**2 + 4 * 50**2 * 768)
    last = 2 * 197 * 3 * 512**2 + 2 * 147 * 9 * 512**2 + 4 * 147 * 197 * 512
    blocks = 7 * (2 * 197 * 12 * 512**2 + 4 * 197**2 * 512) + last
    assert count.decoder == 2 * 50 * 768 * 512 + blocks + 2 * 147 * 512 * 256


@pytest.mark.parametrize("mask_ratio", [0.01, 0.5, 0.6, 0.75, 0.9, 0.999])
def test_shown_patches_are_the_models(mask_ratio):
    architecture = Architecture(size="pico", image_size=40, patch_size=8)
    assert shown_patches(architecture, mask_ratio) == build_mae(architecture, seed=0, mask_ratio=mask_ratio).kept


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312.0),
        ("NVIDIA A100-PCIE-40GB", "fp32", 19.5),
        ("NVIDIA H100 80GB HBM3", "bf16", 989.0),
        ("NVIDIA H100 PCIe", "bf16", 756.0),
        ("NVIDIA H200", "fp16", 989.0),
        ("NVIDIA GH200 480GB", "bf16", 989.0),
        ("NVIDIA L40S", "bf16", 362.0),
        ("NVIDIA L40", "bf16", 181.0),
        ("NVIDIA L4", "bf16", 121.0),
        ("NVIDIA A10", "bf16", 125.0),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("Tesla V100-SXM2-16GB", "fp16", 125.0),
        ("Tesla V100-PCIE-32GB", "fp16", 112.0),
        ("Tesla V100-SXM2-16GB", "bf16", None),
        ("Tesla T4", "fp16", 65.0),
        ("NVIDIA A10G", "bf16", None),
        ("NVIDIA GeForce RTX 4090 D", "bf16", None),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", "bf16", None),
        ("CPU", "bf16", None),
    ],
)
def test_peaks_are_those_of_the_very_device(name, precision, peak):
    assert peak_tflops(name, precision) == peak


def test_unknown_precision_is_refused():
    with pytest.raises(ConfigError, match="train.precision"):
        peak_tflops("NVIDIA A100-SXM4-80GB", "int8")


def test_mfu_is_the_share_of_the_peak():
    assert mfu(1000.0, 30e9, 2, 300.0) == pytest.approx(0.05)
    assert mfu(1000.0, 30e9, 2, None) is None
