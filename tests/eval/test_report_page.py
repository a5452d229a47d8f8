"""The report as a whole: what it shows, what it says is missing, what it refuses."""

from __future__ import annotations

import base64
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from momo.config import config_from_dict, load_config
from momo.errors import CheckpointError, ConfigError, DataError, EvalError, MomoError
from momo.eval import ReportConfig, report
from tests.conftest import write_weights
from tests.eval.report_fixtures import SENSORS, write_world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def page(world, tmp_path_factory):
    return make(world, tmp_path_factory.mktemp("page") / "report")


def make(fields, out: Path, **changes) -> Path:
    said: list[str] = []
    index = report(config_from_dict(ReportConfig, {**fields, "out": str(out), **changes}), say=said.append)
    assert len(said) == 1 and str(index) in said[0]
    return index


class Outline(HTMLParser):
    """Collects tags, so that the structure of a page can be tested."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"{tag} closes something else"

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def test_page_is_one_well_formed_file_without_network(page):
    html = page.read_text(encoding="utf-8")
    outline = Outline(html)
    assert outline.open == []
    assert not outline.all("script")
    assert "http" not in html and "@import" not in html and "url(" not in html
    assert all(attrs["href"].startswith(("#", "data:")) for attrs in outline.all("a") + outline.all("link"))
    images = outline.all("img")
    assert len(images) > 60
    assert all(attrs["src"].startswith("data:image/png;base64,") for attrs in images)
    assert base64.b64decode(images[0]["src"].split(",")[1]).startswith(b"\x89PNG")
    assert len(html) < 4_000_000


def test_page_is_accessible(page):
    outline = Outline(page.read_text(encoding="utf-8"))
    assert all(attrs.get("alt") for attrs in outline.all("img"))
    assert all(attrs.get("scope") in ("col", "row") for attrs in outline.all("th"))
    assert outline.all("html")[0]["lang"] == "en"
    ids = {attrs["id"] for _, attrs in outline.tags if "id" in attrs}
    assert {attrs["href"][1:] for attrs in outline.all("a")} <= ids
    assert all(attrs.get("aria-label") for attrs in outline.all("div") if attrs.get("role") == "region")


def test_page_shows_every_part(page, world):
    html = page.read_text(encoding="utf-8")
    assert "No " not in re.sub("No tuple of", "", re.sub("<[^>]*>", "", html)).replace("Notes", "")
    for sensor in SENSORS:
        assert f">{sensor} model</th>" in html
    for words in ("demo-crater_seg, segmentation decoder", "demo-landform_cls, linear probe", "not separable from it"):
        assert words in html
    assert '<p class="synthetic">' in html and "none was measured" in html
    assert "task_arithmetic, coefficient 0.5" in html
    assert f"momo merge selection={world['selection']} method=task_arithmetic coefficient=0.5" in html
    assert "Task vector" in html


def test_markdown_has_its_figures_and_whole_tables(page):
    text = (page.parent / "report.md").read_text(encoding="utf-8")
    named = re.findall(r"\]\((figures/[^)]+)\)", text)
    assert len(named) == len(set(named)) == 3 + 2 + 4 + 3 + 3 + 1
    assert {path.name for path in (page.parent / "figures").iterdir()} == {Path(name).name for name in named}
    tables = re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
    assert len(tables) == 1 + 3 + 1 + 5
    for table in tables:
        lines = table.strip().split("\n")
        assert re.fullmatch(r"\|(-+\|)+", lines[1])
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
    assert "**Synthetic data.**" in text and "\n\n\n" not in text


def test_same_inputs_give_same_bytes_and_replace_the_old_report(world, page, tmp_path):
    again = make(world, tmp_path / "report")
    assert again.read_bytes() == page.read_bytes()
    (again.parent / "figures/stale.png").write_text("old")
    assert make(world, tmp_path / "report").read_bytes() == page.read_bytes()
    assert not (again.parent / "figures/stale.png").exists()
    for figure in (page.parent / "figures").iterdir():
        assert (again.parent / "figures" / figure.name).read_bytes() == figure.read_bytes()


def test_other_seed_shows_other_tiles(world, page, tmp_path):
    only = {"corpora": world["corpora"][:1], "title": "tiles"}
    first, second = (make(only, tmp_path / str(seed), seed=seed).read_text() for seed in (0, 1))
    assert first != second


@pytest.mark.parametrize("given", ["results", "runs", "selection", "weights", "corpora"])
def test_each_part_alone_makes_a_page_that_names_what_is_missing(world, given, tmp_path):
    html = make({given: world[given]}, tmp_path / "report").read_text(encoding="utf-8")
    lacking = {
        "No scores are shown": {"results"},
        "No loss curves are shown": {"runs", "selection"},
        "No tiles are shown": {"corpora"},
        "No reconstructions are shown": set(),
        "No segmentation is shown": {"results"},
    }
    for words, enough in lacking.items():
        assert (words in html) == (given not in enough)
    Outline(html)
    assert (tmp_path / "report" / "report.md").is_file()


def test_a_corpus_may_be_elsewhere(world, tmp_path):
    place = tmp_path / "elsewhere"
    shutil.copytree(world["corpora"][0], place)
    local = make({"corpora": [str(place)]}, tmp_path / "local").read_text(encoding="utf-8")
    remote = make({"corpora": [f"file://{place}"]}, tmp_path / "remote").read_text(encoding="utf-8")
    assert local.replace(f"made {place}", f"made file://{place}") == remote != local


def test_titles_cannot_break_the_page(world, tmp_path):
    html = make({"corpora": world["corpora"][:1]}, tmp_path / "r", title="<b>A|B</b>").read_text(encoding="utf-8")
    assert "<b>" not in html and "&lt;b&gt;A|B&lt;/b&gt;" in html


def test_measured_data_has_no_badge(tmp_path, world):
    import json

    from tests.conftest import write_corpus

    corpus = write_corpus(tmp_path / "corpus", tiles=4, val=2)
    manifest = json.loads((corpus / "manifest.json").read_text())
    (corpus / "manifest.json").write_text(json.dumps(manifest | {"synthetic": False}))
    assert 'class="synthetic"' not in make({"corpora": [str(corpus)]}, tmp_path / "a").read_text()
    both = make({"corpora": [str(corpus), world["corpora"][0]]}, tmp_path / "b").read_text()
    assert "Generated, not measured: tiles." in both


@pytest.mark.parametrize(
    ("fields", "kind", "words"),
    [
        ({}, ConfigError, r"there is nothing to report on. Rule: at least one of results"),
        ({"runs": {"CTX": "nowhere"}}, CheckpointError, r"the run is not there: nowhere. Rule: .*metrics.jsonl"),
        ({"selection": "nowhere.yaml"}, EvalError.__mro__[1], r"the selection is not there: nowhere.yaml"),
        ({"results": "nowhere"}, EvalError, r"there are no results here: nowhere"),
        ({"corpora": ["nowhere"]}, DataError, r"this is no corpus: nowhere"),
        ({"weights": [{"name": "m", "path": "nowhere"}]}, CheckpointError, r"weights are not there or not complete"),
        ({"runs": {"CTX": 3}}, ConfigError, r"runs cannot be read: .* Rule: name: path pairs, or a list of paths"),
        ({"runs": ["a"], "tiles": -1}, ConfigError, r"tiles is out of range: -1. Rule: 0 or more"),
        (
            {"weights": [{"name": "m", "path": "a"}, {"name": "m", "path": "b"}]},
            ConfigError,
            r"two weights have one name: m",
        ),
        ({"runs": ["a"], "models": ["x"]}, EvalError, r"models to outline are not in the results: x"),
    ],
)
def test_wrong_input_is_refused_and_nothing_written(fields, kind, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(kind, match=words) as caught:
        report(config_from_dict(ReportConfig, {"out": "report", **fields}), say=lambda _: None)
    assert isinstance(caught.value, MomoError)
    assert list(tmp_path.iterdir()) == []


def test_weights_without_decoder_cannot_reconstruct(tmp_path):
    from momo.weights import load_weights, save_weights

    whole = write_weights(tmp_path / "whole")
    tensors, card = load_weights(whole)
    card.contents = ["encoder"]
    (tmp_path / "encoder").mkdir()
    save_weights(tmp_path / "encoder", {k: v for k, v in tensors.items() if "decoder" not in k}, card)
    config = ReportConfig(out=str(tmp_path / "report"))
    config = config_from_dict(
        ReportConfig, {"out": config.out, "weights": [{"name": "m", "path": str(tmp_path / "encoder")}]}
    )
    with pytest.raises(
        CheckpointError, match=r"these weights cannot reconstruct: m at .* holds encoder. Rule: .*decoder"
    ):
        report(config, say=lambda _: None)
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize("files", [["thesis.txt"], ["index.html"], ["index.html", "report.md", "figures"]])
def test_a_folder_that_is_no_report_is_left_alone(world, tmp_path, files):
    for name in files:
        (tmp_path / name).write_text("years of work")
    with pytest.raises(DataError, match="the output is something else than an older one of this command"):
        make({"corpora": world["corpora"]}, tmp_path)
    assert all((tmp_path / name).read_text() == "years of work" for name in files)


def test_a_report_with_something_beside_it_is_left_alone(world, tmp_path):
    page = make({"corpora": world["corpora"][:1]}, tmp_path / "r")
    (page.parent / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="the output is something else than an older one of this command"):
        make({"corpora": world["corpora"][:1]}, tmp_path / "r")
    assert (page.parent / "thesis.txt").is_file()


def test_shipped_configuration_is_valid():
    config = load_config(ReportConfig, Path(__file__).parents[2] / "configs" / "report.yaml")
    assert config.out and config.run_folders()


def test_runs_may_be_a_list():
    config = ReportConfig(out="r", runs=["runs/ctx", "more/ctx", "runs/themis"])
    assert list(config.run_folders()) == ["runs/ctx", "more/ctx", "themis"]
