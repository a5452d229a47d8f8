"""The lines a run begins with, from plain values."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from momo.config import config_from_dict
from momo.models import Architecture
from momo.pretrain.banner import (
    Device,
    Facts,
    banner,
    describe_device,
    disk_needed,
    duration,
    measured_rate,
    scaled,
)
from momo.pretrain.config import PretrainConfig
from momo.pretrain.flops import flops_per_sample

BASE = Architecture(size="base")
CPU = Device("cpu", "Some CPU", "AVX512, AMX bf16; 2 threads a rank", True)
GPU = Device("cuda", "NVIDIA A100-SXM4-80GB", "80 GiB", True)
FACTS = Facts(
    tiles=[("CTX", 100_000, 5_000), ("THEMIS", 20_000, 1_000)],
    synthetic=False,
    origin="base 0123456789ab",
    parameters=112_000_000,
    trainable=111_000_000,
    attention="plain",
    zero_stage=1,
    device=CPU,
    free_bytes=100 * 2**30,
)


def job(**sections: object) -> PretrainConfig:
    fields = {"out": "runs/a", "ranks": 4, "data": {"corpora": ["x"]}, **sections}
    fields["train"] = {"samples": 1_000_000, "batch_size": 256, "micro_batch": 16, **fields.get("train", {})}
    return config_from_dict(PretrainConfig, fields)


def text(facts: Facts = FACTS, **sections: object) -> str:
    return "\n".join(banner(job(**sections), BASE, facts))


def changed(**fields: object) -> Facts:
    return dataclasses.replace(FACTS, **fields)


def test_every_decision_has_its_line():
    assert banner(job(), BASE, FACTS) == [
        "run       runs/a",
        "tiles     CTX 100,000 + 5,000 val, THEMIS 20,000 + 1,000 val",
        "model     base, 224 px in patches of 16, 1 channel, 112.00 M parameters, start: base 0123456789ab",
        "device    Some CPU (AVX512, AMX bf16; 2 threads a rank), 4 ranks",
        "precision bf16 with fp32 master weights, validation in fp32",
        "kernels   attention batched products (plain): the quicker one on this CPU; blocks not compiled "
        "(model.compile=false); activations kept; AdamW fused",
        "engine    DeepSpeed ZeRO stage 1 (the least that half precision needs), gradients clipped to 1, gloo",
        "batch     256 = 4 ranks x 4 accumulated x 16 a micro-batch",
        "          3,906 steps = 999,936 samples = 8.3 epochs (train.samples=1,000,000 is cut to whole batches)",
        "schedule  peak learning rate 0.001 after 50,000 samples, then half a cosine to 0",
        "cost      56.9 GFLOP a sample, 56.9 PFLOP in all",
        "          time to go: measured from the first train line on",
        "disk      5.83 GiB for 10 checkpoints to come, 100.00 GiB free",
    ]


def test_choices_made_by_the_user_are_told_as_such():
    lines = text(
        changed(attention="sdpa", zero_stage=3, offload=["offload_optimizer"], synthetic=True),
        model={"attention": "sdpa", "compile": True, "activation_checkpointing": True},
        train={"clip_grad": 0.0, "precision": "fp32", "warmup_samples": 500_000},
    )
    assert (
        "attention fused (sdpa): model.attention=sdpa; blocks compiled (model.compile); activations computed" in lines
    )
    assert "ZeRO stage 3, in the machine's memory: offload_optimizer, gradients not clipped" in lines
    assert "precision fp32" in lines and "val   SYNTHETIC" in lines
    assert "after 100,000 samples (train.warmup_samples=500,000 is cut to a tenth of the run)" in lines
    assert "least that half precision" not in lines


def test_slow_precisions_are_warned_of():
    slow = dataclasses.replace(CPU, bf16=False)
    assert "WARNING: this CPU has no bf16 instructions" in text(changed(device=slow))
    assert "WARNING" not in text(changed(device=slow), train={"precision": "fp32"})
    assert "WARNING: fp16 is meant for GPUs" in text(train={"precision": "fp16"})
    assert "WARNING" not in text(changed(device=GPU), train={"precision": "fp16"})


def test_time_to_go_is_measured_or_assumed_and_says_which():
    assert "9 h 16 min to go at 30.0 images/s, as measured before" in text(changed(images_per_s=30.0))
    resumed = changed(images_per_s=30.0, done=899_936, resumed_from="samples-000899936")
    assert "56 min to go at 30.0 images/s" in text(resumed)
    assert text(resumed).splitlines()[-1] == "resume    continues at 899,936 samples (samples-000899936)"
    rate = 0.4 * 312e12 * 4 / flops_per_sample(BASE, 0.75).total
    assert f"at {rate:,.0f} images/s, if 40% of 4 x 312 TFLOP/s is reached" in text(changed(device=GPU))
    assert "if 40% of 4 x 5 TFLOP/s" in text(telemetry={"peak_tflops": 5.0})


def test_a_complete_run_is_told():
    lines = text(changed(done=999_936, resumed_from="samples-000999936"))
    assert "resume    complete already (samples-000999936)" in lines
    assert "disk      0.00 GiB for 0 checkpoints to come" in lines


def test_a_disk_that_is_too_small_is_warned_of():
    assert "WARNING: they will not fit; raise validation.every" in text(changed(free_bytes=5 * 2**30))
    assert "WARNING" not in text(changed(free_bytes=6 * 2**30))
    assert "? free" in text(changed(free_bytes=None))


def steps_with_checkpoint(config: PretrainConfig, done: int) -> int:
    """Counts as the training loop decides."""
    batch, every = config.train.batch_size, config.validation.every
    stop = config.train.samples - config.train.samples % batch
    return sum(
        after // every > (after - batch) // every or after == stop for after in range(done + batch, stop + 1, batch)
    )


@pytest.mark.parametrize("every", [64, 256, 1000, 2560, 9_000, 10_000_000])
@pytest.mark.parametrize("done", [0, 256, 5120, 9984 - 256, 9984])
def test_checkpoints_to_come_are_those_of_the_loop(every, done):
    config = job(train={"samples": 10_000}, validation={"every": every})
    assert disk_needed(config, 1, 1, done=done)[0] == steps_with_checkpoint(config, done)


def test_disk_holds_weights_moments_and_the_state_in_between():
    plain = job(train={"samples": 2560}, validation={"every": 256})
    assert disk_needed(plain, 1000, 900, done=0) == (10, 10 * 4000 + 2 * 7200)
    kept = job(train={"samples": 2560}, validation={"every": 256}, checkpoint={"keep_engine": 3, "resume_every": 64})
    assert disk_needed(kept, 1000, 900, done=0) == (10, 10 * 4000 + 4 * 7200 + 2 * (4000 + 7200))
    assert disk_needed(kept, 1000, 900, done=2560) == (0, 0)


def test_device_is_described_as_it_is():
    device = describe_device(ranks_here=2)
    assert device.kind == ("cuda" if torch.cuda.is_available() else "cpu") and device.name
    if device.kind == "cpu":
        assert torch.backends.cpu.get_cpu_capability() in device.detail and "a rank" in device.detail


def test_rate_is_the_median_of_the_last_train_lines(tmp_path: Path):
    assert measured_rate(tmp_path) is None
    records = [{"event": "val", "samples": 0, "loss": 1.0}]
    (tmp_path / "metrics.jsonl").write_text(json.dumps(records[0]) + "\n")
    assert measured_rate(tmp_path) is None
    records += [{"event": "train", "samples": n, "images_per_s": r} for n, r in enumerate([9000.0, 30, 31, 2, 32])]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + '{"ev')
    assert measured_rate(tmp_path) == 31
    assert measured_rate(tmp_path, lines=1) == 32


@pytest.mark.parametrize(
    ("seconds", "written"),
    [
        (4.2, "4 s"), (59.9, "1 min"), (60, "1 min"), (3569, "59 min"), (3599, "1 h 00 min"), (7500, "2 h 05 min"),
        (47 * 3600, "47 h 00 min"), (200_000, "2 d 8 h"), (86400 * 12.5, "12 d 12 h"),
    ],
)  # fmt: skip
def test_durations(seconds, written):
    assert duration(seconds) == written


@pytest.mark.parametrize(("value", "written"), [(12, "12 "), (3.5e9, "3.5 G"), (5.88e16, "58.8 P"), (2e21, "2 Z")])
def test_large_numbers(value, written):
    assert scaled(value) == written
