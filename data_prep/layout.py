"""Checks the geometry a label declares against what GDAL reads and what the file holds; mends it, or refuses.

GDAL opens some planetary products without a word and reads them wrong: bytes after each line, byte orders and sample
types that it does not know. And a label can be wrong itself. So the samples are read a second time, by the label
alone, and compared; then readings are tried that the file would allow as well (bytes swapped, lines and columns
exchanged, longer lines). An image is smooth when it is read right.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import PurePath
from typing import Any

import numpy as np

from momo.errors import DataError
from momo.extras import require

from .declared import declared_layout
from .plausibility import ROWS, SMOOTHER, check_byte_order, check_rivals, check_tiles, roughness
from .raw import GDAL_NAMES, Declared, RawLayout, contradiction, next_object

# Smallest images that are refused as larger than their compressed file can be; a constant scene compresses well.
_ABSURD_BYTES, _ABSURD_RATIO = 1 << 30, 100_000


def check_layout(dataset: Any, name: str, band: int) -> tuple[RawLayout | None, list[str]]:
    """Compares label, file and GDAL's reading of one band.

    Args:
        dataset: The product as GDAL opened it.
        name: What it was opened from.
        band: Band number, from 1.

    Returns:
        The layout by which the band must be read instead of GDAL's own reading, or None; and notes.

    Raises:
        DataError: The file is shorter than the label declares, label and file disagree, or no reading is right.
    """
    declared = declared_layout(dataset, name)
    if declared is None:
        _check_size(dataset, name)
        return None, []
    layout = declared.layout
    if (layout.width, layout.height, layout.bands) != (dataset.RasterXSize, dataset.RasterYSize, dataset.RasterCount):
        raise contradiction(
            name,
            f"the label declares {layout.width} x {layout.height} pixels in {layout.bands} bands, GDAL reads "
            f"{dataset.RasterXSize} x {dataset.RasterYSize} in {dataset.RasterCount}",
            "both are the same image",
        )
    notes = [*declared.notes, *_check_bytes(declared, name)]
    if layout.dtype.startswith("V"):
        return None, [*notes, f"its {layout.dtype[1:]}-byte VAX numbers are decoded by GDAL, unchecked"]
    mended, more = _mend(dataset, name, declared, band)
    reordered, told = _take_usual(declared, name, band)
    if reordered:
        mended, declared = reordered, replace(declared, layout=reordered)
    more += told + check_byte_order(declared.layout, name, band)
    check_rivals(declared, name, band)
    if layout.tile:
        more += check_tiles(layout, name, band)
    return mended, notes + more


def _check_size(dataset: Any, name: str) -> None:
    """Refuses a header that declares an image which cannot be in a file of this size."""
    gdal = require("osgeo.gdal", "prep")
    stat = gdal.VSIStatL(name) if dataset.GetDriver().ShortName != "VRT" else None
    depth = sum(gdal.GetDataTypeSize(dataset.GetRasterBand(n + 1).DataType) // 8 for n in range(dataset.RasterCount))
    pixels = dataset.RasterXSize * dataset.RasterYSize * depth
    if stat is not None and stat.size and pixels > max(_ABSURD_BYTES, stat.size * _ABSURD_RATIO):
        raise contradiction(
            name,
            f"{dataset.RasterXSize} x {dataset.RasterYSize} pixels ({pixels:.3g} bytes) in a file of {stat.size} bytes",
            f"compression makes an image at most {_ABSURD_RATIO} times smaller",
        )


def _check_bytes(declared: Declared, name: str) -> list[str]:
    """Compares the bytes that the label declares with the file's."""
    gdal, layout, notes = require("osgeo.gdal", "prep"), declared.layout, []
    stat = gdal.VSIStatL(layout.path)
    size = stat.size if stat is not None else 0
    file = PurePath(layout.path).name
    if layout.end > size:
        raise DataError(
            "the product is truncated",
            seen=f"{file}: the label declares an image of bytes {layout.start + 1} to {layout.end}, "
            f"the file has {size}",
            rule="the file holds the whole image",
            fix="fetch it again and compare its checksum",
        )
    first = layout.start - declared.extra[0]
    inside = [
        place for place, length in declared.objects
        if place + max(length, 1) > layout.start and place < layout.end and place != first
    ]  # fmt: skip
    if inside or layout.start < declared.header:
        raise contradiction(
            name,
            f"the image takes bytes {layout.start + 1} to {layout.end}, "
            + (f"another object begins at {inside[0] + 1}" if inside else f"the label {declared.header}"),
            "objects of a file do not overlap",
        )
    if declared.file_bytes is not None and declared.file_bytes != size:
        notes.append(
            f"the label declares a file of {declared.file_bytes} bytes, it has {size}; the image itself is whole"
        )
    after = next_object(declared, size)
    gap = after - layout.end - declared.extra[1]
    end = max([place + length for place, length in declared.objects], default=0)
    if declared.exact and end > size:
        raise DataError(
            "the product is truncated",
            seen=f"{file}: the label declares objects up to byte {end}, the file has {size}",
            rule="the file holds all that its label names",
            fix="fetch it again and compare its checksum",
        )
    if declared.exact and layout.path == name and not all(length for place, length in declared.objects if place < size):
        notes.append("an object behind the image has no length in the label, so its end cannot be checked")
    if declared.exact and all(length for _, length in declared.objects) and layout.end < end < size:
        notes.append(f"{size - end} bytes after the last object belong to nothing that the label names")
    if gap > 0 and not (gap < declared.record and _is_padding(layout, gap)):
        notes.append(f"{gap} bytes after the image belong to nothing that the label names")
    if declared.exact and layout.path == name and 0 < declared.header < first:
        skipped = first - declared.header
        notes.append(f"{skipped} bytes between label and image belong to nothing that the label names")
    return notes


def _is_padding(layout: RawLayout, gap: int) -> bool:
    gdal = require("osgeo.gdal", "prep")
    stream = gdal.VSIFOpenL(layout.path, "rb")
    gdal.VSIFSeekL(stream, layout.end, 0)
    data = bytes(gdal.VSIFReadL(1, gap, stream) or b"")
    gdal.VSIFCloseL(stream)
    return len(set(data)) == 1


def _mend(dataset: Any, name: str, declared: Declared, band: int) -> tuple[RawLayout | None, list[str]]:
    """Decides between GDAL's reading and the label's, when they differ, by which of them is an image."""
    gdal, layout = require("osgeo.gdal", "prep"), declared.layout
    pixels = dataset.GetRasterBand(band)
    wanted, got = GDAL_NAMES.get(np.dtype(layout.dtype).str[1:], "no such"), gdal.GetDataTypeName(pixels.DataType)
    middle = max(0, (layout.height - ROWS) // 2)
    places = [(0, 1), (middle, min(ROWS, layout.height)), (layout.height - 1, 1)]
    own = [layout.read(band, row, rows) for row, rows in places]
    try:
        plain = [pixels.ReadAsArray(0, row, layout.width, rows) for row, rows in places]
    except RuntimeError as error:
        raise contradiction(name, " ".join(str(error).split()), "GDAL reads where the label says") from None
    if wanted == got and all(a.tobytes() == b.tobytes() for a, b in zip(own, plain, strict=True)):
        return None, []
    prefix, suffix = declared.extra
    said = f"each line has {prefix} + {suffix} extra bytes" if prefix or suffix else f"the label's samples are {wanted}"
    rough_own, rough_plain = roughness(own[1]), roughness(plain[1])
    # A type that GDAL does not know is the label's to say, unless it makes no image.
    slack = SMOOTHER if wanted != got else 1.0
    if layout.tile or wanted == "no such" or not rough_own < rough_plain * slack:
        raise DataError(
            "the product would be read sheared" if prefix or suffix else "GDAL does not read what the label declares",
            seen=f"{PurePath(name).name}: {said}; read so, neighbours differ by {rough_own:.3g} mean deviations, "
            f"as GDAL reads it by {rough_plain:.3g}",
            rule="LINE_PREFIX_BYTES and LINE_SUFFIX_BYTES must be skipped" if prefix or suffix
            else f"{wanted} samples at the label's bytes (GDAL: {got})",
            fix="convert it with ISIS (for example hi2isis) and give the cube",
        )  # fmt: skip
    if prefix or suffix:
        said += ", not all skipped by GDAL: read with the label's line length"
    else:
        said += f" from byte {layout.start + 1} on, which GDAL reads otherwise (as {got}): read by the label"
    return layout, [f"{said} (neighbours differ by {rough_own:.3g} instead of {rough_plain:.3g} mean deviations)"]


def _take_usual(declared: Declared, name: str, band: int) -> tuple[RawLayout | None, list[str]]:
    """Decides between the order of axes that the label states and the usual one, by which of them is an image.

    Some PDS4 labels name their axes in the wrong order (`Last Index Fastest` with Sample before Line, as early
    CaSSIS labels do); GDAL follows them and reads stripes.
    """
    if declared.usual is None:
        return None, []
    readings = []
    for layout in (declared.layout, declared.usual):
        rows = min(ROWS, layout.height)
        readings.append(roughness(layout.read(band, (layout.height - rows) // 2, rows)))
    stated, usual = readings
    said = "the label states that the line index changes fastest"
    if usual < stated:
        told = f"neighbours differ by {usual:.3g} instead of {stated:.3g} mean deviations"
        return declared.usual, [f"{said}, but the samples of a line lie together: read so ({told})"]
    return None, [f"{said}, and it is read so"]
