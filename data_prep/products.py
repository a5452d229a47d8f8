"""Opening raw products with GDAL: what they are, which pixels are measurements, and windowed reading.

A `Product` is plain data, so it can travel to another process and be opened there again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from momo.errors import DataError
from momo.extras import require
from momo.sensors import sensor_from_instrument

from .collar import find_collar
from .containers import check_container
from .georeference import Georeference, read_georeference
from .labels import read_label, readable_label
from .layout import check_layout
from .observation import Observation, read_observation
from .raw import RawLayout, open_raw
from .validity import Validity, read_validity, saturation_levels

if TYPE_CHECKING:
    from .resample import Resampling
    from .sources import Source

__all__ = ["Product", "Validity", "gdal_module", "inspect", "open_product", "quiet_gdal", "read_window"]

_NUMPY = {
    "Byte": "uint8", "Int8": "int8", "UInt16": "uint16", "Int16": "int16", "UInt32": "uint32", "Int32": "int32",
    "Float32": "float32", "Float64": "float64",
}  # fmt: skip
_JPEG2000 = ("JP2OpenJPEG", "JP2KAK", "JP2ECW", "JP2MrSID")


_CACHE_BYTES = 64 << 20


@dataclass(frozen=True)
class Product:
    """One band of one raw product.

    Attributes:
        name: What GDAL opens.
        source: What the user gave.
        files: All files the product consists of.
        product_id: From the user, the label or the file name; made unique in a corpus.
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
        native_gsd_m: The product's own, when `gsd_m` is that of a resampled grid.
        licence: SPDX identifier.
        observation: When and under which light it was taken.
        saturation: Raw levels at and beyond which a pixel is saturated, low and high; -inf, inf when none.
        lines: Layout of the file, when GDAL's own reading is wrong and the product is read through a raw VRT.
        resampling: The grid it is read on instead of its own, or None.
        notes: Traps met and mended.
    """

    name: str
    source: Source
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
    native_gsd_m: float = math.nan
    observation: Observation = field(default_factory=Observation)
    saturation: tuple[float, float] = (-math.inf, math.inf)
    lines: RawLayout | None = None
    resampling: Resampling | None = None
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
    # GDAL would write a `.properties` file beside a gzip file whose size is asked for: archives are not ours to write.
    gdal.SetConfigOption("CPL_VSIL_GZIP_WRITE_PROPERTIES", "NO")
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
    source: Source, *, band: int = 1, nodata: list[float] | None = None, gsd_m: float | None = None,
    licence: str = "unknown", collar: str = "auto", product_id: str | None = None, acquired: str | None = None,
) -> Product:  # fmt: skip
    """Reads everything about a product except its pixels, and checks its label against its bytes.

    Args:
        source: The file, URL or archive member, or the detached label that names it.
        band: Band number, from 1.
        nodata: Values that mean no data instead of those the file declares; None trusts the file.
        gsd_m: Metres a pixel, used where the file has no georeference.
        licence: SPDX identifier.
        collar: `auto` takes a border of zeros for no data where nothing else is declared; `off` does not.
        product_id: Product id instead of the label's.
        acquired: Acquisition time instead of the label's, ISO 8601.

    Raises:
        DataError: The file is missing, unreadable or shorter than its label says, label and file disagree, it has no
            such band or an unusable CRS, or is not on Mars.
    """
    gdal_module().SetCacheMax(_CACHE_BYTES)  # its default is 5 % of the machine's memory, in every worker
    with quiet_gdal() as messages, _readable(source), readable_label(source.display):
        checked = check_container(source.name)
        dataset = _open(source, source.name)
        driver = dataset.GetDriver().ShortName
        labelled = _with_label(dataset, source)
        label, observation = read_label(labelled), read_observation(labelled)
        georeference, moved = read_georeference(dataset, source.display, messages)
        opened = dataset
        _check_band(opened, source, band)
        lines, notes = check_layout(dataset, source.name, band)
        if lines:
            opened = open_raw(lines)
        pixels, dtype = _check_band(opened, source, band)
        validity, more = read_validity(dataset, pixels, dtype, label, nodata)
        validity, found = _without_collar(opened, band, dtype, validity, collar if nodata is None else "off")
        gsd, told = _gsd(georeference.gsd_m, gsd_m, observation.gsd_m)
        own = dataset.GetRasterBand(band)
        files = [*(dataset.GetFileList() or [source.name]), *(labelled.GetFileList() or [])]
        said = [f"GDAL says: {text}" for text in dict.fromkeys(messages)]
        return Product(
            name=source.name,
            source=source,
            files=tuple(dict.fromkeys(files)),
            product_id=product_id or label.product_id or _stem(source),
            instrument=label.instrument,
            driver=driver,
            band=band,
            width=opened.RasterXSize,
            height=opened.RasterYSize,
            dtype=dtype,
            scale=1.0 if own.GetScale() is None else float(own.GetScale()),
            offset_value=0.0 if own.GetOffset() is None else float(own.GetOffset()),
            validity=validity,
            georeference=georeference,
            gsd_m=gsd,
            native_gsd_m=gsd,
            licence=licence,
            observation=dataclasses.replace(observation, acquired=acquired) if acquired else observation,
            saturation=saturation_levels(own, dtype, label, validity),
            lines=lines,
            notes=(*checked, *notes, *moved, *more, *found, *told, *said),
        )


def _stem(source: Source) -> str:
    path = Path(source.display)
    return (path.with_suffix("") if path.suffix.lower() == ".gz" else path).stem


def _open(source: Source, name: str) -> Any:
    if source.path is not None and not source.path.exists():
        raise DataError("a product does not exist", seen=source.path, fix="check `products`")
    try:
        return gdal_module().Open(name)
    except RuntimeError as error:
        raise DataError(
            "GDAL cannot open the product",
            seen=f"{source.path or name}: {' '.join(str(error).split())}",
            rule="an image in a format of this GDAL (gdalinfo --formats), whole, or its detached label",
            fix="check it with gdalinfo; for an .img with a .lbl or .xml beside it give the label",
        ) from None


@contextlib.contextmanager
def _readable(source: Source) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise DataError(
            "a product is damaged",
            seen=f"{source.path or source.name}: {' '.join(str(error).split())}",
            fix="check it with gdalinfo; fetch it again and compare its checksum",
        ) from None


def _with_label(dataset: Any, source: Source) -> Any:
    """Returns the PDS3 label beside a JPEG 2000 file, opened, or the dataset itself."""
    if dataset.GetDriver().ShortName not in _JPEG2000 or source.path is None or source.name.startswith("/vsi"):
        return dataset
    for suffix in (".LBL", ".lbl"):
        path = source.path.with_suffix(suffix)
        if path.is_file():
            with contextlib.suppress(RuntimeError):  # a label that GDAL cannot open says nothing about this file
                label = gdal_module().Open(str(path))
                if source.path.name in [Path(file).name for file in label.GetFileList() or []]:
                    return label
    return dataset


def _check_band(dataset: Any, source: Source, number: int) -> tuple[Any, str]:
    gdal = gdal_module()
    if number > dataset.RasterCount:
        raise DataError(
            "the product has no such band",
            seen=f"{source.display}: band {number} of {dataset.RasterCount}",
            fix="set `band`, or a rule for this product",
        )
    band = dataset.GetRasterBand(number)
    kind = gdal.GetDataTypeName(band.DataType)
    if kind not in _NUMPY or band.GetColorInterpretation() == gdal.GCI_PaletteIndex:
        raise DataError(
            "the pixels are no intensities",
            seen=f"{source.display}: {'palette indices' if kind in _NUMPY else kind}",
            rule="integers or real numbers that grow with brightness",
            fix="expand a palette with gdal_translate -expand gray",
        )
    return band, _NUMPY[kind]


def _without_collar(dataset: Any, band: int, dtype: str, validity: Validity, collar: str) -> tuple[Validity, list[str]]:
    declared = bool(validity.special) or validity.mask_band or not validity(np.zeros((1, 1), dtype=dtype)).all()
    value = find_collar(dataset, band, dtype, declared) if collar == "auto" else None
    if value is None:
        return validity, []
    note = (
        f"its border is filled with {value:g}, and no no-data is declared: {value:g} is taken as no data "
        "(collar=off trusts it)"
    )
    return dataclasses.replace(validity, special=(*validity.special, value)), [note]


def _gsd(of_map: float, of_user: float | None, of_label: float) -> tuple[float, list[str]]:
    """Chooses among the georeference's, the user's and the label's GSD, in this order."""
    if math.isfinite(of_map):
        return of_map, []
    if of_user is not None:
        return of_user, []
    told = [f"its GSD, {of_label:.4g} m, is from the label; it has no map projection"]
    return of_label, told if math.isfinite(of_label) else []


def open_product(product: Product) -> Any:
    """Opens the GDAL dataset that `read_window` reads from.

    Raises:
        DataError: The file is gone or cannot be opened any more.
    """
    dataset = _open(product.source, product.name)
    return open_raw(product.lines, product.georeference.transform) if product.lines else dataset


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
            seen=f"{product.source.path or product.name}: rows {row} to {row + height - 1}: "
            f"{' '.join(str(error).split())}",
            fix="fetch it again and compare its checksum, or set on_error=skip",
        ) from None
    return raw_HW, valid_HW
