"""Products on a grid of another GSD, by GDAL's warper, and reading rows of native and resampled products alike.

The new grid shares the first corner, the axes and the CRS with the product's own: only the scale differs. So all is
done in pixel space, exactly, and products without a map projection can be resampled too.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from momo.errors import DataError

from .dead_lines import LINES_BEYOND, holds_constant_row, mask_dead_lines
from .products import Product, Validity, gdal_module, open_product, quiet_gdal, read_window

# Kernel -> GDAL's name and its reach beyond the new pixel, in pixels of the coarser grid.
_KERNELS = {
    "nearest": ("near", 0),
    "bilinear": ("bilinear", 1),
    "cubic": ("cubic", 2),
    "lanczos": ("lanczos", 3),
    "average": ("average", 0),
}
_SAME = 1e-3
_MOST_ENLARGED = 16.0
_LARGEST_SIDE = 2**31 - 1
_BLOCK_ROWS = 64
_BLOCK_BYTES = 32 * 2**20
_LEAST_SHARE = 0.5 - 1e-6
_LONGEST_RUN = 256
_LEAST_ROWS = 64
_MOST_SOURCE_PIXELS = 2**24
_OUTER_ROWS = (slice(None, LINES_BEYOND), slice(-LINES_BEYOND, None))

Array = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Resampling:
    """The grid a product is read on instead of its own.

    Attributes:
        gsd_m: Metres a pixel.
        kernel: nearest, bilinear, cubic, lanczos or average (GDAL's warp kernels).
        source_width: Columns of the product's own grid.
        source_height: Its lines.
    """

    gsd_m: float
    kernel: str
    source_width: int
    source_height: int


def resampled(product: Product, gsd_m: float, kernel: str) -> Product:
    """Returns the product on a grid of `gsd_m` metres a pixel; nothing is read.

    Both axes are scaled by `gsd_m` over the product's nominal GSD. A last row or column of the new grid that the
    product fills only in part is left out.

    Args:
        product: A product on its own grid.
        gsd_m: Metres a pixel of the new grid.
        kernel: nearest, bilinear, cubic, lanczos or average.

    Returns:
        The product with the new width, height, geotransform and GSD; itself when the GSD differs by less than 0.1 %.

    Raises:
        DataError: The product has no GSD or is resampled already, or the new grid is absurd, or so coarse that one of
            its pixels would need more than 16 million of the product.
    """
    shown = product.source.display
    if product.resampling is not None:
        raise DataError("a product is resampled twice", seen=shown, rule="resample from its own grid")
    if not (math.isfinite(product.gsd_m) and product.gsd_m > 0):
        raise DataError(
            "a product cannot be resampled without its GSD",
            seen=f"{shown}: no map projection, and no GSD in its label",
            fix="set `gsd_m`, or a rule for this product, or leave it out",
        )
    factor = gsd_m / product.gsd_m
    if abs(factor - 1.0) < _SAME:
        return product
    too_fine = factor * _MOST_ENLARGED < 1.0 - 1e-9
    # The small term lets a whole ratio such as 18 m / 6 m keep its last pixel in spite of rounding.
    width, height = (0 if too_fine else math.floor(side / factor + 1e-6) for side in (product.width, product.height))
    if too_fine or not 1 <= min(width, height) <= max(width, height) <= _LARGEST_SIDE:
        raise DataError(
            "the product cannot be resampled to this GSD",
            seen=f"{shown}: {product.width} x {product.height} pixels of {product.gsd_m:g} m to {gsd_m:g} m",
            rule="enlarged at most 16 times, and 1 to 2147483647 pixels a side",
            fix="set another resample.gsd_m, or leave the product out",
        )
    reach = math.ceil(factor) + 2 * _margin(kernel, factor)
    if min(reach, product.width) * min(reach, product.height) > _MOST_SOURCE_PIXELS:
        raise DataError(
            "one pixel of the new grid is made from too many of the product",
            seen=f"{shown}: {reach} x {reach} pixels of {product.gsd_m:g} m to one of {gsd_m:g} m by {kernel}",
            rule=f"at most {_MOST_SOURCE_PIXELS} pixels, so that memory is bounded",
            fix="set a finer resample.gsd_m, or resample.kernel=average, which needs the fewest",
        )
    transform = product.georeference.transform
    if transform is not None:
        x0, a, b, y0, d, e = transform
        transform = (x0, a * factor, b * factor, y0, d * factor, e * factor)
    return dataclasses.replace(
        product,
        width=width,
        height=height,
        georeference=dataclasses.replace(product.georeference, transform=transform),
        gsd_m=gsd_m,
        native_gsd_m=product.gsd_m,
        resampling=Resampling(gsd_m, kernel, product.width, product.height),
    )


def _margin(kernel: str, factor: float) -> int:
    """Returns how many source pixels around a new one its value may depend on."""
    return math.ceil(_KERNELS[kernel][1] * max(1.0, factor)) + 2


class RowReader(Protocol):
    """Reads rows over the full width of a product."""

    def read(self, row: int, rows: int) -> tuple[Array, Mask]:
        """Returns rows `row` to `row + rows - 1`, all inside the product.

        Returns:
            Raw values of shape (rows, width) in the product's dtype, and True where they are measurements. They do
            not depend on what was read before, nor on how the rows are divided among calls.

        Raises:
            DataError: The product is damaged there.
        """


def open_rows(product: Product) -> RowReader:
    """Opens a product for reading rows, on its own grid or resampled.

    Memory is bounded by the rows asked for and, when resampled, by blocks of about 32 MiB of source pixels.

    Raises:
        DataError: The file is gone or cannot be opened any more.
    """
    with quiet_gdal():
        dataset = open_product(product)
    return _NativeRows(product, dataset) if product.resampling is None else _ResampledRows(product, dataset)


class _NativeRows:
    def __init__(self, product: Product, dataset: Any) -> None:
        self._product, self._dataset = product, dataset

    def read(self, row: int, rows: int) -> tuple[Array, Mask]:
        with quiet_gdal():
            return read_window(self._dataset, self._product, 0, row, self._product.width, rows)


class _ResampledRows:
    """Rows of a resampled product.

    The new grid is divided into blocks that depend on the product alone. A block is warped by itself, from its
    source pixels and a margin that covers the kernel, so no pixel depends on how rows are asked for. GDAL's kernels
    leave invalid pixels out and divide by the weight that remains. A new pixel is valid where GDAL gives a value and
    at least half of its area is measured (nearest: where its one source pixel is). Dead lines of a block are masked
    before: afterwards they could no longer be told from dark ground. For that up to 256 rows more are looked at where
    lost rows may go on beyond the block, and 64 in all, so that dead lines are told wherever the block begins.
    """

    def __init__(self, product: Product, dataset: Any) -> None:
        assert product.resampling is not None
        self._product, self._dataset, self._grid = product, dataset, product.resampling
        self._factor = product.gsd_m / product.native_gsd_m
        self._kernel = _KERNELS[product.resampling.kernel][0]
        self._margin = _margin(product.resampling.kernel, self._factor)
        needs_double = product.dtype in ("int32", "uint32", "float64")
        self._kind = np.dtype(np.float64 if needs_double else np.float32)
        self._rows, self._cols = self._block_shape()
        self._kept: dict[int, tuple[Array, Mask]] = {}

    def _block_shape(self) -> tuple[int, int]:
        """Returns rows and columns of a block: the full width if 1 row of it fits, else as many columns as do."""

        def source(length: int) -> float:
            return length * self._factor + 2 * self._margin

        pixels = _BLOCK_BYTES / self._kind.itemsize
        rows = (pixels / min(source(self._product.width), self._grid.source_width) - 2 * self._margin) / self._factor
        # Enlarged, a block is larger in the new grid than in the source, so that it is the new grid that counts.
        rows = max(1, min(int(rows), _BLOCK_ROWS, int(pixels / self._product.width)))
        cols = (pixels / min(source(rows), self._grid.source_height) - 2 * self._margin) / self._factor
        return rows, max(1, min(int(cols), self._product.width))

    def read(self, row: int, rows: int) -> tuple[Array, Mask]:
        blocks: dict[int, tuple[Array, Mask]] = {}
        parts = []
        for number in range(row // self._rows, (row + rows - 1) // self._rows + 1):
            blocks[number] = self._kept[number] if number in self._kept else self._block(number)
            first = number * self._rows
            parts.append([array[max(0, row - first) : row + rows - first] for array in blocks[number]])
        self._kept = blocks
        raw, valid = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return raw, valid

    def _block(self, number: int) -> tuple[Array, Mask]:
        rows = (number * self._rows, min((number + 1) * self._rows, self._product.height))
        starts = range(0, self._product.width, self._cols)
        parts = [self._part(rows, (col, min(col + self._cols, self._product.width))) for col in starts]
        raw, valid = (np.concatenate(arrays, axis=1) for arrays in zip(*parts, strict=True))
        return raw, valid

    def _part(self, rows: tuple[int, int], cols: tuple[int, int]) -> tuple[Array, Mask]:
        top, bottom = self._source_span(rows, self._grid.source_height)
        left, right = self._source_span(cols, self._grid.source_width, LINES_BEYOND)
        shape = (rows[1] - rows[0], cols[1] - cols[0])
        with quiet_gdal():
            raw, valid = self._source_rows((top, bottom), (left, right))
            if not valid.any():
                return np.zeros(shape, dtype=self._product.dtype), np.zeros(shape, dtype=bool)
            whole = bool(valid.all())
            value = raw.astype(self._kind)
            if not whole:
                value[~valid] = np.nan
            places = (left, top), (cols[0] * self._factor, rows[0] * self._factor)
            new = self._warp(value, places, shape, self._kernel, holes=not whole)
            good = np.isfinite(new)
            if not whole and self._kernel != "near":
                share = self._warp(valid.astype(np.float32), places, shape, "average", holes=False)
                good &= share >= _LEAST_SHARE
        return as_levels(new, good, self._product.validity, np.dtype(self._product.dtype))

    def _source_span(self, span: tuple[int, int], length: int, more: int = 0) -> tuple[int, int]:
        first, stop, margin = span[0] * self._factor, span[1] * self._factor, self._margin + more
        return max(0, math.floor(first) - margin), min(length, math.ceil(stop) + margin)

    def _source_rows(self, rows: tuple[int, int], cols: tuple[int, int]) -> tuple[Array, Mask]:
        """Returns source pixels, dead lines invalid."""

        def read(first: int, stop: int) -> tuple[Array, Mask]:
            return read_window(self._dataset, self._product, cols[0], first, cols[1] - cols[0], stop - first)

        (top, bottom), (raw, valid) = rows, read(*rows)
        more = min(_LONGEST_RUN, int(_BLOCK_BYTES / self._kind.itemsize / (cols[1] - cols[0])))
        few = min(more, max(0, _LEAST_ROWS - (bottom - top)))
        wanted = [more if holds_constant_row(raw[s], valid[s]) else few for s in _OUTER_ROWS]
        above, below = min(top, wanted[0]), min(self._grid.source_height - bottom, wanted[1])
        parts = [(raw, valid)]
        if above:
            parts.insert(0, read(top - above, top))
        if below:
            parts.append(read(bottom, bottom + below))
        if len(parts) == 1:
            return raw, mask_dead_lines(raw, valid)[0]
        wide_raw, wide_valid = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return raw, mask_dead_lines(wide_raw, wide_valid)[0][above : above + bottom - top]

    def _warp(
        self,
        source_HW: Array,
        places: tuple[tuple[float, float], tuple[float, float]],
        shape: tuple[int, int],
        kernel: str,
        *,
        holes: bool,
    ) -> Array:
        """Warps an array whose first pixel lies at places[0] (col, row) to one at places[1], both in source pixels."""
        gdal, factor = gdal_module(), self._factor
        source = _in_memory(source_HW, (*places[0], 1.0))
        target = _in_memory(np.full(shape, np.nan, dtype=source_HW.dtype), (*places[1], factor))
        holed = {"srcNodata": "nan", "dstNodata": "nan"} if holes else {}
        # A fixed scale, an exact transformer, one chunk, one thread: GDAL must not choose by the shape of a block.
        options = [f"XSCALE={1 / factor!r}", f"YSCALE={1 / factor!r}", "INIT_DEST=NO_DATA", "NUM_THREADS=1"]
        if not holes:
            options[2] = "INIT_DEST=nan"
        try:
            gdal.Warp(
                target, source, resampleAlg=kernel, errorThreshold=0, warpOptions=options, multithread=False,
                warpMemoryLimit=2048, **holed,
            )  # fmt: skip
            return np.asarray(target.ReadAsArray())
        except RuntimeError as error:
            raise DataError(
                "GDAL cannot resample the product",
                seen=f"{self._product.source.display}: {' '.join(str(error).split())}",
                fix="set another resample.kernel, or set on_error=skip",
            ) from None


def _in_memory(values_HW: Array, place: tuple[float, float, float]) -> Any:
    gdal = gdal_module()
    kind = gdal.GDT_Float64 if values_HW.dtype == np.float64 else gdal.GDT_Float32
    dataset = gdal.GetDriverByName("MEM").Create("", values_HW.shape[1], values_HW.shape[0], 1, kind)
    col, row, scale = place
    # Rows counted downward: GDAL takes (0, 1, 0, 0, 0, 1) for no geotransform at all.
    dataset.SetGeoTransform((col, scale, 0.0, -row, 0.0, -scale))
    dataset.GetRasterBand(1).WriteArray(values_HW)
    return dataset


def as_levels(
    value_HW: npt.NDArray[np.floating[Any]], valid_HW: Mask, validity: Validity, dtype: np.dtype[Any]
) -> tuple[Array, Mask]:
    """Returns interpolated values in a product's own type, none of them one that means no measurement.

    Args:
        value_HW: Interpolated raw values; anything where invalid.
        valid_HW: True where they are measurements.
        validity: Which raw values are measurements.
        dtype: The product's type. Integers are rounded, halves to even.

    Returns:
        Values of that type, 0 where invalid, clipped to the range of the type and of `validity`; a special value is
        replaced by the nearest level that is a measurement. And the validity, less pixels without such a level.
    """
    low, high = _limits(validity, dtype)
    value_HW = np.where(valid_HW, value_HW, value_HW.dtype.type(0))
    raw_HW = np.clip(np.rint(value_HW) if dtype.kind in "iu" else value_HW, low, high).astype(dtype)
    for special in dict.fromkeys(_of_type(validity.special, dtype)):
        hit_HW = valid_HW & (raw_HW == special)
        if not hit_HW.any():
            continue
        below, above = (_next_level(special, step, validity, dtype) for step in (-1, 1))
        if below is None and above is None:
            valid_HW = valid_HW & ~hit_HW
        elif below is None or above is None:
            raw_HW[hit_HW] = above if below is None else below
        else:
            value = value_HW[hit_HW].astype(np.float64)
            raw_HW[hit_HW] = np.where(value - float(below) <= float(above) - value, below, above).astype(dtype)
    raw_HW[~valid_HW] = 0
    return raw_HW, valid_HW


def _limits(validity: Validity, dtype: np.dtype[Any]) -> tuple[float, float]:
    if dtype.kind == "f":
        return validity.minimum, validity.maximum
    info = np.iinfo(dtype)
    low = info.min if validity.minimum < info.min else math.ceil(validity.minimum)
    high = info.max if validity.maximum > info.max else math.floor(validity.maximum)
    return low, high


def _of_type(values: Iterable[float], dtype: np.dtype[Any]) -> list[Any]:
    """Returns those of the special values that a pixel of this type can have."""
    if dtype.kind == "f":
        return [dtype.type(value) for value in values if not math.isnan(value)]
    info = np.iinfo(dtype)
    return [int(value) for value in values if info.min <= value <= info.max and float(value).is_integer()]


def _next_level(special: Any, step: int, validity: Validity, dtype: np.dtype[Any]) -> Any | None:
    """Returns the nearest measurement below (step -1) or above (1) a special value, or None."""
    low, high = _limits(validity, dtype)
    taken, level = _of_type(validity.special, dtype), special
    while True:
        level = np.nextafter(level, dtype.type(step * math.inf)) if dtype.kind == "f" else level + step
        if not (low <= level <= high and math.isfinite(level)):
            return None
        if level not in taken:
            return level
