from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from momo.data_prep import resample
from momo.data_prep.products import Validity
from momo.data_prep.resample import as_levels, open_rows, resampled
from momo.errors import DataError
from tests.data_prep.products import gdal, inspect_file, mars_crs, read, terrain, write_raster

KERNELS = ("nearest", "bilinear", "cubic", "lanczos", "average")


def made(tmp_path, image, *, nodata=None, gsd=10.0, crs="equirectangular", transform=None, **settings):
    georeference = {"crs": mars_crs(crs), "transform": transform or (0.0, gsd, 0.0, 0.0, 0.0, -gsd)} if crs else {}
    path = write_raster(tmp_path / "a.tif", image, nodata=nodata, **georeference)
    return inspect_file(path, collar="off", **settings)


def whole(product):
    return open_rows(product).read(0, product.height)


def ground(height, width, dtype="uint16", seed=0):
    top = {"uint8": 250, "int16": 30000, "uint16": 60000}.get(dtype, 1e5)
    return (terrain(height, width, seed) * top + 3).astype(dtype)


def warped_at_once(product, factor, kernel):
    """gdal.Warp of the whole image in float64, invalid pixels as NaN, without blocks."""
    raw, valid = read(product)
    source = gdal.GetDriverByName("MEM").Create("", raw.shape[1], raw.shape[0], 1, gdal.GDT_Float64)
    source.SetGeoTransform((0, 1, 0, 0, 0, -1))
    source.GetRasterBand(1).WriteArray(np.where(valid, raw, np.nan))
    height, width = (math.floor(side / factor + 1e-6) for side in raw.shape)
    bounds = (0, -height * factor, width * factor, 0)
    name = "near" if kernel == "nearest" else kernel
    out = gdal.Warp("", source, format="MEM", resampleAlg=name, outputBounds=bounds, width=width, height=height,
                    srcNodata="nan", dstNodata="nan", errorThreshold=0, outputType=gdal.GDT_Float64)  # fmt: skip
    return out.ReadAsArray()


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "int32", "uint32", "float32", "float64"])
@pytest.mark.parametrize("factor", [2, 3, 4])
def test_average_by_a_whole_factor_is_the_block_mean(tmp_path, dtype, factor):
    image = ground(150, 125, dtype)
    new = resampled(made(tmp_path, image), 10.0 * factor, "average")
    raw, valid = whole(new)
    height, width = 150 // factor, 125 // factor
    blocks = image[: height * factor, : width * factor].reshape(height, factor, width, factor).astype(np.float64)
    mean = blocks.mean(axis=(1, 3))
    assert raw.shape == (height, width) and valid.all() and raw.dtype == dtype
    if image.dtype.kind in "iu":
        np.testing.assert_array_equal(raw, np.rint(mean))
    else:
        np.testing.assert_allclose(raw, mean, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint32", "float64"])
def test_nearest_is_slicing(tmp_path, dtype):
    image = ground(140, 90, dtype)
    product = made(tmp_path, image)
    np.testing.assert_array_equal(whole(resampled(product, 30.0, "nearest"))[0], image[1::3, 1::3][:46, :30])
    larger, valid = whole(resampled(product, 5.0, "nearest"))
    np.testing.assert_array_equal(larger, image.repeat(2, axis=0).repeat(2, axis=1))
    assert valid.all()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("gsd", [25.0, 17.3, 6.1])
def test_blocks_equal_one_warp_of_the_whole_image(tmp_path, kernel, gsd):
    image = terrain(230, 170).astype(np.float32)
    rng = np.random.default_rng(1)
    image[60:90, 40:90] = image[150, 3] = image[rng.random(image.shape) < 0.03] = -9.0
    product = made(tmp_path, image, nodata=-9.0)
    new = resampled(product, gsd, kernel)
    raw, valid = whole(new)
    reference = warped_at_once(product, gsd / 10.0, kernel)
    assert reference.shape == raw.shape == (new.height, new.width)
    assert not valid.all() and valid.any() and np.isfinite(reference[valid]).all()
    np.testing.assert_allclose(raw[valid], reference[valid], atol=2e-6)
    if kernel == "nearest":
        np.testing.assert_array_equal(valid, np.isfinite(reference))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("gsd", [23.0, 4.0])
def test_no_seams_however_rows_are_asked_for(tmp_path, monkeypatch, kernel, gsd):
    monkeypatch.setattr(resample, "_BLOCK_ROWS", 16)
    image = ground(260, 60)
    image[100:120, 20:30] = 0
    product = made(tmp_path, image, nodata=0)
    new = resampled(product, gsd, kernel)
    raw, valid = whole(new)
    reader = open_rows(new)
    for step, size in ((7, 7), (16, 32), (5, 50)):
        for row in range(0, new.height - size + 1, step):
            part, part_valid = reader.read(row, size)
            np.testing.assert_array_equal(part, raw[row : row + size])
            np.testing.assert_array_equal(part_valid, valid[row : row + size])
    backwards = [reader.read(row, 1)[0][0] for row in range(new.height - 1, -1, -1)]
    np.testing.assert_array_equal(backwards[::-1], raw)


@pytest.mark.parametrize("kernel", ["average", "lanczos"])
def test_small_blocks_of_rows_and_columns_give_the_same_pixels(tmp_path, monkeypatch, kernel):
    product = made(tmp_path, ground(300, 240), nodata=0)
    new = resampled(product, 100.0, kernel)
    raw, valid = whole(new)
    monkeypatch.setattr(resample, "_BLOCK_BYTES", 4 * 20 * 60)
    small = open_rows(new)
    assert small._rows == 1 and small._cols < new.width
    np.testing.assert_array_equal(small.read(0, new.height)[0], raw)
    assert valid.all()


def test_source_pixels_in_memory_are_bounded(tmp_path, monkeypatch):
    product = made(tmp_path, ground(8, 8))
    spans = []

    def remember(dataset, product, col, row, width, height):
        spans.append(width * height * 4)
        return np.ones((height, width), np.uint16), np.ones((height, width), bool)

    monkeypatch.setattr(resample, "read_window", remember)
    monkeypatch.setattr(resample._ResampledRows, "_warp", lambda self, s, p, shape, k, holes: np.ones(shape, s.dtype))
    monkeypatch.setattr(resample, "_BLOCK_BYTES", 2**18)
    for kernel, width, factor in (("lanczos", 10000, 100.0), ("average", 10000, 2.0), ("average", 500, 0.2)):
        large = dataclasses.replace(product, width=width, height=50000)
        new = resampled(large, 10.0 * factor, kernel)
        reader = open_rows(new)
        raw, _ = reader.read(0, 2)
        assert raw.shape == (2, new.width)
        # The margins of one pixel may be larger than the bound, never much more than one pixel's own reach.
        least = (factor + 2 * reader._margin) ** 2 * 4
        assert max(spans) <= max(2**18 * 1.2, least * 1.2)
        assert reader._rows * reader._cols * 4 <= 2**18 * 1.2
        spans.clear()


def test_a_new_pixel_is_valid_when_half_of_it_is_measured(tmp_path):
    image = np.full((40, 40), 100, np.uint8)
    image[:, ::4] = 80
    image[0:2, 0] = 0  # half of the first 2 x 2 block
    image[0:2, 4:6] = 0
    image[0, 6] = image[1, 6] = image[0, 7] = 0  # three quarters
    raw, valid = whole(resampled(made(tmp_path, image, nodata=0), 20.0, "average"))
    assert valid[0, :5].tolist() == [True, True, False, False, True]
    assert raw[0, 0] == 100 and raw[0, 2] == 0 and raw[0, 4] == 90
    assert valid[1:].all()


def test_an_image_without_a_valid_pixel_stays_so(tmp_path):
    new = resampled(made(tmp_path, np.zeros((40, 40), np.uint8), nodata=0), 20.0, "cubic")
    raw, valid = whole(new)
    assert not valid.any() and raw.shape == (20, 20) and raw.dtype == np.uint8


def test_dead_lines_do_not_darken_the_new_pixels(tmp_path):
    image = ground(120, 80)
    image[40] = 0
    raw, valid = whole(resampled(made(tmp_path, image, nodata=None), 20.0, "average"))
    assert valid.all() and np.array_equal(raw[20], np.rint(image[41].reshape(40, 2).mean(axis=1)))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("lost", [(118, 142), (126, 127), (120, 128), (128, 131), (130, 139), (90, 300), (0, 1)])
def test_lost_rows_are_told_wherever_blocks_begin(tmp_path, kernel, lost):
    """At a factor of 2 the first block ends at source row 128."""
    image = ground(320, 60)
    image[lost[0] : lost[1]] = 0
    new = resampled(made(tmp_path, image), 20.0, kernel)
    raw, valid = whole(new)
    first, stop = lost[0] // 2, -(-lost[1] // 2)
    whole_lost = slice(-(-lost[0] // 2), lost[1] // 2)
    assert valid[:first].all() and valid[stop:].all()
    assert kernel == "nearest" or not valid[whole_lost].any()
    clean = made(tmp_path, image, nodata=0)
    expected, expected_valid = whole(resampled(clean, 20.0, kernel))
    np.testing.assert_array_equal(valid, expected_valid)
    np.testing.assert_array_equal(raw, expected)


def test_a_dead_column_is_told_wherever_parts_begin(tmp_path, monkeypatch):
    """At a factor of 2 the second part begins at source column 20; blocks of 4 rows alone are too low to tell."""
    monkeypatch.setattr(resample._ResampledRows, "_block_shape", lambda self: (4, 10))
    image = ground(80, 60)
    for col in range(14, 25):
        spoilt = image.copy()
        spoilt[:, col : col + 2] = 0
        found = whole(resampled(made(tmp_path, spoilt), 20.0, "bilinear"))
        expected = whole(resampled(made(tmp_path, spoilt, nodata=0), 20.0, "bilinear"))
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("kernel", ["bilinear", "cubic", "lanczos", "average"])
@pytest.mark.parametrize("nodata", [0, 7, 255])
def test_interpolation_never_makes_a_special_value(tmp_path, kernel, nodata):
    image = np.where(np.random.default_rng(0).random((80, 80)) < 0.5, nodata + (1 if nodata < 255 else -1), nodata)
    image = np.where(image == nodata, np.clip(nodata + 2 * (1 if nodata < 100 else -1), 0, 255), image)
    image[::2, ::2] = 6 if nodata == 7 else image[::2, ::2]
    product = made(tmp_path, image.astype(np.uint8), nodata=nodata)
    for gsd in (5.0, 15.0):
        raw, valid = whole(resampled(product, gsd, kernel))
        assert valid.all() and not (raw == nodata).any()


def test_levels_keep_off_special_values_and_ranges():
    value = np.array([[-5.0, 0.4, 1.2, 2.7, 6.6, 7.4, 8.5, 300.0]])
    every = np.ones(value.shape, bool)
    raw, valid = as_levels(value, every, Validity((0.0, 1.0, 7.0), 0.0, 250.0), np.dtype("uint8"))
    assert raw.tolist() == [[2, 2, 2, 3, 6, 8, 8, 250]] and valid.all()
    raw, valid = as_levels(value, every, Validity((255.0, 254.0)), np.dtype("uint8"))
    assert raw.tolist() == [[0, 0, 1, 3, 7, 7, 8, 253]] and valid.all()
    raw, valid = as_levels(np.zeros((1, 2)), every[:, :2], Validity((0.0,), 0.0, 0.0), np.dtype("uint8"))
    assert not valid.any()
    raw, valid = as_levels(np.array([[0.0, 5.0]]), np.array([[True, False]]), Validity((0.0,)), np.dtype("float32"))
    assert valid.tolist() == [[True, False]] and 0 < abs(raw[0, 0]) < 1e-40 and raw[0, 1] == 0
    raw, _ = as_levels(np.array([[-40000.0, 0.5, 1.5]]), every[:, :3], Validity((-32768.0,)), np.dtype("int16"))
    assert raw.tolist() == [[-32767, 0, 2]], "halves to even; a special value at the end of the range"


def test_grid_keeps_corner_crs_and_axes(tmp_path):
    turned = (500.0, 6.0, 1.0, -80.0, 1.5, -8.0)
    product = made(tmp_path, ground(101, 71), transform=turned)
    new = resampled(product, product.gsd_m * 2.5, "bilinear")
    assert (new.width, new.height) == (28, 40) and new.gsd_m == pytest.approx(product.gsd_m * 2.5)
    assert new.georeference.wkt == product.georeference.wkt and new.native_gsd_m == product.gsd_m
    assert new.georeference.transform == pytest.approx((500.0, 15.0, 2.5, -80.0, 3.75, -20.0))
    corner = np.zeros(1)
    assert [float(v[0]) for v in new.georeference.lonlat(corner, corner)] == pytest.approx(
        [float(v[0]) for v in product.georeference.lonlat(corner, corner)]
    )
    far_new = new.georeference.lonlat(np.array([20.0]), np.array([30.0]))
    far = product.georeference.lonlat(np.array([50.0]), np.array([75.0]))
    assert [float(v[0]) for v in far_new] == pytest.approx([float(v[0]) for v in far])
    assert new.resampling is not None
    assert (new.resampling.source_width, new.resampling.source_height, new.resampling.kernel) == (71, 101, "bilinear")


def test_whole_ratios_keep_the_last_pixel(tmp_path):
    product = made(tmp_path, ground(90, 60))
    for gsd, old in ((0.3, 0.1), (6.0, 0.6), (1.8, 0.6), (0.7, 0.1)):
        new = resampled(dataclasses.replace(product, gsd_m=old, width=6300, height=6300), gsd, "average")
        assert new.width == new.height == round(6300 * old / gsd)


def test_product_without_a_crs_is_resampled_in_pixel_space(tmp_path):
    image = ground(64, 48)
    new = resampled(made(tmp_path, image, crs=None, gsd_m=6.0), 12.0, "average")
    assert new.georeference.transform is None and (new.width, new.height) == (24, 32)
    np.testing.assert_array_equal(whole(new)[0], np.rint(image.reshape(32, 2, 24, 2).mean(axis=(1, 3))))


def test_alpha_is_carried_to_the_new_grid(tmp_path):
    image, alpha = ground(40, 40, "uint8"), np.full((40, 40), 255, np.uint8)
    alpha[:20] = 0
    path = write_raster(tmp_path / "a.tif", [image, alpha], alpha=True, crs=mars_crs())
    raw, valid = whole(resampled(inspect_file(path), 20.0, "average"))
    assert not valid[:10].any() and valid[10:].all() and not raw[:10].any()


def test_native_rows_are_those_of_the_product(tmp_path):
    image = ground(50, 40)
    image[3, 3] = 0
    product = made(tmp_path, image, nodata=0)
    assert resampled(product, 10.005, "cubic") is product, "0.05 % is the same GSD"
    assert resampled(product, 10.05, "cubic").resampling is not None
    raw, valid = open_rows(product).read(10, 30)
    np.testing.assert_array_equal(raw, image[10:40])
    assert valid.all() and not open_rows(product).read(0, 5)[1].all()


def test_refusals(tmp_path):
    product = made(tmp_path, ground(50, 40))
    refused = "cannot be resampled to this GSD.*a.tif: 40 x 50 pixels of 10 m to .*at most 16 times"
    for gsd in (0.6, 401.0, 5e-324, 1e-9, 1e308):
        with pytest.raises(DataError, match=refused):
            resampled(product, gsd, "average")
    assert resampled(product, 10 / 16, "average").width == 640
    assert resampled(product, 400.0, "average").width == 1
    with pytest.raises(DataError, match="without its GSD.*a.tif.*set `gsd_m`"):
        resampled(dataclasses.replace(product, gsd_m=math.nan), 12.0, "average")
    vast = dataclasses.replace(product, width=200000, height=100000)
    too_many = "too many of the product: a.tif: 14004 x 14004 pixels of 10 m to one of 20000 m by lanczos.*16777216"
    with pytest.raises(DataError, match=too_many):
        resampled(vast, 20000.0, "lanczos")
    assert resampled(vast, 20000.0, "average").width == 100
    with pytest.raises(DataError, match="resampled twice.*a.tif"):
        resampled(resampled(product, 20.0, "average"), 40.0, "average")
    huge = dataclasses.replace(product, width=2**30, height=2**30)
    with pytest.raises(DataError, match="1 to 2147483647 pixels a side"):
        resampled(huge, 1.0, "average")


def test_damage_and_loss_are_said(tmp_path, monkeypatch):
    product = made(tmp_path, ground(300, 200))
    new = resampled(product, 20.0, "average")

    def refuse(*args, **kwargs):
        raise RuntimeError("out of  memory")

    reader = open_rows(new)
    with monkeypatch.context() as patch:
        patch.setattr(gdal, "Warp", refuse)
        with pytest.raises(DataError, match="GDAL cannot resample the product: a.tif: out of memory.*resample.kernel"):
            reader.read(0, 10)
    assert reader.read(0, 10)[1].all(), "an error leaves the reader usable"
    path = tmp_path / "a.tif"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match="damaged|cannot open"):
        open_rows(new).read(0, new.height)
    path.unlink()
    with pytest.raises(DataError, match="does not exist"):
        open_rows(new)


@pytest.mark.real_data
def test_real_product_by_average(real_mars):
    path = sorted((real_mars / "labelled" / "ctx_craters_mc11e" / "images").glob("*.png"))[0]
    product = inspect_file(path, gsd_m=6.0, collar="off")
    new = resampled(product, 24.0, "average")
    raw, valid = whole(new)
    image, _ = read(product)
    mean = image.reshape(500, 4, 500, 4).mean(axis=(1, 3))
    assert valid.all() and np.array_equal(raw, np.rint(mean).astype(raw.dtype))
