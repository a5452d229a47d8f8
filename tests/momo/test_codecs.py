from __future__ import annotations

import threading

import numpy as np
import pytest
import zstandard

from momo.codecs import CODECS, decode_mask, decode_tile, encode_mask, encode_tile

SIDE = 40


def tiles(dtype):
    rng = np.random.default_rng(0)
    top = np.iinfo(dtype).max
    rows, cols = np.mgrid[:SIDE, :SIDE]
    smooth = (top * (rows + 0.3 * cols) / (1.3 * SIDE)).astype(dtype)
    striped = np.tile(rng.integers(0, 4, size=(SIDE, 1)) * (top // 4), (1, SIDE)).astype(dtype)
    noise = rng.integers(0, top, size=(SIDE, SIDE), endpoint=True).astype(dtype)
    ends = np.where((rows + cols) % 2 == 0, 0, top).astype(dtype)
    return {"smooth": smooth, "striped": striped, "noise": noise, "ends": ends, "flat": np.full_like(smooth, top)}


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("kind", ["smooth", "striped", "noise", "ends", "flat"])
def test_tiles_come_back_bit_for_bit(codec, dtype, kind):
    tile = tiles(dtype)[kind]
    data = encode_tile(tile, codec)
    out = np.empty((2, SIDE, SIDE), dtype=dtype)
    for decoded in (decode_tile(data, codec, dtype, SIDE), decode_tile(memoryview(data), codec, dtype, SIDE, out[1])):
        assert decoded.dtype == dtype and np.array_equal(decoded, tile) and decoded.flags.writeable
    assert np.shares_memory(decoded, out)
    turned = tile.T[::2, ::2]
    assert np.array_equal(decode_tile(encode_tile(turned, codec), codec, dtype, SIDE // 2), turned)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("size", [1, 7, 32])
def test_masks_and_tiny_tiles_come_back(codec, size):
    valid = np.random.default_rng(size).random((size, size)) < 0.5
    out = np.zeros((size, size), dtype=bool)
    for decoded in (
        decode_mask(encode_mask(valid, codec), codec, size),
        decode_mask(encode_mask(valid, codec), codec, size, out),
    ):
        assert decoded.dtype == bool and np.array_equal(decoded, valid)
    for dtype in ("uint8", "uint16"):
        tile = valid.astype(dtype) * 200
        assert np.array_equal(decode_tile(encode_tile(tile, codec), codec, dtype, size), tile)


def test_differences_of_rows_are_taken_where_they_are_smaller():
    tile = tiles("uint8")
    # The smooth tile changes by a constant from row to row; the striped one has few values and all differences.
    raw = {name: zstandard.ZstdDecompressor().decompress(encode_tile(tile[name], "zstd")) for name in tile}
    assert raw["smooth"][-1] == 1 and raw["striped"][-1] == raw["noise"][-1] == 0
    assert raw["noise"][:-1] == tile["noise"].tobytes()
    rows = np.frombuffer(raw["smooth"], dtype=np.uint8)[:-1].reshape(SIDE, SIDE)
    assert np.array_equal(rows[1:], tile["smooth"][1:] - tile["smooth"][:-1])
    assert np.array_equal(rows[0], tile["smooth"][0])


def test_16_bit_tiles_are_low_bytes_then_high_bytes():
    tile = np.array([[0x0102, 0x0304], [0xFF00, 0x00FF]], dtype=np.uint16)
    raw = zstandard.ZstdDecompressor().decompress(encode_tile(tile, "zstd"))
    assert raw == bytes([0x02, 0x04, 0x00, 0xFF, 0x01, 0x03, 0xFF, 0x00, 0])


def test_every_damaged_byte_of_a_frame_is_noticed_or_harmless():
    tile = tiles("uint8")["smooth"]
    data = encode_tile(tile, "zstd")
    noticed = 0
    for place in range(len(data)):
        broken = bytearray(data)
        broken[place] ^= 0x10
        try:
            decoded = decode_tile(bytes(broken), "zstd", "uint8", SIDE)
        except ValueError:
            noticed += 1
        else:
            assert np.array_equal(decoded, tile)
    assert noticed > 0.9 * len(data)


@pytest.mark.parametrize("codec", CODECS)
def test_cut_and_foreign_bytes_are_refused(codec):
    tile, mask = tiles("uint16")["noise"], np.random.default_rng(0).random((SIDE, SIDE)) < 0.5
    data, bits = encode_tile(tile, codec), encode_mask(mask, codec)
    for broken in (b"", b"not a tile", data[: len(data) // 2]):
        with pytest.raises(ValueError, match="not a whole"):
            decode_tile(broken, codec, "uint16", SIDE)
    for broken in (b"", b"not a mask", bits[: len(bits) // 2]):
        with pytest.raises(ValueError, match="not a whole"):
            decode_mask(broken, codec, SIDE)


def test_wrong_sizes_and_types_are_refused():
    compress = zstandard.ZstdCompressor().compress
    with pytest.raises(ValueError, match="a frame of 3201 bytes, expected 1601"):
        decode_tile(encode_tile(tiles("uint16")["noise"], "zstd"), "zstd", "uint8", SIDE)
    with pytest.raises(ValueError, match=r"a PNG of \(40, 40\) uint8, expected \(41, 41\) uint16"):
        decode_tile(encode_tile(tiles("uint8")["noise"], "png"), "png", "uint16", SIDE + 1)
    with pytest.raises(ValueError, match=r"a mask of \(40, 40\), expected \(39, 39\)"):
        decode_mask(encode_mask(np.ones((SIDE, SIDE), dtype=bool), "png"), "png", SIDE - 1)
    with pytest.raises(ValueError, match="its last byte is 2, expected 0 or 1"):
        decode_tile(compress(bytes(4) + b"\2"), "zstd", "uint8", 2)
    with pytest.raises(ValueError, match="its last byte is 1, expected 0"):
        decode_tile(compress(bytes(8) + b"\1"), "zstd", "uint16", 2)
    with pytest.raises(ValueError, match="not a whole Zstandard frame"):
        decode_tile(encode_tile(tiles("uint8")["flat"], "zstd") + b"more", "zstd", "uint8", SIDE)


def test_a_frame_that_claims_a_terabyte_is_not_allocated():
    frame = bytearray(zstandard.ZstdCompressor().compress(bytes(70000)))
    assert zstandard.frame_content_size(bytes(frame)) == 70000
    # Magic, descriptor with an 8-byte content size and one segment, size.
    claim = b"\x28\xb5\x2f\xfd\xe0" + (1 << 40).to_bytes(8, "little") + bytes(frame[9:])
    with pytest.raises(ValueError, match="a frame of 1099511627776 bytes, expected 1601"):
        decode_tile(claim, "zstd", "uint8", SIDE)


def test_threads_do_not_disturb_each_other():
    kinds = tiles("uint16")
    packed = {name: encode_tile(tile, "zstd") for name, tile in kinds.items()}
    wrong = []

    def work():
        for _ in range(20):
            for name, tile in kinds.items():
                if not np.array_equal(decode_tile(packed[name], "zstd", "uint16", SIDE), tile):
                    wrong.append(name)
                if encode_tile(tile, "zstd") != packed[name]:
                    wrong.append(name)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
