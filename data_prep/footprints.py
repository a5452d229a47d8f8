"""Reading footprints: CSV tables of centres and sizes or of well-known text, and vector files of polygons."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from momo.errors import DataError
from momo.extras import require

from .georeference import MARS_RADIUS_M
from .overlap import MOST_RADIUS_DEG, Shapes, quadrilaterals, tangent_axes
from .split import unit_vectors
from .vectors import Frame, Polygons, as_polygons, read_polygons, unwrapped

Floats = npt.NDArray[np.float64]
_SEGMENT_DEG = 0.05  # longer edges get points between
_MOST_SEGMENTS = 256  # along the extent of a footprint


def read_footprints(path: str) -> tuple[Shapes, list[str], list[str]]:
    """Reads footprints, for example of the test tiles of a benchmark.

    Args:
        path: A CSV file with the columns lon and lat (planetocentric degrees of the centre, east positive) and size_m,
            or width_m and height_m (ground distances east and north), or with a column wkt of polygons in such degrees;
            or a vector file of polygons with a Mars CRS.

    Returns:
        The footprints, the place of each in the file for messages, and notes.

    Raises:
        DataError: The file cannot be read or a row in it is wrong; the message names the row.
    """
    if Path(path).suffix.lower() != ".csv":
        polygons = read_polygons(path)
        return (*_spherical(polygons, path, "feature"), polygons.notes)
    try:
        with open(path, newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            columns = {(name or "").strip().lower(): name for name in reader.fieldnames or ()}
            rows = [(reader.line_num, row) for row in reader if any((value or "") for value in row.values() if value)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError("a table of footprints cannot be read", seen=f"{path}: {error}") from None
    sizes = ("size_m", "size_m") if "size_m" in columns else ("width_m", "height_m")
    if not rows or not ("wkt" in columns or {"lon", "lat", *sizes} <= set(columns)):
        raise DataError(
            "a table of footprints has no row" if not rows else "a table of footprints lacks columns",
            seen=f"{path}: columns {', '.join(columns) or 'none'}",
            rule="lon, lat and size_m (or width_m and height_m), or wkt",
            fix="rename its columns; see docs/data_prep.md",
        )
    if "wkt" in columns:
        geometries = [_from_wkt(row[columns["wkt"]], path, number) for number, row in rows]
        numbers = [number for number, _ in rows]
        _require_degrees(geometries, path, numbers)
        polygons = as_polygons(geometries, [""] * len(rows), numbers, Frame(), path, "row", [])
        return (*_spherical(polygons, path, "row"), polygons.notes)
    wanted = [columns[name] for name in ("lon", "lat", *sizes)]
    values_N4 = np.array([[_number(row[name], path, number, name) for name in wanted] for number, row in rows])
    _require_ranges(values_N4, path, [number for number, _ in rows])
    return quadrilaterals(_rectangles(values_N4)), [f"row {number}" for number, _ in rows], []


def _from_wkt(text: str | None, path: str, number: int) -> Any:
    shapely = require("shapely", "prep")
    try:
        return shapely.from_wkt(text or "")
    except shapely.errors.ShapelyError as error:
        raise DataError(
            "a footprint cannot be read",
            seen=f"{path}: row {number}: {' '.join(str(error).split())}",
            rule="well-known text of a polygon, for example POLYGON ((10 0, 11 0, 11 1, 10 0))",
        ) from None


def _require_degrees(geometries: Sequence[Any], path: str, numbers: Sequence[int]) -> None:
    bounds_N4 = np.abs(require("shapely", "prep").bounds(np.array(geometries, dtype=object)))
    for n in np.flatnonzero((bounds_N4 > [540.0, 90.0, 540.0, 90.0]).any(axis=1))[:1]:
        raise DataError(
            "a footprint is out of range",
            seen=f"{path}: row {numbers[n]}: {str(geometries[n])[:100]}",
            rule="planetocentric degrees, lon -540..540, lat -90..90",
        )


def _number(text: str | None, path: str, row: int, column: str) -> float:
    try:
        return float(text or "")
    except ValueError:
        raise DataError(
            "a footprint cannot be read", seen=f"{path}: row {row}: {column} = {text!r}", rule="a number"
        ) from None


def _require_ranges(values_N4: Floats, path: str, numbers: Sequence[int]) -> None:
    lon, lat, width, height = values_N4.T
    good = (np.abs(lon) <= 360) & (np.abs(lat) <= 90) & (np.minimum(width, height) > 0)
    most = 2.0 * math.tan(math.radians(MOST_RADIUS_DEG)) * MARS_RADIUS_M
    good &= np.hypot(width, height) <= most
    for n in np.flatnonzero(~good)[:1]:
        raise DataError(
            "a footprint is out of range",
            seen=f"{path}: row {numbers[n]}: lon {lon[n]:g}, lat {lat[n]:g}, {width[n]:g} x {height[n]:g} m",
            rule=f"lon -360..360, lat -90..90, sizes above 0 m, at most {most / 1000:.0f} km from corner to corner",
        )


def _rectangles(values_N4: Floats) -> Floats:
    """Returns corners of rectangles in the planes that touch the sphere of the mean radius at their centres."""
    centre_N3 = unit_vectors(values_N4[:, 0], values_N4[:, 1])
    east, north, _ = np.moveaxis(tangent_axes(centre_N3), 1, 0)
    half_N2 = values_N4[:, 2:] / 2.0 / MARS_RADIUS_M
    corners = []
    for right, up in ((-1, 1), (1, 1), (1, -1), (-1, -1)):
        point_N3 = centre_N3 + right * half_N2[:, :1] * east + up * half_N2[:, 1:] * north
        corners.append(np.degrees(np.arctan2(point_N3[:, 1], point_N3[:, 0])))
        corners.append(np.degrees(np.arctan2(point_N3[:, 2], np.hypot(point_N3[:, 0], point_N3[:, 1]))))
    return np.stack(corners, axis=1)


def _spherical(polygons: Polygons, path: str, item: str) -> tuple[Shapes, list[str]]:
    """Returns polygons of a file on the sphere, with points between on long edges."""
    frame, vertices, rings, shapes = polygons.frame, [], [0], [0]
    unit = (frame.period or math.radians(360.0) * MARS_RADIUS_M) / 360.0
    for polygon, number in zip(polygons.geometry_P, polygons.feature_P, strict=True):
        west, south, east, north = polygon.bounds
        longest = max(_SEGMENT_DEG * unit, max(east - west, north - south) / _MOST_SEGMENTS)
        for ring in (polygon.exterior, *polygon.interiors):
            ring_V2 = _densified(unwrapped(np.asarray(ring.coords)[:, :2], frame.period), longest)
            lonlat_V2 = np.stack(frame.lonlat(ring_V2[:, 0], ring_V2[:, 1]), axis=1)
            if not np.isfinite(lonlat_V2).all():
                raise DataError("a footprint leaves the map", seen=f"{path}: {item} {number}")
            vertices.append(lonlat_V2)
            rings.append(rings[-1] + len(lonlat_V2))
        shapes.append(len(rings) - 1)
    found = Shapes(np.concatenate(vertices), np.array(rings), np.array(shapes))
    return found, [f"{item} {number}" for number in polygons.feature_P]


def _densified(ring_V2: Floats, longest: float) -> Floats:
    """Returns the points of a closed ring, without the last, with points between so that no step is longer."""
    step_V2 = np.diff(ring_V2, axis=0)
    count = np.maximum(1, np.ceil(np.abs(step_V2).max(axis=1) / longest)).astype(np.int64)
    edge = np.repeat(np.arange(len(count)), count)
    share = (np.arange(len(edge)) - np.repeat(np.cumsum(count) - count, count)) / count[edge]
    return np.asarray(ring_V2[edge] + share[:, None] * step_V2[edge])
