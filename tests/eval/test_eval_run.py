from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from momo.config import config_from_dict, load_config
from momo.errors import CheckpointError, ConfigError, DataError, EvalError
from momo.eval import EvalConfig, evaluate, load_results, summarise
from momo.eval.results import load_examples
from momo.eval.run import summary_table
from momo.eval.statistics import compare
from momo.files import sha256_file
from tests.conftest import write_weights
from tests.eval.labelled import write_classification, write_segmentation


def config(world: Path, out: Path, **changes) -> EvalConfig:
    values = {
        "datasets": [{"path": str(world / "cls")}, {"path": str(world / "seg")}],
        "models": [{"name": "random", "random_init": True}, {"name": "base", "weights": str(world / "base")}],
        "out": str(out),
        "bootstrap_draws": 50,
        "saved_masks": 4,
        "device": "cpu",
        "linear": {"c_grid": [0.01, 1.0]},
        "decoder": {"steps": 6, "batch_size": 8, "lr_grid": [0.004], "width": 16, "validations": 2, "depths": 2},
    }
    return config_from_dict(EvalConfig, values | changes)


def run(made: EvalConfig) -> list[str]:
    lines: list[str] = []
    evaluate(made, report=lines.append)
    return lines


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_classification(folder / "cls", size=16)
    write_segmentation(folder / "seg", height=12, width=20)
    write_weights(folder / "base", seed=7, sensors=[{"name": "CTX", "gsd_m": 5.0, "tiles": 9}])
    return folder


@pytest.fixture(scope="module")
def results(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("results") / "out"
    assert run(config(world, out))[0].startswith("eval: 18 runs (2 datasets, 2 models, 3 seeds), 0 there already; cpu")
    return out


def scores(folder: Path) -> dict[str, dict]:
    return {path.stem: json.loads(path.read_text())["metrics"] for path in (folder / "runs").glob("*.json")}


def test_one_file_a_run_and_every_run_once(results):
    names = sorted(path.stem for path in (results / "runs").iterdir())
    wanted = [("cls", "knn"), ("cls", "linear"), ("seg", "decoder")]
    assert names == sorted(f"{d}__{p}__{m}__seed{s}" for d, p in wanted for m in ("random", "base") for s in range(3))
    assert sorted(path.stem for path in (results / "predictions").iterdir()) == names
    assert load_config(EvalConfig, results / "config.yaml").seeds == [0, 1, 2]


def test_a_result_says_how_it_was_made(results, world):
    fields = json.loads((results / "runs" / "cls__linear__base__seed1.json").read_text())
    assert fields["format"] == "momo-result" and fields["provenance"] == "rerun"
    assert fields["weights"]["file"] == "base/model.safetensors"
    assert fields["weights"]["sha256"] == sha256_file(world / "base" / "model.safetensors")
    assert fields["synthetic"] is True and fields["pretrained_on_synthetic"] is True and fields["sensors"] == ["CTX"]
    assert fields["dataset_info"]["splits"] == {"train": 24, "val": 12, "test": 15}
    assert (fields["n_train"], fields["n_val"], fields["n_test"]) == (18, 12, 15)  # 0.8 of 8 a class is 6
    assert fields["headline"] == "f1_weighted" and set(fields["metrics"]) == {"f1_weighted", "f1_macro", "accuracy"}
    assert [entry["C"] for entry in fields["grid"]] == [0.01, 1.0]
    assert fields["seed_varies"] == ["which 80% of the training images are used"]
    assert fields["normalisation"]["policy"] == "per_tile_zscore" and fields["few_seeds"] is False
    random = json.loads((results / "runs" / "seg__decoder__random__seed0.json").read_text())
    assert random["weights"] is None and random["sensors"] == [] and random["synthetic"] is None
    assert random["seed_varies"][1:] == [
        "initialisation of the encoder", "initialisation of the decoder", "order of the batches"
    ]  # fmt: skip
    assert set(random["metrics"]) == {"miou_incl_bg", "iou_fg", "f1_fg", "miou_imagewise"}


def test_metrics_follow_from_the_predictions(results):
    for result in load_results(results):
        predictions = result.load_predictions()
        assert len(predictions.key_N) == result.n_test == len(predictions.counts_NCC)
        if result.task == "classification":
            accuracy = (predictions.label_N == predictions.prediction_N).mean()
            assert result.metrics["accuracy"].value == pytest.approx(accuracy)
        else:
            hit = predictions.counts_NCC.sum(axis=0)
            expected = hit[1, 1] / (hit[1].sum() + hit[:, 1].sum() - hit[1, 1])
            assert result.metrics["iou_fg"].value == pytest.approx(expected)
        score = result.metrics[result.headline]
        assert score.ci_low <= score.value <= score.ci_high


def test_kept_masks_are_those_of_the_examples(results, world):
    examples = load_examples(results, "seg")
    assert examples.image_MHW.shape == (4, 12, 20) and examples.image_MHW.dtype == np.uint8
    result = next(r for r in load_results(results) if r.task == "segmentation")
    predictions = result.load_predictions()
    masks = predictions.masks()
    assert list(masks) == list(examples.key_M) and examples.key_M[0] == "data/test/images/000.png"
    for key, label in zip(examples.key_M, examples.mask_MHW, strict=True):
        counts = predictions.counts_NCC[list(predictions.key_N).index(key)]
        assert masks[key].shape == (12, 20) and counts[1, 1] == ((masks[key] == 1) & (label == 1)).sum()
    assert load_examples(results, "cls").label_M.shape == (4,)


def test_same_config_gives_the_same_numbers(results, world, tmp_path):
    run(config(world, tmp_path / "again"))
    assert scores(tmp_path / "again") == scores(results)
    for path in (results / "predictions").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / "predictions" / path.name).read_bytes()


def test_a_killed_evaluation_continues(results, world, tmp_path):
    shutil.copytree(results, tmp_path / "out")
    lost = [
        tmp_path / "out" / "runs" / f"{name}.json"
        for name in ("cls__knn__base__seed1", "seg__decoder__random__seed2", "seg__decoder__base__seed0")
    ]
    for path in lost:
        path.unlink()
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "runs").iterdir()}
    lines = run(config(world, tmp_path / "out"))
    assert "18 runs (2 datasets, 2 models, 3 seeds), 15 there already" in lines[0]
    assert scores(tmp_path / "out") == scores(results)
    assert all(path.stat().st_mtime_ns == kept[path] for path in kept)


def test_another_model_may_join(results, world, tmp_path):
    shutil.copytree(results, tmp_path / "out")
    write_weights(tmp_path / "merged", seed=8)
    models = [{"name": "base", "weights": str(world / "base")}, {"name": "merged", "weights": str(tmp_path / "merged")}]
    lines = run(config(world, tmp_path / "out", models=models))
    assert "18 runs (2 datasets, 2 models, 3 seeds), 9 there already" in lines[0]
    assert len(load_results(tmp_path / "out")) == 27


def test_results_of_something_else_are_not_overwritten(results, world, tmp_path):
    before = scores(results)
    with pytest.raises(EvalError, match=r"made from something else.*option linear .*rule|option knn .*'k': 5"):
        run(config(world, results, knn={"k": 3}))
    write_weights(tmp_path / "other", seed=9)
    models = [{"name": "base", "weights": str(tmp_path / "other")}]
    with pytest.raises(EvalError, match=r"cls__knn__base__seed0.json: weights sha256 .*, now .*choose another `out`"):
        run(config(world, results, models=models))
    shutil.copytree(world, tmp_path / "world")
    (tmp_path / "world" / "cls" / "mapping.json").write_text('["a", "b", "c"]')
    with pytest.raises(EvalError, match="dataset fingerprint .*, now"):
        run(config(tmp_path / "world", results))
    assert scores(results) == before


def test_few_seeds_are_marked_loudly(world, tmp_path):
    lines = run(config(world, tmp_path / "out", seeds=[0], datasets=[{"path": str(world / "cls")}]))
    assert any(line.startswith("WARNING: only 1 seeds") for line in lines)
    assert "1 (FEW)" in lines[-1] and "+- ?" in lines[-1]
    assert all(result.few_seeds for result in load_results(tmp_path / "out"))


def test_label_budget_and_image_size(world, tmp_path):
    run(config(world, tmp_path / "out", fraction=0.5, image_size=24, protocols={"classification": ["knn"]}))
    knn = next(r for r in load_results(tmp_path / "out") if r.protocol == "knn")
    assert knn.name == "cls__knn__fraction0.5__base__seed0" and knn.n_train == 9 and knn.image_size == 24
    segmented = next(r for r in load_results(tmp_path / "out") if r.protocol == "decoder")
    assert segmented.load_predictions().masks()["data/test/images/000.png"].shape == (24, 24)


def test_large_sets_are_encoded_anew_with_the_same_result(results, world, tmp_path):
    decoder = {"steps": 6, "batch_size": 8, "lr_grid": [0.004], "width": 16, "validations": 2, "depths": 2}
    made = config(world, tmp_path / "out", datasets=[{"path": str(world / "seg")}], decoder=decoder | {"cache_gb": 0.0})
    assert any("decoder.cache_gb is 0: images are encoded anew" in line for line in run(made))
    cached = scores(results)
    for name, fresh in scores(tmp_path / "out").items():
        assert fresh["miou_incl_bg"]["value"] == pytest.approx(cached[name]["miou_incl_bg"]["value"], abs=1e-3)


def test_table_and_summary(results):
    summaries = summarise(load_results(results))
    assert len(summaries) == 6
    knn = next(s for s in summaries if (s.protocol, s.model) == ("knn", "base"))
    assert knn.mean == pytest.approx(np.mean(knn.values)) and knn.std == pytest.approx(np.std(knn.values, ddof=1))
    assert knn.low <= knn.mean <= knn.high and knn.n_runs == 3 and not knn.few_seeds
    table = summary_table(summaries)
    assert table[0].split()[:4] == ["dataset", "protocol", "model", "metric"] and len(table) == 7
    assert f"{knn.mean:.3f} +- {knn.std:.3f}  [{knn.low:.3f}, {knn.high:.3f}]" in "\n".join(table)


def test_models_are_compared_in_pairs(results):
    runs = [r for r in load_results(results) if r.protocol == "linear"]
    base, random = ([r for r in runs if r.model == name] for name in ("base", "random"))
    gap, back = compare(base, random), compare(random, base)
    assert gap.value == pytest.approx(-back.value) and gap.low <= gap.value <= gap.high
    assert gap.low == pytest.approx(-back.high)
    with pytest.raises(EvalError, match=r"cannot be paired: seeds \[0, 1\] against \[0, 1, 2\]"):
        compare(base[:2], random)


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"datasets": [{"path": "nowhere"}]}, DataError, "the dataset is not there: nowhere"),
        ({"models": [{"name": "a", "weights": "nowhere"}]}, CheckpointError, "not there or not complete: nowhere"),
    ],
)
def test_bad_input_leaves_nothing(world, tmp_path, changes, kind, message):
    with pytest.raises(kind, match=message):
        run(config(world, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_two_datasets_of_one_name(world, tmp_path):
    datasets = [{"path": str(world / "cls")}, {"path": str(world / "seg"), "name": "cls"}]
    with pytest.raises(ConfigError, match=r"two datasets have one name: cls, cls.*set datasets\.name"):
        run(config(world, tmp_path / "out", datasets=datasets))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": [1, 1]}, "seeds are not unique: 1"),
        ({"seeds": []}, "seeds are empty"),
        ({"models": []}, "models are empty.*configs/eval.yaml"),
        ({"models": [{"name": "a"}]}, "a model needs weights or random_init: a: weights=None, random_init=False"),
        ({"models": [{"name": "a b", "random_init": True}]}, "models.name cannot be part of a file name: 'a b'"),
        ({"protocols": {"segmentation": ["linear"]}}, "protocols.segmentation has an unknown value: 'linear'"),
        ({"train_draw": 0.0}, "train_draw is out of range: 0"),
        ({"fraction": 1.5}, "fraction is out of range: 1.5"),
        ({"pooling": "max"}, "pooling has an unknown value: 'max'"),
        ({"seeds": [-1]}, "seeds or saved_masks is out of range"),
        ({"knn": {"neighbours": 3}}, "unknown configuration key: knn.neighbours"),
        ({"datasets": [{"folder": "x"}]}, "unknown configuration key: datasets.folder"),
    ],
)
def test_wrong_configuration(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        config(tmp_path, tmp_path / "out", **changes)


def test_the_shipped_configuration_is_read():
    shipped = load_config(EvalConfig, Path(__file__).resolve().parents[2] / "configs" / "eval.yaml")
    assert shipped.datasets[0].path and shipped.seeds == [0, 1, 2]
