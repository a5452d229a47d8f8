"""What the user sees while products are cut, and after."""

from __future__ import annotations

import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from momo.corpus_format import Manifest
from momo.extras import require

from .pieces import PieceInfo
from .planning import Plan
from .products import Product
from .tables import Ready
from .tiling import Cut

Report = Callable[[str], None]
_EVERY_SECONDS = 30.0
_LINES = 40  # products reported one by one


class Progress:
    """Products done, tiles and megabytes a second, and the time left.

    On a terminal a bar; elsewhere (a log file, a SLURM job) a line at most every 30 seconds.

    Args:
        products: All products; their pixels weigh the time left.
        report: Gets the lines.
    """

    def __init__(self, products: Sequence[Product], report: Report) -> None:
        self._report = report
        self._total = sum(_pixel_bytes(product) for product in products)
        self._count = len(products)
        self._done = self._tiles = self._bytes = self._fresh = 0
        self._started = self._spoke = time.monotonic()
        self._bar = require("tqdm", "prep").tqdm(
            total=self._total, unit="B", unit_scale=True, disable=None if sys.stderr.isatty() else True
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.close()

    def add(self, product: Product, done: Cut) -> None:
        """Counts a product; one that was found finished does not count for the speed."""
        self._done += 1
        self._bytes += _pixel_bytes(product)
        if done.seconds > 0.0:
            self._tiles += done.info.tiles
            self._fresh += _pixel_bytes(product)
        self._bar.set_postfix_str(f"{self._done}/{self._count} products, {self._speed()}", refresh=False)
        self._bar.update(_pixel_bytes(product))
        if self._bar.disable and time.monotonic() - self._spoke >= _EVERY_SECONDS:
            self._spoke = time.monotonic()
            self._report(f"  {self._done}/{self._count} products, {self._speed()}, {self._left()} left")

    def _speed(self) -> str:
        seconds = max(1e-9, time.monotonic() - self._started)
        return f"{self._tiles / seconds:,.0f} tiles/s, {self._fresh / seconds / 1e6:,.0f} MB/s"

    def _left(self) -> str:
        if not self._fresh:
            return "unknown time"
        return duration((self._total - self._bytes) * (time.monotonic() - self._started) / self._fresh)


def _pixel_bytes(product: Product) -> int:
    return product.width * product.height * int(np.dtype(product.dtype).itemsize)


def duration(seconds: float) -> str:
    """Returns a time span as text, such as `3 h 07 min`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    minutes = whole // 60
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def report_products(ready: Sequence[Ready], sensor: str, report: Report) -> None:
    """Prints what became of each product; of many only what there is to note."""
    if len(ready) <= _LINES:
        for item in ready:
            _report_product(item.product, item.info, sensor, report)
        return
    notes = Counter(note for item in ready for note in item.info.notes)
    for note, count in notes.most_common(_LINES):
        report(f"  note on {count} {'product' if count == 1 else 'products'}: {note}")
    if len(notes) > _LINES:
        report(f"  and {len(notes) - _LINES} other notes: see products.parquet")


def _report_product(product: Product, info: PieceInfo, sensor: str, report: Report) -> None:
    gsd = f"{product.gsd_m:.4g} m/px" if math.isfinite(product.gsd_m) else "GSD unknown"
    if product.resampling is not None:
        gsd += f" (resampled from {product.native_gsd_m:.4g}, {product.resampling.kernel})"
    report(
        f"  {product.product_id}: {product.width} x {product.height} {product.dtype}, {sensor}, {gsd}, "
        f"{product.georeference.name}; {info.tiles} of {info.windows} windows good, dropped {_counts(info.dropped)}"
    )
    if product.sensor is None and product.instrument:
        report(f"    note: its label names the instrument {product.instrument!r}, taken as {sensor}")
    if info.max_rounding_error:
        report(f"    note: quantised to 16 bits, largest error {info.max_rounding_error:.3g}")
    for note in info.notes:
        report(f"    note: {note}")


def _counts(counts: Mapping[str, Any]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()) if count) or "none"


def report_drops(plan: Plan, report: Report) -> None:
    """Prints what the decisions about the whole corpus left out."""
    counts = np.bincount(plan.reason_N, minlength=len(plan.reasons))
    dropped = {reason: int(counts[code]) for code, reason in enumerate(plan.reasons) if code and counts[code]}
    report(f"  of {len(plan.split_N)} good tiles left out: {_counts(dropped)}")
    for note in plan.report.get("notes", []):
        report(f"  {note}")


def report_totals(manifest: Manifest, out: Path, products: int, failures: int, seconds: float, report: Report) -> None:
    """Prints the last lines."""
    tiles, size = sum(manifest.splits.values()), sum(shard.bytes for shard in manifest.shards)
    report(
        f"{manifest.sensor}: {tiles} tiles of {manifest.tile_size} px, {manifest.dtype}, {manifest.codec} "
        f"(train {manifest.splits['train']}, val {manifest.splits['val']}) from {products} products, "
        f"{failures} failed; {len(manifest.shards)} shards, {size / 1e6:.1f} MB; {seconds:.1f} s, "
        f"{tiles / max(seconds, 1e-9):.0f} tiles/s -> {out}"
    )
    if manifest.splits["val"] == 0 and manifest.prep["split"]["val_fraction"] > 0:
        report(
            "  WARNING: no validation tile. All tiles lie in one cell, or those of the validation cells were dropped:"
            " make cells smaller (split.order, split.block_tiles), raise split.val_fraction, or take another seed"
        )
    if failures:
        report(f"  {failures} {'product' if failures == 1 else 'products'} FAILED:")
        _report_failures(manifest.failures, report)


def _report_failures(failures: Sequence[dict[str, str]], report: Report) -> None:
    """Lists failed products; of many the first, and how many more have each kind of reason."""
    for item in failures[:_LINES]:
        report(f"    {item['source']}: {item['reason']}")
    kinds = Counter(item["reason"].partition(":")[0] for item in failures[_LINES:])
    for kind, count in kinds.most_common():
        report(f"    and {count} more: {kind} (all in report.json)")
