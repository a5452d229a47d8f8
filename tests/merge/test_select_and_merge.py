from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
import yaml
from PIL import Image

from momo.errors import CheckpointError, ConfigError, DataError, MergeError
from momo.merge import MergeConfig, SelectConfig, average, merge, read_selection, select, task_arithmetic
from momo.models import build_mae
from momo.weights import load_card, load_weights, save_weights
from tests.conftest import PICO, write_weights
from tests.merge.runs_helper import write_run

SENSORS = ("HiRISE", "CTX", "THEMIS")
LOSSES = ([0.9, 0.6, 0.4], [0.8, 0.62, 0.5], [0.95, 0.7, 0.61])


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    root = tmp_path_factory.mktemp("project")
    base = write_weights(root / "base")
    for number, (sensor, losses) in enumerate(zip(SENSORS, LOSSES), start=1):
        write_run(root / sensor, base, sensor, losses, seed=number)
    return root


@pytest.fixture
def copy(project, tmp_path):
    """A project that a test may damage; the runs name the copy's own base."""
    root = tmp_path / "project"
    shutil.copytree(project, root)
    for sensor in SENSORS:
        config = root / sensor / "config.yaml"
        config.write_text(config.read_text().replace(str(project), str(root)))
    return root


def run_select(root, **options):
    runs = [str(root / sensor) for sensor in SENSORS]
    return select(SelectConfig(**{"runs": runs, "out": str(root / "selection.yaml")} | options))


def test_evl_selection_says_what_and_why(copy, capsys):
    out = run_select(copy, epsilon=0.03)
    selection = read_selection(out)
    assert {name: chosen.samples for name, chosen in selection.sensors.items()} == dict(zip(SENSORS, (200, 200, 300)))
    assert selection.rule == "evl" and selection.epsilon == 0.03 and selection.distance == pytest.approx(200 / 3)
    assert list(selection.sensors) == list(SENSORS)
    assert {chosen.early_stop_samples for chosen in selection.sensors.values()} == {300}
    assert len(selection.rejected) == 6
    assert any("differs by 0.29" in r["reason"] for r in selection.rejected if r["sensor"] == "HiRISE")
    assert not yaml.safe_load(out.read_text())["base"]["path"].startswith("/")
    assert Image.open(out.with_suffix(".png")).size[0] > 500
    printed = capsys.readouterr().out
    assert "rule evl" in printed and "HiRISE" in printed


def test_selection_can_be_moved_with_its_project(copy, tmp_path):
    run_select(copy, epsilon=0.03)
    shutil.move(copy, tmp_path / "elsewhere")
    out = merge(MergeConfig(selection=str(tmp_path / "elsewhere/selection.yaml"), out=str(tmp_path / "m")))
    assert load_card(out).kind == "merged"


def test_infeasible_epsilon_is_said_loudly(copy, capsys):
    selection = read_selection(run_select(copy, epsilon=0.001))
    assert selection.epsilon == pytest.approx(0.02) and selection.epsilon_requested == 0.001
    assert "NO TUPLE AGREES" in capsys.readouterr().out


def test_epsilon_from_standard_errors(copy):
    selection = read_selection(run_select(copy))
    assert selection.epsilon == pytest.approx(2 * (2 * 0.01**2) ** 0.5) and selection.epsilon_requested is None
    assert "twice the standard error" in selection.notes[0]


@pytest.mark.parametrize(("rule", "expected"), [("early_stop", (300, 300, 300)), ("last", (300, 300, 300))])
def test_other_rules(copy, rule, expected):
    selection = read_selection(run_select(copy, rule=rule))
    assert tuple(chosen.samples for chosen in selection.sensors.values()) == expected
    assert selection.epsilon == pytest.approx(0.21)


def test_methods_equal_their_formulas():
    torch.manual_seed(0)
    base, *tuned = (torch.randn(5, 7, dtype=torch.float64) for _ in range(4))
    expected = base + 0.5 * ((tuned[0] - base) + (tuned[1] - base) + (tuned[2] - base))
    torch.testing.assert_close(task_arithmetic(base, tuned, 0.5).double(), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(average(base, tuned, 9.0).double(), sum(tuned) / 3, atol=1e-6, rtol=0)
    torch.testing.assert_close(task_arithmetic(base, tuned, 1 / 3), average(base, tuned, 0), atol=1e-6, rtol=0)


def test_merge_of_a_selection(copy):
    out = merge(MergeConfig(selection=str(run_select(copy, epsilon=0.03)), out=str(copy / "merged")))
    merged, card = load_weights(out)
    base, base_card = load_weights(copy / "base")
    chosen = {s: copy / s / "checkpoints" / f"samples-{n:09d}" for s, n in zip(SENSORS, (200, 200, 300))}
    tuned = [load_weights(path)[0] for path in chosen.values()]
    assert merged.keys() == base.keys()
    for name, start in base.items():
        expected = start.double() + 0.5 * sum(t[name].double() - start.double() for t in tuned)
        torch.testing.assert_close(merged[name].double(), expected, atol=2e-6, rtol=0)
    assert card.method == {"name": "task_arithmetic", "reference": "arXiv 2212.04089", "coefficient": 0.5}
    assert [(p["role"], p["name"]) for p in card.parents] == [
        ("base", "base"),
        ("checkpoint", "CTX"),
        ("checkpoint", "HiRISE"),
        ("checkpoint", "THEMIS"),
    ]
    assert card.parents[0]["sha256"] == base_card.sha256
    assert {s["name"] for s in card.sensors} == set(SENSORS) and card.synthetic


def test_order_of_checkpoints_does_not_change_a_bit(copy):
    paths = [str(copy / sensor / "checkpoints/samples-000000300") for sensor in SENSORS]
    hashes = {
        load_card(merge(MergeConfig(base=str(copy / "base"), checkpoints=order, out=str(copy / f"m{n}")))).sha256
        for n, order in enumerate((paths, paths[::-1], paths[1:] + paths[:1]))
    }
    assert len(hashes) == 1


def rewrite(folder, change):
    tensors, card = load_weights(folder)
    change(tensors, card)
    save_weights(folder, tensors, card)


def drop_key(tensors, card):
    del tensors["decoder_pred.bias"]


def reshape(tensors, card):
    tensors["cls_token"] = tensors["cls_token"][..., :5]


def halve(tensors, card):
    tensors["norm.weight"] = tensors["norm.weight"].half()


def other_base(tensors, card):
    card.parents[0]["sha256"] = "f" * 64


def other_objective(tensors, card):
    card.objective = {"norm_pix_loss": True}


def other_epsilon(tensors, card):
    card.architecture["layer_norm_eps"] = 1e-5


@pytest.mark.parametrize(
    ("change", "row"),
    [
        (drop_key, r"decoder_pred.bias +F32\[64\] +F32\[64\] +missing +F32\[64\]"),
        (reshape, r"cls_token +F32\[1, 1, 96\] .*F32\[1, 1, 5\]"),
        (halve, r"norm.weight .*F16\[96\]"),
        (other_base, r"sha256 of the base .*ffffffffffff"),
        (other_objective, r"objective +none named +none named +norm_pix_loss True"),
        (other_epsilon, r"architecture layer_norm_eps .*1e-05"),
    ],
)
def test_audit_refuses_and_writes_nothing(copy, change, row):
    paths = [copy / sensor / "checkpoints/samples-000000300" for sensor in SENSORS]
    rewrite(paths[1], change)
    config = MergeConfig(base=str(copy / "base"), checkpoints=[str(p) for p in paths], out=str(copy / "merged"))
    with pytest.raises(MergeError, match="1 difference") as caught:
        merge(config)
    assert re.search(row, str(caught.value))
    assert not list(copy.glob("*merged*"))


def test_all_differences_stand_in_one_table(copy):
    paths = [copy / sensor / "checkpoints/samples-000000300" for sensor in SENSORS]
    for path, change in zip(paths, (drop_key, reshape, halve)):
        rewrite(path, change)
    config = MergeConfig(base=str(copy / "base"), checkpoints=[str(p) for p in paths], out=str(copy / "merged"))
    with pytest.raises(MergeError, match=r"3 difference.*(?s:.*)cls_token(?s:.*)decoder_pred.bias(?s:.*)norm.weight"):
        merge(config)


def test_other_base_file_is_refused(copy):
    run_select(copy, epsilon=0.03)
    shutil.rmtree(copy / "base")
    write_weights(copy / "base", seed=5)
    with pytest.raises(MergeError, match="not the one that was selected"):
        merge(MergeConfig(selection=str(copy / "selection.yaml"), out=str(copy / "m")))
    with pytest.raises(MergeError, match="the base is not the one the runs started from"):
        run_select(copy, epsilon=0.03)


def test_damaged_parent_and_existing_output(copy):
    selection = str(run_select(copy, epsilon=0.03))
    (copy / "m").mkdir()
    with pytest.raises(DataError, match="the output exists already"):
        merge(MergeConfig(selection=selection, out=str(copy / "m")))
    target = copy / "CTX/checkpoints/samples-000000200/model.safetensors"
    raw = bytearray(target.read_bytes())
    raw[-1] ^= 1
    target.write_bytes(raw)
    with pytest.raises(CheckpointError, match="altered or damaged"):
        merge(MergeConfig(selection=selection, out=str(copy / "n")))
    assert not (copy / "n").exists()


def test_runs_that_do_not_belong_together(copy):
    with pytest.raises(MergeError, match="two runs are of one sensor"):
        run_select(copy, runs=[str(copy / "CTX"), str(copy / "CTX")])
    card = copy / "CTX/checkpoints/samples-000000300/card.json"
    fields = json.loads(card.read_text())
    fields["val_loss"]["protocol"] = "q" * 64
    card.write_text(json.dumps(fields))
    with pytest.raises(MergeError, match="validation losses are not comparable"):
        run_select(copy)
    fields["parents"][0]["sha256"] = "e" * 64
    card.write_text(json.dumps(fields))
    with pytest.raises(MergeError, match="do not start from one base"):
        run_select(copy)
    fields["sensors"].append({"name": "THEMIS"})
    card.write_text(json.dumps(fields))
    with pytest.raises(MergeError, match="not of one sensor"):
        run_select(copy)


def test_run_without_checkpoints(copy):
    shutil.rmtree(copy / "CTX/checkpoints")
    with pytest.raises(CheckpointError, match="the run has no checkpoints"):
        run_select(copy)
    with pytest.raises(CheckpointError, match="this is no run"):
        run_select(copy, runs=[str(copy), str(copy / "CTX")])
    assert not (copy / "selection.yaml").exists()


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


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SelectConfig(runs=["a"], out="s.yaml"), "too few runs"),
        (lambda: SelectConfig(runs=["a", "b"], out="s.json"), "a selection is a YAML file"),
        (lambda: SelectConfig(runs=["a", "b"], out="s.yaml", epsilon=-1), "epsilon is out of range"),
        (lambda: SelectConfig(runs=["a", "b"], out="s.yaml", rule="evk"), "did you mean 'evl'"),
        (lambda: MergeConfig(out="m"), "what to merge is not clear"),
        (lambda: MergeConfig(out="m", base="b", checkpoints=["a"]), "too little to merge"),
        (lambda: MergeConfig(out="m", selection="s", method="ties"), "method has an unknown value"),
    ],
)
def test_configuration_errors(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_merged_model_runs(copy):
    out = merge(MergeConfig(selection=str(run_select(copy, epsilon=0.03)), out=str(copy / "merged")))
    model = build_mae(PICO, seed=9)
    model.load_state_dict(load_weights(out)[0])
    image, valid, noise = torch.randn(2, 1, 32, 32), torch.ones(2, 32, 32, dtype=torch.bool), torch.rand(2, 16)
    assert torch.isfinite(model(image, valid, noise)).all()
