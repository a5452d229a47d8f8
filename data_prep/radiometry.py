"""From a product's pixel type to the 8 or 16 bits that are stored, with the way back in scale and offset.

uint8 and uint16 are stored as they are, int16 is shifted by 32768, all exactly. Other types are quantised to 16
bits, linearly over the valid range of the product; the largest error is half a step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from momo.errors import DataError

from .products import Product, open_product, quiet_gdal, read_window

_EXACT = {"uint8": 0, "uint16": 0, "int16": -32768}
_LEVELS = 65535
_ROWS = 256
_SAMPLE = 1024
# Fewer levels than this between the 1st and 99th percentile mean that a few outliers rule the range.
_FEW_LEVELS = 256


@dataclass(frozen=True)
class Encoding:
    """How raw values become stored values: stored = round((raw - low) / step).

    Attributes:
        dtype: `uint8` or `uint16`.
        low: Raw value stored as 0.
        step: Raw difference of one stored level.
        scale: Physical value = stored value * scale + offset_value.
        offset_value: See `scale`.
        max_error: Largest rounding error in physical units; 0 when exact.
        note: A line for the user when the range is ruled by outliers, else "".
    """

    dtype: str
    low: float
    step: float
    scale: float
    offset_value: float
    max_error: float = 0.0
    note: str = ""

    def __call__(
        self, raw_HW: npt.NDArray[Any], valid_HW: npt.NDArray[np.bool_], dtype: str, *, whole: bool = False
    ) -> npt.NDArray[Any]:
        """Returns stored values of the given dtype, contiguous, 0 where invalid.

        Args:
            raw_HW: Raw values.
            valid_HW: True where measured.
            dtype: `uint8` or `uint16`.
            whole: True when the caller knows that every pixel is valid; saves time.
        """
        if whole and self.low == 0 and self.step == 1.0 and raw_HW.dtype.kind == "u":
            return np.ascontiguousarray(raw_HW).astype(dtype, copy=False)
        raw = np.where(valid_HW, raw_HW, raw_HW.dtype.type(0))
        if self.step == 1.0 and raw.dtype.kind in "iu":
            stored = raw.astype(np.int64) - int(self.low)
        else:
            stored = np.clip(np.rint((raw.astype(np.float64) - self.low) / self.step), 0, _LEVELS)
        return np.where(valid_HW, stored, 0).astype(dtype)

    def stored_levels(self, saturation: tuple[float, float], none: tuple[int, int]) -> tuple[int, int]:
        """Returns raw saturation levels as stored levels; an infinite one gives that of `none`."""
        low, high = ((raw - self.low) / self.step if math.isfinite(raw) else raw for raw in saturation)
        return (
            math.floor(low) if math.isfinite(low) else none[0],
            math.ceil(high) if math.isfinite(high) else none[1],
        )


def choose_encoding(product: Product) -> Encoding:
    """Chooses the encoding of a product; reads its pixels, window by window, only when they must be quantised.

    Raises:
        DataError: The product is damaged, or has no valid pixel (seen only when it is read here).
    """
    if product.dtype in _EXACT:
        low = _EXACT[product.dtype]
        dtype = "uint8" if product.dtype == "uint8" else "uint16"
        return Encoding(dtype, low, 1.0, product.scale, product.scale * low + product.offset_value)
    low_value, high, bulk = _valid_range(product)
    whole = product.dtype.startswith(("int", "uint")) and high - low_value <= _LEVELS
    step = 1.0 if whole or high == low_value else (high - low_value) / _LEVELS
    note = ""
    if not whole and bulk < step * _FEW_LEVELS and high > low_value:
        note = (
            f"16 bits are coarse here: values {low_value:g} to {high:g}, but 98 % of them within {bulk:g}; "
            "a few outliers rule the range, check `nodata`"
        )
    return Encoding(
        "uint16",
        low_value,
        step,
        product.scale * step,
        product.scale * low_value + product.offset_value,
        0.0 if whole or high == low_value else abs(product.scale) * step / 2,
        note,
    )


def no_valid_pixel(product: Product) -> DataError:
    """Returns the error for a product that holds no measurement."""
    return DataError(
        "the product has no valid pixel",
        seen=product.source,
        rule="some pixel is neither no-data nor a special value",
        fix="check `nodata`, or set on_error=skip",
    )


def _valid_range(product: Product) -> tuple[float, float, float]:
    """Returns smallest and largest valid raw value and the distance of the 1st to the 99th percentile.

    Reads by rows of bounded memory; the percentiles are those of an evenly strided sample.
    """
    low, high = math.inf, -math.inf
    sample: list[npt.NDArray[np.float64]] = []
    with quiet_gdal():
        dataset = open_product(product)
        for row in range(0, product.height, _ROWS):
            raw, valid = read_window(dataset, product, 0, row, product.width, min(_ROWS, product.height - row))
            values = raw[valid].astype(np.float64)
            if values.size:
                low, high = min(low, float(values.min())), max(high, float(values.max()))
                sample.append(values[:: max(1, values.size // _SAMPLE)])
    if not sample:
        raise no_valid_pixel(product)
    first, last = np.percentile(np.concatenate(sample), [1, 99])
    return low, high, float(last - first)
