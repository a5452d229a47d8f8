"""Which raw values are measurements, and which of them are saturated."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from momo.extras import require

from .labels import Label

# Range of ISIS pixels that are measurements; outside lie NULL, LRS, LIS, HIS and HRS (USGS ISIS, SpecialPixel.h):
# 8-bit 0 and 255; unsigned 16-bit 0, 1, 2, 65534, 65535; signed 16-bit -32768..-32764.
_ISIS_VALID = {"uint8": (1, 254), "uint16": (3, 65522), "int16": (-32752, 32767)}
# Real ISIS special pixels are the float32 bit patterns FF7FFFFB..FF7FFFFF; FF7FFFFA is the smallest measurement.
ISIS_VALID_MIN4 = float(np.frombuffer(bytes.fromhex("FF7FFFFA"), dtype=">f4")[0])


@dataclass(frozen=True)
class Validity:
    """Which pixels are measurements.

    Attributes:
        special: Values that are no measurement.
        minimum: Smallest measurement.
        maximum: Largest measurement.
        mask_band: Ask GDAL's mask band too (alpha, PDS4 special constants, per-dataset masks).
    """

    special: tuple[float, ...] = ()
    minimum: float = -math.inf
    maximum: float = math.inf
    mask_band: bool = False

    def __call__(self, raw_HW: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        """Returns True where `raw_HW` holds a measurement, GDAL's mask band aside."""
        valid = np.isfinite(raw_HW) if raw_HW.dtype.kind == "f" else np.ones(raw_HW.shape, dtype=bool)
        if self.minimum > -math.inf:
            valid &= raw_HW >= self.minimum
        if self.maximum < math.inf:
            valid &= raw_HW <= self.maximum
        for value in self.special:
            if not math.isnan(value):
                valid &= raw_HW != (raw_HW.dtype.type(value) if raw_HW.dtype.kind == "f" else value)
        return valid


def read_validity(
    dataset: Any, band: Any, dtype: str, label: Label, nodata: list[float] | None
) -> tuple[Validity, list[str]]:
    """Decides which values of a band are measurements, from the label, GDAL and the user.

    Args:
        dataset: The product as GDAL opened it (its driver and masks count).
        band: The band.
        dtype: numpy name of its pixel type.
        label: The product's label.
        nodata: Values that mean no data instead of the declared ones; None trusts the file.

    Returns:
        The rule, and notes where label and GDAL differ.
    """
    gdal = require("osgeo.gdal", "prep")
    notes: list[str] = []
    flags, declared = band.GetMaskFlags(), band.GetNoDataValue()
    is_isis = dataset.GetDriver().ShortName == "ISIS3"
    minimum, maximum = _ISIS_VALID.get(dtype, (-math.inf, math.inf)) if is_isis else (-math.inf, math.inf)
    if dtype.startswith("float"):
        minimum = max(minimum, ISIS_VALID_MIN4)
    if nodata is not None:
        special = tuple(nodata)
        mask_band = bool(flags & (gdal.GMF_ALPHA | gdal.GMF_PER_DATASET)) and not flags & gdal.GMF_NODATA
        return Validity(special, minimum, maximum, mask_band), notes
    special = label.special or (() if declared is None else (float(declared),))
    if label.special and declared is not None and not _names(label.special, float(declared), dtype):
        notes.append(f"no-data is {_values(label.special)} by the label, not {declared:g} as GDAL reads it")
    minimum = max(minimum, -math.inf if label.minimum is None else label.minimum)
    maximum = min(maximum, math.inf if label.maximum is None else label.maximum)
    mask_band = not is_isis and flags not in (gdal.GMF_ALL_VALID, gdal.GMF_NODATA)
    return Validity(special, minimum, maximum, mask_band), notes


def _names(special: tuple[float, ...], value: float, dtype: str) -> bool:
    kind = np.dtype(dtype)
    return value in special or (kind.kind == "f" and kind.type(value) in [kind.type(v) for v in special])


def _values(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def saturation_levels(band: Any, dtype: str, label: Label, validity: Validity) -> tuple[float, float]:
    """Returns the raw levels at and beyond which a valid pixel counts as saturated, low and high.

    They are the limits of the pixel type, narrowed by the bits in use (`SAMPLE_BIT_MASK` of the label, `NBITS` of
    JPEG 2000 and TIFF) and by the label's valid range. A limit that `validity` excludes gives -inf or inf: its
    pixels are masked already. Floating-point products have none.
    """
    kind = np.dtype(dtype)
    if kind.kind not in "iu":
        return -math.inf, math.inf
    low, high = float(np.iinfo(kind).min), float(np.iinfo(kind).max)
    bits = label.bits or int(band.GetMetadataItem("NBITS", "IMAGE_STRUCTURE") or 0)
    if 0 < bits < 8 * kind.itemsize and kind.kind == "u":
        high = float(2**bits - 1)
    low = max(low, -math.inf if label.minimum is None else label.minimum)
    high = min(high, math.inf if label.maximum is None else label.maximum)
    inside = [validity.minimum <= value <= validity.maximum and value not in validity.special for value in (low, high)]
    return (low if inside[0] else -math.inf), (high if inside[1] else math.inf)
