"""Opening raw products with GDAL: what they are, which pixels are measurements, and windowed reading.

A `Product` is plain data, so it can travel to another process and be opened there again.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import numpy as np
import numpy.typing as npt

from momo.errors import DataError
from momo.extras import require
from momo.sensors import sensor_from_instrument

from .georeference import Georeference, read_georeference
from .labels import Label, LineLayout, read_label

_NUMPY = {
    "Byte": "uint8", "Int8": "int8", "UInt16": "uint16", "Int16": "int16", "UInt32": "uint32", "Int32": "int32",
    "Float32": "float32", "Float64": "float64",
}  # fmt: skip
# Range of ISIS pixels that are measurements; outside lie NULL, LRS, LIS, HIS and HRS (USGS ISIS, SpecialPixel.h):
# 8-bit 0 and 255; unsigned 16-bit 0, 1, 2, 65534, 65535; signed 16-bit -32768..-32764.
_ISIS_VALID = {"uint8": (1, 254), "uint16": (3, 65522), "int16": (-32752, 32767)}
# Real ISIS special pixels are the float32 bit patterns FF7FFFFB..FF7FFFFF; FF7FFFFA is the smallest measurement.
_ISIS_VALID_MIN4 = float(np.frombuffer(bytes.fromhex("FF7FFFFA"), dtype=">f4")[0])


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


@dataclass(frozen=True)
class Product:
    """One band of one raw product.

    Attributes:
        name: What GDAL opens.
        source: The file given by the user.
        files: All files the product consists of.
        product_id: From the label, else the file stem; made unique in a corpus.
        instrument: As the label spells it, or "".
        driver: GDAL's short name of the format.
        band: Band number, from 1.
        width: Columns.
        height: Lines.
        dtype: numpy name of the pixel type.
        scale: Physical value = raw value * scale + offset_value (from the file).
        offset_value: See `scale`.
        validity: Which pixels are measurements.
        georeference: Where the pixels lie.
        gsd_m: Ground sample distance in metres, NaN when unknown.
        licence: SPDX identifier.
        lines: Line layout, when GDAL's own reading is sheared and the product is read through a raw VRT.
        notes: Traps met and mended.
    """

    name: str
    source: Path
    files: tuple[str, ...]
    product_id: str
    instrument: str
    driver: str
    band: int
    width: int
    height: int
    dtype: str
    scale: float
    offset_value: float
    validity: Validity
    georeference: Georeference
    gsd_m: float
    licence: str
    lines: LineLayout | None = None
    notes: tuple[str, ...] = field(default_factory=tuple)

    @property
    def sensor(self) -> str | None:
        """Sensor that the label's instrument means, or None."""
        sensor = sensor_from_instrument(self.instrument) if self.instrument else None
        return sensor.name if sensor else None

    @property
    def key(self) -> str:
        """Product id with only the characters that tile keys may have."""
        return re.sub(r"[^A-Za-z0-9_-]+", "-", self.product_id).strip("-") or "product"


def gdal_module() -> Any:
    """Returns GDAL with exceptions switched on.

    Raises:
        ConfigError: GDAL is not installed.
    """
    gdal = require("osgeo.gdal", "prep")
    gdal.UseExceptions()
    return gdal


@contextlib.contextmanager
def quiet_gdal() -> Iterator[list[str]]:
    """Collects GDAL's and PROJ's warnings instead of printing them."""
    gdal, messages = gdal_module(), []
    gdal.PushErrorHandler(lambda level, number, text: messages.append(" ".join(text.split())))
    try:
        yield messages
    finally:
        gdal.PopErrorHandler()


def inspect(
    source: Path, *, band: int = 1, nodata: list[float] | None = None, gsd_m: float | None = None,
    licence: str = "unknown",
) -> Product:  # fmt: skip
    """Reads everything about a product except its pixels.

    Args:
        source: The file, or the detached label that names it.
        band: Band number, from 1.
        nodata: Values that mean no data instead of those the file declares; None trusts the file.
        gsd_m: Metres a pixel, used where the file has no georeference.
        licence: SPDX identifier.

    Raises:
        DataError: The file is missing or unreadable, has no such band or an unusable CRS, or is not on Mars.
    """
    name = f"/vsigzip/{source.resolve()}" if source.suffix.lower() == ".gz" else str(source)
    with quiet_gdal() as messages:
        dataset = _open(source, name)
        pixels = _band(dataset, source, band)
        dtype = _NUMPY[gdal_module().GetDataTypeName(pixels.DataType)]
        label = read_label(dataset)
        georeference, moved = read_georeference(dataset, source.name, messages)
        lines, notes = _mend_lines(dataset, name, label)
        validity, more = _validity(dataset, pixels, dtype, label, nodata)
        own_gsd = georeference.gsd_m
        return Product(
            name=name,
            source=source,
            files=tuple(dataset.GetFileList() or [name]),
            product_id=label.product_id or _stem(source),
            instrument=label.instrument,
            driver=dataset.GetDriver().ShortName,
            band=band,
            width=dataset.RasterXSize,
            height=dataset.RasterYSize,
            dtype=dtype,
            scale=1.0 if pixels.GetScale() is None else float(pixels.GetScale()),
            offset_value=0.0 if pixels.GetOffset() is None else float(pixels.GetOffset()),
            validity=validity,
            georeference=georeference,
            gsd_m=own_gsd if math.isfinite(own_gsd) else (gsd_m or math.nan),
            licence=licence,
            lines=lines,
            notes=(*notes, *moved, *more, *(f"GDAL says: {text}" for text in dict.fromkeys(messages))),
        )


def _stem(source: Path) -> str:
    return (source.with_suffix("") if source.suffix.lower() == ".gz" else source).stem


def _open(source: Path, name: str) -> Any:
    if not source.exists():
        raise DataError("a product does not exist", seen=source, fix="check `products`")
    try:
        return gdal_module().Open(name)
    except RuntimeError as error:
        raise DataError(
            "GDAL cannot open the product",
            seen=f"{source}: {' '.join(str(error).split())}",
            rule="an image in a format of this GDAL (gdalinfo --formats), whole, or its detached label",
            fix="check it with gdalinfo; for an .img with a .lbl or .xml beside it give the label",
        ) from None


def _band(dataset: Any, source: Path, number: int) -> Any:
    gdal = gdal_module()
    if number > dataset.RasterCount:
        raise DataError(
            "the product has no such band",
            seen=f"{source.name}: band {number} of {dataset.RasterCount}",
            fix="set `band`, or a rule for this product",
        )
    band = dataset.GetRasterBand(number)
    kind = gdal.GetDataTypeName(band.DataType)
    if kind not in _NUMPY or band.GetColorInterpretation() == gdal.GCI_PaletteIndex:
        raise DataError(
            "the pixels are no intensities",
            seen=f"{source.name}: {'palette indices' if kind in _NUMPY else kind}",
            rule="integers or real numbers that grow with brightness",
            fix="expand a palette with gdal_translate -expand gray",
        )
    return band


def _validity(
    dataset: Any, band: Any, dtype: str, label: Label, nodata: list[float] | None
) -> tuple[Validity, list[str]]:
    gdal, notes = gdal_module(), []
    flags, declared = band.GetMaskFlags(), band.GetNoDataValue()
    is_isis = dataset.GetDriver().ShortName == "ISIS3"
    minimum, maximum = _ISIS_VALID.get(dtype, (-math.inf, math.inf)) if is_isis else (-math.inf, math.inf)
    if dtype.startswith("float"):
        minimum = max(minimum, _ISIS_VALID_MIN4)
    if nodata is not None:
        special = tuple(nodata)
        mask_band = bool(flags & (gdal.GMF_ALPHA | gdal.GMF_PER_DATASET)) and not flags & gdal.GMF_NODATA
    else:
        special = label.special or (() if declared is None else (float(declared),))
        if label.special and declared is not None and float(declared) not in label.special:
            notes.append(f"no-data is {_values(label.special)} by the label, not {declared:g} as GDAL reads it")
        if label.minimum is not None:
            minimum = max(minimum, label.minimum)
        mask_band = not is_isis and flags not in (gdal.GMF_ALL_VALID, gdal.GMF_NODATA)
    return Validity(special, minimum, maximum, mask_band), notes


def _values(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _mend_lines(dataset: Any, name: str, label: Label) -> tuple[LineLayout | None, list[str]]:
    """Decides whether GDAL ignores the bytes before and after each line, by which reading is an image.

    Raises:
        DataError: The label cannot be right either: neither reading holds together.
    """
    if label.lines is None:
        return None, []
    note = f"each line has {label.lines.prefix} + {label.lines.suffix} extra bytes"
    if label.lines.start < 0 or dataset.RasterCount != 1 or name.startswith("/vsi"):
        raise _sheared(name, f"{note}, and the image is detached, compressed or has several bands")
    rows = min(256, dataset.RasterYSize)
    top = (dataset.RasterYSize - rows) // 2
    try:
        mended = gdal_open_raw(dataset, name, label.lines).ReadAsArray(0, top, dataset.RasterXSize, rows)
    except RuntimeError as error:
        raise _sheared(name, f"{note}: {' '.join(str(error).split())}") from None
    plain = dataset.ReadAsArray(0, top, dataset.RasterXSize, rows)
    if np.array_equal(plain, mended):
        return None, []
    jump_mended, jump_plain = (float(np.abs(np.diff(a.astype(np.float64), axis=0)).mean()) for a in (mended, plain))
    if jump_mended >= jump_plain:
        raise _sheared(
            name, f"{note}; read so, lines differ by {jump_mended:.4g} on average, without by {jump_plain:.4g}"
        )
    return label.lines, [
        f"{note}, not all skipped by GDAL: read with the label's line length "
        f"(neighbouring lines differ by {jump_mended:.4g} instead of {jump_plain:.4g})"
    ]


def _sheared(name: str, seen: str) -> DataError:
    return DataError(
        "the product would be read sheared",
        seen=f"{Path(name).name}: {seen}",
        rule="LINE_PREFIX_BYTES and LINE_SUFFIX_BYTES must be skipped",
        fix="convert it with ISIS (for example hi2isis) and give the cube",
    )


def gdal_open_raw(dataset: Any, name: str, lines: LineLayout) -> Any:
    """Opens a one-band raw image through a VRT that skips the bytes before and after each line."""
    gdal = gdal_module()
    kind = gdal.GetDataTypeName(dataset.GetRasterBand(1).DataType)
    sample = gdal.GetDataTypeSize(dataset.GetRasterBand(1).DataType) // 8
    order = "LSB" if "LSB" in _sample_type(dataset) or "PC_" in _sample_type(dataset) else "MSB"
    xml = (
        f'<VRTDataset rasterXSize="{dataset.RasterXSize}" rasterYSize="{dataset.RasterYSize}">'
        f'<VRTRasterBand dataType="{kind}" band="1" subClass="VRTRawRasterBand">'
        f'<SourceFilename relativetoVRT="0">{escape(str(Path(name).resolve()))}</SourceFilename>'
        f"<ImageOffset>{lines.start + lines.prefix}</ImageOffset><PixelOffset>{sample}</PixelOffset>"
        f"<LineOffset>{lines.prefix + dataset.RasterXSize * sample + lines.suffix}</LineOffset>"
        f"<ByteOrder>{order}</ByteOrder></VRTRasterBand></VRTDataset>"
    )
    # From GDAL 3.7 on raw bands in a VRT are refused unless their place is allowed; this VRT is our own.
    key = "GDAL_VRT_RAWRASTERBAND_ALLOWED_SOURCE"
    before = gdal.GetThreadLocalConfigOption(key)
    gdal.SetThreadLocalConfigOption(key, "ALL")
    try:
        return gdal.Open(xml)
    finally:
        gdal.SetThreadLocalConfigOption(key, before)


def _sample_type(dataset: Any) -> str:
    text = (dataset.GetMetadata_List("json:PDS") or [""])[0]
    found = re.search(r'"SAMPLE_TYPE"\s*:\s*"([A-Z_ ]+)"', text.partition('"IMAGE"')[2])
    return found.group(1) if found else ""


def open_product(product: Product) -> Any:
    """Opens the GDAL dataset that `read_window` reads from.

    Raises:
        DataError: The file is gone or cannot be opened any more.
    """
    dataset = _open(product.source, product.name)
    return gdal_open_raw(dataset, product.name, product.lines) if product.lines else dataset


def read_window(
    dataset: Any, product: Product, col: int, row: int, width: int, height: int
) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
    """Reads one window.

    Returns:
        Raw values of shape (height, width) in the product's dtype, and True where they are measurements.

    Raises:
        DataError: GDAL cannot read it (a truncated or damaged file).
    """
    band = dataset.GetRasterBand(product.band)
    try:
        raw_HW = band.ReadAsArray(col, row, width, height)
        valid_HW = product.validity(raw_HW)
        if product.validity.mask_band:
            valid_HW &= band.GetMaskBand().ReadAsArray(col, row, width, height) > 0
    except RuntimeError as error:
        raise DataError(
            "a product is damaged",
            seen=f"{product.source}: rows {row} to {row + height - 1}: {' '.join(str(error).split())}",
            fix="fetch it again and compare its checksum, or set on_error=skip",
        ) from None
    return raw_HW, valid_HW
