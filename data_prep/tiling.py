"""One product to one piece: a function of the product and the settings alone, so that it can run in any process."""

from __future__ import annotations

import heapq
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from momo.codecs import encode_mask, encode_tile
from momo.errors import ConfigError, DataError, MomoError
from momo.files import atomic_folder

from .contact_sheet import Example, thumbnail
from .dead_lines import holds_constant_row, mask_dead_lines
from .pieces import CutSettings, PieceInfo, PieceTable, example_to_dict, piece_id, read_info, write_info
from .products import Product, gdal_module, open_product, quiet_gdal
from .quality import Measures, is_constant, measure
from .radiometry import Encoding, choose_encoding, no_valid_pixel
from .resample import RowReader, open_rows
from .sources import Source, digest
from .split import Places, place_windows
from .statistics import SAMPLE_VALUES, key_priority, value_sample

INVALID, CONSTANT, OFF_MAP = "too few valid pixels", "constant", "off the map"
KEPT = "kept"
_EXAMPLES = 2  # thumbnails kept of each reason and product
_PRODUCT_SAMPLE = 65536  # pixels from which the percentiles of a product are taken, about
_CACHE_BYTES = (32 << 20, 256 << 20)  # bounds of GDAL's block cache
_LOOK_AROUND = 256  # rows read beyond a strip whose first or last row is constant
_NONE = (-1, 1 << 20)  # stored levels that no pixel reaches


@dataclass(frozen=True)
class Cut:
    """What cutting one product came to.

    Attributes:
        folder: The piece, or None when it failed.
        failure: Why it failed or is whole only in part, else "".
        error: The error behind `failure`.
        seconds: Wall time; 0 when the piece was there already.
        info: What the piece says of itself.
    """

    folder: Path | None
    failure: str = ""
    error: MomoError | None = None
    seconds: float = 0.0
    info: PieceInfo = field(default_factory=PieceInfo)


def starts(length: int, size: int, step: int) -> range:
    """Returns the first pixels of the windows along one side; a remainder shorter than a window is left out."""
    return range(0, length - size + 1, step)


def window_count(product: Product, settings: CutSettings) -> int:
    """Returns the number of windows of a product."""
    size, step = settings.tile_size, settings.step
    return len(starts(product.height, size, step)) * len(starts(product.width, size, step))


def cut(product: Product, settings: CutSettings, work: Path) -> Cut:
    """Makes the piece of a product, or finds it finished.

    Args:
        product: What to read.
        settings: How to cut.
        work: Work folder, the same for every worker.

    Returns:
        The piece. A product damaged in the middle gives the tiles before the damage, and a failure. An error that a
        user can act on is returned, not raised, so that one bad product cannot stop the others.
    """
    started = time.perf_counter()
    folder = work / "pieces" / piece_id(product, settings)
    try:
        info = read_info(folder)
        if info is not None:
            return Cut(folder, info.damage, _damage(info, product), 0.0, info)
        with atomic_folder(folder) as partial:
            info = _cut_into(partial, product, settings)
    except Exception as error:
        if isinstance(error, ConfigError):  # it concerns every product
            raise
        error = as_data_error(error, product.source)
        return Cut(None, short_reason(error, product.source), error, time.perf_counter() - started)
    return Cut(folder, info.damage, _damage(info, product), time.perf_counter() - started, info)


def _damage(info: PieceInfo, product: Product) -> DataError | None:
    if not info.damage:
        return None
    return DataError(
        info.damage, seen=product.source.display, fix="fetch it again and compare its checksum, or set on_error=skip"
    )


def as_data_error(error: Exception, source: Source) -> DataError:
    """Returns any error as one of its product: a bug met in one must neither stop the others nor be hidden."""
    if isinstance(error, DataError):
        return error
    place = traceback.extract_tb(error.__traceback__)[-1]
    return DataError(
        "an unexpected error, a bug in momo",
        seen=f"{source.display}: {type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})",
        fix="please report it with the product's name",
    )


def short_reason(error: MomoError, source: Source) -> str:
    """Returns an error in one line without the product's own name, for lists that name the product already."""
    seen = "" if error.seen is None else str(error.seen)
    for name in (source.name, str(source.path)):
        seen = seen.replace(name, source.display)
    seen = seen.removeprefix(source.display).removeprefix(":").strip()
    return f"{error.what}: {seen}" if seen else error.what


def _cut_into(folder: Path, product: Product, settings: CutSettings) -> PieceInfo:
    size = settings.tile_size
    if min(product.width, product.height) < size:
        raise DataError(
            "the product is smaller than a tile",
            seen=f"{product.source.display}: {product.width} x {product.height} pixels",
            rule=f"both sides reach tile_size = {size}",
            fix="lower tile_size, or leave it out",
        )
    _bound_cache(product, size)
    encoding = choose_encoding(product)
    cutter = _Cutter(product, settings, encoding)
    with open(folder / "tiles.bin", "wb", buffering=1 << 20) as stream:
        damage = cutter.run(stream)
    if not cutter.seen_valid and not damage:
        raise no_valid_pixel(product)
    cutter.table.write(folder / "table.arrow")
    info = cutter.info(damage)
    info.sha256 = digest(product.files, product.source)
    write_info(folder, info)
    return info


def _bound_cache(product: Product, rows: int) -> None:
    """Gives GDAL's cache room for the blocks of one row of windows and no more, so memory does not grow with scenes."""
    with quiet_gdal():
        block_rows = open_product(product).GetRasterBand(product.band).GetBlockSize()[1]
    width = product.resampling.source_width if product.resampling else product.width
    needed = 2 * width * (rows + 2 * min(block_rows, 4096)) * np.dtype(product.dtype).itemsize
    gdal_module().SetCacheMax(min(max(needed, _CACHE_BYTES[0]), _CACHE_BYTES[1]))


def _read_strip(
    reader: RowReader, row: int, rows: int, height: int
) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Reads a strip; lost rows that go on beyond it are judged with the rows around and masked.

    Returns:
        Raw values, validity, and which rows were masked here.
    """
    raw_HW, valid_HW = reader.read(row, rows)
    if not holds_constant_row(raw_HW[[0, -1]], valid_HW[[0, -1]]):
        return raw_HW, valid_HW, np.zeros(rows, dtype=bool)
    top, bottom = max(0, row - _LOOK_AROUND), min(height, row + rows + _LOOK_AROUND)
    wide_HW, wide_valid_HW = reader.read(top, bottom - top)
    _, lost, _ = mask_dead_lines(wide_HW, wide_valid_HW)
    lost = lost[row - top : row - top + rows]
    return raw_HW, valid_HW & ~lost[:, None], lost


class _Cutter:
    """Cuts a product row by row of windows; at most one such row is in memory."""

    def __init__(self, product: Product, settings: CutSettings, encoding: Encoding) -> None:
        self.product, self.settings, self.encoding = product, settings, encoding
        self.table = PieceTable()
        self.dropped: Counter[str] = Counter()
        self.seen_valid = False
        self._tiles, self._offset, self._level, self._pixels = 0, 0, 0.0, 0
        self._sample: list[npt.NDArray[Any]] = []
        windows = max(1, window_count(product, settings))
        self._sample_size = max(SAMPLE_VALUES, _PRODUCT_SAMPLE // windows)
        self._saturated = encoding.stored_levels(product.saturation, none=_NONE)
        self._examples: dict[str, list[tuple[int, dict[str, Any]]]] = {}

    def run(self, stream: BinaryIO) -> str:
        """Writes all tiles; returns why it stopped early, or ""."""
        size, step = self.settings.tile_size, self.settings.step
        cols = list(starts(self.product.width, size, step))
        with quiet_gdal():
            reader = open_rows(self.product)
        for row in starts(self.product.height, size, step):
            try:
                with quiet_gdal():
                    raw_HW, valid_HW, lost_rows = _read_strip(reader, row, size, self.product.height)
            except DataError as error:
                # What was cut before the damage is good; the caller says that the product is not whole.
                return short_reason(error, self.product.source) if self._tiles else _raise(error)
            self._cut_row(raw_HW, valid_HW, lost_rows, row, cols, stream)
        return ""

    def _cut_row(
        self,
        raw_HW: npt.NDArray[Any],
        valid_HW: npt.NDArray[np.bool_],
        lost_rows: npt.NDArray[np.bool_],
        row: int,
        cols: list[int],
        stream: BinaryIO,
    ) -> None:
        size = self.settings.tile_size
        valid_HW, dead_rows, dead_cols = mask_dead_lines(raw_HW, valid_HW)
        dead_rows = dead_rows | lost_rows
        with quiet_gdal():
            places = place_windows(
                self.product, row, cols, size, order=self.settings.order, pixel_block=self.settings.pixel_block
            )
        whole = bool(valid_HW.all())
        rows_dead = int(dead_rows.sum())
        for number, col in enumerate(cols):
            raw, valid = raw_HW[:, col : col + size], valid_HW[:, col : col + size]
            share = 1.0 if whole else float(valid.mean())
            self.seen_valid = self.seen_valid or share > 0.0
            reason, note, measures, stored = self._judge(raw, valid, share)
            lines = rows_dead + int(dead_cols[col : col + size].sum())
            limit = self.settings.quality["max_dead_lines"]
            if reason == KEPT and limit is not None and lines > limit:
                reason, note = "too many dead lines", f"{lines} lines"
            if reason == KEPT and places.start_N1[number] == places.start_N1[number + 1]:
                reason, note = OFF_MAP, ""
            self._remember_example(reason, note, row, col, raw, valid)
            if reason != KEPT:
                self.dropped[reason] += 1
                continue
            assert measures is not None and stored is not None
            self._keep(stored, valid, measures, row, col, lines, places, number, stream)

    def _judge(
        self, raw: npt.NDArray[Any], valid: npt.NDArray[np.bool_], share: float
    ) -> tuple[str, str, Measures | None, npt.NDArray[Any] | None]:
        """Returns the reason to drop a window, or KEPT, with what decided it."""
        if share < self.settings.quality["min_valid"]:
            return INVALID, f"valid {share:.2f}", None, None
        if is_constant(raw, valid):
            return CONSTANT, "", None, None
        stored = self.encoding(raw, valid, self.settings.dtype, whole=share == 1.0)
        measures = measure(stored, valid, self._saturated)
        for reason, name, limit, too_much in self._limits():
            value = getattr(measures, name)
            if limit is not None and (value > limit if too_much else value < limit):
                return reason, f"{name} {value:.2f}", None, None
        return KEPT, "", measures, stored

    def _limits(self) -> Iterator[tuple[str, str, float | None, bool]]:
        quality = self.settings.quality
        yield "little structure", "quality", quality["min_structure"], False
        yield "noisy", "noise", quality["max_noise"], True
        yield "blurred", "blur", quality["max_blur"], True
        yield "striped", "stripes", quality["max_stripes"], True
        yield "saturated", "saturation", quality["max_saturation"], True

    def _keep(
        self,
        stored: npt.NDArray[Any],
        valid: npt.NDArray[np.bool_],
        measures: Measures,
        row: int,
        col: int,
        lines: int,
        places: Places,
        number: int,
        stream: BinaryIO,
    ) -> None:
        tile = encode_tile(stored, self.settings.codec)
        mask = b"" if measures.valid_fraction == 1.0 else encode_mask(valid, self.settings.codec)
        stream.write(tile)
        stream.write(mask)
        values = value_sample(stored, valid, self._sample_size)
        self._sample.append(values)
        first, last = places.start_N1[number], places.start_N1[number + 1]
        self.table.add({
            "row": row, "col": col, "lon": places.lon_N[number], "lat": places.lat_N[number],
            "corners": places.corners_N8[number], "cell": places.cell_N[number],
            "touched": places.touched[first:last], "offset": self._offset, "tile_bytes": len(tile),
            "mask_bytes": len(mask), "valid_fraction": measures.valid_fraction, "quality": measures.quality,
            "noise": measures.noise, "blur": measures.blur, "stripes": measures.stripes,
            "saturation": measures.saturation, "dead_lines": lines, "stored_mean": measures.stored_mean,
            "stored_std": measures.stored_std, "stored_min": measures.stored_min, "stored_max": measures.stored_max,
            "phash": measures.phash, "sample": values[:: max(1, -(-values.size // SAMPLE_VALUES))].copy(),
        })  # fmt: skip
        self._offset += len(tile) + len(mask)
        self._tiles += 1
        pixels = round(measures.valid_fraction * stored.size)
        self._level += measures.stored_mean * pixels
        self._pixels += pixels

    def _remember_example(
        self, reason: str, note: str, row: int, col: int, raw: npt.NDArray[Any], valid: npt.NDArray[np.bool_]
    ) -> None:
        """Keeps the examples of smallest priority, so that they do not depend on the order of windows."""
        heap = self._examples.setdefault(reason, [])
        priority = -key_priority(f"{row} {col}")
        if len(heap) >= _EXAMPLES and priority <= heap[0][0]:
            return
        # Thumbnails are made in the stored scale of a float product, where special values are out already.
        stored = self.encoding(raw, valid, "uint16") if raw.dtype.kind == "f" else raw
        small_HW = thumbnail(stored, valid)
        nearest = (np.arange(small_HW.shape[0]) + 0.5) * valid.shape[0] / small_HW.shape[0]
        small_valid_HW = valid[np.ix_(nearest.astype(int), nearest.astype(int))]
        item = (priority, example_to_dict(Example(reason, "", small_HW, small_valid_HW, note), row, col))
        if len(heap) < _EXAMPLES:
            heapq.heappush(heap, item)
        else:
            heapq.heapreplace(heap, item)

    def info(self, damage: str) -> PieceInfo:
        """Returns what is known when all windows were seen."""
        encoding = self.encoding
        physical = None
        if self._sample:
            stored = np.percentile(np.concatenate(self._sample), [1.0, 99.0])
            physical = sorted(float(value) * encoding.scale + encoding.offset_value for value in stored)
        mean = self._level / self._pixels * encoding.scale + encoding.offset_value if self._pixels else None
        return PieceInfo(
            tiles=self._tiles,
            windows=self._tiles + self.dropped.total(),
            dropped=dict(sorted(self.dropped.items())),
            bytes_read=self.product.width * self.product.height * np.dtype(self.product.dtype).itemsize,
            scale=encoding.scale,
            offset_value=encoding.offset_value,
            max_rounding_error=encoding.max_error,
            percentile_low=physical[0] if physical else None,
            percentile_high=physical[1] if physical else None,
            mean=mean,
            damage=damage,
            notes=[note for note in (*self.product.notes, encoding.note) if note],
            examples=[
                item for reason in sorted(self._examples) for _, item in sorted(self._examples[reason], key=_first)
            ],
        )


def _first(item: tuple[int, dict[str, Any]]) -> int:
    return item[0]


def _raise(error: DataError) -> str:
    raise error
