"""How a tile's pixels and its validity become bytes in a shard, and back. Lossless.

`zstd`  fast: member `<key>.zst` is one Zstandard frame (RFC 8878, with its checksum) of

            pixels, row by row    uint8: as they are or, when the last byte is 1, each row minus the row above modulo
                                  256 (PNG's filter "Up"); uint16: all low bytes, then all high bytes
            one byte              0 or 1, see above

        and `<key>.valid.zst` one frame of the validity as packed bits (`numpy.packbits`).
`png`   any tool shows it: `<key>.png`, and 255 where valid in `<key>.valid.png`.

Measured on real 224 px tiles (`scripts/bench/codecs.py`): the difference of rows takes up to 27 % off 8 bit tiles
for 25 us of decoding, and is left out where it takes nothing off; off 16 bit tiles it takes 9 % at most, adds to
others, and undoing it would halve the speed of reading.
"""

from __future__ import annotations

import functools
import io
import threading
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from .extras import require

CODECS = ("zstd", "png")
TILE_SUFFIX = {"zstd": "zst", "png": "png"}
MASK_SUFFIX = {"zstd": "valid.zst", "png": "valid.png"}
# On 8 bit tiles higher levels gain nothing after the difference of rows; on 16 bit ones 3 decodes faster than 1.
_LEVELS = {"uint8": 1, "uint16": 3}
_PNG_LEVEL = 6
_AS_IS, _ROW_DIFFERENCES = 0, 1
_local = threading.local()  # a Zstandard context must not be shared between threads


def encode_tile(stored_HW: npt.NDArray[Any], codec: str) -> bytes:
    """Returns the bytes of a tile.

    Args:
        stored_HW: uint8 or uint16 pixels.
        codec: One of `CODECS`.
    """
    if codec == "png":
        return _png(stored_HW)
    raw = np.empty(stored_HW.nbytes + 1, dtype=np.uint8)
    raw[-1] = _AS_IS
    first = raw[: stored_HW.size].reshape(stored_HW.shape)
    first[...] = stored_HW.astype(np.uint8, copy=False)
    if stored_HW.dtype == np.uint16:
        raw[stored_HW.size : -1].reshape(stored_HW.shape)[...] = stored_HW >> 8
        return _compressed(raw, "uint16")
    rows = first.copy()
    rows[1:] -= stored_HW[:-1]
    if _entropy(rows) < _entropy(first):
        first[...], raw[-1] = rows, _ROW_DIFFERENCES
    return _compressed(raw, "uint8")


def decode_tile(
    data: bytes | memoryview, codec: str, dtype: str, size: int, out: npt.NDArray[Any] | None = None
) -> npt.NDArray[Any]:
    """Returns the pixels of a tile, shape (size, size).

    Args:
        data: What `encode_tile` returned.
        codec: One of `CODECS`.
        dtype: `uint8` or `uint16`.
        size: Side of the tile, pixels.
        out: Array to decode into, C-contiguous; None makes one.

    Raises:
        ValueError: The bytes are damaged or of another size.
    """
    if codec == "png":
        pixels = _from_png(data)
        if pixels.shape != (size, size) or str(pixels.dtype) != dtype:
            raise ValueError(f"a PNG of {pixels.shape} {pixels.dtype}, expected {(size, size)} {dtype}")
        if out is None:
            return pixels.copy()  # PIL's own is read-only
        out[...] = pixels
        return out
    if out is None:
        out = np.empty((size, size), dtype=dtype)
    count = size * size
    raw = _decompressed(data, out.nbytes + 1)
    mode = raw[-1]
    if mode != _AS_IS and (mode != _ROW_DIFFERENCES or dtype != "uint8"):
        raise ValueError(f"its last byte is {mode}, expected 0" + (" or 1" if dtype == "uint8" else ""))
    first = raw[:count].reshape(size, size)
    if dtype == "uint16":
        out[...] = raw[count:-1].reshape(size, size)
        out <<= 8
        out |= first
    elif mode == _ROW_DIFFERENCES:
        np.add.accumulate(first, axis=0, out=out)
    else:
        out[...] = first
    return out


def encode_mask(valid_HW: npt.NDArray[np.bool_], codec: str) -> bytes:
    """Returns the bytes of a validity mask (True where measured)."""
    if codec == "png":
        return _png(valid_HW.astype(np.uint8) * 255)
    return _compressed(np.packbits(valid_HW), "uint8")


def decode_mask(
    data: bytes | memoryview, codec: str, size: int, out: npt.NDArray[np.bool_] | None = None
) -> npt.NDArray[np.bool_]:
    """Returns the validity mask of a tile, shape (size, size).

    Args:
        data: What `encode_mask` returned.
        codec: One of `CODECS`.
        size: Side of the tile, pixels.
        out: Array to decode into; None makes one.

    Raises:
        ValueError: The bytes are damaged or of another size.
    """
    if codec == "png":
        pixels = _from_png(data)
        if pixels.shape != (size, size):
            raise ValueError(f"a mask of {pixels.shape}, expected {(size, size)}")
        valid = pixels > 0
    else:
        bits = np.unpackbits(_decompressed(data, -(-size * size // 8)), count=size * size)
        valid = bits.view(np.bool_).reshape(size, size)
    if out is None:
        return valid
    out[...] = valid
    return out


def _entropy(pixels_HW: npt.NDArray[np.uint8]) -> float:
    """Bits a pixel that an entropy coder needs, from every eighth row: tells which form compresses better."""
    counts = np.bincount(pixels_HW[4::8].reshape(-1) if len(pixels_HW) > 4 else pixels_HW.reshape(-1), minlength=256)
    counts = counts[counts > 0]
    total = counts.sum()
    return float(np.log2(total) - (counts * np.log2(counts)).sum() / total)


@functools.cache
def _zstandard() -> Any:
    return require("zstandard", "pretrain")


def _compressed(raw: npt.NDArray[np.uint8], dtype: str) -> bytes:
    if not hasattr(_local, "compressors"):
        _local.compressors = {
            name: _zstandard().ZstdCompressor(level=level, write_checksum=True) for name, level in _LEVELS.items()
        }
    return bytes(_local.compressors[dtype].compress(raw))


def _decompressed(data: bytes | memoryview, expected: int) -> npt.NDArray[np.uint8]:
    zstandard = _zstandard()
    if not hasattr(_local, "decompressor"):
        _local.decompressor = zstandard.ZstdDecompressor()
    try:
        # Asked first, because a damaged header may claim any size and the decoder would allocate it.
        if (found := zstandard.frame_content_size(data)) != expected:
            raise ValueError(f"a frame of {found} bytes, expected {expected}")
        raw = _local.decompressor.decompress(data, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ValueError(f"not a whole Zstandard frame: {error}") from None
    return np.frombuffer(raw, dtype=np.uint8)


def _png(pixels: npt.NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", compress_level=_PNG_LEVEL)
    return buffer.getvalue()


def _from_png(data: bytes | memoryview) -> npt.NDArray[Any]:
    try:
        return np.asarray(Image.open(io.BytesIO(data)))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"not a whole PNG: {error}") from None
