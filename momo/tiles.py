"""Tiles in memory, and the bytes of a sample made into one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .codecs import MASK_SUFFIX, TILE_SUFFIX, decode_mask, decode_tile
from .corpus_format import Manifest
from .corpus_index import StoredStatistics
from .errors import DataError
from .samples import split_sample


@dataclass(frozen=True)
class Tile:
    """One decoded tile.

    Attributes:
        key: Unique key.
        value_HW: float32 in physical units.
        valid_HW: True where the pixel was measured.
        meta: The sample's JSON.
    """

    key: str
    value_HW: npt.NDArray[np.float32]
    valid_HW: npt.NDArray[np.bool_]
    meta: dict[str, Any]


@dataclass(frozen=True)
class StoredTile:
    """One tile as it is stored; `momo.normalise` makes network input of it.

    Attributes:
        key: Unique key.
        stored_HW: uint8 or uint16.
        valid_HW: True where the pixel was measured; None when every pixel was.
        product_id: Product it was cut from.
        statistics: What scales it.
    """

    key: str
    stored_HW: npt.NDArray[Any]
    valid_HW: npt.NDArray[np.bool_] | None
    product_id: str
    statistics: StoredStatistics

    @property
    def valid(self) -> npt.NDArray[np.bool_]:
        """True where the pixel was measured, (H, W)."""
        return np.ones(self.stored_HW.shape, dtype=np.bool_) if self.valid_HW is None else self.valid_HW

    @property
    def value_HW(self) -> npt.NDArray[np.float32]:
        """float32 in physical units."""
        return physical(self.stored_HW, self.statistics.scale, self.statistics.offset_value)


@dataclass(frozen=True)
class StoredBatch:
    """Tiles as they are stored, in the order they were asked for.

    Attributes:
        keys: Unique keys.
        stored_BHW: uint8 or uint16, one contiguous array.
        valid_BHW: True where the pixel was measured; None when every pixel was.
        product_ids: Products they were cut from.
        statistics: What scales them.
    """

    keys: list[str]
    stored_BHW: npt.NDArray[Any]
    valid_BHW: npt.NDArray[np.bool_] | None
    product_ids: list[str]
    statistics: StoredStatistics


@dataclass(frozen=True)
class Unreadable:
    """A tile that could not be read.

    Attributes:
        slot: Its place in the batch.
        shard: File name of its shard.
        offset: First byte of its sample.
        error: Why.
    """

    slot: int
    shard: str
    offset: int
    error: DataError


@dataclass(frozen=True)
class DecodedBatch:
    """Tiles as they are stored, without what only the index knows.

    Attributes:
        keys: Unique keys; empty where the tile could not be read.
        stored_BHW: uint8 or uint16; 0 where the tile could not be read.
        valid_BHW: True where the pixel was measured; None when every pixel was.
        unreadable: Tiles that could not be read; their `valid_BHW` is all False.
    """

    keys: list[str]
    stored_BHW: npt.NDArray[Any]
    valid_BHW: npt.NDArray[np.bool_] | None
    unreadable: list[Unreadable]


def decode_sample(raw: bytes | memoryview, manifest: Manifest) -> Tile:
    """Decodes the tar members of one sample into a tile.

    Args:
        raw: bytes | memoryview of all members of the sample.
        manifest: Of the corpus the sample belongs to.

    Raises:
        ValueError: A member is missing or cannot be decoded.
    """
    key, members = split_sample(raw)
    meta = json.loads(bytes(_member(members, "json")))
    stored = decoded_tile(members, manifest)
    valid = decoded_mask(members, manifest)
    if valid is None:
        valid = np.ones(stored.shape, dtype=bool)
    try:
        value = physical(stored, float(meta["scale"]), float(meta["offset_value"]))
    except (TypeError, KeyError) as error:
        raise ValueError(f"its JSON has no stretch: {error}") from None
    return Tile(key, value, valid, meta)


def physical(stored_HW: npt.NDArray[Any], scale: float, offset_value: float) -> npt.NDArray[np.float32]:
    """Returns stored pixels in physical units."""
    return stored_HW.astype(np.float32) * np.float32(scale) + np.float32(offset_value)


def _member(members: Mapping[str, memoryview], suffix: str) -> memoryview:
    if suffix not in members:
        raise ValueError(f"the sample has no {suffix}, only {', '.join(members)}")
    return members[suffix]


def decoded_tile(
    members: Mapping[str, memoryview], manifest: Manifest, out: npt.NDArray[Any] | None = None
) -> npt.NDArray[Any]:
    """Returns the pixels of a sample, decoded into `out` when given; raises ValueError when they are damaged."""
    data = _member(members, TILE_SUFFIX[manifest.codec])
    return decode_tile(data, manifest.codec, manifest.dtype, manifest.tile_size, out)


def decoded_mask(members: Mapping[str, memoryview], manifest: Manifest) -> npt.NDArray[np.bool_] | None:
    """Returns the validity of a sample, None when every pixel is valid; raises ValueError when it is damaged."""
    data = members.get(MASK_SUFFIX[manifest.codec])
    return None if data is None else decode_mask(data, manifest.codec, manifest.tile_size)
