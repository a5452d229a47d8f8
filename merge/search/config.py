"""Configuration of the search for merge coefficients."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from momo.config import one_of, option, positive
from momo.errors import ConfigError

from ..config import MergeConfig
from ..methods.registry import METHODS

PER = ("shared", "sensor", "layer_group")
OBJECTIVES = ("mean", "worst")
SOURCE_KEYS = ("selection", "base", "checkpoints", "models")
PASSED = ("scope", "include", "exclude", "rest", "density", "outliers", "trim", "seed", "fisher", "precision", "dtype")
_USED_BY = ("density", "fisher")  # options that momo merge takes with some methods only
_LEAST_TRIALS = 3


@dataclass(kw_only=True)
class SearchConfig:
    """Searching the coefficients of a merge by validation losses."""

    out: str = option(help="YAML file for momo merge (.yaml); trials, report and plot are written beside it")
    corpora: list[str] = option([], "corpora the checkpoints were trained on, one a sensor; their val split is used")
    selection: str | None = option(None, "SELECTION file; gives base and checkpoints")
    base: str | None = option(None, "base weights, when there is no selection")
    checkpoints: list[str] = option([], "weights to merge, when there is no selection")
    models: dict[str, str] = option({}, "the same with names of your own: {name: place}")
    methods: list[str] = option(["task_arithmetic"], f"methods to choose from: {', '.join(METHODS)}")
    per: str = option("shared", f"what has a coefficient of its own, one of {', '.join(PER)}")
    groups: int = option(3, "depth groups of the encoder (per=layer_group); the decoder is one more")
    low: float = option(0.0, "smallest coefficient")
    high: float = option(1.5, "largest coefficient")
    objective: str = option("mean", f"what is made small, over sensors, one of {', '.join(OBJECTIVES)}")
    relative: bool = option(False, "divide each sensor's loss by that of its own checkpoint")
    trials: int = option(40, "merges to score, the two to beat included")
    minutes: float | None = option(None, "no trial starts after so many minutes but the two to beat; null: no limit")
    samples: int = option(2000, "validation tiles of each corpus at most; half for the search, half for its result")
    validation_seed: int | None = option(None, "seed of validation subset and masks; null: validation's default")
    batch_size: int = option(64, "tiles a forward pass")
    seed: int = option(0, "seed of the optimiser and of the halves")
    allow: list[str] = option([], "sensors whose corpus may be another than a checkpoint's, or missing")
    options: dict[str, Any] = option({}, f"other keys of momo merge, the same in every trial: {', '.join(PASSED)}")
    lpips_backbone: str | None = option(None, "AlexNet weights, for checkpoints whose loss has an LPIPS term")

    def __post_init__(self) -> None:
        one_of("per", self.per, PER)
        one_of("objective", self.objective, OBJECTIVES)
        positive(groups=self.groups, samples=self.samples, batch_size=self.batch_size)
        if self.minutes is not None:
            positive(minutes=self.minutes)
        if self.trials < _LEAST_TRIALS:
            raise ConfigError(
                "too few trials",
                seen=self.trials,
                rule=f"{_LEAST_TRIALS} or more: the first two are 0.5 and the average",
            )
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ConfigError(
                "the range of coefficients is empty", seen=f"{self.low} to {self.high}", rule="low < high"
            )
        if not self.out.endswith((".yaml", ".yml")):
            raise ConfigError("the result of a search is a YAML file", seen=self.out, fix="let `out` end in .yaml")
        if not self.corpora:
            fix = "add corpora=[corpora/hirise,corpora/ctx,corpora/themis]"
            raise ConfigError("no corpus is given", seen="corpora=[]", rule="one a sensor", fix=fix)
        _check_methods(self.methods)
        _check_options(self)
        for method in self.methods:
            self.merge_config(method)

    def merge_config(self, method: str, **coefficients: Any) -> MergeConfig:
        """Returns the merge of a trial.

        Raises:
            ConfigError: Weights or options do not make a merge.
        """
        return MergeConfig(**self.merge_keys(method, **coefficients), dry_run=True)

    def merge_keys(self, method: str, **coefficients: Any) -> dict[str, Any]:
        """Returns the same as keys of `MergeConfig`, those with a value alone."""
        sources = {key: getattr(self, key) for key in SOURCE_KEYS if getattr(self, key)}
        uses = METHODS[method].uses
        options = {key: value for key, value in self.options.items() if key not in _USED_BY or key in uses}
        given = {key: value for key, value in coefficients.items() if value not in (None, {}, [])}
        return {**sources, "method": method, **options, **given}


def _check_methods(methods: list[str]) -> None:
    if not methods or len(set(methods)) < len(methods):
        raise ConfigError("methods cannot be used", seen=methods, rule="one or more, each once")
    for method in methods:
        one_of("methods", method, list(METHODS))


def _check_options(config: SearchConfig) -> None:
    known = {field.name for field in dataclasses.fields(MergeConfig)}
    for key in config.options:
        if key in known and key not in PASSED:
            raise ConfigError(
                "an option of the merge is not the search's to pass on",
                seen=f"options.{key}",
                rule=f"options are {', '.join(PASSED)}",
                fix="coefficients are searched; weights are given as selection, or base and checkpoints",
            )
        one_of("options", key, PASSED)
    for key in _USED_BY:
        if key in config.options and not any(key in METHODS[method].uses for method in config.methods):
            users = ", ".join(name for name, method in METHODS.items() if key in method.uses)
            raise ConfigError(f"no method takes {key}", seen=", ".join(config.methods), rule=f"{key} is for {users}")
    if config.selection is None and config.base is None:
        raise ConfigError(
            "the base is missing",
            seen="base=null",
            rule="task arithmetic with 0.5 and with 1/n is what a search is compared with",
            fix="add base=weights/base, or selection=selection.yaml",
        )
