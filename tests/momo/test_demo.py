"""The whole way once, as small as it goes: every stage for real, skipped when finished, continued when killed."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from momo.cli import main
from momo.cli.demo import DemoConfig, command_line, plan
from momo.corpus import Corpus
from momo.merge import read_selection
from momo.runs import read_checkpoints
from momo.weights import load_card

TINY = [
    "seed=1", "tile_size=32", "base_samples=128", "samples=256", "checkpoints=2", "batch_size=32", "ranks=2",
    "products=2", "tiles_per_product=40", "labelled_images=24", "decoder_steps=4",
]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    root = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert main(["demo", "out=demo", *TINY]) == 0
    return root / "demo"


def times(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_every_artefact_is_there_and_says_synthetic(finished):
    for sensor in ("hirise", "ctx", "themis"):
        corpus = Corpus(finished / "corpora" / sensor, verify=True)
        assert corpus.manifest.synthetic and corpus.count("train") > 0 and corpus.count("val") > 0
        cards = [checkpoint.card for checkpoint in read_checkpoints(finished / "runs" / sensor)]
        assert len(cards) == 2 and all(card.synthetic and card.val_loss["count"] > 1 for card in cards)
    selection = read_selection(finished / "selection.yaml")
    assert set(selection.sensors) == {"HiRISE", "CTX", "THEMIS"}
    merged = load_card(finished / "merged/evl", check_hash=True)
    assert merged.method["name"] == "task_arithmetic" and len(merged.parents) == 4 and merged.synthetic
    assert load_card(finished / "merged/last-average").method["name"] == "average"
    runs = [json.loads(path.read_text()) for path in (finished / "results/runs").glob("*.json")]
    # 7 models x 3 seeds x (2 protocols of the first set + 1 of the second)
    assert len(runs) == 63 and {run["provenance"] for run in runs} == {"rerun"}
    assert {run["synthetic"] for run in runs} == {True}
    page = (finished / "report/index.html").read_text()
    assert "ynthetic" in page and "evl-merge" in page and "http://" not in page.replace("http://www.w3.org", "")
    assert (finished / "report/report.md").is_file()


@pytest.mark.slow
def test_second_run_does_nothing(finished, monkeypatch, capsys):
    monkeypatch.chdir(finished.parent)
    before = times(finished)
    assert main(["demo", "out=demo", *TINY]) == 0
    out = capsys.readouterr().out
    assert out.count("done before, skipped") == len(plan(DemoConfig())) and "open the page" in out
    assert times(finished) == before


@pytest.mark.slow
def test_killed_demo_continues_with_the_step_it_was_in(finished, monkeypatch, capsys):
    monkeypatch.chdir(finished.parent)
    report = finished / ".steps/report.json"
    stamp = json.loads(report.read_text())
    report.write_text(json.dumps(stamp | {"done": False}))
    (finished / "report/index.html").unlink()
    (finished / "report").rename(finished / ".report.partial-elsewhere-1")
    assert main(["demo", "out=demo", *TINY]) == 0
    assert (finished / "report/index.html").is_file()
    assert capsys.readouterr().out.count("done before, skipped") == len(plan(DemoConfig())) - 1


@pytest.mark.slow
def test_changed_setting_redoes_that_step_and_what_follows(finished, monkeypatch, capsys):
    monkeypatch.chdir(finished.parent)
    weights = times(finished / "merged")
    assert main(["demo", "out=demo", *TINY, "decoder_steps=5"]) == 0
    out = capsys.readouterr().out
    assert out.count("made again") == 2 and times(finished / "merged") == weights


def test_a_users_folder_is_never_touched(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine/world").mkdir(parents=True)
    (tmp_path / "mine/world/thesis.tex").write_text("years of work")
    assert main(["demo", "out=mine", *TINY]) == 2
    assert "the demo would overwrite something it did not make: mine/world" in capsys.readouterr().err
    assert (tmp_path / "mine/world/thesis.tex").read_text() == "years of work"


def test_printed_commands_can_be_typed(capsys):
    from momo.cli.commands import COMMANDS
    from momo.config import config_from_dict, load_config

    for step in plan(DemoConfig(out="d e", ranks=2)):
        if step.command == "world":
            continue
        program, command, *overrides = shlex.split(command_line(step))
        assert program == "momo"
        schema, _ = COMMANDS[command].load()
        assert load_config(schema, None, overrides) == config_from_dict(schema, step.values)


def test_tile_size_must_fit_the_patch(capsys):
    assert main(["demo", "tile_size=60"]) == 2
    assert "tile_size is out of range: 60" in capsys.readouterr().err
