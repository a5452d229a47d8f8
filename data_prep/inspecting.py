"""From patterns to products: what each file is, of one sensor, under ids that are unique in the corpus."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from momo.errors import ConfigError, DataError, MomoError
from momo.sensors import SENSORS

from .cluster import Workers
from .config import PrepConfig
from .products import Product, inspect
from .resample import resampled
from .sources import Source, described_by_labels, find_sources
from .tiling import as_data_error, short_reason

Report = Callable[[str], None]
_GEOMETRY = ("incidence_deg", "emission_deg", "phase_deg", "sub_solar_azimuth_deg")
_SAID = 20  # failures told as they come


@dataclass
class Failures:
    """Products that fail: the first one stops everything, or they are listed, as `on_error` says.

    Attributes:
        on_error: `stop` or `skip`.
        report: Gets a line for each.
        listed: `source` and `reason` of each.
    """

    on_error: str
    report: Report
    listed: list[dict[str, str]] = field(default_factory=list)

    def add(self, source: Source, error: MomoError) -> None:
        """Notes a failed product.

        Raises:
            MomoError: `error`, when `on_error` is `stop`.
        """
        if self.on_error == "stop":
            raise error
        reason = short_reason(error, source)
        if len(self.listed) < _SAID:
            self.report(f"  FAILED {source.display}: {reason}")
        elif len(self.listed) == _SAID:
            self.report(f"  more than {_SAID} products failed; all are listed at the end")
        self.listed.append({"source": source.display, "reason": reason})


def _inspect(config: PrepConfig, source: Source) -> Product | MomoError:
    """The task of one worker; errors travel back as results."""
    try:
        settings = _settings(config, source)
        seen = {key: settings.pop(key) for key in _GEOMETRY}
        product = inspect(source, **settings)
        given = {key: value for key, value in seen.items() if value is not None}
        product = dataclasses.replace(product, observation=dataclasses.replace(product.observation, **given))
        if config.resample.gsd_m is not None:
            product = resampled(product, config.resample.gsd_m, config.resample.kernel)
        return product
    except Exception as error:
        if isinstance(error, ConfigError):  # it concerns every product
            raise
        return as_data_error(error, source)


def _settings(config: PrepConfig, source: Source) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "band": config.band, "nodata": config.nodata, "gsd_m": config.gsd_m, "licence": config.licence,
        "collar": config.collar, "product_id": None, "acquired": None, **dict.fromkeys(_GEOMETRY),
    }  # fmt: skip
    for rule in config.rules:
        if fnmatch.fnmatchcase(source.display, rule.match):
            settings |= {key: getattr(rule, key) for key in settings if getattr(rule, key) is not None}
    return settings


def sources_of(config: PrepConfig, failures: Failures, report: Report) -> list[Source]:
    """Finds the sources and says what was passed over; unreadable archives count as failures.

    Raises:
        DataError: A pattern yields nothing.
    """
    sources, passed_over = find_sources(config.products, bad=failures.add)
    if passed_over:
        report(f"  {passed_over} files in the folders are no rasters by their extension, passed over")
    for rule in config.rules:
        if not any(fnmatch.fnmatchcase(source.display, rule.match) for source in sources):
            report(f"  rule {rule.match!r} matches no product")
    return sources


def inspect_all(
    sources: list[Source], config: PrepConfig, workers: Workers, failures: Failures, report: Report
) -> list[Product]:
    """Inspects every source and leaves out data files that detached labels describe.

    Returns:
        The products in the order of their sources, with unique ids.
    """
    results: dict[int, Product | MomoError] = {}
    for position, result in workers.run(functools.partial(_inspect, config), sources):
        if isinstance(result, MomoError) and config.on_error == "stop" and not _may_be_described(sources[position]):
            raise result
        results[position] = result
    products = {n: result for n, result in results.items() if isinstance(result, Product)}
    described = described_by_labels((product.source, product.files) for product in products.values())
    for number in sorted(results):
        error = results[number]
        if isinstance(error, MomoError) and sources[number].place not in described:
            failures.add(sources[number], error)
    kept = [products[n] for n in sorted(products) if products[n].source.place not in described]
    return unique_ids(kept, report)


def _may_be_described(source: Source) -> bool:
    """True for data files that may lack a label of their own; whether they do is known when all are inspected."""
    return Path(source.display).suffix.lower() in (".img", ".dat", ".raw", ".qub", ".jp2", ".tif")


def unique_ids(products: Iterable[Product], report: Report) -> list[Product]:
    """Gives products of one id a number, so that tile keys are unique."""
    used: set[str] = set()
    counts: Counter[str] = Counter()
    distinct = []
    for product in products:
        named = product
        while named.key in used:
            counts[product.key] += 1
            named = dataclasses.replace(product, product_id=f"{product.product_id}-{counts[product.key] + 1}")
        if named is not product:
            report(f"  product id {product.product_id} is taken: {product.source.display} becomes {named.product_id}")
        used.add(named.key)
        distinct.append(named)
    return distinct


def one_sensor(products: list[Product], config: PrepConfig, failures: Failures) -> tuple[str, list[Product]]:
    """Returns the corpus's sensor and the products of it.

    Raises:
        ConfigError: `sensor` is auto and a label does not say.
        DataError: The products are of several sensors.
    """
    if config.sensor != "auto":
        kept = []
        for product in products:
            if product.sensor is None or product.sensor == config.sensor:
                kept.append(product)
                continue
            error = DataError(
                "a product is of another sensor",
                seen=f"{product.source.display}: its label says {product.instrument}, the configuration "
                f"{config.sensor}",
                rule="a corpus holds one sensor",
                fix="leave it out, or set `sensor`",
            )
            failures.add(product.source, error)
        return config.sensor, kept
    unknown = [product for product in products if product.sensor is None]
    if unknown:
        raise ConfigError(
            "the sensor cannot be read from the label",
            seen=f"{unknown[0].source.display} (instrument {unknown[0].instrument or 'not named'!r})",
            rule=f"auto knows {', '.join(SENSORS)}",
            fix="set `sensor`",
        )
    sensors = {str(product.sensor): product.source.display for product in products}
    if len(sensors) > 1:
        raise DataError(
            "the products are of several sensors",
            seen=", ".join(f"{sensor} ({name})" for sensor, name in sorted(sensors.items())),
            rule="a corpus holds one sensor",
            fix="run prep once for each sensor",
        )
    return next(iter(sensors), ""), products
