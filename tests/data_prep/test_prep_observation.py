"""Time, light and GSD from labels, in the units and spellings that producers use."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from osgeo import gdal

from momo.data_prep.observation import Observation, read_observation
from momo.errors import DataError
from tests.data_prep.products import terrain, write_raster

GEOM = 'xmlns:geom="http://pds.nasa.gov/pds4/geom/v1" xmlns:cart="http://pds.nasa.gov/pds4/cart/v1"'


class Labelled:
    """Stands for a GDAL dataset with one metadata domain."""

    def __init__(self, domain, text):
        self.domain, self.text = domain, text

    def GetMetadataDomainList(self):
        return ["", self.domain]

    def GetMetadata_List(self, domain):
        assert domain == self.domain
        return [self.text]


def read(label, domain="json:PDS"):
    return read_observation(Labelled(domain, label if isinstance(label, (str, bytes)) else json.dumps(label)))


def pds3(tmp_path, *lines, encoding="utf-8"):
    """Reads a PDS3 image with these label lines through GDAL."""
    path = tmp_path / "i.img"
    start = 4096
    text = "\r\n".join([
        "PDS_VERSION_ID = PDS3", "RECORD_TYPE = UNDEFINED", f"^IMAGE = {start + 1} <BYTES>", *lines,
        "OBJECT = IMAGE", "LINES = 4", "LINE_SAMPLES = 4", "SAMPLE_BITS = 8", "SAMPLE_TYPE = MSB_UNSIGNED_INTEGER",
        "END_OBJECT = IMAGE", "END", "",
    ])  # fmt: skip
    path.write_bytes(text.encode(encoding).ljust(start) + bytes(16))
    return read_observation(gdal.Open(str(path)))


def pds4(tmp_path, inside, prolog="", time="2018-05-05T23:11:48.767Z"):
    """Reads a PDS4 image with these elements in its Discipline_Area through GDAL."""
    path = write_raster(tmp_path / "p.xml", (terrain(8, 8) * 255).astype(np.uint8), driver="PDS4")
    text = path.read_text()
    area = (
        f"<Observation_Area><Time_Coordinates><start_date_time>{time}</start_date_time></Time_Coordinates>"
        f"<Discipline_Area {GEOM}>{inside}</Discipline_Area></Observation_Area>"
    )
    head, _, rest = text.partition("<Observation_Area>")
    text = head + area + rest.partition("</Observation_Area>")[2]
    path.write_text(text.replace("<Product_Observational", f"{prolog}<Product_Observational", 1))
    return read_observation(gdal.Open(str(path)))


def same(observation, **expected):
    for name, value in (vars(Observation()) | expected).items():
        got = getattr(observation, name)
        assert got == value or got == pytest.approx(value, nan_ok=True), name


# Times


@pytest.mark.parametrize("label, iso", [
    ("2006-11-08T04:49:14.187", "2006-11-08T04:49:14.187Z"), ("2006-11-08T04:49:14Z", "2006-11-08T04:49:14Z"),
    ("2007-123T01:02:03.5", "2007-05-03T01:02:03.5Z"), ("2008-366T23:59:60", "2008-12-31T23:59:60Z"),
    ("2007-123", "2007-05-03"), ("2007-05-03", "2007-05-03"), ("2007-05", "2007-05"), (2007, "2007"),
    ("2005-08-22T17:44:2", "2005-08-22T17:44:02Z"), ("2005-8-2T7:04", "2005-08-02T07:04:00Z"),
    ('"2006-11-08T04:49:14"', "2006-11-08T04:49:14Z"), (["2006-11-08T04:49:14", "2006-11-09"], "2006-11-08T04:49:14Z"),
    ("UNK", ""), ("N/A", ""), ("NULL", ""), ("", ""), (None, ""), ([], ""), ("2007-366T00:00:00", ""), ("2007-000", ""),
    ("2007-13-01", ""), ("2007-02-30", ""), ("2007-05-03T24:00:01", ""), ("2007-05-03T01:60", ""), ("0000-01-01", ""),
    ("9999-366", ""), ("2007-05T01:02", ""), ("yesterday", ""), ({"value": "2007-05-03"}, "2007-05-03"), (-1, ""),
])  # fmt: skip
def test_times_become_iso_8601(label, iso):
    same(read({"START_TIME": label}), acquired=iso)


def test_start_time_is_found_in_groups_and_before_other_times(tmp_path):
    lines = (
        "GROUP = TIME_PARAMETERS", "  MRO:OBSERVATION_START_TIME = 2006-11-08T04:49:13.821",
        "  START_TIME = 2006-312T04:49:14.187", "  STOP_TIME = 2006-11-08T04:49:17.990",
        "  PRODUCT_CREATION_TIME = 2006-11-08T10:18:26", "END_GROUP = TIME_PARAMETERS",
    )  # fmt: skip
    same(pds3(tmp_path, *lines), acquired="2006-11-08T04:49:14.187Z")
    same(pds3(tmp_path, 'START_TIME = "UNK"', "IMAGE_TIME = 1977-01-02T03:04:05"), acquired="1977-01-02T03:04:05Z")
    same(pds3(tmp_path, 'START_TIME = "UNK"', "PRODUCT_CREATION_TIME = 1977-01-02T03:04:05"))


# Angles


def test_viewing_parameters_of_a_pds3_label(tmp_path):
    lines = (
        "GROUP = VIEWING_PARAMETERS", "  INCIDENCE_ANGLE = 51.25 <DEG>", "  EMISSION_ANGLE = 3.5 <DEG>",
        "  PHASE_ANGLE = 48.0 <DEG>", "  SOLAR_LONGITUDE = 132.3 <DEG>", "  SUB_SOLAR_AZIMUTH = 211.5 <DEG>",
        "  NORTH_AZIMUTH = 97.0 <DEG>", "END_GROUP = VIEWING_PARAMETERS",
    )  # fmt: skip
    expected = {"incidence_deg": 51.25, "emission_deg": 3.5, "phase_deg": 48.0, "sub_solar_azimuth_deg": 211.5}
    same(pds3(tmp_path, *lines), **expected)
    same(pds3(tmp_path, *(line.replace(" <DEG>", "") for line in lines)), **expected)


@pytest.mark.parametrize("text, degrees", [
    ("51.2<DEG>", 51.2), ('51.2 <"DEGREES">', 51.2), ('"51.2"', 51.2), ("0.5 <rad>", math.degrees(0.5)),
    ("0.5<RADIANS>", math.degrees(0.5)), ("500 <mrad>", math.degrees(0.5)), ("1800 <arcmin>", 30.0), ("(51.2)", 51.2),
    ("(51.2 <DEG>)", 51.2), ("(51.2, 53.0)", math.nan), ("(51.2, 53.0) <DEG>", math.nan), ("-9998", math.nan),
    ("-9999.99 <DEG>", math.nan), ("180.5", math.nan), ("NULL", math.nan), ('"N/A"', math.nan), ("NAN", math.nan),
    ("1.0E+400", math.nan), ("51.2 <KM>", math.nan), ("1" + "0" * 400, math.nan), ("0", 0.0), ("180.0", 180.0),
])  # fmt: skip
def test_units_flags_and_lists_of_angles(tmp_path, text, degrees):
    same(pds3(tmp_path, f"INCIDENCE_ANGLE = {text}"), incidence_deg=degrees)


@pytest.mark.parametrize(
    "text, degrees", [(-90, 270.0), (360, 360.0), (-181, math.nan), (361, math.nan), (True, math.nan)]
)
def test_azimuth_may_be_counted_from_minus_180(text, degrees):
    same(read({"SUB_SOLAR_AZIMUTH": text}), sub_solar_azimuth_deg=degrees)


def test_unusable_value_gives_way_to_a_usable_one():
    same(read({"PHASE": "MAPPING", "GROUP": {"PHASE_ANGLE": -9998, "IN": {"PHASE_ANGLE": 12}}}), phase_deg=12.0)


def test_isis_camera_information_in_any_group():
    cube = {
        "IsisCube": {"Instrument": {"StartTime": "2006-11-19T06:16:39.003"}, "Mapping": {"Scale": 59.27}},
        "Caminfo": {"Geometry": {
            "IncidenceAngle": {"value": 60.5, "unit": "degrees"}, "EmissionAngle": 1.0, "PhaseAngle": 61.0,
            "SubSolarAzimuth": 16.7, "SampleResolution": 5.0, "LineResolution": {"value": 20.0, "unit": "meters/pixel"},
        }},
        "Table_X": {"StartTime": "1999-01-01", "PixelResolution": 1.0},
        "NaifKeywords": {"PixelResolution": 2.0},
    }  # fmt: skip
    same(
        read(cube, "json:ISIS3"), acquired="2006-11-19T06:16:39.003Z", incidence_deg=60.5, emission_deg=1.0,
        phase_deg=61.0, sub_solar_azimuth_deg=16.7, gsd_m=10.0,
    )  # fmt: skip


def test_vicar_properties():
    label = {"NL": 3, "PROPERTY": {"MAP": {"MAP_SCALE": 0.05, "A_AXIS_RADIUS": 3396.19},
                                   "M94_ORBIT": {"START_TIME": "2004-01-09T13:26:14.567Z"}}}  # fmt: skip
    same(read(label, "json:VICAR"), acquired="2004-01-09T13:26:14.567Z", gsd_m=50.0)


# GSD


@pytest.mark.parametrize("text, metres", [
    ("14.818 <KM/PIXEL>", 14818.0), ("0.25 <METERS/PIXEL>", 0.25), ("0.25 <M/PIX>", 0.25), ("0.00025<km/pixel>", 0.25),
    ("25 <cm/pixel>", 0.25), ("0.25 <METERS PER PIXEL>", math.nan), ("5 <m>", 5.0), ("1.85", 1850.0), ("0", math.nan),
    ("-5 <m>", math.nan), ("256 <PIXEL/DEGREE>", math.nan), ("0.01 <DEG/PIXEL>", math.nan), ("5 <m/s>", math.nan),
    ('"N/A"', math.nan), ("UNK", math.nan),
])  # fmt: skip
def test_map_scale_units(tmp_path, text, metres):
    lines = ("OBJECT = IMAGE_MAP_PROJECTION", f"  MAP_SCALE = {text}", "END_OBJECT = IMAGE_MAP_PROJECTION")
    same(pds3(tmp_path, *lines), gsd_m=metres)


@pytest.mark.parametrize("radius, scale, resolution, metres", [
    (3393.4, 1.850813, 32.0, 1850.813), (3396.19, 0.25, 237097.24, 0.25), (3396190.0, 0.25, 237097.24, 0.25),
    (3396.19, 0.25, 237.09724, 250.0), ("N/A", 0.25, 237097.24, 250.0), (3396.19, 0.25, "N/A", 250.0),
    (3396.19, 0.25, 0.0, 250.0), ({"value": 3396.19, "unit": "KM"}, 0.25, {"value": 237097.0, "unit": "PIX/DEG"}, 0.25),
])  # fmt: skip
def test_resolution_tells_the_unit_of_a_bare_map_scale(radius, scale, resolution, metres):
    label = {"IMAGE_MAP_PROJECTION": {"A_AXIS_RADIUS": radius, "MAP_SCALE": scale, "MAP_RESOLUTION": resolution}}
    same(read(label), gsd_m=metres)


def test_pixel_scales_of_unprojected_images():
    metre = {"value": 2.0, "unit": "M"}
    same(read({"HORIZONTAL_PIXEL_SCALE": metre}), gsd_m=2.0)
    same(read({"HORIZONTAL_PIXEL_SCALE": "2 <METERS PER PIXEL>"}), gsd_m=2.0)
    same(read({"HORIZONTAL_PIXEL_SCALE": metre, "VERTICAL_PIXEL_SCALE": {"value": 8, "unit": "m/pixel"}}), gsd_m=4.0)
    same(read({"HORIZONTAL_PIXEL_SCALE": metre, "PIXEL_ASPECT_RATIO": 4.0}), gsd_m=4.0)
    same(read({"HORIZONTAL_PIXEL_SCALE": metre, "PIXEL_ASPECT_RATIO": "UNK"}), gsd_m=2.0)
    same(read({"HORIZONTAL_PIXEL_SCALE": 2.0}))  # metres or kilometres: nobody knows
    same(read({"MAP": {"MAP_SCALE": "UNK"}, "SCALED_PIXEL_WIDTH": metre}), gsd_m=2.0)


# PDS4


def test_pds4_geometry_of_the_image_centre(tmp_path):
    def illumination(place, angle):
        return (
            f"<geom:Illumination_Specific><geom:reference_pixel_location>{place}</geom:reference_pixel_location>"
            f'<geom:incidence_angle unit="deg">{angle}</geom:incidence_angle>'
            f'<geom:emission_angle unit="rad">0.1</geom:emission_angle></geom:Illumination_Specific>'
        )

    observation = pds4(
        tmp_path,
        "<geom:Geometry><geom:Geometry_Orbiter><geom:Surface_Geometry><geom:Surface_Geometry_Specific>"
        '<geom:subsolar_azimuth unit="deg">75.5</geom:subsolar_azimuth></geom:Surface_Geometry_Specific>'
        "</geom:Surface_Geometry><geom:Illumination_Geometry>"
        + illumination("Upper Left Corner", 40) + illumination("Center", 41) + illumination("Center", 42)
        + '<geom:phase_angle xsi:nil="true" nilReason="unknown" xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance"/>'
        "</geom:Illumination_Geometry></geom:Geometry_Orbiter></geom:Geometry>",
    )  # fmt: skip
    same(
        observation, acquired="2018-05-05T23:11:48.767Z", incidence_deg=41.0, emission_deg=math.degrees(0.1),
        sub_solar_azimuth_deg=75.5,
    )  # fmt: skip


@pytest.mark.parametrize("inside, metres", [
    ('<cart:pixel_resolution_x unit="m/pixel">4</cart:pixel_resolution_x>', 4.0),
    ('<cart:pixel_resolution_x unit="km/pixel">4</cart:pixel_resolution_x>'
     '<cart:pixel_resolution_y unit="km/pixel">9</cart:pixel_resolution_y>', 6000.0),
    ('<cart:pixel_resolution_x unit="deg/pixel">0.003</cart:pixel_resolution_x>'
     '<cart:pixel_scale_x unit="m/pixel">99.5</cart:pixel_scale_x>', 99.5),
    ('<cart:pixel_resolution_x unit="deg/pixel">0.003</cart:pixel_resolution_x>'
     '<cart:pixel_scale_x unit="pixel/deg">333</cart:pixel_scale_x>', math.nan),
    ('<geom:horizontal_pixel_footprint unit="m">4.5</geom:horizontal_pixel_footprint>', 4.5),
    ("<cart:pixel_resolution_x>4</cart:pixel_resolution_x>", math.nan),
])  # fmt: skip
def test_pds4_pixel_sizes(tmp_path, inside, metres):
    inside = f"<cart:Coordinate_Representation>{inside}</cart:Coordinate_Representation>"
    same(pds4(tmp_path, inside), acquired="2018-05-05T23:11:48.767Z", gsd_m=metres)


def test_document_type_is_refused(tmp_path):
    bomb = '<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;">]>'
    with pytest.raises(DataError, match=r"declares a document type: <!DOCTYPE x.*Rule: .*entities.*Next: remove"):
        pds4(tmp_path, "", prolog=bomb)


@pytest.mark.parametrize("domain, text", [("xml:PDS4", "<a><b></a>"), ("json:PDS", "{"), ("json:PDS", "[" * 100_000)])
def test_damaged_label_is_an_error(domain, text):
    with pytest.raises(DataError, match=r"a label is damaged: .*Next: fetch"):
        read(text, domain)


def test_label_that_is_not_utf_8(tmp_path):
    lines = ('NOTE = "café"', "START_TIME = 2007-123T01:02:03")
    same(pds3(tmp_path, *lines, encoding="latin-1"), acquired="2007-05-03T01:02:03Z")
    xml = '<?xml version="1.0" encoding="ISO-8859-1"?><a><t>é</t><start_date_time>2007-05-03</start_date_time></a>'
    same(read(xml.encode("latin-1"), "xml:PDS4"), acquired="2007-05-03")


def test_unlabelled_file_says_nothing(tmp_path):
    path = write_raster(tmp_path / "t.tif", (terrain(8, 8) * 255).astype(np.uint8))
    same(read_observation(gdal.Open(str(path))))


@pytest.mark.real_data
@pytest.mark.parametrize("name, acquired, gsd_m", [
    ("ctx/P01_001473_2479_XI_67N185W.ctxTestImage.cub", "2006-11-19T06:16:39.003Z", math.nan),
    ("hirise/ESP_031022_1415_RED1.34517_37165.boulder_shift.after.cub", "2013-03-09T17:59:14.802Z", 0.25256115148608),
    ("hirise/PSP_001331_2260_IR10_1.IMG", "2006-11-08T04:49:14.187Z", math.nan),
    ("hirise/PSP_002118_1510_25cm_o_forPDS_cropped.cub", "", 0.2516580211094),
    ("hirise/cog_hirise_mars.tif", "", math.nan),
    ("other/CAS-MCO-2016-11-26T22.50.30.181-RED-01012-B1_rdrgen.xml", "2018-05-05T23:11:48.767Z", math.nan),
    ("other/Mars_viking.pds.gz", "", 1850.813), ("other/Mexpress_vicar.img.gz", "2004-01-09T13:26:14.567Z", 50.0),
    ("other/megt90n000cb.lbl", "1997-09-15T19:10:00.000Z", 14818.0),
    ("themis/V00821003RDR_cropped.QUB", "2002-02-20T03:14:02.471000Z", math.nan),
])  # fmt: skip
def test_real_labels(real_mars, name, acquired, gsd_m):
    path = real_mars / "raw" / name
    observation = read_observation(gdal.Open(f"/vsigzip/{path}" if path.suffix == ".gz" else str(path)))
    same(observation, acquired=acquired, gsd_m=gsd_m)
