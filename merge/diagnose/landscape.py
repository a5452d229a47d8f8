"""Loss along lines and on planes between weights: where the points lie, and what was measured there.

A line joins two models, theta(a) = (1 - a) A + a B; its barrier is the largest rise of the loss above the straight
line between the losses of its ends (Frankle et al. 2020, arXiv 1912.05671; Entezari et al. 2022, arXiv 2110.06296).

A plane goes through three models as in Garipov et al. (2018, arXiv 1802.10026, appendix A.1): u = B - A, and v = C - A
made orthogonal to u; a point is A + x u / |u| + y v' / |v'|, so x and y are distances in weight space.

Every point is a sum of models with factors that add to 1 (an affine combination), so weights are put together tensor by
tensor from the files, and all distances come from one matrix of inner products.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from momo.errors import MergeError
from momo.files import sha256_json

from .task_vectors import Array, TensorReader, measure_task_vectors

FROM, TO = -0.25, 1.25
MARGIN = 0.25
# Shares of the largest distance: below these a model lies on the plane, and three models on one line.
_ON_PLANE, _ON_LINE = 1e-4, 1e-6
_DIGITS = 12

Factors = dict[str, float]
"""Model name to its factor; the factors add to 1."""


def line_positions(points: int) -> list[float]:
    """Returns positions along a line, evenly from -0.25 to 1.25; both ends, 0 and 1, are always among them."""
    evenly = np.linspace(FROM, TO, points).round(_DIGITS).tolist()
    return sorted({*evenly, 0.0, 1.0})


def line_factors(first: str, second: str, position: float) -> Factors:
    """Returns (1 - a) A + a B as factors."""
    return _tidy({first: 1 - position, second: position})


def _tidy(factors: Mapping[str, float]) -> Factors:
    """Rounds factors, so that a point has one name on every machine, and leaves out those that are 0."""
    rounded = {name: round(value, _DIGITS) for name, value in factors.items()}
    return {name: value for name, value in rounded.items() if value != 0}


@dataclass(frozen=True)
class Mark:
    """A model shown on a plane.

    Attributes:
        name: Its name.
        x: Of its projection, in the units of the weights.
        y: Of its projection.
        distance: From the model to the plane, 0 or more.
        on_plane: Whether that distance is nothing but rounding.
    """

    name: str
    x: float
    y: float
    distance: float
    on_plane: bool


@dataclass(frozen=True)
class Plane:
    """The plane through three models.

    Attributes:
        corners: The models A, B and C.
        u: |B - A|.
        slope: <C - A, u> / |u|^2, how far along u the third model lies.
        v: |v'|, the distance of C from the line through A and B.
        marks: Every model, the corners first.
    """

    corners: tuple[str, str, str]
    u: float
    slope: float
    v: float
    marks: list[Mark]

    def factors(self, x: float, y: float) -> Factors:
        """Returns the point (x, y) as factors of the corners."""
        third = y / self.v
        second = x / self.u - third * self.slope
        return _tidy(dict(zip(self.corners, (1 - second - third, second, third), strict=True)))

    def axes(self, grid: int) -> tuple[list[float], list[float]]:
        """Returns the x and y of a grid that holds every mark with a margin, `grid` points a side."""
        sides = []
        for values in ([mark.x for mark in self.marks], [mark.y for mark in self.marks]):
            low, high = min(values), max(values)
            room = MARGIN * (high - low)
            sides.append(np.linspace(low - room, high + room, grid).tolist())
        return sides[0], sides[1]


def inner_products(
    models: Mapping[str, TensorReader],
    origin: str,
    names: Sequence[str] | None = None,
    advance: Callable[[int], object] | None = None,
) -> Array:
    """Computes <m - origin, n - origin> of every two models, shape (M, M), streamed in float64.

    Raises:
        MergeError: A tensor has another shape, or a weight is NaN or infinite.
    """
    overall = measure_task_vectors(models[origin], models, names, advance).overall
    norm_M = np.array(overall.norm)
    cosine_MM = np.array([[0.0 if value is None else value for value in row] for row in overall.cosine])
    found: Array = cosine_MM * np.outer(norm_M, norm_M)
    return found


def plane_through(corners: Sequence[str], names: Sequence[str], gram_MM: npt.NDArray[np.float64]) -> Plane:
    """Lays a plane through three models and projects every model on it.

    Args:
        corners: A, B and C.
        names: Every model, in the order of `gram_MM`.
        gram_MM: `inner_products` with A as origin.

    Raises:
        MergeError: The corners are not three different models, or lie on one line.
    """
    if len(corners) != 3 or len(set(corners)) != 3:
        raise MergeError("a plane goes through three models", seen=", ".join(corners), rule="three different ones")
    first, second, third = (list(names).index(corner) for corner in corners)
    inner = gram_MM.tolist()
    u, across = math.sqrt(inner[second][second]), math.sqrt(inner[third][third])
    slope = inner[second][third] / u**2 if u else 0.0
    v = math.sqrt(max(0.0, inner[third][third] - slope**2 * u**2))
    if min(u, v) <= _ON_LINE * max(u, across):
        raise MergeError(
            "the three models of the plane lie on one line",
            seen=f"{', '.join(corners)}: sides {u:.3g} and {across:.3g}, height {v:.3g}",
            rule="three models span a plane only when none is a mix of the other two",
            fix="name three others by plane=[A,B,C], or leave the plane out by grid=0",
        )
    marks = []
    for number in sorted(range(len(names)), key=lambda n: (n not in (first, second, third), n)):
        x = inner[number][second] / u
        y = (inner[number][third] - slope * inner[number][second]) / v
        distance = math.sqrt(max(0.0, inner[number][number] - x**2 - y**2))
        corner = names[number] in corners
        on_plane = corner or distance <= _ON_PLANE * max(u, across)
        marks.append(Mark(names[number], x, y, 0.0 if corner else distance, on_plane))
    return Plane((corners[0], corners[1], corners[2]), u, slope, v, marks)


def combine(
    models: Mapping[str, TensorReader], factors: Factors, names: Sequence[str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the tensors of an affine combination, float32, summed in float64 in the order of the factors' names.

    A combination of one model alone gives its very values. Tensors that are not floating-point are the first model's.

    Raises:
        MergeError: The factors do not add to 1.
    """
    if not math.isclose(sum(factors.values()), 1, abs_tol=1e-9):
        raise MergeError("the factors of a point do not add to 1", seen=factors)
    ordered = sorted(factors)
    for name in names:
        parts = [models[model].tensor(name) for model in ordered]
        if len(parts) == 1 or not parts[0].is_floating_point():
            yield name, parts[0].float() if parts[0].is_floating_point() else parts[0]
            continue
        total = parts[0].double() * factors[ordered[0]]
        for model, part in zip(ordered[1:], parts[1:], strict=True):
            total.add_(part.double(), alpha=factors[model])
        yield name, total.float()


def barrier(positions: Sequence[float], losses: Sequence[float | None]) -> float | None:
    """Returns the largest rise of the loss between the ends above the straight line between the ends' losses.

    Args:
        positions: Ascending, with 0 and 1.
        losses: At each; None where it is not finite.

    Returns:
        0 when the loss nowhere rises above that line, and None when it is not finite at an end or between.
    """
    known = {a: loss for a, loss in zip(positions, losses, strict=True) if 0 <= a <= 1}
    finite = {a: loss for a, loss in known.items() if loss is not None}
    if len(finite) < len(known):
        return None
    return max(loss - ((1 - a) * finite[0.0] + a * finite[1.0]) for a, loss in finite.items())


def lowest(positions: Sequence[float], losses: Sequence[float | None]) -> tuple[float, float] | None:
    """Returns position and value of the lowest loss measured on a line, the first of equals; None where none is."""
    finite = [(loss, a) for a, loss in zip(positions, losses, strict=True) if loss is not None]
    return (min(finite)[1], min(finite)[0]) if finite else None


# --- losses that were measured before -------------------------------------------------------------------------------

Losses = dict[str, Any]
"""Sensor to `loss`, `stderr` and `count`; empty where a loss was not finite."""


class LossCache:
    """Losses of points in a file of JSON lines, each written as soon as it is known.

    What a loss depends on is its key: the hashes of the weights with their factors, and `identity`. So lines of another
    measurement do no harm, and a line that a kill cut off is computed again.

    Args:
        path: The file; it need not exist.
        identity: What the losses depend on beside the weights, see `LossMeter.identity`.
        hashes: SHA-256 of each model.

    Attributes:
        unreadable: Number of lines that were left out.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], hashes: Mapping[str, str]) -> None:
        self.path, self.identity, self.hashes = path, dict(identity), dict(hashes)
        self.unreadable = 0
        self._known: dict[str, Losses] = {}
        self._torn = False
        if path.is_file():
            self._read(path.read_text(encoding="utf-8", errors="replace"))

    def _read(self, text: str) -> None:
        self._torn = bool(text) and not text.endswith("\n")
        for line in text.splitlines():
            try:
                entry = json.loads(line)
                key, losses = entry["key"], entry["losses"]
                if not all({"loss", "stderr", "count"} <= set(own) for own in losses.values()):
                    raise KeyError(key)
                self._known[key] = losses
            except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
                self.unreadable += 1

    def key(self, factors: Factors) -> str:
        """Returns the key of a point; it does not depend on the names of the models."""
        weights = sorted((self.hashes[name], factor) for name, factor in factors.items())
        return sha256_json({"identity": self.identity, "weights": weights})

    def get(self, factors: Factors) -> Losses | None:
        """Returns what is known of a point, or None."""
        return self._known.get(self.key(factors))

    def put(self, factors: Factors, losses: Losses) -> None:
        """Keeps and writes the losses of a point."""
        key = self.key(factors)
        self._known[key] = losses
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as stream:
            start = "\n" if self._torn else ""
            stream.write(start + json.dumps({"key": key, "losses": losses}, allow_nan=False) + "\n")
        self._torn = False


def mean_loss(losses: Losses) -> float | None:
    """Returns the mean over sensors, each counted alike; None where a loss was not finite."""
    return sum(own["loss"] for own in losses.values()) / len(losses) if losses else None
