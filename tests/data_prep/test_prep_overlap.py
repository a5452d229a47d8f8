from __future__ import annotations

import math

import numpy as np
import pytest

pytest.importorskip("scipy", reason="scipy is not installed (extra prep)")
pytest.importorskip("shapely", reason="shapely is not installed (extra prep)")
import shapely

from momo.data_prep import overlap
from momo.data_prep.footprints import read_footprints
from momo.data_prep.overlap import Shapes, overlapping_pairs, quadrilaterals
from momo.data_prep.split import unit_vectors
from momo.errors import DataError


def squares(count, spread, sides, seed):
    """Turned squares in a plane, corners in order; shape (count, 4, 2)."""
    rng = np.random.default_rng(seed)
    centre_N12, turn = rng.uniform(-spread, spread, (count, 1, 2)), rng.uniform(0, math.pi, count)
    half = rng.choice(sides, count)[:, None] / 2
    right = np.stack([np.cos(turn), np.sin(turn)], axis=1) * half
    up = np.stack([-np.sin(turn), np.cos(turn)], axis=1) * half
    return centre_N12 + np.stack([up - right, up + right, right - up, -up - right], axis=1)


def on_sphere(plane, lon, lat):
    """Longitudes and latitudes, degrees, of points of the plane that touches the unit sphere at a place."""
    east, north, out = overlap.tangent_axes(unit_vectors(np.array([lon * 1.0]), np.array([lat * 1.0])))[0]
    xyz = out + plane[..., :1] * east + plane[..., 1:] * north
    lon, lat = np.arctan2(xyz[..., 1], xyz[..., 0]), np.arctan2(xyz[..., 2], np.hypot(xyz[..., 0], xyz[..., 1]))
    return np.degrees(np.stack([lon, lat], axis=-1))


def tilted(corners_N8, lon, lat):
    """Moves corners given in degrees near (0, 0) rigidly to a place on the sphere."""
    xyz = unit_vectors(corners_N8[:, ::2], corners_N8[:, 1::2])
    plane = np.stack([xyz[..., 1], xyz[..., 2]], axis=-1) / xyz[..., :1]
    return on_sphere(plane, lon, lat).reshape(-1, 8)


def ground(plane, place=(0, 0)):
    """Quadrilaterals at a place."""
    return quadrilaterals(on_sphere(plane, *place).reshape(-1, 8))


def box(x0, y0, x1, y1):
    return np.array([[[x0, y1], [x1, y1], [x1, y0], [x0, y0]]], dtype=float)


def flat_shares(a, b):
    """Shares in the plane, all pairs."""
    a, b = (shapely.polygons(corners.reshape(-1, 4, 2)) for corners in (a, b))
    common = shapely.area(shapely.intersection(a[:, None], b[None]))
    return common / shapely.area(a)[:, None], common / shapely.area(b)[None]


PLACES = [(0, 0), (180, 0), (-179.95, 60), (37, 90), (0, -89.99), (120, -30)]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("portion", [50, 1 << 20])
def test_pairs_are_those_of_brute_force_wherever_they_lie(place, portion, monkeypatch):
    monkeypatch.setattr(overlap, "_CANDIDATES", portion)
    monkeypatch.setattr(overlap, "_VERTICES", portion * 8)
    a, b = squares(120, 2e-3, [1e-4, 3e-4, 1e-3], 0), squares(90, 2e-3, [5e-4, 2e-3], 1)
    share_a, share_b = flat_shares(a, b)
    pairs = overlapping_pairs(ground(a, place), ground(b, place), 0.2)
    expected = np.argwhere(share_a > 0.2)
    assert len(expected) > 50
    np.testing.assert_array_equal(np.stack([pairs.i, pairs.j], axis=1), expected)
    np.testing.assert_allclose(pairs.share_i, share_a[pairs.i, pairs.j], atol=1e-5)
    np.testing.assert_allclose(pairs.share_j, share_b[pairs.i, pairs.j], atol=1e-5)
    either = overlapping_pairs(ground(a, place), ground(b, place), 0.2, either=True)
    both = np.argwhere((share_a > 0.2) | (share_b > 0.2))
    assert len(both) > len(expected)
    np.testing.assert_array_equal(np.stack(either[:2], axis=1), both)


def test_pairs_within_a_set_and_groups():
    a = squares(150, 2e-3, [3e-4, 6e-4], 2)
    share, other = flat_shares(a, a)
    limit, group = 0.3, np.arange(150) % 4
    expected = np.argwhere(np.triu((share > limit) | (other > limit), 1))
    pairs = overlapping_pairs(ground(a), None, limit)
    np.testing.assert_array_equal(np.stack(pairs[:2], axis=1), expected)
    pairs = overlapping_pairs(ground(a), None, limit, group_a=group)
    apart = expected[group[expected[:, 0]] != group[expected[:, 1]]]
    assert 0 < len(apart) < len(expected)
    np.testing.assert_array_equal(np.stack(pairs[:2], axis=1), apart)
    across = overlapping_pairs(ground(a), ground(a), limit, group_a=group, group_b=group)
    assert (group[across.i] != group[across.j]).all() and len(across.i) >= len(apart)


@pytest.mark.parametrize("place", PLACES)
def test_neighbours_that_share_an_edge_do_not_overlap(place):
    grid = np.concatenate([box(x, y, x + 1, y + 1) for x in range(5) for y in range(5)]) * 1e-3
    assert not len(overlapping_pairs(ground(grid, place), None, 1e-6).i)


def test_empty_sets_have_no_pairs():
    none, some = quadrilaterals(np.empty((0, 8))), ground(squares(3, 1e-3, [1e-3], 0))
    for a, b in ((none, some), (some, none), (none, None)):
        assert not len(overlapping_pairs(a, b, 0.1).i)


@pytest.mark.parametrize("place", PLACES)
def test_small_polygons_in_a_large_one_are_found(place):
    small, large = ground(squares(40, 0.05, [1e-5], 0), place), ground(box(-0.15, -0.15, 0.15, 0.15), place)
    assert not len(overlapping_pairs(large, small, 1e-6).i), "none has much of the large one"
    assert overlapping_pairs(large, small, 0.99, either=True).j.tolist() == list(range(40))
    pairs = overlapping_pairs(small, large, 0.99)
    assert pairs.i.tolist() == list(range(40)) and pairs.share_i == pytest.approx(np.ones(40))


def test_footprint_larger_than_the_plane_is_refused():
    huge = ground(box(-0.8, -0.8, 0.8, 0.8))
    with pytest.raises(DataError, match=r"too large to be compared: 1 of them.*25 degrees"):
        overlapping_pairs(huge, None, 0.1)


def test_polygon_with_a_hole_and_a_notch():
    """A ring of eight edges with a hole, on the sphere at 180 E, against squares in each of its parts."""
    outer = [[0, 0], [6, 0], [6, 6], [4, 6], [4, 5], [3, 5], [3, 6], [0, 6]]
    hole = [[1, 1], [2, 1], [2, 2], [1, 2]]
    vertex_V2 = on_sphere(np.array(outer + hole) * 1e-3, 180, 0)
    shape = Shapes(vertex_V2, np.array([0, 8, 12]), np.array([0, 2]))
    in_hole, in_notch, inside, half = (
        box(*(np.array(b) * 1e-3)) for b in ((1.1, 1.1, 1.9, 1.9), (3.1, 5.1, 3.9, 6), (4, 1, 5, 2), (5, 1, 7, 2))
    )
    tiles = ground(np.concatenate([in_hole, in_notch, inside, half]), (180, 0))
    pairs = overlapping_pairs(tiles, shape, 1e-6, either=True)
    assert pairs.i.tolist() == [2, 3] and pairs.share_i == pytest.approx([1.0, 0.5], abs=1e-4)


@pytest.mark.parametrize("width", [1e-3, 0.02, 0.2, 3.0])
def test_footprint_over_the_antimeridian_stays_small(tmp_path, width):
    """However narrow, it is not read as the rest of Mars."""
    east, west = 180 - width / 2, -180 + width / 2
    path = tmp_path / "a.csv"
    path.write_text(f'wkt\n"POLYGON (({east} 0, {west} 0, {west} {width}, {east} {width}, {east} 0))"\n')
    shapes, places, _ = read_footprints(str(path))
    assert places == ["row 2"]
    whole = np.array([[east, width, west, width, west, 0, east, 0]])
    beside = on_sphere(box(-0.01, -0.01, 0.01, 0.01), 90, 0).reshape(1, 8)
    pairs = overlapping_pairs(quadrilaterals(np.concatenate([whole, beside])), shapes, 1e-6, either=True)
    assert pairs.i.tolist() == [0]
    assert pairs.share_i[0] == pytest.approx(1, abs=1e-3) and pairs.share_j[0] == pytest.approx(1, abs=1e-3)


def shapes_of(*shapes):
    """Polygons, each a list of rings of longitude and latitude."""
    flat = [np.array(ring, float) for shape in shapes for ring in shape]
    vertices, counts = np.cumsum([0, *(len(ring) for ring in flat)]), np.cumsum([0, *(len(shape) for shape in shapes)])
    return Shapes(np.concatenate(flat), vertices, counts)


SQUARE = [(0, 0), (0, 1), (1, 1), (1, 0)]


def test_holes_show_no_ground():
    hole = [(0.25, 0.25), (0.75, 0.25), (0.75, 0.75), (0.25, 0.75)]
    tiles = quadrilaterals(np.array([[0.3, 0.7, 0.7, 0.7, 0.7, 0.3, 0.3, 0.3], [0.0, 0.5, 0.5, 0.5, 0.5, 0, 0, 0]]))
    pairs = overlapping_pairs(tiles, shapes_of([SQUARE, hole], [SQUARE]), 1e-6)
    assert list(zip(pairs.i.tolist(), pairs.j.tolist())) == [(0, 1), (1, 0), (1, 1)]
    assert pairs.share_i == pytest.approx([1.0, 0.75, 1.0], abs=1e-3)
    assert pairs.share_j == pytest.approx([0.16, 0.25, 0.25], abs=1e-3)


def test_a_polygon_that_crosses_itself_does_not_stop_the_rest():
    bow = shapes_of([[(0, 0), (1, 1), (1, 0), (0, 1)]], [SQUARE])
    tiles = quadrilaterals(np.array([[0.4, 0.9, 0.6, 0.9, 0.6, 0.1, 0.4, 0.1], [0, 0.6, 0.2, 0.6, 0.2, 0.4, 0, 0.4]]))
    pairs = overlapping_pairs(tiles, bow, 0.05)
    assert {(0, 1), (1, 0), (1, 1)} <= set(zip(pairs.i.tolist(), pairs.j.tolist()))
    assert (pairs.share_i <= 1.0).all() and (pairs.share_j <= 1.0).all()


def test_identical_and_mirrored_footprints():
    tile = np.array([[0.0, 1, 1, 1, 1, 0, 0, 0]])
    mirrored = tile.reshape(1, 4, 2)[:, ::-1].reshape(1, 8)
    pairs = overlapping_pairs(quadrilaterals(np.concatenate([tile, tile, mirrored])), None, 0.99)
    assert (pairs.i.tolist(), pairs.j.tolist()) == ([0, 0, 1], [1, 2, 2])
    assert pairs.share_i == pytest.approx(1.0) and pairs.share_j == pytest.approx(1.0)
