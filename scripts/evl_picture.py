"""Draws the picture of docs/evl.md: EVL on generated validation curves of three sensors.

python scripts/evl_picture.py docs/images/evl.png
"""

from __future__ import annotations

import math
import random
import sys
from pathlib import Path

from momo.merge.selecting.curves import Curve, Point
from momo.merge.selecting.epsilon import auto_epsilon, epsilon_ranges
from momo.merge.selecting.evl import select_evl
from momo.merge.selecting.plot import plot_selection

# Sensor: (plateau, drop, samples over which the drop falls to 1/e, rise in a million samples after the minimum).
_SHAPES = {"HiRISE": (0.36, 0.42, 0.5e6, 0.0), "CTX": (0.315, 0.50, 0.6e6, 0.012), "THEMIS": (0.33, 0.45, 0.35e6, 0.02)}
_EVERY, _CHECKPOINTS, _STDERR = 100_000, 40, 0.004


def generated_curve(sensor: str, seed: int) -> Curve:
    """Returns a falling curve with noise; two of the sensors start to overfit after two million samples."""
    plateau, drop, scale, rise = _SHAPES[sensor]
    rng = random.Random(seed)
    points = []
    for number in range(1, _CHECKPOINTS + 1):
        samples = number * _EVERY
        late = max(0.0, samples - 2e6) / 1e6
        loss = plateau + drop * math.exp(-samples / scale) + rise * late**2 + rng.gauss(0, 0.6 * _STDERR)
        points.append(Point(Path(f"samples-{samples:09d}"), samples, loss, _STDERR))
    return Curve(sensor, sensor, Path(sensor), tuple(points), tuple(point.loss for point in points))


def main() -> None:
    """Draws to the path given."""
    curves = [generated_curve(sensor, seed) for seed, sensor in enumerate(_SHAPES)]
    epsilon = auto_epsilon(curves).value
    pick = select_evl([curve.candidates() for curve in curves], epsilon)
    plot_selection(curves, pick, "evl", Path(sys.argv[1]), ranges=epsilon_ranges(curves, "samples"))
    for curve, index in zip(curves, pick.indices, strict=True):
        print(f"{curve.name:<8} {curve.points[index].samples:>10,} samples, loss {curve.points[index].loss:.4f}")
    print(f"epsilon {pick.epsilon:.4g}, D {pick.distance:,.0f} samples, feasible {pick.feasible}")


if __name__ == "__main__":
    main()
