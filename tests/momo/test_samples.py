"""Members of a sample, taken out of the bytes of a tar file."""

from __future__ import annotations

import io
import tarfile

import pytest

from momo.samples import split_sample


def tar_of(*members, **settings):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **settings) as tar:
        for name, data, *fields in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for key, value in fields:
                setattr(info, key, value)
            tar.addfile(info, io.BytesIO(data))
        return buffer.getvalue()[: tar.offset]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 5000])
def test_members_equal_what_the_standard_library_reads(form, size):
    raw = tar_of(("key.json", b"{}"), ("key.zst", bytes(range(256)) * 20 + b"x"), ("key.valid.zst", b"y" * size),
                 format=form)  # fmt: skip
    key, members = split_sample(raw)
    with tarfile.open(fileobj=io.BytesIO(raw)) as tar:
        expected = {m.name: tar.extractfile(m).read() for m in tar}
    assert {f"{key}.{suffix}": bytes(data) for suffix, data in members.items()} == expected


def test_extended_headers_of_times_are_passed_over():
    raw = tar_of(("key.json", b"{}", ("mtime", 1.5)), ("key.zst", b"data", ("mtime", 0.0)), format=tarfile.PAX_FORMAT)
    assert len(raw) > 4 * 512 and list(split_sample(raw)[1]) == ["json", "zst"]


def base_256(raw, size):
    header = bytearray(raw)
    header[124:136] = b"\x80" + size.to_bytes(11, "big")
    return bytes(header)


def test_sizes_in_base_256_are_read():
    raw = tar_of(("key.json", b"abc"))
    assert bytes(split_sample(base_256(raw, 3))[1]["json"]) == b"abc"
    with pytest.raises(ValueError, match=f"has {1 << 40} bytes and the sample ends before"):
        split_sample(base_256(raw, 1 << 40))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"no tar at all" * 100, "no tar header"),
        (tar_of(("key.json", b"{}"))[:300], "no tar header"),
        (tar_of(("key.json", b"{}"))[:600], "has 2 bytes and the sample ends before"),
        (tar_of(("key.json", b"{}"), ("other.zst", b"")), "a member other.zst in a sample key"),
        (tar_of(("key.json", b"{}"), ("key.json", b"")), "a member key.json in a sample key"),
        (tar_of(("key", b"{}")), "a member key in a sample"),
        (tar_of((".json", b"{}")), "a member .json in a sample"),
        (tar_of(("../key.json", b"{}")), "expected ASCII without slash"),
        (tar_of(("key.json", b"", ("type", tarfile.SYMTYPE))), "type b'2'"),
        (tar_of(("k" * 120 + ".json", b"{}"), format=tarfile.GNU_FORMAT), "type b'L'|no tar header"),
        (tar_of(("k" * 120 + ".json", b"{}"), format=tarfile.PAX_FORMAT), "in an extended header"),
        (tar_of(("d" * 60 + "/" + "k" * 60 + ".json", b"{}"), format=tarfile.USTAR_FORMAT), "with a long name"),
        (tar_of(("key.json", b"{}")).replace(b"00000000002", b"0000000000x", 1), "expected octal digits"),
    ],
)
def test_what_is_no_sample_is_refused(raw, message):
    with pytest.raises(ValueError, match=message):
        split_sample(raw)
