"""DeepSpeed's stages and precisions against a plain loop, and states that know neither ranks nor stages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from momo.errors import CheckpointError, ConfigError
from momo.models import build_mae
from momo.pretrain.setup import engine_config
from momo.pretrain.state import load_state
from tests.conftest import PICO
from tests.momo.engine_jobs import Job, make_config, plain_loop, start

pytestmark = pytest.mark.timeout(600)

STEPS, SHORT = 50, 12
# Largest difference of a step's loss from the plain loop's ; losses fall from about 2.
TOLERANCE = {"fp32": 2e-5, "bf16": 2e-2, "fp16": 2e-3}
STRAIGHT = [
    *(Job(f"fp32-z{stage}-a1", "fp32", stage) for stage in range(4)),
    *(Job(f"fp32-z{stage}-a2", "fp32", stage, 2, steps=SHORT) for stage in (0, 1, 2, 3)),
    *(Job(f"bf16-z{stage}-a2", "bf16", stage, 2, steps=SHORT) for stage in (0, 2, 3)),
    *(Job(f"fp16-z{stage}-a1", "fp16", stage, steps=SHORT) for stage in (1, 3)),
    Job("fp32-z2-offload", "fp32", 2, steps=SHORT, offload=True),
]
HALVES = [("fp32", 0), ("fp32", 1), ("fp32", 2), ("fp32", 3), ("bf16", 1), ("bf16", 2), ("bf16", 3), ("fp16", 2)]
HALF, MORE = 8, 5


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> tuple[dict[str, dict[str, Any]], Path]:
    folder = tmp_path_factory.mktemp("engine")
    split = []
    for precision, stage in HALVES:
        name = f"{precision}-z{stage}"
        split += [
            Job(f"{name}-first", precision, stage, steps=HALF),
            Job(f"{name}-second", precision, stage, steps=MORE, first=HALF, load=f"{name}-first"),
            Job(f"{name}-whole", precision, stage, steps=HALF + MORE),
        ]
    moved = [
        # Another stage, then (below) another number of ranks and another precision.
        Job("z3-from-z1", "fp32", 3, steps=MORE, first=HALF, load="fp32-z1-first"),
    ]
    found = start([*STRAIGHT, *split, *moved], 2, folder)
    one = [
        Job("one-rank", "fp32", 0, 4),
        Job("own-first", "bf16", 0, steps=HALF),
        Job("own-second", "bf16", 0, steps=MORE, first=HALF, load="own-first"),
        Job("own-whole", "bf16", 0, steps=HALF + MORE),
        Job("one-from-two", "fp32", 1, steps=MORE, first=HALF, load="fp32-z2-first"),
        Job("fp32-from-bf16", "fp32", 0, steps=MORE, first=HALF, load="bf16-z3-first"),
    ]
    found |= start(one, 1, folder)
    found |= start([Job("two-from-one", "fp32", 3, steps=MORE, first=HALF + MORE, load="one-from-two")], 2, folder)
    return found, folder


@pytest.fixture(scope="module")
def plain() -> tuple[list[float], dict[str, torch.Tensor]]:
    torch.set_num_threads(1)
    losses, model = plain_loop(STEPS)
    return losses, model.state_dict()


def weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return torch.load(folder / name / "model.pt", weights_only=True)


def gap(first: list[float], second: list[float]) -> float:
    assert len(first) == len(second)
    return max(abs(a - b) for a, b in zip(first, second, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("job", STRAIGHT, ids=lambda job: job.name)
def test_losses_are_those_of_the_plain_loop(measured, plain, job):
    losses = measured[0][job.name]["losses"]
    assert gap(losses, plain[0][: job.steps]) < TOLERANCE[job.precision]
    assert losses[-1] < losses[0] - 0.1 and measured[0][job.name]["steps"] == job.steps


@pytest.mark.slow
def test_one_rank_equals_two_and_accumulation_equals_a_larger_batch(measured):
    found = measured[0]
    for other in ("fp32-z0-a1", "fp32-z0-a2", "fp32-z3-a2"):
        steps = len(found[other]["losses"])
        assert gap(found["one-rank"]["losses"][:steps], found[other]["losses"]) < 1e-5
        norms = zip(found["one-rank"]["norms"][:steps], found[other]["norms"], strict=True)
        assert all(a == pytest.approx(b, rel=1e-3) for a, b in norms)


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "stage"), HALVES)
def test_a_resumed_engine_goes_on_bit_for_bit(measured, precision, stage):
    found, folder = measured
    name = f"{precision}-z{stage}"
    assert found[f"{name}-first"]["losses"] + found[f"{name}-second"]["losses"] == found[f"{name}-whole"]["losses"]
    resumed, straight = weights(folder, f"{name}-second"), weights(folder, f"{name}-whole")
    assert resumed.keys() == straight.keys() == build_mae(PICO, seed=0).state_dict().keys()
    assert all(torch.equal(resumed[key], straight[key]) for key in straight)
    states = [load_file(folder / f"{name}-{part}" / "engine/optimizer.safetensors") for part in ("second", "whole")]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[1])
    assert found[f"{name}-second"]["scale"] == found[f"{name}-whole"]["scale"]


@pytest.mark.slow
def test_a_state_moves_to_another_stage_number_of_ranks_and_precision(measured, plain):
    found = measured[0]
    straight = plain[0]
    assert gap(found["z3-from-z1"]["losses"], straight[HALF : HALF + MORE]) < 2e-5
    assert gap(found["one-from-two"]["losses"], straight[HALF : HALF + MORE]) < 2e-5
    assert gap(found["two-from-one"]["losses"], straight[HALF + MORE : HALF + 2 * MORE]) < 2e-5
    assert gap(found["fp32-from-bf16"]["losses"], straight[HALF : HALF + MORE]) < TOLERANCE["bf16"]
    # A state that was not loaded would show: the loss would start again.
    assert found["two-from-one"]["losses"][0] < straight[0] - 0.1
    assert found["two-from-one"]["steps"] == HALF + 2 * MORE


@pytest.mark.slow
def test_gathered_weights_are_the_whole_state_dict_with_the_fixed_positions(measured):
    _, folder = measured
    start_weights = build_mae(PICO, seed=0).state_dict()
    for name in ("fp32-z3-a1", "bf16-z3-a2", "fp16-z3-a1"):
        gathered = weights(folder, name)
        assert gathered.keys() == start_weights.keys()
        assert {tensor.dtype for tensor in gathered.values()} == {torch.float32}
        assert torch.equal(gathered["pos_embed"], start_weights["pos_embed"])
        assert torch.equal(gathered["decoder_pos_embed"], start_weights["decoder_pos_embed"])
        assert not torch.equal(gathered["cls_token"], start_weights["cls_token"])


@pytest.mark.slow
def test_masters_keep_what_half_precision_would_round_away(measured):
    for name in ("own-first", "bf16-z1-first"):
        gathered = weights(measured[1], name)
        rounded = [torch.equal(tensor, tensor.bfloat16().float()) for tensor in gathered.values()]
        assert sum(rounded) < len(rounded) / 2


@pytest.mark.slow
def test_own_masters_equal_deepspeeds_and_resume_bit_for_bit(measured, plain):
    found, folder = measured
    own, theirs = found["own-whole"], found["bf16-z1-whole"]
    assert (own["optimizer"], theirs["optimizer"]) == ("MasterAdamW", "BF16_Optimizer")
    assert gap(own["losses"], theirs["losses"]) < 5e-3 and gap(own["losses"], plain[0][: HALF + MORE]) < 2e-2
    norms = zip(own["norms"], theirs["norms"], strict=True)
    assert all(a == pytest.approx(b, rel=5e-2) for a, b in norms)
    assert found["own-first"]["losses"] + found["own-second"]["losses"] == own["losses"]
    resumed, straight = weights(folder, "own-second"), weights(folder, "own-whole")
    assert all(torch.equal(resumed[key], straight[key]) for key in straight)


# --- states on disk ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_damaged_states_are_told(measured, tmp_path):
    from shutil import copytree

    source = measured[1] / "fp32-z0-first"
    copytree(source, tmp_path / "altered")
    tensors = tmp_path / "altered/engine/optimizer.safetensors"
    data = bytearray(tensors.read_bytes())
    data[-1] ^= 1
    tensors.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"optimizer's state was altered or damaged: .*Next: remove .*altered"):
        load_state(tmp_path / "altered")
    copytree(source, tmp_path / "cut")
    (tmp_path / "cut/engine/state.json").write_text("{")
    with pytest.raises(CheckpointError, match="the state for resuming cannot be read"):
        load_state(tmp_path / "cut")
    copytree(source, tmp_path / "old")
    fields = json.loads((source / "engine/state.json").read_text()) | {"format_version": 99}
    (tmp_path / "old/engine/state.json").write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match="written by another version of momo"):
        load_state(tmp_path / "old")


# --- DeepSpeed's configuration ----------------------------------------------------------------------------------


def settings(tmp_path: Path, text: str, precision: str = "fp32", accumulation: int = 1) -> dict[str, Any]:
    config = make_config(Job("c", precision, 0, accumulation), 2, tmp_path)
    assert config.deepspeed is not None
    Path(config.deepspeed).write_text(text)
    return engine_config(config)


def test_batch_arithmetic_and_precision_are_filled_in(tmp_path):
    found = settings(tmp_path, '{"zero_optimization": {"stage": 2}}', "bf16", accumulation=4)
    assert (found["train_batch_size"], found["train_micro_batch_size_per_gpu"]) == (16, 2)
    assert found["gradient_accumulation_steps"] == 4 and found["gradient_clipping"] == 1.0
    assert found["bf16"] == {"enabled": True} and found["zero_optimization"] == {"stage": 2}
    assert settings(tmp_path, "{}", "bf16", accumulation=2)["zero_optimization"] == {"stage": 1}
    assert settings(tmp_path, "{}", "fp16")["zero_optimization"] == {"stage": 1}
    assert settings(tmp_path, "{}", "bf16")["zero_optimization"] == {"stage": 1}
    own = engine_config(make_config(Job("one", "bf16"), 1, tmp_path))
    assert own["zero_optimization"] == {"stage": 0} and "bf16" not in own and own["gradient_clipping"] == 0
    assert settings(tmp_path, "{}")["zero_optimization"] == {"stage": 0}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"zero_optimization": {"stage": 4}}', r"the ZeRO stage is not supported: 4\. Rule: 0, 1, 2 or 3"),
        ('{"bf16": {"enabled": true}, "train_batch_size": 3}', "sets what momo fills in: train_batch_size, bf16"),
        ("{", "the DeepSpeed file is not JSON"),
        ("[]", "the DeepSpeed file is not a mapping"),
        ('{"zero_optimization": 2}', "zero_optimization is not a mapping: 2"),
        (
            '{"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}',
            r"the ZeRO stage cannot offload: stage 2 with offload_param\. Rule: .* offload_param stage 3",
        ),
        (
            '{"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}',
            "the ZeRO stage cannot offload: stage 0 with offload_optimizer",
        ),
    ],
)
def test_impossible_deepspeed_files_are_refused(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        settings(tmp_path, text)


def test_missing_deepspeed_file_is_told(tmp_path):
    config = make_config(Job("c"), 1, tmp_path)
    assert config.deepspeed is not None
    Path(config.deepspeed).unlink()
    with pytest.raises(ConfigError, match=r"the DeepSpeed file does not exist: .*examples are in configs/deepspeed"):
        engine_config(config)
