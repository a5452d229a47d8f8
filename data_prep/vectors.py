"""Vector files on Mars: polygons with an attribute, and from their coordinates to planetocentric degrees and back."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from momo.errors import DataError
from momo.extras import require

from .georeference import Georeference, require_mars

Floats = npt.NDArray[np.float64]
_UNIT_PIXELS = (0.0, 1.0, 0.0, 0.0, 0.0, 1.0)  # a geotransform that leaves coordinates as they are
_CHUNK = 100_000
_FULL_TURN = 1.0 - 1e-6  # share of a period from which on an edge goes round Mars and is no jump over the antimeridian


@dataclass(frozen=True)
class Frame:
    """Coordinates of a vector file.

    Attributes:
        wkt: CRS of the file; "" when its coordinates are planetocentric degrees.
        named_centric: Latitudes are planetocentric by the name of the CRS, though its axes do not say so.
    """

    wkt: str = ""
    named_centric: bool = False

    @cached_property
    def _georeference(self) -> Georeference:
        return Georeference(self.wkt, _UNIT_PIXELS)

    @cached_property
    def period(self) -> float | None:
        """Step along x that leads round Mars to the same ground; None when there is no such step."""
        if not self.wkt:
            return 360.0
        crs = self._georeference.crs
        if crs.IsGeographic():
            return 360.0 / float(np.degrees(crs.GetAngularUnits()))
        if "equirectangular" not in (crs.GetAttrValue("PROJECTION") or "").lower():
            return None
        middle = float(crs.GetProjParm("central_meridian", 0.0))
        x, _ = self.from_lonlat(np.array([middle, middle + 90.0]), np.zeros(2))
        return 4.0 * float(x[1] - x[0])

    def lonlat(self, x: Floats, y: Floats) -> tuple[Floats, Floats]:
        """Returns planetocentric longitude (east, -180..180) and latitude, degrees; NaN where there is no ground."""
        if self.wkt and not self.named_centric:
            return self._georeference.lonlat(x, y)
        if self.named_centric:
            degrees = math.degrees(self._georeference.crs.GetAngularUnits())
            x, y = x * degrees, y * degrees
        return (x + 180.0) % 360.0 - 180.0, y

    def from_lonlat(self, lon_N: Floats, lat_N: Floats) -> tuple[Floats, Floats]:
        """Returns the file's coordinates of planetocentric degrees; not finite where the projection has no place."""
        if not self.wkt:
            return lon_N, lat_N
        crs = self._georeference.crs
        if crs.IsGeographic():
            degrees = float(np.degrees(crs.GetAngularUnits()))
            sign = -1.0 if self._georeference.longitude_is_west() else 1.0
            if not (self.named_centric or self._georeference.latitude_is_planetocentric()):
                lat_N = self._geodetic(lat_N)
            return sign * lon_N / degrees, lat_N / degrees
        points_N2 = np.stack([lon_N, self._geodetic(lat_N)], axis=1)
        # PROJ takes lists of Python numbers, which need much room.
        parts = [
            np.asarray(self._from_geodetic.TransformPoints(points_N2[k : k + _CHUNK].tolist()), dtype=np.float64)
            for k in range(0, len(points_N2), _CHUNK)
        ]
        table = np.concatenate([np.empty((0, 3)), *parts])
        return table[:, 0], table[:, 1]

    @cached_property
    def _from_geodetic(self) -> Any:
        osr, crs = require("osgeo.osr", "prep"), self._georeference.crs
        own = osr.SpatialReference()
        own.SetGeogCS("own", "own", "own", crs.GetSemiMajor(), crs.GetInvFlattening())
        own.SetAxisMappingStrategy(osr.OAMS_TRADITIONAL_GIS_ORDER)
        return osr.CoordinateTransformation(own, crs)

    def _geodetic(self, planetocentric: Floats) -> Floats:
        inverse = self._georeference.crs.GetInvFlattening()
        if not inverse:
            return planetocentric
        angle = np.radians(planetocentric)
        return np.degrees(np.arctan2(np.sin(angle), (1.0 - 1.0 / inverse) ** 2 * np.cos(angle)))


@dataclass(frozen=True)
class Polygons:
    """Polygons of a vector file.

    Attributes:
        geometry_P: Shapely polygons in the file's coordinates, without multi-polygons. Those over the antimeridian are
            drawn on beyond it; rings round a pole are as the file has them.
        value_P: Attribute of each, as text; "" without a column.
        feature_P: Number of the feature each belongs to, from 1.
        frame: The file's coordinates.
        notes: What was taken for granted or mended.
    """

    geometry_P: npt.NDArray[Any]
    value_P: list[str]
    feature_P: npt.NDArray[np.int64]
    frame: Frame
    notes: list[str]


def read_polygons(path: str, *, column: str | None = None, layer: str | None = None) -> Polygons:
    """Reads the polygons of a vector file through OGR.

    Args:
        path: Shapefile, GeoPackage, GeoJSON or another vector file that GDAL opens.
        column: Column of the attribute.
        layer: Layer; the first when None.

    Raises:
        DataError: The file, layer or column is missing, it holds no polygons or other geometries, its CRS is not of
            Mars, or it has none and its coordinates are no degrees.
    """
    gdal, shapely = require("osgeo.gdal", "prep"), require("shapely", "prep")
    gdal.UseExceptions()
    dataset = _open(gdal, path)
    source = _layer(dataset, path, layer)
    field = _column(source, path, column)
    geometries, values, features = [], [], []
    for number, feature in enumerate(source, start=1):
        shape = feature.GetGeometryRef()
        if shape is None or shape.IsEmpty():
            continue
        shape = shape.GetLinearGeometry() if shape.HasCurveGeometry() else shape
        geometries.append(shapely.from_wkb(bytes(shape.ExportToIsoWkb())))
        values.append(
            "" if field is None or not feature.IsFieldSetAndNotNull(field) else feature.GetFieldAsString(field)
        )
        features.append(number)
    frame, notes = _frame(source, path, dataset.GetDriver().ShortName, geometries)
    return as_polygons(geometries, values, features, frame, path, "feature", notes)


def as_polygons(
    geometries: Sequence[Any], values: Sequence[str], numbers: Sequence[int], frame: Frame, path: str, item: str,
    notes: list[str],
) -> Polygons:  # fmt: skip
    """Checks geometries and takes multi-polygons apart.

    Args:
        geometries: Shapely geometries.
        values: Attribute of each.
        numbers: Number of each in the file.
        frame: Their coordinates.
        path: File name for messages.
        item: What `numbers` counts, `feature` or `row`.
        notes: Lines to extend.

    Raises:
        DataError: One is no polygon, is empty or has a coordinate that is no number, or there is none at all.
    """
    shapely = require("shapely", "prep")
    geometry_G = np.empty(len(geometries), dtype=object)
    geometry_G[:] = geometries
    kind_G = shapely.get_type_id(geometry_G)
    for g in np.flatnonzero(~np.isin(kind_G, (3, 6))):  # polygon, multi-polygon
        raise DataError(
            "a geometry is no polygon",
            seen=f"{path}: {item} {numbers[g]} is a {geometry_G[g].geom_type}",
            rule="every geometry is a polygon or multi-polygon",
            fix="draw areas, or remove the others",
        )
    coordinate_V2, owner_V = shapely.get_coordinates(geometry_G, return_index=True)
    bad = np.concatenate(
        [owner_V[~np.isfinite(coordinate_V2).all(axis=1)], np.flatnonzero(shapely.is_empty(geometry_G))]
    )
    if len(bad):
        raise DataError(
            "a polygon is empty or has a coordinate that is no number", seen=f"{path}: {item} {numbers[bad.min()]}"
        )
    part_P, owner_P = shapely.get_parts(geometry_G, return_index=True)
    part_P, owner_P = _mended(part_P, owner_P, frame.period, path, notes)
    if not len(part_P):
        raise DataError("a vector file holds no polygon with an area", seen=path, fix="check the path and the layer")
    return Polygons(part_P, [values[g] for g in owner_P], np.asarray(numbers)[owner_P], frame, notes)


def _mended(
    part_P: npt.NDArray[Any], owner_P: npt.NDArray[np.int64], period: float | None, path: str, notes: list[str]
) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
    """Returns valid polygons with an area, and whose they are; those over the antimeridian drawn on beyond it."""
    shapely = require("shapely", "prep")
    over, polar = 0, np.zeros(len(part_P), dtype=bool)
    if period is not None:
        west_P, _, east_P, _ = shapely.bounds(part_P).T
        for p in np.flatnonzero(east_P - west_P > period / 2.0):
            rings = [np.asarray(ring.coords)[:, :2] for ring in (part_P[p].exterior, *part_P[p].interiors)]
            drawn = [unwrapped(ring_V2, period) for ring_V2 in rings]
            over += any(after is not before for after, before in zip(drawn, rings, strict=True))
            polar[p] = not all(is_closed(ring_V2) for ring_V2 in drawn)
            if not polar[p]:
                part_P[p] = without_holes(drawn, period)
    if over:
        notes.append(f"{path}: {over} polygons have steps of over half of Mars: taken as lying over the antimeridian")
    bad_P = ~polar & ~shapely.is_valid(part_P)  # a ring round a pole is closed along it by who draws it in a plane
    if bad_P.any():
        part_P[bad_P] = shapely.make_valid(part_P[bad_P])
        notes.append(f"{path}: {int(bad_P.sum())} polygons cross themselves: mended")
    before = owner_P
    for _ in range(2):  # a mended polygon may be a collection of multi-polygons
        part_P, inner = shapely.get_parts(part_P, return_index=True)
        owner_P, polar = owner_P[inner], polar[inner]
    areal = polar | ((shapely.get_type_id(part_P) == 3) & (shapely.area(part_P) > 0))
    lost = len(np.setdiff1d(before, owner_P[areal]))
    if lost:
        notes.append(f"{path}: {lost} polygons have no area: left out")
    return part_P[areal], owner_P[areal]


def is_closed(ring_V2: Floats) -> bool:
    """Returns False for an unwrapped ring that goes round a pole."""
    return bool(abs(ring_V2[-1, 0] - ring_V2[0, 0]) <= 1e-9 * abs(ring_V2[:, 0]).max())


def without_holes(rings: Sequence[Floats], period: float) -> Any:
    """Returns the shapely geometry of closed rings, the outer one first, holes cut a period aside too."""
    shapely = require("shapely", "prep")
    if len(rings) == 1:
        return shapely.Polygon(rings[0])
    shell, *holes = (shapely.make_valid(shapely.Polygon(ring_V2)) for ring_V2 in rings)
    steps = np.array([[-period, 0.0], [0.0, 0.0], [period, 0.0]])
    turns = [shapely.transform(hole, lambda xy_V2, step=step: xy_V2 + step) for hole in holes for step in steps]
    return shapely.difference(shell, shapely.union_all(turns))


def unwrapped(ring_V2: Floats, period: float | None) -> Floats:
    """Returns a closed ring whose neighbouring points are near each other along x.

    A ring over the antimeridian, 179 -> -179, becomes 179 -> 181. The last point then differs from the first by a
    period when the ring goes round a pole. Edges of a whole turn, as a band round Mars has, stay.
    """
    if period is None:
        return ring_V2
    step = np.diff(ring_V2[:, 0])
    jumps = (np.abs(step) > period / 2.0) & (np.abs(step) < _FULL_TURN * period)
    if not jumps.any():
        return ring_V2
    turns = np.concatenate([[0.0], np.cumsum(np.where(jumps, -np.sign(step), 0.0))])
    return np.stack([ring_V2[:, 0] + turns * period, ring_V2[:, 1]], axis=1)


def _open(gdal: Any, path: str) -> Any:
    if not path.startswith("/vsi") and not Path(path).exists():
        raise DataError("a vector file does not exist", seen=path, fix="check the path")
    try:
        return gdal.OpenEx(path, gdal.OF_VECTOR)
    except RuntimeError as error:
        raise DataError(
            "GDAL cannot open a vector file",
            seen=f"{path}: {' '.join(str(error).split())}",
            rule="a vector format of this GDAL (ogrinfo --formats)",
            fix="check it with ogrinfo",
        ) from None


def _layer(dataset: Any, path: str, name: str | None) -> Any:
    names = [dataset.GetLayer(k).GetName() for k in range(dataset.GetLayerCount())]
    if not names or (name is not None and name not in names):
        raise DataError(
            "a vector file has no such layer",
            seen=f"{path}: {name or 'no layer at all'}",
            rule=f"its layers are {', '.join(names) or 'none'}",
            fix="set strata.layer" if names else "check it with ogrinfo",
        )
    return dataset.GetLayerByName(name) if name is not None else dataset.GetLayer(0)


def _column(layer: Any, path: str, name: str | None) -> int | None:
    if name is None:
        return None
    definition = layer.GetLayerDefn()
    names = [definition.GetFieldDefn(k).GetName() for k in range(definition.GetFieldCount())]
    if name not in names:
        raise DataError(
            "a vector file has no such column",
            seen=f"{path}: {name}",
            rule=f"its columns are {', '.join(names) or 'none'}",
            fix="set strata.column",
        )
    return names.index(name)


def _frame(layer: Any, path: str, driver: str, geometries: Sequence[Any]) -> tuple[Frame, list[str]]:
    crs = layer.GetSpatialRef()
    known = crs is not None and (crs.IsProjected() or crs.IsGeographic())
    if known and crs.GetName().startswith("Undefined"):
        known = False  # GDAL's name for the CRS of a GeoPackage that has none, on Earth's ellipsoid
    if known and driver == "GeoJSON" and not _names_crs(path):
        known = False  # GDAL says Earth's WGS 84 for every GeoJSON file without a CRS
    if not known:
        return Frame(), [_require_degrees(path, geometries)]
    require_mars(crs, "vector file", path, "give it its own Mars CRS (ogr2ogr -a_srs IAU_2015:49900 ...)")
    return _as_named(Frame(crs.ExportToWkt()), path)


def _as_named(frame: Frame, path: str) -> tuple[Frame, list[str]]:
    """Takes latitudes as the name of the CRS says: shapefiles and GeoJSON keep the name, but not what the axes are."""
    crs = frame._georeference.crs
    name = str(crs.GetName())
    if not crs.IsGeographic() or not crs.GetInvFlattening() or frame._georeference.latitude_is_planetocentric():
        return frame, []
    if re.search(r"(planet|areo|(?<![a-z]))ocentric", name.lower()):
        note = f"{path}: its latitudes are taken as planetocentric, as the name of its CRS says ({name})"
        return Frame(frame.wkt, named_centric=True), [note]
    if re.search(r"(planet|areo|(?<![a-z]))ographic", name.lower()) and not frame._georeference.longitude_is_west():
        return frame, [f"{path}: its longitudes are taken as east positive, though its CRS is named {name}"]
    return frame, []


def _names_crs(path: str) -> bool:
    try:
        with open(path, encoding="utf-8", errors="replace") as stream:
            return re.search(r'"crs"\s*:\s*\{', stream.read(1 << 16)) is not None
    except OSError:
        return True


def _require_degrees(path: str, geometries: Sequence[Any]) -> str:
    bounds = require("shapely", "prep").total_bounds(np.array(geometries, dtype=object))
    low_x, low_y, high_x, high_y = (float(value) for value in bounds)
    if not (low_x >= -540.0 and high_x <= 540.0 and low_y >= -90.0 and high_y <= 90.0):
        raise DataError(
            "a vector file has no CRS, and its coordinates are no degrees",
            seen=f"{path}: x {low_x:g} to {high_x:g}, y {low_y:g} to {high_y:g}",
            rule="without a CRS coordinates are planetocentric degrees, x -540..540 and y -90..90",
            fix="give it its Mars CRS (ogr2ogr -a_srs IAU_2015:49910 ...)",
        )
    return f"{path} names no CRS: taken as planetocentric degrees, east positive"
