from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("osgeo.gdal", reason="GDAL is not installed (extra prep)")
pytest.importorskip("shapely", reason="shapely is not installed (extra prep)")
import shapely
from osgeo import gdal, ogr, osr

from momo.data_prep.footprints import read_footprints
from momo.data_prep.georeference import MARS_RADIUS_M
from momo.data_prep.overlap import overlapping_pairs, tangent_axes
from momo.data_prep.split import unit_vectors
from momo.data_prep.vectors import Frame, read_polygons
from momo.errors import DataError
from tests.data_prep.products import ELLIPSOID, SPHERE, earth_crs, mars_crs

ogr.UseExceptions()
DRIVERS = {".gpkg": "GPKG", ".geojson": "GeoJSON", ".shp": "ESRI Shapefile"}


def write_vector(path: Path, wkts, crs=None, *, values=None, column="Unit", layer="units", kind=ogr.wkbUnknown) -> Path:
    """Writes geometries, with one text column when there are values."""
    dataset = gdal.GetDriverByName(DRIVERS[path.suffix]).Create(str(path), 0, 0, 0, gdal.GDT_Unknown)
    table = dataset.CreateLayer(layer, crs, ogr.wkbPolygon if path.suffix == ".shp" else kind)
    table.CreateField(ogr.FieldDefn(column, ogr.OFTString))
    for number, wkt in enumerate(wkts):
        feature = ogr.Feature(table.GetLayerDefn())
        if values is not None and values[number] is not None:
            feature.SetField(column, values[number])
        if wkt is not None:
            feature.SetGeometry(ogr.CreateGeometryFromWkt(wkt))
        table.CreateFeature(feature)
        del feature
    del table
    dataset.FlushCache()
    del dataset
    return path


def iau(code):
    crs = osr.SpatialReference()
    crs.SetFromUserInput(f"IAU_2015:{code}")
    crs.SetAxisMappingStrategy(osr.OAMS_TRADITIONAL_GIS_ORDER)
    return crs


def table(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def local(shapes, n):
    """Vertices of a footprint in the plane at its centre, metres."""
    axes = tangent_axes(shapes.centre_N3[n : n + 1])[0]
    lonlat = shapes.vertex_V2[shapes.start_N1[n] : shapes.start_N1[n + 1]]
    xyz = unit_vectors(lonlat[:, 0], lonlat[:, 1]) @ axes.T
    return xyz[:, :2] / xyz[:, 2:] * MARS_RADIUS_M


def assert_same_ground(one, two, tolerance=1e-4):
    pairs = overlapping_pairs(one, two, 0.5)
    assert pairs.i.tolist() == pairs.j.tolist() == list(range(len(one)))
    assert pairs.share_i == pytest.approx(1.0, abs=tolerance) and pairs.share_j == pytest.approx(1.0, abs=tolerance)


def wkt_table(path, *wkts):
    return table(path, "wkt\n" + "".join(f'"{w}"\n' for w in wkts))


@pytest.mark.parametrize(("lon", "lat"), [(10, 0), (180, -45), (359.999, 60), (-0.01, 89.999), (5, -90), (-360, 10)])
def test_centres_with_sizes(tmp_path, lon, lat):
    path = table(tmp_path / "f.csv", f"lon,lat,width_m,height_m\n{lon},{lat},6000,2000\n")
    shapes, places, notes = read_footprints(path)
    assert (len(shapes), places, notes) == (1, ["row 2"], [])
    assert np.abs(local(shapes, 0)) == pytest.approx(np.tile([3000.0, 1000.0], (4, 1)), rel=1e-6)
    centre = unit_vectors(np.array([float(lon)]), np.array([float(lat)]))
    np.testing.assert_allclose(shapes.centre_N3, centre, atol=1e-9)
    north = shapes.vertex_V2[shapes.vertex_V2[:, 1].argsort()][-2:]
    if abs(lat) < 89:
        assert np.linalg.norm(np.diff(unit_vectors(*north.T), axis=0)) * MARS_RADIUS_M == pytest.approx(6000, rel=1e-3)


def test_table_with_size_m_spaces_capitals_and_empty_lines(tmp_path):
    text = "\ufeffname, Lon ,LAT,size_m\na,10,20,1000\n\n,,,\nb,-170,-20,500\n"
    shapes, places, _ = read_footprints(table(tmp_path / "f.CSV", text))
    assert places == ["row 2", "row 5"]
    assert np.abs(local(shapes, 1)) == pytest.approx(np.full((4, 2), 250.0), rel=1e-6)


def test_well_known_text(tmp_path):
    path = wkt_table(
        tmp_path / "f.csv",
        "POLYGON ((10 0, 11 0, 11 1, 10 1, 10 0), (10.25 0.25, 10.75 0.25, 10.75 0.75, 10.25 0.75, 10.25 0.25))",
        "MULTIPOLYGON (((20 0, 21 0, 21 1, 20 1, 20 0)), ((30 0, 31 0, 31 1, 30 1, 30 0)))",
        "POLYGON ((179 0, -179 0, -179 1, 179 1, 179 0))",
        "POLYGON ((359 50, 361 50, 361 51, 359 51, 359 50))",
        "POLYGON ((0 88, 90 88, 180 88, -90 88, 0 88))",
    )  # fmt: skip
    shapes, places, notes = read_footprints(path)
    assert places == ["row 2", "row 3", "row 3", "row 4", "row 5", "row 6"]
    assert len(notes) == 1 and "2 polygons have steps of over half of Mars" in notes[0]
    tiles = table(tmp_path / "t.csv", "lon,lat,size_m\n10.5,0.5,20000\n20.5,0.5,100\n30.5,.5,100\n180,.5,100\n"
                  "0,50.5,100\n45,89.9,9000\n0,0.5,100000\n-60,89,100\n25,0.5,100\n")  # fmt: skip
    pairs = overlapping_pairs(read_footprints(tiles)[0], shapes, 0.5)
    assert list(zip(pairs.i, pairs.j)) == [(1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (7, 5)], "none in the hole"


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", r"has no row: .*columns none"),
        ("lon,lat,size_m\n", r"has no row: .*columns lon, lat, size_m"),
        ("lon,lat\n1,2\n", r"lacks columns: .*columns lon, lat\. Rule: lon, lat and size_m .*docs/data_prep.md"),
        ("lon,lat,width_m\n1,2,3\n", "lacks columns"),
        ("lon;lat;size_m\n1;2;3\n", "lacks columns: .*lon;lat;size_m"),
        ("lon,lat,size_m\n1,2,3\n1,x,3\n", r"cannot be read: .*row 3: lat = 'x'"),
        ("lon,lat,size_m\n1,2\n", r"cannot be read: .*row 2: size_m = None"),
        ("lon,lat,size_m\n1,2,3\n400,2,3\n", r"out of range: .*row 3: lon 400, lat 2, 3 x 3 m"),
        ("lon,lat,size_m\n1,91,3\n", "out of range.*row 2"),
        ("lon,lat,size_m\n1,nan,3\n", "out of range.*row 2"),
        ("lon,lat,width_m,height_m\n1,2,3,0\n", "out of range.*3 x 0 m"),
        ("lon,lat,size_m\n1,2,2.3e6\n", "out of range.*at most 3161 km from corner to corner"),
        ("wkt\nPOLYGON((1 2\n", r"cannot be read: .*row 2: .*Rule: well-known text"),
        ('id,wkt\n1,"POLYGON ((10 0, 11 0, 11 1, 10 0))"\n2,\n', r"cannot be read: .*row 3"),
        ("wkt\nPOINT (1 2)\n", r"a geometry is no polygon: .*row 2 is a Point"),
        ("wkt\nPOLYGON EMPTY\n", r"is empty or has a coordinate that is no number: .*row 2"),
        ('wkt\n"POLYGON ((10 0, 11 0, nan 1, 10 0))"\n', "coordinate that is no number.*row 2|cannot be read.*row 2"),
        ('wkt\n"POLYGON ((10 0, 11 0, 11 100, 10 0))"\n', r"out of range: .*row 2: POLYGON .*lat -90..90"),
        ('wkt\n"POLYGON ((10 0, 11 0, 12 0, 10 0))"\n', "no polygon with an area"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:invalid value")
def test_bad_tables_name_the_row(tmp_path, text, match):
    with pytest.raises(DataError, match=match):
        read_footprints(table(tmp_path / "f.csv", text))


def test_tables_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match="table of footprints cannot be read: .*No such file"):
        read_footprints(str(tmp_path / "none.csv"))
    (tmp_path / "b.csv").write_bytes(b"lon,lat,size_m\n\xff\xfe\x00,1,2\n")
    with pytest.raises(DataError, match="table of footprints cannot be read: .*utf-8"):
        read_footprints(str(tmp_path / "b.csv"))


def test_large_footprints_follow_their_own_edges(tmp_path):
    """A parallel is no great circle: an edge of 20 degrees at 60 N bends by 0.4 degrees."""
    shapes, _, _ = read_footprints(wkt_table(tmp_path / "f.csv", "POLYGON ((0 60, 20 60, 20 62, 0 62, 0 60))"))
    tiles = table(tmp_path / "t.csv", "lon,lat,size_m\n10,60.1,1000\n10,59.9,1000\n10,61.9,1000\n10,62.1,1000\n")
    assert overlapping_pairs(read_footprints(tiles)[0], shapes, 0.5).i.tolist() == [0, 2]


SQUARE = [(30.0, 45.0), (30.5, 45.0), (30.5, 45.4), (30.0, 45.4), (30.0, 45.0)]


def in_crs(crs, centric):
    """A ring of planetocentric degrees, 10 steps a side, in a CRS."""
    ring = np.concatenate([np.linspace(a, b, 10, endpoint=False) for a, b in itertools.pairwise(centric)])
    x, y = Frame(crs.ExportToWkt()).from_lonlat(ring[:, 0].copy(), ring[:, 1].copy())
    return shapely.to_wkt(shapely.Polygon(np.stack([x, y], axis=1)), rounding_precision=12)


@pytest.mark.parametrize("suffix", [".gpkg", ".shp"])
@pytest.mark.parametrize("body", [SPHERE, ELLIPSOID], ids=["sphere", "ellipsoid"])
@pytest.mark.parametrize("kind", ["geographic", "equirectangular", "sinusoidal", "polar"])
def test_vector_files_in_a_mars_crs(tmp_path, suffix, body, kind):
    crs = mars_crs(kind, body)
    path = write_vector(tmp_path / f"f{suffix}", [in_crs(crs, SQUARE)], crs)
    shapes, places, notes = read_footprints(str(path))
    expected, _, _ = read_footprints(wkt_table(tmp_path / "f.csv", shapely.Polygon(SQUARE).wkt))
    assert places == ["feature 1"] and notes == []
    assert_same_ground(shapes, expected, 2e-4)


@pytest.mark.parametrize("code", [49900, 49910])
def test_geojson_in_a_mars_crs_that_has_a_code(tmp_path, code):
    path = write_vector(tmp_path / "f.geojson", [in_crs(iau(code), SQUARE)], iau(code))
    shapes, _, notes = read_footprints(str(path))
    assert notes == []
    assert_same_ground(shapes, read_footprints(wkt_table(tmp_path / "f.csv", shapely.Polygon(SQUARE).wkt))[0], 2e-4)


def test_geodetic_latitudes_are_not_planetocentric_ones(tmp_path):
    """By hand, so that nothing is checked against its own inverse: tan(centric) = (1 - f)^2 tan(geodetic)."""
    geodetic = [math.degrees(math.atan(math.tan(math.radians(b)) / (1 - 1 / ELLIPSOID[1]) ** 2)) for b in (45, 45.4)]
    assert geodetic[0] == pytest.approx(45.338, abs=1e-3)
    south, north = geodetic
    wkt = f"POLYGON ((30 {south}, 30.5 {south}, 30.5 {north}, 30 {north}, 30 {south}))"
    expected, _, _ = read_footprints(wkt_table(tmp_path / "f.csv", shapely.Polygon(SQUARE).wkt))
    path = write_vector(tmp_path / "g.gpkg", [wkt], mars_crs("geographic", ELLIPSOID))
    assert_same_ground(read_footprints(str(path))[0], expected)
    west = wkt.replace("30.5", "-30.5").replace("30 ", "-30 ").replace("--", "-")
    path = write_vector(tmp_path / "w.gpkg", [west], iau(49901))  # planetographic, west positive
    assert_same_ground(read_footprints(str(path))[0], expected)
    path = write_vector(tmp_path / "c.gpkg", [shapely.Polygon(SQUARE).wkt], iau(49902))  # planetocentric, ellipsoid
    shapes, _, notes = read_footprints(str(path))
    assert_same_ground(shapes, expected)
    assert notes == []


@pytest.mark.parametrize("suffix", [".shp", ".geojson"])
def test_formats_that_keep_only_the_name_of_a_planetocentric_crs(tmp_path, suffix):
    expected, _, _ = read_footprints(wkt_table(tmp_path / "f.csv", shapely.Polygon(SQUARE).wkt))
    shapes, _, notes = read_footprints(
        str(write_vector(tmp_path / f"c{suffix}", [shapely.Polygon(SQUARE).wkt], iau(49902)))
    )
    assert_same_ground(shapes, expected)
    assert len(notes) == 1 and "taken as planetocentric, as the name of its CRS says" in notes[0]
    _, _, notes = read_footprints(str(write_vector(tmp_path / f"g{suffix}", [shapely.Polygon(SQUARE).wkt], iau(49901))))
    assert len(notes) == 1 and "taken as east positive, though its CRS is named" in notes[0]


def test_geojson_without_a_crs_is_planetocentric_and_not_on_earth(tmp_path):
    path = write_vector(tmp_path / "f.geojson", [shapely.Polygon(SQUARE).wkt])
    shapes, _, notes = read_footprints(str(path))
    assert len(notes) == 1 and "names no CRS: taken as planetocentric degrees" in notes[0]
    assert_same_ground(shapes, read_footprints(wkt_table(tmp_path / "f.csv", shapely.Polygon(SQUARE).wkt))[0])


@pytest.mark.parametrize("suffix", [".gpkg", ".shp"])
def test_degrees_from_0_to_360_and_over_the_antimeridian(tmp_path, suffix):
    wkts = ["POLYGON ((200 10, 201 10, 201 11, 200 11, 200 10))", "POLYGON ((179 10, 181 10, 181 11, 179 11, 179 10))",
            "POLYGON ((179 30, -179 30, -179 31, 179 31, 179 30))"]  # fmt: skip
    shapes, _, _ = read_footprints(str(write_vector(tmp_path / f"f{suffix}", wkts, mars_crs("geographic"))))
    expected = wkt_table(tmp_path / "f.csv", "POLYGON ((-160 10, -159 10, -159 11, -160 11, -160 10))",
                         "POLYGON ((-181 10, -179 10, -179 11, -181 11, -181 10))",
                         "POLYGON ((179 30, 181 30, 181 31, 179 31, 179 30))")  # fmt: skip
    assert_same_ground(shapes, read_footprints(expected)[0])


def test_equirectangular_metres_over_the_antimeridian(tmp_path):
    degree = SPHERE[0] * math.pi / 180
    west, east, south, north = (a * degree for a in (179, -179, 10, 11))
    wkt = f"POLYGON (({west} {south}, {east} {south}, {east} {north}, {west} {north}, {west} {south}))"
    shapes, _, _ = read_footprints(str(write_vector(tmp_path / "f.gpkg", [wkt], mars_crs())))
    expected = wkt_table(tmp_path / "f.csv", "POLYGON ((179 10, 181 10, 181 11, 179 11, 179 10))")
    assert_same_ground(shapes, read_footprints(expected)[0])


def test_crossing_polygons_are_mended_and_those_over_the_antimeridian_first_drawn_on(tmp_path):
    bow = "POLYGON ((10 0, 11 1, 11 0, 10 1, 10 0))"
    # A notch in the south side: as the file has it, an edge of the notch lies across the whole map.
    notch = "POLYGON ((170 -5, 178 -5, 179 0, -179 0, -178 -5, -170 -5, -170 3, 170 3, 170 -5))"
    unwrapped = "POLYGON ((170 -5, 178 -5, 179 0, 181 0, 182 -5, 190 -5, 190 3, 170 3, 170 -5))"
    shapes, places, notes = read_footprints(wkt_table(tmp_path / "f.csv", bow, notch))
    assert places == ["row 2", "row 2", "row 3"]
    assert any("1 polygons cross themselves: mended" in note for note in notes) and len(notes) == 2
    expected, _, notes = read_footprints(wkt_table(tmp_path / "g.csv", unwrapped))
    assert notes == []
    assert_same_ground(shapes.take(np.array([2])), expected)


def test_polygons_without_an_area_are_left_out_and_said(tmp_path):
    path = wkt_table(tmp_path / "f.csv", "POLYGON ((0 0, 1 0, 2 0, 0 0))", "POLYGON ((0 0, 1 0, 1 1, 0 0))")
    _, places, notes = read_footprints(path)
    assert places == ["row 3"] and notes[-1:] == [f"{path}: 1 polygons have no area: left out"]


def test_parts_of_a_multi_polygon_that_overlap_stay_whole(tmp_path):
    wkt = "MULTIPOLYGON (((0 0, 2 0, 2 2, 0 2, 0 0)), ((1 1, 3 1, 3 3, 1 3, 1 1)))"
    shapes, _, _ = read_footprints(wkt_table(tmp_path / "f.csv", wkt))
    tile = table(tmp_path / "t.csv", "lon,lat,size_m\n1.5,1.5,100\n")
    assert len(overlapping_pairs(read_footprints(tile)[0], shapes, 0.5).i) == 2


def moon_crs():
    return mars_crs("geographic", (1737400.0, 0.0))


@pytest.mark.parametrize(
    ("name", "wkts", "crs", "match"),
    [
        ("f.gpkg", ["POLYGON ((0 0, 1 0, 1 1, 0 0))"], earth_crs(), r"is on Earth: .*WGS 84.*6378\.1 km.*3365 to 3405"),
        ("f.gpkg", ["POLYGON ((0 0, 1 0, 1 1, 0 0))"], moon_crs(), r"is not on Mars: .*1737\.4 km.*ogr2ogr"),
        ("f.geojson", ["POLYGON ((0 0, 1 0, 1 1, 0 0))"], earth_crs(), "is on Earth"),
        ("f.gpkg", ["POLYGON ((0 0, 999 0, 1 1, 0 0))"], None,
         r"no CRS, and its coordinates are no degrees: .* to 999"),
        ("f.gpkg", ["POLYGON ((0 0, 1 0, 1 1, 0 0))", "LINESTRING (0 0, 1 1)"], mars_crs("geographic"),
         r"is no polygon: .*feature 2 is a LineString"),
        ("f.gpkg", [], mars_crs("geographic"), "holds no polygon with an area: "),
        ("f.gpkg", [None], mars_crs("geographic"), "holds no polygon with an area: "),
        ("f.gpkg", ["POLYGON ((0 0, 1 0, 1 99, 0 0))"], mars_crs("geographic"), "leaves the map: .*feature 1"),
    ],
)  # fmt: skip
def test_bad_vector_files(tmp_path, name, wkts, crs, match):
    with pytest.raises(DataError, match=match):
        read_footprints(str(write_vector(tmp_path / name, wkts, crs)))


def test_files_that_are_no_vector_files(tmp_path):
    with pytest.raises(DataError, match="vector file does not exist: .*none.gpkg"):
        read_footprints(str(tmp_path / "none.gpkg"))
    (tmp_path / "f.gpkg").write_bytes(b"not a database")
    with pytest.raises(DataError, match="GDAL cannot open a vector file: .*ogrinfo"):
        read_footprints(str(tmp_path / "f.gpkg"))


@pytest.mark.real_data
def test_real_vector_files(real_mars, tmp_path):
    """The shore of Jezero's lake (Goudge et al. 2018), lines in degrees and in metres; landing sites are points."""
    vectors = real_mars / "labelled"
    sites = vectors / "vector_usgs" / "SIM3292_Global_Landing_sites.shp"
    with pytest.raises(DataError, match="feature 1 is a MultiPoint"):
        read_polygons(str(sites))
    found = []
    for folder in ("geographic-coordinates", "projected-coordinates"):
        lines = vectors / "vector_jezero" / folder / "Goudge_et_al_2018_Jezero_Pre_Breach_Lake_Outline.shp"
        with pytest.raises(DataError, match="feature 1 is a MultiLineString"):
            read_footprints(str(lines))
        dataset = gdal.OpenEx(str(lines), gdal.OF_VECTOR)
        layer = dataset.GetLayer(0)
        feature, crs = layer.GetNextFeature(), layer.GetSpatialRef().Clone()
        line = shapely.from_wkb(bytes(feature.GetGeometryRef().ExportToWkb()))
        del feature, layer, dataset
        lake = shapely.convex_hull(line)
        found.append(read_footprints(str(write_vector(tmp_path / f"{folder}.gpkg", [lake.wkt], crs)))[0])
    area = [shapely.Polygon(local(shapes, 0)).area / 1e6 for shapes in found]
    pairs = overlapping_pairs(found[0], found[1], 0.5)
    assert area == pytest.approx([1500.0, 1500.0], rel=0.1)  # km2
    assert pairs.share_i.max() > 0.99 and pairs.share_j.max() > 0.99
