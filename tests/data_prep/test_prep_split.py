from __future__ import annotations

import math
import types

import numpy as np
import pytest

pytest.importorskip("astropy_healpix", reason="astropy-healpix is not installed (extra prep)")
from astropy_healpix import healpy
from astropy_healpix.core import boundaries_lonlat

from momo.data_prep import split
from momo.data_prep.georeference import Georeference
from momo.data_prep.split import (
    Blocks,
    SplitRule,
    balanced,
    cell_order,
    cell_side_m,
    cells_at,
    make_blocks,
    place_windows,
    unit_vectors,
)
from momo.errors import ConfigError
from tests.data_prep.products import ELLIPSOID, mars_crs

DEGREE = 3396190.0 * math.pi / 180


def product(crs=None, transform=None, key="p"):
    """As much of a product as a place needs."""
    georeference = Georeference(crs.ExportToWkt(), transform) if crs is not None else Georeference()
    return types.SimpleNamespace(georeference=georeference, key=key)


def at(lon, lat, gsd=10.0, kind="equirectangular", middle=0.0, half=2000.0):
    """A product whose centre, `half` metres from its corner, lies at a place."""
    return product(mars_crs(kind, lon=middle), ((lon - middle) * DEGREE - half, gsd, 0, lat * DEGREE + half, 0, -gsd))


# 1,000 px of 10 m in the places that matter to HEALPix: base cells meet at (45, 0), (90, 41.8) and along 90 E in the
# north; the two projections it is made of meet at 41.8 degrees.
PLACES = {
    "equator": product(mars_crs(), (1000.0, 10.0, 0, 3000.0, 0, -10.0)),
    "rotated": product(mars_crs(), (-500.0, 7.0, 7.0, 3000.0, 7.0, -7.0)),
    "antimeridian": product(mars_crs(lon=180.0), (-5000.0, 10.0, 0, 2000.0, 0, -10.0)),
    "middle latitude": product(mars_crs("sinusoidal", ELLIPSOID), (1e6, 10.0, 0, 2.7e6, 0, -10.0)),
    "north pole": product(mars_crs("polar", ELLIPSOID), (-5000.0, 10.0, 0, 5000.0, 0, -10.0)),
    "geographic": product(mars_crs("geographic"), (10.0, 2e-4, 0, 50.0, 0, -2e-4)),
    "kink": at(30.0, 41.8103),
    "base cells": at(90.0, 70.0, kind="sinusoidal", middle=90.0),
    "corner of base cells": at(90.0, 41.8103),
    "equator of base cells": at(45.0, 0.0),
    "south": at(180.0, -60.0, kind="sinusoidal", middle=180.0),
}


def cells_of_pixels(item, row, col, size, order, points=33):
    steps = np.linspace(0.0, size, points)
    lon, lat = item.georeference.lonlat(*np.meshgrid(col + steps, row + steps))
    return set(cells_at(lon.ravel(), lat.ravel(), order).tolist())


def touched(places, n):
    return places.touched[places.start_N1[n] : places.start_N1[n + 1]].tolist()


def test_cell_sides_and_orders():
    assert 12 * 4**5 * cell_side_m(5) ** 2 == pytest.approx(4 * math.pi * 3389500.0**2)
    for order in (0, 3, 12, 29):
        assert cell_order(cell_side_m(order)) == order
        assert cell_order(cell_side_m(order) * 0.9999) == order
    assert cell_order(cell_side_m(7) * 1.0001) == 6
    assert cell_order(1e9) == 0 and cell_order(1e-9) == 29


@pytest.mark.parametrize("order", [0, 1, 6, 13, 29])
def test_cells_are_those_of_healpix(order):
    rng = np.random.default_rng(order)
    lon, lat = rng.uniform(-180, 180, 5000), np.degrees(np.arcsin(rng.uniform(-1, 1, 5000)))
    lat[:200] = rng.choice([-1, 1], 200) * (90 - 10 ** rng.uniform(-7, 0, 200))
    expected = healpy.ang2pix(2**order, lon, lat, nest=True, lonlat=True)
    np.testing.assert_array_equal(cells_at(lon, lat, order), expected)
    assert cells_at(np.array([np.nan, 1.0]), np.array([0.0, 1.0]), order)[0] == -1


@pytest.mark.parametrize("place", list(PLACES))
@pytest.mark.parametrize(("size", "step", "order"), [(100, 90, 12), (48, 118, 14), (300, 233, 8)])
def test_every_pixel_of_a_window_lies_in_a_touched_cell(place, size, step, order):
    item, cols = PLACES[place], range(0, 1000 - size + 1, step)
    for row in range(0, 1000 - size + 1, 2 * step):
        places = place_windows(item, row, cols, size, order=order, pixel_block=1)
        for n, col in enumerate(cols):
            cells = touched(places, n)
            assert cells_of_pixels(item, row, col, size, order) <= set(cells) and len(set(cells)) == len(cells)
            assert cells[0] == places.cell_N[n], "the centre's cell comes first"


def test_random_windows_touch_what_they_meet_and_nothing_far_away():
    """Any place, angle, projection; 0.2 to 10 cells wide."""
    rng = np.random.default_rng(7)
    extra = total = 0
    for _ in range(40):
        kind, gsd = str(rng.choice(["equirectangular", "sinusoidal", "polar"])), 10 ** rng.uniform(0, 2.5)
        x, y = rng.uniform(-1e6, 1e6, 2) if kind == "polar" else rng.uniform(-1, 1, 2) * [2e6, 4.5e6]
        angle = rng.uniform(0, 6.3)
        c, s = gsd * math.cos(angle), gsd * math.sin(angle)
        item = product(mars_crs(kind, ELLIPSOID, lon=rng.uniform(-180, 180)), (x, c, s, y, s, -c))
        order = cell_order(64 * gsd * 10 ** rng.uniform(-1.0, 0.7))
        row, cols = int(rng.integers(0, 300)), [0, int(rng.integers(1, 500))]
        places = place_windows(item, row, cols, 64, order=order, pixel_block=1)
        for n, col in enumerate(cols):
            cells, met = set(touched(places, n)), cells_of_pixels(item, row, col, 64, order)
            assert met <= cells
            far = sorted(cells - met)
            if far:
                steps = np.linspace(0.0, 64, 33)
                lonlat = item.georeference.lonlat(*(a.ravel() for a in np.meshgrid(col + steps, row + steps)))
                outline = boundaries_lonlat(np.array(far), 8, 2**order, order="nested")
                gap = unit_vectors(*(a.to_value("deg") for a in outline))[:, :, None] - unit_vectors(*lonlat)
                assert np.linalg.norm(gap, axis=3).min(axis=(1, 2)).max() * 3389500.0 < 0.35 * cell_side_m(order)
            extra, total = extra + len(far), total + len(cells)
    assert extra < 0.25 * total


def test_windows_around_a_pole_touch_all_cells_of_it():
    places = place_windows(PLACES["north pole"], 0, [0], 1000, order=4, pixel_block=1)
    around = cells_at(np.array([45.0, 135.0, -135.0, -45.0]), np.full(4, 89.99), 4).tolist()
    assert len(set(around)) == 4 and set(around) <= set(touched(places, 0))


def test_every_cell_a_tile_meets_has_its_split_whatever_the_product():
    """The same ground in two projections and GSDs has the same splits, and no tile a pixel in the other split's."""
    rule, found = SplitRule(3, 0.4), []
    scenes = [(product(mars_crs(), (20 * DEGREE, 20.0, 0, 40 * DEGREE, 0, -20.0)), 32),
              (product(mars_crs("geographic"), (20.0, 10 / DEGREE, 0, 40.0, 0, -10 / DEGREE)), 64)]  # fmt: skip
    for number, (item, size) in enumerate(scenes):
        cols, splits = range(0, 20 * size, size), []
        for row in range(0, 20 * size, size):
            places = place_windows(item, row, cols, size, order=10, pixel_block=1)
            blocks = make_blocks(places.touched, places.start_N1, np.full(20, number), ["A", "B"], 10)
            splits.append(blocks.splits(rule).tolist())
            for col, split_of_tile in zip(cols, splits[-1]):
                met = {rule.split_of(f"healpix10_{k}") for k in cells_of_pixels(item, row, col, size, 10, points=9)}
                assert split_of_tile == -1 or met == {("train", "val")[split_of_tile]}
        found.append(splits)
    assert found[0] == found[1] and {s for row in found[0] for s in row} == {-1, 0, 1}


def test_windows_far_from_base_cells_and_poles_touch_hardly_more_than_they_meet():
    extra = total = 0
    for place, order in (("equator", 11), ("rotated", 12), ("middle latitude", 11), ("geographic", 12)):
        cols = range(0, 900, 100)
        places = place_windows(PLACES[place], 300, cols, 100, order=order, pixel_block=1)
        for n, col in enumerate(cols):
            met, cells = cells_of_pixels(PLACES[place], 300, col, 100, order, points=81), set(touched(places, n))
            assert met <= cells
            extra, total = extra + len(cells - met), total + len(cells)
    assert extra <= 0.1 * total


def test_window_larger_than_cells_touches_those_inside():
    for name in ("equator", "corner of base cells"):
        places = place_windows(PLACES[name], 0, [0], 180, order=14, pixel_block=1)
        assert cells_of_pixels(PLACES[name], 0, 0, 180, 14, points=201) <= set(touched(places, 0))
        assert len(touched(places, 0)) > 60


def test_sampled_and_straight_windows_agree(monkeypatch):
    """The general way, by points, finds at least the cells of the quick one, and few more."""
    cols = range(0, 900, 30)
    straight = place_windows(PLACES["rotated"], 0, cols, 100, order=9, pixel_block=1)
    monkeypatch.setattr(split, "_BENT", -1.0)
    sampled = place_windows(PLACES["rotated"], 0, cols, 100, order=9, pixel_block=1)
    for n in range(len(cols)):
        assert set(touched(straight, n)) <= set(touched(sampled, n))
    assert len(straight.touched) < len(sampled.touched) < 1.3 * len(straight.touched)


def test_centres_and_corners():
    item = PLACES["middle latitude"]
    places = place_windows(item, 30, [0, 64], 64, order=9, pixel_block=1)
    lon, lat = item.georeference.lonlat(np.array([96.0, 64.0, 128.0, 128.0, 64.0]), np.array([62.0, 30, 30, 94, 94]))
    assert (places.lon_N[1], places.lat_N[1]) == (lon[0], lat[0])
    np.testing.assert_array_equal(places.corners_N8[1], np.stack([lon[1:], lat[1:]], axis=1).ravel())


def test_window_over_the_edge_of_the_map_touches_nothing():
    item = product(mars_crs(), (0.0, 1000.0, 0, 91.0 * DEGREE, 0, -1000.0))  # latitude 90 is in row 59
    off, over, on = (place_windows(item, row, [0, 50], 20, order=5, pixel_block=1) for row in (0, 50, 60))
    assert not len(off.touched) and not len(over.touched) and over.start_N1.tolist() == [0, 0, 0]
    assert np.isnan(off.lon_N).all() and (off.cell_N == -1).all()
    assert np.isnan(over.corners_N8[0, :4]).all() and np.isfinite(over.corners_N8[0, 4:]).all()
    assert touched(on, 0) and touched(on, 1)


def test_same_ground_has_the_same_cell_in_every_projection():
    lon, lat = 20.0, 40.0
    a = product(mars_crs(), (lon * DEGREE, 10.0, 0, lat * DEGREE, 0, -10.0))
    b = product(mars_crs("geographic"), (lon, 1e-4, 0, lat, 0, -1e-4))
    c = product(mars_crs("sinusoidal"), (lon * DEGREE * math.cos(math.radians(lat)), 10.0, 0, lat * DEGREE, 0, -10.0))
    cells = {int(place_windows(p, 0, [0], 2, order=11, pixel_block=1).cell_N[0]) for p in (a, b, c)}
    assert len(cells) == 1


def test_cells_much_smaller_than_a_tile_are_refused():
    for name in ("equator", "corner of base cells"):
        with pytest.raises(ConfigError, match=r"split.order=20 .* touches about \d+.*\n?.*leave split.order out"):
            place_windows(PLACES[name], 0, [0], 400, order=20, pixel_block=1)


def test_product_without_crs_is_cut_into_pixel_blocks():
    item = product(key="P")
    places = place_windows(item, 32, [0, 48], 32, order=5, pixel_block=64)
    blocks = make_blocks(places.touched, places.start_N1, np.zeros(2, int), ["P"], 5)
    names = [[blocks.names[k] for k in blocks.touched[s:e]] for s, e in zip(places.start_N1, places.start_N1[1:])]
    assert names == [["P_0_0"], ["P_0_1", "P_0_0"]], "the centre's comes first"
    assert np.isnan(places.lon_N).all() and np.isnan(places.corners_N8).all() and (places.cell_N == -1).all()
    large = place_windows(item, 0, [10], 200, order=5, pixel_block=64)
    codes = {-(1 + (r << 24 | c)) for r in range(4) for c in range(4)}
    assert set(touched(large, 0)) == codes and len(large.touched) == 16
    assert touched(large, 0)[0] == -(1 + (1 << 24 | 1))


def test_blocks_of_cells_are_shared_and_blocks_of_pixels_are_not():
    touched_M, start = np.array([7, -1, -1, 7, 9]), np.array([0, 1, 2, 3, 3, 5])
    blocks = make_blocks(touched_M, start, np.array([0, 0, 1, 0, 1]), ["A", "B"], 4)
    assert [blocks.name_of(n) for n in range(5)] == ["healpix4_7", "A_0_0", "B_0_0", "", "healpix4_7"]
    assert sorted(blocks.names) == ["A_0_0", "B_0_0", "healpix4_7", "healpix4_9"]


def test_split_depends_on_block_and_seed_only():
    names = [f"b{n}" for n in range(4000)]
    rule, other = SplitRule(0, 0.2), SplitRule(1, 0.2)
    assert np.mean([rule.split_of(name) == "val" for name in names]) == pytest.approx(0.2, abs=0.02)
    assert any(rule.split_of(name) != other.split_of(name) for name in names)
    assert all(SplitRule(0, 0.0).split_of(name) == "train" for name in names)
    assert SplitRule(0, 0.2).position("healpix4_7") == pytest.approx(0.893605, abs=1e-6), "never changes"


def test_tile_over_blocks_of_both_splits_has_none():
    rule = SplitRule(0, 0.5, {"a": "train", "b": "val", "c": "val"})
    blocks = Blocks(["a", "b", "c"], np.array([0, 1, 1, 0, 1, 2]), np.array([0, 1, 2, 4, 6, 6]))
    assert blocks.splits(rule).tolist() == [0, 1, -1, 1, -1]


@pytest.mark.parametrize(("fraction", "missing"), [(1e-9, "val"), (0.999999, "train")])
def test_few_blocks_still_give_both_splits(fraction, missing):
    rule = SplitRule(3, fraction)
    names = sorted((f"b{n}" for n in range(5)), key=rule.position)
    largest = 0 if missing == "val" else 4
    counts = [20 if n == largest else 3 for n in range(5)]
    tiles = np.repeat(np.arange(5), counts)
    forced = {names[1 if missing == "val" else 3]: missing}
    for order in (np.arange(len(tiles)), np.arange(len(tiles))[::-1]):
        blocks = Blocks(names, tiles[order], np.arange(len(tiles) + 1))
        everyone = np.ones(len(tiles), dtype=bool)
        chosen = balanced(rule, blocks, everyone)
        assert chosen.forced == forced, "the first block that does not hold most tiles"
        assert set(blocks.splits(chosen).tolist()) == {0, 1}
        assert balanced(chosen, blocks, everyone) == chosen
        few = np.isin(tiles[order], [largest])
        assert balanced(rule, blocks, few) == rule, "one block cannot be divided"
        assert balanced(SplitRule(3, 0.0), blocks, everyone).forced == {}
