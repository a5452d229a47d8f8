"""One product to tiles: a pure function of the product and the settings, so that it can run in any process."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from .config import PrepConfig
from .products import Product, open_product, quiet_gdal, read_window
from .quality import is_constant, structure_score
from .radiometry import Encoding, no_valid_pixel
from .shards import TileRecord
from .split import BlockGrid, Footprint, SplitRule

INVALID, CONSTANT, LOW_QUALITY = "too few valid pixels", "constant", "low quality"
BORDER, OFF_MAP = "across train and val ground", "off the map"


def starts(length: int, size: int, step: int) -> range:
    """Returns the first pixels of the windows along one side; a remainder shorter than a window is left out."""
    return range(0, length - size + 1, step)


def window_count(product: Product, config: PrepConfig) -> int:
    """Returns the number of windows of a product."""
    return len(starts(product.height, config.tile_size, config.step)) * len(
        starts(product.width, config.tile_size, config.step)
    )


def window_footprints(product: Product, config: PrepConfig, grid: BlockGrid) -> Iterator[Footprint]:
    """Yields the footprint of every window, row by row; reads no pixel."""
    cols = starts(product.width, config.tile_size, config.step)
    for row in starts(product.height, config.tile_size, config.step):
        yield from grid.footprints(product, row, cols, config.tile_size)


def cut_tiles(
    product: Product,
    encoding: Encoding,
    config: PrepConfig,
    *,
    dtype: str,
    grid: BlockGrid,
    splits: SplitRule,
    dropped: Counter[str],
) -> Iterator[TileRecord]:
    """Cuts a product into tiles, row by row of windows; at most one such row is in memory.

    Args:
        product: What to read.
        encoding: How its values are stored.
        config: Settings.
        dtype: Stored type of the corpus, `uint8` or `uint16`.
        grid: Ground blocks.
        splits: Split of each block.
        dropped: Counts here the windows that give no tile, by reason.

    Yields:
        Tiles in order of row and column.

    Raises:
        DataError: The product is damaged, or no window holds a valid pixel.
    """
    size, seen_valid = config.tile_size, False
    cols = starts(product.width, size, config.step)
    width = cols[-1] + size
    with quiet_gdal():
        dataset = open_product(product)
    for row in starts(product.height, size, config.step):
        with quiet_gdal():
            raw_HW, valid_HW = read_window(dataset, product, 0, row, width, size)
            places = grid.footprints(product, row, cols, size)
        seen_valid = seen_valid or bool(valid_HW.any())
        for col, place in zip(cols, places, strict=True):
            raw, valid = raw_HW[:, col : col + size], valid_HW[:, col : col + size]
            if valid.mean() < config.min_valid:
                dropped[INVALID] += 1
                continue
            if is_constant(raw, valid):
                dropped[CONSTANT] += 1
                continue
            stored = encoding(raw, valid, dtype)
            quality = structure_score(stored, valid)
            split = splits.of_tile(place)
            if quality < config.min_quality:
                dropped[LOW_QUALITY] += 1
            elif split is None:
                dropped[BORDER if place.touched else OFF_MAP] += 1
            else:
                yield TileRecord(
                    key=f"{product.key}_r{row:06d}_c{col:06d}",
                    split=split,
                    stored_HW=stored,
                    valid_HW=valid.copy(),
                    meta={
                        "product_id": product.product_id,
                        "row": row,
                        "col": col,
                        "gsd_m": product.gsd_m,
                        "crs": product.georeference.wkt,
                        "lon": place.lon,
                        "lat": place.lat,
                        "quality": quality,
                        "scale": encoding.scale,
                        "offset_value": encoding.offset_value,
                        "unit": "",
                        "block": place.block,
                    },
                )
    if not seen_valid:
        raise no_valid_pixel(product)
