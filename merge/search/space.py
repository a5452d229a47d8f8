"""What a search may choose: methods and coefficients, and how they stand in the configuration of a merge."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..methods.registry import METHODS

REFERENCE = "task_arithmetic"
COEFFICIENT, LAYERS = "coefficient", "layers."
LAYER_LOW, LAYER_HIGH = 0.5, 1.5  # range of the factors of depth groups, relative to the first group
_DIGITS = 4  # coefficients are rounded so that the file shows what was scored
_BLOCK = re.compile(r"^blocks\.(\d+)\.")
_DECODER = ("decoder*", "mask_token")


@dataclass(frozen=True)
class Point:
    """One merge of a search.

    Attributes:
        method: Merge method.
        values: Coefficients: `coefficient` for all checkpoints, or a checkpoint's name, or `layers.GROUP`; empty for
            a method without any.
        label: `0.5` and `average` for the two merges to beat, else empty.
    """

    method: str
    values: Mapping[str, float] = field(default_factory=dict)
    label: str = ""


@dataclass(frozen=True)
class Space:
    """The merges among which a search chooses.

    Attributes:
        methods: Methods in the order given.
        per: `shared`, `sensor` or `layer_group`.
        parents: Names of the checkpoints.
        low: Smallest coefficient.
        high: Largest coefficient.
        groups: Depth group to its globs of tensor names, without the first group: its factor is 1, or coefficients
            and factors would say the same twice.
    """

    methods: tuple[str, ...]
    per: str
    parents: tuple[str, ...]
    low: float
    high: float
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def searched(self) -> tuple[str, ...]:
        """Methods whose result depends on the coefficients."""
        return tuple(name for name in self.methods if self._is_searched(name))

    @property
    def fixed(self) -> tuple[Point, ...]:
        """Methods scored once: those without coefficients, and averages when all weights would be equal."""
        return tuple(Point(name) for name in self.methods if not self._is_searched(name))

    @property
    def references(self) -> tuple[Point, Point]:
        """The merges to beat: task arithmetic with MOMO's 0.5, and the plain average, which is 1/n of n checkpoints."""
        share = 1 / len(self.parents)
        return Point(REFERENCE, {COEFFICIENT: 0.5}, "0.5"), Point(REFERENCE, {COEFFICIENT: share}, "average")

    def _is_searched(self, name: str) -> bool:
        method = METHODS[name]
        # Weights of an average count by their ratios alone, so one for all changes nothing.
        return "coefficients" in method.uses and (method.needs_base or self.per != "shared")

    def ranges(self) -> dict[str, tuple[float, float]]:
        """Returns name to range of each number a point of a searched method has."""
        if self.per == "shared":
            return {COEFFICIENT: (self.low, self.high)}
        found = dict.fromkeys(self.parents, (self.low, self.high))
        if self.per == "layer_group":
            found |= dict.fromkeys((LAYERS + group for group in self.groups), (LAYER_LOW, LAYER_HIGH))
        return found

    def suggest(self, trial: Any) -> Point:
        """Lets an Optuna trial choose a point."""
        methods = self.searched
        method = methods[0] if len(methods) == 1 else trial.suggest_categorical("method", list(methods))
        values = {
            name: round(trial.suggest_float(f"{method}/{name}", low, high), _DIGITS)
            for name, (low, high) in self.ranges().items()
        }
        return Point(method, values)

    def parameters(self, point: Point) -> dict[str, Any] | None:
        """Returns what an Optuna trial would have chosen to arrive at a point, or None where it cannot.

        A point with one coefficient lies in a space of many, too: all are equal there and layers do not differ.
        """
        if point.method not in self.searched:
            return None
        common = point.values.get(COEFFICIENT)
        found: dict[str, Any] = {"method": point.method} if len(self.searched) > 1 else {}
        for name, (low, high) in self.ranges().items():
            value = point.values.get(name, 1.0 if name.startswith(LAYERS) else common)
            if value is None or not low <= value <= high:
                return None
            found[f"{point.method}/{name}"] = value
        return found

    def distributions(self, names: Sequence[str], distributions: Any) -> dict[str, Any]:
        """Returns the Optuna distributions of parameters.

        Args:
            names: Keys of `parameters`.
            distributions: Module `optuna.distributions`.
        """
        ranges = self.ranges()
        return {
            name: distributions.CategoricalDistribution(list(self.searched))
            if name == "method"
            else distributions.FloatDistribution(*ranges[name.partition("/")[2]])
            for name in names
        }

    def coefficients(self, point: Point) -> dict[str, Any]:
        """Returns the keys `coefficient`, `coefficients` and `layers` of `MergeConfig` for a point."""
        values = point.values
        layers = {
            glob: values[LAYERS + group]
            for group, globs in self.groups.items()
            if LAYERS + group in values
            for glob in globs
        }
        own = {name: values[name] for name in self.parents if name in values}
        return {"coefficient": values.get(COEFFICIENT), "coefficients": own, "layers": layers}


def depth_groups(names: Sequence[str], groups: int) -> dict[str, tuple[str, ...]]:
    """Cuts a masked autoencoder into groups by depth.

    The blocks of the encoder are shared out evenly; what comes before them belongs to the first group, the last norm
    to the last. The decoder, which is not released, is a group of its own.

    Args:
        names: Tensors of the merge.
        groups: Groups of the encoder at most; never more than it has blocks.

    Returns:
        Group to globs of tensor names, without the first group (see `Space.groups`).
    """
    blocks = sorted({int(match[1]) for name in names if (match := _BLOCK.match(name))})
    count = min(groups, len(blocks))
    found: dict[str, tuple[str, ...]] = {}
    for group in range(1, count):
        own = [number for place, number in enumerate(blocks) if place * count // len(blocks) == group]
        globs = [f"blocks.{number}.*" for number in own]
        if group == count - 1 and "norm.weight" in names:
            globs.append("norm.*")
        found[f"blocks_{own[0]}_to_{own[-1]}"] = tuple(globs)
    if any(name.startswith("decoder") for name in names):
        found["decoder"] = tuple(glob for glob in _DECODER if glob != "mask_token" or glob in names)
    return found
