"""Reading runs and selections: what is accepted, what is refused and how it is said."""

from __future__ import annotations

import json

import pytest
import yaml

from momo.errors import CheckpointError, MergeError
from momo.eval.report_inputs import read_run, read_selection, run_of_pick, with_error
from tests.conftest import write_weights
from tests.eval.report_fixtures import write_run, write_selection


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    root = tmp_path_factory.mktemp("project")
    base = write_weights(root / "base")
    runs = {sensor: write_run(root / sensor, [sensor], seed=k, base=base) for k, sensor in enumerate(("CTX", "THEMIS"))}
    return root, base, runs


def write_metrics(folder, records):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def val(samples, loss=0.5, **changes):
    return {"event": "val", "samples": samples, "loss": loss, "stderr": 0.01, "count": 4, "protocol": "p",
            "per_sensor": {}} | changes  # fmt: skip


def test_run_is_read_as_written(project):
    run = read_run("ctx", project[2]["CTX"])
    assert run.sensors == ["CTX"] and len(run.val) == 8 and len(run.train) == 32 and not run.torn
    assert run.last.samples == 3200 and run.early_stop.loss == min(point.loss for point in run.val)
    assert run.card is not None and run.card.samples == 3200
    assert "samples: 3200" in run.config_text


def test_joint_run_keeps_the_loss_of_each_sensor(tmp_path):
    run = read_run("joint", write_run(tmp_path / "joint", ["CTX", "THEMIS"]))
    assert run.sensors == ["CTX", "THEMIS"]
    both = [run.val[0].per_sensor[sensor][0] for sensor in run.sensors]
    assert run.val[0].loss == pytest.approx(sum(both) / 2)


def test_resumed_run_keeps_the_later_line_of_each_sample_count(tmp_path):
    records = [val(100, 0.9), val(200, 0.8), val(200, 0.7), val(300, 0.6)]
    run = read_run("r", write_metrics(tmp_path / "r", records))
    assert [(point.samples, point.loss) for point in run.val] == [(100, 0.9), (200, 0.7), (300, 0.6)]


def test_early_stop_of_equal_losses_is_the_earlier_one(tmp_path):
    run = read_run("r", write_metrics(tmp_path / "r", [val(100, 0.5), val(200, 0.5)]))
    assert run.early_stop.samples == 100


def test_line_cut_off_by_a_kill_is_left_out_and_told(tmp_path):
    folder = write_metrics(tmp_path / "r", [val(100)])
    with open(folder / "metrics.jsonl", "a") as stream:
        stream.write('{"event": "val", "samp')
    run = read_run("r", folder)
    assert run.torn and len(run.val) == 1


def test_undefined_standard_error_stays_undefined(tmp_path):
    run = read_run("r", write_metrics(tmp_path / "r", [val(100, stderr=None, count=1)]))
    assert run.val[0].stderr is None
    assert with_error(run.val[0].loss, run.val[0].stderr) == "0.5000"
    assert with_error(0.5, 0.01) == "0.5000 ± 0.0100"


@pytest.mark.parametrize(
    ("records", "words"),
    [
        (
            [{"event": "train", "samples": 1, "loss": 1.0}],
            r"the run has no validation loss: .* Next: let the run",
        ),
        (
            [val(100), {"event": "val", "samples": 200}],
            r"line of the metrics cannot be read: .*line 2: KeyError 'loss'",
        ),
        ([val(100, float("nan"))], r"cannot be read: .*line 1: ValueError nan is not finite"),
        ([val(100), val(200, protocol="q")], r"changed its validation protocol on the way: .*: p, q. Rule: losses are"),
        ([[1, 2]], r"a line of the metrics cannot be read: .*line 1: TypeError"),
    ],
)
def test_unusable_metrics_are_refused(tmp_path, records, words):
    with pytest.raises(CheckpointError, match=words):
        read_run("r", write_metrics(tmp_path / "r", records))


def test_folder_without_metrics_is_no_run(tmp_path):
    with pytest.raises(CheckpointError, match=r"the run is not there: .*metrics.jsonl. Rule: a run is a folder with"):
        read_run("r", tmp_path)


def test_selection_is_read_with_paths_from_its_own_folder(project, monkeypatch, tmp_path):
    root, base, runs = project
    path = write_selection(root / "selection.yaml", runs, base)
    monkeypatch.chdir(tmp_path)
    selection = read_selection(path)
    assert selection.base_path.samefile(base)
    assert selection.picks["CTX"].run.samefile(runs["CTX"]) and selection.picks["CTX"].samples == 2800
    assert selection.rule_words == "equal validation loss"
    losses = [pick.val_loss for pick in selection.picks.values()]
    assert selection.spread == pytest.approx(abs(losses[0] - losses[1]))


def test_run_of_a_pick_is_found_by_folder_else_by_its_only_sensor(project):
    root, base, runs = project
    pick = read_selection(write_selection(root / "selection.yaml", runs, base)).picks["CTX"]
    read = [read_run(sensor, run) for sensor, run in runs.items()]
    assert run_of_pick(pick, read).name == "CTX"
    moved = type(pick)(**{**vars(pick), "run": root / "gone"})
    assert run_of_pick(moved, read).name == "CTX"
    assert run_of_pick(moved, read[1:]) is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rule: [", r"the selection cannot be read: .*selection.yaml"),
        ("- a\n", r"this is no selection: .*format list. Rule: format is momo-selection"),
        ("format: other\n", r"this is no selection: .*format other"),
        ("format: momo-selection\nformat_version: 9\n", r"another format version: 9 in .*reads version 1"),
        (
            "format: momo-selection\nformat_version: 1\nrule: evl\n",
            r"a field of the selection is missing or wrong: .*sensors",
        ),
    ],
)
def test_unusable_selection_is_refused(tmp_path, text, words):
    (tmp_path / "selection.yaml").write_text(text)
    with pytest.raises(MergeError, match=words):
        read_selection(tmp_path / "selection.yaml")


def test_selection_without_sensors_is_refused(project):
    root, base, runs = project
    path = write_selection(root / "empty.yaml", runs, base, sensors={})
    with pytest.raises(MergeError, match="sensors is empty"):
        read_selection(path)
    assert yaml.safe_load(path.read_text())["sensors"] == {}
