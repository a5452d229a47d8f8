"""Configuration of the evaluation stage."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from momo.config import one_of, option, positive
from momo.errors import ConfigError

PROTOCOLS: dict[str, tuple[str, ...]] = {"classification": ("knn", "linear"), "segmentation": ("decoder",)}
# Fewer runs give no usable spread; they are allowed for a first look and marked wherever they are shown.
MIN_SEEDS = 3

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]*(_[A-Za-z0-9.+-]+)*")


def _check_name(key: str, name: str) -> None:
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{key} cannot be part of a file name",
            seen=repr(name),
            rule="letters, digits and . + - with single underscores between them",
        )


def _check_unique(key: str, values: list[Any]) -> None:
    twice = sorted({str(value) for value in values if values.count(value) > 1})
    if twice:
        raise ConfigError(f"{key} are not unique", seen=", ".join(twice), rule="each may stand once")
    if not values:
        raise ConfigError(f"{key} are empty", rule="at least one is needed", fix="see configs/eval.yaml")


@dataclass
class DatasetConfig:
    """One labelled dataset in the Mars-Bench folder layout."""

    path: str = option(help="dataset folder, for example data/mb-domars16k")
    name: str | None = option(None, "name in the results; the folder's name when null")
    bands: list[int] | None = option(
        None, "zero-based bands used as grey or as R, G, B (mb-mmls: [2, 1, 0]); needed when there are 2 or more than 4"
    )
    train_subset: str | None = option(
        None, "CSV in the dataset folder whose train rows are used, such as few_shot/5_shot.csv"
    )

    def __post_init__(self) -> None:
        if self.name is not None:
            _check_name("datasets.name", self.name)
        if self.bands is not None and (len(self.bands) not in (1, 3) or min(self.bands) < 0):
            raise ConfigError("datasets.bands is out of range", seen=self.bands, rule="1 or 3 indices of at least 0")


@dataclass
class ModelConfig:
    """One encoder to evaluate: trained weights, or the same architecture untrained."""

    name: str = option(help="name in the results, for example merged")
    weights: str | None = option(None, "weights folder or safetensors file with its card")
    random_init: bool = option(False, "evaluate an untrained encoder, initialised with the run's seed")
    like: str | None = option(
        None, "for random_init: weights whose card gives architecture and normalisation; the first weights when null"
    )

    def __post_init__(self) -> None:
        # A missing name is reported by load_config; OmegaConf passes "???" here only while it still merges.
        _check_name("models.name", self.name)
        if (self.weights is None) != self.random_init:
            raise ConfigError(
                "a model needs weights or random_init",
                seen=f"{self.name}: weights={self.weights}, random_init={self.random_init}",
                rule="exactly one of the two",
            )


@dataclass
class ProtocolsConfig:
    """Which protocols are run for which kind of task."""

    classification: list[str] = option(["knn", "linear"], "any of knn, linear")
    segmentation: list[str] = option(["decoder"], "any of decoder")

    def __post_init__(self) -> None:
        for task, known in PROTOCOLS.items():
            chosen = getattr(self, task)
            for name in chosen:
                one_of(f"protocols.{task}", name, known)
            _check_unique(f"protocols.{task}", chosen)


@dataclass
class KnnConfig:
    """k nearest neighbours on frozen features."""

    k: int = option(5, "neighbours that vote, at least 1")
    metric: str = option("cosine", "cosine (features scaled to unit length) or l2 (Euclidean)")

    def __post_init__(self) -> None:
        positive(knn__k=self.k)
        one_of("knn.metric", self.metric, ("cosine", "l2"))


@dataclass
class LinearConfig:
    """Logistic regression on frozen features, standardised with the training features' mean and deviation."""

    c_grid: list[float] = option(
        [0.001, 0.01, 0.1, 1.0, 10.0, 100.0], "inverse L2 strengths C; the best on the validation split is tested"
    )
    max_iter: int = option(500, "L-BFGS iterations at most")

    def __post_init__(self) -> None:
        _check_unique("linear.c_grid", self.c_grid)
        positive(linear__c_grid=min(self.c_grid), linear__max_iter=self.max_iter)


@dataclass
class DecoderConfig:
    """A small convolutional decoder on the encoder's patch tokens, for segmentation."""

    steps: int = option(250, "optimizer steps for each learning rate of the grid")
    batch_size: int = option(8, "images a step")
    lr_grid: list[float] = option(
        [0.001, 0.004], "AdamW peak learning rates; the best on the validation split is tested"
    )
    weight_decay: float = option(0.05, "AdamW weight decay, at least 0")
    width: int = option(64, "channels of the decoder")
    depths: int = option(4, "encoder blocks whose tokens are read, evenly spaced, the last one among them")
    validations: int = option(5, "evenly spaced looks at the validation split; the best look's weights are tested")
    freeze_encoder: bool = option(True, "train the decoder alone; false trains the encoder too")
    encoder_lr_scale: float = option(0.1, "encoder learning rate over the decoder's, when not frozen")
    cache_gb: float = option(2.0, "memory for frozen tokens in GiB; a larger dataset is encoded anew at each step")

    def __post_init__(self) -> None:
        _check_unique("decoder.lr_grid", self.lr_grid)
        positive(
            decoder__steps=self.steps,
            decoder__batch_size=self.batch_size,
            decoder__lr_grid=min(self.lr_grid),
            decoder__width=self.width,
            decoder__depths=self.depths,
            decoder__validations=self.validations,
            decoder__encoder_lr_scale=self.encoder_lr_scale,
        )
        if self.weight_decay < 0 or self.cache_gb < 0:
            raise ConfigError(
                "a decoder option is out of range",
                seen=f"weight_decay={self.weight_decay}, cache_gb={self.cache_gb}",
                rule="both are at least 0",
            )


@dataclass
class EvalConfig:
    """Everything the evaluation stage needs."""

    datasets: list[DatasetConfig] = option(help="labelled datasets")
    models: list[ModelConfig] = option(help="encoders to compare")
    out: str = option(help="RESULTS folder; runs that are there already are kept and not repeated")
    protocols: ProtocolsConfig = option(ProtocolsConfig)
    seeds: list[int] = option([0, 1, 2], "one run each; fewer than 3 are marked wherever the numbers are shown")
    train_draw: float = option(0.8, "share of the training images each seed draws, stratified, in (0, 1]")
    fraction: float = option(1.0, "label budget in (0, 1]; multiplies train_draw")
    image_size: int | None = option(None, "resize every image to this side in pixels; null keeps the native size")
    pooling: str = option("mean", "image feature: mean of the patch tokens, or cls")
    batch_size: int = option(64, "images a forward pass when encoding")
    bootstrap_draws: int = option(1000, "resamples of the test images for the 95 % intervals")
    saved_masks: int = option(64, "test images, and for segmentation predicted masks, kept for pictures; evenly spaced")
    device: str = option("auto", "auto, cpu or cuda")
    knn: KnnConfig = option(KnnConfig)
    linear: LinearConfig = option(LinearConfig)
    decoder: DecoderConfig = option(DecoderConfig)

    def __post_init__(self) -> None:
        _check_unique("datasets", [dataset.path for dataset in self.datasets])
        _check_unique("models", [model.name for model in self.models])
        _check_unique("seeds", self.seeds)
        one_of("pooling", self.pooling, ("mean", "cls"))
        one_of("device", self.device, ("auto", "cpu", "cuda"))
        positive(batch_size=self.batch_size, bootstrap_draws=self.bootstrap_draws)
        for key, share in (("train_draw", self.train_draw), ("fraction", self.fraction)):
            if not 0 < share <= 1:
                raise ConfigError(f"{key} is out of range", seen=share, rule="above 0 and at most 1")
        if self.image_size is not None:
            positive(image_size=self.image_size)
        if min(self.seeds) < 0 or self.saved_masks < 0:
            raise ConfigError(
                "seeds or saved_masks is out of range",
                seen=f"seeds={self.seeds}, saved_masks={self.saved_masks}",
                rule="at least 0",
            )
