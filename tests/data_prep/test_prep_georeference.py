from __future__ import annotations

import math
import pickle

import numpy as np
import pytest

from momo.data_prep.georeference import Georeference, read_georeference
from momo.errors import DataError
from tests.data_prep.products import ELLIPSOID, gdal, mars_crs, osr, write_raster

RADIUS = 3396190.0


def place(georeference, col, row):
    lon, lat = georeference.lonlat(np.array([col]), np.array([row]))
    return float(lon[0]), float(lat[0])


def test_equirectangular_on_the_sphere():
    degree = RADIUS * math.pi / 180
    geo = Georeference(mars_crs().ExportToWkt(), (170 * degree, 100.0, 0, -10 * degree, 0, -100.0))
    assert place(geo, 0.0, 0.0) == pytest.approx((170.0, -10.0))
    assert place(geo, 20 * degree / 100, 5 * degree / 100) == pytest.approx((-170.0, -15.0)), "wrapped at 180"
    assert geo.gsd_m == pytest.approx(100.0)


def test_latitude_is_planetocentric_on_the_ellipsoid():
    geodetic = 45.0
    geo = Georeference(mars_crs("geographic", ELLIPSOID).ExportToWkt(), (30.0, 0.01, 0, geodetic, 0, -0.01))
    centric = math.degrees(math.atan((1 - 1 / ELLIPSOID[1]) ** 2 * math.tan(math.radians(geodetic))))
    assert centric == pytest.approx(geodetic - 0.3382, abs=1e-3)
    assert place(geo, 0.0, 0.0) == pytest.approx((30.0, centric))
    assert geo.gsd_m == pytest.approx(0.01 * math.pi / 180 * RADIUS)
    projected = mars_crs("sinusoidal", ELLIPSOID, lon=30.0)
    own = mars_crs("geographic", ELLIPSOID)
    for crs in (projected, own):
        crs.SetAxisMappingStrategy(osr.OAMS_TRADITIONAL_GIS_ORDER)
    x, y, _ = osr.CoordinateTransformation(own, projected).TransformPoint(30.0, geodetic)
    geo = Georeference(projected.ExportToWkt(), (x, 5.0, 0, y, 0, -5.0))
    assert place(geo, 0.0, 0.0) == pytest.approx((30.0, centric))


@pytest.mark.parametrize(("code", "lon", "lat"), [(49900, 10.0, 20.0), (49901, -10.0, 19.783), (49902, 10.0, 20.0)])
def test_official_mars_crs_codes(code, lon, lat):
    """49900 sphere; 49901 planetographic, west positive; 49902 planetocentric on the ellipsoid."""
    crs = osr.SpatialReference()
    crs.SetFromUserInput(f"IAU_2015:{code}")
    geo = Georeference(crs.ExportToWkt(), (10.0, 0.1, 0, 20.0, 0, -0.1))
    assert place(geo, 0.0, 0.0) == pytest.approx((lon, lat), abs=1e-3)


def test_rotated_pixels_and_pickling():
    geo = Georeference(mars_crs().ExportToWkt(), (0.0, 3.0, 4.0, 0.0, 4.0, -3.0))
    assert geo.gsd_m == pytest.approx(5.0)
    place(geo, 1.0, 1.0)
    assert pickle.loads(pickle.dumps(geo)) == geo


def test_off_the_map_is_nan():
    geo = Georeference(mars_crs("sinusoidal").ExportToWkt(), (0.0, 1e6, 0, 0.0, 0, -1e6))
    assert all(math.isnan(value) for value in place(geo, 3.0, -6.0))


def test_without_crs_nothing_is_known(tmp_path):
    plain, notes = read_georeference(gdal.Open(str(write_raster(tmp_path / "a.tif", np.zeros((2, 2), np.uint8)))), "a")
    assert (
        notes == []
        and plain == Georeference()
        and math.isnan(plain.gsd_m)
        and plain.name == "no CRS"
        and not plain.located
    )


@pytest.mark.parametrize(("radius", "is_mended"), [(3396036.8126024, True), (3396190.0, False)])
def test_parallel_of_older_hirise_files_is_mended(tmp_path, radius, is_mended):
    """Radius and coordinates are those of PSP_001892_1715_COLOR, whose scene lies near 8.2 degrees south."""
    crs = mars_crs(body=(radius, 0.0))
    crs.SetProjParm("latitude_of_origin", -5.0)
    path = write_raster(tmp_path / "a.tif", np.zeros((2, 2), np.uint8), driver="GTiff", crs=crs,
                        transform=(5633625.875, 0.25, 0, -488784.875, 0, -0.25))  # fmt: skip
    dataset = gdal.Open(str(path))
    assert dataset.GetSpatialRef().GetProjParm("latitude_of_origin", 0.0) == -5.0
    geo, notes = read_georeference(dataset, "a.tif")
    lat = math.degrees(-488784.875 / radius)
    lon = math.degrees(5633625.875 / radius)
    if is_mended:
        assert place(geo, 0.0, 0.0) == pytest.approx((lon / math.cos(math.radians(5.0)), lat), abs=1e-6)
        assert "mended, or it would lie 5 degrees off" in notes[0]
    else:
        assert place(geo, 0.0, 0.0) == pytest.approx((lon, lat - 5.0), abs=1e-6) and notes == []


def test_crs_that_proj_cannot_use_is_an_error(tmp_path):
    path = write_raster(tmp_path / "a.tif", np.zeros((2, 2), np.uint8), crs=mars_crs("sinusoidal"),
                        transform=(9e7, 10, 0, 9e7, 0, -10))  # fmt: skip
    with pytest.raises(DataError, match=r"the product's CRS cannot be used: a\.tif"):
        read_georeference(gdal.Open(str(path)), "a.tif")
