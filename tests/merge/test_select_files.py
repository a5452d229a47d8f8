"""`momo select` over curves from CSV and JSON files."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import warnings

import pytest
import torch
from safetensors.torch import save_file

from momo.errors import CheckpointError, MergeError
from momo.files import sha256_file
from momo.merge.selecting.choose import select
from momo.merge.selecting.config import SelectConfig
from momo.merge.selecting.curves import read_curve
from momo.merge.selecting.plot import curve_styles
from momo.merge.selection import read_selection
from momo.sensors import sensor_colour
from tests.conftest import write_weights
from tests.merge.runs_helper import write_run

HEADER = "checkpoint,samples,val_loss,val_stderr\n"


@pytest.fixture
def world(tmp_path):
    """Two curves as CSV, with a base and checkpoints that have no cards."""
    for name in ("base", "a1", "a2", "a3", "b1", "b2"):
        save_file({"w": torch.full((2,), float(len(os.listdir(tmp_path))))}, tmp_path / f"{name}.safetensors")
    (tmp_path / "ctx.csv").write_text(
        HEADER + "a1.safetensors,100,0.9,0.01\na2.safetensors,200,0.6,0.01\na3.safetensors,1000,0.4,0.01\n"
    )
    (tmp_path / "Kaguya.csv").write_text(HEADER + "b1.safetensors,100,0.62,0.02\nb2.safetensors,200,0.5,0.02\n")
    return tmp_path


def run_select(world, **options):
    given = {
        "runs": [str(world / "ctx.csv"), str(world / "Kaguya.csv")],
        "out": str(world / "selection.yaml"),
        "base": str(world / "base.safetensors"),
        "allow": ["unknown_protocol", "unknown_base"],
    }
    return read_selection(select(SelectConfig(**given | options)))


def picks(selection):
    return {name: chosen.samples for name, chosen in selection.sensors.items()}


def test_csv_files_are_selected_from(world):
    selection = run_select(world, epsilon=0.03)
    assert picks(selection) == {"CTX": 200, "Kaguya": 100}  # momo's own sensors first, in their spelling
    chosen = selection.sensors["CTX"]
    assert chosen.sha256 == sha256_file(world / "a2.safetensors") and chosen.val_stderr == 0.01
    assert os.path.samefile(chosen.checkpoint, world / "a2.safetensors")
    assert os.path.samefile(chosen.run, world / "ctx.csv")
    assert selection.base["sha256"] == sha256_file(world / "base.safetensors")
    assert sum(note.startswith("ALLOWED unknown_") for note in selection.notes) == 2


def test_distance_in_steps_counts_checkpoints(world):
    # CTX stops early at 1000 samples, its third checkpoint; Kaguya at 200, its second.
    # (a2, b1) and (a3, b2) agree within 0.1; the second has D = 0.
    assert run_select(world, epsilon=0.1).distance == 0
    samples, steps = (run_select(world, epsilon=0.03, distance=unit) for unit in ("samples", "steps"))
    assert (samples.distance, samples.distance_unit) == ((800 + 100) / 2, "samples")
    assert (steps.distance, steps.distance_unit) == ((1 + 1) / 2, "steps")


def test_unit_of_distance_can_change_the_pick(world):
    # Early stopping: CTX at 1000 (third), Kaguya at 500 (fourth). Agreeing: (second, fourth) and (third, first).
    (world / "Kaguya.csv").write_text(
        HEADER + "b1.safetensors,100,0.41,\nb1.safetensors,200,0.8,\nb2.safetensors,300,0.8,\nb2.safetensors,500,0.2,\n"
    )
    (world / "ctx.csv").write_text(
        HEADER
        + "a1.safetensors,100,0.9,\na2.safetensors,200,0.21,\na3.safetensors,1000,0.4,\na3.safetensors,1900,0.1,\n"
    )
    # CTX stops early at 1900 (fourth). In samples: (200, 500) costs 1700, (1000, 100) 900 + 400; in steps 2 and 1 + 3.
    assert picks(run_select(world, epsilon=0.02)) == {"CTX": 1000, "Kaguya": 100}
    assert picks(run_select(world, epsilon=0.02, distance="steps")) == {"CTX": 200, "Kaguya": 500}


def test_json_files_tell_what_is_known(world):
    rows = [{"checkpoint": "b1.safetensors", "samples": 100, "val_loss": 0.62, "val_stderr": None},
            {"checkpoint": "b2.safetensors", "samples": 200, "val_loss": 0.5}]  # fmt: skip
    base = {"path": "base.safetensors", "sha256": sha256_file(world / "base.safetensors")}
    for stem, sensor in (("x", "MOC"), ("y", "THEMIS")):
        fields = {"sensor": sensor, "base": base, "protocol": "p", "checkpoints": rows}
        (world / f"{stem}.json").write_text(json.dumps(fields))
    runs = [str(world / "x.json"), str(world / "y.json")]
    selection = run_select(world, runs=runs, base=None, allow=[], epsilon=0.01)
    assert picks(selection) == {"THEMIS": 200, "MOC": 200} and selection.notes == []
    assert os.path.samefile(selection.base["path"], world / "base.safetensors")
    (world / "x.json").write_text(json.dumps(rows))
    assert read_curve(world / "x.json").sensor == "x"
    assert [point.stderr for point in read_curve(world / "x.json").points] == [None, None]


def test_curve_of_a_run_as_a_file_gives_the_same_selection(tmp_path):
    base = write_weights(tmp_path / "base")
    losses = {"HiRISE": [0.9, 0.6, 0.4], "CTX": [0.8, 0.62, 0.5]}
    for seed, (sensor, values) in enumerate(losses.items()):
        run = write_run(tmp_path / sensor, base, sensor, values, seed=seed)
        rows = [f"{run.name}/checkpoints/samples-{100 * n:09d},{100 * n},{v},0.01" for n, v in enumerate(values, 1)]
        (tmp_path / f"{sensor}.csv").write_text("\n".join([HEADER.strip(), *reversed(rows)]) + "\n\n")
    by_run = run_select(tmp_path, runs=[str(tmp_path / name) for name in losses], base=str(base), allow=[])
    by_file = run_select(tmp_path, runs=[str(tmp_path / f"{name}.csv") for name in losses], base=str(base))
    for name in losses:
        one, other = by_run.sensors[name], by_file.sensors[name]
        assert (one.sha256, one.samples, one.val_loss) == (other.sha256, other.samples, other.val_loss)
    assert (by_run.epsilon, by_run.distance, by_run.sweep) == (by_file.epsilon, by_file.distance, by_file.sweep)
    mixed = run_select(tmp_path, runs=[str(tmp_path / "HiRISE"), str(tmp_path / "CTX.csv")], base=None)
    assert picks(mixed) == picks(by_run) and any("no protocol for CTX." in note for note in mixed.notes)


def test_long_curves_show_the_ranges_around_the_epsilon_used(world, capsys):
    rng = random.Random(2)
    for name, lift in (("ctx", 0.0), ("Kaguya", 0.03)):
        rows = [
            f"a1.safetensors,{100 * n},{0.3 + lift + 0.5 / (1 + n / 9) + rng.gauss(0, 0.002)},0.004"
            for n in range(1, 120)
        ]
        (world / f"{name}.csv").write_text(HEADER + "\n".join(rows))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns when a layout cannot be made
        for options in ({}, {"smoothing": "isotonic"}, {"epsilon": 0.5}, {"epsilon": 0}, {"rule": "last"}):
            selection = run_select(world, **options)
            assert 30_000 < (world / "selection.png").stat().st_size < 300_000
            used = [entry for entry in selection.sweep if entry["low"] <= selection.epsilon]
            assert len(selection.sweep) == (0 if options.get("rule") else 12)
            expected = {name: chosen.samples for name, chosen in selection.sensors.items()}
            assert not selection.sweep or (used and used[-1]["samples"] == expected)
    assert re.search(r"what other epsilons pick \(12 of \d\d ranges", capsys.readouterr().out)


def test_runs_are_told_apart_in_the_plot(world):
    ctx, moc = read_curve(world / "ctx.csv", "one"), read_curve(world / "Kaguya.csv")
    other = dataclasses.replace(moc, name="x", sensor="MOC")
    styles = curve_styles([ctx, dataclasses.replace(ctx, name="two"), moc, other])
    assert len({(style["color"], style["ls"]) for style in styles}) == 4
    assert styles[0]["color"] == styles[1]["color"] == sensor_colour("CTX")


def test_what_is_not_known_must_be_let_through_by_name(world):
    with pytest.raises(MergeError, match=r"not known whether the runs start from one base: no base for CTX, Kaguya"):
        run_select(world, allow=[])
    with pytest.raises(
        MergeError, match=r"losses are comparable: no protocol for CTX, Kaguya.*allow=.unknown_protocol."
    ):
        run_select(world, allow=["unknown_base"])
    with pytest.raises(MergeError, match="no run names the place of its base.*give base="):
        run_select(world, base=None)


def test_missing_checkpoint(world):
    (world / "a2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"a chosen checkpoint is not there: .*a2.*allow=.missing_checkpoint."):
        run_select(world, epsilon=0.03)
    assert not (world / "selection.yaml").exists()
    allow = ["unknown_protocol", "unknown_base", "missing_checkpoint"]
    selection = run_select(world, epsilon=0.03, allow=allow)
    assert selection.sensors["CTX"].sha256 == "" and selection.notes[-1].startswith("ALLOWED missing_checkpoint")


def test_other_columns_are_left_out_and_named(world):
    text = "epoch," + (world / "ctx.csv").read_text().replace("\na", "\n1,a")
    (world / "ctx.csv").write_text("\ufeff" + text, encoding="utf-8")
    selection = run_select(world, epsilon=0.03)
    assert picks(selection)["CTX"] == 200 and "ctx.csv: columns left out: epoch." in selection.notes


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("a,200,x,0.1", "line 4: val_loss 'x' is no finite number"),
        ("a,200,nan,0.1", "line 4: val_loss 'nan' is no finite number"),
        ("a,200,1e999,", "line 4: val_loss '1e999' is no finite number"),
        ("a,200,,", "line 4: val_loss '' is no finite number"),
        ("a,2.5,0.5,", "line 4: samples '2.5' is no whole number of 1 or more"),
        ("a,0,0.5,", "line 4: samples '0' is no whole number"),
        ("a,200,0.5,-1", "line 4: val_stderr '-1' is below 0"),
        ("a,200,0.5,inf", "line 4: val_stderr 'inf' is no finite number"),
        (",200,0.5,", "line 4: checkpoint '' is no path"),
        ("a,100,0.5,", "line 4: samples 100 stand in line 2 too"),
        ("a,200,0.5", "line 4: 3 cells, not 4"),
        ('a,200,"0.5,', "line 4: unexpected end of data"),
        ("a,x,0.5,\na,y,0.5,", "line 4: samples 'x' .*; line 5: samples 'y'"),
        ("a,x,0.5,\na,2", "line 4: samples 'x' .*; line 5: 2 cells, not 4"),
        (
            "a,x,0.5,\n" * 11,
            "line 4: .*line 11: samples 'x' is no finite number; the like in line 12, line 13, line 14",
        ),
    ],
)
def test_damaged_rows_are_named_by_line(tmp_path, row, message):
    path = tmp_path / "ctx.csv"
    path.write_text(f"{HEADER}a,100,0.5,0.1\n\n{row}\n")
    with pytest.raises(MergeError, match=f"a curve file has damaged rows: .*ctx.csv: {message}"):
        read_curve(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the header of a curve file does not fit: .*empty file.*add checkpoint, samples, val_loss"),
        ("checkpoint,samples\na,1\n", "the header of a curve file does not fit: .*add val_loss"),
        ("samples," + HEADER, "keep one column samples"),
        (HEADER, "the curve file holds no checkpoint"),
        (b"\xff\xfe\x00", "the curve file cannot be read: .*utf-8"),
    ],
)
def test_unusable_csv(tmp_path, text, message):
    path = tmp_path / "ctx.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(MergeError, match=message):
        read_curve(path)


GOOD = {"checkpoint": "a", "samples": 1, "val_loss": 0.5}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{", "the curve file cannot be read"),
        ("[" * 100_000, "the curve file cannot be read"),
        ("3", "the curve file has another layout: .*no list of checkpoints"),
        ({"checkpoints": [GOOD], "sensors": "CTX"}, "another layout: .*unknown keys sensors"),
        ([], "the curve file holds no checkpoint"),
        ([3], "damaged rows: .*entry 1: is int, not an object"),
        ([GOOD, {"samples": 1}], "damaged rows: .*entry 2: lacks checkpoint, val_loss"),
        ([GOOD | {"val_loss": True}], "entry 1: val_loss True is no finite number"),
        ([GOOD | {"val_loss": [1]}], r"entry 1: val_loss \[1\] is no finite number"),
        ([GOOD | {"samples": 10**400}], "entry 1: samples 1000.* is no finite number"),
        ([GOOD | {"checkpoint": 5}], "entry 1: checkpoint 5 is no path"),
        ({"checkpoints": [GOOD], "protocol": 5}, "a key of the curve file does not fit: .*protocol 5"),
        ({"checkpoints": [GOOD], "base": {"sha": "a"}}, "a key of the curve file does not fit: .*base"),
        ({"checkpoints": [GOOD], "base": {"path": 5}}, "a key of the curve file does not fit: .*base"),
        ({"checkpoints": [GOOD], "base": "b"}, "a key of the curve file does not fit: .*base 'b'"),
    ],
)
def test_unusable_json(tmp_path, value, message):
    path = tmp_path / "ctx.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    with pytest.raises(MergeError, match=message):
        read_curve(path)


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(MergeError, match="the curve file does not exist: .*none.csv"):
        read_curve(tmp_path / "none.csv")
    with pytest.raises(CheckpointError, match="this is no run"):
        read_curve(tmp_path / "none")


def test_an_older_selection_is_replaced_and_nothing_else(world):
    run_select(world, epsilon=0.03)
    assert run_select(world, epsilon=0.5).epsilon_requested == 0.5
    (world / "mine.yaml").write_text("user: file\n")
    (world / "other.png").write_bytes(b"mine")
    (world / "folder.yaml").mkdir()
    (world / "link.yaml").symlink_to("nowhere.yaml")
    before = sorted(world.rglob("*"))
    for name in ("mine.yaml", "other.yaml", "folder.yaml", "link.yaml"):
        with pytest.raises(MergeError, match="the output is something else than an older selection: .*remove it your"):
            run_select(world, out=str(world / name))
    assert sorted(world.rglob("*")) == before
    assert (world / "mine.yaml").read_text() == "user: file\n" and (world / "other.png").read_bytes() == b"mine"
