"""Where a PDS3 label says that the samples of its image or qube lie."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from .labels import pds3_image, text_of, whole_number
from .raw import Declared, RawLayout, contradiction, detached, end_of_label, need, same_size, strides, typed

_ORDERS = {"LSB": "<", "PC": "<", "VAX": "<", "MSB": ">", "SUN": ">", "MAC": ">", "IEEE": ">", "": ">"}


def pds3_layout(dataset: Any, name: str, label: dict[str, Any]) -> Declared | None:
    """Reads the layout of a PDS3 image or qube; None when the label describes a compressed file.

    Raises:
        DataError: The label lacks a number it needs, names an unknown sample type, or contradicts itself.
    """
    kind, image = pds3_image(label)
    if not kind:
        raise contradiction(name, "no IMAGE or QUBE object", "the label describes the pixels in one")
    order, counts, suffixes = _pds3_axes(name, kind, image)
    if "UNCOMPRESSED_FILE" in label or "COMPRESSED_FILE" in label:
        same_size(dataset, name, counts)
        return None
    dtype, notes = _pds3_type(dataset, name, image)
    record = whole_number(image.get("RECORD_BYTES")) or whole_number(label.get("RECORD_BYTES")) or 1
    pointers = {key[1:]: _pointer(name, key, value, record) for key, value in label.items() if key[:1] == "^"}
    if kind not in pointers:
        raise contradiction(name, f"no pointer ^{kind}", "it says where the image begins")
    wanted, start, records = pointers[kind]
    path = detached(dataset, name, wanted) if wanted else name
    header = 0
    if path == name:
        header = _pds3_header(name, label, pointers, record, start)
    item = np.dtype(dtype).itemsize
    prefix, suffix = (need(name, key, image.get(key, 0)) for key in ("LINE_PREFIX_BYTES", "LINE_SUFFIX_BYTES"))
    if kind == "IMAGE":
        pixel, line, band = strides(order, counts, item, prefix + suffix)
    else:
        pixel, line, band = _qube_strides(
            order, counts, suffixes, item, need(name, "SUFFIX_BYTES", image.get("SUFFIX_BYTES", 4))
        )
    layout = RawLayout(path, start + prefix, counts["S"], counts["L"], counts["B"], dtype, pixel, line, band)
    # Pointers in the other unit are left out: cropped files carry record numbers of the file they were cut from.
    others = [
        (place, 0) for key, (file, place, in_records) in pointers.items()
        if key != kind and file == wanted and in_records == records and not re.search("PREFIX|SUFFIX", key)
    ]  # fmt: skip
    length = whole_number(label.get("FILE_RECORDS"))
    size = length * record if length and label.get("RECORD_BYTES") else None
    return Declared(layout, (prefix, suffix), header, tuple(others), size, record, notes=notes)


def _pds3_axes(name: str, kind: str, image: dict[str, Any]) -> tuple[str, dict[str, int], dict[str, int]]:
    if kind == "IMAGE" and "CORE_ITEMS" not in image:
        keys = {"S": "LINE_SAMPLES", "L": "LINES", "B": "BANDS"}
        counts = {axis: need(name, key, image.get(key, 1 if axis == "B" else None)) for axis, key in keys.items()}
        storage = text_of(image.get("BAND_STORAGE_TYPE")).upper().replace(" ", "_") or "BAND_SEQUENTIAL"
        orders = {"BAND_SEQUENTIAL": "SLB", "LINE_INTERLEAVED": "SBL", "SAMPLE_INTERLEAVED": "BSL"}
        order = orders.get(storage, "SLB" if counts["B"] == 1 else "")
        if not order:
            raise contradiction(name, f"BAND_STORAGE_TYPE {storage}", f"one of {', '.join(orders)}")
        return order, counts, dict.fromkeys("SLB", 0)
    axes, items = image.get("AXIS_NAME"), image.get("CORE_ITEMS")
    if not isinstance(axes, list) or not isinstance(items, list) or len(axes) != 3 or len(items) != 3:
        raise contradiction(name, f"AXIS_NAME {axes}, CORE_ITEMS {items}", "both name three axes")
    order = "".join(str(axis)[:1].upper() for axis in axes)
    if sorted(order) != ["B", "L", "S"]:
        raise contradiction(name, f"AXIS_NAME {axes}", "SAMPLE, LINE and BAND in the order of storage")
    counts = {axis: need(name, "CORE_ITEMS", count) for axis, count in zip(order, items, strict=True)}
    listed = image.get("SUFFIX_ITEMS", [0, 0, 0])
    if not isinstance(listed, list) or len(listed) != 3:
        raise contradiction(name, f"SUFFIX_ITEMS {listed}", "one number for each of the three axes")
    suffixes = {axis: need(name, "SUFFIX_ITEMS", count) for axis, count in zip(order, listed, strict=True)}
    return order, counts, suffixes


def _qube_strides(
    order: str, counts: dict[str, int], suffixes: dict[str, int], item: int, suffix_bytes: int
) -> tuple[int, int, int]:
    """Returns strides of a qube whose axes end in suffix items (PDS Standards Reference 3.8, appendix A.23)."""
    first, second, third = list(order)
    strides = {first: item, second: item * counts[first] + suffixes[first] * suffix_bytes}
    backplane = suffixes[second] * (counts[first] + suffixes[first]) * suffix_bytes
    strides[third] = strides[second] * counts[second] + backplane
    return strides["S"], strides["L"], strides["B"]


def _pds3_type(dataset: Any, name: str, image: dict[str, Any]) -> tuple[str, tuple[str, ...]]:
    if "CORE_ITEM_BYTES" in image:
        bits, kind = 8 * need(name, "CORE_ITEM_BYTES", image["CORE_ITEM_BYTES"]), image.get("CORE_ITEM_TYPE")
    else:
        bits, kind = need(name, "SAMPLE_BITS", image.get("SAMPLE_BITS")), image.get("SAMPLE_TYPE")
    text = re.sub(r"[^A-Z]+", "_", text_of(kind).upper()).strip("_")
    found = re.fullmatch(r"(?:(LSB|MSB|PC|VAX|SUN|MAC|IEEE)_)?(?:(UN)?SIGNED_)?(INTEGER|REAL|FLOAT)", text)
    if bits == 8 and not (found and found[3] == "INTEGER" and found[2]):
        # Eight bits have no byte order, and archives call grey values INTEGER; GDAL reads 0..255.
        return "u1", (f"the label's sample type is {text or 'missing'!r}, read as unsigned 8-bit",)
    if not found or (bits, found[3] == "INTEGER") not in {(8, True), (16, True), (32, True), (32, False), (64, False)}:
        raise contradiction(name, f"{bits}-bit samples of type {text or 'missing'!r}", "a sample type of PDS3")
    if found[3] != "INTEGER":
        return f"V{bits // 8}" if found[1] == "VAX" else typed(_ORDERS[found[1] or ""], f"f{bits // 8}"), ()
    return typed(_ORDERS[found[1] or ""], f"{'u' if found[2] else 'i'}{bits // 8}"), ()


def _pointer(name: str, key: str, value: Any, record: int) -> tuple[str, int, bool]:
    """Returns the file of a PDS3 pointer ("" for the label's own), its first byte and whether records were given."""
    file = ""
    if isinstance(value, list):
        file, value = text_of(value[0]), value[1] if len(value) > 1 else 1
    elif isinstance(value, str) and not re.match(r"\s*\d+\s*(<|$)", value):
        return text_of(value), 0, False
    in_bytes = re.fullmatch(r"\s*(\d+)\s*<\s*BYTES\s*>\s*", value, re.IGNORECASE) if isinstance(value, str) else None
    if in_bytes:
        value = {"value": int(in_bytes[1]), "unit": "BYTES"}
    number = need(name, key, value)
    if isinstance(value, dict) and str(value.get("unit", "")).upper().startswith("BYTE"):
        return file, number - 1, False
    return file, (number - 1) * record, True


def _pds3_header(
    name: str, label: dict[str, Any], pointers: dict[str, tuple[str, int, bool]], record: int, start: int
) -> int:
    end = end_of_label(name)
    if end is None or end > start:
        seen = "no END statement" if end is None else f"the label ends at byte {end}, the image begins at {start + 1}"
        raise contradiction(name, seen, "the label ends before the image that it describes")
    declared = label.get("LABEL_RECORDS")
    in_bytes = isinstance(declared, dict)
    length = whole_number(declared)
    first = min((place for file, place, records in pointers.values() if not file and records != in_bytes), default=None)
    if length and first is not None and first != length * (1 if in_bytes else record):
        raise contradiction(
            name,
            f"LABEL_RECORDS ends the label at byte {length * (1 if in_bytes else record)}, "
            f"the first object begins at {first + 1}",
            "the first object follows the label",
        )
    return end
