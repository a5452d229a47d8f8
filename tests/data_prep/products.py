"""Writers of tiny products for the prep tests, all through GDAL or byte by byte."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("osgeo.gdal", reason="GDAL is not installed (extra prep)")
from osgeo import gdal, gdal_array, osr

from momo.data_prep.products import Product, inspect, open_product, read_window
from momo.data_prep.sources import Source

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


def source(path: Path) -> Source:
    """What `find_sources` makes of a local file."""
    name = f"/vsigzip/{path.resolve()}" if path.suffix.lower() == ".gz" else str(path)
    return Source(name=name, display=path.name, path=path)


def inspect_file(path: Path, **settings) -> Product:
    """`inspect` of a local file."""
    return inspect(source(path), **settings)


def read(product: Product) -> tuple[np.ndarray, np.ndarray]:
    """Raw values and validity of the whole product."""
    return read_window(open_product(product), product, 0, 0, product.width, product.height)


def assert_reads(path: Path, image: np.ndarray, *, note: str | None = None) -> Product:
    """Asserts that a product has these raw values, and no note or this one."""
    product = inspect_file(path)
    raw, valid = read(product)
    np.testing.assert_array_equal(raw, image)
    assert valid.any() and raw.dtype.isnative
    assert product.notes == () if note is None else any(note in text for text in product.notes), product.notes
    return product


def pds3_label(image: np.ndarray, pointer: str, *, bands=1, missing="16#FF#", extra=(), keys=None) -> str:
    """A PDS3 label of lines of samples; `keys` replaces or removes (None) keywords of the IMAGE object."""
    height, width = image.shape[-2:]
    real, sign = image.dtype.kind == "f", "UNSIGNED_" if image.dtype.kind == "u" else ""
    order = "LSB" if image.dtype.str[0] == "<" else "MSB"
    values = {
        "LINES": height, "LINE_SAMPLES": width, "BANDS": bands, "BAND_STORAGE_TYPE": "BAND_SEQUENTIAL",
        "SAMPLE_BITS": 8 * image.dtype.itemsize,
        "SAMPLE_TYPE": ("PC_REAL" if order == "LSB" else "IEEE_REAL") if real else f"{order}_{sign}INTEGER",
        "MISSING_CONSTANT": missing,
    } | (keys or {})  # fmt: skip
    return "\r\n".join([
        "PDS_VERSION_ID = PDS3", *extra, f"^IMAGE = {pointer}",
        'INSTRUMENT_ID = "HIRISE"', 'PRODUCT_ID = "PSP_TEST_RED"', 'TARGET_NAME = "MARS"', "OBJECT = IMAGE",
        *(f"  {key} = {value}" for key, value in values.items() if value is not None), "END_OBJECT = IMAGE", "END", "",
    ])  # fmt: skip


def write_pds3(
    path: Path, image: np.ndarray, *, prefix=0, suffix=0, labelled_suffix=None, missing="16#FF#", keys=None
) -> Path:
    """Writes an attached-label PDS3 image whose lines may carry extra bytes, like a HiRISE EDR."""
    start = 4096
    extra = {"LINE_PREFIX_BYTES": prefix, "LINE_SUFFIX_BYTES": suffix if labelled_suffix is None else labelled_suffix}
    label = pds3_label(image, f"{start + 1} <BYTES>", missing=missing, extra=["RECORD_TYPE = UNDEFINED"],
                       keys=extra | (keys or {}))  # fmt: skip
    rng = np.random.default_rng(0)
    lines = [rng.bytes(prefix) + row.tobytes() + rng.bytes(suffix) for row in image]
    path.write_bytes(label.encode().ljust(start) + b"".join(lines))
    return path


def write_records(path: Path, image: np.ndarray, *, keys=None) -> Path:
    """Writes an attached-label PDS3 image of fixed-length records, one line each."""
    height, size = image.shape[0], image.shape[1] * image.itemsize
    records = -(-2048 // size)
    extra = ["RECORD_TYPE = FIXED_LENGTH", f"RECORD_BYTES = {size}", f"FILE_RECORDS = {records + height}",
             f"LABEL_RECORDS = {records}"]  # fmt: skip
    label = pds3_label(image, str(records + 1), missing="0", extra=extra, keys=keys)
    path.write_bytes(label.encode().ljust(records * size) + image.tobytes())
    return path


def write_detached(path: Path, image: np.ndarray, *, pointer=None, keys=None, extra=()) -> Path:
    """Writes a detached PDS3 label and its .img."""
    data = path.with_suffix(".img")
    path.write_text(pds3_label(image, pointer or f'"{data.name}"', missing="0", keys=keys, extra=extra), newline="")
    data.write_bytes(image.tobytes())
    return path


ISIS_TYPES = {"u1": "UnsignedByte", "u2": "UnsignedWord", "i2": "SignedWord", "f4": "Real"}


def write_isis3(path: Path, image: np.ndarray, *, tile=None, order="Lsb", keys=None) -> Path:
    """Writes an ISIS3 cube byte by byte, with a history behind the pixels."""
    height, width = image.shape
    data = image.astype(image.dtype.newbyteorder("<" if order == "Lsb" else ">"))
    values = {"StartByte": 4097, "Format": "Tile" if tile else "BandSequential", "Samples": width, "Lines": height,
              "Bands": 1, "Type": ISIS_TYPES[image.dtype.str[1:]], "ByteOrder": order}  # fmt: skip
    if tile:
        columns, rows = tile
        padded = np.zeros((-(-height // rows) * rows, -(-width // columns) * columns), data.dtype)
        padded[:height, :width] = data
        data = padded.reshape(-1, rows, padded.shape[1] // columns, columns).swapaxes(1, 2)
        values |= {"TileSamples": columns, "TileLines": rows}
    values |= keys or {}
    pixels = data.tobytes()
    history = b"Object = test\n  Version = 1\nEnd_Object\n"
    tiling = "".join(f"    {key} = {values[key]}\n" for key in ("TileSamples", "TileLines") if key in values)
    label = f"""Object = IsisCube
  Object = Core
    StartByte = {values["StartByte"]}
    Format = {values["Format"]}
{tiling}    Group = Dimensions
      Samples = {values["Samples"]}
      Lines = {values["Lines"]}
      Bands = {values["Bands"]}
    End_Group
    Group = Pixels
      Type = {values["Type"]}
      ByteOrder = {values["ByteOrder"]}
      Base = 0.0
      Multiplier = 1.0
    End_Group
  End_Object
  Group = Instrument
    InstrumentId = CTX
  End_Group
End_Object
Object = Label
  Bytes = 4096
End_Object
Object = History
  Name = IsisCube
  StartByte = {4097 + len(pixels)}
  Bytes = {len(history)}
End_Object
End
"""
    path.write_bytes(label.encode().ljust(4096, b"\0") + pixels + history)
    return path


def write_vicar(path: Path, image: np.ndarray, *, keys=None, tail=b"") -> Path:
    """Writes a VICAR image byte by byte."""
    height, width = image.shape
    form = {"u1": "BYTE", "i2": "HALF", "f4": "REAL"}[image.dtype.str[1:]]
    record = width * image.itemsize
    size = -(-512 // record) * record
    values = {
        "LBLSIZE": f"{size:<8d}", "FORMAT": f"'{form}'", "TYPE": "'IMAGE'", "BUFSIZ": record, "DIM": 3, "EOL": 0,
        "RECSIZE": record, "ORG": "'BSQ'", "NL": height, "NS": width, "NB": 1, "N1": width, "N2": height, "N3": 1,
        "N4": 0, "NBB": 0, "NLB": 0, "HOST": "'X86-LINUX'",
        "INTFMT": "'HIGH'" if image.dtype.str[0] == ">" else "'LOW'",
        "REALFMT": "'IEEE'" if image.dtype.str[0] == ">" else "'RIEEE'", "BLTYPE": "''",
    } | (keys or {})  # fmt: skip
    label = "  ".join(f"{key}={value}" for key, value in values.items())
    path.write_bytes(label.encode().ljust(size, b"\0") + image.tobytes() + tail)
    return path
