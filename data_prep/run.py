"""The prep stage: raw products of one sensor in, one CORPUS out."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from momo.config import to_dict
from momo.corpus import Manifest
from momo.errors import ConfigError, DataError, MomoError
from momo.extras import require
from momo.files import atomic_folder, sha256_file, sha256_json
from momo.sensors import SENSORS

from .config import PrepConfig
from .products import Product, gdal_module, inspect
from .radiometry import Encoding, choose_encoding
from .shards import CorpusWriter
from .sources import described_by_labels, find_sources
from .split import BlockGrid, SplitRule, balanced
from .tiling import cut_tiles, window_count, window_footprints

Report = Callable[[str], None]
_MIXED_UNITS = 20.0  # ratio of product means from which on they can hardly share a unit
_CACHE_BYTES = 256 << 20  # holds one row of blocks of the widest HiRISE scenes


@dataclass
class _Skipper:
    """Stops at a bad product or notes it, as `on_error` says."""

    on_error: str
    report: Report
    skipped: list[dict[str, str]] = field(default_factory=list)

    def bad(self, source: Path, error: MomoError) -> None:
        if self.on_error == "stop":
            raise error
        seen = "" if error.seen is None else str(error.seen).replace(f"{source}: ", "").replace(str(source), "")
        self.note(source, f"{error.what}: {seen}" if seen else error.what)

    def note(self, source: Path, reason: str) -> None:
        self.report(f"  skipped {source.name}: {reason}")
        self.skipped.append({"source": source.name, "reason": reason})


@dataclass(frozen=True)
class _Ready:
    product: Product
    sha256: str
    encoding: Encoding


def prep(config: PrepConfig, report: Report = print) -> Path:
    """Makes a CORPUS from raw products.

    Args:
        config: Settings; see `PrepConfig`.
        report: Gets one line for each product and the totals.

    Returns:
        The corpus folder, `config.out`.

    Raises:
        ConfigError: A setting is wrong, or GDAL is not installed.
        DataError: A product is bad (see `on_error`), none is left, or the output exists. Nothing is written then.
    """
    # GDAL would keep blocks up to 5 % of the machine's memory.
    gdal_module().SetCacheMax(min(_CACHE_BYTES, gdal_module().GetCacheMax()))
    started = time.perf_counter()
    out = Path(config.out)
    with atomic_folder(out) as folder:
        skipper = _Skipper(config.on_error, report)
        products = _distinct(_inspect_all(config, skipper, report), skipper, report)
        sensor = _one_sensor([product for product, _ in products], config)
        ready = _choose_encodings(products, config, skipper)
        if not ready:
            raise DataError(
                "no product is left",
                seen=f"all {len(skipper.skipped)} skipped, the last: {skipper.skipped[-1]['reason']}",
                fix="see the lines above; check `products`, `tile_size` and `nodata`",
            )
        grid = BlockGrid(_block_side_m(config, [r.product for r in ready]), config.block_tiles * config.tile_size)
        splits = _choose_splits(config, [r.product for r in ready], grid, report)
        dtype = "uint8" if all(r.encoding.dtype == "uint8" for r in ready) else "uint16"
        writer = CorpusWriter(
            folder,
            sensor=sensor,
            tile_size=config.tile_size,
            dtype=dtype,
            synthetic=config.synthetic,
            tiles_per_shard=config.tiles_per_shard,
        )
        with writer:
            entries = _write(writer, ready, config, grid, splits, skipper, report)
            _report_mixed_units(entries, report)
            notes = {"skipped": skipper.skipped, "block_side_m": grid.side_m, "forced_blocks": splits.forced}
            manifest = writer.finish(products=entries, prep=to_dict(config) | notes, licence=config.licence)
    _report_totals(manifest, out, len(entries), len(skipper.skipped), time.perf_counter() - started, report)
    if config.val_fraction > 0 and manifest.splits["val"] == 0:
        report(
            "  WARNING: no validation tile. All tiles lie in one block, or those of the validation blocks were dropped:"
            " make blocks smaller (block_m, block_tiles), raise val_fraction, or take another seed"
        )
    return out


def _inspect_all(config: PrepConfig, skipper: _Skipper, report: Report) -> list[Product]:
    sources, passed_over = find_sources(config.products)
    if passed_over:
        report(f"  {passed_over} files in the folders are no rasters by their extension, passed over")
    for rule in config.rules:
        if not any(fnmatch.fnmatchcase(source.name, rule.match) for source in sources):
            report(f"  rule {rule.match!r} matches no product")
    products: list[Product] = []
    errors: dict[Path, MomoError] = {}
    for source in sources:
        try:
            products.append(inspect(source, **_settings(config, source)))
        except DataError as error:
            errors[source] = error
    described = described_by_labels((product.source, product.files) for product in products)
    for source, reason in errors.items():
        if source.resolve() not in described:
            skipper.bad(source, reason)
    return [product for product in products if product.source.resolve() not in described]


def _settings(config: PrepConfig, source: Path) -> dict[str, Any]:
    settings = {"band": config.band, "nodata": config.nodata, "gsd_m": config.gsd_m, "licence": config.licence}
    for rule in config.rules:
        if fnmatch.fnmatchcase(source.name, rule.match):
            settings |= {key: getattr(rule, key) for key in settings if getattr(rule, key) is not None}
    return settings


def _distinct(products: list[Product], skipper: _Skipper, report: Report) -> list[tuple[Product, str]]:
    """Leaves out files with the same bytes, and makes product ids unique."""
    by_hash: dict[str, Product] = {}
    used: set[str] = set()
    distinct = []
    for product in products:
        digest = _digest(product)
        if digest in by_hash:
            skipper.note(product.source, f"it has the same bytes as {by_hash[digest].source.name}")
            continue
        by_hash[digest] = product
        number, named = 1, product
        while named.key in used:
            number += 1
            named = dataclasses.replace(product, product_id=f"{product.product_id}-{number}")
        if number > 1:
            report(f"  product id {product.product_id} is taken: {product.source.name} becomes {named.product_id}")
        used.add(named.key)
        distinct.append((named, digest))
    return distinct


def _digest(product: Product) -> str:
    files = sorted(path for path in map(Path, product.files) if path.is_file()) or [product.source]
    if len(files) == 1:
        return sha256_file(files[0])
    return sha256_json({path.name: sha256_file(path) for path in files})


def _one_sensor(products: list[Product], config: PrepConfig) -> str:
    if config.sensor != "auto":
        for product in products:
            if product.sensor is not None and product.sensor != config.sensor:
                raise DataError(
                    "a product is of another sensor",
                    seen=f"{product.source}: its label says {product.instrument}, the configuration {config.sensor}",
                    rule="a corpus holds one sensor",
                    fix="leave it out, or set `sensor`",
                )
        return config.sensor
    unknown = [product for product in products if product.sensor is None]
    if unknown:
        raise ConfigError(
            "the sensor cannot be read from the label",
            seen=f"{unknown[0].source} (instrument {unknown[0].instrument or 'not named'!r})",
            rule=f"auto knows {', '.join(SENSORS)}",
            fix="set `sensor`",
        )
    sensors = {str(product.sensor): product.source.name for product in products}
    if len(sensors) > 1:
        raise DataError(
            "the products are of several sensors",
            seen=", ".join(f"{sensor} ({name})" for sensor, name in sorted(sensors.items())),
            rule="a corpus holds one sensor",
            fix="run prep once for each sensor",
        )
    return next(iter(sensors), "")


def _choose_encodings(products: list[tuple[Product, str]], config: PrepConfig, skipper: _Skipper) -> list[_Ready]:
    ready = []
    for product, digest in products:
        try:
            if min(product.width, product.height) < config.tile_size:
                raise DataError(
                    "the product is smaller than a tile",
                    seen=f"{product.source}: {product.width} x {product.height} pixels",
                    rule=f"both sides reach tile_size = {config.tile_size}",
                    fix="lower tile_size, or leave it out (on_error=skip)",
                )
            ready.append(_Ready(product, digest, choose_encoding(product)))
        except DataError as error:
            skipper.bad(product.source, error)
    return ready


def _block_side_m(config: PrepConfig, products: list[Product]) -> float:
    if config.block_m is not None:
        return config.block_m
    located = [product.gsd_m for product in products if product.georeference.located]
    coarsest = max(located, default=1.0)
    return config.block_tiles * config.tile_size * coarsest


def _choose_splits(config: PrepConfig, products: list[Product], grid: BlockGrid, report: Report) -> SplitRule:
    rule = SplitRule(config.seed, config.val_fraction)
    every = chain.from_iterable(window_footprints(product, config, grid) for product in products)
    chosen = balanced(rule, every)
    for block, split in chosen.forced.items():
        report(f"  few blocks: the hash left {split} empty, so block {block} was moved to {split}")
    return chosen


def _write(
    writer: CorpusWriter,
    ready: list[_Ready],
    config: PrepConfig,
    grid: BlockGrid,
    splits: SplitRule,
    skipper: _Skipper,
    report: Report,
) -> list[dict[str, Any]]:
    entries = []
    total = sum(window_count(item.product, config) for item in ready)
    with require("tqdm", "prep").tqdm(total=total, unit=" windows", disable=None) as bar:
        for item in ready:
            kept: Counter[str] = Counter()
            dropped: Counter[str] = Counter()
            damage, level = None, 0.0
            try:
                for tile in cut_tiles(
                    item.product, item.encoding, config, dtype=writer.dtype, grid=grid, splits=splits, dropped=dropped
                ):
                    writer.add(tile)
                    kept[tile.split] += 1
                    level += float(tile.stored_HW.mean(where=tile.valid_HW))
                    bar.update()
            except DataError as error:
                skipper.bad(item.product.source, error)
                damage = str(error)
            bar.update(window_count(item.product, config) - kept.total())
            if damage is None or kept:
                _report_product(item, writer.sensor, kept, dropped, report)
                mean = level / max(1, kept.total()) * item.encoding.scale + item.encoding.offset_value
                entries.append(_entry(item, kept, dropped, damage) | {"mean": mean if kept else None})
    return entries


def _report_mixed_units(entries: list[dict[str, Any]], report: Report) -> None:
    """Says when products have so different levels that they can hardly share a unit, say I/F and raw counts."""
    means = {entry["source"]: abs(entry["mean"]) for entry in entries if entry["mean"]}
    if means and max(means.values()) > _MIXED_UNITS * min(means.values()):
        low, high = min(means, key=means.__getitem__), max(means, key=means.__getitem__)
        report(
            f"  note: products of different units? Means from {means[low]:.4g} ({low}) to {means[high]:.4g} ({high}): "
            "stats.json mixes them, so normalise per tile (not sensor_zscore)"
        )


def _report_product(item: _Ready, sensor: str, kept: Counter[str], dropped: Counter[str], report: Report) -> None:
    product = item.product
    gsd = f"{product.gsd_m:.4g} m/px" if math.isfinite(product.gsd_m) else "GSD unknown"
    lost = ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items())) or "none"
    report(
        f"  {product.product_id}: {product.width} x {product.height} {product.dtype}, {sensor}, {gsd}, "
        f"{product.georeference.name}; kept {kept.total()} (train {kept['train']}, val {kept['val']}), dropped {lost}"
    )
    if product.sensor is None and product.instrument:
        report(f"    note: its label names the instrument {product.instrument!r}, taken as {sensor}")
    if item.encoding.max_error:
        report(f"    note: quantised to 16 bits, largest error {item.encoding.max_error:.3g}")
    for note in (*product.notes, item.encoding.note):
        if note:
            report(f"    note: {note}")


def _entry(item: _Ready, kept: Counter[str], dropped: Counter[str], damage: str | None) -> dict[str, Any]:
    product, encoding = item.product, item.encoding
    return {
        "product_id": product.product_id,
        "source": product.source.name,
        "sha256": item.sha256,
        "tiles": kept.total(),
        "licence": product.licence,
        "driver": product.driver,
        "band": product.band,
        "dtype": product.dtype,
        "width": product.width,
        "height": product.height,
        "gsd_m": product.gsd_m if math.isfinite(product.gsd_m) else None,
        "crs": product.georeference.name,
        "scale": encoding.scale,
        "offset_value": encoding.offset_value,
        "max_rounding_error": encoding.max_error,
        "dropped": dict(sorted(dropped.items())),
        "notes": [note for note in (*product.notes, encoding.note) if note],
        "damage": damage,
    }


def _report_totals(manifest: Manifest, out: Path, products: int, skipped: int, seconds: float, report: Report) -> None:
    tiles, size = sum(manifest.splits.values()), sum(shard.bytes for shard in manifest.shards)
    report(
        f"{manifest.sensor}: {tiles} tiles of {manifest.tile_size} px, {manifest.dtype} "
        f"(train {manifest.splits['train']}, val {manifest.splits['val']}) "
        f"from {products} products, {skipped} skipped; "
        f"{len(manifest.shards)} shards, {size / 1e6:.1f} MB; {seconds:.1f} s, {tiles / seconds:.0f} tiles/s -> {out}"
    )
