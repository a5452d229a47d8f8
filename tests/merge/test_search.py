from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from momo.config import config_from_dict, load_config
from momo.corpus import Corpus
from momo.errors import ConfigError, DataError, MergeError
from momo.merge import MergeConfig, make_plan, merge, merged_state
from momo.merge.search.config import SearchConfig
from momo.merge.search.log import Trial, TrialLog
from momo.merge.search.losses import Bench, split_halves
from momo.merge.search.report import gain_lines
from momo.merge.search.searching import best_trial, search
from momo.merge.search.space import Point, Space, depth_groups
from momo.models import build_mae, load_mae
from momo.models.masking import mask_noise, sample_rng
from momo.normalise import Normalisation
from momo.weights import Card, load_weights, save_weights
from tests.conftest import PICO, write_corpus, write_weights

SENSORS = {"HiRISE": 1, "CTX": 2}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Two checkpoints of one base: all went the same good way with different noise, so that merging helps."""
    root = tmp_path_factory.mktemp("search")
    base = write_weights(root / "base")
    base_sha = load_weights(base)[1].sha256
    start = build_mae(PICO, seed=0).state_dict()
    shared = torch.Generator().manual_seed(5)
    common = {name: 0.02 * torch.randn(tensor.shape, generator=shared) for name, tensor in start.items()}
    for sensor, seed in SENSORS.items():
        corpus = write_corpus(root / "corpora" / sensor, sensor=sensor, tiles=4, val=24, seed=seed)
        noise = torch.Generator().manual_seed(seed)
        tensors = {
            name: tensor
            + (0 if "pos_embed" in name else common[name] + 0.02 * torch.randn(tensor.shape, generator=noise))
            for name, tensor in start.items()
        }
        card = Card(
            kind="checkpoint",
            architecture=PICO.to_dict(),
            contents=["encoder", "decoder"],
            normalisation=Normalisation().to_dict(),
            sensors=[{"name": sensor, "tiles": 4}],
            data_fingerprints={sensor: Corpus(corpus).manifest.fingerprint},
            parents=[{"role": "base", "name": "base", "sha256": base_sha}],
            samples=100,
            synthetic=True,
        )
        (root / sensor).mkdir()
        save_weights(root / sensor, tensors, card)
    return root


def keys_for(root, out, **options):
    return {
        "base": str(root / "base"),
        "checkpoints": [str(root / sensor) for sensor in SENSORS],
        "corpora": [str(root / "corpora" / sensor) for sensor in SENSORS],
        "out": str(out),
        "trials": 5,
    } | options


def run(root, out, **options):
    return search(config_from_dict(SearchConfig, keys_for(root, out, **options)))


def read(out):
    return yaml.safe_load(out.read_text()), json.loads(out.with_name(f"{out.stem}-report.json").read_text())


def lines_of(out):
    return [json.loads(line) for line in out.with_name(f"{out.stem}-trials.jsonl").read_text().splitlines()]


def loss_of(weights, corpus, places):
    """Mean loss of validation tiles by their definition: values, policy, mask from the key, one tile at a time."""
    model, _ = load_mae(weights)
    losses = []
    for place in places:
        tile = Corpus(corpus).read("val", place)
        image_HW = torch.from_numpy(Normalisation()(tile.value_HW, tile.valid_HW))
        noise_N = torch.from_numpy(mask_noise(sample_rng(tile.key, 20260101, "validation mask"), PICO.patches))
        with torch.no_grad():
            losses.append(model(image_HW[None, None], torch.from_numpy(tile.valid_HW)[None], noise_N[None]).item())
    return sum(losses) / len(losses)


@pytest.mark.parametrize("per", ["shared", "sensor", "layer_group"])
def test_the_file_merges_to_the_model_whose_loss_was_told(project, tmp_path, per, capsys):
    out = run(project, tmp_path / "found.yaml", per=per, trials=11, groups=2)
    keys, report = read(out)
    merged = merge(load_config(MergeConfig, out, [f"out={tmp_path / 'merged'}"]))
    for sensor in SENSORS:
        corpus = project / "corpora" / sensor
        products = Corpus(corpus).index["val"].product[list(range(24))].tolist()
        held = split_halves(products, sensor, 0).places["held_out"]
        assert loss_of(merged, corpus, held) == pytest.approx(report["held_out"]["found"]["losses"][sensor], rel=1e-5)
        searched = split_halves(products, sensor, 0).places["searched"]
        assert loss_of(merged, corpus, searched) == pytest.approx(
            report["searched"]["found"]["losses"][sensor], rel=1e-5
        )
    best = min(report["searched"][name]["score"] for name in report["searched"])
    assert report["searched"]["found"]["score"] == best
    printed = capsys.readouterr().out
    assert "gain over 0.5" in printed and "gain over average" in printed
    assert f"momo merge --config {out}" in out.read_text().split("\n")[0]
    assert Image.open(out.with_suffix(".png")).size[0] > 500
    assert set(keys) <= {"base", "checkpoints", "method", "coefficient", "coefficients", "layers"}


def test_the_two_merges_to_beat_are_the_first_trials(project, tmp_path):
    out = run(project, tmp_path / "found.yaml", trials=3)
    _, first, second, _ = lines_of(out)
    assert (first["label"], first["values"]) == ("0.5", {"coefficient": 0.5})
    assert (second["label"], second["values"]) == ("average", {"coefficient": 0.5})  # of two checkpoints
    average = merge(
        MergeConfig(
            checkpoints=[str(project / s) for s in SENSORS], method="average", out=str(tmp_path / "a"), exclude=[]
        )
    )
    _, report = read(out)
    corpus = project / "corpora" / "CTX"
    held = split_halves(Corpus(corpus).index["val"].product[list(range(24))].tolist(), "CTX", 0).places["held_out"]
    assert loss_of(average, corpus, held) == pytest.approx(report["held_out"]["average"]["losses"]["CTX"], rel=1e-5)


def test_a_killed_search_goes_on_as_if_nothing_had_happened(project, tmp_path):
    options = {"per": "sensor", "methods": ["task_arithmetic", "magmax"], "trials": 13}
    undisturbed = run(project, tmp_path / "a.yaml", **options)
    keys = keys_for(project, tmp_path / "b.yaml", **options)
    code = (
        "import json, sys, torch; torch.set_num_threads(1)\n"
        "from momo.config import config_from_dict\n"
        "from momo.merge.search.searching import search\n"
        "from momo.merge.search.config import SearchConfig\n"
        "search(config_from_dict(SearchConfig, json.loads(sys.argv[1])))\n"
    )
    log = tmp_path / "b-trials.jsonl"
    process = subprocess.Popen([sys.executable, "-c", code, json.dumps(keys)], cwd=tmp_path)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and (not log.exists() or log.read_bytes().count(b"\n") < 6):
        assert process.poll() is None, "the search ended before it was killed"
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = log.read_bytes().count(b"\n")
    assert 6 <= done < 14 and not (tmp_path / "b.yaml").exists()
    with open(log, "a") as stream:
        stream.write('{"trial": 99, "meth')  # what a kill in the middle of a write leaves
    resumed = run(project, tmp_path / "b.yaml", **options)
    assert lines_of(resumed) == lines_of(undisturbed)
    assert yaml.safe_load(resumed.read_text()) == yaml.safe_load(undisturbed.read_text())
    assert len({json.dumps(line["values"]) for line in lines_of(resumed)[1:]}) >= 12  # all but the references differ


def test_more_trials_go_on_and_a_budget_of_time_stops(project, tmp_path, capsys):
    whole = run(project, tmp_path / "a.yaml", trials=8)
    out = run(project, tmp_path / "b.yaml", trials=8, minutes=1e-9)
    assert "the budget of 1e-09 minutes is spent after 2 of 8 trials" in capsys.readouterr().out
    assert lines_of(out) == lines_of(whole)[:3]
    assert lines_of(run(project, out, trials=8)) == lines_of(whole)
    assert "2 trials are there already" in capsys.readouterr().out


def test_another_seed_chooses_other_points_and_another_search_is_not_mixed_in(project, tmp_path):
    out = run(project, tmp_path / "a.yaml", trials=4)
    other = run(project, tmp_path / "b.yaml", trials=4, seed=9)
    assert lines_of(out)[3:] != lines_of(other)[3:]
    with pytest.raises(MergeError, match=r"of another search: .*a-trials.jsonl differs in range, seed.*another `out`"):
        run(project, out, seed=9, high=2.0)


def test_gain_is_the_paired_difference(project, tmp_path):
    config = config_from_dict(SearchConfig, keys_for(project, tmp_path / "x.yaml"))
    bench = Bench(make_plan(config.merge_config("task_arithmetic")), config)
    ours = {"HiRISE": torch.tensor([1.0, 2.0, 3.0, 4.0]), "CTX": torch.tensor([2.0, 2.0, 2.0, 2.0])}
    other = {"HiRISE": torch.tensor([1.5, 2.0, 3.5, 5.0]), "CTX": torch.tensor([2.0, 2.5, 2.0, 2.5])}
    for tiles in bench.meters["held_out"].tiles.values():
        tiles.__dict__["products"] = ["a", "a", "b", "b"]
    gain = bench.gain("held_out", ours, other)
    errors = [math.sqrt(sum((d - 0.5) ** 2 for d in (0.5, 0.0, 0.5, 1.0)) / 3 / 4), math.sqrt(4 * 0.0625 / 3 / 4)]
    assert gain["gain"] == pytest.approx((0.5 + 0.25) / 2)
    assert [gain["per_sensor"][s]["stderr"] for s in ours] == pytest.approx(errors)
    assert gain["stderr"] == pytest.approx(math.hypot(*errors) / 2)
    assert gain["per_sensor"]["HiRISE"]["stderr_products"] == pytest.approx(math.sqrt(2 * (0.5**2 + 0.5**2) / 16))
    assert (gain["per_sensor"]["CTX"]["products"], gain["per_sensor"]["CTX"]["count"]) == (2, 4)
    assert (bench.score("held_out", ours), bench.score("held_out", other)) == (2.25, (3 + 2.25) / 2)
    bench.objective = "worst"
    worst = bench.gain("held_out", ours, other)
    assert bench.score("held_out", ours) == 2.5 and worst["gain"] == 0.5 and worst["stderr"] == pytest.approx(errors[0])
    # The worst sensor of the other is another one: two means of independent tiles.
    other["CTX"] = torch.tensor([4.0, 3.0, 4.0, 5.0])
    worst = bench.gain("held_out", ours, other)
    spread = math.hypot(math.sqrt(5 / 3 / 4), math.sqrt(2 / 3 / 4))
    assert worst["gain"] == 1.5 and worst["stderr"] == pytest.approx(spread)


def test_a_gain_within_the_larger_error_is_called_noise():
    gain = {"gain": 0.01, "stderr": 0.002, "stderr_products": 0.006, "per_sensor": {"CTX": {"products": 2}}}
    (line,) = gain_lines({"gains": {"0.5": gain}})
    assert line.endswith("+- 0.00200 over tiles, +- 0.00600 over 2 products: no more than noise")
    (line,) = gain_lines({"gains": {"0.5": gain | {"stderr_products": None}}})
    assert line.endswith("+- 0.00200 over tiles: beyond two standard errors")


def test_relative_losses_are_shares_of_the_own_checkpoints(project, tmp_path):
    out = run(project, tmp_path / "found.yaml", relative=True, trials=3)
    _, report = read(out)
    own = report["held_out"]["own_checkpoints"]["losses"]
    row = report["held_out"]["average"]
    assert row["score"] == pytest.approx(sum(row["losses"][s] / own[s] for s in SENSORS) / 2)
    assert report["held_out"]["own_checkpoints"]["score"] == pytest.approx(1.0)
    corpus = project / "corpora" / "CTX"
    held = split_halves(Corpus(corpus).index["val"].product[list(range(24))].tolist(), "CTX", 0).places["held_out"]
    assert loss_of(project / "CTX", corpus, held) == pytest.approx(own["CTX"], rel=1e-5)


def test_methods_without_coefficients_are_scored_once(project, tmp_path):
    out = run(project, tmp_path / "f.yaml", methods=["average", "ties", "weighted_average"], options={"density": 0.5})
    methods = [(line["method"], line["values"]) for line in lines_of(out)[1:]]
    assert methods[2:4] == [("average", {}), ("weighted_average", {})]
    assert methods[4][0] == "ties" and 0 <= methods[4][1]["coefficient"] <= 1.5
    scores = [line["score"] for line in lines_of(out)[1:]]
    assert scores[2] == pytest.approx(scores[1], rel=1e-6) == pytest.approx(scores[3], rel=1e-6)
    alone = run(project, tmp_path / "g.yaml", methods=["average"], trials=30)
    assert len(lines_of(alone)) == 1 + 3


def test_a_merge_without_a_finite_loss_does_not_end_the_search(project, tmp_path):
    out = run(project, tmp_path / "f.yaml", low=1e30, high=2e30, trials=4)
    assert [line["score"] is None for line in lines_of(out)[1:]] == [False, False, True, True]
    assert read(out)[1]["not_finite"] == 2
    with pytest.raises(MergeError, match=r"no merge of the search has a finite loss: 1 trials.*lower high"):
        best_trial([Trial(0, Point("ties"), {}, None)])


def test_halves_share_no_product_and_are_reproducible():
    products = [f"p{i % 7}" for i in range(70)]
    halves = split_halves(products, "CTX", 3)
    first, second = (set(halves.places[half]) for half in ("searched", "held_out"))
    assert first | second == set(range(70)) and not first & second and halves.by == "product"
    assert not {products[i] for i in first} & {products[i] for i in second}
    assert split_halves(products, "CTX", 3) == halves != split_halves(products, "CTX", 4)
    lone = split_halves(["p"] * 9 + ["q"], "CTX", 3)
    assert lone.by == "tile" and sorted(map(len, lone.places.values())) == [5, 5]
    with pytest.raises(MergeError, match="too few validation tiles for two halves: 3 of CTX"):
        split_halves(["a", "b", "c"], "CTX", 0)


def test_depth_groups_cover_encoder_and_decoder():
    names = list(build_mae(PICO, seed=0).state_dict())
    groups = depth_groups(names, 2)
    assert groups == {
        "blocks_2_to_3": ("blocks.2.*", "blocks.3.*", "norm.*"),
        "decoder": ("decoder*", "mask_token"),
    }
    assert list(depth_groups(names, 9)) == ["blocks_1_to_1", "blocks_2_to_2", "blocks_3_to_3", "decoder"]


def test_a_point_of_layers_scales_the_task_vectors_of_its_layers(project, tmp_path):
    config = config_from_dict(SearchConfig, keys_for(project, tmp_path / "x.yaml"))
    plan = make_plan(config.merge_config("task_arithmetic"))
    space = Space(("task_arithmetic",), "layer_group", ("CTX", "HiRISE"), 0.0, 1.5, depth_groups(plan.merged, 2))
    point = Point("task_arithmetic", {"CTX": 0.2, "HiRISE": 0.7, "layers.blocks_2_to_3": 0.5, "layers.decoder": 1.25})
    state = merged_state(plan.replaced(**space.coefficients(point)))
    base, ctx, hirise = (load_weights(project / name)[0] for name in ("base", "CTX", "HiRISE"))
    factors = {"patch_embed.proj.weight": 1, "blocks.1.mlp.fc1.weight": 1, "blocks.2.mlp.fc1.weight": 0.5}
    factors |= {"norm.weight": 0.5, "decoder_blocks.1.norm1.weight": 1.25, "mask_token": 1.25}
    for name, factor in factors.items():
        expected = base[name] + factor * (0.2 * (ctx[name] - base[name]) + 0.7 * (hirise[name] - base[name]))
        torch.testing.assert_close(state[name], expected, rtol=1e-5, atol=1e-6)
    assert space.parameters(Point("task_arithmetic", {"coefficient": 0.5})) == {
        "task_arithmetic/CTX": 0.5, "task_arithmetic/HiRISE": 0.5,
        "task_arithmetic/layers.blocks_2_to_3": 1.0, "task_arithmetic/layers.decoder": 1.0,
    }  # fmt: skip


# --- refusals -------------------------------------------------------------------------------------------------------


def test_test_tasks_are_refused(project, tmp_path):
    labelled = tmp_path / "mb-landmark_cls"
    labelled.mkdir()
    (labelled / "annotation.csv").write_text("file_id,label,split\n")
    with pytest.raises(MergeError, match=r"labelled dataset of test tasks: .*mb-landmark_cls.*never by test tasks"):
        run(project, tmp_path / "f.yaml", corpora=[str(labelled)])


def test_a_strange_corpus_must_be_allowed_by_name(project, tmp_path):
    strange = write_corpus(tmp_path / "ctx", tiles=2, val=8, seed=77)
    corpora = [str(project / "corpora" / "HiRISE"), str(strange)]
    with pytest.raises(MergeError, match=r"not one that a checkpoint was trained on: .* of CTX.*allow=\[CTX\]"):
        run(project, tmp_path / "f.yaml", corpora=corpora)
    assert run(project, tmp_path / "f.yaml", corpora=corpora, allow=["CTX"], trials=3).exists()
    with pytest.raises(MergeError, match="no checkpoint of its own: CTX"):
        run(project, tmp_path / "g.yaml", corpora=corpora, allow=["CTX"], relative=True)
    with pytest.raises(MergeError, match=r"a sensor of a checkpoint has no corpus: CTX.*allow=\[CTX\]"):
        run(project, tmp_path / "h.yaml", corpora=corpora[:1])
    with pytest.raises(MergeError, match="allow names an unknown sensor: CXT"):
        run(project, tmp_path / "h.yaml", allow=["CXT"])


def test_files_of_others_are_left_alone(project, tmp_path):
    out = tmp_path / "selection.yaml"
    out.write_text("mine")
    with pytest.raises(DataError, match=r"the output exists already: .*selection.yaml"):
        run(project, out)
    assert out.read_text() == "mine"
    log = tmp_path / "f-trials.jsonl"
    for text in ("", "{}\n", "nonsense\n", '{"format": "momo-search-trials", "identity": {}}\n{"trial": 3}\n'):
        log.write_text(text)
        with pytest.raises(MergeError, match=r"the trials of a search cannot be read: .*remove the file"):
            TrialLog.open(log, {})
    log.unlink()
    ours, theirs = TrialLog.open(log, {}), TrialLog.open(log, {})
    ours.add(Trial(0, Point("ties"), {}, 0.5))
    with pytest.raises(MergeError, match=r"another search writes to the same file: .*f-trials.jsonl"):
        theirs.add(Trial(0, Point("ties"), {}, 0.5))
    assert [trial.score for trial in TrialLog.open(log, {}).trials] == [0.5]


def test_weights_without_a_card_are_refused(project, tmp_path):
    from safetensors.torch import save_file

    foreign = tmp_path / "foreign.safetensors"
    save_file(load_weights(project / "CTX")[0], foreign)
    places = [str(project / "HiRISE"), str(foreign)]
    with pytest.raises(MergeError, match=r"a checkpoint has no card: foreign"):
        run(project, tmp_path / "f.yaml", checkpoints=places)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trials": 2}, "too few trials: 2"),
        ({"low": 1.0, "high": 1.0}, "the range of coefficients is empty"),
        ({"out": "f.json"}, "the result of a search is a YAML file: f.json"),
        ({"corpora": []}, "no corpus is given"),
        ({"methods": []}, "methods cannot be used"),
        ({"methods": ["tie"]}, "did you mean 'ties'"),
        ({"per": "layer"}, "per has an unknown value"),
        ({"objective": "best"}, "objective has an unknown value"),
        ({"minutes": 0.0}, "minutes is out of range"),
        ({"samples": 0}, "samples is out of range"),
        ({"options": {"coefficient": 1}}, r"not the search's to pass on: options.coefficient"),
        ({"options": {"dencity": 1}}, "did you mean 'density'"),
        ({"options": {"density": 0.5}}, "no method takes density: task_arithmetic"),
        ({"base": None}, "the base is missing"),
    ],
)
def test_bad_keys(options, message):
    keys = {"base": "b", "checkpoints": ["x", "y"], "corpora": ["c"], "out": "f.yaml"} | options
    with pytest.raises(ConfigError, match=message):
        config_from_dict(SearchConfig, keys)


def test_paths_are_given_on_as_they_are(project, tmp_path, monkeypatch):
    monkeypatch.chdir(project)
    keys = {"base": "base", "checkpoints": list(SENSORS), "corpora": [f"corpora/{s}" for s in SENSORS], "trials": 3}
    out = search(config_from_dict(SearchConfig, keys | {"out": str(tmp_path / "f.yaml")}))
    assert yaml.safe_load(out.read_text())["checkpoints"] == list(SENSORS)
    assert merge(load_config(MergeConfig, Path(out), [f"out={tmp_path / 'm'}"])).is_dir()
