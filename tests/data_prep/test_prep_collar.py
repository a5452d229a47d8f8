"""Black collars: found where they lie around the ground, not where 0 is a measurement."""

from __future__ import annotations

import csv

import numpy as np
import pytest
from osgeo import gdal
from scipy import ndimage

from momo.data_prep import collar
from momo.data_prep.collar import find_collar
from tests.data_prep.products import terrain, write_raster


def ground(height=300, width=400, dtype=np.uint8, seed=0):
    return (terrain(height, width, seed) * 200 + 20).astype(dtype)


def found(path, dtype="uint8", declared=False, band=1):
    return find_collar(gdal.Open(str(path)), band, dtype, declared)


def collar_of(tmp_path, image, **options):
    return found(write_raster(tmp_path / "i.tif", image, **options), str(image.dtype))


def rotated_swath(image):
    """Leaves a swath of 80 % of the width that leans over, like a projected pushbroom image."""
    height, width = image.shape
    left = np.linspace(0, 0.2 * width, height)[:, None]
    across = np.arange(width)[None, :]
    return np.where((across >= left) & (across < left + 0.8 * width), image, 0).astype(image.dtype)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.float32])
def test_swath_in_a_black_frame_has_a_collar(tmp_path, dtype):
    image = ground(dtype=dtype)
    assert collar_of(tmp_path, image) is None
    assert collar_of(tmp_path, rotated_swath(image)) == 0.0


def test_band_number_counts(tmp_path):
    path = write_raster(tmp_path / "i.tif", [ground(), rotated_swath(ground())])
    assert found(path, band=1) is None and found(path, band=2) == 0.0


def test_wedge_in_one_corner_runs_round_the_corner(tmp_path):
    image = ground(500, 500)
    y, x = np.mgrid[:500, :500]
    for corner in (x + y, x + 499 - y, 499 - x + y, 998 - x - y):
        assert collar_of(tmp_path, np.where(corner < 40, 0, image).astype(np.uint8)) == 0.0
        assert collar_of(tmp_path, np.where(corner < 12, 0, image).astype(np.uint8)) is None  # 0.03 % of the image


def test_narrow_gap_counts_only_when_no_other_zero_is_about(tmp_path):
    image = ground(1000, 1000)
    image[600:, 400:420] = 0  # 20 of 4000 border pixels, 0.8 % of the image
    assert collar_of(tmp_path, image) == 0.0
    image[100:110, 100:120] = 0
    assert collar_of(tmp_path, image) is None


def test_declared_nodata_needs_no_search(tmp_path):
    path = write_raster(tmp_path / "i.tif", rotated_swath(ground()))
    assert find_collar(gdal.Open(str(path)), 1, "uint8", True) is None


def test_hole_inside_the_image_is_no_collar(tmp_path):
    image = ground()
    image[50:250, 50:350] = 0
    assert collar_of(tmp_path, image) is None


def test_shadows_clipped_at_zero_are_no_collar(tmp_path):
    rng = np.random.default_rng(0)
    rough = ndimage.gaussian_filter(rng.normal(size=(400, 400)), 6)
    image = np.clip((rough + 0.02) * 3000, 0, 255).astype(np.uint8)  # a third of the pixels is 0, many at the border
    assert (image == 0).mean() > 0.2 and (image[0] == 0).sum() > 50
    assert collar_of(tmp_path, image) is None


def test_few_zeros_at_the_border_are_no_collar(tmp_path):
    image = ground()
    image[:2, :80] = 0  # a run of 5.7 % of the border, but 0.13 % of the image
    assert collar_of(tmp_path, image) is None
    tiny = ground(10, 10)
    tiny[:, :2] = 0
    assert collar_of(tmp_path, tiny) is None


def test_nearly_black_is_not_zero(tmp_path):
    image = rotated_swath(ground())
    assert collar_of(tmp_path, np.maximum(image, 1)) is None
    values = rotated_swath(ground(dtype=np.float32))
    assert collar_of(tmp_path, np.where(values == 0, np.float32(1e-30), values)) is None
    assert collar_of(tmp_path, np.where(values == 0, np.float32(np.nan), values)) is None
    assert collar_of(tmp_path, np.where(values == 0, np.float32(-0.0), values)) == 0.0


def test_image_of_nothing_but_zeros_is_all_collar(tmp_path):
    assert collar_of(tmp_path, np.zeros((50, 60), np.uint8)) == 0.0


@pytest.mark.parametrize("options", [["BLOCKYSIZE=4"], ["TILED=YES"]])
def test_fewer_rows_give_the_same_answer(tmp_path, monkeypatch, options):
    paths = [
        write_raster(tmp_path / f"{n}.tif", image, options=options)
        for n, image in enumerate((ground(3000, 2000), rotated_swath(ground(3000, 2000))))
    ]
    whole = [found(path) for path in paths]
    dataset = gdal.Open(str(paths[0]))
    monkeypatch.setattr(collar, "_MOST_DECODED", 8 * 256 * 2000)
    rows = collar._row_count(dataset, dataset.GetRasterBand(1))
    assert rows == (8 if "TILED=YES" in options else 512)
    assert [found(path) for path in paths] == whole == [None, 0.0]


def test_overviews_are_used(tmp_path, monkeypatch):
    path = write_raster(tmp_path / "i.tif", rotated_swath(ground(3000, 2000)), options=["TILED=YES"])
    dataset = gdal.Open(str(path), gdal.GA_Update)
    dataset.BuildOverviews("NEAREST", [2, 4])
    del dataset
    monkeypatch.setattr(collar, "_MOST_DECODED", 1)
    dataset = gdal.Open(str(path))
    assert collar._row_count(dataset, dataset.GetRasterBand(1)) == 1024 and found(path) == 0.0


def test_rows_of_remote_files_are_few():
    class Band:
        XSize = YSize = 5000
        GetOverviewCount = staticmethod(lambda: 0)
        GetBlockSize = staticmethod(lambda: (5000, 1))

    class Dataset:
        def GetDescription(self):
            return "/vsizip//vsicurl/http://host/a.zip/b.img"

    assert collar._row_count(Dataset(), Band()) == 64


@pytest.mark.parametrize("rows", [1, 700])
def test_damaged_part_is_left_out(tmp_path, rows):
    path = write_raster(tmp_path / "i.tif", rotated_swath(ground(1500, 400)), options=["BLOCKYSIZE=1"])
    with open(path, "rb+") as stream:  # the pixels come first, the directory is at the end of the lines kept
        dataset = gdal.Open(str(path))
        offset = int(dataset.GetRasterBand(1).GetMetadataItem(f"BLOCK_OFFSET_0_{rows}", "TIFF"))
        stream.truncate(offset)
    assert found(path) == (0.0 if rows == 700 else None)


@pytest.mark.parametrize("touches, longest", [
    ([1, 1, 0, 1, 1, 1, 0, 0], 3), ([1, 1, 0, 0, 0, 0, 1, 1], 4), ([0] * 8, 0), ([1] * 8, 8), ([0, 0, 1, 0], 1),
])  # fmt: skip
def test_longest_run_goes_round(touches, longest):
    assert collar._longest_run(np.array(touches, bool), np.ones(len(touches))) == longest


def test_border_of_stretched_samples_has_true_lengths():
    labels = np.zeros((3, 4), np.int32)
    border, length = collar._border(labels, 10.0, 30.0)
    assert border.size == 14 and length.sum() == pytest.approx(1.0)
    assert length[:4].sum() == pytest.approx(40 / 260) and length[4:7].sum() == pytest.approx(90 / 260)


@pytest.mark.real_data
def test_real_collars_are_found_and_no_others(real_mars):
    gdal.PushErrorHandler("CPLQuietErrorHandler")
    with open(real_mars / "MANIFEST.csv", newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["dtype"] in ("Byte", "UInt16") and row["nodata"] == ""]
    with_collar = set()
    for row in rows:
        if row["path"].startswith("raw/") or "/ctx_" in row["path"] or "themis_craters_yolo/images" in row["path"]:
            name = "uint8" if row["dtype"] == "Byte" else "uint16"
            if found(real_mars / row["path"], name) is not None:
                with_collar.add(row["path"])
    gdal.PopErrorHandler()
    assert with_collar == {
        "labelled/ctx_craters_robbins/CTX11_1248.png",
        "raw/ctx/P17_007703_2313_XN_51N345W.jpeg",
        "raw/hirise/ESP_037117_1755_RED.abrowse.jpg",
        "raw/hirise/PSP_001892_1715_COLOR_crop.JP2",
        "raw/hirise/cog_hirise_mars.tif",
    }
