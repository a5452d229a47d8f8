from __future__ import annotations

import dataclasses
import math
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from momo.data_prep.config import PrepConfig
from momo.data_prep.georeference import Georeference
from momo.data_prep.products import Product, Validity
from momo.data_prep.quality import is_constant, structure_score
from momo.data_prep.split import BlockGrid, SplitRule, balanced
from momo.data_prep.tiling import starts, window_count, window_footprints
from tests.data_prep.products import ELLIPSOID, mars_crs, terrain


def product(crs=None, transform=None, width=400, height=400, name="p") -> Product:
    georeference = Georeference(crs.ExportToWkt(), transform) if crs is not None else Georeference()
    return Product(
        name=name, source=Path(name), files=(), product_id=name, instrument="", driver="", band=1, width=width,
        height=height, dtype="uint8", scale=1.0, offset_value=0.0, validity=Validity(), georeference=georeference,
        gsd_m=georeference.gsd_m, licence="",
    )  # fmt: skip


def config(**settings) -> PrepConfig:
    return PrepConfig(products=["p"], out="o", **settings)


PLACES = {
    "equator": (mars_crs(), (1000.0, 10.0, 0, 3000.0, 0, -10.0)),
    "rotated": (mars_crs(), (-500.0, 7.0, 7.0, 3000.0, 7.0, -7.0)),
    "antimeridian": (mars_crs(lon=180.0), (-2000.0, 10.0, 0, 2000.0, 0, -10.0)),
    "middle latitude": (mars_crs("sinusoidal", ELLIPSOID), (1e6, 10.0, 0, 2.7e6, 0, -10.0)),
    "pole": (mars_crs("polar", ELLIPSOID), (-2000.0, 10.0, 0, 2000.0, 0, -10.0)),
    "geographic": (mars_crs("geographic"), (10.0, 2e-4, 0, 50.0, 0, -2e-4)),
}


@pytest.mark.parametrize("place", list(PLACES))
@pytest.mark.parametrize(("size", "step"), [(32, 32), (32, 16), (48, 20)])
def test_every_pixel_of_a_tile_lies_in_blocks_of_its_split(place, size, step):
    """So no ground is in both splits, whatever the overlap of tiles, products and projections."""
    item, settings = product(*PLACES[place]), config(tile_size=size, stride=step)
    grid, rule = BlockGrid(1000.0, 999), SplitRule(seed=1, val_fraction=0.4)
    rows, cols = starts(item.height, size, step), starts(item.width, size, step)
    footprints = list(window_footprints(item, settings, grid))
    assert len(footprints) == window_count(item, settings)
    lon, lat = item.georeference.lonlat(*(a + 0.5 for a in np.meshgrid(np.arange(400.0), np.arange(400.0))))
    split_HW = np.vectorize(lambda x, y: rule.split_of(grid._block(x, y)))(lon, lat)
    seen = set()
    for (row, col), footprint in zip(((r, c) for r in rows for c in cols), footprints, strict=True):
        split = rule.of_tile(footprint)
        pixels = split_HW[row : row + size, col : col + size]
        if split is not None:
            assert (pixels == split).all()
            seen.add(split)
        centre = (row + size // 2, col + size // 2)
        assert footprint.lat == pytest.approx(lat[centre], abs=2e-3)
    assert seen == {"train", "val"}


def test_same_ground_has_the_same_block_in_every_projection():
    grid = BlockGrid(2000.0, 999)
    degree = 3396190.0 * math.pi / 180
    lon, lat = 20.0, 40.0
    a = product(mars_crs(), (lon * degree, 10.0, 0, lat * degree, 0, -10.0))
    b = product(mars_crs("geographic"), (lon, 1e-4, 0, lat, 0, -1e-4))
    c = product(mars_crs("sinusoidal"), (lon * degree * math.cos(math.radians(lat)), 10.0, 0, lat * degree, 0, -10.0))
    blocks = {grid.footprints(p, 0, [0], 2)[0].block for p in (a, b, c)}
    assert len(blocks) == 1 and blocks.pop().startswith("2000m_")


def test_blocks_are_about_square_and_cover_the_globe():
    grid = BlockGrid(50_000.0, 999)
    for lat in (-89.9, -60.0, 0.0, 33.0, 80.0):
        band = grid._band(lat)
        height = math.pi / grid._bands
        width = 2 * math.pi * math.cos(math.radians((band + 0.5) * 180 / grid._bands - 90)) / grid._in_band(band)
        assert abs(lat) > 89 or width / height == pytest.approx(1.0, rel=0.05)
    assert grid._block(180.0, 0.0) == grid._block(-180.0, 0.0)


def test_product_without_crs_is_cut_into_pixel_blocks():
    grid = BlockGrid(1.0, 64)
    item = product(name="P")
    whole, across = grid.footprints(item, 32, [0, 48], 32)
    assert whole.touched == ("P_0_0",) and math.isnan(whole.lon)
    assert across.touched == ("P_0_0", "P_0_1")
    assert grid.footprints(item, 0, [10], 200)[0].touched == tuple(
        sorted(f"P_{r}_{c}" for r in range(4) for c in range(4))
    )


def test_split_depends_on_block_and_seed_only():
    blocks = [f"b{n}" for n in range(4000)]
    rule, other = SplitRule(0, 0.2), SplitRule(1, 0.2)
    assert [rule.split_of(b) for b in blocks] == [rule.split_of(b) for b in blocks]
    assert np.mean([rule.split_of(b) == "val" for b in blocks]) == pytest.approx(0.2, abs=0.02)
    assert any(rule.split_of(b) != other.split_of(b) for b in blocks)
    assert all(SplitRule(0, 0.0).split_of(b) == "train" for b in blocks)


@pytest.mark.parametrize("fraction", [1e-9, 0.9])
def test_few_blocks_still_give_both_splits(fraction):
    grid, settings = BlockGrid(1.0, 128), config(tile_size=32)
    items = [product(name=name, width=256, height=256) for name in ("A", "B")]
    footprints = [list(window_footprints(item, settings, grid)) for item in items]
    seed = next(s for s in range(999) if len({SplitRule(s, fraction).of_tile(f) for f in chain(*footprints)}) == 1)
    rule = balanced(SplitRule(seed, fraction), chain(*footprints))
    assert len(rule.forced) == 1
    assert {rule.of_tile(f) for f in chain(*footprints)} == {"train", "val"}
    assert balanced(SplitRule(seed, fraction), chain(*reversed(footprints))) == rule, "order does not matter"


def test_one_block_cannot_be_divided():
    footprints = list(window_footprints(product(width=64, height=64), config(tile_size=32), BlockGrid(1.0, 999)))
    assert balanced(SplitRule(0, 1e-9), footprints) == SplitRule(0, 1e-9)


def test_windows_cover_whole_tiles_only():
    assert list(starts(100, 32, 32)) == [0, 32, 64] and list(starts(96, 32, 16)) == [0, 16, 32, 48, 64]
    assert list(starts(31, 32, 32)) == []


def test_structure_score_tells_terrain_from_noise():
    rng = np.random.default_rng(0)
    everywhere = np.ones((64, 64), dtype=bool)
    noise, ground = rng.normal(size=(64, 64)), terrain(64, 64)
    assert structure_score(noise, everywhere) < 0.05
    assert structure_score(ground, everywhere) > 0.9
    assert structure_score(ground * 5000 + 700, everywhere) == pytest.approx(structure_score(ground, everywhere))
    assert 0.3 < structure_score(ground + noise * ground.std(), everywhere) < 0.7
    assert structure_score(np.full((64, 64), 7), everywhere) == 0.0


def test_structure_score_and_constancy_ignore_invalid_pixels():
    tile, valid = terrain(64, 64), np.ones((64, 64), dtype=bool)
    valid[:, :20] = False
    spoilt = np.where(valid, tile, 1e9)
    assert structure_score(spoilt, valid) == pytest.approx(structure_score(np.where(valid, tile, 0), valid))
    flat = np.where(valid, 5, 9)
    assert is_constant(flat, valid) and not is_constant(flat, np.ones_like(valid))
    assert is_constant(flat, np.zeros_like(valid)) and structure_score(flat, np.zeros_like(valid)) == 0.0


def test_product_can_travel_to_a_worker():
    import pickle

    item = product(*PLACES["equator"])
    item.georeference.lonlat(np.zeros(1), np.zeros(1))
    copy = pickle.loads(pickle.dumps(item))
    assert dataclasses.asdict(copy) == dataclasses.asdict(item)
