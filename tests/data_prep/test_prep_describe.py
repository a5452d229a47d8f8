from __future__ import annotations

import io
import json
import math
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import yaml
from PIL import Image

from momo.corpus import Corpus
from momo.data_prep import describe_figures, describe_numbers
from momo.data_prep.contact_sheet import NOT_MEASURED
from momo.data_prep.describe_figures import drop_figure, gsd_figure, product_figure, unit_figure
from momo.data_prep.describe_mosaic import Shown, mosaic, sample_tiles
from momo.data_prep.describe_numbers import Measure, Tables, diversity, read_tables, sample_positions, sample_tones
from momo.data_prep.describe_page import Card, Section, Table, markdown_code, render_html, render_markdown
from momo.data_prep.describe_sources import Products, decimal_year, read_left_out, read_products
from momo.data_prep.describing import DescribeConfig, describe
from momo.errors import ConfigError, DataError
from tests.conftest import write_corpus
from tests.data_prep.prep_helper import LOCATED, ground, index, products_of, run
from tests.data_prep.prep_helper import tiles as all_tiles
from tests.data_prep.products import write_raster


@pytest.fixture(scope="module", autouse=True)
def small_figures():
    """Coarse plots: the same code in a third of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(describe_figures, "DPI", 40)
        yield


@pytest.fixture(scope="module")
def located(tmp_path_factory):
    """Two products, one with a black half and a failure beside it; strata by latitude."""
    folder = tmp_path_factory.mktemp("located")
    image = ground()
    image[:64, :64] = 0
    write_raster(folder / "in" / "a.tif", image, nodata=0, **LOCATED)
    north = {**LOCATED, "transform": (0.0, 10.0, 0.0, 400_000.0, 0.0, -10.0)}
    write_raster(folder / "in" / "b.tif", ground(seed=3), **north)
    write_raster(folder / "in" / "small.tif", ground(16, 16), **LOCATED)
    run(str(folder / "in"), folder / "corpus", on_error="skip", licence="CC0-1.0",
        strata={"by": "latitude", "plan": "capped", "cap": 10}, duplicates={"max_distance": 0})  # fmt: skip
    return folder / "corpus"


def described(corpus, out, **settings):
    lines: list[str] = []
    folder = describe(DescribeConfig(corpus=str(corpus), out=str(out), **settings), report=lines.append)
    return folder, lines


@pytest.fixture(scope="module")
def card(located, tmp_path_factory):
    return described(located, tmp_path_factory.mktemp("card") / "card")


def numbers_of(folder):
    return json.loads((folder / "card.json").read_text())


def with_index(corpus, out, **columns):
    """Copies a corpus and gives index.parquet other columns."""
    shutil.copytree(corpus, out)
    table = parquet.read_table(out / "index.parquet")
    for name, values in columns.items():
        table = table.set_column(table.schema.get_field_index(name), table.schema.field(name),
                                 pa.array(values, table.schema.field(name).type))  # fmt: skip
    parquet.write_table(table, out / "index.parquet")
    return out


def test_numbers_of_the_card_are_those_of_the_corpus(located, card):
    folder, _ = card
    found, rows, corpus = numbers_of(folder), index(Corpus(located)), Corpus(located)
    assert found["tiles"] == len(rows) and found["splits"] == corpus.manifest.splits
    assert found["located"] == len(rows) and found["products"] == 2 and found["failures"] == 1
    assert found["gsd_m"] == [{"gsd_m": 10.0, "tiles": len(rows)}]
    south, north = (sum((row["lat"] > 0) == up for row in rows) for up in (False, True))
    assert found["latitude_bands"] == [
        {"from": -10.0, "to": 0.0, "tiles": south}, {"from": 0.0, "to": 10.0, "tiles": north},
    ]  # fmt: skip
    for name, mean in found["measures"].items():
        assert mean == pytest.approx(np.mean([row[name] for row in rows])), name
    assert found["mean"] == corpus.stats["mean"] and found["std"] == corpus.stats["std"]
    counts = np.unique([row["cell"] for row in rows], return_counts=True)[1]
    share = counts / counts.sum()
    cells = next(value for name, value in found["diversity"].items() if name.startswith("HEALPix"))
    assert cells["present"] == len(counts)
    assert cells["effective"] == pytest.approx(math.exp(-(share * np.log(share)).sum()))
    tiles = [tile.value_HW[tile.valid_HW].astype(float) for tile in all_tiles(corpus)]
    between, within = np.var([tile.mean() for tile in tiles]), np.mean([tile.var() for tile in tiles])
    assert found["tonal_diversity"]["variance_between_tiles"] == pytest.approx(between / (between + within))


def test_windows_left_out_add_up(located, card):
    found = numbers_of(card[0])
    left = {entry["reason"]: entry["windows"] for entry in found["left_out"]}
    assert left["too few valid pixels"] == 4 and left["not drawn by the sampling plan"] > 0
    assert found["windows"] == 40 == found["tiles"] + sum(left.values())


def test_page_needs_nothing_beside_it_and_shows_every_part(card):
    page = (card[0] / "index.html").read_text()
    assert (
        "http://" not in page
        and "https://" not in page
        and "<script" not in page
        and '<link rel="stylesheet' not in page
    )
    for part in ("examples", "tiles", "map", "values", "quality", "diversity", "left-out", "sources", "made"):
        assert f'<section id="{part}">' in page and f'href="#{part}"' in page
    for text in ("Tiles by latitude band", "too few valid pixels", "Sampling plan capped over 2 strata by latitude",
                 "Duplicates removed by overlap on the ground: not looked for", "Ground check", "Contact sheet",
                 "small.tif", "smaller than a tile", "CC0-1.0", "effective number", "HEALPix cells of order",
                 "Configuration of momo prep", "tile_size: 32", "prefers-color-scheme: dark"):  # fmt: skip
        assert text in page, text
    shown = page.count('alt="Tile ')
    assert shown == numbers_of(card[0])["tiles"] and "Synthetic" not in page


def test_markdown_has_front_matter_and_its_figures(card):
    folder, _ = card
    text = (folder / "card.md").read_text()
    _, front, body = text.split("---\n", 2)
    fields = yaml.safe_load(front)
    assert fields["license"] == "cc0-1.0" and fields["size_categories"] == ["n<1K"]
    assert fields["momo"]["tiles"] == numbers_of(folder)["tiles"] and "mars" in fields["tags"]
    linked = {part.split(")")[0] for part in body.split("](figures/")[1:]}
    assert linked == {file.name for file in (folder / "figures").iterdir()}
    for name in linked:
        with Image.open(folder / "figures" / name) as image:
            image.load()
    assert "| train |" in body and "\n\n\n" not in text


def test_summary_is_short_and_names_the_page(located, card):
    folder, lines = card
    text = "\n".join(lines)
    assert len(lines) <= 40 and lines[0] == f"data card of {located}" and lines[-1] == f"-> {folder / 'index.html'}"
    found = numbers_of(folder)
    assert f"train {found['splits']['train']}" in text and "10 m" in text and "4 too few valid pixels" in text
    assert "+0 to +10" in text and "effective of 2 products" in text and "1 sources gave no tile" not in text
    assert "1 source gave no tile: small.tif" in text


def test_summary_stays_short_with_everything_in_it(located, tmp_path):
    count = len(index(Corpus(located)))
    lat = np.linspace(-89.9, 89.9, count)
    units = [f"unit {number}" for number in range(count)]
    corpus = with_index(located, tmp_path / "c", lat=lat, unit=units, gsd_m=np.arange(1.0, count + 1))
    _, lines = described(corpus, tmp_path / "card")
    assert 30 < len(lines) <= 40 and f"and {count - 6} more" in "\n".join(lines)


def test_same_corpus_gives_the_same_bytes_and_another_seed_other_tiles(located, card, tmp_path):
    again, _ = described(located, tmp_path / "again")
    files = sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    assert len(files) > 8 and all((again / name).read_bytes() == (card[0] / name).read_bytes() for name in files)
    corpus = Corpus(located)
    assert sample_positions(corpus, 0, 9) == sample_positions(corpus, 0, 9) != sample_positions(corpus, 1, 9)
    assert len(set(sample_positions(corpus, 0, 10**6))) == len(index(corpus))


def test_corpus_without_places_units_or_report_says_so(tmp_path):
    corpus = write_corpus(tmp_path / "plain")
    folder, lines = described(corpus, tmp_path / "card")
    page, found = (folder / "index.html").read_text(), numbers_of(folder)
    for text in ("No unit is known of any tile", "No tile has a place on Mars", "The corpus has no report.json",
                 "The corpus has no contact sheet", "Synthetic data", "These tiles were generated"):  # fmt: skip
        assert text in page, text
    assert found["located"] == 0 and found["left_out"] is None and found["diversity"]["geologic units"] is None
    assert "units      unknown" in "\n".join(lines) and "SYNTHETIC" in lines[1]
    assert not (folder / "figures" / "map.png").exists()


def test_card_lies_beside_the_corpus_by_default_and_an_earlier_one_is_replaced(tmp_path, monkeypatch):
    corpus = write_corpus(tmp_path / "ctx")
    (tmp_path / "ctx-card" / "figures").mkdir(parents=True)
    (tmp_path / "ctx-card" / "figures" / "old.png").write_bytes(b"")
    (tmp_path / "ctx-card" / "card.json").write_text(json.dumps({"format": "momo-data-card", "old": True}))
    monkeypatch.chdir(corpus)
    assert describe(DescribeConfig(corpus="."), report=lambda _: None) == tmp_path / "ctx-card"
    assert numbers_of(tmp_path / "ctx-card")["tiles"] == 32
    assert not (tmp_path / "ctx-card" / "figures" / "old.png").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ctx", "ctx-card"]


@pytest.mark.parametrize(
    ("content", "message"),
    [({}, "no data card"), ({"card.json": "{}"}, "no data card"), ({"card.json": "[1"}, "no data card"),
     ({"card.json": '{"format": "momo-data-card"}', "mine.txt": "x"}, "holds other files: mine.txt")],
)  # fmt: skip
def test_a_folder_that_is_no_card_stays_as_it_is(tmp_path, content, message):
    corpus, out = write_corpus(tmp_path / "ctx"), tmp_path / "out"
    out.mkdir()
    for name, text in content.items():
        (out / name).write_text(text)
    with pytest.raises(DataError, match=message):
        described(corpus, out)
    assert {path.name: path.read_text() for path in out.iterdir()} == content


def test_a_file_or_the_corpus_itself_is_never_replaced(tmp_path):
    corpus = write_corpus(tmp_path / "ctx")
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for out in (corpus, tmp_path / "file", tmp_path / "link"):
        with pytest.raises(DataError, match=r"the output exists and is no data card: .*Next: choose another"):
            described(corpus, out)
    assert Corpus(corpus, verify=True).count("train") == 24


def test_bad_input_is_named(located, tmp_path):
    with pytest.raises(ConfigError, match="seed is out of range: -1"):
        DescribeConfig(corpus="x", seed=-1)
    with pytest.raises(DataError, match="this is no corpus"):
        described(tmp_path / "none", tmp_path / "card")
    copy = tmp_path / "copy"
    shutil.copytree(located, copy)
    table = parquet.read_table(copy / "index.parquet")
    parquet.write_table(table.drop_columns(["noise", "unit"]), copy / "index.parquet")
    with pytest.raises(DataError, match="the index lacks columns: unit, noise"):
        described(copy, tmp_path / "card")
    parquet.write_table(table.slice(1), copy / "index.parquet")
    with pytest.raises(DataError, match="manifest and index disagree"):
        described(copy, tmp_path / "card")
    (copy / "index.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="the index cannot be read"):
        described(copy, tmp_path / "card")
    assert not (tmp_path / "card").exists()


@pytest.mark.parametrize(
    "text",
    ["[]", "{", '{"cutting": 3}', '{"cutting": {"dropped": {"a": "x"}}}', '{"strata": {"plan": "all"}}',
     '{"failures": [1]}', '{"split": 1}', '{"split": {"order": "x"}}', '{"duplicates": {"overlap": "x", "hash": 0}}',
     '{"duplicates": {"overlap": 1}}'],
)  # fmt: skip
def test_bad_report_is_named(tmp_path, text):
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(DataError, match=r"report.json cannot be read: .*Rule: a JSON object as momo prep writes it"):
        read_left_out(tmp_path)


@pytest.mark.parametrize(
    "stats",
    [{}, {"mean": 1.0, "std": 1.0, "percentiles": {"1": 2.0}}, {"mean": 1.0, "std": 1.0, "percentiles": {"1": None}},
     {"mean": 1.0, "std": None, "min": 1, "max": 1, "count": 1, "percentiles": {"1": 2.0}}],
)  # fmt: skip
def test_bad_statistics_are_named(tmp_path, stats):
    corpus = write_corpus(tmp_path / "ctx")
    (corpus / "stats.json").write_text(json.dumps(stats))
    with pytest.raises(DataError, match="the statistics cannot be read"):
        described(corpus, tmp_path / "card")


def test_bad_contact_sheet_is_named(tmp_path):
    corpus = write_corpus(tmp_path / "ctx")
    (corpus / "contact_sheet.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"the contact sheet cannot be read: .*contact_sheet.png"):
        described(corpus, tmp_path / "card")


def test_bad_products_are_named(tmp_path):
    corpus = write_corpus(tmp_path / "ctx")
    table = parquet.read_table(corpus / "products.parquet")
    parquet.write_table(table.drop_columns(["licence"]), corpus / "products.parquet")
    with pytest.raises(DataError, match="the table of products cannot be read: .*it lacks licence"):
        described(corpus, tmp_path / "card")
    (corpus / "products.parquet").unlink()
    with pytest.raises(DataError, match=r"products"):
        described(corpus, tmp_path / "card")


def test_products_of_different_units_are_compared_on_their_own_scale(tmp_path):
    write_raster(tmp_path / "in" / "dn.tif", ground(dtype="uint16", high=4000), **LOCATED)
    write_raster(tmp_path / "in" / "if.tif", (ground(seed=2) / 2000).astype("float32"), **LOCATED)
    corpus, _ = run(str(tmp_path / "in"), tmp_path / "out")
    assert corpus.manifest.mixed_units
    positions = sample_positions(corpus, 0, 100)
    tones = sample_tones(corpus, positions)
    assert tones.relative and tones.edges[[0, -1]].tolist() == [-0.25, 1.25]
    low_high = {row["product_id"]: (row["percentile_low"], row["percentile_high"]) for row in products_of(corpus)}
    for number, (split, position) in enumerate(sorted(positions)):
        tile = corpus.read(split, position)
        low, high = low_high[tile.meta["product_id"]]
        assert tones.mean_N[number] == pytest.approx(
            (tile.value_HW[tile.valid_HW].mean() - low) / (high - low), abs=1e-4
        )
    folder, lines = described(corpus.path, tmp_path / "card")
    assert "The products differ in unit" in (folder / "index.html").read_text()
    assert "(the products differ in unit)" in "\n".join(lines)


def test_diversity_by_hand():
    assert diversity([]) is None and diversity([0, 0]) is None
    even = diversity([5, 5, 5, 5, 0])
    assert even is not None and (even.categories, even.entropy_bits, even.effective, even.evenness) == (
        4,
        2.0,
        4.0,
        1.0,
    )
    single = diversity([7])
    assert single is not None and (single.entropy_bits, single.effective, single.evenness) == (0.0, 1.0, 1.0)
    uneven = diversity([3, 1])
    assert uneven is not None and uneven.effective == pytest.approx(
        math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    )


def test_measure_counts_what_lies_beyond_in_the_last_bin():
    measure = Measure(1.0)
    measure.add(np.array([0.0, 0.5, 1.0, 2.5, np.nan]))
    assert (measure.counts[0], measure.counts[25], measure.counts[-1]) == (1, 1, 2)
    assert measure.known == 4 and measure.mean == 1.0
    assert math.isnan(Measure(1.0).mean)


def test_tables_in_small_batches_equal_one_batch(located, monkeypatch):
    whole = read_tables(located, seed=0)
    iter_batches = parquet.ParquetFile.iter_batches
    monkeypatch.setattr(parquet.ParquetFile, "iter_batches",
                        lambda self, batch_size, **rest: iter_batches(self, batch_size=3, **rest))  # fmt: skip
    parts = read_tables(located, seed=0)
    assert parts.splits == whole.splits and parts.cells == whole.cells and parts.lat_range == whole.lat_range
    np.testing.assert_array_equal(parts.bands, whole.bands)
    np.testing.assert_array_equal(parts.grid, whole.grid)
    assert whole.rows is not None and parts.rows is not None and parts.rows.footprint == whole.rows.footprint
    np.testing.assert_array_equal(parts.rows.lon, whole.rows.lon)
    monkeypatch.setattr(describe_numbers, "MAX_SHOWN_ROWS", 7)
    few = read_tables(located, seed=0)
    assert few.rows is not None and few.rows.lon.size == 7 and few.located == whole.located


def test_sources_are_counted_over_all_products(located):
    products = read_products(located, shown=1)
    assert products.count == 2 and len(products.first) == 1 and products.licences == {"CC0-1.0": 2}
    assert products.tiles.sum() == len(index(Corpus(located)))


@pytest.mark.parametrize(("text", "year"), [("2009-07-25T08:19:59.590Z", 2009 + 205 / 366), ("2006-001T00:00", 2006.0),
                                            ("", math.nan), ("yesterday", math.nan), ("NULL", math.nan)])  # fmt: skip
def test_acquisition_time_becomes_a_year(text, year):
    assert decimal_year(text) == pytest.approx(year, nan_ok=True)


def test_figures_hold_many_categories_and_long_names():
    pair = np.array([3, 1], dtype=np.int64)
    tables = Tables(units={f"{'long name ' * 8}{n}": pair for n in range(60)} | {"": pair},
                    gsds={0.25 * 1.1**n: pair for n in range(40)} | {math.nan: pair})  # fmt: skip
    units, gsds = unit_figure(tables, "CTX"), gsd_figure(tables, "CTX")
    assert "60 in all. 4 tiles have no unit" in units.caption and "Of 4 tiles it is unknown" in gsds.caption
    many = product_figure(Products(count=500, tiles=np.array([1000] + [1] * 499)), "CTX")
    assert "Half of all tiles come from 1 of 500 products" in many.caption
    assert drop_figure({"taken": 0}, "HiRISE").png.startswith(b"\x89PNG")


def test_mosaic_puts_tiles_in_rows_and_marks_what_was_not_measured(located):
    shown = [Shown(str(n), "", "train", np.full((144, 144, 3), n, np.uint8)) for n in range(9)]
    sheet = np.asarray(Image.open(io.BytesIO(mosaic(shown))))
    assert sheet.shape == (2 * 152 - 8, 8 * 152 - 8) and sheet[10, 10] == 0 and sheet[160, 10] == 8
    assert sheet[10, 152 * 7 + 5] == 7 and sheet[160, 200] == 255
    corpus = Corpus(located)
    masked = [(split, n) for split in ("train", "val") for n in range(corpus.count(split))
              if not corpus.read(split, n).valid_HW.all()]  # fmt: skip
    for tile in sample_tiles(corpus, masked):
        assert (tile.rgb_HW3 == NOT_MEASURED).all(axis=2).any()


def test_names_cannot_break_the_page():
    bad = "<script>alert(1)</script> | `x` [y](z)\n# head"
    table = Table(bad, ("a", "b"), [(bad, bad)], code=(1,))
    section = Section("s", bad, tables=[table], lines=[bad], text=("c", "a\n```\nb"))
    card = Card(bad, bad, False, [("n", bad)], [section], {"pretty_name": bad})
    page, text = render_html(card), render_markdown(card)
    assert "<script>" not in page and page.count("&lt;script&gt;") >= 6
    assert "<script>alert" not in text.split("---\n", 2)[2].replace("`<script>alert", "").replace("\\<script", "")
    assert yaml.safe_load(text.split("---\n", 2)[1])["pretty_name"] == bad
    assert "````yaml\na\n```\nb\n````" in text
    row = [line for line in text.splitlines() if line.startswith("| \\<script")][-1]
    assert row.replace("\\|", "").count("|") == 3
    assert markdown_code("a|b`c") == "`a\\|b'c`"
