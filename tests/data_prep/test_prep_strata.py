from __future__ import annotations

import math

import numpy as np
import pytest

pytest.importorskip("osgeo.gdal", reason="GDAL is not installed (extra prep)")
pytest.importorskip("shapely", reason="shapely is not installed (extra prep)")
import shapely

from momo.data_prep import strata
from momo.data_prep.strata import NO_PLACE, allotment, cells, latitude_bands, priorities, sample, units_at
from momo.errors import DataError
from tests.data_prep.products import ELLIPSOID, mars_crs
from tests.data_prep.test_prep_footprints import in_crs, write_vector

DEGREE = 3396190.0 * math.pi / 180


def names_at(lon, lat, path, column="Unit", layer=None):
    code, names, notes = units_at(np.array(lon, float), np.array(lat, float), str(path), column, layer)
    assert names[0] == "" and names[1:] == sorted(names[1:])
    return [names[k] for k in code], notes


def globe(count=4000, seed=0):
    rng = np.random.default_rng(seed)
    return rng.uniform(-180, 180, count), np.degrees(np.arcsin(rng.uniform(-1, 1, count)))


def stars(count, seed):
    """Polygons with many corners, some with a hole, none over the antimeridian or a pole."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        angle = np.sort(rng.uniform(0, 2 * np.pi, 12))
        reach = rng.uniform(5, 25, 12)
        x, y = rng.uniform(-150, 150), rng.uniform(-60, 60)
        ring = np.stack([x + reach * np.cos(angle), y + reach * np.sin(angle)], axis=1)
        polygon = shapely.make_valid(shapely.Polygon(ring))
        found.append(polygon.difference(shapely.Point(x + 3, y).buffer(4)))
    return [p for p in found if p.geom_type in ("Polygon", "MultiPolygon") and not p.is_empty]


@pytest.mark.parametrize("chunk", [200_000, 300])
def test_units_equal_plain_point_in_polygon(tmp_path, chunk, monkeypatch):
    """Polygons with holes over each other: the first of their units in the alphabet; no unit outside."""
    monkeypatch.setattr(strata, "_POINTS", chunk)
    polygons = stars(12, 1)
    units = [("Hb", "Aa", "eNh", None)[n % 4] for n in range(len(polygons))]
    path = write_vector(tmp_path / "u.gpkg", [p.wkt for p in polygons], mars_crs("geographic"), values=units)
    lon, lat = globe()
    inside = [shapely.contains_xy(p, lon, lat) for p in polygons]
    expected = [min((u for u, i in zip(units, inside) if i[n] and u), default="") for n in range(len(lon))]
    found, notes = names_at(lon, lat, path)
    assert found == expected and set(found) == {"", "Aa", "Hb", "eNh"} and notes == []


@pytest.mark.parametrize("kind", ["geographic", "equirectangular", "sinusoidal"])
def test_units_from_maps_in_other_coordinates(tmp_path, kind):
    ring = [(30.0, 40.0), (34.0, 40.0), (34.0, 44.0), (30.0, 44.0), (30.0, 40.0)]
    crs = mars_crs(kind, ELLIPSOID)
    path = write_vector(tmp_path / "u.gpkg", [in_crs(crs, ring)], crs, values=["A"])
    lon, lat = np.random.default_rng(0).uniform(29, 35, 2000), np.random.default_rng(1).uniform(39, 45, 2000)
    near = np.minimum(abs(lon - 30), abs(lon - 34)).clip(max=np.minimum(abs(lat - 40), abs(lat - 44))) < 0.02
    expected = np.where((lon > 30) & (lon < 34) & (lat > 40) & (lat < 44), "A", "")
    found, _ = names_at(lon, lat, path)
    assert (np.array(found)[~near] == expected[~near]).all() and near.mean() < 0.1


@pytest.mark.parametrize("shift", [-360, 0, 360])
def test_units_over_the_antimeridian(tmp_path, shift):
    """Drawn on beyond 180, from 0 to 360, or jumping from 179 to -179; with a hole there."""

    def ring(*points, wrap):
        return ", ".join(f"{(x + 180) % 360 - 180 if wrap else x + shift} {y}" for x, y in points)  # fmt: skip

    lon, lat = np.random.default_rng(0).uniform(160, 200, 3000), np.random.default_rng(1).uniform(-5, 25, 3000)
    plain = shapely.Polygon([(170, 0), (190, 0), (195, 20), (165, 20)], [[(178, 5), (184, 5), (184, 9), (178, 9)]])
    expected = ["A" if i else "" for i in shapely.contains_xy(plain, lon, lat)]
    for wrap in (False, True):
        outer = ring((170, 0), (190, 0), (195, 20), (165, 20), (170, 0), wrap=wrap)
        hole = ring((178, 5), (184, 5), (184, 9), (178, 9), (178, 5), wrap=wrap)
        path = write_vector(tmp_path / f"u{wrap}.gpkg", [f"POLYGON (({outer}), ({hole}))"], mars_crs("geographic"),
                            values=["A"])  # fmt: skip
        found, notes = names_at((lon + 180) % 360 - 180, lat, path)
        assert found == expected
        assert len(notes) == wrap


def test_units_over_the_antimeridian_in_metres(tmp_path):
    """An equirectangular map with a jump, as ogr2ogr makes one; the notch lies over the seam."""
    points = [(170, -5), (178, -5), (179, 0), (-179, 0), (-178, -5), (-170, -5), (-170, 3), (170, 3), (170, -5)]
    wkt = "POLYGON ((" + ", ".join(f"{x * DEGREE} {y * DEGREE}" for x, y in points) + "))"
    path = write_vector(tmp_path / "u.gpkg", [wkt], mars_crs(), values=["A"])
    found, notes = names_at([175, -175, 180, -180, 179.9, 180, 0, 165], [-4, -4, 1, 1, -1, -1, 1, 0], path)
    assert found == ["A", "A", "A", "A", "", "", "", ""] and "1 polygons have steps" in notes[0]


def test_units_round_a_pole(tmp_path):
    """A polar cap drawn along the pole or as a ring round it, with a hole over the antimeridian."""
    caps = {
        "closed": "POLYGON ((-180 80, -60 75, 60 80, 180 80, 180 90, -180 90, -180 80))",
        "ring": "POLYGON ((-150 80, -60 75, 60 80, 150 80, -150 80), (170 85, -170 85, -170 87, 170 87, 170 85))",
    }
    lon, lat = [-60, -60, 0, 180, 180, -175, 175, 0, 180], [76, 74, 90, 84, 86, 86, 86, 86, -85]
    for name, wkt in caps.items():
        found, _ = names_at(
            lon, lat, write_vector(tmp_path / f"{name}.gpkg", [wkt], mars_crs("geographic"), values=["A"])
        )
        hole = [""] * 3 if name == "ring" else ["A"] * 3
        assert found == ["A", "", "A", "A", *hole, "A", ""], name
    south = "POLYGON ((0 -80, 90 -80, 180 -80, -90 -80, 0 -80))"
    path = write_vector(tmp_path / "south.gpkg", [south], mars_crs("geographic"), values=["A"])
    assert names_at([0, 123, -45, 10], [-90, -85, -81, -79], path)[0] == ["A", "A", "A", ""]


def test_a_band_round_mars(tmp_path):
    path = write_vector(tmp_path / "u.gpkg", ["POLYGON ((-180 -10, 180 -10, 180 10, -180 10, -180 -10))"],
                        mars_crs("geographic"), values=["A"])  # fmt: skip
    assert names_at([-180, 0, 180, 90], [0, 5, -5, 11], path) == (["A", "A", "A", ""], [])


def test_unknown_places_have_no_unit_and_names_are_stripped(tmp_path):
    path = write_vector(tmp_path / "u.gpkg", ["POLYGON ((0 0, 9 0, 9 9, 0 9, 0 0))"] * 2, mars_crs("geographic"),
                        values=[" lHl ", " "])  # fmt: skip
    assert names_at([5, np.nan, 5], [5, 5, np.nan], path)[0] == ["lHl", "", ""]
    assert names_at([], [], path)[0] == []


def test_errors_list_what_there_is(tmp_path):
    path = write_vector(
        tmp_path / "u.gpkg", ["POLYGON ((0 0, 9 0, 9 9, 0 9, 0 0))"], mars_crs("geographic"), values=["A"]
    )
    place = (np.zeros(1), np.zeros(1))
    with pytest.raises(
        DataError, match=r"no such column: .*u\.gpkg: unit\. Rule: its columns are Unit.*strata\.column"
    ):
        units_at(*place, str(path), "unit")
    with pytest.raises(
        DataError, match=r"no such layer: .*u\.gpkg: geology\. Rule: its layers are units.*strata\.layer"
    ):
        units_at(*place, str(path), "Unit", "geology")
    with pytest.raises(DataError, match=r"does not exist: .*none\.gpkg"):
        units_at(*place, str(tmp_path / "none.gpkg"), "Unit")
    assert units_at(*place, str(path), "Unit", "units")[1] == ["", "A"]


def test_latitude_bands():
    lat = np.array([-90.0, -89.9, -75.0, -0.001, 0.0, 89.9, 90.0, np.nan])
    code, names = latitude_bands(lat, 15.0)
    assert [names[k] for k in code] == [
        "-90..-75",
        "-90..-75",
        "-75..-60",
        "-15..0",
        "0..15",
        "75..90",
        "75..90",
        NO_PLACE,
    ]
    code, names = latitude_bands(np.array([-90.0, 89.0]), 70.0)
    assert [names[k] for k in code] == ["-90..-20", "50..90"]
    assert latitude_bands(np.array([3.0]), 500.0)[1] == ["-90..90"] and latitude_bands(np.empty(0), 15.0)[1] == []


def test_cells_as_strata():
    code, names = cells(np.array([10.0, 10.0, -170.0, np.nan]), np.array([45.0, 45.0, -45.0, 0.0]), 2)
    assert names[0] == NO_PLACE and code[0] == code[1] != code[2] and names[code[3]] == NO_PLACE
    assert all(name.startswith("healpix2_") for name in names[1:])


def test_priorities_depend_on_the_key_and_seed_alone():
    product = np.array([0, 0, 1, 1, 1])
    row, col = np.array([0, 224, 0, 224, 0]), np.array([0, 0, 0, 0, 224])
    first = priorities(product, ["A", "B"], row, col, 0)
    assert len(set(first.tolist())) == 5
    np.testing.assert_array_equal(first, priorities(1 - product, ["B", "A"], row, col, 0))
    order = np.array([4, 2, 0])
    np.testing.assert_array_equal(first[order], priorities(product[order], ["A", "B"], row[order], col[order], 0))
    assert not (first == priorities(product, ["A", "B"], row, col, 1)).any()
    many = priorities(np.zeros(20_000, int), ["A"], np.arange(20_000) // 100 * 224, np.arange(20_000) % 100 * 224, 0)
    share = np.histogram(many.astype(float) / 2.0**64, bins=10, range=(0, 1))[0] / 20_000
    assert share == pytest.approx(np.full(10, 0.1), abs=0.01)


def filled(counts, weights, total):
    """Water filling, tile after tile: the next goes to the open stratum that is farthest behind its share."""
    take = np.zeros(len(counts), dtype=int)
    for _ in range(min(total, sum(counts))):
        open_K = [k for k in range(len(counts)) if take[k] < counts[k]]
        take[min(open_K, key=lambda k: (take[k] + 0.5) / weights[k])] += 1
    return take


@pytest.mark.parametrize("plan", ["uniform", "sqrt"])
@pytest.mark.parametrize("seed", range(12))
def test_allotment_of_a_total(plan, seed):
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 60, rng.integers(1, 9))
    counts[rng.integers(len(counts))] += 200
    weights = np.where(counts > 0, np.ones(len(counts)) if plan == "uniform" else np.sqrt(counts), 1.0)
    for total in (1, 7, 50, 150, int(counts.sum()), 10_000):
        take = allotment(counts, plan, tiles=total, cap=None)
        assert take.sum() == min(total, counts.sum()) and (take <= counts).all() and (take >= 0).all()
        assert np.abs(take - filled(counts, weights, total)).max() <= 1, "rounding aside"


def test_plans():
    counts = np.array([100, 4, 0, 25])
    assert allotment(counts, "all", tiles=None, cap=None).tolist() == [100, 4, 0, 25]
    assert allotment(counts, "capped", tiles=None, cap=20).tolist() == [20, 4, 0, 20]
    assert allotment(counts, "uniform", tiles=None, cap=None).tolist() == [4, 4, 0, 4]
    assert allotment(counts, "sqrt", tiles=None, cap=None).tolist() == [20, 4, 0, 10]
    assert allotment(counts, "uniform", tiles=44, cap=None).tolist() == [20, 4, 0, 20]
    assert allotment(counts, "uniform", tiles=64, cap=None).tolist() == [35, 4, 0, 25]
    assert allotment(counts, "sqrt", tiles=17, cap=None).tolist() == [10, 2, 0, 5]
    assert allotment(np.zeros(3, int), "sqrt", tiles=5, cap=None).tolist() == [0, 0, 0]


@pytest.mark.parametrize("plan", ["all", "uniform", "sqrt", "capped"])
def test_sample_takes_the_smallest_priorities_whatever_the_order(plan):
    rng = np.random.default_rng(0)
    stratum = rng.choice(5, 400, p=[0.6, 0.2, 0.1, 0.07, 0.03])
    priority = rng.integers(0, 2**64, 400, dtype=np.uint64)
    kept = sample(stratum, plan, priority, tiles=90, cap=20)
    take = allotment(np.bincount(stratum), plan, tiles=90, cap=20)
    for k in range(5):
        mine = np.flatnonzero(stratum == k)
        assert set(np.flatnonzero(kept & (stratum == k))) == set(mine[np.argsort(priority[mine])][: take[k]])
    order = rng.permutation(400)
    np.testing.assert_array_equal(sample(stratum[order], plan, priority[order], tiles=90, cap=20), kept[order])
    assert sample(np.empty(0, int), plan, np.empty(0, np.uint64), tiles=9, cap=2).tolist() == []
