"""Configuration of one pretraining job."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import one_of, option, positive
from ..errors import ConfigError
from ..models import SIZES
from ..normalise import POLICIES

PRECISIONS = ("bf16", "fp32")


@dataclass(kw_only=True)
class DataOptions:
    """Which tiles are read and how."""

    corpora: list[str] = option([], "corpus folders; several make a joint run")
    normalisation: str = option("per_tile_zscore", f"one of {', '.join(POLICIES)}")
    workers: int = option(0, "reading processes a rank; 0 reads in the training process")
    cache_mb: int = option(512, "memory a reading process may use to keep a corpus decoded; larger ones are read anew")
    verify: bool = option(True, "compare every shard's sha256 before the start")

    def __post_init__(self) -> None:
        one_of("data.normalisation", self.normalisation, POLICIES)
        for key, value in (("data.workers", self.workers), ("data.cache_mb", self.cache_mb)):
            if value < 0:
                raise ConfigError(f"{key} is out of range", seen=value, rule="0 or more")
        if len(set(self.corpora)) != len(self.corpora):
            raise ConfigError("a corpus is named twice", seen=", ".join(self.corpora), rule="each corpus once")


@dataclass(kw_only=True)
class ModelOptions:
    """Shapes; each null is taken from the base or, without a base, from the default named."""

    size: str | None = option(None, f"one of {', '.join(SIZES)}; without a base: base")
    image_size: int | None = option(None, "input side in pixels; it is the tile size of the corpora")
    patch_size: int | None = option(None, "patch side in pixels; without a base: 16")
    in_chans: int | None = option(None, "1 (native grey) or 3 (grey repeated); without a base: 1")
    mask_ratio: float = option(0.75, "share of patches hidden, above 0 and below 1")
    norm_pix_loss: bool = option(False, "score each patch after standardising it")

    def __post_init__(self) -> None:
        if self.size is not None:
            one_of("model.size", self.size, list(SIZES))
        if not 0 < self.mask_ratio < 1:
            raise ConfigError("model.mask_ratio is out of range", seen=self.mask_ratio, rule="above 0 and below 1")


@dataclass(kw_only=True)
class TrainOptions:
    """Optimisation. Lengths are in samples (tiles seen, over all ranks)."""

    samples: int = option(1_000_000, "training samples to see; rounded down to whole batches")
    batch_size: int = option(256, "samples a step over all ranks")
    base_lr: float = option(1e-3, "peak learning rate at batch 256; scaled by batch_size / 256")
    min_lr: float = option(0.0, "learning rate at the end of the cosine")
    warmup_samples: int = option(50_000, "samples of linear warm-up")
    weight_decay: float = option(0.05, "AdamW decay; biases and one-dimensional weights have none")
    beta1: float = option(0.9, "AdamW beta 1")
    beta2: float = option(0.95, "AdamW beta 2")
    clip_grad: float = option(1.0, "largest gradient norm; 0 turns clipping off")
    precision: str = option("bf16", "bf16 (autocast, fp32 master weights) or fp32")
    augment: bool = option(True, "the eight symmetries of the square")
    log_every: int = option(20, "steps between two train lines in metrics.jsonl")

    def __post_init__(self) -> None:
        one_of("train.precision", self.precision, PRECISIONS)
        positive(
            train__samples=self.samples,
            train__batch_size=self.batch_size,
            train__base_lr=self.base_lr,
            train__log_every=self.log_every,
        )
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
class PretrainConfig:
    """One pretraining job: one RUN folder."""

    out: str = option(help="RUN folder to make or to continue")
    base: str | None = option(None, "weights every sensor starts from (encoder and decoder); null: random, from seed")
    seed: int = option(0, "seed of initial weights, sample order, augmentation and training masks")
    ranks: int = option(1, "processes on this machine (gloo on the CPU, NCCL on GPUs)")
    deepspeed: str | None = option(None, "DeepSpeed JSON, see configs/deepspeed; null: ZeRO stage 0")
    keep_engine: int = option(1, "newest checkpoints that keep the state needed for resuming")
    licence: str = option("CC-BY-4.0", "SPDX identifier for the weights' card")
    data: DataOptions = option(DataOptions)
    model: ModelOptions = option(ModelOptions)
    train: TrainOptions = option(TrainOptions)
    validation: ValidationOptions = option(ValidationOptions)

    def __post_init__(self) -> None:
        positive(ranks=self.ranks, keep_engine=self.keep_engine)
        if not self.data.corpora:
            raise ConfigError(
                "no corpus is given", seen="data.corpora=[]", rule="at least one", fix="add data.corpora=[my/corpus]"
            )
        if self.train.batch_size % self.ranks:
            raise ConfigError(
                "the batch cannot be dealt evenly",
                seen=f"train.batch_size={self.train.batch_size}, ranks={self.ranks}",
                rule="batch_size is a multiple of ranks",
            )
