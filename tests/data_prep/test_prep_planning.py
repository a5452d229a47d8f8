from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("osgeo.gdal", reason="GDAL is not installed (extra prep)")
pytest.importorskip("astropy_healpix", reason="astropy-healpix is not installed (extra prep)")
pytest.importorskip("shapely", reason="shapely is not installed (extra prep)")
import shapely

from momo.config import config_from_dict
from momo.data_prep import planning
from momo.data_prep.config import PrepConfig
from momo.data_prep.georeference import Georeference
from momo.data_prep.pieces import tile_key
from momo.data_prep.planning import ALIKE, BORDER, LEAK, NOT_DRAWN, OFF_MAP, OVERLAP, VAL_GROUND, TileTable, make_plan
from momo.data_prep.split import SplitRule, cell_order, place_windows
from momo.errors import DataError
from tests.data_prep.products import mars_crs
from tests.data_prep.test_prep_footprints import write_vector

SIZE, GSD = 32, 10.0
TILE_M = SIZE * GSD
DEGREE = 3396190.0 * np.pi / 180
ORDER = cell_order(3 * TILE_M)
OFF = {"duplicates": {"max_overlap": None, "max_distance": None}}


def config(**settings):
    return config_from_dict(PrepConfig, {"products": "p", "out": "o", "split": {"val_fraction": 0.3}, **settings})


def table(scenes, *, order=ORDER, seed=0, quality=None):
    """Tiles of products {key: (x, y, across, down) or None without a CRS}, metres from (0, 0), with random hashes."""
    parts = {name: [] for name in ("product", "row", "col", "lon", "lat", "corners", "cell", "touched", "counts")}
    wkt = mars_crs().ExportToWkt()
    for number, place in enumerate(scenes.values()):
        x, y, across, down = place or (0, 0, 6, 6)
        georeference = Georeference(wkt, (x, GSD, 0, y, 0, -GSD)) if place else Georeference()
        cols = np.arange(across) * SIZE
        for row in range(0, down * SIZE, SIZE):
            places = place_windows(SimpleNamespace(georeference=georeference), row, cols, SIZE, order=order,
                                   pixel_block=3 * SIZE)  # fmt: skip
            values = (np.full(across, number, np.int32), np.full(across, row, np.int32), cols.astype(np.int32),
                      places.lon_N, places.lat_N, places.corners_N8, places.cell_N, places.touched,
                      np.diff(places.start_N1))  # fmt: skip
            for name, value in zip(parts, values):
                parts[name].append(value)
    empty = {"corners": np.empty((0, 8)), "product": np.empty(0, np.int32), "lon": np.empty(0), "lat": np.empty(0)}
    whole = {name: np.concatenate(v) if v else empty.get(name, np.empty(0, np.int64)) for name, v in parts.items()}
    count, rng = len(whole["lon"]), np.random.default_rng(seed)
    return TileTable(
        product_ids=list(scenes), product_N=whole["product"], row_N=whole["row"].astype(np.int32),
        col_N=whole["col"].astype(np.int32), size=SIZE, lon_N=whole["lon"], lat_N=whole["lat"],
        corners_N8=whole["corners"], cell_N=whole["cell"], touched=whole["touched"].astype(np.int64),
        start_N1=np.concatenate([[0], np.cumsum(whole["counts"])]).astype(np.int64),
        phash_N=rng.integers(0, 2**64, count, dtype=np.uint64), gsd_N=np.full(count, GSD),
        quality_N=rng.uniform(0.2, 1.0, count) if quality is None else np.asarray(quality, float),
    )  # fmt: skip


def plan_of(tiles, order=ORDER, **settings):
    plan = make_plan(tiles, config(**settings), order)
    count = len(tiles)
    assert len(plan.split_N) == len(plan.reason_N) == len(plan.unit_N) == count
    np.testing.assert_array_equal(plan.split_N == -1, plan.reason_N != 0)
    assert json.loads(json.dumps(plan.report, allow_nan=False)) == plan.report
    counts = plan.report["planning"]
    assert counts["tiles"] == count == counts["train"] + counts["val"] + sum(counts["dropped"].values())
    assert counts["train"] == (plan.split_N == 0).sum() and counts["val"] == (plan.split_N == 1).sum()
    return plan


def reasons(plan):
    return [plan.reasons[k] for k in plan.reason_N]


def ground(tiles):
    """Polygons in the equirectangular plane, metres."""
    return shapely.polygons(tiles.corners_N8.reshape(-1, 4, 2) * DEGREE)


def assert_train_never_meets_val(tiles, plan):
    polygons = ground(tiles)
    train, val = polygons[plan.split_N == 0], polygons[plan.split_N == 1]
    common = shapely.area(shapely.intersection(train[:, None], val[None]))
    assert len(train) and len(val) and common.max() < 1e-5 * TILE_M**2


def footprints(path, *centres, size=50):
    path.write_text("lon,lat,size_m\n" + "".join(f"{x / DEGREE},{y / DEGREE},{size}\n" for x, y in centres))
    return str(path)


def test_every_tile_is_taken_when_nothing_speaks_against_it():
    tiles = table({"A": (0, 0, 4, 4)})
    plan = plan_of(tiles, split={"val_fraction": 0.0})
    assert plan.split_N.tolist() == [0] * 16 and plan.units == [""] and not plan.unit_N.any()
    assert plan.report["planning"] == {"tiles": 16, "train": 16, "val": 0, "dropped": {}}
    assert plan.report["notes"] == [] and "strata" not in plan.report and "leakage" not in plan.report
    assert tiles.key(5) == tile_key("A", SIZE, SIZE)


def test_split_follows_the_cells_and_drops_tiles_over_both():
    tiles = table({"A": (0, 0, 20, 20)})
    plan, rule = plan_of(tiles, **OFF), SplitRule(0, 0.3)
    for n, name in enumerate(plan.block_names(range(400))):
        cells = tiles.touched[tiles.start_N1[n] : tiles.start_N1[n + 1]]
        splits = {rule.split_of(f"healpix{ORDER}_{cell}") for cell in cells}
        assert name == f"healpix{ORDER}_{tiles.cell_N[n]}"
        assert plan.reasons[plan.reason_N[n]] == (BORDER if len(splits) == 2 else "")
        assert plan.split_N[n] == (-1 if len(splits) == 2 else ("train", "val").index(splits.pop()))
    assert set(plan.split_N.tolist()) == {-1, 0, 1}
    assert_train_never_meets_val(tiles, plan)
    assert plan.report["split"] | {"blocks": 0} == {
        "by": "healpix", "order": ORDER, "seed": 0, "val_fraction": 0.3, "blocks": 0, "forced": {},
    }  # fmt: skip
    other = plan_of(tiles, split={"val_fraction": 0.3, "seed": 5}, **OFF)
    assert (other.split_N != plan.split_N).any()


@pytest.mark.parametrize("by", ["healpix", "product"])
def test_train_never_overlaps_validation(by):
    scenes = {f"P{n}": (n % 4 * 3.3 * TILE_M, n // 4 * 2.7 * TILE_M, 6, 5) for n in range(12)}
    tiles = table(scenes)
    for overlap in (None, 0.5):
        plan = plan_of(tiles, split={"by": by, "val_fraction": 0.3}, duplicates={"max_overlap": overlap})
        assert_train_never_meets_val(tiles, plan)
        assert (VAL_GROUND in reasons(plan)) == (by == "product")
        dropped = plan.report["planning"]["dropped"].get(VAL_GROUND, 0)
        assert plan.report["ground_check"]["dropped"] == dropped


def test_split_by_product():
    scenes = {f"P{n}": (n * 100 * TILE_M, 0, 3, 3) for n in range(30)} | {"raw": None}
    tiles, rule = table(scenes), SplitRule(0, 0.3)
    plan = plan_of(tiles, split={"by": "product", "val_fraction": 0.3}, **OFF)
    expected = [("train", "val").index(rule.split_of(key)) for key in scenes]
    assert plan.split_N.tolist() == [expected[p] for p in tiles.product_N]
    assert plan.block_names([0, 9, len(tiles) - 1]) == ["P0", "P1", "raw"]
    assert any("without a CRS have no place on Mars" in note for note in plan.report["notes"])


def test_validation_ground_goes_before_duplicates():
    """No tile goes in favour of a training tile that goes itself because of validation ground."""
    rule = SplitRule(0, 0.3)
    train = next(f"T{n}" for n in range(99) if rule.split_of(f"T{n}") == "train")
    val = next(f"V{n}" for n in range(99) if rule.split_of(f"V{n}") == "val")
    tiles = table({train: (0, 0, 2, 1), val: (0.2 * TILE_M, 0, 2, 1)}, quality=[0.9, 0.1, 0.5, 0.5])
    plan = plan_of(tiles, split={"by": "product", "val_fraction": 0.3})
    assert reasons(plan) == [VAL_GROUND, VAL_GROUND, "", ""]


def test_forced_block_is_said():
    tiles = table({"A": (0, 0, 8, 8)})
    plan = plan_of(tiles, split={"val_fraction": 1e-9}, **OFF)
    forced = plan.report["split"]["forced"]
    assert list(forced.values()) == ["val"] and plan.report["planning"]["val"] > 0
    assert any(f"the hash left val empty, so block {next(iter(forced))} was moved to val" in note
               for note in plan.report["notes"])  # fmt: skip


def test_one_block_leaves_no_validation_and_says_so():
    plan = plan_of(table({"A": (1000.0, 1000.0, 2, 2)}, order=3), order=3, split={"val_fraction": 1e-9})
    assert plan.report["planning"]["val"] == 0
    assert any(note.startswith("no validation tile is left") for note in plan.report["notes"])


def test_tiles_off_the_map():
    tiles = table({"A": (0, 90 * DEGREE + 4.5 * TILE_M, 3, 9)}, order=6)
    plan = plan_of(tiles, order=6, split={"val_fraction": 0.0})
    assert reasons(plan)[:15] == [OFF_MAP] * 15 and OFF_MAP not in reasons(plan)[15:]
    assert plan.block_names([0, 20])[0] == "" and plan.block_names([20])[0].startswith("healpix6_")
    none = plan_of(table({"A": (0, 90 * DEGREE + 9 * TILE_M, 3, 3)}, order=6), order=6)
    assert set(reasons(none)) == {OFF_MAP} and none.block_names([0]) == [""]
    assert any("no training tile is left" in note for note in none.report["notes"])


def test_leaks_are_dropped_and_counted(tmp_path):
    tiles = table({"A": (0, 0, 5, 5), "raw": None})
    path = footprints(tmp_path / "f.csv", (1.5 * TILE_M, -0.5 * TILE_M), (3 * TILE_M, -3 * TILE_M), (9e6, 0))
    plan = plan_of(tiles, leakage={"footprints": path}, split={"val_fraction": 0.0}, **OFF)
    leaks = [n for n, reason in enumerate(reasons(plan)) if reason == LEAK]
    assert leaks == [1, 12, 13, 17, 18], "one inside a tile, one over a corner of four"
    found = plan.report["leakage"]
    assert (found["footprints"], found["touched_footprints"], found["tiles"]) == (3, 2, 5)
    assert found["examples"][0] == [tiles.key(1), "row 2", pytest.approx(50**2 / TILE_M**2, rel=0.02)]
    assert plan.report["notes"][0] == (
        "36 tiles of products without a CRS have no place on Mars: overlap with the given footprints is not checked"
    )
    with pytest.raises(DataError, match=r"must not be trained on: 5 tiles; the first: A_r000000_c000032 on row 2 of .*"
                                        r"on_overlap=stop.*on_overlap=drop"):  # fmt: skip
        plan_of(tiles, leakage={"footprints": path, "on_overlap": "stop"})
    far = footprints(tmp_path / "far.csv", (9e6, 0))
    assert LEAK not in reasons(plan_of(tiles, leakage={"footprints": far, "on_overlap": "stop"}))


def test_duplicates_give_examples_with_their_reason():
    tiles = table({"A": (0, 0, 3, 1), "B": (0.2 * TILE_M, 0, 3, 1), "C": (900 * TILE_M, 0, 3, 1)},
                  quality=[0.9, 0.1, 0.9, 0.5, 0.5, 0.5, 0.4, 0.3, np.nan])  # fmt: skip
    tiles.phash_N[8] = tiles.phash_N[0] ^ np.uint64(5)
    tiles.phash_N[6:8] = [7, 7]
    plan = plan_of(tiles, split={"val_fraction": 0.0})
    assert reasons(plan) == ["", OVERLAP, "", OVERLAP, "", OVERLAP, "", ALIKE, ALIKE]
    found = plan.report["duplicates"]
    assert (found["overlap"], found["hash"]) == (3, 2)
    assert found["examples"] == [
        [tiles.key(1), tiles.key(4), OVERLAP, 0.8], [tiles.key(3), tiles.key(0), OVERLAP, 0.8],
        [tiles.key(5), tiles.key(2), OVERLAP, 0.8], [tiles.key(7), tiles.key(6), ALIKE, 0.0],
        [tiles.key(8), tiles.key(0), ALIKE, 2.0],
    ]  # fmt: skip
    off = plan_of(tiles, split={"val_fraction": 0.0}, **OFF)
    assert off.report["duplicates"] == {"overlap": None, "hash": None, "examples": []}


def test_examples_are_few_and_of_both_rules():
    tiles = table({"A": (0, 0, 20, 1), "B": (0, 0, 20, 1), "C": (900 * TILE_M, 0, 40, 1)})
    tiles.phash_N[40:] = 9
    examples = plan_of(tiles, split={"val_fraction": 0.0}).report["duplicates"]["examples"]
    whys = [why for _, _, why, _ in examples]
    assert whys.count(OVERLAP) == whys.count(ALIKE) == planning._EXAMPLES // 2


@pytest.fixture
def units_file(tmp_path):
    """Two units: west and east of 5.2 tiles; none from 15 on."""
    edges = [-1.0, 5.2 * TILE_M / DEGREE, 15 * TILE_M / DEGREE]
    wkts = [f"POLYGON (({a} -5, {b} -5, {b} 5, {a} 5, {a} -5))" for a, b in zip(edges[:-1], edges[1:])]  # noqa: RUF007
    return str(write_vector(tmp_path / "u.gpkg", wkts, mars_crs("geographic"), values=["west", "east"]))


def test_units_and_strata_by_split(units_file):
    tiles = table({"A": (0, 0, 20, 20)})
    settings = {"units": units_file, "column": "Unit"}
    plan = plan_of(tiles, strata=settings, **OFF)
    alive = plan.split_N >= 0
    expected = np.where(tiles.col_N // SIZE < 5, "west", np.where(tiles.col_N // SIZE < 15, "east", ""))
    assert ([plan.units[k] for k in plan.unit_N[alive]] == expected[alive]).all() and plan.units == ["", "east", "west"]
    outside = int((expected[alive] == "").sum())
    assert any(note.startswith(f"{outside} tiles lie in no polygon of") for note in plan.report["notes"])
    assert plan.report["strata"]["by"] == "unit" and plan.report["strata"]["plan"] == "all"
    drawn = plan_of(tiles, strata=settings | {"by": "unit", "plan": "uniform", "tiles": 60}, **OFF)
    assert set(reasons(drawn)) == {"", BORDER, NOT_DRAWN} and (drawn.split_N >= 0).sum() == 60
    val_share = (plan.split_N == 1).sum() / alive.sum()
    assert (drawn.split_N == 1).sum() == round(60 * val_share)
    for split in (0, 1):
        counts = [((drawn.split_N == split) & (expected == unit)).sum() for unit in ("west", "east", "")]
        assert max(counts) - min(counts) <= 1
    rows = drawn.report["strata"]["table"]
    assert [row["available"] for row in rows] == sorted((row["available"] for row in rows), reverse=True)
    for row in rows:
        assert row["available"] == (alive & (expected == row["name"])).sum()
        assert row["taken"] == row["train"] + row["val"] == ((drawn.split_N >= 0) & (expected == row["name"])).sum()
    seeds = [plan_of(tiles, strata=settings | {"by": "unit", "plan": "capped", "cap": 20, "seed": s}, **OFF).split_N
             for s in (0, 0, 1)]  # fmt: skip
    assert (seeds[0] == seeds[1]).all() and (seeds[0] != seeds[2]).any()


@pytest.mark.parametrize("by", ["latitude", "healpix"])
def test_other_strata(by):
    tiles = table({"A": (0, 0.5 * DEGREE, 4, 300)})
    settings = {"by": by, "latitude_deg": 0.5, "order": 6, "plan": "sqrt"}
    plan = plan_of(tiles, strata=settings, **OFF)
    found = plan.report["strata"]
    assert found["by"] == by and found["strata"] == len(found["table"]) > 1
    assert sum(row["taken"] for row in found["table"]) == (plan.split_N >= 0).sum() < found["table"][0]["available"] * 2
    assert any("strata.plan=sqrt without strata.tiles goes by the smallest stratum" in n for n in plan.report["notes"])


def test_many_strata_are_listed_in_part(monkeypatch):
    monkeypatch.setattr(planning, "_ROWS", 3)
    plan = plan_of(table({"A": (0, 0, 20, 20)}), strata={"by": "healpix", "order": ORDER}, **OFF)
    assert len(plan.report["strata"]["table"]) == 3
    assert any(note.startswith("report.json lists the 3 largest of") for note in plan.report["notes"])


def test_the_plan_does_not_depend_on_the_order_of_products(tmp_path, units_file):
    """Nor on names sorting otherwise than they stand."""
    scenes = {f"P{n}": (n % 4 * 3.3 * TILE_M, n // 4 * 2.7 * TILE_M, 6, 5) for n in (3, 10, 1, 7, 0, 5)} | {"raw": None}
    shuffled = {key: scenes[key] for key in sorted(scenes, reverse=True)}
    leaks = footprints(tmp_path / "f.csv", (2 * TILE_M, -TILE_M))
    settings = {"leakage": {"footprints": leaks}, "strata": {"units": units_file, "column": "Unit", "by": "unit",
                "plan": "sqrt", "tiles": 50}}  # fmt: skip
    found = []
    for order in (scenes, shuffled):
        tiles = table(order)
        place = tiles.product_N, tiles.row_N, tiles.col_N
        ids = np.array([hash_of(tiles.product_ids[p], r, c) for p, r, c in zip(*place)], dtype=np.uint64)
        tiles = dataclasses.replace(tiles, phash_N=ids // 7 * 7, quality_N=(ids % np.uint64(5)) / 5.0)
        plan = plan_of(tiles, **settings)
        rows = {tiles.key(n): (int(plan.split_N[n]), reasons(plan)[n], plan.units[plan.unit_N[n]],
                               plan.block_names([n])[0]) for n in range(len(tiles))}  # fmt: skip
        report = json.loads(json.dumps(plan.report))
        for part in ("leakage", "duplicates"):
            report[part]["examples"] = []
        found.append((rows, report))
    assert found[0] == found[1]
    assert {LEAK, BORDER, OVERLAP, NOT_DRAWN, ""} <= {row[1] for row in found[0][0].values()}


def hash_of(key, row, col):
    return sum(ord(letter) * 31**n for n, letter in enumerate(key)) * 1_000_003 + int(row) * 8191 + int(col) * 131


def test_no_tiles_and_tiles_without_a_place(tmp_path, units_file):
    path = footprints(tmp_path / "f.csv", (0, 0))
    settings = {"leakage": {"footprints": path}, "strata": {"units": units_file, "column": "Unit", "by": "unit",
                "plan": "uniform"}}  # fmt: skip
    for by in ("healpix", "product"):
        plan = plan_of(table({}), order=-1, split={"by": by}, **settings)
        assert plan.report["planning"] == {"tiles": 0, "train": 0, "val": 0, "dropped": {}}
        assert plan.block_names([]) == []
    plan = plan_of(table({"A": None, "B": None}), order=-1, **settings)
    assert set(plan.block_names(range(72))) == {f"{p}_{r}_{c}" for p in "AB" for r in (0, 1) for c in (0, 1)}
    assert plan.report["ground_check"] == {"train_tiles": 0, "val_tiles": 0, "dropped": 0}
    assert (plan.split_N >= 0).sum() == 72 and set(plan.split_N.tolist()) == {0, 1}
    for p in range(2):  # a tile's split is that of its block
        blocks = plan.block_names(range(36 * p, 36 * p + 36))
        assert len(set(zip(blocks, plan.split_N[36 * p : 36 * p + 36].tolist()))) == 4
