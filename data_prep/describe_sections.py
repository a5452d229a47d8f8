"""The sections of the data card: which numbers and figures stand where, and what is said when there are none."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from momo.corpus import Corpus
from momo.corpus_format import SPLITS
from momo.errors import DataError
from momo.pages import Picture

from .describe_figures import (
    drop_figure,
    gsd_figure,
    latitude_figure,
    measure_figure,
    pixel_figure,
    product_figure,
    tone_figure,
    unit_figure,
    weighted_figure,
)
from .describe_maps import map_figures
from .describe_mosaic import Shown
from .describe_numbers import BAND_DEG, Diversity, Floats, Tables, Tones, diversity
from .describe_page import Section, Table
from .describe_sources import LeftOut, Products
from .split import cell_side_m

MAX_PRODUCTS = 50
_MAX_ROWS = 40
NONE = "–"
_MEASURE_WORDS = [
    ("valid fraction", "share of measured pixels, 0 to 1."),
    ("structural score", "lag-one spatial autocorrelation: near 1 for smooth terrain, near 0 for white noise."),
    ("noise / tile std", "noise standard deviation as a share of the tile's; fine texture counts as noise."),
    ("blur", "slope of the variogram, 0 (sharp) to 1."),
    ("striping", "share of the fine variation that whole lines or columns have in common, 0 to 1."),
    ("saturated share", "valid pixels at an end of the product's range, 0 to 1."),
]


@dataclass(frozen=True)
class Findings:
    """All numbers of one corpus, from which sections, summary and card.json are made.

    Attributes:
        corpus: The corpus.
        tables: From its index.
        products: From products.parquet.
        left_out: From report.json; None when there is none.
        tones: Pixels of a sample of tiles.
        shown: Tiles of the mosaic.
    """

    corpus: Corpus
    tables: Tables
    products: Products
    left_out: LeftOut | None
    tones: Tones
    shown: list[Shown]

    @property
    def sensor(self) -> str:
        """Camera of the tiles."""
        return self.corpus.sensor

    def diversities(self) -> list[tuple[str, Diversity | None]]:
        """Returns how evenly tiles are spread, by what they are counted over; None where that is unknown."""
        tables, order = self.tables, self.corpus.manifest.healpix_order
        units = [int(pair.sum()) for unit, pair in tables.units.items() if unit]
        cells = f"HEALPix cells of order {order} ({metres(cell_side_m(order))})" if order >= 0 else "HEALPix cells"
        return [
            ("geologic units", diversity(units)),
            (cells, diversity(tables.cells.values())),
            (f"latitude bands of {BAND_DEG:g} degrees", diversity(tables.bands.sum(axis=0).tolist())),
            ("products", diversity(self.products.tiles.tolist())),
        ]


def metres(length: float) -> str:
    """Writes a length with its unit: 847 m, 3.39 km."""
    return f"{length / 1000:.3g} km" if length >= 1000 else f"{length:.3g} m"


def share(count: float, total: float) -> str:
    """Writes a count as a share of a total."""
    return f"{count / total:.1%}" if total else NONE


def counted(count: int, what: str) -> str:
    """Writes a count with its noun: 1 source, 5 sources."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def number(value: float, digits: int = 5) -> str:
    """Writes a number with so many digits, or a dash when it is unknown."""
    return f"{value:.{digits}g}" if math.isfinite(value) else NONE


def all_sections(found: Findings, config_yaml: str) -> list[Section]:
    """Returns the sections of the page in order.

    Args:
        found: The numbers.
        config_yaml: The configuration that made the corpus, as YAML.
    """
    return [
        _examples(found), _tiles(found), _places(found), _values(found), _quality(found), _diversity(found),
        _left_out(found), _sources(found), _made(found, config_yaml),
    ]  # fmt: skip


def _examples(found: Findings) -> Section:
    intro = (
        f"{len(found.shown)} tiles drawn at random, each stretched from its 1st to its 99th percentile. Vermilion: not "
        "measured."
    )
    return Section("examples", "Examples", intro, tiles=found.shown)


def _tiles(found: Findings) -> Section:
    tables, total = found.tables, found.tables.tiles
    rows = [(split, f"{tables.splits[split]:,}", share(tables.splits[split], total)) for split in SPLITS]
    part = Section("tiles", "Tiles", "How many there are, and of what.")
    part.tables.append(Table("Tiles by split", ("split", "tiles", "share"), [*rows, ("all", f"{total:,}", "100.0%")]))
    if any(tables.units):
        part.pictures.append(unit_figure(tables, found.sensor))
    else:
        part.missing.append("No unit is known of any tile: momo prep fills it from a map of units (strata.units).")
    if any(math.isfinite(gsd) for gsd in tables.gsds):
        part.pictures.append(gsd_figure(tables, found.sensor))
    else:
        part.missing.append("No ground sample distance is known: neither georeference, nor label, nor gsd_m says it.")
    if tables.located:
        part.pictures.append(latitude_figure(tables, found.sensor))
    if found.products.tiles.any():
        part.pictures.append(product_figure(found.products, found.sensor))
    return part


def _places(found: Findings) -> Section:
    tables = found.tables
    part = Section("map", "Map", "Where on Mars the tiles lie.")
    if tables.located:
        part.wide += map_figures(tables, found.sensor)
        south, north = tables.lat_range
        part.lines.append(
            f"{tables.located:,} of {tables.tiles:,} tiles ({share(tables.located, tables.tiles)}) have a place on "
            f"Mars, from {south:.2f} to {north:.2f} degrees planetocentric latitude."
        )
    else:
        part.missing.append("No tile has a place on Mars: the products have no map projection.")
    return part


def _values(found: Findings) -> Section:
    stats, tones = found.corpus.stats, found.tones
    part = Section("values", "Pixel values", "In the products' own scale; invalid pixels take no part.")
    part.pictures = [pixel_figure(tones, stats, found.sensor), tone_figure(tones, found.sensor)]
    points = sorted((float(name), float(value)) for name, value in stats["percentiles"].items())
    names = ("mean", "std", "min", *(f"{name:g} %" for name, _ in points), "max")
    values = [stats["mean"], stats["std"], stats["min"], *(value for _, value in points), stats["max"]]
    caption = f"Over {int(stats['count']):,} valid pixels of the training tiles, physical units; n %: percentiles"
    part.tables.append(Table(caption, names, [tuple(number(float(value)) for value in values)]))
    if tones.relative:
        part.lines.append(
            "The products differ in unit, so mean, standard deviation and percentiles of the whole corpus mix units: "
            "normalise per tile or per product (sensor_zscore is refused)."
        )
    return part


def _quality(found: Findings) -> Section:
    return Section(
        "quality",
        "Quality",
        "Measured on every tile; a column of the index each.",
        pictures=[measure_figure(found.tables.measures, found.sensor)],
        words=_MEASURE_WORDS,
    )


def _diversity(found: Findings) -> Section:
    rows, unknown = [], []
    for over, spread in found.diversities():
        if spread is None:
            unknown.append(over)
        else:
            rows.append((over, f"{spread.categories:,}", f"{spread.entropy_bits:.2f} bits",
                         f"{spread.effective:,.1f}", f"{spread.evenness:.2f}"))  # fmt: skip
    tones = found.tones
    rows.append(("grey levels (256 bins)", "256", f"{tones.entropy_bits:.2f} bits", f"{tones.effective:,.1f}",
                 f"{tones.entropy_bits / 8:.2f}"))  # fmt: skip
    head = ("tiles spread over", "present", "entropy H", "effective number", "evenness")
    words = [
        ("entropy H", "Shannon entropy of the shares of tiles (of pixels, for grey levels)."),
        ("effective number", "exp(H), H in nats: so many equally common ones would have the same entropy."),
        ("evenness", "H over its largest value, 1 when all present are equally common."),
    ]
    part = Section("diversity", "Diversity", "How evenly the tiles are spread.", words=words)
    part.tables.append(Table("Few effective units, cells or products: much of the corpus looks alike", head, rows))
    if math.isfinite(tones.between):
        part.lines.append(
            f"Tonal diversity: {tones.between:.0%} of the variance of pixel values lies between tiles, the rest within "
            f"them ({tones.val_N.size:,} tiles drawn at random)."
        )
    if unknown:
        part.lines.append(f"Unknown, because no tile says it: {', '.join(unknown)}.")
    return part


def _left_out(found: Findings) -> Section:
    part = Section("left-out", "Left out", "What was looked at and did not become a tile, and why.")
    left = found.left_out
    if left is None:
        part.missing.append("The corpus has no report.json, so what was left out is unknown.")
    else:
        counts = {"taken": found.tables.tiles} | {reason: count for _, reason, count in left.reasons}
        part.pictures.append(drop_figure(counts, found.sensor))
        rows = [(reason, stage, f"{count:,}", share(count, left.windows)) for stage, reason, count in left.reasons]
        rows.insert(0, ("taken", NONE, f"{found.tables.tiles:,}", share(found.tables.tiles, left.windows)))
        caption = f"Of {left.windows:,} windows looked at"
        part.tables.append(Table(caption, ("reason", "when", "windows", "share"), rows))
        part.tables += _decisions(left)
        part.lines += [*_split_lines(left), *left.notes]
    sheet = found.corpus.path / "contact_sheet.png"
    if sheet.is_file():
        caption = "Examples of what was kept and dropped while cutting, by reason."
        png = sheet.read_bytes()
        part.wide.append(Picture("contact_sheet", png, "Contact sheet", caption, _width(png, sheet)))
    else:
        part.missing.append("The corpus has no contact sheet.")
    return part


def _width(png: bytes, file: Path) -> int:
    try:
        with Image.open(io.BytesIO(png)) as image:
            return image.width
    except OSError as error:
        raise DataError("the contact sheet cannot be read", seen=f"{file}: {error}", fix="remove it") from None


def _decisions(left: LeftOut) -> list[Table]:
    tables = []
    if left.strata:
        rows = [
            (name or "no unit", *(f"{count:,}" for count in counts), share(counts[1], counts[0]))
            for name, *counts in left.strata["table"][:_MAX_ROWS]
        ]
        total = left.strata["strata"]
        shown = f"; the {len(rows)} largest" if total > len(rows) else ""
        caption = f"Sampling plan {left.strata['plan']} over {total} strata by {left.strata['by']}{shown}"
        tables.append(Table(caption, ("stratum", "available", "taken", "train", "val", "share taken"), rows))
    if left.duplicate_examples:
        head = ("removed", "because of", "why", "overlap or bits")
        tables.append(Table("Duplicates, examples", head, _cells(left.duplicate_examples, 4), code=(0, 1)))
    if left.leakage_examples:
        caption = "Tiles on ground of the given footprints, examples"
        columns = ("removed", "footprint", "share of the tile on it")
        tables.append(Table(caption, columns, _cells(left.leakage_examples, 3), code=(0,)))
    return tables


def _cells(examples: list[tuple[str, ...]], columns: int) -> list[tuple[str, ...]]:
    return [(*example, *[NONE] * columns)[:columns] for example in examples]


def _split_lines(left: LeftOut) -> list[str]:
    lines = []
    overlap, alike = left.duplicates
    if overlap is not None or alike is not None:
        texts = ["not looked for" if count is None else f"{count:,}" for count in (overlap, alike)]
        lines.append(f"Duplicates removed by overlap on the ground: {texts[0]}; by perceptual hash: {texts[1]}.")
    if left.split:
        split, order = left.split, left.split["order"]
        cells = f"HEALPix cells of order {order} ({metres(cell_side_m(order))})" if order >= 0 else "blocks of pixels"
        lines.append(
            f"Split by {cells if split['by'] == 'healpix' else 'product'}: {split['blocks']:,} of them, "
            f"{split['val_fraction']:.0%} meant for validation, seed {split['seed']}."
        )
    if left.ground_check is not None:
        train, val, dropped = left.ground_check
        lines.append(
            f"Ground check: {train:,} training tiles against {val:,} validation tiles with a place; {dropped:,} "
            "training tiles overlapped validation ground and were dropped."
        )
    if left.leakage is not None:
        footprints, touched, tiles = left.leakage
        lines.append(
            f"Leakage: {tiles:,} tiles lay on {touched:,} of {footprints:,} given footprints and were dropped."
        )
    return lines


def _sources(found: Findings) -> Section:
    products, manifest = found.products, found.corpus.manifest
    part = Section(
        "sources",
        "Sources and licences",
        f"{counted(products.count, 'product')}. Licence of the tiles: {manifest.licence}.",
    )
    rows = [(name, f"{count:,}") for name, count in products.licences.most_common(_MAX_ROWS)]
    if products.count:
        part.tables.append(Table("Products by licence (SPDX)", ("licence", "products"), rows))
        part.tables.append(_product_table(products))
    years, incidence = products.years, products.incidence
    if years[0].size and years[1].any():
        edges: Floats = np.arange(math.floor(years[0].min()), math.floor(years[0].max()) + 2, dtype=np.float64)
        caption = f"Tiles by year of acquisition, of the {years[0].size:,} products that say it."
        part.pictures.append(weighted_figure("acquired", years, edges, "year", found.sensor, caption))
    if incidence[0].size and incidence[1].any():
        caption = f"Tiles by solar incidence angle, of the {incidence[0].size:,} products that say it."
        label = "solar incidence (degrees from the vertical)"
        edges = np.arange(0.0, max(90.0, float(incidence[0].max())) + 5.0, 5.0, dtype=np.float64)
        part.pictures.append(weighted_figure("incidence", incidence, edges, label, found.sensor, caption))
    if products.resampled:
        part.lines.append(f"{products.resampled:,} products were resampled; products.parquet names kernel and GSD.")
    for note, count in products.notes.most_common(_MAX_ROWS):
        part.lines.append(f"Met and mended on {counted(count, 'product')}: {note}")
    part.lines += [f"Cut only in part: {name}: {reason}" for name, reason in products.damaged]
    if products.damaged_count > len(products.damaged):
        part.lines.append(f"and {products.damaged_count - len(products.damaged):,} more cut only in part.")
    failures = manifest.failures
    if failures:
        shown = [(str(one.get("source", "")), str(one.get("reason", ""))) for one in failures[:_MAX_ROWS]]
        more = f"; the first {len(shown)}" if len(failures) > len(shown) else ""
        caption = f"{counted(len(failures), 'source')} gave no tile{more}"
        part.tables.append(Table(caption, ("source", "reason"), list(shown), code=(0,)))
    return part


def _product_table(products: Products) -> Table:
    head = ("product", "file", "instrument", "acquired", "GSD", "pixels", "CRS", "tiles", "licence", "sha256")
    rows = [
        (
            row["product_id"], row["source"] or NONE, row["instrument"] or NONE, (row["acquired"] or NONE)[:10],
            NONE if not row["gsd_m"] or math.isnan(row["gsd_m"]) else f"{row['gsd_m']:.4g} m",
            f"{row['width']:,} x {row['height']:,}" if row["width"] else NONE, row["crs"] or NONE,
            f"{row['tiles'] or 0:,}", row["licence"] or "unknown", (row["sha256"] or NONE)[:12],
        )
        for row in products.first
    ]  # fmt: skip
    more = (
        f"the first {len(rows)} of {products.count:,}; products.parquet has all" if products.count > len(rows) else ""
    )
    return Table(f"Products{': ' + more if more else ''}", head, rows, code=(0, 1, 9))


def _made(found: Findings, config_yaml: str) -> Section:
    manifest = found.corpus.manifest
    size = sum(shard.bytes for shard in manifest.shards)
    rows: list[tuple[str, ...]] = [
        ("fingerprint", manifest.fingerprint),
        ("format", f"{manifest.format} {manifest.format_version}, written by momo {manifest.momo_version or NONE}"),
        ("tiles", f"{manifest.tile_size} x {manifest.tile_size} pixels, {manifest.dtype}, lossless {manifest.codec}"),
        ("shards", f"{len(manifest.shards):,}, {size / 1e6:,.1f} MB"),
    ]
    rows += [(f"sha256 of {name}", digest) for name, digest in sorted(manifest.tables.items())]
    part = Section("made", "How it was made", "What identifies the corpus, and the settings that made it.")
    part.tables.append(Table("Identity", ("what", "value"), rows))
    part.text = ("Configuration of momo prep", config_yaml) if config_yaml.strip() not in ("", "{}") else None
    return part


def describe_gsd(tables: Tables) -> str:
    """Writes the range of known ground sample distances."""
    known = [gsd for gsd in tables.gsds if math.isfinite(gsd)]
    if not known:
        return "unknown"
    low, high = min(known), max(known)
    texts = [f"{gsd:.3g}" for gsd in (low, high)]
    return f"{texts[0]} m" if texts[0] == texts[1] else f"{texts[0]}–{texts[1]} m"


def gsd_rows(tables: Tables) -> list[tuple[float, Any]]:
    """Returns known distances with their tiles, finest first."""
    return sorted((gsd, int(pair.sum())) for gsd, pair in tables.gsds.items() if math.isfinite(gsd))
