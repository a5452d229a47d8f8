"""When and under which light a product was taken, and its GSD, as its PDS3, PDS4, ISIS3 or VICAR label says."""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import re
import xml.etree.ElementTree as ElementTree
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from momo.errors import DataError

_DOMAINS = ("json:ISIS3", "json:PDS", "xml:PDS4", "json:VICAR")

# Keywords in lower case without separators or name space, so that START_TIME, StartTime and start_time are one.
_TIMES = ("starttime", "startdatetime", "imagetime", "observationstarttime")
_ANGLES = {
    "incidence_deg": (("incidenceangle", "solarincidenceangle", "incidence"), 180.0),
    "emission_deg": (("emissionangle", "emission"), 180.0),
    "phase_deg": (("phaseangle", "phase"), 180.0),
    "sub_solar_azimuth_deg": (("subsolarazimuth",), 360.0),
}
# Keywords of the pixel's size on the ground, width and height, and what a number without a unit means in metres.
# MAP_SCALE: kilometres a pixel (PDS Data Dictionary); the resolutions of ISIS: metres a pixel. Others need a unit.
_SCALES = (
    ("mapscale", "", 1000.0),
    ("pixelresolution", "", 1.0),
    ("pixelresolutionx", "pixelresolutiony", math.nan),
    ("pixelscalex", "pixelscaley", math.nan),
    ("sampleresolution", "lineresolution", 1.0),
    ("horizontalpixelscale", "verticalpixelscale", math.nan),
    ("scaledpixelwidth", "scaledpixelheight", math.nan),
    ("horizontalpixelfootprint", "verticalpixelfootprint", math.nan),
    ("pixelscale", "", math.nan),
)
_METRES = {"km": 1000.0, "kilometer": 1000.0, "kilometre": 1000.0, "m": 1.0, "meter": 1.0, "metre": 1.0, "cm": 0.01,
           "centimeter": 0.01, "centimetre": 0.01, "mm": 0.001}  # fmt: skip
_DEGREES = {"": 1.0, "deg": 1.0, "degree": 1.0, "rad": math.degrees(1.0), "radian": math.degrees(1.0),
            "mrad": math.degrees(1e-3), "arcmin": 1 / 60, "arcsec": 1 / 3600}  # fmt: skip
_PER_PIXEL = ("", "px", "pix", "pixel", "pixels", "sample", "line")
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
_TIME = re.compile(
    r"(?P<year>\d{4})(?:-(?:(?P<day_of_year>\d{3})|(?P<month>\d{1,2})(?:-(?P<day>\d{1,2}))?))?"
    r"(?:[T ](?P<hour>\d{1,2})(?::(?P<minute>\d{1,2})(?::(?P<second>\d{1,2})(?P<fraction>\.\d*)?)?)?)?Z?"
)


@dataclass(frozen=True)
class Observation:
    """Circumstances of one product; what the label does not say is "" or NaN.

    Attributes:
        acquired: Start of acquisition, UTC, ISO 8601: `2006-11-08T04:49:14.187Z`, or as much of it as is known.
        incidence_deg: Angle between the sun and the surface normal, degrees, 0..180.
        emission_deg: Angle between the spacecraft and the surface normal, degrees, 0..180.
        phase_deg: Angle between sun, surface and spacecraft, degrees, 0..180.
        sub_solar_azimuth_deg: Direction of the sub-solar point in the image, degrees, 0..360, as the label gives it
            (PDS and ISIS: clockwise from the line towards the right edge).
        gsd_m: Ground sample distance, metres a pixel: the geometric mean of width and height of a pixel.
    """

    acquired: str = ""
    incidence_deg: float = math.nan
    emission_deg: float = math.nan
    phase_deg: float = math.nan
    sub_solar_azimuth_deg: float = math.nan
    gsd_m: float = math.nan


@dataclass(frozen=True)
class _Entry:
    """One keyword of a label: name without separators, value, unit in lower case, number of its group."""

    name: str
    value: Any
    unit: str
    group: int


def read_observation(dataset: Any) -> Observation:
    """Reads the circumstances of an open GDAL dataset from its label, wherever in the label they stand.

    Args:
        dataset: An open GDAL dataset.

    Returns:
        The circumstances; an empty `Observation` without a label. A value that is no number, out of its range (such as
        the flag -9998) or of an unknown unit counts as not said.

    Raises:
        DataError: The label is damaged, or an XML label declares a document type.
    """
    domains = dataset.GetMetadataDomainList() or []
    for domain in _DOMAINS:
        text = (dataset.GetMetadata_List(domain) or [""])[0] if domain in domains else ""
        if isinstance(text, bytes):  # GDAL gives text that is not UTF-8 as bytes
            text = text.decode("utf-8", "replace")
        if text:
            return _observation(list(_xml_entries(text) if domain.startswith("xml") else _json_entries(text)))
    return Observation()


def _observation(entries: list[_Entry]) -> Observation:
    found: dict[str, Any] = {"acquired": next(filter(None, map(_iso, _named(entries, _TIMES))), "")}
    for field, (names, limit) in _ANGLES.items():
        angles = (_angle(entry, limit) for entry in _named(entries, names))
        found[field] = next((angle for angle in angles if not math.isnan(angle)), math.nan)
    return dataclasses.replace(Observation(gsd_m=_gsd(entries)), **found)


def _named(entries: list[_Entry], names: tuple[str, ...]) -> Iterator[_Entry]:
    """Yields the entries of the first name, then those of the second; each in the order of the label."""
    for name in names:
        yield from (entry for entry in entries if entry.name == name)


# Reading labels


def _json_entries(text: str) -> Iterator[_Entry]:
    """Yields the keywords of a label that GDAL turned into JSON, outer groups first."""
    try:
        label = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _unreadable(error) from None
    queue, group = deque([label]), 0
    while queue:
        parent = queue.popleft()
        group += 1
        for key, value in parent.items():
            if isinstance(value, dict) and "value" in value:
                yield _Entry(_keyword(key), value["value"], _unit(value.get("unit")), group)
            elif not isinstance(value, dict):
                yield _Entry(_keyword(key), value, "", group)
            elif key not in ("NaifKeywords", "History") and not key.startswith("Table"):
                queue.append(value)


def _xml_entries(text: str) -> Iterator[_Entry]:
    """Yields the elements of a PDS4 label; what is said of a corner of the image comes after all the rest."""
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise DataError(
            "a PDS4 label declares a document type",
            seen=text[max(0, text.find("<!")) :][:60],
            rule="labels are read without entities, which could name other files or grow without bound",
            fix="remove the DOCTYPE from the label",
        )
    try:
        root = ElementTree.fromstring(text)
    except (ElementTree.ParseError, ValueError) as error:
        raise _unreadable(error) from None
    queue, group, of_corners = deque([root]), 0, []
    while queue:
        parent = queue.popleft()
        group += 1
        queue.extend(parent)
        found = [_Entry(_keyword(e.tag), e.text or "", _unit(e.get("unit")), group) for e in parent]
        places = [str(entry.value) for entry in found if entry.name in ("referencelocation", "referencepixellocation")]
        if places and "cent" not in places[0].lower():
            of_corners += found
        else:
            yield from found
    yield from of_corners


def _unreadable(error: Exception) -> DataError:
    return DataError("a label is damaged", seen=error, fix="fetch the product again and compare its checksum")


def _keyword(key: Any) -> str:
    """Returns a name in lower case without its name space and separators ("MRO:START_TIME" -> "starttime")."""
    return re.sub(r"[^a-z0-9]", "", re.split(r"[:}]", str(key))[-1].lower())


def _unit(unit: Any) -> str:
    return str(unit or "").strip('<>" ').lower()


# Values


def _number(entry: _Entry) -> tuple[float, str]:
    """Returns the value and the unit of an entry; NaN for what is not one number."""
    value, unit = entry.value, entry.unit
    if isinstance(value, list):
        value = value[0] if len(value) == 1 else None
    if isinstance(value, str):
        # GDAL leaves a unit in the value where no space parts them, and in lists.
        value, _, inside = value.strip().strip('"').partition("<")
        unit, value = unit or _unit(inside), value.strip()
        value = float(value) if _NUMBER.fullmatch(value) else None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return math.nan, unit
    return float(value) if math.isfinite(value) else math.nan, unit


def _angle(entry: _Entry, limit: float) -> float:
    """Returns an angle in degrees, 0..limit, or NaN; a full circle may be counted from -180."""
    value, unit = _number(entry)
    value *= _DEGREES.get(unit.removesuffix("s"), math.nan)
    if limit == 360.0 and -180.0 <= value < 0.0:
        value += 360.0
    return value if 0.0 <= value <= limit else math.nan


def _metres(entry: _Entry, unitless: float) -> float:
    value, unit = _number(entry)
    length, _, per = unit.replace(" per ", "/").partition("/")
    factor = _METRES.get(length.strip().removesuffix("s"), math.nan) if unit else unitless
    if per.strip() not in _PER_PIXEL:
        return math.nan
    return value * factor if value > 0.0 else math.nan


def _gsd(entries: list[_Entry]) -> float:
    """Returns the first ground sample distance the label gives, metres, or NaN."""
    for across, down, unitless in _SCALES:
        for entry in _named(entries, (across,)):
            siblings = {other.name: other for other in entries if other.group == entry.group}
            width = _metres(entry, _map_unit(entry, siblings) if across == "mapscale" else unitless)
            if math.isnan(width):
                continue
            height = _metres(siblings[down], unitless) if down in siblings else math.nan
            if math.isnan(height):
                ratio = _number(siblings["pixelaspectratio"])[0] if down and "pixelaspectratio" in siblings else 1.0
                height = width * ratio if ratio > 0.0 else width
            return math.sqrt(width * height)
    return math.nan


def _map_unit(scale: _Entry, siblings: dict[str, _Entry]) -> float:
    """Returns what 1 means in metres for a MAP_SCALE without a unit.

    Kilometres by the PDS Data Dictionary, but producers write metres too: where MAP_RESOLUTION (pixels a degree) and
    the radius stand beside it, they tell which.
    """
    if "mapresolution" not in siblings or "aaxisradius" not in siblings:
        return 1000.0
    resolution, (radius, unit) = _number(siblings["mapresolution"])[0], _number(siblings["aaxisradius"])
    radius_m = radius * _METRES.get(unit.removesuffix("s") or ("km" if radius < 1e5 else "m"), math.nan)
    value, expected_m = _number(scale)[0], math.radians(1.0) * radius_m / resolution if resolution > 0 else math.nan
    if not value > 0.0 or not expected_m > 0.0:
        return 1000.0
    return min((1000.0, 1.0), key=lambda factor: abs(math.log(value * factor / expected_m)))


def _iso(entry: _Entry) -> str:
    """Returns a time in ISO 8601, day of year turned into month and day; "" for UNK, N/A, NULL and what is no time."""
    value = entry.value[0] if isinstance(entry.value, list) and entry.value else entry.value
    parts = _TIME.fullmatch(str(value).strip().strip('"').strip())
    if parts is None:
        return ""
    year, month, day = (int(parts[name] or 1) for name in ("year", "month", "day"))
    try:
        date = datetime.date(year, month, day)
        if parts["day_of_year"]:
            date += datetime.timedelta(days=int(parts["day_of_year"]) - 1)
    except (ValueError, OverflowError):
        return ""
    known = 10 if parts["day"] or parts["day_of_year"] else 7 if parts["month"] else 4
    if date.year != year or parts["day_of_year"] == "000" or (parts["hour"] and known < 10):
        return ""
    if parts["hour"] is None:
        return date.isoformat()[:known]
    clock = _clock(parts)
    return date.isoformat() + clock if clock else ""


def _clock(parts: re.Match[str]) -> str:
    hour, minute, second = (int(parts[name] or 0) for name in ("hour", "minute", "second"))
    if hour > 23 or minute > 59 or second > 60:  # 60: a leap second
        return ""
    fraction = (parts["fraction"] or "").rstrip(".")
    return f"T{hour:02d}:{minute:02d}:{second:02d}{fraction}Z"
