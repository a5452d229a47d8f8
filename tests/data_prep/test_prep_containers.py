from __future__ import annotations

import pytest

from momo.errors import DataError
from tests.data_prep.products import assert_reads, gdal, inspect_file, terrain, write_raster

IMAGE = (terrain(48, 64) * 3000 + 100).astype("<i2")


def test_an_image_that_cannot_be_in_its_file_is_refused(tmp_path):
    path = tmp_path / "a.tif"
    gdal.GetDriverByName("GTiff").Create(
        str(path), 60000, 60000, 1, gdal.GDT_Byte, ["SPARSE_OK=YES", "TILED=YES", "BLOCKXSIZE=8192", "BLOCKYSIZE=8192"]
    )
    with pytest.raises(DataError, match=r"60000 x 60000 pixels \(3\.6e\+09 bytes\) in a file of \d+ bytes"):
        inspect_file(path)


def test_tiff_header_that_contradicts_its_file(tmp_path):
    path = write_raster(tmp_path / "a.tif", IMAGE, options=["TILED=YES", "BLOCKXSIZE=16", "BLOCKYSIZE=16"])
    data = path.read_bytes()
    assert_reads(path, IMAGE)
    offsets = gdal.Open(str(path))
    first, second = (
        int(offsets.GetRasterBand(1).GetMetadataItem(f"BLOCK_OFFSET_{n}_0", "TIFF")).to_bytes(4, "little")
        for n in (0, 1)
    )
    del offsets
    shifted = (int.from_bytes(second, "little") + 100).to_bytes(4, "little")
    path.write_bytes(data.replace(second, shifted, 1))
    with pytest.raises(DataError, match=r"its header names bytes \d+ to \d+ and \d+ to \d+.*parts of a file do not"):
        inspect_file(path)
    path.write_bytes(data.replace(second, first, 1))
    assert any("share their bytes" in note for note in inspect_file(path).notes)
    path.write_bytes(data + b"x" * 99)
    assert_reads(path, IMAGE, note="99 bytes after the last block belong to nothing")
    width = b"\x00\x01\x03\x00\x01\x00\x00\x00\x40\x00"
    path.write_bytes(data.replace(width, width[:-2] + b"\x50\x00", 1))
    with pytest.raises(DataError, match=r"80 x 48 pixels in blocks of 16 x 16 are 15 blocks, the header names 12"):
        inspect_file(path)
    strips = write_raster(tmp_path / "b.tif", IMAGE)
    strips.write_bytes(strips.read_bytes().replace(width, width[:-2] + b"\x30\x00", 1))
    with pytest.raises(DataError, match=r"block 0 has \d+ bytes, 48 x \d+ pixels need \d+"):
        inspect_file(strips)


def jpeg2000(path):
    memory = gdal.GetDriverByName("MEM").Create("", 64, 48, 1, gdal.GDT_UInt16)
    memory.WriteArray(IMAGE.astype("u2"))
    gdal.GetDriverByName("JP2OpenJPEG").CreateCopy(str(path), memory, options=["REVERSIBLE=YES", "QUALITY=100"])
    return path.read_bytes()


@pytest.mark.parametrize(
    ("marker", "offset", "new", "message"),
    [
        (
            b"\xff\x51",
            13,
            b"\x31",
            r"header box declares \(64, 48, 1\) .* codestream \(64, 49, 1\)",
        ),
        (b"\xff\x51", 40, b"\x8f", r"bit depths .* \[144\] in the codestream, 16 in the header box"),
        (b"\xff\x51", 29, b"\x20", "1 tiles have data, the size of image and tiles makes 2"),
        (b"\xff\x90", 9, b"\x07", "the product is truncated: .*tile-parts end at byte"),
        (b"jp2c", -1, b"\xff", "box b'jp2c' takes bytes"),
    ],
)
def test_jpeg2000_header_that_contradicts_its_file(tmp_path, marker, offset, new, message):
    path = tmp_path / "a.jp2"
    data = jpeg2000(path)
    assert_reads(path, IMAGE)
    place = data.index(marker) + offset
    path = tmp_path / "b.jp2"
    path.write_bytes(data[:place] + new + data[place + 1 :])
    with pytest.raises(DataError, match=message):
        inspect_file(path)


def test_truncated_jpeg2000_is_refused(tmp_path):
    data = jpeg2000(tmp_path / "a.jp2")
    for left in (100, 400, len(data) - 3):
        path = tmp_path / f"{left}.jp2"
        path.write_bytes(data[:left])
        with pytest.raises(DataError):
            inspect_file(path)
