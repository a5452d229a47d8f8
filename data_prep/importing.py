"""Import of MOMO's published tiles into a corpus.

MOMO (Purohit et al., CVPR 2026) publishes image files and one CSV:

    <root>/<which_instrument>/processed_data/<GMoM_Unit_acronym>/<Filename>
    which_instrument, GMoM_Unit_acronym, Filename, Split (train or val)

The CSV may hold several instruments; one corpus takes the rows of one. Pixels are stored as they are. Where a tile lies
on Mars is not published, so there is no position, no cell and no split block.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from momo.codecs import CODECS
from momo.config import one_of, option, positive, to_dict
from momo.corpus_format import SPLITS
from momo.errors import ConfigError, DataError
from momo.extras import require
from momo.files import atomic_folder, write_json
from momo.sensors import SENSORS, sensor_from_instrument, sensor_named

from .import_rows import COLUMNS, BadRow, Hashes, Row, csv_lines, decode_grey, is_plain, name_hash
from .quality import is_constant
from .shards import CorpusWriter, TileRecord

MAX_LISTED = 20


@dataclass(kw_only=True)
class ImportConfig:
    """What `momo prep import` needs."""

    root: str = option(help="folder with <instrument>/processed_data/<unit>/<file>")
    csv: str = option(help="CSV with the columns which_instrument, GMoM_Unit_acronym, Filename, Split")
    out: str = option(help="corpus folder to make; must not exist")
    sensor: str = option(help="HiRISE, CTX or THEMIS: the rows of this instrument are taken")
    split: str = option("all", "all: train and val as the CSV says; train or val: only those rows")
    tile_size: int | None = option(None, "side of a tile, pixels; null: that of the first image")
    nodata: int | None = option(None, "stored value that means no data, for example 0; null: every pixel is valid")
    gsd_m: float | None = option(None, "metres a pixel; null: the sensor's published one (0.25, 5 or 100)")
    codec: str = option("zstd", "zstd (fast) or png (any tool shows the tiles); both lossless")
    tiles_per_shard: int = option(1024, "tiles in a shard")
    licence: str = option("CC-BY-4.0", "SPDX identifier; CC-BY-4.0 is that of MOMO's data")
    on_error: str = option("skip", "skip a bad row, list it at the end and exit with 3; or stop at the first")

    def __post_init__(self) -> None:
        self.sensor = sensor_named(self.sensor).name
        one_of("split", self.split, ("all", *SPLITS))
        one_of("codec", self.codec, CODECS)
        one_of("on_error", self.on_error, ("skip", "stop"))
        positive(tiles_per_shard=self.tiles_per_shard)
        for key in ("tile_size", "gsd_m"):
            if getattr(self, key) is not None:
                positive(**{key: getattr(self, key)})
        if self.gsd_m is not None and not math.isfinite(self.gsd_m):
            raise ConfigError("gsd_m is out of range", seen=self.gsd_m, rule="a finite number of metres")
        if self.nodata is not None and not 0 <= self.nodata <= 65535:
            raise ConfigError("nodata is out of range", seen=self.nodata, rule="a stored value, 0 to 65535")


@dataclass(frozen=True)
class ImportResult:
    """What `import_momo` made.

    Attributes:
        path: The corpus folder.
        failures: Bad rows: `source` and `reason`; the first `MAX_LISTED` of each reason.
    """

    path: Path
    failures: list[dict[str, str]]

    @property
    def exit_code(self) -> int:
        """0, or 3 when some rows failed."""
        return 3 if self.failures else 0


@dataclass
class _Counts:
    """What became of the rows."""

    config: ImportConfig
    dropped: Counter[str] = field(default_factory=Counter)
    passed_over: Counter[str] = field(default_factory=Counter)
    failures: list[dict[str, str]] = field(default_factory=list)

    def bad(self, source: str, line: int, error: BadRow) -> None:
        """Counts a bad row, or raises as `on_error` says."""
        if self.config.on_error == "stop":
            raise DataError(
                "a row cannot be imported",
                seen=f"{self.config.csv}, line {line} ({source}): {error}",
                rule="every row names an 8 or 16 bit grey image below root",
                fix="mend the row, or set on_error=skip",
            )
        self.dropped[error.reason] += 1
        if self.dropped[error.reason] <= MAX_LISTED:
            self.failures.append({"source": f"line {line}: {source}", "reason": str(error)})


class _Products(Sequence[dict[str, Any]]):
    """Rows of products.parquet, kept in a file so that memory does not grow with their number."""

    def __init__(self, path: Path) -> None:
        self._path, self._count = path, 0
        self._stream = open(path, "w", encoding="utf-8")  # noqa: SIM115 - closed in close

    def add(self, row: dict[str, Any]) -> None:
        """Appends one row."""
        self._stream.write(json.dumps(row) + "\n")
        self._count += 1

    def close(self) -> None:
        """Ends writing; afterwards the rows can be read."""
        self._stream.close()

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[dict[str, Any]]:
        with open(self._path, encoding="utf-8") as stream:
            yield from map(json.loads, stream)

    def __getitem__(self, position: Any) -> Any:
        raise TypeError("the rows are read in order only")


def import_momo(config: ImportConfig, report: Callable[[str], None] = print) -> ImportResult:
    """Makes a CORPUS from MOMO's published tiles.

    The CSV is read twice, row by row: once to find names that occur twice, once for the tiles. Memory grows by 16 bytes
    a row. The corpus keeps the order of the CSV.

    Args:
        config: Settings; see `ImportConfig`.
        report: Gets the totals and the bad rows.

    Returns:
        The folder and the bad rows.

    Raises:
        ConfigError: A setting is wrong.
        DataError: The CSV cannot be read, a row is bad (see `on_error`), or no row gives a tile.
    """
    root = Path(config.root)
    if not root.is_dir():
        raise DataError("the root folder does not exist", seen=root, fix="check `root`")
    repeated_keys, repeated_stems, total = _names(config)
    if total == 0:
        raise DataError(
            "the CSV has no row to import",
            seen=f"{config.csv} for {config.sensor}, split {config.split}",
            rule="which_instrument names the sensor, Split is train or val",
            fix="check `sensor` and `split`",
        )
    with atomic_folder(Path(config.out)) as folder, contextlib.ExitStack() as opened:
        counts = _Counts(config)
        products = opened.enter_context(contextlib.closing(_Products(folder / "products.jsonl")))
        writer: CorpusWriter | None = None
        first_lines: dict[str, int] = {}
        with require("tqdm", "prep").tqdm(total=total, unit=" tiles", disable=None) as bar:
            for row in _rows(config, counts):
                bar.update()
                try:
                    _refuse_repeated(row, repeated_keys, first_lines)
                    stored_HW, digest = _read_image(root, row, writer, config)
                    valid_HW = _valid(stored_HW, config)
                except BadRow as error:
                    counts.bad(row.path, row.line, error)
                    continue
                if writer is None:
                    writer = opened.enter_context(_writer(folder, stored_HW, config))
                name = row.stem if name_hash(row.stem) not in repeated_stems else f"{row.unit}/{row.stem}"
                writer.add(TileRecord(key=row.key, split=row.split, stored_HW=stored_HW, valid_HW=valid_HW,
                                      meta=_meta(row, name, config)))  # fmt: skip
                products.add(_product(row, name, digest, writer, config))
        products.close()
        if writer is None:
            last = counts.failures[-1]
            raise DataError(
                "no row gives a tile",
                seen=f"{sum(counts.dropped.values())} bad rows, the last listed: {last['source']}: {last['reason']}",
                fix="check `root`, `tile_size` and `nodata`",
            )
        manifest = _finish(folder, writer, products, counts, total, config)
    _report(config, counts, manifest, total, report)
    return ImportResult(Path(config.out), counts.failures)


def _finish(
    folder: Path, writer: CorpusWriter, products: _Products, counts: _Counts, total: int, config: ImportConfig
) -> Any:
    settings = to_dict(config) | {"imported": "MOMO's published layout"}
    manifest = writer.finish(products=products, prep=settings, licence=config.licence, failures=counts.failures)
    (folder / "products.jsonl").unlink()
    cutting = {"windows": total, "good": len(products), "dropped": dict(sorted(counts.dropped.items()))}
    write_json(folder / "report.json", {"cutting": cutting, "failures": counts.failures})
    return manifest


def _rows(config: ImportConfig, counts: _Counts | None) -> Iterator[Row]:
    """Yields the rows of the sensor and split; `counts` learns of the others."""
    counts = counts or _Counts(ImportConfig(**{**to_dict(config), "on_error": "skip"}))
    for line, values in csv_lines(Path(config.csv)):
        instrument, unit, name = (values[column] for column in COLUMNS[:3])
        row = Row(line, instrument, unit, name, values["Split"].lower())
        sensor = sensor_from_instrument(row.instrument)
        if sensor is None:
            error = BadRow("unknown instrument", f"{row.instrument!r}, one of {', '.join(SENSORS)}")
            counts.bad(row.path, line, error)
        elif sensor.name != config.sensor:
            counts.passed_over[f"{sensor.name} rows"] += 1
        elif row.split not in SPLITS:
            counts.bad(row.path, line, BadRow("unknown split", f"{values['Split']!r}, train or val"))
        elif config.split not in ("all", row.split):
            counts.passed_over[f"{row.split} rows"] += 1
        elif not all(is_plain(part) for part in (row.instrument, row.unit, row.name)):
            counts.bad(row.path, line, BadRow("no plain names", "unit and file are names inside root, without / or .."))
        else:
            yield row


def _names(config: ImportConfig) -> tuple[set[int], set[int], int]:
    """Returns the hashes of keys and of stems that occur more than once, and the number of rows."""
    keys, stems = Hashes(), Hashes()
    for row in _rows(config, None):
        keys.add(name_hash(row.key))
        stems.add(name_hash(row.stem))
    return keys.repeated(), stems.repeated(), keys.count


def _refuse_repeated(row: Row, repeated_keys: set[int], first_lines: dict[str, int]) -> None:
    if name_hash(row.key) not in repeated_keys:
        return
    if row.key in first_lines:
        raise BadRow("listed twice", f"the tile of line {first_lines[row.key]} has this unit and name")
    first_lines[row.key] = row.line


def _read_image(
    root: Path, row: Row, writer: CorpusWriter | None, config: ImportConfig
) -> tuple[npt.NDArray[Any], str]:
    """Returns the stored pixels of a row and the hash of its file."""
    try:
        data = (root / row.path).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise BadRow("file missing") from None
    except OSError as error:
        raise BadRow("file cannot be read", str(error)) from None
    stored_HW = decode_grey(data)
    size = config.tile_size if writer is None else writer.tile_size
    height, width = stored_HW.shape
    if height != width or (size is not None and height != size):
        wanted = f"{size} x {size}" if size is not None else "square"
        raise BadRow("another size", f"{width} x {height} pixels, expected {wanted}")
    if writer is not None and str(stored_HW.dtype) != writer.dtype:
        raise BadRow("another bit depth", f"{stored_HW.dtype}, the first image is {writer.dtype}")
    return stored_HW, hashlib.sha256(data).hexdigest()


def _valid(stored_HW: npt.NDArray[Any], config: ImportConfig) -> npt.NDArray[np.bool_]:
    valid_HW = np.ones(stored_HW.shape, dtype=bool) if config.nodata is None else stored_HW != config.nodata
    if not valid_HW.any():
        raise BadRow("no valid pixel", f"every pixel is {config.nodata}")
    if is_constant(stored_HW, valid_HW):
        raise BadRow("constant", f"every valid pixel is {stored_HW[valid_HW][0]}")
    return valid_HW


def _writer(folder: Path, stored_HW: npt.NDArray[Any], config: ImportConfig) -> CorpusWriter:
    return CorpusWriter(
        folder,
        sensor=config.sensor,
        tile_size=stored_HW.shape[0],
        dtype=str(stored_HW.dtype),
        synthetic=False,
        tiles_per_shard=config.tiles_per_shard,
        codec=config.codec,
    )


def _gsd(config: ImportConfig) -> float:
    return SENSORS[config.sensor].gsd_m if config.gsd_m is None else config.gsd_m


def _meta(row: Row, product_id: str, config: ImportConfig) -> dict[str, Any]:
    place = {"row": 0, "col": 0, "lon": math.nan, "lat": math.nan, "cell": -1, "block": ""}
    return {
        "product_id": product_id, "unit": row.unit, "gsd_m": _gsd(config), "scale": 1.0, "offset_value": 0.0, **place,
    }  # fmt: skip


def _product(row: Row, product_id: str, digest: str, writer: CorpusWriter, config: ImportConfig) -> dict[str, Any]:
    return {
        "product_id": product_id, "source": row.path, "sha256": digest, "tiles": 1, "licence": config.licence,
        "driver": "MOMO", "instrument": row.instrument, "band": 1, "dtype": writer.dtype, "width": writer.tile_size,
        "height": writer.tile_size, "gsd_m": _gsd(config), "native_gsd_m": _gsd(config), "kernel": "",
        "crs": "no CRS", "crs_wkt": "", "acquired": "", "scale": 1.0, "offset_value": 0.0, "max_rounding_error": 0.0,
        "windows": 1, "dropped": "{}", "notes": '["imported from MOMO\'s published tiles"]', "damage": "",
    }  # fmt: skip


def _report(config: ImportConfig, counts: _Counts, manifest: Any, total: int, report: Callable[[str], None]) -> None:
    for what, number in sorted(counts.passed_over.items()):
        report(f"  {number} {what} passed over")
    for failure in counts.failures:
        report(f"  {failure['source']}: {failure['reason']}")
    bad = sum(counts.dropped.values())
    if bad > len(counts.failures):
        report(f"  and {bad - len(counts.failures)} more bad rows")
    lost = ", ".join(f"{number} {reason}" for reason, number in sorted(counts.dropped.items())) or "none"
    report(
        f"{config.sensor}: {sum(manifest.splits.values())} of {total} rows became tiles of {manifest.tile_size} px, "
        f"{manifest.dtype} (train {manifest.splits['train']}, val {manifest.splits['val']}); bad rows: {lost} "
        f"-> {config.out}"
    )
