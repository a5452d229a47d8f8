"""Sample mosaic of the data card: tiles drawn at random, as they look."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from momo.corpus import Corpus

from .contact_sheet import NOT_MEASURED, thumbnail, thumbnail_mask

SHOWN = 24
SIDE = 144
_COLUMNS = 8
_GAP = 8


@dataclass(frozen=True)
class Shown:
    """One tile of the mosaic.

    Attributes:
        key: Its key.
        label: Its unit, or its product where the unit is unknown.
        split: `train` or `val`.
        rgb_HW3: Its picture.
    """

    key: str
    label: str
    split: str
    rgb_HW3: npt.NDArray[np.uint8]

    @property
    def png(self) -> bytes:
        """The picture as PNG."""
        return _png(self.rgb_HW3)


def sample_tiles(corpus: Corpus, positions: Sequence[tuple[str, int]]) -> list[Shown]:
    """Returns pictures of tiles, each stretched from its 1st to its 99th percentile; not measured: vermilion.

    Raises:
        DataError: A tile cannot be read.
    """
    shown = []
    for split, position in positions:
        tile = corpus.read(split, position)
        grey_HW = thumbnail(tile.value_HW, tile.valid_HW, SIDE)
        valid_HW = thumbnail_mask(tile.valid_HW, SIDE)
        rgb_HW3 = np.where(valid_HW[..., None], grey_HW[..., None], np.array(NOT_MEASURED, np.uint8))
        label = str(tile.meta.get("unit") or tile.meta.get("product_id") or tile.key)
        shown.append(Shown(tile.key, label, split, rgb_HW3.astype(np.uint8)))
    return shown


def mosaic(tiles: Sequence[Shown]) -> bytes:
    """Returns the tiles as one picture, in rows."""
    side = max(max(tile.rgb_HW3.shape[:2]) for tile in tiles)
    enlarged = max(1, SIDE // side)
    cell = side * enlarged + _GAP
    rows = -(-len(tiles) // _COLUMNS)
    sheet = np.full((rows * cell - _GAP, min(len(tiles), _COLUMNS) * cell - _GAP, 3), 255, dtype=np.uint8)
    for number, tile in enumerate(tiles):
        large_HW3 = tile.rgb_HW3.repeat(enlarged, axis=0).repeat(enlarged, axis=1)
        top, left = number // _COLUMNS * cell, number % _COLUMNS * cell
        sheet[top : top + large_HW3.shape[0], left : left + large_HW3.shape[1]] = large_HW3
    return _png(sheet)


def _png(rgb_HW3: npt.NDArray[np.uint8]) -> bytes:
    image = Image.fromarray(rgb_HW3)
    if (rgb_HW3 == rgb_HW3[..., :1]).all():
        image = image.convert("L")
    out = io.BytesIO()
    image.save(out, format="PNG", optimize=True)
    return out.getvalue()
