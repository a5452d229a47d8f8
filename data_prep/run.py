"""The prep stage: raw products of one sensor in, one CORPUS out.

Products are inspected, then cut, each by one worker into a piece in the work folder; only then is decided, on the
pieces' tables, which tiles are taken and into which split; last the shards are put together. A killed run continues:
finished pieces are found again.
"""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from momo.config import to_dict
from momo.corpus_format import FORMAT_VERSION, INDEX_COLUMNS, SPLITS, Manifest
from momo.errors import DataError, MomoError
from momo.extras import require_installed
from momo.files import atomic_folder, sha256_json, write_json

from .assembly import Part, ShardPlan, add_statistics, chunks, in_order, write_shard
from .cluster import Workers, open_workers
from .config import PrepConfig
from .footprints import read_footprints
from .inspecting import Failures, inspect_all, one_sensor, sources_of
from .pieces import CutSettings
from .planning import Plan, make_plan
from .products import Product, gdal_module
from .progress import Progress, report_drops, report_products, report_totals
from .shards import TableFile, write_manifest
from .split import cell_order
from .statistics import PixelStatistics
from .strata import units_at
from .tables import Ready, contact_sheet, report_file, tile_table, write_products
from .tiling import Cut, cut

Report = Callable[[str], None]
_MIXED_UNITS = 20.0  # ratio of product means from which on they can hardly share a unit


@dataclass(frozen=True)
class PrepResult:
    """What `prep` made.

    Attributes:
        path: The corpus folder.
        failures: Products that failed: `source` and `reason`.
    """

    path: Path
    failures: list[dict[str, str]]

    @property
    def exit_code(self) -> int:
        """0, or 3 when some products failed."""
        return 3 if self.failures else 0


def prep(config: PrepConfig, report: Report = print) -> PrepResult:
    """Makes a CORPUS from raw products.

    Args:
        config: Settings; see `PrepConfig`.
        report: Gets lines for the user.

    Returns:
        The corpus folder and the products that failed. A corpus that the same command made already is left as it
        is; one that lacks failed products is made anew, from the pieces of the others.

    Raises:
        ConfigError: A setting is wrong, or a package is not installed.
        DataError: A product is bad and `on_error` is `stop`, none is left, or the output is another artefact.
    """
    # A missing package is told now, not by every product.
    gdal_module()
    for module in ("pyarrow", "scipy", "shapely", "zstandard", "distributed"):
        require_installed(module, "prep")
    _check_vectors(config)
    started = time.perf_counter()
    out = Path(config.out).absolute()
    work = Path(config.work).absolute() if config.work else out.with_name(f"{out.name}.work")
    failures = Failures(config.on_error, report)
    sources = sources_of(config, failures, report)
    command = sha256_json(_command(config))
    inputs = sha256_json([command, [source.identity() for source in sources]])
    done = _done(out, command, inputs)
    if done is not None and not done.failures:
        report(f"{out} is complete already: {sum(done.splits.values())} tiles; nothing to do")
        return PrepResult(Path(config.out), [])
    with (
        atomic_folder(out, replaces=None if done is None else lambda _: True) as folder,
        open_workers(config, len(sources), work) as workers,
    ):
        report(f"{len(sources)} {'file' if len(sources) == 1 else 'files'}, {workers.description}")
        products = inspect_all(sources, config, workers, failures, report)
        sensor, products = one_sensor(products, config, failures)
        settings = _cut_settings(config, products)
        ready = _cut_all(products, settings, work, workers, failures, report, sensor)
        _refuse_nothing(ready, failures)
        plan = make_plan(tile_table(ready, config), config, settings.order)
        report_drops(plan, report)
        notes = {"command": command, "inputs": inputs}
        manifest = _assemble(folder, ready, plan, config, settings, sensor, workers, failures, notes, report)
    report_totals(manifest, Path(config.out), len(ready), len(failures.listed), time.perf_counter() - started, report)
    if failures.listed:
        report(f"  kept {work}: when they are mended, the same command redoes these products only")
    elif not config.keep_work:
        _remove_work(work, ready, own=config.work is None)
    return PrepResult(Path(config.out), failures.listed)


def _check_vectors(config: PrepConfig) -> None:
    """Reads the vector files before anything is cut: a wrong one must not be told after hours of work."""
    if config.leakage.footprints is not None:
        read_footprints(config.leakage.footprints)
    if config.strata.units is not None:
        assert config.strata.column is not None
        nowhere = np.zeros(1)
        units_at(nowhere, nowhere, config.strata.units, config.strata.column, config.strata.layer)


def _remove_work(work: Path, ready: list[Ready], own: bool) -> None:
    """Removes the pieces, of a work folder that the user named only those of this corpus."""
    for folder in [work / "pieces"] if own else [item.folder for item in ready]:
        shutil.rmtree(folder, ignore_errors=True)
    for folder in (work / "pieces", work):
        with contextlib.suppress(OSError):  # not empty, or never made
            folder.rmdir()


def _command(config: PrepConfig) -> dict[str, Any]:
    """Returns the settings that decide what the corpus is; how the work is spread does not count."""
    settings = to_dict(config)
    for key in ("out", "workers", "scheduler", "slurm", "work", "keep_work", "on_error"):
        settings.pop(key)
    return settings | {"format_version": FORMAT_VERSION}


def _done(out: Path, command: str, inputs: str) -> Manifest | None:
    """Returns the manifest of an output that this very command made, or None when there is no output.

    Files may have changed since only when some failed: the same command is the way to do those again.

    Raises:
        DataError: The output is something else.
    """
    if not out.exists():
        return None
    try:
        fields = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
        manifest = Manifest(**fields)
        if manifest.prep["inputs"] == inputs or (manifest.failures and manifest.prep["command"] == command):
            return manifest
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise DataError(
        "the output exists already",
        seen=out,
        rule="an artefact is never overwritten in passing",
        fix="choose another `out`, or remove the folder",
    )


def _cut_settings(config: PrepConfig, products: list[Product]) -> CutSettings:
    located = [product.gsd_m for product in products if product.georeference.located]
    order = -1
    if located:
        side_m = config.split.block_tiles * config.tile_size * max(located)
        order = cell_order(side_m) if config.split.order is None else config.split.order
    return CutSettings(
        tile_size=config.tile_size,
        step=config.step,
        quality=to_dict(config.quality),
        codec=config.codec,
        # A product without a window must not make the tiles of the others wider.
        dtype="uint8" if all(p.dtype == "uint8" for p in products if _has_window(p, config)) else "uint16",
        order=order,
        pixel_block=config.split.block_tiles * config.tile_size,
    )


def _has_window(product: Product, config: PrepConfig) -> bool:
    return min(product.width, product.height) >= config.tile_size


def _cut_all(
    products: list[Product],
    settings: CutSettings,
    work: Path,
    workers: Workers,
    failures: Failures,
    report: Report,
    sensor: str,
) -> list[Ready]:
    cuts: dict[int, Cut] = {}
    task = functools.partial(_cut_task, settings, work)
    with Progress(products, report) as progress:
        for position, result in workers.run(task, products):
            done = Cut(None, str(result), result) if isinstance(result, MomoError) else result
            if failures.on_error == "stop" and done.error is not None:
                raise done.error
            cuts[position] = done
            progress.add(products[position], done)
    ready: list[Ready] = []
    by_hash: dict[str, str] = {}
    for position, product in enumerate(products):
        done = cuts[position]
        if done.error is not None:
            failures.add(product.source, DataError(done.failure))
        if done.folder is None:
            continue
        if done.info.sha256 and done.info.sha256 in by_hash:
            report(f"  {product.source.display} has the same bytes as {by_hash[done.info.sha256]}: left out")
            continue
        by_hash[done.info.sha256] = product.source.display
        ready.append(Ready(product, done.folder, done.info))
    report_products(ready, sensor, report)
    return ready


def _cut_task(settings: CutSettings, work: Path, product: Product) -> Cut:
    return cut(product, settings, work)


def _refuse_nothing(ready: list[Ready], failures: Failures) -> None:
    if any(item.info.tiles for item in ready):
        return
    last = f", the last: {failures.listed[-1]['reason']}" if failures.listed else ""
    raise DataError(
        "no tile is left",
        seen=f"{len(ready)} products without a tile, {len(failures.listed)} failed{last}",
        fix="see the lines above; check `products`, `tile_size`, `nodata` and `quality`",
    )


def _assemble(
    folder: Path,
    ready: list[Ready],
    plan: Plan,
    config: PrepConfig,
    settings: CutSettings,
    sensor: str,
    workers: Workers,
    failures: Failures,
    notes: dict[str, str],
    report: Report,
) -> Manifest:
    (folder / "shards").mkdir()
    shards = _shard_plans(folder / "shards", ready, plan, config, sensor)
    statistics, entries = PixelStatistics(), []
    index = TableFile(folder / "index.parquet", INDEX_COLUMNS)
    for done in in_order(workers.run(write_shard, shards), len(shards)):
        if isinstance(done, MomoError):
            raise done
        index.add_table(done.index)
        add_statistics(statistics, done)
        entries.append(done.entry)
    index.close()
    tiles = np.bincount(_products_of_tiles(ready)[plan.split_N >= 0], minlength=len(ready))
    write_products(folder / "products.parquet", ready, tiles)
    mixed = _mixed_units(ready, report)
    contact_sheet(folder / "contact_sheet.png", ready, plan, sensor)
    write_json(folder / "report.json", report_file(ready, plan, failures.listed))
    return write_manifest(
        folder,
        shards=entries,
        statistics=statistics,
        fields={
            "sensor": sensor, "tile_size": config.tile_size, "dtype": settings.dtype, "codec": config.codec,
            "synthetic": config.synthetic, "products": len(ready), "healpix_order": settings.order,
            "mixed_units": mixed, "prep": to_dict(config) | notes, "failures": failures.listed,
            "licence": config.licence,
        },
    )  # fmt: skip


def _products_of_tiles(ready: list[Ready]) -> np.ndarray[Any, Any]:
    return np.repeat(np.arange(len(ready)), [item.info.tiles for item in ready])


def _shard_plans(folder: Path, ready: list[Ready], plan: Plan, config: PrepConfig, sensor: str) -> list[ShardPlan]:
    product_N = _products_of_tiles(ready)
    first = np.concatenate([[0], np.cumsum([item.info.tiles for item in ready])])
    plans = []
    for code, split in enumerate(SPLITS):
        chosen = np.flatnonzero(plan.split_N == code)
        for number, tiles in enumerate(chunks(chosen, config.tiles_per_shard)):
            parts = []
            for n in np.unique(product_N[tiles]):
                here = tiles[product_N[tiles] == n]
                item = ready[n]
                parts.append(
                    Part(
                        piece=item.folder,
                        product_id=item.product.product_id,
                        product_key=item.product.key,
                        gsd_m=item.product.gsd_m,
                        scale=item.info.scale,
                        offset_value=item.info.offset_value,
                        rows_N=here - first[n],
                        units=[plan.units[u] for u in plan.unit_N[here]],
                        blocks=plan.block_names(here),
                    )
                )
            plans.append(ShardPlan(folder, split, number, config.codec, sensor, config.tile_size, parts))
    return plans


def _mixed_units(ready: list[Ready], report: Report) -> bool:
    """Says when products have so different levels that they can hardly share a unit, say I/F and raw counts."""
    means = {item.product.source.display: abs(item.info.mean) for item in ready if item.info.mean}
    if not means or max(means.values()) <= _MIXED_UNITS * min(means.values()):
        return False
    low, high = min(means, key=means.__getitem__), max(means, key=means.__getitem__)
    report(
        f"  note: products of different units? Means from {means[low]:.4g} ({low}) to {means[high]:.4g} ({high}): "
        "stats.json mixes them, so normalise per tile or per product (sensor_zscore is refused)"
    )
    return True
