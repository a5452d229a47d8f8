"""What the user sees while products are cut, and after."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from momo.corpus_format import Manifest
from momo.data_prep import progress
from momo.data_prep.pieces import PieceInfo
from momo.data_prep.products import inspect
from momo.data_prep.progress import Progress, duration, report_products, report_totals
from momo.data_prep.sources import find_sources
from momo.data_prep.tables import Ready
from momo.data_prep.tiling import Cut
from tests.data_prep.prep_helper import LOCATED, ground
from tests.data_prep.products import write_raster


@pytest.fixture(scope="module")
def product(tmp_path_factory):
    path = write_raster(tmp_path_factory.mktemp("p") / "s.tif", ground(), **LOCATED)
    (source,), _ = find_sources([str(path)])
    return inspect(source)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.4, "59 s"), (60, "1 min"), (3599, "59 min"), (3600, "1 h 00 min"), (11220, "3 h 07 min")],
)
def test_durations_are_read_at_a_glance(seconds, text):
    assert duration(seconds) == text


def test_a_log_gets_lines_with_speed_and_time_left(product, monkeypatch):
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    lines: list[str] = []
    done = Cut(Path("piece"), seconds=5.0, info=PieceInfo(tiles=1000))
    with Progress([product] * 4, lines.append) as bar:
        bar.add(product, done)
        bar.add(product, done)
        bar.add(product, Cut(Path("piece"), seconds=0.0, info=PieceInfo(tiles=1000)))  # found finished
    assert lines and lines[-1].startswith("  3/4 products, ") and "tiles/s" in lines[-1]
    assert "MB/s" in lines[-1] and lines[-1].endswith("left")
    tiles = [int(line.split(", ")[1].split(" ")[0].replace(",", "")) for line in lines]
    assert all(0 < speed <= 200 for speed in tiles), "2,000 fresh tiles; the found ones do not count"


def test_nothing_done_yet_has_no_time_left(product, monkeypatch):
    monkeypatch.setattr(progress, "_EVERY_SECONDS", -1.0)
    lines: list[str] = []
    with Progress([product] * 2, lines.append) as bar:
        bar.add(product, Cut(None, "bad"))
    assert lines == ["  1/2 products, 0 tiles/s, 0 MB/s, unknown time left"]


def test_few_products_are_told_one_by_one_and_many_by_their_notes(product):
    info = PieceInfo(tiles=3, windows=5, dropped={"constant": 2}, max_rounding_error=0.5, notes=["a trap"])
    strange = dataclasses.replace(product, instrument="MOC")
    lines: list[str] = []
    report_products([Ready(strange, Path("p"), info)], "CTX", lines.append)
    text = "\n".join(lines)
    assert "3 of 5 windows good, dropped 2 constant" in text and "note: a trap" in text
    assert "names the instrument 'MOC', taken as CTX" in text and "largest error 0.5" in text
    lines.clear()
    plain = PieceInfo(tiles=1, windows=1)
    report_products([Ready(product, Path("p"), info if n < 2 else plain) for n in range(60)], "CTX", lines.append)
    assert lines == ["  note on 2 products: a trap"]


def test_many_failures_are_listed_in_part_and_counted_by_kind():
    failures = [{"source": f"{n}.IMG", "reason": f"the product is truncated: {n} bytes"} for n in range(50)]
    manifest = Manifest(
        sensor="CTX", tile_size=8, dtype="uint8", codec="zstd", synthetic=True, splits={"train": 3, "val": 0},
        shards=[], fingerprint="", prep={"split": {"val_fraction": 0.1}}, failures=failures,
    )  # fmt: skip
    lines: list[str] = []
    report_totals(manifest, Path("out"), 1, 50, 2.0, lines.append)
    assert "CTX: 3 tiles of 8 px" in lines[0] and "WARNING: no validation tile" in lines[1]
    assert "  50 products FAILED:" in lines and "    7.IMG: the product is truncated: 7 bytes" in lines
    assert lines[-1] == "    and 10 more: the product is truncated (all in report.json)"
