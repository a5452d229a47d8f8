"""Times EVL selection by one sweep against trying every tuple, on the same curves in one run.

python scripts/bench/evl.py
"""

from __future__ import annotations

import itertools
import random
import time

from momo.merge.selecting.evl import Candidate, early_stop, select_evl, sweep_epsilon


def falling_curves(sensors: int, checkpoints: int, seed: int) -> list[list[Candidate]]:
    """Returns noisy, falling validation curves."""
    rng = random.Random(seed)
    return [
        [Candidate(100_000 * (i + 1), 0.3 + 0.5 / (1 + i) + rng.gauss(0, 0.004)) for i in range(checkpoints)]
        for _ in range(sensors)
    ]


def every_tuple(curves: list[list[Candidate]], epsilon: float) -> float | None:
    """Returns the smallest distance of an agreeing tuple, by trying all of them."""
    stops = [curve[early_stop(curve)].samples for curve in curves]
    best = None
    for points in itertools.product(*curves):
        losses = [point.loss for point in points]
        if max(losses) - min(losses) <= epsilon:
            gap = sum(abs(p.samples - s) for p, s in zip(points, stops, strict=True)) / len(curves)
            best = gap if best is None else min(best, gap)
    return best


def main() -> None:
    """Prints both times and their ratio, then the times of a large case."""
    curves = falling_curves(3, 100, seed=0)
    started = time.perf_counter()
    pick = select_evl(curves, 0.002)
    sweep = time.perf_counter() - started
    started = time.perf_counter()
    expected = every_tuple(curves, 0.002)
    brute = time.perf_counter() - started
    assert expected is not None and abs(expected - pick.distance) < 1e-6, (expected, pick)
    print(f"3 sensors x 100 checkpoints: sweep {sweep * 1e3:.2f} ms, every tuple {brute * 1e3:.0f} ms, "
          f"ratio {brute / sweep:.0f}")  # fmt: skip
    large = falling_curves(5, 2000, seed=1)
    started = time.perf_counter()
    select_evl(large, 0.002)
    print(f"5 sensors x 2,000 checkpoints: sweep {time.perf_counter() - started:.3f} s")
    started = time.perf_counter()
    picks = len(list(sweep_epsilon(large)))
    print(f"the same for every epsilon: {picks} picks, {time.perf_counter() - started:.2f} s")


if __name__ == "__main__":
    main()
