"""Configuration of one pretraining job."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import one_of, option, positive
from ..errors import ConfigError
from ..models import SIZES
from ..normalise import POLICIES

PRECISIONS = ("bf16", "fp16", "fp32")
ORDERS = ("global", "shards")
ON_BAD_DATA = ("skip", "stop")
ON_NONFINITE = ("skip", "reload", "stop")
ATTENTIONS = ("auto", "sdpa", "plain")
RESUMES = ("auto", "never", "must")


@dataclass(kw_only=True)
class DataOptions:
    """Which tiles are read, in which order and how."""

    corpora: list[str] = option([], "corpus folders or URLs (s3://, https://, ...); several make a joint run")
    normalisation: str = option("per_tile_zscore", f"one of {', '.join(POLICIES)}")
    order: str = option(
        "global",
        "global (every tile of an epoch anywhere) or shards (shuffled shards, tiles shuffled within a window of them)",
    )
    window_shards: int = option(16, "order=shards: shards that are mixed with one another")
    pipe: str | None = option(None, "command that writes one shard to its output, for example 'aws s3 cp {url} -'")
    buffer_mb: int = option(4096, "memory of a reading process for shards that can only be streamed")
    on_corrupt: str = option("skip", "skip (a damaged tile weighs nothing, counted) or stop")
    corrupt_budget: int = option(100, "damaged tiles of a run that may be skipped before it stops")
    accept_changed_corpus: bool = option(False, "continue a run although a corpus has another fingerprint than before")
    workers: int = option(0, "reading processes a rank; 0 reads in the training process")
    cache_mb: int = option(512, "memory a reading process may use to keep a corpus decoded; larger ones are read anew")
    verify: bool = option(True, "compare every shard's sha256 before the start (local corpora)")

    def __post_init__(self) -> None:
        one_of("data.normalisation", self.normalisation, POLICIES)
        one_of("data.order", self.order, ORDERS)
        one_of("data.on_corrupt", self.on_corrupt, ON_BAD_DATA)
        positive(data__window_shards=self.window_shards, data__buffer_mb=self.buffer_mb)
        not_negative(data__workers=self.workers, data__cache_mb=self.cache_mb, data__corrupt_budget=self.corrupt_budget)
        if len(set(self.corpora)) != len(self.corpora):
            raise ConfigError("a corpus is named twice", seen=", ".join(self.corpora), rule="each corpus once")
        if self.pipe is not None and not ("{url}" in self.pipe or "{name}" in self.pipe):
            raise ConfigError(
                "data.pipe names no shard",
                seen=self.pipe,
                rule="{url} (corpus and shard) or {name} (file name of the shard) stands where the shard belongs",
                fix="for example data.pipe='curl -sf {url}'",
            )


@dataclass(kw_only=True)
class ModelOptions:
    """Shapes, each null taken from the base or, without a base, from the default named; and how they are computed."""

    size: str | None = option(None, f"one of {', '.join(SIZES)}; without a base: base")
    image_size: int | None = option(None, "input side in pixels; it is the tile size of the corpora")
    patch_size: int | None = option(None, "patch side in pixels; without a base: 16")
    in_chans: int | None = option(None, "1 (native grey) or 3 (grey repeated); without a base: 1")
    mask_ratio: float = option(0.75, "share of patches hidden, above 0 and below 1")
    norm_pix_loss: bool = option(False, "score each patch after standardising it")
    attention: str = option("auto", "auto (the quicker one on this device), sdpa (fused) or plain (batched products)")
    activation_checkpointing: bool = option(False, "compute the blocks again in the backward pass: less memory, slower")
    compile: bool = option(False, "torch.compile the blocks: slower start, quicker steps")

    def __post_init__(self) -> None:
        if self.size is not None:
            one_of("model.size", self.size, list(SIZES))
        one_of("model.attention", self.attention, ATTENTIONS)
        if not 0 < self.mask_ratio < 1:
            raise ConfigError("model.mask_ratio is out of range", seen=self.mask_ratio, rule="above 0 and below 1")


@dataclass(kw_only=True)
class LossOptions:
    """Weights of the terms of the loss; the default is the masked autoencoder's, MOMO's combined loss is 0.25 each."""

    mse: float = option(1.0, "weight of the squared error on hidden patches")
    ssim: float = option(0.0, "weight of 1 - structural similarity")
    lpips: float = option(0.0, "weight of the perceptual distance (AlexNet); needs loss.lpips_backbone or a download")
    gradient: float = option(0.0, "weight of the error of horizontal and vertical differences")
    lpips_backbone: str | None = option(None, "file with torchvision's AlexNet weights; null: torchvision's own")

    def __post_init__(self) -> None:
        weights = {"mse": self.mse, "ssim": self.ssim, "lpips": self.lpips, "gradient": self.gradient}
        not_negative(**{f"loss__{name}": weight for name, weight in weights.items()})
        if not any(weights.values()):
            raise ConfigError("every term of the loss weighs nothing", seen=weights, rule="one weight is above 0")


@dataclass(kw_only=True)
class AugmentOptions:
    """Augmentations for nadir images, drawn from the tile's key and applied on the device."""

    symmetries: bool = option(True, "the eight symmetries of the square; nadir images have no up")
    crop_min: float = option(1.0, "smallest side of a resized crop as a share of the tile, above 0; 1: no crops")
    gsd_jitter: float = option(0.0, "crops differ further in GSD, by up to a factor 2^jitter either way")

    def __post_init__(self) -> None:
        if not 0 < self.crop_min <= 1:
            raise ConfigError("augment.crop_min is out of range", seen=self.crop_min, rule="above 0, at most 1")
        not_negative(augment__gsd_jitter=self.gsd_jitter)


@dataclass(kw_only=True)
class TrainOptions:
    """Optimisation. Lengths are in samples (tiles seen, over all ranks)."""

    samples: int = option(1_000_000, "training samples to see; rounded down to whole batches")
    batch_size: int = option(256, "samples a step over all ranks")
    micro_batch: int | None = option(None, "samples a rank computes at once; null: batch_size / ranks, no accumulation")
    base_lr: float = option(1e-3, "peak learning rate at batch 256; scaled by batch_size / 256")
    min_lr: float = option(0.0, "learning rate at the end of the cosine")
    warmup_samples: int = option(50_000, "samples of linear warm-up")
    weight_decay: float = option(0.05, "AdamW decay; biases and one-dimensional weights have none")
    beta1: float = option(0.9, "AdamW beta 1")
    beta2: float = option(0.95, "AdamW beta 2")
    clip_grad: float = option(1.0, "largest gradient norm; 0 turns clipping off")
    precision: str = option("bf16", "bf16 or fp16 (both with fp32 master weights) or fp32")
    on_nonfinite: str = option(
        "skip", "a loss or gradient that is no number: skip the step, reload the last good, stop"
    )
    nonfinite_budget: int = option(3, "steps of a run that may be left out for it before the run stops")
    log_every: int = option(20, "steps between two train lines in metrics.jsonl")

    def __post_init__(self) -> None:
        one_of("train.precision", self.precision, PRECISIONS)
        one_of("train.on_nonfinite", self.on_nonfinite, ON_NONFINITE)
        positive(
            train__samples=self.samples,
            train__batch_size=self.batch_size,
            train__base_lr=self.base_lr,
            train__log_every=self.log_every,
        )
        not_negative(train__nonfinite_budget=self.nonfinite_budget)
        if self.micro_batch is not None:
            positive(train__micro_batch=self.micro_batch)
        if self.samples < self.batch_size:
            raise ConfigError(
                "the run is shorter than one step",
                seen=f"train.samples={self.samples}, train.batch_size={self.batch_size}",
                rule="train.samples is at least train.batch_size",
            )


@dataclass(kw_only=True)
class ValidationOptions:
    """Fixed-mask validation: the loss is a function of the weights alone."""

    every: int = option(100_000, "samples between two checkpoints, each with a validation")
    samples: int = option(5_000, "tiles of each corpus's validation split used; a fixed, seeded subset")
    batch_size: int = option(64, "tiles a forward pass; whole batches are dealt to the ranks")
    seed: int = option(20260101, "seed of the fixed masks; change it and losses are no longer comparable")

    def __post_init__(self) -> None:
        positive(validation__every=self.every, validation__samples=self.samples, validation__batch_size=self.batch_size)


@dataclass(kw_only=True)
class CheckpointOptions:
    """What is kept, for selection and for resuming."""

    resume_every: int | None = option(
        None, "samples between two states for resuming that are kept until the next; null: at checkpoints only"
    )
    keep_engine: int = option(1, "newest checkpoints that keep the optimizer's state; all keep their weights")
    upload: str | None = option(
        None, "folder or URL (s3://, ...) that gets a copy of each checkpoint, in the background"
    )
    upload_engine: bool = option(True, "copy the optimizer's state too, so that the run can go on from the copy")

    def __post_init__(self) -> None:
        positive(checkpoint__keep_engine=self.keep_engine)
        if self.resume_every is not None:
            positive(checkpoint__resume_every=self.resume_every)


@dataclass(kw_only=True)
class TelemetryOptions:
    """What a run tells beside losses."""

    reconstructions: int = option(8, "validation tiles whose reconstructions go to TensorBoard; 0: none")
    peak_tflops: float | None = option(None, "peak of one device in TFLOP/s for the MFU; null: known for common GPUs")
    probe: str | None = option(None, "labelled classification folder (ImageFolder) for a kNN probe at each validation")
    probe_neighbours: int = option(20, "neighbours of the probe")

    def __post_init__(self) -> None:
        not_negative(telemetry__reconstructions=self.reconstructions)
        positive(telemetry__probe_neighbours=self.probe_neighbours)


@dataclass(kw_only=True)
class PretrainConfig:
    """One pretraining job: one RUN folder."""

    out: str = option(help="RUN folder to make or to continue")
    resume: str = option("auto", "auto (continue when there is something to continue), never (refuse) or must")
    base: str | None = option(None, "weights every sensor starts from (encoder and decoder); null: random, from seed")
    seed: int = option(0, "seed of initial weights, sample order, augmentation and training masks")
    ranks: int | None = option(
        None, "processes over all nodes (gloo on the CPU, NCCL on GPUs); null: the launcher's or 1"
    )
    deepspeed: str | None = option(None, "DeepSpeed JSON, see configs/deepspeed; null: ZeRO stage 0")
    timeout_s: float = option(1800.0, "seconds without progress of a rank after which the run names it and stops")
    licence: str | None = option(None, "SPDX identifier for the weights' card; null: the base's, without one CC-BY-4.0")
    data: DataOptions = option(DataOptions)
    model: ModelOptions = option(ModelOptions)
    loss: LossOptions = option(LossOptions)
    augment: AugmentOptions = option(AugmentOptions)
    train: TrainOptions = option(TrainOptions)
    validation: ValidationOptions = option(ValidationOptions)
    checkpoint: CheckpointOptions = option(CheckpointOptions)
    telemetry: TelemetryOptions = option(TelemetryOptions)

    def __post_init__(self) -> None:
        one_of("resume", self.resume, RESUMES)
        positive(ranks=self.world, timeout_s=self.timeout_s)
        if not self.data.corpora:
            raise ConfigError(
                "no corpus is given", seen="data.corpora=[]", rule="at least one", fix="add data.corpora=[my/corpus]"
            )
        batch, micro = self.train.batch_size, self.micro_batch
        if batch % self.world or batch % (self.world * micro):
            raise ConfigError(
                "the batch cannot be dealt evenly",
                seen=f"train.batch_size={batch}, ranks={self.world}, train.micro_batch={self.train.micro_batch}",
                rule="batch_size is a multiple of ranks times micro_batch",
                fix=f"for example train.batch_size={_next_multiple(batch, self.world * (self.train.micro_batch or 1))}",
            )

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.ranks if self.ranks is not None else 1

    @property
    def micro_batch(self) -> int:
        """Samples a rank computes at once."""
        return self.train.micro_batch or max(1, self.train.batch_size // self.world)

    @property
    def accumulation(self) -> int:
        """Micro-batches of a rank in one step."""
        return self.train.batch_size // (self.world * self.micro_batch)


def not_negative(**values: float) -> None:
    """Raises ConfigError when a value is below 0; `__` in a name stands for a dot."""
    for key, value in values.items():
        if not value >= 0:
            raise ConfigError(f"{key.replace('__', '.')} is out of range", seen=value, rule="0 or more")


def _next_multiple(number: int, unit: int) -> int:
    return -(-number // unit) * unit
