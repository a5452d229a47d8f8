"""The numbers of a data card, gathered from the tables of a corpus in bounded memory."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from momo.corpus import Corpus
from momo.corpus_format import SPLITS
from momo.errors import DataError
from momo.extras import require

BAND_DEG = 10.0
MAX_SAMPLE_TILES = 2000
MAX_SHOWN_ROWS = 20_000  # of a larger corpus a tile is a fraction of a pixel on the map
GRID_DEG = 0.5
BINS = 50
_PIXELS_A_TILE = 4096
# Measure -> the end of its histogram; what lies beyond is counted in the last bin.
MEASURES = {"valid_fraction": 1.0, "quality": 1.0, "noise": 1.0, "blur": 1.0, "stripes": 1.0, "saturation": 1.0}
_COLUMNS = ["split", "unit", "lon", "lat", "gsd_m", "cell", *MEASURES]

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Diversity:
    """How evenly tiles are spread over categories.

    Attributes:
        categories: Categories with at least one tile.
        entropy_bits: Shannon entropy H = -sum p log2 p (Shannon 1948).
        effective: exp(H) with H in nats: the number of equally common categories with the same entropy, Hill's
            diversity of order 1 (Hill 1973).
        evenness: H divided by its largest value, log of `categories` (Pielou 1966); 1 for a single category.
    """

    categories: int
    entropy_bits: float
    effective: float
    evenness: float


def diversity(counts: Iterable[int]) -> Diversity | None:
    """Returns the diversity of counts, or None when all are 0."""
    count_K = np.array([count for count in counts if count > 0], dtype=np.float64)
    if count_K.size == 0:
        return None
    share_K = count_K / count_K.sum()
    bits = max(0.0, float(-(share_K * np.log2(share_K)).sum()))
    evenness = bits / math.log2(count_K.size) if count_K.size > 1 else 1.0
    return Diversity(count_K.size, bits, 2.0**bits, evenness)


@dataclass
class Measure:
    """Histogram and mean of one quality measure over all tiles."""

    end: float
    counts: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(BINS, dtype=np.int64))
    known: int = 0
    total: float = 0.0

    def add(self, values: Floats) -> None:
        """Adds one value a tile; NaN is unknown and left out."""
        values = values[np.isfinite(values)]
        bins = np.clip((values / self.end * BINS).astype(np.int64), 0, BINS - 1)
        self.counts += np.bincount(bins, minlength=BINS)
        self.known += values.size
        self.total += float(values.sum())

    @property
    def mean(self) -> float:
        """Mean over the tiles with a known value."""
        return self.total / self.known if self.known else math.nan


@dataclass(frozen=True)
class Rows:
    """Columns of a seeded sample of tiles, in the order of the index."""

    val: npt.NDArray[np.bool_]
    lon: Floats
    lat: Floats
    footprint: list[list[float]]


@dataclass
class Tables:
    """What the index says, over all tiles.

    Attributes:
        splits: Tiles by split.
        units: Tiles by unit, (train, val); "" where unknown.
        bands: Tiles by latitude band of `BAND_DEG` degrees from the south pole, shape (2, bands): train, val.
        located: Tiles with a position.
        lat_range: Southernmost and northernmost centre.
        gsds: Tiles by GSD in metres, rounded to four digits, (train, val); NaN where unknown.
        cells: Tiles by HEALPix cell.
        measures: Histogram of each quality measure.
        grid: Tiles by cell of a longitude-latitude grid of `GRID_DEG`, (lat, lon), from the south-west corner.
        rows: A seeded sample of tiles.
    """

    splits: Counter[str] = field(default_factory=Counter)
    units: dict[str, npt.NDArray[np.int64]] = field(default_factory=dict)
    bands: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros((2, round(180 / BAND_DEG)), dtype=np.int64))
    located: int = 0
    lat_range: tuple[float, float] = (math.inf, -math.inf)
    gsds: dict[float, npt.NDArray[np.int64]] = field(default_factory=dict)
    cells: Counter[int] = field(default_factory=Counter)
    measures: dict[str, Measure] = field(default_factory=lambda: {name: Measure(end) for name, end in MEASURES.items()})
    grid: npt.NDArray[np.int64] = field(
        default_factory=lambda: np.zeros((round(180 / GRID_DEG), round(360 / GRID_DEG)), dtype=np.int64)
    )
    rows: Rows | None = None

    @property
    def tiles(self) -> int:
        """All tiles."""
        return self.splits.total()


def read_tables(path: Path, seed: int) -> Tables:
    """Reads the columns of index.parquet batch by batch.

    Args:
        path: The corpus folder.
        seed: Of the sample of rows.

    Raises:
        DataError: The index is missing or lacks a column.
    """
    parquet = require("pyarrow.parquet", "prep")
    file = path / "index.parquet"
    try:
        names = parquet.read_schema(file).names
        if missing := [name for name in [*_COLUMNS, "footprint"] if name not in names]:
            raise DataError(
                "the index lacks columns", seen=f"{', '.join(missing)} in {file}", fix="run momo prep again"
            )
        table = parquet.ParquetFile(file, read_dictionary=["split", "unit"])
    except (OSError, ValueError) as error:  # pyarrow's ArrowInvalid is a ValueError
        raise DataError("the index cannot be read", seen=f"{file}: {error}", fix="run momo prep verify") from None
    total = table.metadata.num_rows
    shown = np.sort(np.random.default_rng(seed).choice(total, size=min(total, MAX_SHOWN_ROWS), replace=False))
    columns = [*_COLUMNS, "footprint"] if total <= MAX_SHOWN_ROWS else _COLUMNS
    found, first = Tables(), 0
    samples: list[dict[str, Any]] = []
    for batch in table.iter_batches(batch_size=1 << 16, columns=columns):
        samples.append(_add(found, batch, shown[(shown >= first) & (shown < first + len(batch))] - first))
        first += len(batch)
    found.rows = _joined(samples)
    return found


def _joined(samples: list[dict[str, Any]]) -> Rows:
    arrays = {name: np.concatenate([sample[name] for sample in samples]) for name in ("val", "lon", "lat")}
    return Rows(**arrays, footprint=[corners for sample in samples for corners in sample["footprint"]])


def _add(found: Tables, batch: Any, shown: npt.NDArray[np.int64]) -> dict[str, Any]:
    """Adds one batch of the index; returns the columns of the rows at `shown`."""
    split = batch["split"].to_numpy(zero_copy_only=False)
    val = np.asarray(split == SPLITS[1])
    columns = {name: column_floats(batch[name]) for name in _COLUMNS[2:]}
    found.splits.update({SPLITS[0]: int((~val).sum()), SPLITS[1]: int(val.sum())})
    unit = batch["unit"].dictionary_decode().fill_null("").to_numpy(zero_copy_only=False).astype(str)
    _count(found.units, unit, val)
    gsd, codes = np.unique(columns["gsd_m"], return_inverse=True)
    _count(found.gsds, np.array([float(f"{value:.4g}") for value in gsd.tolist()])[codes], val)
    _add_places(found, columns["lon"], columns["lat"], val)
    cell = np.nan_to_num(columns["cell"], nan=-1.0).astype(np.int64)
    values, counts = np.unique(cell[cell >= 0], return_counts=True)
    found.cells.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
    for name, measure in found.measures.items():
        measure.add(columns[name])
    corners = batch["footprint"].take(_indices(shown)).to_pylist() if "footprint" in batch.schema.names else []
    return {
        "val": val[shown], "lon": columns["lon"][shown], "lat": columns["lat"][shown],
        "footprint": [c for c in corners if c is not None and len(c) == 8],
    }  # fmt: skip


def _indices(rows: npt.NDArray[np.int64]) -> Any:
    return require("pyarrow", "prep").array(rows)


def column_floats(column: Any) -> Floats:
    """Returns an Arrow column as float64; null becomes NaN."""
    arrow = require("pyarrow", "prep")
    return np.asarray(column.cast(arrow.float64()).to_numpy(zero_copy_only=False), dtype=np.float64)


def _count(counts: dict[Any, npt.NDArray[np.int64]], values: npt.NDArray[Any], val: npt.NDArray[np.bool_]) -> None:
    distinct, codes = np.unique(values, return_inverse=True)
    both = np.bincount(codes * 2 + val, minlength=2 * distinct.size).reshape(-1, 2)
    for value, pair in zip(distinct.tolist(), both, strict=True):
        key = value if value == value else math.nan  # one NaN object, so that dictionaries find it again
        counts[key] = counts.get(key, np.zeros(2, dtype=np.int64)) + pair


def _add_places(found: Tables, lon: Floats, lat: Floats, val: npt.NDArray[np.bool_]) -> None:
    known = np.isfinite(lon) & np.isfinite(lat)
    if not known.any():
        return
    lon, lat, val = lon[known], lat[known], val[known]
    found.located += lat.size
    found.lat_range = min(found.lat_range[0], float(lat.min())), max(found.lat_range[1], float(lat.max()))
    bands = found.bands.shape[1]
    band = np.clip(((lat + 90.0) / BAND_DEG).astype(np.int64), 0, bands - 1)
    found.bands += np.bincount(val * bands + band, minlength=2 * bands).reshape(2, bands)
    height, width = found.grid.shape
    row = np.clip(((lat + 90.0) / GRID_DEG).astype(np.int64), 0, height - 1)
    col = np.clip(((lon + 180.0) / GRID_DEG).astype(np.int64), 0, width - 1)
    found.grid += np.bincount(row * width + col, minlength=height * width).reshape(height, width)


@dataclass(frozen=True)
class Tones:
    """Pixel values of a seeded sample of N tiles.

    Attributes:
        edges: Edges of the 256 bins.
        train: Share of the training tiles' valid pixels in each bin; values beyond the edges are left out.
        val: The same of validation; all 0 without.
        val_N: True for validation tiles.
        mean_N: Mean of each tile.
        std_N: Standard deviation within each tile.
        entropy_bits: Shannon entropy of all pixels in these bins, 0 to 8.
        relative: True when values are on the scale of their product, 0 at its 1st and 1 at its 99th percentile,
            because the corpus mixes units.
    """

    edges: Floats
    train: Floats
    val: Floats
    val_N: npt.NDArray[np.bool_]
    mean_N: Floats
    std_N: Floats
    entropy_bits: float
    relative: bool

    @property
    def effective(self) -> float:
        """exp(H): the number of equally common grey levels with the same entropy."""
        return 2.0**self.entropy_bits

    @property
    def between(self) -> float:
        """Share of the variance that lies between tiles, not within them, 0..1; NaN without any."""
        between, within = float(np.var(self.mean_N)), float(np.mean(np.square(self.std_N)))
        return between / (between + within) if between + within > 0 else math.nan


def sample_positions(corpus: Corpus, seed: int, count: int) -> list[tuple[str, int]]:
    """Returns tiles drawn at random over both splits, in the order of the draw."""
    totals = [corpus.count(split) for split in SPLITS]
    drawn = np.random.default_rng([seed, 1]).choice(sum(totals), size=min(count, sum(totals)), replace=False)
    return [(SPLITS[int(n >= totals[0])], int(n - totals[0] if n >= totals[0] else n)) for n in drawn]


def sample_tones(corpus: Corpus, positions: list[tuple[str, int]]) -> Tones:
    """Reads the sampled tiles and counts their pixels between the 0.1st and the 99.9th percentile of the corpus.

    Raises:
        DataError: A tile cannot be read.
    """
    relative = corpus.manifest.mixed_units
    edges = _value_edges(corpus.stats)
    if relative:
        edges = np.linspace(-0.25, 1.25, 257)
    counts = {split: np.zeros(256) for split in SPLITS}
    means, stds = np.zeros(len(positions)), np.zeros(len(positions))
    ordered = sorted(positions)
    for number, (split, position) in enumerate(ordered):
        tile = corpus.read(split, position)
        values = tile.value_HW[tile.valid_HW].astype(np.float64)
        if relative:
            values = _on_product_scale(values, corpus, split, position)
        means[number], stds[number] = values.mean(), values.std()
        sample = values[:: max(1, -(-values.size // _PIXELS_A_TILE))]
        counts[split] += np.histogram(sample, edges)[0]
    shares = {split: count / max(1.0, count.sum()) for split, count in counts.items()}
    both = diversity(np.rint(counts[SPLITS[0]] + counts[SPLITS[1]]).astype(int).tolist())
    bits = both.entropy_bits if both else 0.0
    val_N = np.array([split == SPLITS[1] for split, _ in ordered], dtype=bool)
    return Tones(edges, shares[SPLITS[0]], shares[SPLITS[1]], val_N, means, stds, bits, relative)


def _value_edges(stats: Mapping[str, Any]) -> Floats:
    try:
        points = {float(name): float(value) for name, value in stats["percentiles"].items()}
        low, high = points[min(points)], points[max(points)]
        _ = [float(stats[name]) for name in ("mean", "std", "min", "max", "count")]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            "the statistics cannot be read",
            seen=f"stats.json: {error!r}",
            rule="numbers under mean, std, min, max, count and percentiles",
            fix="run momo prep again",
        ) from None
    if not low < high:
        low, high = low - 0.5, high + 0.5
    return np.linspace(low, high, 257)


def _on_product_scale(values: Floats, corpus: Corpus, split: str, position: int) -> Floats:
    statistics = corpus.index[split].statistics(position)
    low, high = statistics.percentile_low, statistics.percentile_high
    if not low < high:  # also when they are NaN
        low, high = (float(edge) for edge in np.percentile(values, (1.0, 99.0)))
    return (values - low) / (high - low) if low < high else np.full_like(values, 0.5)
