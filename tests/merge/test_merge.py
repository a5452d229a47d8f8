"""`momo merge` on hand-made runs: results, cards, the audit, and what it refuses."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from momo.cli import main
from momo.errors import CheckpointError, ConfigError, DataError, MergeError
from momo.merge import METHODS, MergeConfig, SelectConfig, make_plan, merge, select
from momo.models import build_mae
from momo.weights import load_card, load_weights, save_weights
from tests.conftest import PICO, write_weights
from tests.merge.runs_helper import SENSORS

DOCS = Path(__file__).parents[2] / "docs"


def run_select(root):
    runs = [str(root / sensor) for sensor in SENSORS]
    return select(SelectConfig(runs=runs, out=str(root / "selection.yaml"), epsilon=0.03))


def by_hand(root, **options):
    """A merge of the last checkpoints."""
    paths = [str(root / sensor / "checkpoints/samples-000000300") for sensor in SENSORS]
    return MergeConfig(**({"base": str(root / "base"), "checkpoints": paths, "out": str(root / "merged")} | options))


def tensors_of(root, *, samples=300):
    base = load_weights(root / "base")[0]
    return base, {s: load_weights(root / s / f"checkpoints/samples-{samples:09d}")[0] for s in SENSORS}


def test_merge_of_a_selection(copy):
    out = merge(MergeConfig(selection=str(run_select(copy)), out=str(copy / "merged")))
    merged, card = load_weights(out)
    base, base_card = load_weights(copy / "base")
    chosen = {s: copy / s / "checkpoints" / f"samples-{n:09d}" for s, n in zip(SENSORS, (200, 200, 300), strict=True)}
    tuned = [load_weights(path)[0] for path in chosen.values()]
    assert merged.keys() == base.keys()
    for name, start in base.items():
        expected = start.double() + 0.5 * sum(t[name].double() - start.double() for t in tuned)
        torch.testing.assert_close(merged[name].double(), expected, atol=2e-6, rtol=0)
    assert card.method == {
        "name": "task_arithmetic",
        "reference": "arXiv 2212.04089",
        "precision": "fp32",
        "coefficient": 0.5,
    }
    assert [(p["role"], p["name"]) for p in card.parents] == [
        ("base", "base"),
        ("checkpoint", "CTX"),
        ("checkpoint", "HiRISE"),
        ("checkpoint", "THEMIS"),
    ]
    assert card.parents[0]["sha256"] == base_card.sha256
    assert {s["name"] for s in card.sensors} == set(SENSORS) and card.synthetic
    assert set(card.data_fingerprints) == set(SENSORS) and card.contents == ["encoder", "decoder"]


def test_merged_model_runs(copy):
    out = merge(by_hand(copy))
    model = build_mae(PICO, seed=9)
    model.load_state_dict(load_weights(out)[0])
    image, valid, noise = torch.randn(2, 1, 32, 32), torch.ones(2, 32, 32, dtype=torch.bool), torch.rand(2, 16)
    assert torch.isfinite(model(image, valid, noise)).all()


def test_order_of_checkpoints_does_not_change_a_bit(copy):
    paths = by_hand(copy).checkpoints
    hashes = {
        load_card(merge(by_hand(copy, checkpoints=order, out=str(copy / f"m{n}")))).sha256
        for n, order in enumerate((paths, paths[::-1], paths[1:] + paths[:1]))
    }
    assert len(hashes) == 1


def test_factors_of_sensors_and_layers_multiply(copy):
    merge(by_hand(copy, coefficient=0.4, coefficients={"CTX": 0.1}, layers={"blocks.*": 2.0, "blocks.1.*": 3.0}))
    merged, card = load_weights(copy / "merged")
    base, tuned = tensors_of(copy)
    for name, layer in (("norm.weight", 1.0), ("blocks.0.mlp.fc1.weight", 2.0), ("blocks.1.mlp.fc1.weight", 3.0)):
        expected = base[name].double()
        for sensor, factor in (("HiRISE", 0.4), ("CTX", 0.1), ("THEMIS", 0.4)):
            expected = expected + factor * layer * (tuned[sensor][name].double() - base[name].double())
        torch.testing.assert_close(merged[name].double(), expected, atol=2e-6, rtol=0)
    assert card.method["coefficients"] == {"CTX": 0.1, "HiRISE": 0.4, "THEMIS": 0.4}
    assert card.method["layers"] == {"blocks.*": 2.0, "blocks.1.*": 3.0}


def test_a_yaml_with_layers(copy):
    merge(by_hand(copy, layers={"blocks.0.*": 0.0}, out=str(copy / "by_python")))
    fields = {"base": str(copy / "base"), "checkpoints": by_hand(copy).checkpoints, "layers": {"blocks.0.*": 0.0}}
    (copy / "merge.yaml").write_text(yaml.safe_dump(fields))
    assert main(["merge", "--config", str(copy / "merge.yaml"), f"out={copy / 'by_yaml'}"]) == 0
    assert load_card(copy / "by_yaml").sha256 == load_card(copy / "by_python").sha256


@pytest.mark.parametrize(("scope", "merged_part"), [("encoder", False), ("decoder", True)])
def test_scope_takes_the_rest_from_the_base_and_lists_it(copy, scope, merged_part, capsys):
    merge(by_hand(copy, scope=scope))
    merged, card = load_weights(copy / "merged")
    base, _ = tensors_of(copy)
    whole = load_weights(merge(by_hand(copy, out=str(copy / "whole"))))[0]
    assert merged.keys() == base.keys()
    for name, tensor in merged.items():
        in_decoder = name.startswith("decoder") or name == "mask_token"
        assert torch.equal(tensor, (whole if in_decoder == merged_part else base)[name])
        assert (name in card.method["taken_over"]) == (in_decoder != merged_part)
    assert set(card.method["taken_over"].values()) == {"base"}
    assert "not merged, from base: " in capsys.readouterr().out


def test_rest_may_come_from_a_checkpoint_or_be_dropped(copy):
    merge(by_hand(copy, exclude=["norm.*"], rest="CTX"))
    merged, card = load_weights(copy / "merged")
    _, tuned = tensors_of(copy)
    assert torch.equal(merged["norm.weight"], tuned["CTX"]["norm.weight"])
    assert card.method["taken_over"] == {"norm.bias": "CTX", "norm.weight": "CTX"}
    merge(by_hand(copy, scope="encoder", rest="drop", out=str(copy / "encoder")))
    encoder, card = load_weights(copy / "encoder")
    assert not [name for name in encoder if name.startswith("decoder")]
    assert card.contents == ["encoder"] and "decoder_pred.weight" in card.method["dropped"]


def test_include_merges_only_what_it_names(copy):
    plan = make_plan(by_hand(copy, include=["blocks.*.attn.*"], exclude=["*.bias"]))
    assert plan.merged and all(".attn." in name and not name.endswith("bias") for name in plan.merged)
    assert len(plan.merged) + len(plan.rest) == len(load_weights(copy / "base")[0])


@pytest.mark.parametrize("method", ["average", "weighted_average"])
def test_averages_need_no_base(copy, method):
    merge(by_hand(copy, base=None, method=method))
    merged, card = load_weights(copy / "merged")
    _, tuned = tensors_of(copy)
    for name, tensor in merged.items():
        expected = sum(parent[name].double() for parent in tuned.values()) / 3
        torch.testing.assert_close(tensor.double(), expected, atol=2e-6, rtol=0)
    assert [parent["role"] for parent in card.parents] == ["checkpoint"] * 3


def test_dry_run_prints_the_plan_and_writes_nothing(copy, capsys):
    before = sorted(copy.rglob("*"))
    assert merge(by_hand(copy, dry_run=True, out="")) is None
    printed = capsys.readouterr().out
    tensors = len(load_weights(copy / "base")[0])
    assert f"task_arithmetic (arXiv 2212.04089): {tensors} tensors of 3 checkpoints" in printed
    assert "factor 0.5" in printed and re.search(r"result [\d.]+ MB, memory for tensors about [\d.]+ MB", printed)
    assert sorted(copy.rglob("*")) == before


def test_licences_are_joined(copy):
    rewrite(copy / "CTX/checkpoints/samples-000000300", lambda tensors, card: setattr(card, "licence", "MIT"))
    assert load_card(merge(by_hand(copy))).licence == "CC-BY-4.0 AND MIT"


# --- the audit ------------------------------------------------------------------------------------------------------


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
    run_select(copy)
    shutil.rmtree(copy / "base")
    write_weights(copy / "base", seed=5)
    with pytest.raises(MergeError, match="not the one that was selected"):
        merge(MergeConfig(selection=str(copy / "selection.yaml"), out=str(copy / "m")))
    with pytest.raises(MergeError, match="sha256 of the base"):
        merge(by_hand(copy))


def test_another_checkpoint_in_the_place_of_the_selected_is_refused(copy):
    run_select(copy)
    chosen = copy / "CTX/checkpoints/samples-000000200"
    shutil.rmtree(chosen)
    shutil.copytree(copy / "CTX/checkpoints/samples-000000300", chosen)
    with pytest.raises(MergeError, match="not the one that was selected: CTX: .*samples-000000200.*momo select again"):
        merge(MergeConfig(selection=str(copy / "selection.yaml"), out=str(copy / "m")))
    assert not (copy / "m").exists()


def test_a_selection_without_a_hash_is_refused(copy):
    fields = yaml.safe_load(run_select(copy).read_text())
    fields["sensors"]["CTX"]["sha256"] = ""
    (copy / "selection.yaml").write_text(yaml.safe_dump(fields))
    with pytest.raises(MergeError, match="does not say which weights were selected: CTX: .*momo select again"):
        merge(MergeConfig(selection=str(copy / "selection.yaml"), out=str(copy / "m")))


def test_verify_finds_altered_bytes(copy):
    target = copy / "CTX/checkpoints/samples-000000300/model.safetensors"
    raw = bytearray(target.read_bytes())
    raw[-1] ^= 1
    target.write_bytes(raw)
    with pytest.raises(CheckpointError, match="altered or damaged"):
        merge(by_hand(copy, verify=True))
    assert not (copy / "merged").exists()


def test_an_existing_output_is_replaced_only_when_told(copy):
    merge(by_hand(copy))
    before = load_card(copy / "merged").sha256
    with pytest.raises(DataError, match="the output exists already: .*merged. .*add --overwrite"):
        merge(by_hand(copy, coefficient=0.1))
    assert load_card(copy / "merged", check_hash=True).sha256 == before
    merge(by_hand(copy, coefficient=0.1, overwrite=True))
    assert load_card(copy / "merged", check_hash=True).sha256 != before


@pytest.mark.parametrize("place", ["MOC/checkpoints", "docs", "CTX", "foreign"])
def test_nothing_but_a_merge_is_replaced(copy, place):
    out = copy / place.replace("MOC", SENSORS[1])
    if not out.exists():
        merge(by_hand(copy, out=str(out)))
    if place == "docs":
        (out / "thesis.txt").write_text("years of work")
    if place == "foreign":
        card = load_card(out)
        card.kind = "checkpoint"
        save_weights(out, load_weights(out)[0], card)
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    with pytest.raises((DataError, MergeError), match="the output is"):
        merge(by_hand(copy, out=str(out), overwrite=True))
    assert before == {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}


@pytest.mark.parametrize("inside", ["", "inner"])
def test_an_input_is_never_written_to(copy, inside):
    merge(by_hand(copy))
    again = by_hand(copy, out=str(copy / "merged" / inside), overwrite=True)
    again.checkpoints[0] = str(copy / "merged")
    with pytest.raises(MergeError, match="the output is or lies in an input of the merge: out=.*, .* is .*merged"):
        merge(again)
    assert not (copy / "merged/inner").exists() and load_card(copy / "merged", check_hash=True)


def test_equal_checkpoints_are_told(copy, capsys):
    given = by_hand(copy).checkpoints
    merge(by_hand(copy, checkpoints=[], models={"a": given[0], "b": given[1], "c": given[0]}, dry_run=True))
    assert "WARNING: a and c are the same file" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rest": "MOC"}, "rest names no parent of this merge: MOC"),
        ({"layers": {"blocks.9.*": 0.5}}, r"layers names layers that are not there: blocks.9.\*"),
        ({"include": ["encoder.*"]}, "include names layers that are not there"),
        ({"exclude": ["*"]}, "nothing is left to merge"),
        ({"coefficients": {"MOC": 0.5}}, "coefficients names a checkpoint that is not merged: MOC"),
        ({"exclude": ["norm.*"], "rest": "MOC"}, "rest names no parent of this merge: MOC"),
        ({"method": "slerp"}, "wrong number of checkpoints for this method: 3"),
        ({"models": {"base": "CTX"}}, "two parents of the merge have one name: base"),
    ],
)
def test_options_that_name_what_is_not_there(copy, options, message):
    if "models" in options:
        names = {"base": by_hand(copy).checkpoints[0], "b": by_hand(copy).checkpoints[1]}
        options = {"models": names, "checkpoints": []}
    with pytest.raises(MergeError, match=message):
        merge(by_hand(copy, **options))
    assert not (copy / "merged").exists()


BOTH = {"base": "b", "checkpoints": ["a", "c"]}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "what to merge is not clear"),
        ({"base": "b", "checkpoints": ["a"]}, "too little to merge"),
        ({**BOTH, "models": {"x": "a", "y": "c"}}, "checkpoints are given twice"),
        ({"checkpoints": ["a", "c"]}, "the base is missing"),
        ({**BOTH, "out": ""}, "a required key has no value: out"),
        ({"selection": "s", "method": "tie"}, "method has an unknown value: 'tie'.*did you mean 'ties'"),
        ({**BOTH, "scope": "head"}, "scope has an unknown value"),
        ({**BOTH, "trim": "layer"}, "trim has an unknown value"),
        ({**BOTH, "precision": "fp16"}, "precision has an unknown value"),
        ({**BOTH, "dtype": "int8"}, "dtype has an unknown value"),
        ({**BOTH, "coefficient": float("nan")}, "coefficient is no number"),
        ({**BOTH, "layers": {"norm.*": float("inf")}}, "layers.norm.* is no number"),
        ({**BOTH, "method": "ties", "density": 0.0}, "density is out of range: 0.0"),
        ({**BOTH, "method": "breadcrumbs", "outliers": 1.0}, "outliers is out of range"),
        ({**BOTH, "ramp": [0.1]}, "ramp cannot be read"),
        ({**BOTH, "ramp": [0.1, 0.5], "layers": {"norm.*": 0.5}}, "both ramp and layers are given"),
        ({**BOTH, "method": "model_stock", "coefficient": 0.5}, "model_stock takes no coefficients"),
        ({**BOTH, "density": 0.5}, "task_arithmetic takes no density"),
        ({**BOTH, "fisher": {"a": "f"}}, "task_arithmetic takes no fisher"),
        ({**BOTH, "seed": 1}, "task_arithmetic takes no seed: .*seed is for dare"),
        ({**BOTH, "outliers": 0.1}, "task_arithmetic takes no outliers: .*outliers is for breadcrumbs"),
        ({**BOTH, "method": "fisher"}, "the Fisher files are missing"),
    ],
)
def test_configuration_errors(fields, message):
    with pytest.raises(ConfigError, match=message):
        MergeConfig(**({"out": "m"} | fields))


# --- the documentation ----------------------------------------------------------------------------------------------


def test_the_documented_example_runs(copy, monkeypatch, capsys):
    monkeypatch.chdir(copy)
    for name, sensor in (("ctx", "CTX"), ("themis", "THEMIS")):
        shutil.copytree(copy / sensor / "checkpoints/samples-000000300", copy / "weights" / name)
    shutil.copytree(copy / "base", copy / "weights/base")
    text = (DOCS / "merging.md").read_text()
    exec(compile(text.split("```python\n")[1].split("```")[0], "merging.md", "exec"), {})
    assert load_card(copy / "weights/merged").method["coefficient"] == 0.5
    assert "tensor(" in capsys.readouterr().out


def test_every_method_is_documented():
    text = (DOCS / "merging.md").read_text()
    assert not [name for name in METHODS if f"`{name}`" not in text]
