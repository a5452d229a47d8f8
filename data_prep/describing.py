"""The data card of a corpus: what is in it, how diverse it is, what was left out, and where it comes from."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from momo.config import option
from momo.corpus import Corpus
from momo.corpus_format import SPLITS
from momo.errors import ConfigError, DataError
from momo.extras import require
from momo.files import atomic_folder, write_json
from momo.sensors import SENSORS

from .describe_mosaic import SHOWN, sample_tiles
from .describe_numbers import BAND_DEG, MAX_SAMPLE_TILES, read_tables, sample_positions, sample_tones
from .describe_page import Card, write_card
from .describe_sections import (
    MAX_PRODUCTS,
    Findings,
    all_sections,
    counted,
    describe_gsd,
    gsd_rows,
    number,
    share,
)
from .describe_sources import read_left_out, read_products

FORMAT = "momo-data-card"
_FILES = {"index.html", "card.md", "card.json", "figures"}
_LISTED = 6
_BAR = 24
_SIZES = ((1e3, "n<1K"), (1e4, "1K<n<10K"), (1e5, "10K<n<100K"), (1e6, "100K<n<1M"), (1e7, "1M<n<10M"))


@dataclass(kw_only=True)
class DescribeConfig:
    """What `momo prep describe` needs."""

    corpus: str = option(help="corpus folder")
    out: str | None = option(None, "folder of the card; null: beside the corpus, its name and -card")
    seed: int = option(0, "seed of the tiles that are drawn for mosaic, pixel histogram and maps")

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ConfigError("seed is out of range", seen=self.seed, rule="0 or more")


def describe(config: DescribeConfig, report: Callable[[str], None] = print) -> Path:
    """Writes the data card of a corpus and reports a summary of at most 40 lines.

    The card is a folder: `index.html` (one page that needs nothing beside it), `card.md` with `figures/` (for a
    repository of datasets) and `card.json` (the numbers). The same corpus and seed give the same bytes. Memory does not
    grow with the pixels: tables are read batch by batch, and at most `MAX_SAMPLE_TILES` tiles are decoded.

    Args:
        config: Settings; see `DescribeConfig`.
        report: Gets the lines of the summary.

    Returns:
        The folder of the card. An earlier card there is replaced.

    Raises:
        ConfigError: A setting is wrong.
        DataError: The folder is no corpus or damaged, or `out` is something else than an earlier card.
    """
    path = Path(os.path.abspath(config.corpus))
    out = path.with_name(f"{path.name}-card") if config.out is None else Path(config.out)
    corpus = Corpus(path)
    _refuse_foreign(out)
    found = _findings(corpus, config.seed)
    card = _card(found, path.name)
    lines = summary(found)
    with atomic_folder(out, replaces=lambda _: True) as folder:
        write_card(card, folder)
        write_json(folder / "card.json", numbers(found))
    for line in [f"data card of {config.corpus}", *lines, f"-> {out / 'index.html'}"]:
        report(line)
    return out


def _refuse_foreign(out: Path) -> None:
    """Raises DataError unless `out` is free or holds an earlier card and nothing else."""
    if not os.path.lexists(out):
        return
    refused = DataError(
        "the output exists and is no data card",
        seen=out,
        rule="only a card made by momo prep describe is replaced",
        fix="choose another `out`, or remove it",
    )
    if out.is_symlink() or not out.is_dir():
        raise refused
    try:
        fields = json.loads((out / "card.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise refused from None
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        raise refused
    if other := sorted(file.name for file in out.iterdir() if file.name not in _FILES):
        raise DataError(
            "the data card's folder holds other files",
            seen=f"{', '.join(other[:_LISTED])} in {out}",
            rule="they would be lost, because the card is replaced as a whole",
            fix="move them away, or choose another `out`",
        )


def _findings(corpus: Corpus, seed: int) -> Findings:
    tables = read_tables(corpus.path, seed)
    if tables.tiles == 0:
        raise DataError("the corpus holds no tile", seen=corpus.path, fix="run momo prep again")
    if dict(tables.splits) != {split: corpus.count(split) for split in SPLITS}:
        raise DataError(
            "manifest and index disagree",
            seen=f"index {dict(tables.splits)}, manifest {corpus.manifest.splits}",
            rule="the index has one row a tile",
            fix="run momo prep verify, and momo prep again",
        )
    positions = sample_positions(corpus, seed, MAX_SAMPLE_TILES)
    return Findings(
        corpus,
        tables,
        read_products(corpus.path, MAX_PRODUCTS),
        read_left_out(corpus.path),
        sample_tones(corpus, positions),
        sample_tiles(corpus, positions[:SHOWN]),
    )


def _card(found: Findings, name: str) -> Card:
    manifest, tables, total = found.corpus.manifest, found.tables, found.tables.tiles
    yaml = require("yaml", "prep")
    sensor = SENSORS[found.sensor].description if found.sensor in SENSORS else "another camera"
    lead = (
        f"{total:,} tiles of {manifest.tile_size} x {manifest.tile_size} pixels from "
        f"{counted(found.products.count, f'{found.sensor} product')} ({sensor}), stored as "
        f"{manifest.dtype} in the products' own scale, with validity and provenance of each tile."
    )
    facts = [
        ("tiles", f"{total:,}"),
        ("training", f"{tables.splits['train']:,}"),
        ("validation", f"{tables.splits['val']:,}"),
        ("products", f"{found.products.count:,}"),
        ("GSD", describe_gsd(tables)),
        ("located", share(tables.located, total)),
        ("size", f"{_megabytes(found):,.1f} MB"),
        ("licence", manifest.licence),
    ]
    front = {
        "pretty_name": name,
        "license": manifest.licence.lower(),
        "size_categories": [next((words for top, words in _SIZES if total < top), "n>10M")],
        "tags": ["mars", "planetary-science", "remote-sensing", found.sensor.lower()],
        "momo": {key: value for key, value in numbers(found).items() if key in _FRONT},
    }
    sections = all_sections(found, yaml.safe_dump(manifest.prep, sort_keys=False, allow_unicode=True))
    title = f"{name}: {total:,} {found.sensor} tiles"
    return Card(title, lead, manifest.synthetic, facts, sections, front, _warnings(found))


_FRONT = ("format", "sensor", "synthetic", "fingerprint", "tiles", "splits", "tile_size", "dtype", "mean", "std")


def _warnings(found: Findings) -> list[str]:
    manifest, splits, warnings = found.corpus.manifest, found.tables.splits, []
    if manifest.mixed_units:
        warnings.append("The products differ in unit: normalise per tile or per product, not with one mean for all.")
    if manifest.licence == "unknown":
        warnings.append("The licence of the tiles is unknown. Give momo prep licence=... before you publish them.")
    if not splits["val"]:
        warnings.append("There is no validation tile.")
    if manifest.failures:
        warnings.append(f"{counted(len(manifest.failures), 'source')} gave no tile; see Sources and licences.")
    return warnings


def _megabytes(found: Findings) -> float:
    return sum(shard.bytes for shard in found.corpus.manifest.shards) / 1e6


def numbers(found: Findings) -> dict[str, Any]:
    """Returns the numbers of the card as JSON values; what is unknown is null."""
    manifest, tables, stats = found.corpus.manifest, found.tables, found.corpus.stats
    edges = [(-90 + BAND_DEG * band, count) for band, count in enumerate(tables.bands.sum(axis=0).tolist())]
    left = found.left_out
    return {
        "format": FORMAT,
        "sensor": manifest.sensor,
        "synthetic": manifest.synthetic,
        "fingerprint": manifest.fingerprint,
        "tiles": tables.tiles,
        "splits": {split: tables.splits[split] for split in SPLITS},
        "tile_size": manifest.tile_size,
        "dtype": manifest.dtype,
        "codec": manifest.codec,
        "licence": manifest.licence,
        "products": found.products.count,
        "licences": dict(sorted(found.products.licences.items())),
        "mixed_units": manifest.mixed_units,
        "mean": float(stats["mean"]),
        "std": float(stats["std"]),
        "percentiles": stats["percentiles"],
        "located": tables.located,
        "units": {unit: int(pair.sum()) for unit, pair in sorted(tables.units.items())},
        "latitude_bands": [{"from": low, "to": low + BAND_DEG, "tiles": count} for low, count in edges if count],
        "gsd_m": [{"gsd_m": gsd, "tiles": count} for gsd, count in gsd_rows(tables)],
        "measures": {name: _known(measure.mean) for name, measure in tables.measures.items()},
        "diversity": {
            over: None
            if spread is None
            else {"present": spread.categories, "entropy_bits": spread.entropy_bits, "effective": spread.effective}
            for over, spread in found.diversities()
        },
        "tonal_diversity": {
            "entropy_bits": found.tones.entropy_bits,
            "effective": found.tones.effective,
            "variance_between_tiles": _known(found.tones.between),
            "tiles": int(found.tones.val_N.size),
        },
        "windows": None if left is None else left.windows,
        "left_out": None if left is None else [{"reason": r, "when": s, "windows": n} for s, r, n in left.reasons],
        "failures": len(manifest.failures),
    }


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


def summary(found: Findings) -> list[str]:
    """Returns the card in at most 38 lines of text."""
    manifest, tables, total = found.corpus.manifest, found.tables, found.tables.tiles
    synthetic = ", SYNTHETIC" if manifest.synthetic else ""
    splits = ", ".join(f"{split} {tables.splits[split]:,} ({share(tables.splits[split], total)})" for split in SPLITS)
    lines = [
        _row("corpus", f"{found.sensor}{synthetic}, {total:,} tiles of {manifest.tile_size} px, {manifest.dtype}, "
                       f"{manifest.codec}, {_megabytes(found):,.1f} MB; licence {manifest.licence}"),
        _row("split", splits),
        _row("products", f"{found.products.count:,}{_damage(found)}"),
        _row("units", _units(found)),
        _row("GSD", _gsds(found)),
        _row("located", f"{tables.located:,} of {total:,} tiles ({share(tables.located, total)})"),
    ]  # fmt: skip
    bands = tables.bands.sum(axis=0)
    for band in range(len(bands) - 1, -1, -1):
        if bands[band]:
            low = -90 + band * BAND_DEG
            bar = "#" * max(1, round(_BAR * int(bands[band]) / int(bands.max())))
            lines.append(f"  {low:>+9.0f} to {low + BAND_DEG:+.0f}".ljust(20) + f"{bands[band]:>10,}  {bar}")
    stats = found.corpus.stats
    mixed = " (the products differ in unit)" if manifest.mixed_units else ""
    lines.append(_row("values", f"mean {number(stats['mean'])}, std {number(stats['std'])}{mixed}"))
    means = ", ".join(f"{name} {number(measure.mean, 3)}" for name, measure in tables.measures.items())
    lines.append(_row("quality", f"means: {means}"))
    for over, spread in found.diversities():
        if spread is not None:
            lines.append(_row("diversity", f"{spread.effective:,.1f} effective of {spread.categories:,} {over} "
                                           f"(H {spread.entropy_bits:.2f} bits)"))  # fmt: skip
    lines.append(_row("tones", f"{found.tones.entropy_bits:.2f} of 8 bits, {found.tones.effective:.0f} effective grey "
                               f"levels of 256; {found.tones.between:.0%} of the variance between tiles"))  # fmt: skip
    lines += _left_out_lines(found)
    return lines


def _row(name: str, text: str) -> str:
    return f"  {name:<11}{text}"


def _listed(items: list[str]) -> str:
    more = f", and {len(items) - _LISTED:,} more" if len(items) > _LISTED else ""
    return ", ".join(items[:_LISTED]) + more


def _damage(found: Findings) -> str:
    products = found.products
    parts = [f", {products.damaged_count:,} cut only in part"] if products.damaged_count else []
    if products.resampled:
        parts.append(f", {products.resampled:,} resampled")
    return "".join(parts)


def _units(found: Findings) -> str:
    known = {unit: int(pair.sum()) for unit, pair in found.tables.units.items() if unit}
    ranked = sorted(known.items(), key=lambda item: (-item[1], item[0]))
    return _listed([f"{unit} {count:,}" for unit, count in ranked]) or "unknown"


def _gsds(found: Findings) -> str:
    known = gsd_rows(found.tables)
    missing = found.tables.tiles - sum(count for _, count in known)
    unknown = [f"unknown {missing:,}"] if missing else []
    return _listed([f"{gsd:.4g} m {count:,}" for gsd, count in known] + unknown)


def _left_out_lines(found: Findings) -> list[str]:
    lines, left = [], found.left_out
    if left is not None:
        reasons = _listed([f"{count:,} {reason}" for _, reason, count in left.reasons])
        lines.append(_row("left out", f"of {left.windows:,} windows: {reasons or 'nothing'}"))
    failures = found.corpus.manifest.failures
    if failures:
        first = f"{failures[0].get('source')}: {failures[0].get('reason')}"
        more = "; the first" if len(failures) > 1 else ""
        lines.append(_row("failed", f"{counted(len(failures), 'source')} gave no tile{more}: {first}"))
    return lines
