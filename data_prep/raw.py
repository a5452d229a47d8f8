"""Where the samples of an uncompressed image lie in its file, and what a label may say about it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any
from xml.sax.saxutils import escape

import numpy as np
import numpy.typing as npt

from momo.errors import DataError
from momo.extras import require

from .labels import text_of, whole_number

GDAL_NAMES = {
    "u1": "Byte", "u2": "UInt16", "i2": "Int16", "u4": "UInt32", "i4": "Int32", "f4": "Float32", "f8": "Float64",
}  # fmt: skip
_LABEL_LIMIT = 4 << 20  # bytes searched for the END statement


@dataclass(frozen=True)
class RawLayout:
    """Where the samples of an uncompressed image lie in a file.

    Attributes:
        path: What GDAL's virtual file system opens.
        start: First byte of the first sample of the first band.
        width: Columns.
        height: Lines.
        bands: Bands.
        dtype: numpy type with byte order, for example `>i2`; `V4` when numpy has no such type (VAX).
        pixel: Bytes from a sample to the next of its line.
        line: Bytes from a line to the next.
        band: Bytes from a band to the next.
        tile: (columns, lines) of the tiles of a tiled ISIS cube, else None; `pixel` and `line` are unused then.
    """

    path: str
    start: int
    width: int
    height: int
    bands: int
    dtype: str
    pixel: int
    line: int
    band: int
    tile: tuple[int, int] | None = None

    @property
    def end(self) -> int:
        """First byte behind the image."""
        if self.tile:
            return self.start + self.bands * self.band
        last = (self.bands - 1) * self.band + (self.height - 1) * self.line + (self.width - 1) * self.pixel
        return self.start + last + np.dtype(self.dtype).itemsize

    def read(self, band: int, row: int, rows: int) -> npt.NDArray[Any]:
        """Reads full lines without GDAL's drivers; the values are in the machine's byte order.

        Args:
            band: Band number, from 1.
            row: First line.
            rows: Number of lines.

        Raises:
            DataError: The file is too short.
        """
        gdal = require("osgeo.gdal", "prep")
        stream = gdal.VSIFOpenL(self.path, "rb")
        try:
            if self.tile:
                lines_HW = self._read_tiles(stream, band, row, rows)
            else:
                size, kind = (self.width - 1) * self.pixel + np.dtype(self.dtype).itemsize, np.dtype(self.dtype)
                first = self.start + (band - 1) * self.band
                lines_HW = np.empty((rows, self.width), dtype=self.dtype)
                for number in range(rows):
                    data = self._bytes(stream, first + (row + number) * self.line, size)
                    lines_HW[number] = np.ndarray(self.width, kind, data, 0, (self.pixel,))
        finally:
            if stream is not None:
                gdal.VSIFCloseL(stream)
        return lines_HW.astype(lines_HW.dtype.newbyteorder("="))

    def _read_tiles(self, stream: Any, band: int, row: int, rows: int) -> npt.NDArray[Any]:
        assert self.tile
        tile_width, tile_height = self.tile
        item, across = np.dtype(self.dtype).itemsize, -(-self.width // tile_width)
        lines_HW = np.empty((rows, across * tile_width), dtype=self.dtype)
        for top in range(row // tile_height, -(-(row + rows) // tile_height)):
            first, last = max(row, top * tile_height), min(row + rows, (top + 1) * tile_height)
            for left in range(across):
                skipped = (top * across + left) * tile_width * tile_height + (first - top * tile_height) * tile_width
                place = self.start + (band - 1) * self.band + skipped * item
                data = self._bytes(stream, place, (last - first) * tile_width * item)
                block_HW = np.frombuffer(data, self.dtype).reshape(last - first, tile_width)
                lines_HW[first - row : last - row, left * tile_width : (left + 1) * tile_width] = block_HW
        return lines_HW[:, : self.width]

    def _bytes(self, stream: Any, place: int, size: int) -> bytes:
        gdal = require("osgeo.gdal", "prep")
        data = b""
        if stream is not None and gdal.VSIFSeekL(stream, place, 0) == 0:
            data = bytes(gdal.VSIFReadL(1, size, stream) or b"")
        if len(data) != size:
            raise DataError(
                "the product is truncated",
                seen=f"{PurePath(self.path).name}: bytes {place + 1} to {place + size} cannot be read",
                fix="fetch it again and compare its checksum",
            )
        return data


@dataclass(frozen=True)
class Declared:
    """What a label says about the file that holds the image.

    Attributes:
        layout: Where the samples lie.
        extra: Bytes before and after the samples of each line.
        header: Bytes at the start of the file that the label takes; 0 when it is detached.
        objects: First byte and length (0: unknown) of other objects in the same file.
        file_bytes: Size of that file, or None.
        record: Bytes of a record; shorter remainders may be padding.
        exact: The format leaves no room for bytes that the label does not name.
        usual: Layout with the samples of a line together, when the label states another order, else None.
        notes: What the label leaves open and how it is taken.
    """

    layout: RawLayout
    extra: tuple[int, int] = (0, 0)
    header: int = 0
    objects: tuple[tuple[int, int], ...] = ()
    file_bytes: int | None = None
    record: int = 1
    exact: bool = False
    usual: RawLayout | None = None
    notes: tuple[str, ...] = ()


def next_object(declared: Declared, size: int) -> int:
    """Returns the first byte behind the image that another object, or nothing more, takes."""
    return min([place for place, _ in declared.objects if place >= declared.layout.end] + [size])


def contradiction(name: str, seen: str, rule: str) -> DataError:
    """Returns the error for a label that disagrees with itself or with its file."""
    return DataError(
        "label and file disagree",
        seen=f"{PurePath(name).name}: {seen}",
        rule=rule,
        fix="fetch label and image again, or mend the label by the product's documentation",
    )


def open_raw(layout: RawLayout, transform: tuple[float, ...] | None = None) -> Any:
    """Opens an untiled layout with GDAL through a VRT of raw bands, without the format's own driver.

    Args:
        layout: Where the samples lie.
        transform: GDAL geotransform that the dataset shall carry.
    """
    gdal, kind = require("osgeo.gdal", "prep"), np.dtype(layout.dtype)
    order = "MSB" if kind.str.startswith(">") else "LSB"
    bands = "".join(
        f'<VRTRasterBand dataType="{GDAL_NAMES[kind.str[1:]]}" band="{number + 1}" subClass="VRTRawRasterBand">'
        f'<SourceFilename relativetoVRT="0">{escape(layout.path)}</SourceFilename>'
        f"<ImageOffset>{layout.start + number * layout.band}</ImageOffset><PixelOffset>{layout.pixel}</PixelOffset>"
        f"<LineOffset>{layout.line}</LineOffset><ByteOrder>{order}</ByteOrder></VRTRasterBand>"
        for number in range(layout.bands)
    )
    place = f"<GeoTransform>{', '.join(map(repr, transform))}</GeoTransform>" if transform else ""
    xml = f'<VRTDataset rasterXSize="{layout.width}" rasterYSize="{layout.height}">{place}{bands}</VRTDataset>'
    # From GDAL 3.7 on raw bands in a VRT are refused unless their place is allowed; this VRT is our own.
    key = "GDAL_VRT_RAWRASTERBAND_ALLOWED_SOURCE"
    before = gdal.GetThreadLocalConfigOption(key)
    gdal.SetThreadLocalConfigOption(key, "ALL")
    try:
        return gdal.Open(xml)
    finally:
        gdal.SetThreadLocalConfigOption(key, before)


def need(name: str, place: str, value: Any) -> int:
    """Returns a label value as a whole number of 0 or more.

    Raises:
        DataError: It is none.
    """
    number = whole_number(value)
    if number is None or number < 0:
        raise contradiction(name, f"{place} is {text_of(value) or 'missing'!r}", "the label gives it as a whole number")
    return number


def strides(order: str, counts: dict[str, int], item: int, extra: int = 0, after: str = "S") -> tuple[int, int, int]:
    """Returns the bytes between samples, lines and bands.

    Args:
        order: Axes, fastest first, for example `SLB` (samples, lines, bands).
        counts: Length of each axis.
        item: Bytes of a sample.
        extra: Bytes added to each run along axis `after`.
        after: See `extra`.
    """
    step, strides = item, {}
    for axis in order:
        strides[axis] = step
        step = step * counts[axis] + (extra if axis == after else 0)
    return strides["S"], strides["L"], strides["B"]


def end_of_label(path: str) -> int | None:
    """Returns the byte behind the END statement of a PVL or ODL label, or None."""
    gdal = require("osgeo.gdal", "prep")
    stream = gdal.VSIFOpenL(path, "rb")
    if stream is None:
        return None
    text = bytes(gdal.VSIFReadL(1, _LABEL_LIMIT, stream) or b"")
    gdal.VSIFCloseL(stream)
    found = re.search(rb"(?i)(?:^|[\r\n])[ \t]*END(?![A-Z0-9_])(?![ \t]*=)", text)
    return found.end() if found else None


def detached(dataset: Any, name: str, wanted: str) -> str:
    """Returns the data file of a detached label, as GDAL found it."""
    files = [file for file in dataset.GetFileList() or [] if file != name and not file.endswith(".aux.xml")]
    same = [file for file in files if PurePath(file).name.lower() == wanted.lower()]
    if not same:
        raise contradiction(
            name, f"its image {wanted!r} is not among the files GDAL reads ({len(files)})", "it is there"
        )
    return same[0]


def typed(order: str, kind: str) -> str:
    """Returns the numpy type string of a byte order and a kind; one byte has no order."""
    return np.dtype(order + kind).str.lstrip("|")


def same_size(dataset: Any, name: str, counts: dict[str, int]) -> None:
    """Raises DataError unless GDAL reads as many samples (S), lines (L) and bands (B) as the label declares."""
    seen = {"S": dataset.RasterXSize, "L": dataset.RasterYSize, "B": dataset.RasterCount}
    if seen != counts:
        raise contradiction(
            name,
            f"the label declares {counts['S']} x {counts['L']} pixels in {counts['B']} bands, "
            f"GDAL reads {seen['S']} x {seen['L']} in {seen['B']}",
            "both are the same image",
        )
