from __future__ import annotations

import gzip
import os

import numpy as np
import pytest

from momo.data_prep.plausibility import roughness
from momo.data_prep.products import open_product, read_window
from momo.data_prep.raw import RawLayout
from momo.errors import DataError, MomoError
from tests.data_prep.products import (
    assert_reads,
    gdal,
    inspect_file,
    pds3_label,
    read,
    source,
    terrain,
    write_detached,
    write_isis3,
    write_raster,
    write_records,
    write_vicar,
)

SPECIAL = {
    "u1": [0, 255], "u2": [0, 1, 2, 65534, 65535], "i2": [-32768, -32767, -32766, -32765, -32764],
    "f4": np.array([0xFF7FFFFB, 0xFF7FFFFC, 0xFF7FFFFD, 0xFF7FFFFE, 0xFF7FFFFF], np.uint32).view(np.float32),
}  # fmt: skip
IMAGE = (terrain(48, 64) * 3000 + 100).astype("<i2")
BYTES = (terrain(48, 64) * 200 + 20).astype("u1")


@pytest.mark.parametrize("order", ["Lsb", "Msb"])
@pytest.mark.parametrize("tile", [None, (16, 16), (20, 7)])
@pytest.mark.parametrize("kind", list(SPECIAL))
def test_isis_special_pixels_in_every_layout(tmp_path, kind, tile, order):
    image = (terrain(33, 45) * 200 + 20).astype(kind)
    special = np.asarray(SPECIAL[kind], dtype=kind)
    image[4, : special.size] = special
    product = assert_reads(write_isis3(tmp_path / "a.cub", image, tile=tile, order=order), image)
    _, valid = read(product)
    assert not valid[4, : special.size].any() and valid.sum() == image.size - special.size
    assert product.saturation == ((-np.inf, 32767.0) if kind == "i2" else (-np.inf, np.inf))


@pytest.mark.parametrize("tile", [None, (20, 7)])
def test_layout_reads_what_gdal_reads(tmp_path, tile):
    path = write_isis3(tmp_path / "a.cub", IMAGE, tile=tile)
    band = 48 // 7 * 0 + (-(-64 // 20) * -(-48 // 7) * 140 * 2 if tile else IMAGE.nbytes)
    layout = RawLayout(str(path), 4096, 64, 48, 1, "<i2", 2, 128, band, tile)
    expected = gdal.Open(str(path)).ReadAsArray()
    for row, rows in ((0, 48), (5, 3), (6, 9), (47, 1)):
        np.testing.assert_array_equal(layout.read(1, row, rows), expected[row : row + rows])


@pytest.mark.parametrize("kind", ["<i2", ">i2", ">u2", "<u2", "<f4", ">f4", "u1"])
def test_right_products_pass_without_a_note(tmp_path, kind):
    image = (terrain(48, 64) * 200 + 20).astype(kind)
    assert_reads(write_records(tmp_path / "a.img", image), image)
    assert_reads(write_detached(tmp_path / "b.lbl", image), image)
    if kind[-2:] in ("i2", "f4", "u1"):
        assert_reads(write_vicar(tmp_path / "a.vic", image), image)


@pytest.mark.parametrize("kind", ["<i2", "<u2", "<f4"])
def test_noise_is_no_false_alarm(tmp_path, kind):
    rng = np.random.default_rng(1)
    for name, noise in (("wide", rng.integers(0, 32000, (48, 64))), ("narrow", rng.normal(1000, 3, (48, 64)))):
        image = noise.astype(kind)
        assert_reads(write_isis3(tmp_path / f"{name}.cub", image), image)
        assert_reads(write_isis3(tmp_path / f"{name}t.cub", image, tile=(16, 32)), image)


@pytest.mark.parametrize("kind", ["<i2", ">i2", "<f4", ">f4"])
def test_swapped_bytes_are_refused(tmp_path, kind):
    image = (terrain(48, 64) * 3000 + 100).astype(kind)
    wrong = {"<i2": "MSB_INTEGER", ">i2": "LSB_INTEGER", "<f4": "IEEE_REAL", ">f4": "PC_REAL"}[kind]
    path = write_records(tmp_path / "a.img", image, keys={"SAMPLE_TYPE": wrong})
    with pytest.raises(
        DataError, match=r"label and file disagree: a\.img: read as (most|least) significant byte first"
    ):
        inspect_file(path)
    order = "Msb" if kind[0] == "<" else "Lsb"
    cube = write_isis3(tmp_path / "a.cub", image, order="Lsb" if kind[0] == "<" else "Msb", keys={"ByteOrder": order})
    with pytest.raises(DataError, match=r"a\.cub: read as .* the other way round .*ByteOrder, INTFMT or data_type"):
        inspect_file(cube)


def test_multiples_of_256_get_a_note(tmp_path):
    image = (BYTES.astype("<u2")) * 256
    assert_reads(write_isis3(tmp_path / "a.cub", image), image, note="all its samples are multiples of 256")


def test_unsigned_integer_is_most_significant_byte_first(tmp_path):
    """The PDS standard's UNSIGNED_INTEGER is MSB; GDAL 3.6 takes it as LSB."""
    image = (terrain(48, 64) * 3000 + 100).astype(">u2")
    path = write_records(tmp_path / "a.img", image, keys={"SAMPLE_TYPE": "UNSIGNED_INTEGER"})
    product = inspect_file(path)
    np.testing.assert_array_equal(read(product)[0], image)
    plain = gdal.Open(str(path)).ReadAsArray()
    assert (product.lines is not None) == (not np.array_equal(plain, image)) == bool(product.notes)


def test_32_bit_integers(tmp_path):
    image = (terrain(48, 64) * 300000 + 100000).astype(">i4")
    product = inspect_file(write_records(tmp_path / "a.img", image))
    raw, _ = read(product)
    np.testing.assert_array_equal(raw, image)
    assert product.dtype == "int32"


@pytest.mark.parametrize("storage", ["BAND_SEQUENTIAL", "LINE_INTERLEAVED", "SAMPLE_INTERLEAVED"])
def test_bands_in_every_order(tmp_path, storage):
    cube = np.stack([BYTES, 255 - BYTES, BYTES // 2])
    axes = {"BAND_SEQUENTIAL": (0, 1, 2), "LINE_INTERLEAVED": (1, 0, 2), "SAMPLE_INTERLEAVED": (1, 2, 0)}[storage]
    path = tmp_path / "a.lbl"
    write_detached(path, BYTES, keys={"BANDS": 3, "BAND_STORAGE_TYPE": storage})
    path.with_suffix(".img").write_bytes(cube.transpose(axes).tobytes())
    for band in (1, 2, 3):
        product = inspect_file(path, band=band)
        np.testing.assert_array_equal(read(product)[0], cube[band - 1])
    wrong = "LINE_INTERLEAVED" if storage == "BAND_SEQUENTIAL" else "BAND_SEQUENTIAL"
    data = path.with_suffix(".img").read_bytes()
    write_detached(path, BYTES, keys={"BANDS": 3, "BAND_STORAGE_TYPE": wrong})
    path.with_suffix(".img").write_bytes(data)
    if storage == "SAMPLE_INTERLEAVED":  # lines of one band follow each other smoothly in the other two
        with pytest.raises(DataError, match="bands pixel by pixel"):
            inspect_file(path)


@pytest.mark.parametrize(
    ("form", "damage"),
    [(form, damage) for form in ("records", "detached", "isis3", "tiled", "vicar", "pds4") for damage in (1, 500)],
)
def test_truncated_files_are_refused(tmp_path, form, damage):
    path, data = written(tmp_path, form)
    cut = 200 if form in ("isis3", "tiled") else 0  # the history behind the pixels
    data.write_bytes(data.read_bytes()[: -damage - cut])
    with pytest.raises(DataError, match=r"the product is truncated: .*image of bytes \d+ to \d+, the file has \d+"):
        inspect_file(path)


def written(folder, form):
    if form == "pds4":
        path = write_raster(folder / "a.xml", IMAGE, driver="PDS4")
        return path, path.with_suffix(".img")
    if form == "detached":
        path = write_detached(folder / "a.lbl", IMAGE)
        return path, path.with_suffix(".img")
    path = {
        "records": lambda: write_records(folder / "a.img", IMAGE),
        "isis3": lambda: write_isis3(folder / "a.cub", IMAGE),
        "tiled": lambda: write_isis3(folder / "a.cub", IMAGE, tile=(16, 16)),
        "vicar": lambda: write_vicar(folder / "a.vic", IMAGE),
    }[form]()
    return path, path


def test_truncated_gzip_is_refused(tmp_path):
    plain = write_records(tmp_path / "a.img", IMAGE)
    packed = tmp_path / "b.img.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes())[:-900])
    with pytest.raises(MomoError):
        read(inspect_file(packed))
    whole = tmp_path / "c.img.gz"  # another name: GDAL remembers what it learned of the last archive
    whole.write_bytes(gzip.compress(plain.read_bytes()))
    assert_reads(whole, IMAGE)
    assert sorted(os.listdir(tmp_path)) == ["a.img", "b.img.gz", "c.img.gz"], "nothing is written beside the archive"


@pytest.mark.parametrize("form", ["isis3", "vicar", "pds4", "detached"])
def test_bytes_that_nothing_explains_get_a_note(tmp_path, form):
    path, data = written(tmp_path, form)
    data.write_bytes(data.read_bytes() + np.random.default_rng(0).bytes(333))
    product = inspect_file(path)
    np.testing.assert_array_equal(read(product)[0], IMAGE)
    assert any("belong to nothing that the label names" in note for note in product.notes)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"LINE_SAMPLES": 60}, r"neighbours differ by .* with lines of 64 bytes by"),
        ({"LINE_SAMPLES": 48, "LINES": 64}, r"neighbours differ by .* as 64 x 48 pixels by"),
        ({"LINES": None}, r"LINES is 'missing'.*whole number|GDAL cannot open"),
        ({"LINE_SAMPLES": "3O"}, r"LINE_SAMPLES is '3O'"),
        ({"SAMPLE_BITS": 16, "SAMPLE_TYPE": "MSB_SOMETHING"}, r"16-bit samples of type 'MSB_SOMETHING'"),
        ({"BANDS": 2, "LINES": 24, "BAND_STORAGE_TYPE": "SIDEWAYS"}, r"BAND_STORAGE_TYPE SIDEWAYS"),
    ],
)
def test_wrong_pds3_labels_are_refused(tmp_path, keys, message):
    with pytest.raises(DataError, match=message):
        inspect_file(write_records(tmp_path / "a.img", BYTES, keys=keys))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("^IMAGE = 33", "^IMAGE = 32", r"LABEL_RECORDS ends the label at byte 2048, the first object begins at 1985"),
        ("^IMAGE = 33", "^IMAGE =  2", r"the label ends at byte \d+, the image begins at 65"),
        ("\nEND\r\n", "\nFIN\r\n", r"no END statement|cannot open"),
        ("LABEL_RECORDS = 32", "LABEL_RECORDS = 31", r"LABEL_RECORDS ends the label at byte 1984"),
        ("RECORD_BYTES = 64", "RECORD_BYTES = 74", "the product is truncated"),
        ("^IMAGE", "^IMAGF", "no pointer|cannot open"),
    ],
)
def test_pointers_and_records_that_disagree_are_refused(tmp_path, old, new, message):
    path = write_records(tmp_path / "a.img", BYTES)
    data = path.read_bytes()
    assert old.encode() in data and len(old) == len(new)
    path.write_bytes(data.replace(old.encode(), new.encode()))
    with pytest.raises(DataError, match=message):
        inspect_file(path)


def test_objects_inside_the_image_are_refused(tmp_path):
    path = write_detached(
        tmp_path / "a.lbl", BYTES, pointer='("a.img", 1 <BYTES>)', extra=['^TABLE = ("a.img", 99 <BYTES>)']
    )
    with pytest.raises(DataError, match=r"image takes bytes 1 to 3072, another object begins at 99"):
        inspect_file(path)


@pytest.mark.parametrize("pointer", ['"A.IMG"', '("a.img", 3)', '("a.img", 129 <BYTES>)', '("a.img",129<BYTES>)'])
def test_detached_pointers(tmp_path, pointer):
    skipped = 0 if pointer == '"A.IMG"' else 128
    path = write_detached(tmp_path / "a.lbl", BYTES, pointer=pointer, extra=["RECORD_BYTES = 64"])
    path.with_suffix(".img").write_bytes(bytes(skipped) + BYTES.tobytes())
    assert_reads(path, BYTES)


def test_detached_and_banded_lines_with_extra_bytes_are_mended(tmp_path):
    path = write_detached(tmp_path / "a.lbl", BYTES, keys={"LINE_PREFIX_BYTES": 3, "LINE_SUFFIX_BYTES": 5})
    path.with_suffix(".img").write_bytes(b"".join(b"abc" + row.tobytes() + b"defgh" for row in BYTES))
    assert_reads(path, BYTES, note="each line has 3 + 5 extra bytes, not all skipped by GDAL")


def test_undeclared_bytes_in_each_line_are_refused(tmp_path):
    path = write_detached(tmp_path / "a.lbl", BYTES)
    path.with_suffix(".img").write_bytes(b"".join(row.tobytes() + b"junk." for row in BYTES))
    with pytest.raises(DataError, match="with lines of 69 bytes"):
        inspect_file(path)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"StartByte": 101}, r"StartByte 101 lies in the label"),
        ({"StartByte": 4197}, r"another object begins at|truncated"),
        ({"Samples": 48, "Lines": 64}, r"as 64 x 48 pixels"),
        ({"Samples": 0}, "GDAL cannot open|declares"),
        ({"Format": "Tiles"}, r"Format 'Tiles'|Tiles format not supported"),
        ({"Type": "UnsignedByte"}, r"with lines of 128 bytes"),
        ({"ByteOrder": "Vax"}, r"ByteOrder 'Vax'"),
    ],
)
def test_wrong_cube_labels_are_refused(tmp_path, keys, message):
    with pytest.raises(DataError, match=message):
        inspect_file(write_isis3(tmp_path / "a.cub", IMAGE, keys=keys))


def test_exchanged_tile_sides_are_refused(tmp_path):
    image = (terrain(64, 64) * 3000 + 100).astype("<i2")
    path = write_isis3(tmp_path / "a.cub", image, tile=(32, 16), keys={"TileSamples": 16, "TileLines": 32})
    with pytest.raises(DataError, match="in tiles of 32 x 16"):
        inspect_file(path)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"RECSIZE": 127}, "RECSIZE 127 and LBLSIZE 512 for records of 128 bytes"),
        ({"LBLSIZE": f"{500:<8d}"}, "RECSIZE 128 and LBLSIZE 500"),
        ({"NS": 48, "NL": 64, "RECSIZE": 96, "LBLSIZE": f"{480:<8d}"}, "as 64 x 48 pixels|belong to nothing|disagree"),
        ({"ORG": "'XYZ'"}, "ORG 'XYZ'|cannot open"),
        ({"NBB": 4}, "RECSIZE 128 .* records of 132"),
    ],
)
def test_wrong_vicar_labels_are_refused(tmp_path, keys, message):
    with pytest.raises(DataError, match=message):
        inspect_file(write_vicar(tmp_path / "a.vic", IMAGE, keys=keys))


def test_vicar_prefixes_and_end_of_line_label(tmp_path):
    path = tmp_path / "a.vic"
    write_vicar(path, IMAGE, keys={"EOL": 1}, tail=b"LBLSIZE=128 ".ljust(128, b"\0"))
    assert_reads(path, IMAGE)
    rows = np.zeros((48, 66), "<i2")
    rows[:, 2:] = IMAGE
    write_vicar(path, rows, keys={"NS": 64, "N1": 64, "NBB": 4})
    product = inspect_file(path)
    np.testing.assert_array_equal(read(product)[0], IMAGE)


@pytest.mark.parametrize("first", ["Line", "Sample"])
def test_pds4_axes_named_in_the_wrong_order(tmp_path, first):
    """Early CaSSIS labels say `Last Index Fastest` with Sample before Line; GDAL follows them and reads stripes."""
    path = write_raster(tmp_path / "a.xml", IMAGE, driver="PDS4", options=["ARRAY_TYPE=Array_2D_Image"])
    if first == "Sample":
        text = path.read_text()
        text = text.replace("<axis_name>Line<", "<axis_name>_<").replace("<axis_name>Sample<", "<axis_name>Line<")
        text = text.replace("<axis_name>_<", "<axis_name>Sample<").replace("<elements>48<", "<elements>_<")
        text = text.replace("<elements>64<", "<elements>48<").replace("<elements>_<", "<elements>64<")
        path.write_text(text)
    note = "the samples of a line lie together: read so" if first == "Sample" else None
    product = assert_reads(path, IMAGE, note=note)
    assert (product.lines is None) == (first == "Line")
    if first == "Sample":
        path.with_suffix(".img").write_bytes(IMAGE.T.tobytes())
        np.testing.assert_array_equal(read(inspect_file(path))[0], IMAGE)


def test_pds4_wrong_data_type_and_offset(tmp_path):
    path = write_raster(tmp_path / "a.xml", IMAGE, driver="PDS4")
    text = path.read_text()
    path.write_text(text.replace("SignedLSB2", "SignedMSB2"))
    with pytest.raises(DataError, match=r"a\.xml: read as most significant byte first"):
        inspect_file(path)
    path.write_text(text.replace('unit="byte">0<', 'unit="byte">10<'))
    with pytest.raises(DataError, match="the product is truncated"):
        inspect_file(path)


def test_broken_labels_are_errors_of_ours(tmp_path):
    path = write_records(tmp_path / "a.img", BYTES)
    text = pds3_label(BYTES, "33").replace("OBJECT = IMAGE", "OBJECT = IMAGO")
    path.write_bytes(text.encode().ljust(2048) + BYTES.tobytes())
    with pytest.raises(MomoError):
        inspect_file(path)


def test_roughness():
    rng = np.random.default_rng(0)
    assert roughness(rng.random((64, 64))) == pytest.approx(2.67, abs=0.1)
    assert roughness(terrain(64, 64)) < 0.5
    assert np.isnan(roughness(np.ones((64, 64)))) and np.isnan(roughness(np.zeros((4, 4))))


def test_jpeg2000_takes_its_label_from_beside_it(tmp_path):
    image = (terrain(64, 64) * 900 + 30).astype(np.uint16)
    memory = gdal.GetDriverByName("MEM").Create("", 64, 64, 1, gdal.GDT_UInt16)
    memory.WriteArray(image)
    path = tmp_path / "A_RED.JP2"
    gdal.GetDriverByName("JP2OpenJPEG").CreateCopy(
        str(path), memory, options=["REVERSIBLE=YES", "QUALITY=100", "NBITS=10"]
    )
    label = pds3_label(image, '"A_RED.IMG"', extra=[])
    body = label[label.index("OBJECT = IMAGE") : label.index("END\r\n", label.index("END_OBJECT"))]
    head = label[: label.index("^IMAGE")] + 'INSTRUMENT_ID = "HIRISE"\r\nPRODUCT_ID = "A_RED_ID"\r\n'
    path.with_suffix(".LBL").write_text(
        head + 'OBJECT = COMPRESSED_FILE\r\n FILE_NAME = "A_RED.JP2"\r\n ENCODING_TYPE = "JP2"\r\n'
        "END_OBJECT = COMPRESSED_FILE\r\n"
        'OBJECT = UNCOMPRESSED_FILE\r\n FILE_NAME = "A_RED.IMG"\r\n ^IMAGE = "A_RED.IMG"\r\n'
        + body + "END_OBJECT = UNCOMPRESSED_FILE\r\nEND\r\n", newline="",
    )  # fmt: skip
    for name in ("A_RED.JP2", "A_RED.LBL"):
        product = inspect_file(tmp_path / name)
        np.testing.assert_array_equal(read(product)[0], image)
        assert product.product_id == "A_RED_ID" and product.sensor == "HiRISE" and 255.0 in product.validity.special
        assert {file.rpartition("/")[2] for file in product.files} == {"A_RED.JP2", "A_RED.LBL"}
        assert product.saturation == (0.0, 1023.0)
    text = path.with_suffix(".LBL").read_text()
    path.with_suffix(".LBL").write_text(text.replace("LINES = 64", "LINES = 65"))
    with pytest.raises(DataError, match=r"declares 64 x 65 pixels in 1 bands, GDAL reads 64 x 64"):
        inspect_file(tmp_path / "A_RED.LBL")


def test_vrt_with_a_missing_source_is_an_error(tmp_path):
    tif = write_raster(tmp_path / "a.tif", BYTES)
    gdal.Translate(str(tmp_path / "a.vrt"), str(tif), format="VRT")
    np.testing.assert_array_equal(read(inspect_file(tmp_path / "a.vrt"))[0], BYTES)
    tif.unlink()
    with pytest.raises(DataError):
        read(inspect_file(tmp_path / "a.vrt"))


@pytest.mark.real_data
def test_real_products_pass_or_are_mended(real_mars):
    """Every raw real product is read, and the two that GDAL scrambles are mended."""
    mended = {}
    for path in sorted((real_mars / "raw").rglob("*")):
        if path.is_file() and path.suffix in (".cub", ".QUB", ".IMG", ".gz", ".lbl", ".xml"):
            product = inspect_file(path)
            read_window(open_product(product), product, 0, 0, product.width, min(product.height, 64))
            if product.lines:
                mended[path.name[:8]] = product
    assert sorted(mended) == ["CAS-MCO-", "PSP_0013"]
    for product in mended.values():
        raw, _ = read(product)
        plain = gdal.Open(product.name).ReadAsArray()
        assert roughness(raw[:256]) < 0.9 * roughness(plain[:256])


def test_source_of_a_missing_file(tmp_path):
    with pytest.raises(DataError, match=r"a product does not exist: .*none\.cub"):
        inspect_file(source(tmp_path / "none.cub").path)
