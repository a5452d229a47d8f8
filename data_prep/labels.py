"""What PDS3, PDS4, ISIS3 and VICAR labels say about a product, read through GDAL's metadata domains."""

from __future__ import annotations

import contextlib
import json
import struct
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from momo.errors import DataError

# PDS3 keywords of an IMAGE, QUBE or SPECTRAL_QUBE object that name values which are no measurement.
_PDS3_SPECIAL = (
    "MISSING_CONSTANT", "MISSING", "INVALID_CONSTANT", "NULL_CONSTANT", "UNKNOWN_CONSTANT", "NOT_APPLICABLE_CONSTANT",
    "CORE_NULL", "CORE_LOW_REPR_SATURATION", "CORE_LOW_INSTR_SATURATION", "CORE_HIGH_REPR_SATURATION",
    "CORE_HIGH_INSTR_SATURATION",
)  # fmt: skip
_PDS3_OBJECTS = ("IMAGE", "SPECTRAL_QUBE", "QUBE")
# A label can be broken in any way, so its readers may stumble over any of these (XML's ParseError is a SyntaxError;
# GDAL's Python wrapper raises SystemError for metadata that are no UTF-8).
_BROKEN = (ValueError, TypeError, AttributeError, LookupError, OverflowError, RecursionError, SyntaxError, SystemError)
_DOMAINS = {"json:ISIS3": "ISIS3", "json:PDS": "PDS3", "xml:PDS4": "PDS4", "json:VICAR": "VICAR"}


@dataclass(frozen=True)
class Label:
    """The part of a label that prep uses.

    Attributes:
        product_id: Product identifier, or "" when the file has no label.
        instrument: Instrument as the label spells it, or "".
        special: Values that are no measurement; empty when the label names none.
        minimum: Smallest value that is a measurement, or None.
        maximum: Largest value that is a measurement, or None.
        bits: Bits in use when fewer than the sample has, else 0.
    """

    product_id: str = ""
    instrument: str = ""
    special: tuple[float, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    bits: int = 0


@contextlib.contextmanager
def readable_label(name: str) -> Iterator[None]:
    """Turns what a damaged label makes of its reader into an error of ours.

    Raises:
        DataError: The label holds something else than its format allows at that place.
    """
    try:
        yield
    except _BROKEN as error:
        raise DataError(
            "the label cannot be read",
            seen=f"{name}: {type(error).__name__}: {' '.join(str(error).split())}",
            rule="keywords, numbers and objects as the standard of its format says",
            fix="compare the label with another of the same data set, or fetch the product again",
        ) from None


def label_tree(dataset: Any) -> tuple[str, Any]:
    """Returns the whole label of an open GDAL dataset.

    Returns:
        `PDS3`, `ISIS3` or `VICAR` with nested dicts, `PDS4` with an XML root element, or ("", None) without a label.
    """
    domains = dataset.GetMetadataDomainList() or []
    for domain, kind in _DOMAINS.items():
        text = (dataset.GetMetadata_List(domain) or [""])[0] if domain in domains else ""
        if text:
            return kind, ElementTree.fromstring(text.encode()) if kind == "PDS4" else json.loads(text)
    return "", None


def read_label(dataset: Any) -> Label:
    """Reads the label of an open GDAL dataset; an unlabelled file gives an empty `Label`."""
    kind, tree = label_tree(dataset)
    if not kind:
        return Label()
    readers = {"ISIS3": _isis3, "PDS3": _pds3, "PDS4": _pds4, "VICAR": _vicar}
    return readers[kind](tree, dataset.GetRasterBand(1).DataType in (6, 7))  # GDT_Float32, GDT_Float64


def text_of(value: Any) -> str:
    """Returns a label value as text without quotes and unit; "" for none, a list or an object."""
    if isinstance(value, dict):
        value = value.get("value", "")
    return "" if value is None or isinstance(value, (dict, list)) else str(value).strip().strip('"').strip()


def whole_number(value: Any) -> int | None:
    """Returns a label value that is a whole number, or None."""
    number = pds3_number(value, False)
    return int(number) if number is not None and number == number // 1 and abs(number) < 2**62 else None


def _isis3(label: Any, is_real: bool) -> Label:
    cube = label.get("IsisCube", {})
    archive, instrument = cube.get("Archive") or {}, cube.get("Instrument") or {}
    return Label(text_of(archive.get("ProductId")), text_of(instrument.get("InstrumentId")))


def _vicar(label: Any, is_real: bool) -> Label:
    parts = [label, *(value for value in label.get("PROPERTY", {}).values() if isinstance(value, dict))]
    found = {key: text_of(part.get(key)) for key in ("PRODUCT_ID", "INSTRUMENT_ID") for part in parts if part.get(key)}
    return Label(found.get("PRODUCT_ID", ""), found.get("INSTRUMENT_ID", ""))


def pds3_image(label: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Returns the name and the object of a PDS3 label that describes the pixels, ("", {}) when there is none."""
    packed = label.get("UNCOMPRESSED_FILE")
    for place in (label, packed if isinstance(packed, dict) else {}):
        for name in _PDS3_OBJECTS:
            if isinstance(place.get(name), dict):
                return name, place[name]
    return "", {}


def _pds3(label: Any, is_real: bool) -> Label:
    _, image = pds3_image(label)
    special = [pds3_number(image[key], is_real) for key in _PDS3_SPECIAL if key in image]
    minimum, maximum = (
        next((image[key] for key in (f"CORE_VALID_{end}", f"VALID_{end}") if key in image), None)
        for end in ("MINIMUM", "MAXIMUM")
    )
    return Label(
        text_of(label.get("PRODUCT_ID")),
        text_of(label.get("INSTRUMENT_ID")) or text_of(label.get("INSTRUMENT_NAME")),
        tuple(sorted({value for value in special if value is not None})),
        pds3_number(minimum, is_real),
        pds3_number(maximum, is_real),
        _bits_in_use(whole_number(image.get("SAMPLE_BIT_MASK"))),
    )


def _bits_in_use(mask: int | None) -> int:
    """Returns n for a mask of the n lowest bits, else 0."""
    return mask.bit_length() if mask is not None and mask > 0 and mask & (mask + 1) == 0 else 0


def pds3_number(value: Any, is_real: bool) -> float | None:
    """Returns a PDS3 number, radix notation included, or None.

    GDAL reads `16#FF#` as 16; in a label of real samples such a constant is the bit pattern of a float32
    (ISIS writes NULL as `16#FF7FFFFB#`).
    """
    text = text_of(value)
    try:
        if text.count("#") == 2:
            radix, digits, _ = text.split("#")
            bits = int(digits, int(radix))
            return float(struct.unpack(">f", struct.pack(">I", bits))[0]) if is_real else float(bits)
        return float(text)
    except (ValueError, OverflowError, struct.error):
        return None


def tag_of(element: ElementTree.Element) -> str:
    """Returns the tag of an XML element without its namespace."""
    return element.tag.rpartition("}")[2]


def children(element: ElementTree.Element, tag: str) -> list[ElementTree.Element]:
    """Returns the direct children of that tag, whatever their namespace."""
    return [child for child in element if tag_of(child) == tag]


def child_text(element: ElementTree.Element, tag: str) -> str:
    """Returns the text of the first direct child of that tag, or ""."""
    return next(((child.text or "").strip() for child in children(element, tag)), "")


def pds4_array(root: ElementTree.Element) -> tuple[ElementTree.Element, ElementTree.Element] | None:
    """Returns the first array of two or three axes of a PDS4 label with its file area, or None."""
    for area in root.iter():
        if tag_of(area).startswith("File_Area_Observational"):
            for array in area:
                if tag_of(array).startswith(("Array_2D", "Array_3D")) or tag_of(array) == "Array":
                    return area, array
    return None


def _pds4(root: Any, is_real: bool) -> Label:
    product_id = instrument = ""
    for element in root.iter():
        if tag_of(element) == "logical_identifier" and not product_id:
            product_id = (element.text or "").strip().rpartition(":")[2]
        if tag_of(element) == "Observing_System_Component" and child_text(element, "type").lower() == "instrument":
            instrument = child_text(element, "name")
    found = pds4_array(root)
    constants = children(found[1], "Special_Constants") if found else []
    values = {tag_of(item): _pds4_number(item.text or "", is_real) for part in constants for item in part}
    minimum, maximum = values.pop("valid_minimum", None), values.pop("valid_maximum", None)
    special = tuple(sorted({value for value in values.values() if value is not None}))
    return Label(product_id, instrument, special, minimum, maximum)


def _pds4_number(text: str, is_real: bool) -> float | None:
    text = text.strip()
    return pds3_number(f"16#{text[2:]}#" if text.lower().startswith("0x") else text, is_real)
