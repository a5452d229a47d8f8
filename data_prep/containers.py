"""Checks TIFF and JPEG 2000 files whose headers can be read but contradict themselves or the file.

Neither format has a checksum. What can be told is whether the parts that the header names have the size they need,
lie in the file and do not overlap (TIFF 6.0, BigTIFF), and whether the boxes, the image size and the chain of
tile-parts of a codestream agree (ISO/IEC 15444-1, annexes A and I).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import PurePath
from typing import Any

import numpy as np
import numpy.typing as npt

from momo.errors import DataError
from momo.extras import require

from .raw import contradiction

_TIFF_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_TIFF_CODES = {1: "u1", 3: "u2", 4: "u4", 13: "u4", 16: "u8", 18: "u8"}
_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PER_PIXEL, _ROWS, _PLANES, _FORMAT = 256, 257, 258, 259, 277, 278, 284, 339
_STRIPS, _TILES = (273, 279), (324, 325)
_TILE_WIDTH, _TILE_HEIGHT, _SUB = 322, 323, 330
_CODESTREAM = b"\xff\x4f\xff\x51"  # SOC and SIZ
_MOST_DIRECTORIES, _MOST_PARTS = 4096, 100_000
# A cloud-optimised TIFF has the length before a block and its last bytes once more behind it, 4 bytes each.
_GAPS = (0, 4, 8)

Extents = list[tuple[int, int]]


class _Bytes:
    """Bytes of a file through GDAL's virtual file system."""

    def __init__(self, name: str) -> None:
        self._gdal = require("osgeo.gdal", "prep")
        self.name = PurePath(name).name
        self._stream = self._gdal.VSIFOpenL(name, "rb")
        self.size = self._gdal.VSIStatL(name).size

    def __call__(self, place: int, size: int) -> bytes:
        if place < 0 or size < 0 or place + size > self.size:
            raise DataError(
                "the product is truncated",
                seen=f"{self.name}: its header names bytes {place + 1} to {place + size}, the file has {self.size}",
                rule="the file holds all that its header names",
                fix="fetch it again and compare its checksum",
            )
        self._gdal.VSIFSeekL(self._stream, place, 0)
        data = bytes(self._gdal.VSIFReadL(1, size, self._stream) or b"") if size else b""
        if len(data) != size:
            raise contradiction(self.name, f"bytes {place + 1} to {place + size} cannot be read", "the file is whole")
        return data

    def close(self) -> None:
        """Closes the file."""
        self._gdal.VSIFCloseL(self._stream)


def check_container(name: str) -> list[str]:
    """Checks a TIFF or JPEG 2000 file; other formats pass.

    It is done before GDAL opens the file, because the decoder of JPEG 2000 allocates memory by the declared size.

    Args:
        name: What GDAL will open.

    Returns:
        Notes.

    Raises:
        DataError: The header contradicts itself or the file.
    """
    stat = require("osgeo.gdal", "prep").VSIStatL(name)
    if stat is None or stat.IsDirectory() or stat.size < 16:
        return []
    data = _Bytes(name)
    try:
        start = data(0, 12)
        if start[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
            return _check_tiff(data)
        if start[:4] == _CODESTREAM or start[4:8] == b"jP  ":
            return _check_jpeg2000(data)
        return []
    finally:
        data.close()


# TIFF


def _check_tiff(data: _Bytes) -> list[str]:
    extents: Extents = [(0, 8)]
    blocks: Extents = []
    halves = False
    for tags, parts in _directories(data):
        extents += parts
        blocks += _blocks(data, tags)
        halves |= _one(tags, _BITS, 1) == 16 and _one(tags, _FORMAT, 1) == 3
    _check_overlaps(data.name, extents + blocks)
    unnamed, notes = data.size - max(place + length for place, length in extents + blocks), []
    if unnamed not in _GAPS:
        notes.append(f"{unnamed} bytes after the last block belong to nothing that the header names")
    if len(set(blocks)) < len(blocks):
        notes.append(f"{len(blocks) - len(set(blocks))} of its {len(blocks)} blocks share their bytes with another")
    table = np.unique(np.array(extents + blocks, dtype=np.int64), axis=0)
    holes = table[1:, 0] - table[:-1].sum(axis=1)
    named = np.isin(table[:-1], np.array(sorted(set(blocks)) or [(-1, -1)])).all(axis=1)
    unnamed = int(holes[named & ~np.isin(holes, _GAPS)].sum())
    if unnamed:
        notes.append(f"{unnamed} bytes between its blocks belong to nothing that the header names")
    if halves:
        notes.append("its samples are 16-bit floating-point numbers, which GDAL widens")
    return notes


def _directories(data: _Bytes) -> Iterator[tuple[dict[int, npt.NDArray[Any]], Extents]]:
    """Yields the whole-number tags of each directory, and the bytes that directory and values take."""
    order = "<" if data(0, 2) == b"II" else ">"
    big = struct.unpack(order + "H", data(2, 2))[0] == 43
    count_code, value_size, entry = ("Q", 8, 20) if big else ("H", 4, 12)
    place_code = order + ("Q" if big else "I")
    waiting = [struct.unpack(place_code, data(8 if big else 4, value_size))[0]]
    seen: set[int] = set()
    while waiting and len(seen) < _MOST_DIRECTORIES:
        place = waiting.pop()
        if place == 0 or place in seen:
            continue
        seen.add(place)
        width = struct.calcsize(order + count_code)
        count = struct.unpack(order + count_code, data(place, width))[0]
        entries = data(place + width, count * entry)
        after = place + width + count * entry
        waiting.append(struct.unpack(place_code, data(after, value_size))[0])
        tags, parts = {}, [(place, after + value_size - place)]
        for number in range(count):
            field = entries[number * entry : (number + 1) * entry]
            tag, kind, length = struct.unpack(order + ("HHQ" if big else "HHI"), field[: entry - value_size])
            size = length * _TIFF_SIZES.get(kind, 1)
            raw = field[entry - value_size :][:size]
            if size > value_size:
                offset = struct.unpack(place_code, field[entry - value_size :])[0]
                raw = data(offset, size)
                parts.append((offset, size))
            if kind in _TIFF_CODES:
                tags[tag] = np.frombuffer(raw, order + _TIFF_CODES[kind]).astype(np.int64)
        waiting += [int(value) for value in tags.get(_SUB, [])]
        yield tags, parts


def _blocks(data: _Bytes, tags: dict[int, npt.NDArray[Any]]) -> Extents:
    """Returns the bytes that the strips or tiles of a directory take, after checking their number and size."""
    offsets, counts = next(((tags[a], tags[b]) for a, b in (_TILES, _STRIPS) if a in tags and b in tags), (None, None))
    if offsets is None or counts is None or _WIDTH not in tags or _HEIGHT not in tags:
        return []
    width, height = (_one(tags, tag, 0) for tag in (_WIDTH, _HEIGHT))
    per_pixel, separate = _one(tags, _PER_PIXEL, 1), _one(tags, _PLANES, 1) == 2
    columns, rows = width, min(_one(tags, _ROWS, height), height)
    if _TILES[0] in tags:
        columns, rows = _one(tags, _TILE_WIDTH, 0), _one(tags, _TILE_HEIGHT, 0)
    if min(width, height, columns, rows) < 1:
        raise contradiction(data.name, f"blocks of {columns} x {rows} pixels", "blocks have pixels")
    across, down = -(-width // columns), -(-height // rows)
    needed = across * down * (per_pixel if separate else 1)
    if len(offsets) != needed or len(counts) != needed:
        raise contradiction(
            data.name,
            f"{width} x {height} pixels in blocks of {columns} x {rows} are {needed} blocks, the header names "
            f"{len(offsets)}",
            "the header names each block once",
        )
    if _one(tags, _COMPRESSION, 1) == 1:
        line = -(-columns * _one(tags, _BITS, 1) * (1 if separate else per_pixel) // 8)
        heights = np.full(needed, rows)
        if _TILES[0] not in tags:
            heights[down - 1 :: down] = height - (down - 1) * rows
        wrong = np.flatnonzero((counts != heights * line) & (counts != 0))
        if wrong.size:
            raise contradiction(
                data.name,
                f"block {wrong[0]} has {counts[wrong[0]]} bytes, {columns} x {heights[wrong[0]]} pixels need "
                f"{heights[wrong[0]] * line}",
                "an uncompressed block has the bytes of its pixels",
            )
    used = (counts > 0) & (offsets > 0)
    return list(zip(offsets[used].tolist(), counts[used].tolist(), strict=True))


def _one(tags: dict[int, npt.NDArray[Any]], tag: int, default: int) -> int:
    return int(tags[tag][0]) if tag in tags and tags[tag].size else default


def _check_overlaps(name: str, extents: Extents) -> None:
    """Refuses parts that overlap; the same part named twice is allowed (equal blocks may be stored once)."""
    table = np.unique(np.array(extents, dtype=np.int64), axis=0)
    clash = np.flatnonzero(table[:-1].sum(axis=1) > table[1:, 0])
    if clash.size:
        first, second = table[clash[0]], table[clash[0] + 1]
        raise contradiction(
            name,
            f"its header names bytes {first[0] + 1} to {first.sum()} and {second[0] + 1} to {second.sum()}",
            "the parts of a file do not overlap",
        )


# JPEG 2000


def _check_jpeg2000(data: _Bytes) -> list[str]:
    start, end, bits = 0, data.size, 255
    boxed = None
    if data(0, 4) != _CODESTREAM:
        found = dict.fromkeys((b"ihdr", b"jp2c"), (0, 0))
        for kind, place, length in _boxes(data, 0, data.size):
            if kind == b"jp2h":
                found |= {inner: (at, size) for inner, at, size in _boxes(data, place, place + length)}
            elif kind not in found or found[kind] == (0, 0):
                found[kind] = (place, length)
        (header, header_size), (start, length) = found[b"ihdr"], found[b"jp2c"]
        end = start + length
        if header_size < 12 or not length:
            raise contradiction(data.name, "no image header or codestream box", "a JP2 file has both")
        height, width, count, bits = struct.unpack(">IIHB", data(header, 11))
        boxed = (width, height, count)
    if data(start, 4) != _CODESTREAM:
        raise contradiction(data.name, "no start of a codestream", "it begins with SOC and SIZ")
    right, bottom, left, top, across, down, first, upper = struct.unpack(">8I", data(start + 8, 32))
    count = struct.unpack(">H", data(start + 40, 2))[0]
    coded = (right - left, bottom - top, count)
    if boxed not in (None, coded):
        raise contradiction(
            data.name,
            f"its header box declares {boxed} columns, lines and components, its codestream {coded}",
            "both are the same image",
        )
    depths = set(data(start + 42, 3 * count)[::3])
    if bits != 255 and depths != {bits}:
        raise contradiction(
            data.name,
            f"bit depths (128 more for signed) {sorted(depth + 1 for depth in depths)} in the codestream, {bits + 1} "
            "in the header box",
            "both are the same image",
        )
    if not across or not down:
        raise contradiction(data.name, f"tiles of {across} x {down} pixels", "tiles have pixels")
    return _check_parts(data, start, end, -(-(right - first) // across) * -(-(bottom - upper) // down))


def _boxes(data: _Bytes, place: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Yields kind, first byte and length of the content of each box."""
    while place + 8 <= end:
        length, kind, head = struct.unpack(">I", data(place, 4))[0], data(place + 4, 4), 8
        if length == 1:
            length, head = struct.unpack(">Q", data(place + 8, 8))[0], 16
        elif length == 0:
            length = end - place
        if length < head or place + length > end:
            raise contradiction(
                data.name, f"box {kind!r} takes bytes {place + 1} to {place + length} of {end}", "boxes lie in the file"
            )
        yield kind, place + head, length - head
        place += length


def _check_parts(data: _Bytes, start: int, end: int, tiles: int) -> list[str]:
    """Follows the tile-parts of a codestream from the main header to its end marker."""
    place = start + 2
    seen: set[int] = set()
    while (marker := data(place, 2)) != b"\xff\x90":
        if marker[0] != 0xFF or place > end:
            raise contradiction(data.name, f"no marker at byte {place + 1} of the main header", "it is whole")
        place += 2 + struct.unpack(">H", data(place + 2, 2))[0]
    for _ in range(_MOST_PARTS):
        marker = data(place, 2) if place + 2 <= end else b""
        if marker == b"\xff\xd9":
            if len(seen) != tiles or max(seen) >= tiles:
                raise contradiction(
                    data.name, f"{len(seen)} tiles have data, the size of image and tiles makes {tiles}", "all have"
                )
            return []
        if marker != b"\xff\x90":
            raise DataError(
                "the product is truncated",
                seen=f"{data.name}: its tile-parts end at byte {place} of {end}, without an end marker",
                rule="tile-parts follow each other up to the end of the codestream",
                fix="fetch it again and compare its checksum",
            )
        tile, length = struct.unpack(">HI", data(place + 4, 6))
        seen.add(tile)
        if length == 0:  # the last tile-part reaches to the end
            place = end - 2
        elif length < 14:
            raise contradiction(data.name, f"a tile-part of {length} bytes at byte {place + 1}", "it has its header")
        else:
            place += length
    return [f"only its first {_MOST_PARTS} tile-parts were checked"]
