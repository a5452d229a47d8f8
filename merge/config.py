"""Configuration of selection and merging."""

from __future__ import annotations

from dataclasses import dataclass

from momo.config import one_of, option
from momo.errors import ConfigError

RULES = ("evl", "early_stop", "last")
METHOD_NAMES = ("task_arithmetic", "average")


@dataclass(kw_only=True)
class SelectConfig:
    """Choosing one checkpoint of each run."""

    runs: list[str] = option([], "RUN folders, one a sensor, two or more")
    out: str = option(help="SELECTION file to write (.yaml); a plot is written beside it (.png)")
    rule: str = option("evl", f"one of {', '.join(RULES)}")
    epsilon: float | None = option(
        None, "largest difference of two losses that count as equal; null: from the standard errors"
    )
    base: str | None = option(None, "base weights; null: the base named in the runs' configurations")

    def __post_init__(self) -> None:
        one_of("rule", self.rule, RULES)
        if len(self.runs) < 2:
            raise ConfigError(
                "too few runs to select from",
                seen=", ".join(self.runs) or "none",
                rule="two or more",
                fix="add runs=[runs/hirise,runs/ctx,runs/themis]",
            )
        if self.epsilon is not None and self.epsilon < 0:
            raise ConfigError("epsilon is out of range", seen=self.epsilon, rule="0 or more")
        if not self.out.endswith((".yaml", ".yml")):
            raise ConfigError("a selection is a YAML file", seen=self.out, fix="let `out` end in .yaml")


@dataclass(kw_only=True)
class MergeConfig:
    """Merging checkpoints into one weights folder."""

    out: str = option(help="WEIGHTS folder to make")
    selection: str | None = option(None, "SELECTION file; gives base and checkpoints")
    base: str | None = option(None, "base weights, when there is no selection")
    checkpoints: list[str] = option([], "checkpoint folders, when there is no selection")
    method: str = option("task_arithmetic", f"one of {', '.join(METHOD_NAMES)}")
    coefficient: float = option(0.5, "factor of the summed task vectors (task_arithmetic); MOMO uses 0.5")

    def __post_init__(self) -> None:
        one_of("method", self.method, METHOD_NAMES)
        by_hand = self.base is not None or bool(self.checkpoints)
        if (self.selection is None) == (not by_hand):
            raise ConfigError(
                "what to merge is not clear",
                seen=f"selection={self.selection}, base={self.base}, checkpoints={self.checkpoints}",
                rule="give either a selection, or base and checkpoints",
                fix="add selection=selection.yaml",
            )
        if by_hand and (self.base is None or len(self.checkpoints) < 2):
            raise ConfigError(
                "too little to merge",
                seen=f"base={self.base}, {len(self.checkpoints)} checkpoint(s)",
                rule="one base and two or more checkpoints",
            )
