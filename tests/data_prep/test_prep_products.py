from __future__ import annotations

import gzip
import math

import numpy as np
import pytest

from momo.data_prep.labels import pds3_number
from momo.data_prep.products import open_product, quiet_gdal, read_window
from momo.data_prep.radiometry import choose_encoding
from momo.errors import DataError
from tests.data_prep.products import (
    earth_crs,
    gdal,
    mars_crs,
    terrain,
    write_detached,
    write_pds3,
    write_raster,
)
from tests.data_prep.products import (
    inspect_file as inspect,
)

FLOAT_SPECIAL = np.array([0xFF7FFFFB, 0xFF7FFFFC, 0xFF7FFFFD, 0xFF7FFFFE, 0xFF7FFFFF], dtype=np.uint32).view(np.float32)
ISIS_SPECIAL = {
    "uint8": [0, 255],
    "uint16": [0, 1, 2, 65534, 65535],
    "int16": [-32768, -32767, -32766, -32765, -32764],
    "float32": FLOAT_SPECIAL,
}


def read_all(product):
    return read_window(open_product(product), product, 0, 0, product.width, product.height)


@pytest.mark.parametrize("dtype", list(ISIS_SPECIAL))
def test_isis_special_pixels_are_invalid(tmp_path, dtype):
    special = np.asarray(ISIS_SPECIAL[dtype], dtype=dtype)
    image = np.full((8, 8), 100, dtype=dtype)
    image[0, : special.size] = special
    product = inspect(write_raster(tmp_path / "a.cub", image, driver="ISIS3"))
    _, valid = read_all(product)
    assert not valid[0, : special.size].any() and valid.sum() == 64 - special.size
    _, overridden = read_all(inspect(tmp_path / "a.cub", nodata=[100.0]))
    assert not overridden.any(), "an override adds to the special pixels of ISIS, it does not lift them"


def test_declared_nodata_nan_and_infinity(tmp_path):
    image = terrain(8, 8).astype(np.float32)
    image[0, :4] = [-9999.0, np.nan, np.inf, FLOAT_SPECIAL[1]]
    path = write_raster(tmp_path / "a.tif", image, nodata=-9999.0)
    _, valid = read_all(inspect(path))
    assert not valid[0, :4].any() and valid.sum() == 60
    _, trusted_none = read_all(inspect(path, nodata=[]))
    assert trusted_none[0].tolist() == [True, False, False, False] + [True] * 4


def test_nodata_override_replaces_what_the_file_declares(tmp_path):
    image = np.arange(64, dtype=np.uint8).reshape(8, 8)
    path = write_raster(tmp_path / "a.tif", image, nodata=5)
    _, valid = read_all(inspect(path, nodata=[0.0, 9.0]))
    assert [int(v) for v in image[~valid]] == [0, 9]


def test_alpha_band_is_a_mask_even_with_an_override(tmp_path):
    image, alpha = np.full((8, 8), 7, np.uint8), np.full((8, 8), 255, np.uint8)
    image[3, 3], alpha[0, :] = 9, 0
    path = write_raster(tmp_path / "a.tif", [image, alpha], alpha=True)
    _, valid = read_all(inspect(path, nodata=[9.0]))
    assert not valid[0].any() and not valid[3, 3] and valid.sum() == 55


def test_pds4_constants_identifier_and_scale(tmp_path):
    image = np.full((8, 8), 50, np.uint8)
    image[0, 0] = 200
    path = write_raster(
        tmp_path / "a.xml", image, driver="PDS4", nodata=200, scale=0.5, offset=2.0, crs=mars_crs(),
        options=["VAR_LOGICAL_IDENTIFIER=urn:nasa:pds:mro_ctx:data:p01_test", "VAR_TARGET_TYPE=Planet",
                 "VAR_TARGET=Mars", "VAR_OBSERVING_SYSTEM_NAME=CTX", "VAR_INVESTIGATION_AREA_NAME=MRO",
                 "VAR_INVESTIGATION_AREA_LID_REFERENCE=urn:nasa:pds:context:investigation:mission.mro"],
    )  # fmt: skip
    product = inspect(path)
    _, valid = read_all(product)
    assert product.product_id == "p01_test" and not valid[0, 0] and valid.sum() == 63
    encoding = choose_encoding(product)
    assert (encoding.scale, encoding.offset_value) == (0.5, 2.0)
    assert {name.rpartition("/")[2] for name in product.files} == {"a.xml", "a.img"}


@pytest.mark.parametrize(
    ("text", "is_real", "value"),
    [("16#FF#", False, 255.0), ("-32768", False, -32768.0), ({"value": 3, "unit": "DN"}, False, 3.0),
     ("16#FF7FFFFB#", True, float(FLOAT_SPECIAL[0])), ('"NULL"', False, None), (None, False, None)],
)  # fmt: skip
def test_pds3_numbers(text, is_real, value):
    assert pds3_number(text, is_real) == value


@pytest.mark.parametrize(("prefix", "suffix"), [(18, 16), (0, 5), (7, 0)])
def test_lines_with_extra_bytes_are_mended(tmp_path, prefix, suffix):
    image = (terrain(64, 64) * 200).astype(np.uint8)
    image[5, 6] = 255
    product = inspect(write_pds3(tmp_path / "edr.IMG", image, prefix=prefix, suffix=suffix))
    raw, valid = read_all(product)
    np.testing.assert_array_equal(raw, image)
    assert product.product_id == "PSP_TEST_RED" and product.sensor == "HiRISE"
    assert np.argwhere(~valid).tolist() == [[5, 6]], "16#FF# means 255"
    # GDAL 3.6 skips the prefix of each line but not its suffix.
    assert any("not all skipped by GDAL" in note for note in product.notes) or suffix == 0


def test_lines_that_no_reading_makes_whole_are_refused(tmp_path):
    path = write_pds3(tmp_path / "edr.IMG", (terrain(64, 64) * 200).astype(np.uint8), labelled_suffix=18)
    path.write_bytes(path.read_bytes() + bytes(64 * 18))
    with pytest.raises(DataError, match=r"would be read sheared: edr.IMG: each line has 0 \+ 18 extra bytes"):
        inspect(path)


def test_gzipped_product_is_read_in_place(tmp_path):
    image = (terrain(16, 16) * 200).astype(np.uint8)
    plain = write_pds3(tmp_path / "a.IMG", image)
    packed = tmp_path / "b.IMG.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    raw, _ = read_all(inspect(packed))
    np.testing.assert_array_equal(raw, image)


def test_product_id_falls_back_to_the_file_name(tmp_path):
    product = inspect(write_raster(tmp_path / "ESP_1 (crop).v2.tif", np.zeros((4, 4), np.uint8)))
    assert product.product_id == "ESP_1 (crop).v2" and product.key == "ESP_1-crop-v2"


def test_missing_unreadable_and_unusable_products_are_named(tmp_path):
    with pytest.raises(DataError, match=r"a product does not exist: .*none\.cub"):
        inspect(tmp_path / "none.cub")
    (tmp_path / "bad.cub").write_bytes(b"no raster at all")
    with pytest.raises(DataError, match=r"GDAL cannot open the product: .*bad\.cub.*gdalinfo"):
        inspect(tmp_path / "bad.cub")
    one = write_raster(tmp_path / "one.tif", np.zeros((4, 4), np.uint8))
    with pytest.raises(DataError, match=r"no such band: one\.tif: band 2 of 1"):
        inspect(one, band=2)
    with pytest.raises(DataError, match=r"no intensities: complex\.tif: CFloat32"):
        inspect(write_raster(tmp_path / "complex.tif", np.zeros((4, 4), np.complex64)))
    earth = write_raster(tmp_path / "e.tif", np.zeros((4, 4), np.uint8), crs=earth_crs())
    with pytest.raises(DataError, match=r"this product is on Earth: e\.tif: CRS 'WGS 84 / UTM.*6378\.1 km"):
        inspect(earth)
    moon = write_raster(tmp_path / "m.tif", np.zeros((4, 4), np.uint8), crs=mars_crs(body=(1737400.0, 0.0)))
    with pytest.raises(DataError, match="this product is not on Mars"):
        inspect(moon)


def test_palette_is_refused(tmp_path):
    dataset = gdal.GetDriverByName("GTiff").Create(str(tmp_path / "p.tif"), 4, 4, 1, gdal.GDT_Byte)
    table = gdal.ColorTable()
    table.SetColorEntry(1, (255, 0, 0))
    dataset.GetRasterBand(1).SetColorTable(table)
    del dataset
    with pytest.raises(DataError, match="palette indices"):
        inspect(tmp_path / "p.tif")


def test_truncated_product_is_damaged_not_zero(tmp_path):
    path = write_raster(tmp_path / "a.tif", (terrain(64, 64) * 200).astype(np.uint8))
    path.write_bytes(path.read_bytes()[:2000])
    product = inspect(path)
    with quiet_gdal(), pytest.raises(DataError, match=r"a product is damaged: .*a\.tif: rows 0 to 63"):
        read_all(product)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16"])
def test_integers_are_stored_exactly(tmp_path, dtype):
    limits = np.iinfo(dtype)
    image = np.random.default_rng(0).integers(limits.min, limits.max, (16, 16), dtype=dtype, endpoint=True)
    product = inspect(write_raster(tmp_path / "a.tif", image, scale=0.25, offset=-3.0))
    encoding = choose_encoding(product)
    raw, valid = read_all(product)
    stored = encoding(raw, valid, "uint16")
    np.testing.assert_array_equal(stored * encoding.scale + encoding.offset_value, image * 0.25 - 3.0)
    assert encoding.dtype == ("uint8" if dtype == "uint8" else "uint16") and encoding.max_error == 0.0


def test_floats_are_quantised_within_half_a_step(tmp_path):
    image = (terrain(300, 40) * 90 + 180).astype(np.float32)
    image[:, :5] = np.nan
    product = inspect(write_raster(tmp_path / "a.tif", image, scale=2.0, offset=1.0))
    encoding = choose_encoding(product)
    raw, valid = read_all(product)
    stored = encoding(raw, valid, "uint16")
    error = np.abs(stored * encoding.scale + encoding.offset_value - (image.astype(np.float64) * 2 + 1))[valid]
    assert error.max() <= encoding.max_error * (1 + 1e-6)
    assert encoding.max_error == pytest.approx(2 * np.ptp(image[:, 5:]) / 65535 / 2)
    assert stored[valid].min() == 0 and stored[valid].max() == 65535 and (stored[~valid] == 0).all()
    assert encoding.note == ""


def test_small_range_of_wide_integers_is_exact(tmp_path):
    image = np.random.default_rng(0).integers(-7000, 9000, (16, 16), dtype=np.int32)
    product = inspect(write_raster(tmp_path / "a.tif", image))
    encoding = choose_encoding(product)
    stored = encoding(*read_all(product), "uint16")
    np.testing.assert_array_equal(stored.astype(np.int64) + int(encoding.offset_value), image)
    assert encoding.max_error == 0.0


def test_outliers_that_rule_the_range_are_said(tmp_path):
    image = terrain(64, 64).astype(np.float32)
    image[0, 0] = 1e6
    note = choose_encoding(inspect(write_raster(tmp_path / "a.tif", image))).note
    assert "16 bits are coarse here" in note and "check `nodata`" in note


def test_constant_and_empty_float_products(tmp_path):
    flat = inspect(write_raster(tmp_path / "a.tif", np.full((8, 8), 2.5, np.float32)))
    encoding = choose_encoding(flat)
    assert encoding.offset_value == 2.5 and encoding.max_error == 0.0
    empty = inspect(write_raster(tmp_path / "b.tif", np.full((8, 8), np.nan, np.float32)))
    with pytest.raises(DataError, match=r"the product has no valid pixel: .*b\.tif"):
        choose_encoding(empty)


def test_gsd_comes_from_the_georeference_first(tmp_path):
    located = write_raster(
        tmp_path / "a.tif", np.zeros((4, 4), np.uint8), crs=mars_crs(), transform=(0, 6, 0, 0, 0, -6)
    )
    plain = write_raster(tmp_path / "b.tif", np.zeros((4, 4), np.uint8))
    assert inspect(located, gsd_m=99.0).gsd_m == pytest.approx(6.0)
    assert inspect(plain, gsd_m=99.0).gsd_m == 99.0 and math.isnan(inspect(plain).gsd_m)


BYTES = (terrain(48, 64) * 200 + 20).astype("u1")


def test_collar_and_its_override(tmp_path):
    image = octets = BYTES.copy()
    octets[:, :10] = 0
    path = write_raster(tmp_path / "a.tif", image)
    product = inspect(path)
    assert product.validity.special == (0.0,) and any("border is filled with 0" in note for note in product.notes)
    for settings in ({"collar": "off"}, {"nodata": []}, {"nodata": [7.0]}):
        assert 0.0 not in inspect(path, **settings).validity.special


def test_saturation_levels(tmp_path):
    def levels(dtype, **keys):
        image = (terrain(48, 64) * 900 + 30).astype(dtype)
        return inspect(write_detached(tmp_path / "a.lbl", image, keys={"MISSING_CONSTANT": None} | keys)).saturation

    ten_bits = {"SAMPLE_BIT_MASK": "2#0000001111111111#"}
    assert levels(">u2", **ten_bits, MISSING_CONSTANT=5) == (0.0, 1023.0)
    assert levels(">u2", **ten_bits, MISSING_CONSTANT=1023) == (0.0, np.inf), "what is masked cannot be counted"
    assert levels(">i2", MISSING_CONSTANT=-9, VALID_MAXIMUM=4095, VALID_MINIMUM=0) == (0.0, 4095.0)
    assert levels(">f4", MISSING_CONSTANT=0) == (-np.inf, np.inf)


def test_settings_of_the_user_and_gsd_of_the_label(tmp_path):
    path = write_detached(tmp_path / "a.lbl", BYTES, extra=["START_TIME = 2006-11-08T04:49:13.821"])
    product = inspect(path)
    assert product.observation.acquired.startswith("2006-11-08T04:49:13") and np.isnan(product.gsd_m)
    product = inspect(path, product_id="mine", acquired="2020-01-01T00:00:00", gsd_m=6.0)
    assert (product.product_id, product.observation.acquired, product.gsd_m) == ("mine", "2020-01-01T00:00:00", 6.0)
    assert product.native_gsd_m == 6.0 and product.resampling is None


def test_gsd_of_the_label_is_said(tmp_path):
    path = write_detached(tmp_path / "a.lbl", BYTES, extra=["MAP_SCALE = 25 <M/PIXEL>"])
    product = inspect(path)
    assert product.gsd_m == 25.0 and any("is from the label; it has no map projection" in n for n in product.notes)
    assert inspect(path, gsd_m=6.0).gsd_m == 6.0
