from __future__ import annotations

import json
import shutil
import statistics
from pathlib import Path

import pytest
import yaml
from PIL import Image

from momo.config import load_config
from momo.errors import CheckpointError, ConfigError, MergeError
from momo.merge.selecting.choose import select
from momo.merge.selecting.config import SelectConfig
from momo.merge.selection import read_selection
from momo.weights import load_card
from tests.conftest import write_weights
from tests.merge.runs_helper import SENSORS, write_run


def run_select(root, **options):
    runs = [str(root / sensor) for sensor in SENSORS]
    return select(SelectConfig(**{"runs": runs, "out": str(root / "selection.yaml")} | options))


def picked(path):
    return tuple(chosen.samples for chosen in read_selection(path).sensors.values())


def change_card(root, sensor, change, samples=300):
    """Changes one card of a run on disk; all of them with samples=None."""
    for number in (100, 200, 300) if samples is None else (samples,):
        path = root / f"{sensor}/checkpoints/samples-{number:09d}/card.json"
        fields = json.loads(path.read_text())
        change(fields)
        path.write_text(json.dumps(fields))


def test_evl_selection_says_what_and_why(copy, capsys):
    out = run_select(copy, epsilon=0.03)
    selection = read_selection(out)
    assert {name: chosen.samples for name, chosen in selection.sensors.items()} == dict(zip(SENSORS, (200, 200, 300)))
    assert selection.rule == "evl" and selection.epsilon == selection.epsilon_requested == 0.03
    assert selection.distance == pytest.approx(200 / 3) and selection.distance_unit == "samples"
    assert list(selection.sensors) == list(SENSORS)
    assert {chosen.early_stop_samples for chosen in selection.sensors.values()} == {300}
    assert selection.base["sha256"] == load_card(copy / "base").sha256
    reasons = {(entry["sensor"], entry["samples"]): entry["reason"] for entry in selection.rejected}
    assert len(reasons) == 6
    assert reasons["HiRISE", 100] == "differs by 0.29 from another chosen loss"
    assert not yaml.safe_load(out.read_text())["base"]["path"].startswith("/")
    assert Image.open(out.with_suffix(".png")).size[0] > 500
    printed = capsys.readouterr().out
    assert "rule evl, epsilon 0.03, distance 67 samples" in printed
    assert "HiRISE            200    0.6000   0.0100            300" in printed


def test_reasons_of_checkpoints_that_agree(copy):
    reasons = {
        (entry["sensor"], entry["samples"]): entry["reason"]
        for entry in read_selection(run_select(copy, epsilon=0.15)).rejected
    }
    # Picked: HiRISE 200 (0.60), CTX 300 (0.50), THEMIS 300 (0.61).
    assert reasons["CTX", 200] == "agrees, but is 100 samples from early stopping, the chosen one 0"
    assert reasons["THEMIS", 200] == "differs by 0.2 from another chosen loss"


def test_sweep_tells_what_other_epsilons_pick(copy, capsys):
    selection = read_selection(run_select(copy, epsilon=0.03))
    # By hand: (200, 200, 300) from 0.62 - 0.60, (200, 300, 300) from 0.61 - 0.50, early stopping from 0.61 - 0.40.
    assert [entry["low"] for entry in selection.sweep] == pytest.approx([0.02, 0.11, 0.21])
    assert [entry["high"] for entry in selection.sweep[:2]] == [entry["low"] for entry in selection.sweep[1:]]
    assert selection.sweep[-1]["high"] is None
    assert [tuple(entry["samples"].values()) for entry in selection.sweep] == [
        (200, 200, 300), (200, 300, 300), (300, 300, 300),
    ]  # fmt: skip
    assert [entry["distance"] for entry in selection.sweep] == pytest.approx([200 / 3, 100 / 3, 0])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  ->")]
    assert len(rows) == 1 and rows[0].split()[:4] == ["->", "0.02", "0.11", "66.67"]


def test_infeasible_epsilon_is_said_loudly(copy, capsys):
    selection = read_selection(run_select(copy, epsilon=0.001))
    assert selection.epsilon == pytest.approx(0.02) and selection.epsilon_requested == 0.001
    assert "NO TUPLE AGREES within epsilon 0.001: the smallest feasible epsilon 0.02" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "factor"),
    [
        ({}, statistics.NormalDist().inv_cdf(1 - 0.05 / 6)),
        ({"epsilon": None, "correction": "none"}, 1.959964),
        ({"epsilon": "auto", "correction": "none", "level": 0.99}, 2.575829),
    ],
)
def test_epsilon_from_standard_errors(copy, options, factor):
    change_card(copy, "CTX", lambda fields: fields["val_loss"].update(stderr=0.03), samples=None)
    change_card(copy, "THEMIS", lambda fields: fields["val_loss"].update(stderr=0.4), samples=200)  # the median counts
    selection = read_selection(run_select(copy, **options))
    assert selection.epsilon == pytest.approx(factor * (0.01**2 + 0.03**2) ** 0.5, rel=1e-5)
    assert selection.epsilon_requested is None
    assert f"at level {options.get('level', 0.95):g}" in selection.notes[0] and "CTX" in selection.notes[0]
    assert ("for all 3 pairs at once, Bonferroni" in selection.notes[0]) == ("correction" not in options)


def test_epsilon_over_products_and_its_floor(copy):
    with pytest.raises(MergeError, match=r"has no standard error: .*HiRISE, 3 of 3 checkpoints, over products"):
        run_select(copy, stderr="products")
    for sensor in SENSORS:
        change_card(copy, sensor, lambda fields: fields["val_loss"].update(stderr_products=0.02), samples=None)
    wide = read_selection(run_select(copy, stderr="products"))
    assert wide.epsilon == pytest.approx(2.39398 * 0.02 * 2**0.5, rel=1e-5) and "over products" in wide.notes[0]
    floored = read_selection(run_select(copy, epsilon_relative=0.2))
    assert floored.epsilon == pytest.approx(0.2 * (0.4 + 0.5 + 0.61) / 3)
    assert floored.notes[1].startswith("Epsilon was raised to 0.1007: 0.2 of the mean early-stopping loss")
    assert len(read_selection(run_select(copy, epsilon_relative=0.01)).notes) == 1


def test_one_validation_tile_has_no_standard_error(copy):
    change_card(copy, "CTX", lambda fields: fields["val_loss"].update(stderr=None))
    with pytest.raises(MergeError, match=r"no standard error: .*CTX, 1 of 3 checkpoints.*give epsilon"):
        run_select(copy)
    selection = read_selection(run_select(copy, epsilon=0.15))
    assert selection.sensors["CTX"].val_stderr is None


@pytest.mark.parametrize(
    ("options", "expected", "spread", "reason"),
    [
        ({"rule": "early_stop"}, (300, 300, 300), 0.21, "loss is 0.5 above the lowest"),
        ({"rule": "last"}, (300, 300, 300), 0.21, "not the last checkpoint"),
        ({"rule": "at_samples", "samples": 210}, (200, 200, 200), 0.1, "110 samples away from 210, the chosen one 10"),
        ({"rule": "at_samples", "samples": 250}, (200, 200, 200), 0.1, "as near, but later"),
        ({"rule": "at_loss", "loss": 0.62}, (200, 200, 300), 0.02, "not the first at or below"),
        ({"rule": "at_loss", "loss": 0.8}, (200, 100, 200), 0.2, "loss is above 0.8"),
    ],
)
def test_other_rules(copy, options, expected, spread, reason):
    out = run_select(copy, **options)
    selection = read_selection(out)
    assert picked(out) == expected
    assert selection.epsilon == pytest.approx(spread) and selection.sweep == []
    assert reason in [entry["reason"] for entry in selection.rejected]
    assert any("does not look at epsilon" in note for note in selection.notes)
    assert any("nearest" in note for note in selection.notes) == ("samples" in options)


def test_loss_that_no_checkpoint_reaches(copy):
    with pytest.raises(
        MergeError, match=r"no checkpoint reaches the loss: CTX: lowest 0.5 at 300 samples; THEMIS: low"
    ):
        run_select(copy, rule="at_loss", loss=0.45)
    with pytest.raises(MergeError, match=r"Next: every run reaches loss=0.61\."):
        run_select(copy, rule="at_loss", loss=0.45)
    assert not (copy / "selection.yaml").exists()


def test_smoothing_is_named_and_raw_losses_are_kept(copy, capsys):
    change_card(copy, "CTX", lambda fields: fields["val_loss"].update(loss=0.68))  # 0.8, 0.62, 0.68
    selection = read_selection(run_select(copy, epsilon=0.03, smoothing="isotonic"))
    assert selection.smoothing == "isotonic"
    assert selection.sensors["CTX"].val_loss_smoothed == pytest.approx(0.65)  # 0.62 and 0.68 pool
    assert selection.sensors["CTX"].val_loss == 0.62
    assert all("val_loss_smoothed" in entry for entry in selection.rejected)
    printed = capsys.readouterr().out
    assert "smoothing isotonic" in printed and "smoothed" in printed and "The rule saw the losses after" in printed
    out = run_select(copy, rule="at_samples", samples=300, smoothing="running_min")
    chosen = read_selection(out).sensors["CTX"]
    assert (chosen.val_loss, chosen.val_loss_smoothed, chosen.early_stop_samples) == (0.68, 0.62, 200)
    assert any("equal only after smoothing" in note for note in read_selection(out).notes)


def test_two_runs_of_one_sensor_need_names(copy):
    write_run(copy / "CTX2", copy / "base", "CTX", [0.85, 0.6, 0.55], seed=2)
    runs = {"old": str(copy / "CTX"), "new": str(copy / "CTX2"), "other": str(copy / "HiRISE")}
    selection = read_selection(run_select(copy, runs=runs, epsilon=0.05))
    assert list(selection.sensors) == ["other", "new", "old"]
    assert [chosen.sensor for chosen in selection.sensors.values()] == ["HiRISE", "CTX", "CTX"]
    with pytest.raises(MergeError, match=r"two runs are of one sensor: .*Next: write runs={early: "):
        run_select(copy, runs=list(runs.values()))
    with pytest.raises(MergeError, match="one run is given twice"):
        run_select(copy, runs={"a": str(copy / "CTX"), "b": str(copy / "CTX/../CTX")})
    change_card(copy, "CTX2", lambda fields: fields["data_fingerprints"].update(CTX="0" * 64), samples=None)
    with pytest.raises(MergeError, match="losses of one sensor are from different corpora: CTX: .*allow=.fingerprint"):
        run_select(copy, runs=runs)


def rename_policy(fields):
    fields["val_loss"]["protocol"] = "q" * 64
    fields["normalisation"]["policy"] = "per_tile_minmax"
    fields["objective"] = {"norm_pix_loss": True, "mask_ratio": 0.75}


def test_other_protocol_is_refused_with_what_differs(copy):
    change_card(copy, "CTX", rename_policy, samples=None)
    with pytest.raises(MergeError, match="losses are not comparable: protocols HiRISE pppppppppppp") as caught:
        run_select(copy)
    text = str(caught.value)
    assert "normalisation policy: per_tile_zscore (HiRISE/THEMIS), per_tile_minmax (CTX)" in text
    assert "loss norm_pix_loss: None (HiRISE/THEMIS), True (CTX)" in text and "masks mask_ratio" in text
    assert "input" not in text.split("What differs")[1].split("Rule:")[0] and "allow=[protocol]" in text
    notes = read_selection(run_select(copy, allow=["protocol"])).notes
    assert any(note.startswith("ALLOWED protocol: the validation losses are not comparable") for note in notes)


def test_seed_of_the_masks_is_read_from_the_configuration(copy):
    for sensor, seed in (("CTX", 7), ("THEMIS", 0), ("HiRISE", 0)):
        path = copy / sensor / "config.yaml"
        fields = yaml.safe_load(path.read_text())
        fields["validation"]["seed"] = seed
        path.write_text(yaml.safe_dump(fields))
    change_card(copy, "CTX", lambda fields: fields["val_loss"].update(protocol="q" * 64), samples=None)
    with pytest.raises(MergeError, match=r"What differs: masks seed: 0 \(HiRISE/THEMIS\), 7 \(CTX\)"):
        run_select(copy)


def test_within_a_run_protocol_and_count_are_one(copy):
    change_card(copy, "CTX", lambda fields: fields["val_loss"].update(protocol="q" * 64))
    with pytest.raises(
        MergeError, match=r"within CTX: pppppppppppp and qqqqqqqqqqqq\. The cards do not tell which part"
    ):
        run_select(copy)
    change_card(copy, "CTX", lambda fields: fields["val_loss"].update(protocol="p" * 64, count=21))
    with pytest.raises(MergeError, match=r"different numbers of tiles: CTX: 20 and 21\..*allow=.count."):
        run_select(copy)
    assert any("ALLOWED count" in note for note in read_selection(run_select(copy, allow=["count"])).notes)


def test_other_base_is_refused(copy):
    change_card(copy, "CTX", lambda fields: fields["parents"][0].update(sha256="e" * 64), samples=None)
    with pytest.raises(MergeError, match=r"do not start from one base: .*CTX eeeeeeeeeeee.*allow=.base."):
        run_select(copy)
    assert any("ALLOWED base" in note for note in read_selection(run_select(copy, allow=["base"])).notes)
    change_card(copy, "CTX", lambda fields: fields.update(parents=[]), samples=None)
    with pytest.raises(MergeError, match="not known whether the runs start from one base: no base for CTX"):
        run_select(copy)


def test_base_file_that_is_another_or_gone(copy):
    write_weights(copy / "other", seed=5)
    with pytest.raises(MergeError, match="the base is not the one the runs started from: .*other has sha256"):
        run_select(copy, base=str(copy / "other"))
    shutil.rmtree(copy / "base")
    with pytest.raises(CheckpointError, match="the base cannot be used: the weights are not there.*give its place"):
        run_select(copy)


def test_run_without_checkpoints(copy):
    shutil.rmtree(copy / "CTX/checkpoints")
    with pytest.raises(CheckpointError, match="the run has no checkpoints"):
        run_select(copy)
    with pytest.raises(CheckpointError, match="this is no run"):
        run_select(copy, runs=[str(copy), str(copy / "CTX")])
    assert not (copy / "selection.yaml").exists()


def test_joint_run_is_refused(copy):
    change_card(copy, "CTX", lambda fields: fields["sensors"].append({"name": "THEMIS"}))
    with pytest.raises(MergeError, match="a run is not of one sensor: .*CTX, THEMIS"):
        run_select(copy)


@pytest.mark.parametrize(
    ("val_loss", "message"),
    [
        (None, "a checkpoint has no validation loss: .*samples-000000100.*momo validate"),
        ({"loss": 0.5}, "in a card cannot be read: .*samples-000000100: KeyError 'stderr'"),
        ({"loss": "x", "stderr": 0.1, "count": 9, "protocol": "p"}, "in a card cannot be read: .*ValueError"),
        ({"loss": 0.5, "stderr": float("inf"), "count": 9, "protocol": "p"}, "cannot be read: .*standard errors .inf"),
    ],
)
def test_damaged_card_is_refused(copy, val_loss, message):
    change_card(copy, "CTX", lambda fields: fields.update(val_loss=val_loss), samples=100)
    with pytest.raises(CheckpointError, match=message):
        run_select(copy)


def test_damaged_configuration_is_refused(copy):
    (copy / "CTX/config.yaml").write_text("a: [")
    with pytest.raises(CheckpointError, match="the configuration of a run cannot be read: .*CTX/config.yaml"):
        run_select(copy)


def test_unreadable_selection(tmp_path):
    path = tmp_path / "s.yaml"
    with pytest.raises(MergeError, match="the selection does not exist"):
        read_selection(path)
    path.write_text("a: [")
    with pytest.raises(MergeError, match="not YAML"):
        read_selection(path)
    path.write_text("format: other")
    with pytest.raises(MergeError, match="this is no selection"):
        read_selection(path)
    path.write_text("format: momo-selection\nformat_version: 1\nbase: {path: b}\nsensors: {}\n")
    with pytest.raises(MergeError, match="lacks a field"):
        read_selection(path)


def test_selection_of_an_earlier_momo_is_read(copy):
    path = run_select(copy, epsilon=0.03)
    fields = yaml.safe_load(path.read_text())
    for key in ("sweep", "smoothing"):
        del fields[key]
    for chosen in fields["sensors"].values():
        del chosen["val_loss_smoothed"], chosen["sensor"]
    path.write_text(yaml.safe_dump(fields))
    assert fields["format_version"] == 1
    assert read_selection(path).sensors["CTX"].samples == 200


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"runs": ["a"]}, "too few runs to select from: a"),
        ({"runs": None}, "too few runs to select from: none"),
        ({"runs": {"x": "a"}}, "too few runs to select from: a"),
        ({"runs": "a,b"}, "runs cannot be read: a,b"),
        ({"runs": {"x": ["a"], "y": "b"}}, "runs cannot be read"),
        ({"out": "s.json"}, "a selection is a YAML file"),
        ({"epsilon": -1}, "epsilon is out of range: -1"),
        ({"epsilon": float("inf")}, "epsilon is out of range: inf"),
        ({"epsilon": "nan"}, "epsilon cannot be read: 'nan'"),
        ({"rule": "evk"}, "did you mean 'evl'"),
        ({"distance": "epochs"}, "distance has an unknown value"),
        ({"smoothing": "median"}, "smoothing has an unknown value"),
        ({"correction": "tukey"}, "correction has an unknown value"),
        ({"stderr": "units"}, "stderr has an unknown value"),
        ({"allow": ["protocols"]}, "allow has an unknown value: 'protocols'.*did you mean 'protocol'"),
        ({"level": 1.0}, "level is out of range: 1.0"),
        ({"epsilon_relative": -0.1}, "epsilon_relative is out of range"),
        ({"rule": "at_samples"}, "samples belongs to rule=at_samples: .*add samples="),
        ({"rule": "at_samples", "samples": 0}, "samples is out of range: 0"),
        ({"samples": 100}, "samples belongs to rule=at_samples: .*leave samples out"),
        ({"rule": "at_loss"}, "loss belongs to rule=at_loss"),
        ({"rule": "at_loss", "loss": float("nan")}, "loss is out of range: nan"),
    ],
)
def test_configuration_errors(changes, message):
    with pytest.raises(ConfigError, match=message):
        SelectConfig(**{"runs": ["a", "b"], "out": "s.yaml"} | changes)


def test_configuration_from_the_command_line():
    example = load_config(SelectConfig, Path(__file__).parents[2] / "configs" / "select.yaml")
    assert example == SelectConfig(runs=["runs/hirise", "runs/ctx", "runs/themis"], out="selection.yaml")
    config = load_config(SelectConfig, None, ["runs={x: a, y: b}", "out=s.yaml", "epsilon=1"])
    assert config.places == [("x", "a"), ("y", "b")] and config.requested_epsilon == 1.0
    config = load_config(SelectConfig, None, ["runs=[a,b]", "out=s.yaml", "epsilon=auto"])
    assert config.places == [(None, "a"), (None, "b")] and config.requested_epsilon is None
