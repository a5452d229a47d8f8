"""What PDS3, PDS4, ISIS3 and VICAR labels say about a product, read through GDAL's metadata domains."""

from __future__ import annotations

import json
import struct
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from typing import Any

# PDS3 keywords of an IMAGE, QUBE or SPECTRAL_QUBE object that name values which are no measurement.
_PDS3_SPECIAL = (
    "MISSING_CONSTANT", "MISSING", "INVALID_CONSTANT", "NULL_CONSTANT", "UNKNOWN_CONSTANT", "NOT_APPLICABLE_CONSTANT",
    "CORE_NULL", "CORE_LOW_REPR_SATURATION", "CORE_LOW_INSTR_SATURATION", "CORE_HIGH_REPR_SATURATION",
    "CORE_HIGH_INSTR_SATURATION",
)  # fmt: skip
_PDS3_OBJECTS = ("IMAGE", "SPECTRAL_QUBE", "QUBE", "UNCOMPRESSED_FILE")


@dataclass(frozen=True)
class LineLayout:
    """How the lines of a raw image lie in its file.

    Attributes:
        start: First byte of the first line (its prefix included).
        prefix: Bytes before the samples of each line.
        suffix: Bytes after them.
    """

    start: int
    prefix: int
    suffix: int


@dataclass(frozen=True)
class Label:
    """The part of a label that prep uses.

    Attributes:
        product_id: Product identifier, or "" when the file has no label.
        instrument: Instrument as the label spells it, or "".
        special: Values that are no measurement; empty when the label names none.
        minimum: Smallest value that is a measurement, or None.
        lines: Line layout when lines carry prefix or suffix bytes, else None.
    """

    product_id: str = ""
    instrument: str = ""
    special: tuple[float, ...] = ()
    minimum: float | None = None
    lines: LineLayout | None = None


def read_label(dataset: Any) -> Label:
    """Reads the label of an open GDAL dataset; an unlabelled file gives an empty `Label`."""
    domains = dataset.GetMetadataDomainList() or []
    readers = {"json:ISIS3": _isis3, "json:PDS": _pds3, "xml:PDS4": _pds4, "json:VICAR": _vicar}
    for domain, reader in readers.items():
        text = (dataset.GetMetadata_List(domain) or [""])[0] if domain in domains else ""
        if text:
            return reader(text, dataset.GetRasterBand(1))
    return Label()


def _text(value: Any) -> str:
    if isinstance(value, dict):
        value = value.get("value", "")
    return "" if value is None or isinstance(value, (dict, list)) else str(value).strip().strip('"').strip()


def _isis3(text: str, band: Any) -> Label:
    cube = json.loads(text).get("IsisCube", {})
    archive, instrument = cube.get("Archive") or {}, cube.get("Instrument") or {}
    return Label(_text(archive.get("ProductId")), _text(instrument.get("InstrumentId")))


def _vicar(text: str, band: Any) -> Label:
    label = json.loads(text)
    parts = [label, *(value for value in label.get("PROPERTY", {}).values() if isinstance(value, dict))]
    found = {key: _text(part.get(key)) for key in ("PRODUCT_ID", "INSTRUMENT_ID") for part in parts if part.get(key)}
    return Label(found.get("PRODUCT_ID", ""), found.get("INSTRUMENT_ID", ""))


def _pds3(text: str, band: Any) -> Label:
    label = json.loads(text)
    image: dict[str, Any] = next((label[name] for name in _PDS3_OBJECTS if isinstance(label.get(name), dict)), {})
    is_real = band.DataType in (6, 7)  # GDT_Float32, GDT_Float64
    special = [pds3_number(image[key], is_real) for key in _PDS3_SPECIAL if key in image]
    prefix, suffix = (int(float(_text(image.get(f"LINE_{end}_BYTES")) or 0)) for end in ("PREFIX", "SUFFIX"))
    return Label(
        _text(label.get("PRODUCT_ID")),
        _text(label.get("INSTRUMENT_ID")) or _text(label.get("INSTRUMENT_NAME")),
        tuple(sorted({value for value in special if value is not None})),
        pds3_number(image.get("CORE_VALID_MINIMUM"), is_real),
        LineLayout(_image_start(label), prefix, suffix) if prefix or suffix else None,
    )


def _image_start(label: dict[str, Any]) -> int:
    """Returns the first byte of the image from its PDS3 pointer (1-based, in records or bytes); -1 if detached."""
    pointer = label.get("^IMAGE")
    if isinstance(pointer, dict) and str(pointer.get("unit", "")).upper() == "BYTES":
        return int(pointer["value"]) - 1
    if isinstance(pointer, int):
        return (pointer - 1) * int(float(_text(label.get("RECORD_BYTES")) or 1))
    return -1


def pds3_number(value: Any, is_real: bool) -> float | None:
    """Returns a PDS3 number, radix notation included, or None.

    GDAL reads `16#FF#` as 16; in a label of real samples such a constant is the bit pattern of a float32
    (ISIS writes NULL as `16#FF7FFFFB#`).
    """
    text = _text(value)
    try:
        if text.count("#") == 2:
            radix, digits, _ = text.split("#")
            bits = int(digits, int(radix))
            return float(struct.unpack(">f", struct.pack(">I", bits))[0]) if is_real else float(bits)
        return float(text)
    except (ValueError, struct.error):
        return None


def _pds4(text: str, band: Any) -> Label:
    root = ElementTree.fromstring(text.encode())
    product_id = instrument = ""
    for element in root.iter():
        tag = element.tag.rpartition("}")[2]
        if tag == "logical_identifier" and not product_id:
            product_id = (element.text or "").strip().rpartition(":")[2]
        if tag == "Observing_System_Component":
            fields = {child.tag.rpartition("}")[2]: (child.text or "").strip() for child in element}
            if fields.get("type", "").lower() == "instrument":
                instrument = fields.get("name", "")
    return Label(product_id, instrument)
