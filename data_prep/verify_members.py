"""Walks the members of a shard header by header and checks each sample; part of `momo prep verify`.

The standard library's reader takes a damaged header for the end of the archive and says nothing, so headers are
walked here one by one.
"""

from __future__ import annotations

import json
import math
import os
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from momo.codecs import MASK_SUFFIX, TILE_SUFFIX, decode_mask, decode_tile

_BLOCK = 512
_REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE)
_LONG_NAMES = (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME)


class DamagedMember(Exception):
    """A member that is not as it should be.

    Args:
        member: Name of the member, or what stands in its place.
        offset: First byte of its tar header in the shard.
        what: What is wrong with it.
    """

    def __init__(self, member: str, offset: int, what: str) -> None:
        self.member, self.offset, self.what = member, offset, what
        super().__init__(f"{member} at byte {offset}: {what}")


@dataclass(frozen=True)
class SampleFormat:
    """What every sample of a corpus has in common: the fields of its manifest."""

    sensor: str
    tile_size: int
    dtype: str
    codec: str

    @property
    def suffixes(self) -> tuple[str, str, str]:
        """Suffixes a member may have: JSON, tile, mask."""
        return "json", TILE_SUFFIX[self.codec], MASK_SUFFIX[self.codec]

    @property
    def max_bytes(self) -> int:
        """No member of a sound sample is larger: twice the raw pixels, and room for the JSON."""
        return 2 * self.tile_size**2 * np.dtype(self.dtype).itemsize + (1 << 20)


@dataclass(frozen=True)
class Member:
    """One file in the shard, with the first byte of its header and the first byte behind its padding."""

    name: str
    offset: int
    end: int
    data: bytes


@dataclass(frozen=True)
class Sample:
    """Neighbouring members with one key, by suffix."""

    key: str
    members: dict[str, Member]

    @property
    def offset(self) -> int:
        """First byte of the first header."""
        return min(member.offset for member in self.members.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all members with headers and padding."""
        return max(member.end for member in self.members.values()) - self.offset


@dataclass(frozen=True)
class Pixels:
    """Statistics of the valid pixels of one tile in physical units."""

    count: int
    mean: float
    std: float
    low: float
    high: float


def walk_samples(stream: BinaryIO, start: int, form: SampleFormat) -> Iterator[Sample]:
    """Yields the samples of a shard in order.

    Args:
        stream: The open shard.
        start: First byte of a header.
        form: What every sample has in common.

    Raises:
        DamagedMember: A header is damaged, the file is cut, or a member cannot belong to a corpus. What came before it
            was yielded.
    """
    key, members = "", dict[str, Member]()
    try:
        for member in _walk_members(stream, start, form.max_bytes):
            own, _, suffix = member.name.partition(".")
            if not own or any(mark in member.name for mark in "/\\\0") or suffix not in form.suffixes:
                allowed = ", ".join(f"<key>.{known}" for known in form.suffixes)
                raise DamagedMember(_quoted(member.name), member.offset, f"no name of a member; there are {allowed}")
            if own != key and members:
                yield Sample(key, members)
                members = {}
            if suffix in members:
                raise DamagedMember(member.name, member.offset, "it stands twice in one sample")
            key = own
            members[suffix] = member
    except DamagedMember:
        if {"json", form.suffixes[1]} <= set(members):
            yield Sample(key, members)
        raise
    if members:
        yield Sample(key, members)


def _walk_members(stream: BinaryIO, start: int, max_bytes: int) -> Iterator[Member]:
    size = os.fstat(stream.fileno()).st_size
    stream.seek(start)
    position = first = start
    long_name: str | None = None
    while block := stream.read(_BLOCK):
        info = _header(block, position)
        if info is None:
            _check_end(stream, position, size)
            return
        end = position + _BLOCK + -(-info.size // _BLOCK) * _BLOCK
        name = info.name if long_name is None else long_name
        if not 0 <= info.size <= max_bytes:
            raise DamagedMember(_quoted(name), first, f"{info.size} bytes, at most {max_bytes} make sense")
        if end > size:
            raise DamagedMember(_quoted(name), first, f"the file ends inside it, at byte {size}")
        data = stream.read(end - position - _BLOCK)[: info.size]
        if info.type in _LONG_NAMES:
            long_name = _long_name(info.type, data, first)
        elif info.type in _REGULAR:
            yield Member(name, first, end, data)
            long_name, first = None, end
        else:
            raise DamagedMember(_quoted(name), first, f"no plain file, tar type {info.type!r}")
        position = end
    raise DamagedMember("the end of the archive", position, "the file ends without an end mark: it was cut")


def _header(block: bytes, position: int) -> tarfile.TarInfo | None:
    """Returns a header, or None at the end mark."""
    if not block.strip(b"\0") and len(block) == _BLOCK:
        return None
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError) as error:  # HeaderError is the base of what frombuf raises
        raise DamagedMember("a member", position, f"no tar header there: {error}") from None


def _check_end(stream: BinaryIO, position: int, size: int) -> None:
    if size - position < 2 * _BLOCK:
        raise DamagedMember("the end of the archive", position, "half an end mark: the file was cut")
    while rest := stream.read(1 << 20):
        if rest.strip(b"\0"):
            raise DamagedMember("the end of the archive", position, "there is data behind the end mark")


def _long_name(kind: bytes, data: bytes, offset: int) -> str | None:
    """Returns the name a pax or GNU extension header gives the next member, or None when it is about something else."""
    if kind == tarfile.GNUTYPE_LONGNAME:
        return data.rstrip(b"\0").decode("utf-8", "surrogateescape")
    while data:
        length, _, record = data.partition(b" ")
        if not length.isdigit() or not len(length) < int(length) <= len(data):
            raise DamagedMember("a pax header", offset, "its records cannot be read")
        keyword, _, value = record[: int(length) - len(length) - 2].partition(b"=")
        if keyword == b"path":
            return value.decode("utf-8", "surrogateescape")
        data = data[int(length) :]
    return None


def check_sample(sample: Sample, row: Mapping[str, Any] | None, form: SampleFormat) -> Pixels:
    """Decodes a sample and compares it with its row of the index.

    Args:
        sample: Members of one key.
        row: Its index row; None when the index has none.
        form: What every sample has in common.

    Raises:
        DamagedMember: Something is missing, cannot be decoded or disagrees.
    """
    whole = f"sample {sample.key}"
    if row is None:
        raise DamagedMember(whole, sample.offset, "the index does not have it")
    if (sample.offset, sample.nbytes) != (row["offset"], row["nbytes"]):
        said = f"{sample.nbytes} bytes from {sample.offset}, the index says {row['nbytes']} from {row['offset']}"
        raise DamagedMember(whole, sample.offset, said)
    for suffix in form.suffixes[:2]:
        if suffix not in sample.members:
            raise DamagedMember(whole, sample.offset, f"{sample.key}.{suffix} is missing")
    _check_json(sample.members["json"], row, form)
    stored_HW = _decoded(sample.members[form.suffixes[1]], form)
    valid_HW = _decoded_mask(sample.members.get(form.suffixes[2]), form)
    return _check_pixels(stored_HW, valid_HW, sample, row, form)


def _check_json(member: Member, row: Mapping[str, Any], form: SampleFormat) -> None:
    try:
        meta = json.loads(member.data)
    except (ValueError, RecursionError) as error:
        raise DamagedMember(member.name, member.offset, f"no JSON: {error}") from None
    if not isinstance(meta, dict):
        raise DamagedMember(member.name, member.offset, "its JSON is no object")
    required = {"key": row["key"], "split": row["split"], "sensor": form.sensor, "size": form.tile_size}
    for name in ("scale", "offset_value", *sorted(set(meta) & set(row))):
        required[name] = row[name]
    for name, expected in required.items():
        if name not in meta:
            raise DamagedMember(member.name, member.offset, f"it has no {name}")
        if not _same(meta[name], expected):
            raise DamagedMember(member.name, member.offset, f"{name} is {meta[name]!r}, the index says {expected!r}")


def _same(found: Any, expected: Any) -> bool:
    unknown = [value is None or (isinstance(value, float) and math.isnan(value)) for value in (found, expected)]
    return all(unknown) or (not any(unknown) and found == expected)


def _decoded(member: Member, form: SampleFormat) -> npt.NDArray[Any]:
    try:
        return decode_tile(member.data, form.codec, form.dtype, form.tile_size)
    except Exception as error:  # image libraries raise many kinds for damaged bytes
        raise DamagedMember(member.name, member.offset, f"it cannot be decoded: {one_line(error)}") from None


def _decoded_mask(member: Member | None, form: SampleFormat) -> npt.NDArray[np.bool_]:
    if member is None:
        return np.ones((form.tile_size, form.tile_size), dtype=bool)
    try:
        return decode_mask(member.data, form.codec, form.tile_size)
    except Exception as error:  # as above
        raise DamagedMember(member.name, member.offset, f"it cannot be decoded: {one_line(error)}") from None


def _check_pixels(
    stored_HW: npt.NDArray[Any],
    valid_HW: npt.NDArray[np.bool_],
    sample: Sample,
    row: Mapping[str, Any],
    form: SampleFormat,
) -> Pixels:
    tile = sample.members[form.suffixes[1]]
    values = (stored_HW if valid_HW.all() else stored_HW[valid_HW]).astype(np.float64).ravel()
    if values.size < stored_HW.size and stored_HW[~valid_HW].any():
        raise DamagedMember(tile.name, tile.offset, "an invalid pixel is not 0")
    if values.size == 0:
        raise DamagedMember(tile.name, tile.offset, "no pixel is valid")
    # Sums of integers below 2^53 are exact in float64. einsum, because a dot product would wake BLAS's threads for
    # every tile, which costs more than the sum and takes the cores from other workers.
    mean = float(values.sum()) / values.size
    std = math.sqrt(max(0.0, float(np.einsum("i,i->", values, values)) / values.size - mean * mean))
    low, high = float(values.min()), float(values.max())
    found = {"valid_fraction": values.size / stored_HW.size, "stored_mean": mean, "stored_std": std}
    found |= {"stored_min": low, "stored_max": high}
    for name, value in found.items():
        said = row[name]
        if said is None or not abs(said - value) <= 1e-6 * max(1.0, abs(value)):
            raise DamagedMember(tile.name, tile.offset, f"its {name} is {value:.9g}, the index says {said}")
    scale, offset = float(row["scale"]), float(row["offset_value"])
    ends = sorted((low * scale + offset, high * scale + offset))
    return Pixels(values.size, mean * scale + offset, std * abs(scale), *ends)


def _quoted(name: str) -> str:
    plain = name.isascii() and name.isprintable()
    return name if plain and len(name) <= 120 else ascii(name)[:120]


def one_line(error: Exception) -> str:
    """Returns what an error of a library says as one short line."""
    return " ".join(str(error).split())[:200] or type(error).__name__
