"""Where a label says that the samples of an uncompressed image lie in its file: PDS3, PDS4, ISIS3 and VICAR."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from momo.extras import require

from .declared_pds3 import pds3_layout
from .labels import child_text, children, label_tree, pds4_array, tag_of, text_of, whole_number
from .raw import Declared, RawLayout, contradiction, detached, end_of_label, need, same_size, strides, typed

_ISIS_TYPES = {"UnsignedByte": "u1", "UnsignedWord": "u2", "SignedWord": "i2", "Real": "f4", "Double": "f8"}
_VICAR_TYPES = {"BYTE": "u1", "HALF": "i2", "WORD": "i2", "FULL": "i4", "LONG": "i4", "REAL": "f4", "DOUB": "f8"}
_PDS4_TYPES = {
    "UnsignedByte": "u1", "SignedByte": "i1", "IEEE754MSBSingle": ">f4", "IEEE754LSBSingle": "<f4",
    "IEEE754MSBDouble": ">f8", "IEEE754LSBDouble": "<f8",
} | {f"{sign}{order}{size}": f"{mark}{kind}{size}"
     for sign, kind in (("Signed", "i"), ("Unsigned", "u")) for order, mark in (("MSB", ">"), ("LSB", "<"))
     for size in (2, 4, 8)}  # fmt: skip


def declared_layout(dataset: Any, name: str) -> Declared | None:
    """Reads from the label of an open dataset where its samples lie.

    Args:
        dataset: The dataset.
        name: What it was opened from.

    Returns:
        The declaration, or None for a file without such a label or with compressed pixels.

    Raises:
        DataError: The label lacks a number it needs, names an unknown sample type, or contradicts itself.
    """
    kind, tree = label_tree(dataset)
    readers: dict[str, Callable[[Any, str, Any], Declared | None]] = {
        "PDS": pds3_layout,
        "ISIS3": _isis3,
        "VICAR": _vicar,
        "PDS4": _pds4,
    }
    driver = dataset.GetDriver().ShortName
    return readers[driver](dataset, name, tree) if kind and driver in readers else None


# ISIS3


def _isis3(dataset: Any, name: str, label: dict[str, Any]) -> Declared | None:
    core = label["IsisCube"]["Core"]
    pixels, size = core["Pixels"], core["Dimensions"]
    form, kind, order = (text_of(value) for value in (core.get("Format"), pixels.get("Type"), pixels.get("ByteOrder")))
    counts = {axis: need(name, key, size.get(key)) for axis, key in (("S", "Samples"), ("L", "Lines"), ("B", "Bands"))}
    if form.lower() == "geotiff":
        same_size(dataset, name, counts)
        return None
    if form not in ("Tile", "BandSequential") or kind not in _ISIS_TYPES or order.lower() not in ("lsb", "msb"):
        raise contradiction(
            name, f"Format {form!r}, Type {kind!r}, ByteOrder {order!r}",
            f"Tile or BandSequential, {', '.join(_ISIS_TYPES)}, Lsb or Msb",
        )  # fmt: skip
    start = need(name, "StartByte", core.get("StartByte")) - 1
    dtype = typed("<" if order.lower() == "lsb" else ">", _ISIS_TYPES[kind])
    item, tile = np.dtype(dtype).itemsize, None
    steps = strides("SLB", counts, item)
    if form == "Tile":
        tile = (need(name, "TileSamples", core.get("TileSamples")), need(name, "TileLines", core.get("TileLines")))
        if 0 in tile:
            raise contradiction(name, f"tiles of {tile[0]} x {tile[1]} pixels", "tiles have pixels")
        tiles = -(-counts["S"] // tile[0]) * -(-counts["L"] // tile[1])
        steps = (item, item * tile[0], tiles * tile[0] * tile[1] * item)
    wanted = text_of(core.get("^Core"))
    path = detached(dataset, name, wanted) if wanted else name
    layout = RawLayout(path, start, counts["S"], counts["L"], counts["B"], dtype, *steps, tile)
    if wanted:
        return Declared(layout)
    end = end_of_label(name)
    header = whole_number((label.get("Label") or {}).get("Bytes")) or end or 0
    if end is None or end > start:
        raise contradiction(name, f"StartByte {start + 1} lies in the label", "the pixels follow the label")
    return Declared(layout, header=header, objects=tuple(_isis3_blobs(label)), exact=True)


def _isis3_blobs(label: dict[str, Any]) -> Iterator[tuple[int, int]]:
    """Yields first byte and length of the tables, histories and strings behind the pixels of a cube."""
    for key, value in label.items():
        first = whole_number(value.get("StartByte")) if isinstance(value, dict) and key != "IsisCube" else None
        if first is not None and "^" not in "".join(str(item)[:1] for item in value):
            yield first - 1, whole_number(value.get("Bytes")) or 0


# VICAR


def _vicar(dataset: Any, name: str, label: dict[str, Any]) -> Declared | None:
    keys = ("LBLSIZE", "RECSIZE", "NL", "NS", "NB", "NLB", "NBB")
    at = {
        key: need(name, key, label.get(key, 0 if key in ("NLB", "NBB") else 1 if key == "NB" else None)) for key in keys
    }
    order, form = text_of(label.get("ORG")) or "BSQ", text_of(label.get("FORMAT"))
    integers, reals = text_of(label.get("INTFMT")) or "LOW", text_of(label.get("REALFMT")) or "VAX"
    orders = {"BSQ": "SLB", "BIL": "SBL", "BIP": "BSL"}
    marks = {"HIGH": ">", "LOW": "<", "IEEE": ">", "RIEEE": "<", "VAX": "V"}
    if order not in orders or form not in _VICAR_TYPES or integers not in marks or reals not in marks:
        raise contradiction(
            name, f"ORG {order!r}, FORMAT {form!r}, INTFMT {integers!r}, REALFMT {reals!r}",
            f"ORG of {', '.join(orders)}, FORMAT of {', '.join(_VICAR_TYPES)}, INTFMT LOW or HIGH, "
            "REALFMT VAX, IEEE or RIEEE",
        )  # fmt: skip
    code = _VICAR_TYPES[form]
    mark = marks[reals if code[0] == "f" else integers]
    dtype = f"V{code[1:]}" if mark == "V" else typed(mark, code)
    counts = {"S": at["NS"], "L": at["NL"], "B": at["NB"]}
    item, axes = np.dtype(dtype).itemsize, orders[order]
    steps = strides(axes, counts, item, at["NBB"], axes[0])
    record = at["NBB"] + counts[axes[0]] * item
    if at["RECSIZE"] != record or at["LBLSIZE"] % max(record, 1):
        raise contradiction(
            name, f"RECSIZE {at['RECSIZE']} and LBLSIZE {at['LBLSIZE']} for records of {record} bytes",
            "RECSIZE is NBB + N1 samples, and LBLSIZE a multiple of it",
        )  # fmt: skip
    start = at["LBLSIZE"] + at["NLB"] * record + at["NBB"]
    layout = RawLayout(name, start, counts["S"], counts["L"], counts["B"], dtype, *steps)
    objects = ((layout.end, _vicar_end_label(name, layout.end)),) if whole_number(label.get("EOL")) else ()
    return Declared(layout, (at["NBB"], 0), at["LBLSIZE"], objects, exact=True)


def _vicar_end_label(name: str, place: int) -> int:
    """Returns the bytes of the second label that follows the image when EOL is 1."""
    gdal = require("osgeo.gdal", "prep")
    stream = gdal.VSIFOpenL(name, "rb")
    gdal.VSIFSeekL(stream, place, 0)
    text = bytes(gdal.VSIFReadL(1, 64, stream) or b"")
    gdal.VSIFCloseL(stream)
    found = re.match(rb"\s*LBLSIZE\s*=\s*(\d+)", text)
    if found is None:
        raise contradiction(name, f"EOL is 1, but no label begins at byte {place + 1}", "it follows the image")
    return int(found[1])


# PDS4


def _pds4(dataset: Any, name: str, root: ElementTree.Element) -> Declared | None:
    found = pds4_array(root)
    if found is None or dataset.GetSubDatasets():
        return None
    area, array = found
    axes = sorted(
        children(array, "Axis_Array"),
        key=lambda axis: need(name, "sequence_number", child_text(axis, "sequence_number")),
    )
    order = "".join(child_text(axis, "axis_name")[:1].upper() for axis in axes)
    counts = {key: need(name, "elements", child_text(axis, "elements")) for key, axis in zip(order, axes, strict=False)}
    kind = next((child_text(element, "data_type") for element in children(array, "Element_Array")), "")
    if sorted(order) not in (["L", "S"], ["B", "L", "S"]) or len(order) != len(axes) or kind not in _PDS4_TYPES:
        raise contradiction(
            name, f"axes {order!r}, data_type {kind!r}", "axes Line, Sample, Band; a data_type of PDS4 arrays"
        )
    fastest = order if child_text(array, "axis_index_order").lower().startswith("first") else order[::-1]
    if len(axes) == 2:
        fastest += "B"
    counts.setdefault("B", 1)
    dtype = typed("", _PDS4_TYPES[kind])
    file = next(iter(children(area, "File")), area)
    path = detached(dataset, name, child_text(file, "file_name"))
    start = need(name, "offset", child_text(array, "offset"))
    steps = strides(fastest, counts, np.dtype(dtype).itemsize)
    layout = RawLayout(path, start, counts["S"], counts["L"], counts["B"], dtype, *steps)
    usual = None
    if len(axes) == 2 and fastest[0] == "L":
        pixel, line, band = strides("SLB", counts, np.dtype(dtype).itemsize)
        usual = replace(layout, pixel=pixel, line=line, band=band)
    others = [other for other in area if other is not array and tag_of(other) != "File" and child_text(other, "offset")]
    return Declared(
        layout,
        objects=tuple((need(name, "offset", child_text(other, "offset")), 0) for other in others),
        file_bytes=whole_number(child_text(file, "file_size")),
        exact=True,
        usual=usual,
    )
