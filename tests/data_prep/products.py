"""Writers of tiny products for the prep tests, all through GDAL or byte by byte."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("osgeo.gdal", reason="GDAL is not installed (extra prep)")
from osgeo import gdal, gdal_array, osr

gdal.UseExceptions()
osr.UseExceptions()

SPHERE = (3396190.0, 0.0)
ELLIPSOID = (3396190.0, 169.894447223612)


def mars_crs(kind: str = "equirectangular", body: tuple[float, float] = SPHERE, lat: float = 0.0, lon: float = 0.0):
    crs = osr.SpatialReference()
    if kind == "equirectangular":
        crs.SetEquirectangular2(0.0, lon, lat, 0.0, 0.0)
    elif kind == "sinusoidal":
        crs.SetSinusoidal(lon, 0.0, 0.0)
    elif kind == "polar":
        crs.SetPS(90.0, 0.0, 1.0, 0.0, 0.0)
    crs.SetGeogCS(f"GCS_Mars_{kind}", "D_Mars", "Mars", *body)
    if kind != "geographic":
        crs.SetProjCS(f"Mars {kind}")
    return crs


def earth_crs():
    crs = osr.SpatialReference()
    crs.ImportFromEPSG(32633)
    return crs


def terrain(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth field in 0..1 with a little noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / 16.0
    field = np.sin(x + rng.uniform(0, 6)) + np.cos(0.7 * y + rng.uniform(0, 6)) + rng.normal(0, 0.05, (height, width))
    return (field - field.min()) / np.ptp(field)


def write_raster(
    path: Path,
    bands,
    *,
    driver="GTiff",
    crs=None,
    transform=None,
    nodata=None,
    scale=None,
    offset=None,
    alpha=False,
    options=(),
) -> Path:
    """Writes one 2-D array or a list of them."""
    bands = [bands] if isinstance(bands, np.ndarray) else list(bands)
    height, width = bands[0].shape
    kind = gdal_array.NumericTypeCodeToGDALTypeCode(bands[0].dtype)
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset = gdal.GetDriverByName(driver).Create(str(path), width, height, len(bands), kind, list(options))
    if crs is not None:
        dataset.SetSpatialRef(crs)
        dataset.SetGeoTransform(transform or (0.0, 10.0, 0.0, 0.0, 0.0, -10.0))
    for number, values in enumerate(bands, start=1):
        band = dataset.GetRasterBand(number)
        if scale is not None:
            band.SetScale(scale)
            band.SetOffset(offset or 0.0)
        if nodata is not None:
            band.SetNoDataValue(nodata)
        if alpha and number == len(bands):
            band.SetColorInterpretation(gdal.GCI_AlphaBand)
        band.WriteArray(values)
    dataset.FlushCache()
    del dataset
    return path


def write_pds3(path: Path, image: np.ndarray, *, prefix=0, suffix=0, labelled_suffix=None, missing="16#FF#") -> Path:
    """Writes an attached-label PDS3 image whose lines may carry extra bytes, like a HiRISE EDR."""
    height, width = image.shape
    start = 4096
    label = "\r\n".join([
        "PDS_VERSION_ID = PDS3", "RECORD_TYPE = UNDEFINED", f"^IMAGE = {start + 1} <BYTES>",
        'INSTRUMENT_ID = "HIRISE"', 'PRODUCT_ID = "PSP_TEST_RED"', 'TARGET_NAME = "MARS"',
        "OBJECT = IMAGE", f"  LINES = {height}", f"  LINE_SAMPLES = {width}", "  SAMPLE_BITS = 8",
        "  SAMPLE_TYPE = MSB_UNSIGNED_INTEGER", f"  MISSING_CONSTANT = {missing}",
        f"  LINE_PREFIX_BYTES = {prefix}",
        f"  LINE_SUFFIX_BYTES = {suffix if labelled_suffix is None else labelled_suffix}",
        "END_OBJECT = IMAGE", "END", "",
    ])  # fmt: skip
    rng = np.random.default_rng(0)
    lines = [rng.bytes(prefix) + row.tobytes() + rng.bytes(suffix) for row in image]
    path.write_bytes(label.encode().ljust(start) + b"".join(lines))
    return path
