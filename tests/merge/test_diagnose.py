"""`momo merge diagnose` from files to page: what it measures, that it goes on after a kill, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from momo.config import load_config
from momo.errors import ConfigError, DataError, MergeError
from momo.merge.diagnose.diagnosing import DiagnoseConfig, diagnose
from momo.merge.diagnose.plots import colours, plot_cka, short_layer
from momo.pretrain.losses_of import LossMeter
from momo.pretrain.validating import ValidateConfig, validate
from momo.weights import load_card, load_weights, save_weights
from tests.conftest import write_corpus, write_weights
from tests.merge.runs_helper import write_run

SENSORS = ("HiRISE", "CTX", "THEMIS")
SMALL = ("samples=6", "points=3", "grid=3", "cka_samples=8", "batch_size=8")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Three checkpoints of one base, their mean, and a corpus of each sensor."""
    folder = tmp_path_factory.mktemp("world")
    write_weights(folder / "base")
    states = []
    for number, sensor in enumerate(SENSORS, start=1):
        write_corpus(folder / sensor.lower(), sensor=sensor, tiles=2, val=8, seed=number)
        write_run(folder / "runs" / sensor, folder / "base", sensor, [1.0], seed=number)
        states.append(load_weights(checkpoint(folder, sensor))[0])
    (folder / "merged").mkdir()
    mean = {name: sum(state[name] for state in states) / 3 for name in states[0]}
    card = dataclasses.replace(load_card(checkpoint(folder, "CTX")), kind="merged")
    save_weights(folder / "merged", mean, card)
    return folder


def checkpoint(world: Path, sensor: str) -> Path:
    return world / "runs" / sensor / "checkpoints" / "samples-000000100"


def job(world: Path, out: Path, *overrides: str, sensors=SENSORS, corpora=SENSORS, base: bool = True) -> DiagnoseConfig:
    given = [f"checkpoints=[{','.join(str(checkpoint(world, sensor)) for sensor in sensors)}]"]
    given += [f"base={world / 'base'}"] if base else []
    given += [f"corpora=[{','.join(str(world / sensor.lower()) for sensor in corpora)}]"]
    return load_config(DiagnoseConfig, None, [f"out={out}", *given, *SMALL, *overrides])


@pytest.fixture(scope="module")
def done(world, tmp_path_factory) -> Path:
    return diagnose(job(world, tmp_path_factory.mktemp("done") / "d", f"merged={world / 'merged'}"))


@pytest.fixture(scope="module")
def report(done) -> dict:
    return json.loads((done / "diagnosis.json").read_text())


# --- numbers ------------------------------------------------------------------------------------------------------


def test_losses_of_the_models_are_those_of_momo_validate(world, report):
    losses = report["losses"]
    assert losses["sensors"] == list(SENSORS) and list(report["models"]) == [*SENSORS, "base", "merged"]
    places = {"CTX": checkpoint(world, "CTX"), "merged": world / "merged", "base": world / "base"}
    corpora = ",".join(str(world / sensor.lower()) for sensor in SENSORS)
    for name, place in places.items():
        asked = [f"weights={place}", f"corpora=[{corpora}]", "samples=6", "batch_size=8"]
        (entry,) = validate(load_config(ValidateConfig, None, asked))["checkpoints"]
        for sensor in SENSORS:
            expected = {key: entry["val_loss"]["per_sensor"][sensor][key] for key in ("loss", "stderr", "count")}
            assert losses["models"][name][sensor] == expected


def test_lines_run_between_every_two_checkpoints(world, report):
    lines = report["losses"]["lines"]
    assert [(line["first"], line["second"]) for line in lines] == [
        ("HiRISE", "CTX"),
        ("HiRISE", "THEMIS"),
        ("CTX", "THEMIS"),
    ]
    line = lines[1]
    assert line["positions"] == [-0.25, 0.0, 0.5, 1.0, 1.25]
    assert line["losses"][1] == report["losses"]["models"]["HiRISE"]
    assert line["losses"][3] == report["losses"]["models"]["THEMIS"]
    first, second = (load_weights(checkpoint(world, sensor))[0] for sensor in ("HiRISE", "THEMIS"))
    half = {name: ((first[name].double() + second[name].double()) / 2).float() for name in first}
    card = load_card(checkpoint(world, "CTX"))
    meter = LossMeter.open(card, [str(world / "hirise")], 6, batch_size=8)
    assert line["losses"][2]["HiRISE"]["loss"] == pytest.approx(meter.losses(half)["HiRISE"].loss, rel=1e-6)
    values = [own["HiRISE"]["loss"] for own in line["losses"]]
    assert line["barrier"]["HiRISE"] == pytest.approx(max(0, values[2] - (values[1] + values[3]) / 2))


def test_the_plane_marks_every_model_and_tells_who_lies_off_it(report):
    plane = report["losses"]["plane"]
    assert plane["corners"] == list(SENSORS)
    marks = {mark["name"]: mark for mark in plane["marks"]}
    assert set(marks) == {*SENSORS, "base", "merged"}
    assert marks["merged"]["on_plane"] and not marks["base"]["on_plane"]
    # Independent drifts of one size: the base is as far from the plane as the height of their simplex says.
    norm = np.mean(report["task_vectors"]["overall"]["norm"])
    assert marks["base"]["distance"] == pytest.approx(norm / np.sqrt(3), rel=0.05)
    assert np.shape(plane["losses"]) == (3, 3) and len(plane["x"]) == len(plane["y"]) == 3


def test_task_vectors_and_features_are_there(report):
    overall = report["task_vectors"]["overall"]
    assert report["task_vectors"]["parents"] == list(SENSORS)
    assert overall["sign_conflict"] == pytest.approx(0.75, abs=0.01), "three unrelated directions"
    assert abs(overall["cosine"][0][1]) < 0.02
    cka = report["cka"]
    assert set(cka) == set(SENSORS) and cka["CTX"]["samples"] == 8
    own = cka["CTX"]["debiased"]["blocks.3"]
    assert own["CTX"]["CTX"] == pytest.approx(1) and own["CTX"]["base"] == own["base"]["CTX"] < 1
    assert report["notes"] == [] and report["synthetic"]


# --- what is written ----------------------------------------------------------------------------------------------


def test_the_page_is_whole_and_stands_alone(done):
    names = {path.name for path in done.iterdir()}
    assert names == {"report.html", "diagnosis.json", "task_vectors.png", "lines.png", "plane.png", "cka.png"}
    html = (done / "report.html").read_text()
    assert html.count("data:image/png;base64,") == 4 and "Synthetic data" in html
    assert not re.search(r'(src|href)="(?!data:)', html)
    for text in ("HiRISE - THEMIS", " off</td>", "on it</td>", "sha256"):
        assert text in html
    for name in ("task_vectors", "lines", "plane", "cka"):
        image = Image.open(done / f"{name}.png").convert("RGB")
        assert min(image.size) > 200 and len(image.getcolors(1 << 20)) > 50
    cache = done.with_name("d.losses.jsonl").read_text().splitlines()
    # Five models; one more than three positions on three lines less the ends; nine points of the grid.
    assert len(cache) == 5 + 3 * 3 + 9


def test_the_same_again_measures_nothing_and_gives_the_same_bytes(world, done, monkeypatch, tmp_path, capsys):
    shutil.copytree(done.parent, tmp_path / "copy")
    monkeypatch.setattr(LossMeter, "losses", lambda *_: pytest.fail("measured again"))
    out = tmp_path / "copy" / "d"
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.suffix == ".png"}
    diagnose(job(world, out, f"merged={world / 'merged'}", "overwrite=true"))
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.suffix == ".png"} == before
    told = capsys.readouterr().out
    assert "losses: 23 sets of weights x 18 tiles, 23 of them measured before" in told
    assert "sign conflict: 7" in told and "barrier HiRISE - CTX: HiRISE 0.0" in told


KILLED = """
import sys, time
from momo.config import load_config
from momo.merge.diagnose.diagnosing import DiagnoseConfig, diagnose
from momo.pretrain.losses_of import LossMeter
measured = LossMeter.losses
def slow(self, *given):
    time.sleep(0.25)
    return measured(self, *given)
LossMeter.losses = slow
diagnose(load_config(DiagnoseConfig, None, sys.argv[1:]))
"""


def test_a_killed_diagnosis_goes_on_where_it_was(world, done, tmp_path, monkeypatch):
    out, cache = tmp_path / "d", tmp_path / "d.losses.jsonl"
    config = job(world, out, f"merged={world / 'merged'}")
    given = [f"{key}={value if value is not None else 'null'}" for key, value in vars(config).items()]
    given = [text.replace("'", "").replace(" ", "") for text in given]
    process = subprocess.Popen([sys.executable, "-c", KILLED, *given], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (cache.is_file() and len(cache.read_text().splitlines()) >= 4):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = len(cache.read_text().splitlines())
    assert 4 <= kept < 23 and not out.exists()
    calls: list[int] = []
    measured = LossMeter.losses
    monkeypatch.setattr(LossMeter, "losses", lambda self, *given: calls.append(1) or measured(self, *given))
    diagnose(config)
    assert len(calls) == 23 - kept
    found, expected = (json.loads((folder / "diagnosis.json").read_text()) for folder in (out, done))
    assert found["losses"] == expected["losses"] and found["task_vectors"] == expected["task_vectors"]
    assert [path.name for path in tmp_path.glob(".*")] == [], "what the killed one left is gone"


# --- less than everything -----------------------------------------------------------------------------------------


def test_weights_alone_need_no_corpora(world, tmp_path):
    out = diagnose(job(world, tmp_path / "d", corpora=()))
    assert {path.name for path in out.iterdir()} == {"report.html", "diagnosis.json", "task_vectors.png"}
    report = json.loads((out / "diagnosis.json").read_text())
    assert report["losses"] is None and report["cka"] is None
    assert report["notes"] == ["No losses and no CKA: no corpora are given."]
    assert report["notes"][0] in (out / "report.html").read_text()


def test_two_checkpoints_and_the_base_span_the_plane(world, tmp_path):
    two = job(world, tmp_path / "d", "cka_samples=0", sensors=("CTX", "THEMIS"), corpora=("CTX",))
    report = json.loads((diagnose(two) / "diagnosis.json").read_text())
    assert report["losses"]["plane"]["corners"] == ["CTX", "THEMIS", "base"]
    assert all(mark["on_plane"] for mark in report["losses"]["plane"]["marks"]) and report["cka"] is None


def test_without_a_base_there_are_no_task_vectors(world, tmp_path):
    two = ("CTX", "THEMIS")
    config = job(world, tmp_path / "d", "points=0", "cka_samples=0", sensors=two, corpora=("CTX",), base=False)
    report = json.loads((diagnose(config) / "diagnosis.json").read_text())
    assert report["task_vectors"] is None and list(report["losses"]["models"]) == list(two)
    assert report["losses"]["lines"] == [] and report["losses"]["plane"] is None
    assert report["notes"] == [
        "No task vectors: they are differences from a base, and none is given.",
        "No plane: it needs three checkpoints, or two and a base.",
    ]


def test_the_encoder_alone_has_no_losses(world, tmp_path):
    report = json.loads((diagnose(job(world, tmp_path / "d", "scope=encoder")) / "diagnosis.json").read_text())
    assert report["notes"] == ["No losses: they need whole autoencoders (scope=encoder, encoder+decoder)."]
    assert not any(layer.startswith("decoder") for layer in report["task_vectors"]["layers"])
    assert report["losses"] is None and report["cka"] is not None


def test_losses_that_are_not_finite_are_shown_as_such(world, tmp_path):
    huge = tmp_path / "huge"
    huge.mkdir()
    tensors, card = load_weights(checkpoint(world, "CTX"))
    weight = tensors["decoder_pred.weight"]
    save_weights(huge, tensors | {"decoder_pred.weight": torch.sign(weight) * 1e30}, card)
    places = {"HiRISE": checkpoint(world, "HiRISE"), "huge": huge}
    given = [f"models.{name}={place}" for name, place in places.items()]
    given += [f"base={world / 'base'}", f"corpora=[{world / 'ctx'}]", f"out={tmp_path / 'd'}", *SMALL, "grid=0"]
    out = diagnose(load_config(DiagnoseConfig, None, given))
    report = json.loads((out / "diagnosis.json").read_text())
    assert report["losses"]["models"]["huge"] == {} and report["losses"]["lines"][0]["barrier"]["CTX"] is None
    assert "not finite" in (out / "report.html").read_text()


def test_too_small_a_corpus_has_no_cka(world, tmp_path):
    few = write_corpus(tmp_path / "few", tiles=2, val=3)
    config = job(world, tmp_path / "d", f"corpora=[{few}]", "points=0", "grid=0")
    assert json.loads((diagnose(config) / "diagnosis.json").read_text())["notes"] == [
        "No CKA on CTX: 3 val tile(s), 4 are needed."
    ]


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("samples=0", r"samples is out of range: 0\."),
        ("points=1", r"points is out of range: 1\. Rule: 0 for none, else 2 or more"),
        ("grid=1", r"grid is out of range: 1\. Rule: 0 for none, else 2 or more"),
        ("cka_samples=3", r"cka_samples is out of range: 3\. Rule: 0 for none, else 4 or more"),
        ("scope=head", "scope has an unknown value: 'head'"),
        ("plane=[CTX,CTX,base]", r"plane cannot be read: .*three different names"),
        ("point=3", "unknown configuration key: point "),
    ],
)
def test_impossible_options_are_refused(world, tmp_path, override, message):
    with pytest.raises(ConfigError, match=message):
        job(world, tmp_path / "d", override)


def test_an_existing_folder_is_kept(world, done):
    with pytest.raises(DataError, match=r"the output exists already: .*/d\."):
        diagnose(job(world, done))


def test_a_plane_of_unknown_models_is_refused(world, tmp_path):
    with pytest.raises(ConfigError, match=r"plane names a model that is not there: Moon\. Rule: three of HiRISE, CTX"):
        diagnose(job(world, tmp_path / "d", "plane=[CTX,HiRISE,Moon]", corpora=("CTX",)))
    assert not (tmp_path / "d").exists()


def test_a_merge_that_does_not_fit_is_refused(world, tmp_path):
    tensors, card = load_weights(world / "merged")
    (tmp_path / "w").mkdir()
    save_weights(tmp_path / "w", {name: t for name, t in tensors.items() if not name.startswith("decoder")}, card)
    with pytest.raises(MergeError, match=r"merged weights do not fit .*decoder_blocks.*is missing.*scope=encoder"):
        diagnose(job(world, tmp_path / "d", f"merged={tmp_path / 'w'}"))
    given = [f"models.merged={checkpoint(world, 'CTX')}", f"models.b={checkpoint(world, 'THEMIS')}"]
    config = load_config(DiagnoseConfig, None, [*given, f"out={tmp_path / 'd'}", f"merged={world / 'merged'}"])
    with pytest.raises(MergeError, match="a checkpoint has a name with another meaning: merged"):
        diagnose(config)


# --- drawing ------------------------------------------------------------------------------------------------------


def test_names_get_different_colours_and_short_ticks():
    known = colours(["CTX", "a", "b", "HiRISE"])
    assert len(set(known.values())) == 4 and known["CTX"] == "#0072B2"
    assert [short_layer(x) for x in ("blocks.3", "decoder_blocks.11", "norm")] == ["3", "d11", "norm"]


def test_cka_without_a_value_is_drawn():
    found = {"debiased": {"blocks.0": {"a": {"a": None, "b": None}, "b": {"a": None, "b": 1.0}}}, "samples": 4}
    assert plot_cka({"CTX": found}).startswith(b"\x89PNG")
