"""What a run says before its first step: data, model, device, kernels, arithmetic, cost, and disk space."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..machine import usable_cores
from ..models import Architecture
from ..runs import METRICS_NAME, read_metrics
from .config import PretrainConfig
from .flops import flops_per_sample, peak_tflops
from .optimisation import warmup_length

_ASSUMED_MFU = 0.4
_CPU_FEATURES = (("amx_bf16", "AMX bf16"), ("amx_tile", "AMX"), ("avx512_bf16", "AVX-512 bf16"))


@dataclass(frozen=True)
class Device:
    """What a rank computes on.

    Attributes:
        kind: `cuda` or `cpu`.
        name: Of the GPU or of the processor.
        detail: Memory and compute capability of a GPU; instruction set and threads a rank on a CPU.
        bf16: The device has instructions for bf16 matrix products.
    """

    kind: str
    name: str
    detail: str
    bf16: bool


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the banner cannot see in the configuration.

    Attributes:
        tiles: Sensor, training tiles and validation tiles of each corpus.
        synthetic: Some corpus or the base is generated.
        origin: Where the initial weights come from.
        parameters: All parameters, fixed ones included.
        trainable: Trainable parameters.
        attention: What the model computes attention with, `sdpa` or `plain`.
        zero_stage: ZeRO stage.
        offload: What is kept in the machine's memory instead of the GPU's.
        device: See `describe_device`.
        free_bytes: Free space where the run is written; None when unknown.
        done: Samples consumed by the run that is continued.
        resumed_from: Name of the checkpoint it is continued from; None at a start.
        images_per_s: Measured before, see `measured_rate`; None when not.
    """

    tiles: Sequence[tuple[str, int, int]]
    synthetic: bool
    origin: str
    parameters: int
    trainable: int
    attention: str
    zero_stage: int
    offload: Sequence[str] = ()
    device: Device
    free_bytes: int | None
    done: int = 0
    resumed_from: str | None = None
    images_per_s: float | None = None


def banner(config: PretrainConfig, architecture: Architecture, facts: Facts) -> list[str]:
    """Returns the lines of the banner.

    Args:
        config: The job.
        architecture: Shapes of the model.
        facts: Everything else.
    """
    tiles = ", ".join(f"{sensor} {train:,} + {val:,} val" for sensor, train, val in facts.tiles)
    half = f"{config.train.precision} with fp32 master weights, validation in fp32"
    lines = [
        ("run", config.out),
        ("tiles", tiles + ("   SYNTHETIC" if facts.synthetic else "")),
        (
            "model",
            f"{architecture.size}, {architecture.image_size} px in patches of {architecture.patch_size}, "
            f"{architecture.in_chans} channel{'s' if architecture.in_chans > 1 else ''}, "
            f"{facts.parameters / 1e6:.2f} M parameters, start: {facts.origin}",
        ),
        ("device", f"{facts.device.name} ({facts.device.detail}), {config.world} rank{'s' * (config.world > 1)}"),
        ("precision", "fp32" if config.train.precision == "fp32" else half),
        *(("kernels", line) for line in _kernels(config, facts)),
        ("engine", _engine(config, facts)),
        *(("batch", line) for line in _arithmetic(config, facts)),
        ("schedule", _schedule(config)),
        *(("cost", line) for line in _cost(config, architecture, facts)),
        *(("disk", line) for line in _disk(config, facts)),
    ]
    if facts.resumed_from is not None:
        complete = facts.done >= _stop(config)
        state = "complete already" if complete else f"continues at {facts.done:,} samples"
        lines.append(("resume", f"{state} ({facts.resumed_from})"))
    named = [
        (label if label != before else "", text) for before, (label, text) in zip(_labels(lines), lines, strict=True)
    ]
    return [f"{label:<10}{text}" for label, text in named]


def _labels(lines: Sequence[tuple[str, str]]) -> list[str]:
    return ["", *(label for label, _ in lines[:-1])]


def _kernels(config: PretrainConfig, facts: Facts) -> list[str]:
    options, cuda = config.model, facts.device.kind == "cuda"
    where = "GPU" if cuda else "CPU"
    way = {"sdpa": "fused (sdpa)", "plain": "batched products (plain)"}[facts.attention]
    why = f"the quicker one on this {where}" if options.attention == "auto" else f"model.attention={options.attention}"
    blocks = "compiled (model.compile)" if options.compile else "not compiled (model.compile=false)"
    memory = "computed again in the backward pass" if options.activation_checkpointing else "kept"
    lines = [f"attention {way}: {why}; blocks {blocks}; activations {memory}; AdamW fused"]
    if config.train.precision == "bf16" and not facts.device.bf16:
        lines.append(f"WARNING: this {where} has no bf16 instructions, so bf16 is emulated; fp32 may be quicker")
    if config.train.precision == "fp16" and not cuda:
        lines.append("WARNING: fp16 is meant for GPUs; on a CPU bf16 or fp32 is quicker")
    return lines


def _engine(config: PretrainConfig, facts: Facts) -> str:
    stage = f"DeepSpeed ZeRO stage {facts.zero_stage}"
    if facts.zero_stage == 1 and config.train.precision != "fp32":
        stage += " (the least that half precision needs)"
    offload = f", in the machine's memory: {', '.join(facts.offload)}" if facts.offload else ""
    clip = f"gradients clipped to {config.train.clip_grad:g}" if config.train.clip_grad else "gradients not clipped"
    return f"{stage}{offload}, {clip}, {'NCCL' if facts.device.kind == 'cuda' else 'gloo'}"


def _arithmetic(config: PretrainConfig, facts: Facts) -> list[str]:
    train = config.train
    epoch = sum(count for _, count, _ in facts.tiles)
    steps, stop = _stop(config) // train.batch_size, _stop(config)
    return [
        f"{train.batch_size} = {config.world} rank{'s' * (config.world > 1)} x {config.accumulation} accumulated "
        f"x {config.micro_batch} a micro-batch",
        f"{steps:,} steps = {stop:,} samples = {stop / epoch:.1f} epochs"
        + (f" (train.samples={train.samples:,} is cut to whole batches)" if stop != train.samples else ""),
    ]


def _schedule(config: PretrainConfig) -> str:
    train, warmup = config.train, warmup_length(config.train)
    cut = f" (train.warmup_samples={train.warmup_samples:,} is cut to a tenth of the run)"
    return (
        f"peak learning rate {train.base_lr * train.batch_size / 256:.3g} after {warmup:,} samples"
        + (cut if warmup < train.warmup_samples else "")
        + f", then half a cosine to {train.min_lr:g}"
    )


def _cost(config: PretrainConfig, architecture: Architecture, facts: Facts) -> list[str]:
    per_sample = flops_per_sample(architecture, config.model.mask_ratio).total
    stop = _stop(config)
    left = max(0, stop - facts.done)
    lines = [f"{scaled(per_sample)}FLOP a sample, {scaled(per_sample * stop)}FLOP in all"]
    peak = config.telemetry.peak_tflops or peak_tflops(facts.device.name, config.train.precision)
    if facts.images_per_s is not None:
        lines.append(
            f"{duration(left / facts.images_per_s)} to go at {facts.images_per_s:,.1f} images/s, as measured before"
        )
    elif peak is not None:
        rate = _ASSUMED_MFU * peak * 1e12 * config.world / per_sample
        lines.append(
            f"{duration(left / rate)} at {rate:,.0f} images/s, if {_ASSUMED_MFU:.0%} of {config.world} x {peak:g} "
            "TFLOP/s is reached; measured from the first train line on"
        )
    else:
        lines.append("time to go: measured from the first train line on")
    return lines


def _disk(config: PretrainConfig, facts: Facts) -> list[str]:
    count, needed = disk_needed(config, facts.parameters, facts.trainable, done=facts.done)
    kept = f"{count:,} checkpoint{'s' * (count != 1)} to come"
    lines = [f"{_gib(needed)} for {kept}, {'?' if facts.free_bytes is None else _gib(facts.free_bytes)} free"]
    if facts.free_bytes is not None and needed > facts.free_bytes:
        lines.append(
            "WARNING: they will not fit; raise validation.every, or put `out` on a larger disk. A full disk stops the "
            "run, its checkpoints stay whole"
        )
    return lines


def disk_needed(config: PretrainConfig, parameters: int, trainable: int, *, done: int) -> tuple[int, int]:
    """Works out what a run will still write.

    A checkpoint is the weights in float32; the newest `checkpoint.keep_engine` of them, and the one being written,
    have two moments a trainable parameter beside; with `checkpoint.resume_every` there is one more of both in between,
    and its successor while that is written.

    Args:
        config: The job.
        parameters: All parameters.
        trainable: Trainable parameters.
        done: Samples consumed already.

    Returns:
        Number of checkpoints to come, and bytes, at most.
    """
    batch, every, stop = config.train.batch_size, config.validation.every, _stop(config)
    left = max(0, stop - done) // batch
    count = min(left, stop // every - done // every)
    if left and stop // every == (stop - batch) // every:
        count += 1
    weights, engine = 4 * parameters, 8 * trainable
    needed = count * weights + (config.checkpoint.keep_engine + 1) * engine if left else 0
    if left and config.checkpoint.resume_every is not None:
        needed += 2 * (weights + engine)
    return count, needed


def describe_device(ranks_here: int = 1) -> Device:
    """Looks at the device a rank of this machine computes on.

    Args:
        ranks_here: Ranks on this machine; they share a CPU's threads.
    """
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        count = torch.cuda.device_count()
        detail = (
            f"{properties.total_memory / 2**30:.0f} GiB, compute capability {properties.major}.{properties.minor}, "
            f"CUDA {torch.version.cuda}, {count} on this machine"
        )
        return Device("cuda", properties.name, detail, torch.cuda.is_bf16_supported(including_emulation=False))
    features = _cpu_features()
    instructions = ", ".join([torch.backends.cpu.get_cpu_capability(), *features])
    threads = max(1, usable_cores() // ranks_here)
    detail = f"no CUDA device found; {instructions}; {threads} thread{'s' * (threads > 1)} a rank"
    return Device("cpu", _cpu_name(), detail, any("bf16" in feature for feature in features))


def _cpu_features() -> list[str]:
    # Since torch 2.12 or so; before, only the instruction set is known.
    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return [text for name, text in _CPU_FEATURES if known.get(name)]


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "CPU"


def measured_rate(run: Path, lines: int = 20) -> float | None:
    """Returns the median images/s of the last train lines of a run; None when there are none.

    Raises:
        CheckpointError: A line of the metrics other than the last is not JSON.
    """
    if not (run / METRICS_NAME).is_file():
        return None
    rates = [record["images_per_s"] for record in read_metrics(run) if record.get("event") == "train"]
    rates = [rate for rate in rates if rate]
    return statistics.median(rates[-lines:]) if rates else None


def duration(seconds: float) -> str:
    """Writes a time span with its two largest units."""
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if round(seconds) < 60:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    if hours < 48:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{hours // 24} d {hours % 24} h"


def scaled(value: float) -> str:
    """Writes a large number with an SI prefix, to be followed by its unit."""
    for power, prefix in ((21, "Z"), (18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M")):
        if value >= 10**power:
            return f"{value / 10**power:.3g} {prefix}"
    return f"{value:.0f} "


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def _stop(config: PretrainConfig) -> int:
    return config.train.samples - config.train.samples % config.train.batch_size
