"""Which files are products: local, in lists and archives, behind URLs and in buckets; each once."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from osgeo import gdal

from momo.data_prep import vsi
from momo.data_prep.sources import Source, described_by_labels, digest, find_sources
from momo.errors import DataError
from tests.data_prep.products import terrain, write_raster

LABEL = '<?xml version="1.0"?><Product_Observational xmlns="http://pds.nasa.gov/pds4/pds/v1"/>'


def ground(seed=0):
    return (terrain(64, 64, seed) * 200 + 20).astype(np.uint8)


def names(patterns, root=None, **options):
    """The names found, relative to a folder, and the number passed over."""
    found, passed_over = find_sources([patterns] if isinstance(patterns, str) else patterns, **options)
    return [source.name.replace(f"{root}/", "") for source in found], passed_over


def detached(folder: Path, label="x.lbl", image="X.IMG") -> Path:
    """A detached PDS3 label and its image, whose name the label spells in capitals."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / label).write_text("\r\n".join([
        "PDS_VERSION_ID = PDS3", "RECORD_TYPE = FIXED_LENGTH", "RECORD_BYTES = 8", 'PRODUCT_ID = "X"',
        f'^IMAGE = "{image}"', "OBJECT = IMAGE", "LINES = 8", "LINE_SAMPLES = 8", "SAMPLE_BITS = 8",
        "SAMPLE_TYPE = MSB_UNSIGNED_INTEGER", "END_OBJECT = IMAGE", "END", "",
    ]))  # fmt: skip
    (folder / image.lower()).write_bytes(bytes(range(64)))
    return folder / label


def archive(path: Path, members, method=zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as stream:
        for name, content in members.items():
            stream.writestr(name, content)
    return path


# Local files


def test_folder_is_searched_for_rasters(tmp_path):
    for name in ("b.IMG", "a/c.tif", "a/d.txt", ".hidden.tif", "a/t.tif.aux.xml", "a/e.cub.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "label.xml").write_text(LABEL)
    (tmp_path / "other.xml").write_text("<Product_Bundle/>")
    found, passed_over = names(str(tmp_path), tmp_path)
    assert found == ["a/c.tif", "/vsigzip/a/e.cub.gz", "b.IMG", "label.xml"] and passed_over == 4


def test_globs_links_and_repeats_give_each_file_once(tmp_path):
    for name in ("a.IMG", "b.dat"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "link.IMG").symlink_to(tmp_path / "a.IMG")
    patterns = [str(tmp_path / "*.IMG"), str(tmp_path / "a.IMG"), f"{tmp_path}/../{tmp_path.name}/a.IMG"]
    assert names(patterns, tmp_path) == (["a.IMG"], 0)
    assert names([str(tmp_path / "*"), str(tmp_path)], tmp_path) == (["a.IMG", "b.dat"], 1)


def test_names_are_absolute_and_missing_files_are_left_to_the_reader(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (source,), _ = find_sources(["none.IMG"])
    assert source == Source(str(tmp_path / "none.IMG"), "none.IMG", tmp_path / "none.IMG")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_sources(["~/none.IMG"])[0] == [source]


def test_gzip_is_opened_through_gdal(tmp_path):
    vsi.configured_gdal()
    write_raster(tmp_path / "t.tif", ground())
    with gzip.open(tmp_path / "t.tif.gz", "wb") as stream:
        stream.write((tmp_path / "t.tif").read_bytes())
    path = tmp_path / "t.tif.gz"
    found, _ = find_sources([str(path), f"/vsigzip/{path}"])
    assert found == [Source(f"/vsigzip/{path}", "t.tif.gz", path)]
    assert (gdal.Open(found[0].name).ReadAsArray() == ground()).all()
    assert digest([found[0].name], found[0]) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert sorted(os.listdir(tmp_path)) == ["t.tif", "t.tif.gz"]  # no .properties file


def test_brackets_in_names_are_no_glob_when_the_file_exists(tmp_path):
    (tmp_path / "[a]").mkdir()
    (tmp_path / "[a]" / "x[1].IMG").write_bytes(b"x")
    assert names(str(tmp_path / "[a]" / "x[1].IMG"), tmp_path)[0] == ["[a]/x[1].IMG"]
    (tmp_path / "[a]" / "l.txt").write_text("x*.IMG\n")
    assert names(str(tmp_path / "[a]" / "l.txt"), tmp_path)[0] == ["[a]/x[1].IMG"]


@pytest.mark.parametrize("make", [lambda p: p, lambda p: p / "*.tif", lambda p: archive(p / "e.zip", {"a.txt": b""})])
def test_nothing_found_is_an_error(tmp_path, make):
    with pytest.raises(DataError, match=r"no product is found: .*Rule: folders and archives are .*\.cub .*Next"):
        find_sources([str(make(tmp_path))])


def test_unreadable_path_is_an_error():
    with pytest.raises(DataError, match=r"a path cannot be read: .*File name too long.*Next: check `products`"):
        find_sources(["a" * 300 + ".IMG"])


# Lists


def test_list_of_products(tmp_path):
    lists = tmp_path / "lists"
    lists.mkdir()
    for name in ("a.IMG", "b c.IMG", "d/e.tif", "d/f.doc", "#h.IMG"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    archive(tmp_path / "z.zip", {"in/m.tif": b"x"})
    (lists / "l.txt").write_bytes(
        b"\xef\xbb\xbf# comment\r\n../a.IMG  # after a name\r\n\r\n  ../b c.IMG\r\n../d\r\n../z.zip/in/m.tif\r\n"
        b"s3://bucket/k.tif\r\n../#h.IMG\r\n" + f"{tmp_path}/a.IMG".encode()
    )
    found, passed_over = names(str(lists / "l.txt"), tmp_path)
    assert sorted(found) == ["#h.IMG", "/vsis3/bucket/k.tif", "/vsizip/z.zip/in/m.tif", "a.IMG", "b c.IMG", "d/e.tif"]
    assert passed_over == 1
    (lists / "m.txt").write_text("http://host/q.tif")
    assert len(names(str(lists / "*.txt"))[0]) == 7


@pytest.mark.parametrize("content, message", [
    (b"b.txt", r"a list of products names another list: .*b\.txt \(.*a\.txt, line 1\)"),
    (b"\n\nnone*.tif", r"no product is found: none\*\.tif \(.*a\.txt, line 3\)"),
    (b"a\xff.tif", r"a list of products cannot be read: .*a\.txt: .*utf-8.*Rule: UTF-8 text"),
    (b"a\0b", r"a list of products cannot be read: .*zero byte"),
    (b"# only\n", r"no product is found: .*a\.txt"),
])  # fmt: skip
def test_bad_lists(tmp_path, content, message):
    (tmp_path / "a.txt").write_bytes(content)
    (tmp_path / "b.txt").write_text("c.tif")
    with pytest.raises(DataError, match=message):
        find_sources([str(tmp_path / "a.txt")])


def test_missing_list_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"a list of products does not exist: .*none\.txt"):
        find_sources([str(tmp_path / "none.txt")])


# Zip archives


def test_archive_gives_its_products(tmp_path):
    path = archive(tmp_path / "b.ZIP", {
        "z.tif": b"x", "in/a.IMG": b"x", "in/notes.txt": b"x", "__MACOSX/._a.IMG": b"x", "in/l.xml": LABEL,
        "in/o.xml": "<other/>", "inner.zip": b"x", "in/g.cub.gz": b"x", "in/": b"",
    })  # fmt: skip
    found, passed_over = find_sources([str(path)])
    assert [(s.name, s.display, s.path) for s in found] == [
        (f"/vsigzip//vsizip/{path}/in/g.cub.gz", "b.ZIP/in/g.cub.gz", path),
        (f"/vsizip/{path}/in/a.IMG", "b.ZIP/in/a.IMG", path),
        (f"/vsizip/{path}/in/l.xml", "b.ZIP/in/l.xml", path),
        (f"/vsizip/{path}/z.tif", "b.ZIP/z.tif", path),
    ]
    assert passed_over == 4
    assert find_sources([str(tmp_path)]) == (found, 4)  # in a folder
    assert find_sources([str(tmp_path / "*.ZIP"), str(path), f"/vsizip/{path}"])[0] == found
    assert names(f"{path}/in/a.IMG", path)[0] == ["/vsizip/in/a.IMG"]
    assert names(f"/vsizip/{path}/in/notes.txt", path)[0] == ["/vsizip/in/notes.txt"]  # named: any extension
    assert names(f"{path}/in/*.IMG", path)[0] == names(f"{tmp_path}/*.ZIP/*.IMG", path)[0][1:] == ["/vsizip/in/a.IMG"]
    assert names(f"{path}/in", path) == (["/vsigzip//vsizip/in/g.cub.gz", "/vsizip/in/a.IMG", "/vsizip/in/l.xml"], 2)
    (tmp_path / "l").symlink_to(tmp_path)
    assert len(find_sources([str(path), str(tmp_path / "l" / "b.ZIP")])[0]) == 4


@pytest.mark.parametrize("folder", ["plain", "x.zip", "a b.zipper"])
def test_members_are_read_wherever_the_archive_lies(tmp_path, folder):
    tif = write_raster(tmp_path / "t.tif", ground()).read_bytes()
    (tmp_path / folder).mkdir()
    path = archive(tmp_path / folder / "b.zip", {"in/t.tif": tif})
    (source,), _ = find_sources([str(path)])
    assert (gdal.Open(source.name).ReadAsArray() == ground()).all()
    assert find_sources([f"{path}/in/t.tif", source.name])[0] == [source]
    assert vsi.split_zip(source.name) == (str(path), "in/t.tif")
    assert digest([source.name], source) == hashlib.sha256(tif).hexdigest()


def test_missing_member_is_an_error(tmp_path):
    path = archive(tmp_path / "b.zip", {"t.tif": b"x"})
    with pytest.raises(DataError, match=r"no product is found: .*b\.zip/u\.tif"):
        find_sources([f"{path}/u.tif"])
    assert names(f"{tmp_path}/none.zip/u.tif", tmp_path)[0] == ["none.zip/u.tif"]  # missing, as any path


def broken_archive(path: Path, kind: str) -> Path:
    archive(path, {"t.tif": b"x" * 1000}, zipfile.ZIP_BZIP2 if kind == "method" else zipfile.ZIP_DEFLATED)
    data = bytearray(path.read_bytes())
    if kind == "truncated":
        data = data[: len(data) // 2]
    elif kind == "no archive":
        data = bytearray(b"not a zip")
    elif kind == "encrypted":
        data[6] |= 1  # flag bits of the member's own header and of the directory
        data[data.index(b"PK\x01\x02") + 8] |= 1
    elif kind == "outside":
        data = data.replace(b"t.tif", b"../.t")
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("kind, message", [
    ("truncated", r"an archive cannot be read: .*b\.zip: .*Rule: a whole zip file.*Next: test it with `unzip -t`"),
    ("no archive", r"an archive cannot be read: .*b\.zip: File is not a zip file"),
    ("encrypted", r"an archive is encrypted: .*b\.zip: t\.tif.*Rule: archives without a password"),
    ("method", r"an archive's compression is not supported: .*b\.zip: t\.tif: bzip2.*Rule: deflate or none"),
    ("outside", r"an archive's member lies outside of it: .*b\.zip: \.\./\.t"),
])  # fmt: skip
def test_bad_archives(tmp_path, kind, message):
    path = broken_archive(tmp_path / "b.zip", kind)
    with pytest.raises(DataError, match=message):
        find_sources([str(path)])
    (tmp_path / "a.IMG").write_bytes(b"x")
    bad = []
    found, _ = find_sources(
        [str(tmp_path), str(path)], bad=lambda source, error: bad.append((source.display, str(error)))
    )
    assert [source.display for source in found] == ["a.IMG"]
    assert len(bad) == 2 and bad[0][0] == "b.zip" and re.search(message, bad[0][1])


def test_mutated_archives_are_an_error_or_read(tmp_path):
    good = archive(tmp_path / "g.zip", {"a.tif": b"x" * 50, "l.xml": LABEL}).read_bytes()
    rng = np.random.default_rng(0)
    failed = 0
    for number in range(300):
        data = bytearray(good[: rng.integers(1, len(good))] if number % 3 == 0 else good)
        for position in rng.integers(0, len(data), 4):
            data[position] = rng.integers(0, 256)
        path = tmp_path / "m.zip"
        path.write_bytes(data)
        try:
            for source in find_sources([str(path)])[0]:
                digest([source.name], source)
        except DataError:
            failed += 1
    assert failed > 100


# Labels, identity and digest


def test_detached_data_is_known_by_its_label_in_folders_and_archives(tmp_path):
    label = detached(tmp_path / "in")
    path = archive(tmp_path / "b.zip", {f"d/{file.name}": file.read_bytes() for file in (tmp_path / "in").iterdir()})
    found, _ = find_sources([str(tmp_path / "in"), str(path)])
    opened = [(s, gdal.Open(s.name).GetFileList()) for s in found if s.display.endswith(".lbl")]
    described = described_by_labels(opened)
    assert len(found) == 4 and {s.display for s in found if s.place in described} == {"b.zip/d/x.img", "x.img"}
    assert described_by_labels([(found[0], opened[0][1])]) <= described
    link = tmp_path / "link"
    link.symlink_to(label.parent)
    assert find_sources([str(link / "x.img")])[0][0].place in described


def test_label_and_image_are_hashed_together(tmp_path):
    label = detached(tmp_path / "in")
    path = archive(tmp_path / "b.zip", {f"d/{file.name}": file.read_bytes() for file in label.parent.iterdir()})
    (local,), _ = find_sources([str(label)])
    (member,), _ = find_sources([f"{path}/d/x.lbl"])
    digests = [digest(gdal.Open(source.name).GetFileList(), source) for source in (local, member)]
    hashes = {name: hashlib.sha256((label.parent / name).read_bytes()).hexdigest() for name in ("x.lbl", "x.img")}
    expected = hashlib.sha256(json.dumps(hashes, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    assert digests == [expected, expected]


def test_files_of_one_name_are_all_hashed(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "t.img").write_bytes(b"x")
    files = [str(tmp_path / folder / "t.img") for folder in ("a", "b")]
    (source,), _ = find_sources([files[0]])
    first = digest(files, source)
    for file in files:
        Path(file).write_bytes(b"y")
        assert digest(files, source) != first
        Path(file).write_bytes(b"x")


def test_digest_of_other_names(tmp_path):
    tif = write_raster(tmp_path / "t.tif", ground()).read_bytes()
    sha256 = hashlib.sha256(tif).hexdigest()
    (source,), _ = find_sources([str(tmp_path / "t.tif")])
    assert digest([], source) == digest(["HDF5:nothing", source.name, source.name], source) == sha256
    assert digest([source.name, "/vsicurl/http://host/x.tif"], source) == sha256
    gdal.FileFromMemBuffer("/vsimem/momo/t.tif", tif)
    (memory,), _ = find_sources(["/vsimem/momo/t.tif"])
    assert digest([memory.name], memory) == sha256 and memory.path is None
    assert json.loads(memory.identity())[1] == len(tif)
    assert names("/vsimem/momo/")[0] == names("/vsimem/momo/*.tif")[0] == ["/vsimem/momo/t.tif"]
    gdal.Unlink("/vsimem/momo/t.tif")
    for lost in (memory, Source(str(tmp_path / "no.tif"), "no.tif", tmp_path / "no.tif")):
        with pytest.raises(DataError, match=r"a product is damaged: .*\.tif: .*Next: fetch it again"):
            digest([], lost)


def test_wrong_checksum_of_a_member_is_found(tmp_path):
    path = archive(tmp_path / "b.zip", {"t.tif": b"x" * 1000}, zipfile.ZIP_STORED)
    (source,), _ = find_sources([str(path)])
    data = bytearray(path.read_bytes())
    data[500] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"a product is damaged: /vsizip/.*t\.tif: Bad CRC-32"):
        digest([source.name], source)


def test_identity_changes_with_the_file(tmp_path):
    path = tmp_path / "a.IMG"
    path.write_bytes(b"x")
    (source,), _ = find_sources([str(path)])
    first = source.identity()
    assert json.loads(first) == [str(path), 1, path.stat().st_mtime_ns] and source.identity() == first
    os.utime(path, ns=(1, 1))
    assert source.identity() != first
    path.unlink()
    assert json.loads(source.identity()) == [str(path), None, None]


@pytest.mark.real_data
def test_real_products_read_the_same_from_an_archive(real_mars, tmp_path):
    raw = real_mars / "raw" / "other"
    files = ["megt90n000cb.lbl", "megt90n000cb.img", "Mars_viking.pds.gz"]
    with zipfile.ZipFile(tmp_path / "b.zip", "w", zipfile.ZIP_DEFLATED) as stream:
        for name in files:
            stream.write(raw / name, f"d/{name}")
    members, _ = find_sources([str(tmp_path / "b.zip")])
    plain, _ = find_sources([str(raw / name) for name in files])
    labels = [s for s in members if s.display.endswith(".lbl")]
    described = described_by_labels([(s, gdal.Open(s.name).GetFileList()) for s in labels])
    kept = [s for s in members if s.place not in described]
    assert len(members) == 3 and [Path(s.display).name for s in kept] == ["Mars_viking.pds.gz", "megt90n000cb.lbl"]
    for member in kept:
        (local,) = (s for s in plain if s.display == Path(member.display).name)
        opened = [gdal.Open(s.name) for s in (member, local)]
        assert (opened[0].ReadAsArray() == opened[1].ReadAsArray()).all()
        assert digest(opened[0].GetFileList(), member) == digest(opened[1].GetFileList(), local)
    shutil.rmtree(tmp_path)
