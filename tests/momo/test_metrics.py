"""The run's log: what is written, what a restart keeps, what a full disk does."""

from __future__ import annotations

import contextlib
import json
import math
import resource
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from momo.errors import CheckpointError, MomoError
from momo.eval.report_inputs import read_run
from momo.pretrain.metrics import RunLog
from momo.runs import read_metrics

# A full disk stops TensorBoard's own thread, too.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


@contextlib.contextmanager
def open_log(run: Path, samples: int = 0):
    run.mkdir(exist_ok=True)
    log = RunLog(run, samples=samples, total=1000, name="test")
    try:
        yield log
    finally:
        log.close()


def line(samples: int, **more: object) -> dict[str, object]:
    return {
        "samples": samples,
        "step": samples // 8,
        "loss": 0.5,
        "lr": 1e-4,
        "grad_norm": 1.5,
        "images_per_s": 9.0,
        **more,
    }


def val(loss: float = 0.25) -> dict[str, object]:
    part = {"loss": loss, "stderr": 0.01, "count": 4}
    sensor = {**part, "terms": {"mse": 0.125}, "per_unit": {"Nh": part, "Hv": part}}
    return {**part, "protocol": "p", "per_sensor": {"CTX": sensor}}


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a run."""
    board = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0})
    board.Reload()
    return {tag: [(e.step, e.value) for e in board.Scalars(tag)] for tag in board.Tags()["scalars"]}


# --- lines and scalars ------------------------------------------------------------------------------------------


def test_every_event_is_one_line_and_what_is_a_number_is_plotted(tmp_path, capsys):
    shares = {"data": 0.1, "forward": 0.9}
    with open_log(tmp_path / "run") as log:
        log.advance(8)
        log.validation(0, val())
        log.train(line(8, data_wait=0.02, shares=shares, mfu=None, tflops=1.5, grad_norms={"blocks.0": 2.0}))
        log.incident("skipped_step", 16, step=2, keys=["a", "b"], loss=math.nan)
        log.probe(16, {"accuracy": 0.5, "weighted_f1": 0.4, "val_images": 6})
        # Written line by line: all is there before the log is closed.
        records = read_metrics(tmp_path / "run")
    assert [r["event"] for r in records] == ["val", "train", "incident", "probe"]
    assert records[1]["shares"] == shares and records[1]["mfu"] is None
    assert records[2] == {
        "event": "incident", "kind": "skipped_step", "samples": 16, "step": 2, "keys": ["a", "b"], "loss": "nan",
    }  # fmt: skip
    shown = scalars(tmp_path / "run")
    assert shown["train/loss"] == [(8, 0.5)] and shown["train/tflops"] == [(8, 1.5)]
    assert shown["train_shares/forward"][0][1] == pytest.approx(0.9)
    assert shown["train_grad_norms/blocks.0"] == [(8, 2.0)]
    assert shown["val/loss"] == shown["val/CTX"] == shown["val_units_CTX/Nh"] == [(0, 0.25)]
    assert shown["val_terms_CTX/mse"] == [(0, 0.125)]
    assert shown["probe/accuracy"] == [(16, 0.5)]
    assert "train/mfu" not in shown and "train/step" not in shown
    printed = capsys.readouterr().out
    assert "16 samples: skipped step: step 2, keys ['a', 'b'], loss nan" in printed
    assert "val loss 0.2500 +- 0.0100 (4 tiles)" in printed and "kNN probe accuracy 0.500" in printed


def test_numbers_that_json_does_not_have_become_null(tmp_path):
    with open_log(tmp_path / "run") as log:
        log.train(line(8, grad_norm=math.inf, grad_norms={"decoder": math.nan}))
        log.incident("upload_failed", 8, error=OSError("no such bucket"))
    train, incident = read_metrics(tmp_path / "run")
    assert train["grad_norm"] is None and train["grad_norms"] == {"decoder": None}
    assert incident["error"] == "no such bucket"
    assert "train/grad_norm" not in scalars(tmp_path / "run")


def test_reconstructions_are_shown(tmp_path):
    with open_log(tmp_path / "run") as log:
        log.reconstructions(8, torch.rand(20, 30))
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard"), size_guidance={"images": 0})
    board.Reload()
    (image,) = board.Images("reconstructions")
    assert (image.step, image.height, image.width) == (8, 20, 30)


def test_readers_of_loss_curves_are_not_troubled_by_other_events(tmp_path):
    run = tmp_path / "run"
    with open_log(run) as log:
        log.validation(0, val(1.0))
        log.incident("resumed", 0, ranks=2)
        log.train(line(8))
        log.probe(8, {"accuracy": 0.5, "weighted_f1": 0.4, "val_images": 6})
        log.validation(8, val(0.5))
    curves = read_run("test", run)
    assert curves.train == [(8, 0.5)] and [point.loss for point in curves.val] == [1.0, 0.5] and not curves.torn


# --- restarts ---------------------------------------------------------------------------------------------------


def write_three(run: Path) -> None:
    with open_log(run) as log:
        log.validation(0, val())
        for samples in (8, 16, 24):
            log.train(line(samples))
        log.incident("corrupt_tile", 20, key="t1")
        log.incident("signal", 24, name="SIGTERM")


def events(run: Path) -> list[tuple[str, int]]:
    return [(r.get("kind", r["event"]), r["samples"]) for r in read_metrics(run)]


def test_later_lines_of_an_interrupted_run_go_and_its_history_stays(tmp_path):
    run = tmp_path / "run"
    write_three(run)
    with open_log(run, samples=16) as log:
        log.train(line(24, loss=0.125))
    assert events(run) == [("val", 0), ("train", 8), ("train", 16), ("signal", 24), ("train", 24)]
    # TensorBoard forgets the same lines.
    assert scalars(run)["train/loss"] == [(8, 0.5), (16, 0.5), (24, 0.125)]


def test_a_run_that_begins_again_keeps_its_history_alone(tmp_path):
    write_three(tmp_path / "run")
    with open_log(tmp_path / "run", samples=0):
        pass
    assert events(tmp_path / "run") == [("signal", 24)]


@pytest.mark.parametrize("cut", [1, 2, 17, 40])
def test_a_line_cut_off_by_a_kill_is_left_out(tmp_path, cut):
    run = tmp_path / "run"
    write_three(run)
    path = run / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    with open_log(run, samples=24) as log:
        log.train(line(32))
    # Without its line feed alone a line is whole.
    signal = [("signal", 24)] if cut == 1 else []
    expected = [("val", 0), ("train", 8), ("train", 16), ("train", 24), ("corrupt_tile", 20), *signal, ("train", 32)]
    assert events(run) == expected


def test_zeros_at_the_end_after_a_power_cut_are_left_out(tmp_path):
    run = tmp_path / "run"
    write_three(run)
    with open(run / "metrics.jsonl", "ab") as stream:
        stream.write(b"\0" * 100)
    with open_log(run, samples=24) as log:
        log.train(line(32))
    assert events(run)[-2:] == [("signal", 24), ("train", 32)]


def test_a_damaged_line_in_the_middle_is_told(tmp_path):
    run = tmp_path / "run"
    write_three(run)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join([lines[0][:20], *lines[1:]]) + "\n")
    with pytest.raises(CheckpointError, match="a line of the metrics is not JSON: .*, line 1"):
        RunLog(run, samples=8, total=10, name="test")


def test_a_log_goes_back_with_the_run(tmp_path):
    run = tmp_path / "run"
    with open_log(run) as log:
        log.advance(24)
        for samples in (8, 16, 24):
            log.train(line(samples))
        log.incident("reloaded", 24, to=8)
        log.rewind(8)
        log.train(line(16, loss=0.25))
    assert events(run) == [("train", 8), ("reloaded", 24), ("train", 16)]
    assert scalars(run)["train/loss"] == [(8, 0.5), (16, 0.25)]


# --- disk -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def largest_file(size: int):
    """Makes the operating system refuse to write beyond a size, half a write included, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_told_and_loses_no_line(tmp_path):
    run = tmp_path / "run"
    with open_log(run) as log:
        log.train(line(8))
        size = (run / "metrics.jsonl").stat().st_size
        with (
            largest_file(size + 40),
            pytest.raises(MomoError, match="metrics of the run cannot be written: .*metrics.jsonl.*Next: free some sp"),
        ):
            log.train(line(16))
        assert (run / "metrics.jsonl").stat().st_size == size
        # With space again, lines go on where they stopped.
        log.train(line(24))
    assert events(run) == [("train", 8), ("train", 24)]


def test_old_lines_survive_a_disk_that_is_full_at_the_restart(tmp_path):
    run = tmp_path / "run"
    write_three(run)
    before = (run / "metrics.jsonl").read_bytes()
    with largest_file(64), pytest.raises(MomoError, match="metrics of the run cannot be written"):
        RunLog(run, samples=16, total=1000, name="test")
    assert (run / "metrics.jsonl").read_bytes() == before
    assert not [path for path in run.iterdir() if "partial" in path.name]


def test_tensorboard_that_cannot_be_written_does_not_stop_the_run(tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "tensorboard").write_text("a file where the folder belongs")
    with open_log(run) as log:
        log.train(line(8))
        log.reconstructions(8, torch.rand(4, 4))
    assert events(run) == [("train", 8)]
    assert capsys.readouterr().out.count("TensorBoard is off until the run is started again") == 1


def test_all_losses_reach_the_file_in_order(tmp_path):
    with open_log(tmp_path / "run") as log:
        for samples in range(8, 808, 8):
            log.train(line(samples, loss=1 / samples))
    seen: dict[str, list[int]] = defaultdict(list)
    for text in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        seen["samples"].append(json.loads(text)["samples"])
    assert seen["samples"] == list(range(8, 808, 8))
