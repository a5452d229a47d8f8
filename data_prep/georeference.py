"""Where on Mars a pixel lies: GSD and planetocentric coordinates from a product's own CRS, never through Earth's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from momo.errors import DataError
from momo.extras import require

MARS_RADIUS_M = 3_389_500.0  # volumetric mean radius (IAU 2015)
# Semi-major axes met in Mars products: ellipsoids, the polar radius and HiRISE's local radii.
_MARS_SEMI_MAJOR_M = (3_365_000.0, 3_405_000.0)
_EARTH_SEMI_MAJOR_M = (6_300_000.0, 6_420_000.0)
_EQUATORIAL_M, _POLAR_M = 3_396_190.0, 3_376_200.0  # Mars ellipsoid of HiRISE and ISIS products (IAU 2000 and 2015)


@dataclass(frozen=True)
class Georeference:
    """Affine georeference of a raster in a Mars CRS, or none at all.

    Attributes:
        wkt: CRS as the product states it; "" without a CRS.
        transform: GDAL geotransform, or None.
    """

    wkt: str = ""
    transform: tuple[float, ...] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"wkt": self.wkt, "transform": self.transform}

    @property
    def located(self) -> bool:
        """True when pixels can be placed on the ground."""
        return bool(self.wkt) and self.transform is not None

    @cached_property
    def crs(self) -> Any:
        """The CRS as an OSR object, x before y."""
        osr = require("osgeo.osr", "prep")
        osr.UseExceptions()
        crs = osr.SpatialReference()
        crs.ImportFromWkt(self.wkt)
        crs.SetAxisMappingStrategy(osr.OAMS_TRADITIONAL_GIS_ORDER)
        return crs

    @property
    def name(self) -> str:
        """Name of the CRS, or `no CRS`."""
        return str(self.crs.GetName()) if self.wkt else "no CRS"

    @cached_property
    def _to_geodetic(self) -> Any:
        """Transformation from the projected CRS to east-positive geodetic degrees on the same ellipsoid."""
        osr = require("osgeo.osr", "prep")
        own = osr.SpatialReference()
        own.SetGeogCS("own", "own", "own", self.crs.GetSemiMajor(), self.crs.GetInvFlattening())
        own.SetAxisMappingStrategy(osr.OAMS_TRADITIONAL_GIS_ORDER)
        return osr.CoordinateTransformation(self.crs, own)

    @property
    def gsd_m(self) -> float:
        """Ground sample distance in metres, NaN when unknown.

        Nominal: exact where the projection has scale 1. In a geographic CRS it is the spacing along the meridian.
        """
        if not self.located:
            return math.nan
        assert self.transform is not None
        _, a, b, _, d, e = self.transform
        if self.crs.IsGeographic():
            return math.hypot(b, e) * self.crs.GetAngularUnits() * self.crs.GetSemiMajor()
        return math.sqrt(abs(a * e - b * d)) * self.crs.GetLinearUnits()

    def lonlat(
        self, col: npt.NDArray[np.float64], row: npt.NDArray[np.float64]
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Returns planetocentric longitude (east, -180..180) and latitude of pixel coordinates, in degrees.

        Args:
            col: Pixel columns, any shape; 0 is the left edge of the first pixel.
            row: Pixel rows, same shape.

        Returns:
            Two arrays of that shape; NaN where the projection has no ground.
        """
        assert self.transform is not None
        x0, a, b, y0, d, e = self.transform
        x, y = x0 + a * col + b * row, y0 + d * col + e * row
        if self.crs.IsGeographic():
            degrees = math.degrees(self.crs.GetAngularUnits())
            sign = -1.0 if self.longitude_is_west() else 1.0
            lon, lat = sign * x * degrees, y * degrees
            if not self.latitude_is_planetocentric():
                lat = self._planetocentric(lat)
        else:
            points = self._to_geodetic.TransformPoints(np.stack([x.ravel(), y.ravel()], axis=1).tolist())
            table = np.asarray(points, dtype=np.float64)
            lon, lat = (table[:, axis].reshape(x.shape) for axis in (0, 1))
            lat = self._planetocentric(lat)
        good = np.isfinite(lon) & np.isfinite(lat) & (np.abs(lat) <= 90.0 + 1e-9)
        lon = np.where(good, (np.where(good, lon, 0.0) + 180.0) % 360.0 - 180.0, np.nan)
        return lon, np.where(good, lat, np.nan)

    def _planetocentric(self, geodetic: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        inverse = self.crs.GetInvFlattening()
        if not inverse:
            return geodetic
        ratio = (1.0 - 1.0 / inverse) ** 2
        angle = np.radians(geodetic)
        return np.degrees(np.arctan2(ratio * np.sin(angle), np.cos(angle)))

    def longitude_is_west(self) -> bool:
        """Returns whether longitudes of a geographic CRS grow to the west."""
        osr = require("osgeo.osr", "prep")
        return any(self.crs.GetAxisOrientation(None, axis) == osr.OAO_West for axis in (0, 1))

    def latitude_is_planetocentric(self) -> bool:
        """Returns whether the axes say that latitudes are planetocentric."""
        return any("planetocentric" in (self.crs.GetAxisName(None, axis) or "").lower() for axis in (0, 1))


def require_mars(crs: Any, what: str, name: str, fix: str) -> None:
    """Checks by its semi-major axis that a CRS is one of Mars.

    Args:
        crs: OSR spatial reference.
        what: What has the CRS, for the message: `product`, `vector file`.
        name: Its name.
        fix: What the user can do.

    Raises:
        DataError: The CRS is Earth's or another body's.
    """
    radius = float(crs.GetSemiMajor())
    if _MARS_SEMI_MAJOR_M[0] <= radius <= _MARS_SEMI_MAJOR_M[1]:
        return
    on_earth = _EARTH_SEMI_MAJOR_M[0] <= radius <= _EARTH_SEMI_MAJOR_M[1]
    raise DataError(
        f"this {what} is on Earth" if on_earth else f"this {what} is not on Mars",
        seen=f"{name}: CRS {crs.GetName()!r} with semi-major axis {radius / 1000:.1f} km",
        rule="a Mars CRS has a semi-major axis of 3365 to 3405 km",
        fix=fix,
    )


def read_georeference(dataset: Any, name: str, messages: Sequence[str] = ()) -> tuple[Georeference, list[str]]:
    """Reads and checks the georeference of an open GDAL dataset.

    Args:
        dataset: The dataset.
        name: File name for messages.
        messages: What GDAL and PROJ said meanwhile, when somebody collects it; used when an error is silent.

    Returns:
        The georeference, and notes on what was mended in it.

    Raises:
        DataError: The CRS is Earth's or another body's, or PROJ cannot use it.
    """
    crs = dataset.GetSpatialRef()
    transform = dataset.GetGeoTransform(can_return_null=True)
    if crs is None or transform is None or not (crs.IsProjected() or crs.IsGeographic()):
        return Georeference(), []
    require_mars(
        crs, "product", name, "set the product's own Mars CRS (gdal_edit.py -a_srs IAU_2015:49900 ...), or leave it out"
    )
    crs, notes = _mended_parallel(crs)
    georeference = Georeference(crs.ExportToWkt(), tuple(float(value) for value in transform))
    middle = (np.array([dataset.RasterXSize / 2]), np.array([dataset.RasterYSize / 2]))
    try:
        lon, lat = georeference.lonlat(*middle)
    except RuntimeError as error:
        raise _unusable(name, str(error) or " ".join(messages[-1:])) from None
    if not (np.isfinite(lon).all() and np.isfinite(lat).all()):
        raise _unusable(name, "its centre has no longitude and latitude")
    return georeference, notes


def _mended_parallel(crs: Any) -> tuple[Any, list[str]]:
    """Mends the equirectangular CRS of older HiRISE JPEG 2000 files (GDAL ticket 2706).

    They give the latitude of true scale as the latitude of origin, which moves the scene by that latitude. Such a
    file is known for certain by its sphere: it has the ellipsoid's radius at exactly that latitude (HiRISE
    DSMAP.CAT: x = R (lon - lon0) cos(lat_p), y = R lat, R the local radius at lat_p).
    """
    origin = crs.GetProjParm("latitude_of_origin", 0.0)
    if "equirectangular" not in (crs.GetAttrValue("PROJECTION") or "").lower() or origin == 0.0:
        return crs, []
    angle = math.radians(origin)
    local = _EQUATORIAL_M * _POLAR_M / math.hypot(_POLAR_M * math.cos(angle), _EQUATORIAL_M * math.sin(angle))
    is_sphere_of_origin = abs(crs.GetSemiMajor() - local) < 0.1 and crs.GetInvFlattening() == 0.0
    if not is_sphere_of_origin or crs.GetProjParm("standard_parallel_1", 0.0) != 0.0:
        return crs, []
    mended = crs.Clone()
    mended.SetProjParm("standard_parallel_1", origin)
    mended.SetProjParm("latitude_of_origin", 0.0)
    return mended, [
        f"its CRS gives the standard parallel {origin:g} as latitude of origin (older HiRISE JP2 files do): "
        f"mended, or it would lie {abs(origin):g} degrees off"
    ]


def _unusable(name: str, reason: str) -> DataError:
    return DataError(
        "the product's CRS cannot be used",
        seen=f"{name}: {' '.join(reason.split())}",
        rule="PROJ can turn its coordinates into longitude and latitude",
        fix="set a right CRS with gdal_edit.py -a_srs, or leave the product out",
    )
