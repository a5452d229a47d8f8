from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from momo.errors import EvalError
from momo.eval.results import (
    Predictions,
    Result,
    Score,
    load_examples,
    load_result,
    load_results,
    read_arrays,
    run_name,
    write_arrays,
    write_result,
)
from momo.eval.statistics import summarise


def result(root: Path, *, seed: int = 0, **changes) -> Result:
    """One classification run of four test images, three of them right, with its predictions on disk."""
    predictions = Predictions.of_classes(list("abcd"), np.array([0, 1, 0, 1]), np.array([0, 1, 0, 0]), 2)
    name = run_name("cls", "knn", "m", seed)
    fields = {
        "task": "classification", "dataset": "cls", "dataset_fingerprint": "f" * 64,
        "dataset_info": {"classes": ["a", "b"], "splits": {"train": 9, "val": 4, "test": 4}}, "synthetic": True,
        "protocol": "knn", "model": "m", "weights": {"file": "m/model.safetensors", "sha256": "0" * 64},
        "architecture": {}, "sensors": [], "pretrained_on_synthetic": True, "seed": seed, "seed_varies": [],
        "fraction": 1.0, "train_draw": 0.8, "train_subset": None, "n_train": 7, "n_val": 4, "n_test": 4,
        "image_size": None, "normalisation": {"policy": "per_tile_zscore"}, "hyper_parameters": {"k": 5}, "grid": [],
        "headline": "accuracy", "metrics": {"accuracy": Score(value=0.75, ci_low=0.25, ci_high=1.0)},
        "bootstrap": {"draws": 20}, "few_seeds": True, "device": "cpu", "wall_seconds": 0.1, "settings": {},
        "config_hash": "c" * 64,
        "predictions": {
            "file": f"predictions/{name}.npz", "sha256": predictions.write(root / "predictions" / f"{name}.npz")
        },
    }  # fmt: skip
    return Result(**(fields | changes))


def test_results_come_back_as_written(tmp_path):
    written = [result(tmp_path, seed=seed) for seed in (0, 1)]
    for one in written:
        write_result(tmp_path, one)
    assert load_results(tmp_path) == written
    loaded = load_results(tmp_path)[1]
    assert loaded.root == tmp_path and loaded.name == "cls__knn__m__seed1" and loaded.classes == ["a", "b"]
    predictions = loaded.load_predictions()
    assert predictions.prediction_N.tolist() == [0, 1, 0, 0] and predictions.key_N.tolist() == list("abcd")
    assert predictions.counts_NCC.sum(axis=0).tolist() == [[2, 0], [1, 1]] and predictions.masks() == {}


def test_results_are_never_edited(tmp_path):
    write_result(tmp_path, result(tmp_path))
    with pytest.raises(EvalError, match="the run is there already: .*cls__knn__m__seed0.json.*never edited"):
        write_result(tmp_path, result(tmp_path))


def test_undefined_numbers_are_null(tmp_path):
    empty = Score(value=None, ci_low=None, ci_high=None)
    path = write_result(tmp_path, result(tmp_path, metrics={"accuracy": empty}))
    assert load_result(path).metrics["accuracy"] == empty
    assert np.isnan(summarise(load_results(tmp_path))[0].mean)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (("0.75", "1.75"), r"does not hold together: .*accuracy.value is 1.75, not within 0..1"),
        (('"headline": "accuracy"', '"headline": "f1"'), "headline 'f1' is not among its metrics"),
        (('"task": "classification"', '"task": "detection"'), "task 'detection' is unknown"),
        (('"accuracy": {', '"precision": {'), "unknown metrics precision"),
        (('"seed": 0,', '"seed": 3,'), "its fields say 'cls__knn__m__seed3'"),
        (('"provenance": "rerun"', '"provenance": "copied"'), "provenance 'copied' with source None"),
        (('"n_val": 4,', ""), "a field of the result is missing or unknown: .*n_val"),
        (('"n_val": 4,', '"n_val": 4, "extra": 1,'), "missing or unknown: .*extra"),
        (('"format_version": 1', '"format_version": 9'), "no result of this version: momo-result 9"),
        (("{", "", 1), "a result cannot be read"),
    ],
)
def test_damaged_results_are_refused(tmp_path, edit, message):
    path = write_result(tmp_path, result(tmp_path))
    text = path.read_text()
    changed = text.replace(*edit) if len(edit) == 3 else text.replace(*edit, 1)
    assert changed != text
    path.write_text(changed)
    with pytest.raises(EvalError, match=message):
        load_results(tmp_path)


def test_no_results(tmp_path):
    with pytest.raises(EvalError, match="there are no results here: .*run momo eval first"):
        load_results(tmp_path)


def test_predictions_are_checked(tmp_path):
    write_result(tmp_path, result(tmp_path))
    loaded = load_results(tmp_path)[0]
    path = tmp_path / loaded.predictions["file"]
    write_arrays(path, {"key_N": np.array(list("abcd"))})
    with pytest.raises(EvalError, match="the predictions were altered or damaged: .*seed0.npz"):
        loaded.load_predictions()
    path.unlink()
    with pytest.raises(EvalError, match=f"a file of the results is missing: {re.escape(str(path))}"):
        loaded.load_predictions()
    with pytest.raises(EvalError, match="a file of the results is missing: .*examples/cls.npz"):
        load_examples(tmp_path, "cls")
    (tmp_path / "evil.npz").write_bytes(b"no archive")
    with pytest.raises(EvalError, match="cannot be read: .*evil.npz"):
        read_arrays(tmp_path / "evil.npz")
    np.savez(tmp_path / "evil.npz", a=np.array([{}], dtype=object))
    with pytest.raises(EvalError, match="cannot be read: .*evil.npz.*npz without pickle"):
        read_arrays(tmp_path / "evil.npz")


def test_copied_numbers_have_a_source_and_no_interval(tmp_path):
    copied = result(tmp_path, provenance="copied", source="arXiv 2510.24010, table 2", predictions=None, weights=None)
    write_result(tmp_path, copied)
    summary = summarise(load_results(tmp_path))[0]
    assert summary.mean == 0.75 and np.isnan(summary.low) and summary.few_seeds
    with pytest.raises(EvalError, match="the run has no predictions: .*its provenance is copied"):
        load_results(tmp_path)[0].load_predictions()


def test_runs_of_other_options_are_not_averaged(tmp_path):
    write_result(tmp_path, result(tmp_path))
    write_result(tmp_path, result(tmp_path, seed=1, config_hash="d" * 64))
    with pytest.raises(EvalError, match="runs of one model differ in more than the seed: cls knn m"):
        summarise(load_results(tmp_path))


def test_names_tell_label_budgets_apart():
    assert run_name("d", "knn", "m", 2) == "d__knn__m__seed2"
    assert run_name("d", "knn", "m", 2, 0.01) == "d__knn__fraction0.01__m__seed2"
    assert run_name("d", "knn", "m", 2, 1.0, "few_shot/5_shot.csv") == "d__knn__5_shot__m__seed2"
    assert json.loads(json.dumps(run_name("d", "knn", "m", 0))) == "d__knn__m__seed0"
