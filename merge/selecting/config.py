"""Configuration of `momo select`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from momo.config import one_of, option
from momo.errors import ConfigError

RULES = ("evl", "early_stop", "last", "at_samples", "at_loss")
UNITS = ("samples", "steps")
SMOOTHINGS = ("none", "running_min", "isotonic")
STDERRS = ("tiles", "products")
CORRECTIONS = ("bonferroni", "none")
ALLOWED = ("protocol", "count", "fingerprint", "base", "unknown_protocol", "unknown_base", "missing_checkpoint")
"""What `allow` may let through, by name; see `momo.merge.selecting.comparable`."""


@dataclass(kw_only=True)
class SelectConfig:
    """Choosing one checkpoint of each run."""

    runs: Any = option(
        None,
        "two or more RUN folders or CSV/JSON files of (checkpoint, samples, val_loss, val_stderr); a list, one a "
        "sensor, or a mapping {name: place} for several of one sensor",
    )
    out: str = option(help="SELECTION file to write (.yaml); a plot is written beside it (.png)")
    rule: str = option("evl", f"one of {', '.join(RULES)}")
    epsilon: float | int | str | None = option(
        "auto", "largest difference of two losses that count as equal; auto or null: from the standard errors"
    )
    level: float = option(0.95, "confidence level of epsilon=auto, above 0 and below 1")
    correction: str = option(
        "bonferroni", f"one of {', '.join(CORRECTIONS)}: whether `level` holds for all pairs at once"
    )
    stderr: str = option(
        "tiles", "standard errors of epsilon=auto: over tiles, or over products (wider, tiles of one product are alike)"
    )
    epsilon_relative: float = option(
        0.0, "floor of epsilon=auto as a share of the mean early-stopping loss, 0 or more (0.01: 1 %)"
    )
    distance: str = option("samples", "unit of EVL's distance: samples, or steps (positions among the checkpoints)")
    smoothing: str = option("none", f"one of {', '.join(SMOOTHINGS)}: what the rule sees of each curve")
    samples: int | None = option(None, "training samples for rule=at_samples; the nearest checkpoint is taken")
    loss: float | None = option(None, "validation loss for rule=at_loss; the first checkpoint at or below is taken")
    base: str | None = option(None, "base weights; null: the base named in the runs")
    allow: list[str] = option([], f"checks to let through, each noted in the SELECTION: {', '.join(ALLOWED)}")

    def __post_init__(self) -> None:
        _check_runs(self.runs)
        one_of("rule", self.rule, RULES)
        one_of("distance", self.distance, UNITS)
        one_of("smoothing", self.smoothing, SMOOTHINGS)
        one_of("stderr", self.stderr, STDERRS)
        one_of("correction", self.correction, CORRECTIONS)
        for name in self.allow:
            one_of("allow", name, ALLOWED)
        if not self.out.endswith((".yaml", ".yml")):
            raise ConfigError("a selection is a YAML file", seen=self.out, fix="let `out` end in .yaml")
        _check_epsilon(self.epsilon)
        if not 0 < self.level < 1:
            raise ConfigError("level is out of range", seen=self.level, rule="above 0 and below 1", fix="level=0.95")
        if not 0 <= self.epsilon_relative < math.inf:
            raise ConfigError("epsilon_relative is out of range", seen=self.epsilon_relative, rule="0 or more")
        if self.samples is not None and self.samples < 1:
            raise ConfigError("samples is out of range", seen=self.samples, rule="1 or more")
        if self.loss is not None and not math.isfinite(self.loss):
            raise ConfigError("loss is out of range", seen=self.loss, rule="a finite number")
        for key, rule in (("samples", "at_samples"), ("loss", "at_loss")):
            if (getattr(self, key) is None) == (self.rule == rule):
                raise ConfigError(
                    f"{key} belongs to rule={rule}",
                    seen=f"rule={self.rule}, {key}={getattr(self, key)}",
                    rule=f"{key} is given with rule={rule} and with no other rule",
                    fix=f"add {key}=..." if self.rule == rule else f"leave {key} out, or choose rule={rule}",
                )

    @property
    def places(self) -> list[tuple[str | None, str]]:
        """(name or None, place) of each run, in the order given."""
        if isinstance(self.runs, dict):
            return [(str(name), place) for name, place in self.runs.items()]
        return [(None, place) for place in self.runs]

    @property
    def requested_epsilon(self) -> float | None:
        """The user's epsilon; None for one from the standard errors."""
        return None if self.epsilon in (None, "auto") else float(self.epsilon)


def _check_runs(runs: Any) -> None:
    places = list(runs.values()) if isinstance(runs, dict) else runs
    if places is None or places == []:
        places = []
    elif not isinstance(places, list) or not all(isinstance(place, str) and place for place in places):
        raise ConfigError(
            "runs cannot be read",
            seen=runs,
            rule="a list of places or a mapping of names to places",
            fix="write runs=[runs/hirise,runs/ctx] or runs={early: runs/ctx-1, late: runs/ctx-2}",
        )
    if len(places) < 2:
        raise ConfigError(
            "too few runs to select from",
            seen=", ".join(places) or "none",
            rule="two or more",
            fix="add runs=[runs/hirise,runs/ctx,runs/themis]",
        )


def _check_epsilon(epsilon: float | int | str | None) -> None:
    if isinstance(epsilon, str) and epsilon != "auto":
        raise ConfigError("epsilon cannot be read", seen=repr(epsilon), rule="a number of 0 or more, or auto")
    if isinstance(epsilon, (int, float)) and not 0 <= epsilon < math.inf:
        raise ConfigError("epsilon is out of range", seen=epsilon, rule="a finite number of 0 or more")
