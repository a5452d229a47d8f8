"""Configuration of merging."""

from __future__ import annotations

import math
from dataclasses import dataclass

from momo.config import one_of, option
from momo.errors import ConfigError

from .methods.registry import METHODS, Method

SCOPES = ("all", "encoder", "decoder")
TRIMS = ("model", "tensor")
PRECISIONS = ("fp32", "fp64")
DTYPES = ("keep", "float32", "bfloat16", "float16")
DROP = "drop"


@dataclass(kw_only=True)
class MergeConfig:
    """Merging checkpoints into one weights folder."""

    out: str = option("", "WEIGHTS folder to make")
    selection: str | None = option(None, "SELECTION file; gives base and checkpoints")
    base: str | None = option(None, "base weights, when there is no selection; averages need none")
    checkpoints: list[str] = option(
        [], "weights to merge, when there is no selection: folders, safetensors files, timm:NAME"
    )
    models: dict[str, str] = option({}, "the same with names of your own: {name: place}")
    method: str = option("task_arithmetic", f"one of {', '.join(METHODS)}")
    coefficient: float | None = option(
        None, "factor of every checkpoint; null: the method's own, MOMO's 0.5 for task arithmetic"
    )
    coefficients: dict[str, float] = option({}, "factor by checkpoint, {sensor or name: factor}; for averages weights")
    layers: dict[str, float] = option(
        {}, "factor by layer, {glob of tensor names: factor}; multiplies; the last match counts"
    )
    ramp: list[float] = option([], "[first, last]: factors that go linearly with depth; multiplies")
    scope: str = option("all", f"part that is merged, one of {', '.join(SCOPES)}")
    include: list[str] = option([], "globs of tensor names to merge; empty: all")
    exclude: list[str] = option([], "globs of tensor names not to merge")
    rest: str = option("base", "where tensors that are not merged come from: base, a checkpoint's name, or drop")
    density: float | None = option(None, "share of entries kept (ties, dare, breadcrumbs); null: the method's own")
    outliers: float = option(0.01, "share of largest entries dropped (breadcrumbs)")
    trim: str = option("model", f"what `density` is a share of in ties, one of {', '.join(TRIMS)}")
    seed: int = option(0, "seed of the random masks (dare)")
    fisher: dict[str, str] = option({}, "files of momo merge fisher, {checkpoint's name: file} (fisher)")
    precision: str = option("fp32", f"of the sums, one of {', '.join(PRECISIONS)}")
    dtype: str = option("keep", f"of the merged tensors, one of {', '.join(DTYPES)}")
    verify: bool = option(False, "hash every parent and compare with its card first (about 0.6 s a GB)")
    overwrite: bool = option(False, "take the place of an existing `out` once the new one is complete")
    dry_run: bool = option(False, "print plan, memory and size, and write nothing")

    def __post_init__(self) -> None:
        one_of("method", self.method, list(METHODS))
        one_of("scope", self.scope, SCOPES)
        one_of("trim", self.trim, TRIMS)
        one_of("precision", self.precision, PRECISIONS)
        one_of("dtype", self.dtype, DTYPES)
        _check_sources(self)
        _check_numbers(self)
        _check_options(self, METHODS[self.method])

    @property
    def used_density(self) -> float:
        """Share of entries kept: the one given, or the method's own."""
        own = METHODS[self.method].default_density
        return self.density if self.density is not None else (1.0 if own is None else own)


def _check_sources(config: MergeConfig) -> None:
    by_hand = config.base is not None or bool(config.checkpoints) or bool(config.models)
    if (config.selection is None) == (not by_hand):
        raise ConfigError(
            "what to merge is not clear",
            seen=f"selection={config.selection}, base={config.base}, checkpoints={config.checkpoints}, models={config.models}",  # noqa: E501
            rule="give either a selection, or base and checkpoints",
            fix="add selection=selection.yaml",
        )
    if config.checkpoints and config.models:
        raise ConfigError(
            "checkpoints are given twice",
            seen=f"checkpoints={config.checkpoints}, models={config.models}",
            rule="a list, or names with places",
            fix="keep models={name: place, ...}",
        )
    if by_hand and len(config.checkpoints or config.models) < 2:
        raise ConfigError(
            "too little to merge",
            seen=f"{len(config.checkpoints or config.models)} checkpoint(s)",
            rule="two or more checkpoints",
            fix="add checkpoints=[runs/hirise/checkpoints/...,runs/ctx/checkpoints/...]",
        )
    if by_hand and config.base is None and METHODS[config.method].needs_base:
        raise ConfigError(
            "the base is missing",
            seen=f"method={config.method}",
            rule="task vectors are differences from the weights all checkpoints started from",
            fix="add base=weights/base, or merge with method=average",
        )
    if not config.out and not config.dry_run:
        raise ConfigError("a required key has no value", seen="out", fix="add out=weights/merged, or dry_run=true")


def _check_numbers(config: MergeConfig) -> None:
    factors = {"coefficient": config.coefficient, "outliers": config.outliers, "density": config.density}
    factors |= {f"coefficients.{name}": value for name, value in config.coefficients.items()}
    factors |= {f"layers.{name}": value for name, value in config.layers.items()}
    factors |= {f"ramp[{place}]": value for place, value in enumerate(config.ramp)}
    for key, value in factors.items():
        if value is not None and not math.isfinite(value):
            raise ConfigError(f"{key} is no number", seen=value, rule="a finite number")
    if config.density is not None and not 0 < config.density <= 1:
        raise ConfigError("density is out of range", seen=config.density, rule="above 0, up to 1")
    if not 0 <= config.outliers < 1:
        raise ConfigError("outliers is out of range", seen=config.outliers, rule="0 or more, below 1")
    if config.ramp and len(config.ramp) != 2:
        raise ConfigError("ramp cannot be read", seen=config.ramp, rule="two factors, of the first and the last block")
    if config.ramp and config.layers:
        raise ConfigError(
            "both ramp and layers are given", seen=f"{config.ramp}, {config.layers}", rule="one of the two"
        )


def _check_options(config: MergeConfig, method: Method) -> None:
    given = {
        "coefficients": config.coefficient is not None or bool(config.coefficients or config.layers or config.ramp),
        "density": config.density is not None,
        "fisher": bool(config.fisher),
        "outliers": config.outliers != MergeConfig.outliers,
        "seed": config.seed != MergeConfig.seed,
    }
    for name, is_given in given.items():
        if is_given and name not in method.uses:
            users = ", ".join(known.name for known in METHODS.values() if name in known.uses)
            raise ConfigError(
                f"{config.method} takes no {name}", seen=f"method={config.method}", rule=f"{name} is for {users}"
            )
    if "fisher" in method.uses and not config.fisher:
        raise ConfigError(
            "the Fisher files are missing",
            seen=f"method={config.method}",
            rule="one file a checkpoint",
            fix="make them with momo merge fisher and add fisher={name: file, ...}",
        )
