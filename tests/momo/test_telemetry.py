"""Step timing on both clocks, memory, gradient norms, totals and the run's summary."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import pytest
import torch

from momo.errors import CheckpointError
from momo.models import build_mae
from momo.pretrain.flops import Flops, flops_per_sample
from momo.pretrain.summary import RunSummary, Totals
from momo.pretrain.telemetry import PHASES, StepTimer, gradient_norms, group_of, peak_memory_gib, throughput
from tests.conftest import PICO

# --- timer ------------------------------------------------------------------------------------------------------


class Clock:
    """A clock that goes only when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now

    def spend(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("momo.pretrain.telemetry.time", clock)
    return clock


def slow_loader(clock, pauses):
    for number, pause in enumerate(pauses):
        clock.spend(pause)
        yield number


def test_phases_and_waiting_are_told_apart(clock):
    timer = StepTimer("cpu")
    seen = []
    for number in timer.wait(slow_loader(clock, [5, 3, 1])):
        seen.append(number)
        for phase, spent in (("forward", 1), ("backward", 2), ("optimizer", 0.5)):
            timer.enter(phase)
            clock.spend(spent)
        timer.enter("other")
        clock.spend(0.5)
        timer.step(8)
    window = timer.window()
    assert seen == [0, 1, 2] and (window.steps, window.samples, window.seconds) == (3, 24, 21)
    shares = {"data": 9 / 21, "forward": 3 / 21, "backward": 6 / 21, "optimizer": 1.5 / 21, "other": 1.5 / 21}
    assert window.shares == pytest.approx(shares) and list(window.shares) == list(PHASES)
    assert window.data_wait == pytest.approx(9 / 21)
    assert window.step_seconds == 7 and window.images_per_s == 24 / 21
    assert set(window.to_dict()) == {"images_per_s", "seconds", "step_seconds", "data_wait", "shares"}


def test_accumulation_adds_up_within_a_step(clock):
    timer = StepTimer("cpu")
    for _ in range(2):
        for _ in timer.wait(slow_loader(clock, [1, 1, 1])):
            timer.enter("forward")
            clock.spend(4)
            timer.enter("backward")
            clock.spend(2)
        timer.step(12)
    window = timer.window()
    assert (window.steps, window.samples, window.step_seconds) == (2, 24, 21)
    assert window.shares["forward"] == pytest.approx(24 / 42) and window.data_wait == pytest.approx(6 / 42)


def test_median_is_not_moved_by_one_slow_step(clock):
    timer = StepTimer("cpu")
    for spent in (2, 2, 100, 3, 2):
        clock.spend(spent)
        timer.step(1)
    assert timer.window().step_seconds == 2


def test_a_restart_forgets_and_a_window_begins_anew(clock):
    timer = StepTimer("cpu")
    timer.enter("data")
    clock.spend(5)
    timer.step(4)
    clock.spend(50)
    timer.restart()
    clock.spend(1)
    timer.step(2)
    window = timer.window()
    assert (window.steps, window.samples, window.seconds, window.data_wait) == (1, 2, 1, 0)
    empty = timer.window()
    assert (empty.steps, empty.samples, empty.step_seconds, empty.images_per_s) == (0, 0, 0.0, 0.0)


def test_real_time_is_taken():
    timer = StepTimer("cpu")
    timer.enter("forward")
    time.sleep(0.02)
    timer.step(1)
    window = timer.window()
    assert 0.02 <= window.step_seconds <= window.seconds < 5 and window.shares["forward"] > 0.5


def test_timing_costs_less_than_20_us_a_step():
    timer = StepTimer("cpu")
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        for _ in timer.wait(range(500)):
            for phase in ("forward", "backward", "optimizer"):
                timer.enter(phase)
            timer.step(1)
        best = min(best, (time.perf_counter() - started) / 500)
        timer.window()
    assert best < 20e-6, f"{best * 1e6:.1f} us"


class DeviceClock:
    """Stands in for a GPU's stream: each recorded event is passed 1 s of device time after the one before."""

    passed = 0.0
    recorded = 0.0
    waits = 0
    made = 0


class FakeEvent:
    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        DeviceClock.made += 1

    def record(self) -> None:
        DeviceClock.recorded += 1.0
        self.at = DeviceClock.recorded

    def query(self) -> bool:
        return self.at <= DeviceClock.passed

    def synchronize(self) -> None:
        DeviceClock.waits += 1
        DeviceClock.passed = max(DeviceClock.passed, self.at)

    def elapsed_time(self, later: FakeEvent) -> float:
        assert later.at <= DeviceClock.passed, "read before it was done"
        return (later.at - self.at) * 1e3


def test_device_events_are_read_when_done_and_waited_for_once_a_window(monkeypatch):
    for name in ("passed", "recorded", "waits", "made"):
        monkeypatch.setattr(DeviceClock, name, 0)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    timer = StepTimer("cuda")
    for number in range(40):
        # The device lags the host by 20 events; then the host reads what is done and uses those events again.
        DeviceClock.passed = max(DeviceClock.passed, DeviceClock.recorded - 20)
        for phase in ("forward", "backward", "optimizer"):
            timer.enter(phase)
        timer.step(2)
        assert DeviceClock.waits == 0, number
    assert DeviceClock.made < 40
    window = timer.window()
    assert DeviceClock.waits == 1
    assert (window.steps, window.step_seconds) == (40, 4.0)
    assert window.shares == {"data": 0.0, "forward": 0.25, "backward": 0.25, "optimizer": 0.25, "other": 0.25}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_device_time_is_the_devices():
    timer = StepTimer("cuda")
    matrix = torch.randn(4096, 4096, device="cuda")
    for _ in range(5):
        timer.enter("forward")
        for _ in range(20):
            matrix @ matrix
        timer.step(1)
    window = timer.window()
    assert window.shares["forward"] > 0.9 and 5 * window.step_seconds == pytest.approx(window.seconds, rel=0.3)


# --- memory, throughput, gradients ------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_peak_memory_is_the_systems():
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    assert peak_memory_gib("cpu") == pytest.approx(int(lines["VmHWM"].split()[0]) / 2**20, rel=0.01)


def test_throughput_counts_one_device():
    assert throughput(100.0, Flops(8_000_000_000, 2_000_000_000), 2, 3.0) == {"tflops": 1.5, "mfu": 0.5}
    assert throughput(100.0, Flops(1, 1), 2, None)["mfu"] is None


def test_every_parameter_has_its_part():
    model = build_mae(PICO, seed=0)
    parts = {name: group_of(name) for name in model.state_dict()}
    assert set(parts.values()) == {"embed", "norm", "decoder", *(f"blocks.{n}" for n in range(4))}
    assert parts["cls_token"] == parts["patch_embed.proj.weight"] == "embed"
    assert parts["decoder_blocks.0.attn.qkv.weight"] == parts["mask_token"] == parts["decoder_norm.bias"] == "decoder"


def test_gradient_norms_are_those_of_the_parts():
    model = build_mae(PICO, seed=0)
    image, valid = torch.randn(4, 1, 32, 32), torch.ones(4, 32, 32, dtype=torch.bool)
    model(image, valid, torch.rand(4, 16)).mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    norms = gradient_norms({name: float(g.double().square().sum()) for name, g in gradients.items()})
    assert norms["total"] == pytest.approx(float(torch.nn.utils.get_total_norm(gradients.values())), rel=1e-5)
    block = [g for name, g in gradients.items() if name.startswith("blocks.2.")]
    assert norms["blocks.2"] == pytest.approx(float(torch.nn.utils.get_total_norm(block)), rel=1e-5)
    assert sum(v**2 for k, v in norms.items() if k != "total") == pytest.approx(norms["total"] ** 2, rel=1e-9)


def test_a_gradient_that_is_no_number_shows_in_its_part_and_in_the_total():
    norms = gradient_norms({"blocks.0.mlp.fc1.weight": 4.0, "decoder_pred.bias": math.nan})
    assert norms["blocks.0"] == 2.0 and math.isnan(norms["decoder"]) and math.isnan(norms["total"])
    assert gradient_norms({"norm.bias": math.inf}) == {"norm": math.inf, "total": math.inf}


# --- totals and summary -----------------------------------------------------------------------------------------


def test_totals_survive_a_restart_and_add_up():
    totals = Totals()
    totals.add(samples=256, steps=1, train_seconds=2.0, wall_seconds=3.0, corrupt_tiles=1)
    again = Totals.from_dict(json.loads(json.dumps(totals.to_dict())))
    assert again == totals
    again.add(samples=256, steps=1, train_seconds=2.0, wall_seconds=2.5, skipped_steps=1, restarts=1)
    assert again == Totals(512, 2, 4.0, 5.5, 1, 1, 1)
    assert Totals.from_dict({"samples": 3}) == Totals(samples=3)


def test_unknown_counts_are_refused():
    with pytest.raises(CheckpointError, match=r"counts momo does not know: \{'tiles': 4\}.*named corrupt_tiles, rest"):
        Totals.from_dict({"samples": 3, "tiles": 4})
    with pytest.raises(CheckpointError, match="counts momo does not know"):
        Totals.from_dict({"samples": -3})
    with pytest.raises(AttributeError):
        Totals().add(tiles=1)


def test_summary_says_what_a_run_cost(tmp_path):
    model = build_mae(PICO, seed=0, mask_ratio=0.75)
    totals = Totals(samples=480, steps=30, train_seconds=20.0, wall_seconds=33.0, skipped_steps=2, restarts=1)
    summary = RunSummary.of(totals, model, tiles=240, complete=True, peak_memory_gib=1.5)
    summary.write(tmp_path)
    written = json.loads((tmp_path / "summary.json").read_text())
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    per_sample = flops_per_sample(PICO, 0.75).total
    assert written["samples"] == 480 and written["epochs"] == 2.0 and written["images_per_s"] == 24.0
    assert written["wall_seconds"] == 33.0 and written["skipped_steps"] == 2 and written["restarts"] == 1
    assert written["flops"] == 480 * per_sample and written["flops_per_sample"]["total"] == per_sample
    assert written["patch_tokens"] == 480 * 16 and written["patch_tokens_shown"] == 480 * 4
    assert written["parameters"] == parameters and 0 < written["encoder_parameters"] < parameters
    assert written["per_parameter"]["patch_tokens"] == pytest.approx(480 * 16 / parameters)
    assert written["per_parameter"]["flops"] == pytest.approx(480 * per_sample / parameters)
    assert written["complete"] is True and written["peak_memory_gib"] == 1.5


def test_summary_of_a_run_that_has_not_begun():
    assert RunSummary.of(Totals(), build_mae(PICO, seed=0), tiles=5).to_dict()["images_per_s"] is None
