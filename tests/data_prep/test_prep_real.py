"""Real products through the whole stage."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from momo.config import load_config
from momo.corpus import Corpus
from momo.data_prep import PrepConfig, prep
from momo.data_prep.sources import RASTER_SUFFIXES
from momo.errors import DataError
from tests.data_prep.prep_helper import config_of, index, products_of, run


@pytest.mark.real_data
def test_every_real_file_becomes_tiles_or_a_stated_reason(real_mars, tmp_path):
    """Each file under a sensor that fits its label, whatever it shows: what counts is that none is lost."""
    lines: list[str] = []
    # Pieces do not depend on the sensor, so the second and third corpus use those of the first.
    work = {"work": str(tmp_path / "work"), "workers": 2, "on_error": "skip"}
    settings = work | {"tile_size": 64, "quality": {"min_valid": 0.1}}
    accounted: set[str] = set()
    tile_count = 0
    for sensor in ("CTX", "HiRISE", "THEMIS"):
        config = config_of(str(real_mars), tmp_path / sensor, **settings, sensor=sensor)
        result = prep(config, report=lines.append)
        corpus = Corpus(result.path, verify=True)
        of_another = {f["source"] for f in result.failures if f["reason"].startswith("a product is of another sensor")}
        assert all(item["reason"] for item in result.failures)
        accounted |= {item["source"] for item in result.failures} - of_another
        accounted |= {entry["source"] for entry in products_of(corpus)}
        tile_count += sum(corpus.manifest.splits.values())
    same = " has the same bytes as "
    accounted |= {line.split(same)[0].strip() for line in lines if same in line}
    with open(real_mars / "MANIFEST.csv", newline="") as stream:
        names = {Path(row["path"]).name for row in csv.DictReader(stream)}
    rasters = {name for name in names if Path(name).suffix.lower() in RASTER_SUFFIXES}
    described = {"megt90n000cb.img", "CAS-M01-2018-05-05T23.11.48.767-RED-01029-B1.img"}
    labels = {name for name in rasters if name.endswith(".xml")}
    assert rasters - accounted - described <= labels, rasters - accounted - described
    assert tile_count > 3_000


@pytest.mark.real_data
@pytest.mark.parametrize("sensor", ["hirise", "ctx", "themis"])
def test_real_products_become_corpora(real_mars, tmp_path, monkeypatch, sensor):
    monkeypatch.setenv("MOMO_REAL_DATA", str(real_mars))
    recipe = Path(__file__).resolve().parents[2] / "configs" / "real" / f"prep_{sensor}.yaml"
    lines: list[str] = []
    config = load_config(PrepConfig, recipe, [f"out={tmp_path}/out", "workers=2"])
    corpus = Corpus(prep(config, report=lines.append).path, verify=True)
    assert corpus.count("train") > 1000 and corpus.count("val") > 50
    scores = np.array([row["quality"] for row in index(corpus)])
    assert (scores > 0.5).mean() > 0.3
    text = "\n".join(lines)
    if sensor == "hirise":
        assert "each line has 18 + 16 extra bytes, not all skipped by GDAL" in text
        located = [row for row in index(corpus) if row["product_id"] == "PSP_001892_1715_COLOR_crop"]
        assert all(abs(row["lat"] + 8.25) < 0.1 and row["gsd_m"] == pytest.approx(0.25) for row in located)
        # The last four digits of a HiRISE id are ten times the latitude plus 180, to half a degree.
        for row in index(corpus):
            if row["cell"] >= 0 and row["product_id"].split("_")[0] in ("ESP", "PSP"):
                assert row["lat"] == pytest.approx(int(row["product_id"].split("_")[2]) / 10 - 180, abs=0.75)


@pytest.mark.real_data
def test_real_products_that_cannot_be_used_are_named(real_mars, tmp_path):
    with open(real_mars / "MANIFEST.csv", newline="") as stream:
        sizes = {row["path"]: (row["width"], row["height"]) for row in csv.DictReader(stream)}
    null = "raw/hirise/ESP_042252_1930_3-BAND_COLOR_50cm_o_cropped.cub"
    assert sizes[null] == ("40", "50")
    with pytest.raises(DataError, match="the product has no valid pixel"):
        run(str(real_mars / null), tmp_path / "a", sensor="HiRISE")
    with pytest.raises(DataError, match=r"the product's CRS cannot be used: .*k_0"):
        run(str(real_mars / "raw/other/Mars_MGS_MOLA_ClrShade_MAP2_90.0N0.0_POLA.tif"), tmp_path / "b")
    with pytest.raises(DataError, match=r"GDAL cannot open the product: .*give the label"):
        run(str(real_mars / "raw/other/megt90n000cb.img"), tmp_path / "c")
