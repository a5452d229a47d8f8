"""Figures of task vectors against direct formulas on whole models, and what they must not depend on."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from momo.errors import MergeError
from momo.merge.diagnose import task_vectors
from momo.merge.diagnose.task_vectors import layer_of, layer_order, measure_task_vectors
from momo.models import build_mae
from momo.weights import TensorInfo
from tests.conftest import PICO


@dataclass
class Weights:
    """Weights in memory, read like a file."""

    state: dict[str, torch.Tensor]

    @property
    def header(self) -> dict[str, TensorInfo]:
        return {name: TensorInfo(tuple(tensor.shape), "F32") for name, tensor in self.state.items()}

    def tensor(self, name: str) -> torch.Tensor:
        return self.state[name]


def pico(seed: int) -> Weights:
    return Weights(build_mae(PICO, seed=seed).state_dict())


def near(base: Weights, seed: int, scale: float = 0.05) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    return Weights({n: t + scale * torch.randn(t.shape, generator=generator) for n, t in base.state.items()})


def whole(weights: Weights, only: str = "") -> np.ndarray:
    """All weights in one vector, or those of the tensors whose names begin with `only`."""
    parts = [t.double().numpy().ravel() for name, t in sorted(weights.state.items()) if name.startswith(only)]
    return np.concatenate(parts)


@pytest.fixture(scope="module")
def models() -> tuple[Weights, dict[str, Weights]]:
    base = pico(0)
    return base, {"HiRISE": near(base, 1), "CTX": near(base, 2, 0.1), "THEMIS": near(base, 3, 0.02)}


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("blocks.3.attn.qkv.weight", "blocks.3"),
        ("decoder_blocks.11.norm1.bias", "decoder_blocks.11"),
        ("patch_embed.proj.weight", "patch_embed"),
        ("cls_token", "cls_token"),
        ("norm.weight", "norm"),
        ("model.layers.2.mlp.weight", "model.layers.2"),
        ("stages.1", "stages.1"),
        ("fc1.weight", "fc1"),
    ],
)
def test_tensors_are_grouped_by_layer(name, layer):
    assert layer_of(name) == layer


def test_layers_run_from_input_to_output(models):
    base, parents = models
    expected = ["cls_token", "pos_embed", "patch_embed", *(f"blocks.{i}" for i in range(4)), "norm", "decoder_embed"]
    expected += ["mask_token", "decoder_pos_embed", "decoder_blocks.0", "decoder_blocks.1", "decoder_norm"]
    assert list(measure_task_vectors(base, parents).layers) == [*expected, "decoder_pred"]
    shuffled = ["zeta.1", "blocks.10", "zeta.0", "blocks.2", "patch_embed", "alpha"]
    assert sorted(shuffled, key=layer_order) == ["patch_embed", "blocks.2", "blocks.10", "alpha", "zeta.0", "zeta.1"]


@pytest.mark.parametrize("only", ["", "blocks.2.", "patch_embed."])
def test_figures_equal_the_formulas_on_whole_vectors(models, only):
    base, parents = models
    found = measure_task_vectors(base, parents)
    own = found.overall if not only else found.layers[only.rstrip(".")]
    start = whole(base, only)
    tau = np.stack([whole(parent, only) - start for parent in parents.values()])
    norm = np.linalg.norm(tau, axis=1)
    assert own.entries == len(start)
    np.testing.assert_allclose(own.norm, norm, rtol=1e-12)
    np.testing.assert_allclose(own.relative, norm / np.linalg.norm(start), rtol=1e-12)
    total = [np.sum((whole(parent) - whole(base)) ** 2) for parent in parents.values()]
    np.testing.assert_allclose(own.energy, norm**2 / total, rtol=1e-12)
    cosine = (tau @ tau.T) / np.outer(norm, norm)
    np.testing.assert_allclose(own.cosine, cosine, atol=1e-12)
    conflict = (tau.max(axis=0) > 0) & (tau.min(axis=0) < 0)
    size = np.abs(tau).sum(axis=0)
    assert own.sign_conflict == conflict.sum() / (size > 0).sum()
    assert own.sign_conflict_by_magnitude == pytest.approx(size[conflict].sum() / size.sum(), rel=1e-12)
    assert own.cancelled == pytest.approx(1 - np.abs(tau.sum(axis=0)).sum() / size.sum(), rel=1e-10)
    pair = (tau[0] * tau[2] < 0).sum() / ((tau[0] != 0) | (tau[2] != 0)).sum()
    assert own.pair_conflict[0][2] == own.pair_conflict[2][0] == pair
    assert found.pairs == [(0, 1), (0, 2), (1, 2)]


def test_energy_of_all_layers_is_one(models):
    found = measure_task_vectors(*models)
    for parent in range(3):
        assert sum(layer.energy[parent] for layer in found.layers.values()) == pytest.approx(1, rel=1e-12)
    assert found.overall.energy == [1, 1, 1]


def test_known_signs_by_hand():
    base = Weights({"w": torch.zeros(6)})
    one = Weights({"w": torch.tensor([1.0, 1.0, 0.0, 2.0, 0.0, 0.0])})
    two = Weights({"w": torch.tensor([1.0, -3.0, 5.0, -2.0, 0.0, -0.0])})
    own = measure_task_vectors(base, {"one": one, "two": two}).overall
    assert own.sign_conflict == 2 / 4  # of the four entries that changed
    assert own.pair_conflict[0][1] == 2 / 4 and own.pair_conflict[0][0] == 0
    assert own.sign_conflict_by_magnitude == 8 / 15
    assert own.cancelled == pytest.approx(1 - (2 + 2 + 5 + 0) / 15)
    assert own.relative == [None, None], "the base is 0"
    assert own.cosine[0][1] == pytest.approx((1 - 3 - 4) / (math.sqrt(6) * math.sqrt(39)))


def test_what_did_not_change_has_no_direction():
    base = Weights({"w": torch.ones(4), "blocks.0.x": torch.ones(2)})
    moved = Weights({"w": torch.zeros(4), "blocks.0.x": torch.ones(2)})
    found = measure_task_vectors(base, {"a": moved, "b": moved})
    still = found.layers["blocks.0"]
    assert still.norm == [0, 0] and still.cosine == [[None, None]] * 2
    assert still.sign_conflict is None and still.sign_conflict_by_magnitude is None and still.cancelled is None
    assert found.layers["w"].cosine[0][1] == pytest.approx(1) and found.layers["w"].sign_conflict == 0
    same = measure_task_vectors(base, {"a": base}).overall
    assert same.energy == [None]


def test_pieces_and_threads_change_nothing_that_matters(models, monkeypatch):
    base, parents = models
    threads = torch.get_num_threads()
    expected = measure_task_vectors(base, parents).to_dict()
    try:
        torch.set_num_threads(4)
        assert measure_task_vectors(base, parents).to_dict() == expected
    finally:
        torch.set_num_threads(threads)
    told: list[int] = []
    monkeypatch.setattr(task_vectors, "_PIECE", 1000)
    small = measure_task_vectors(base, parents, advance=told.append)
    assert max(told) == 1000 and sum(told) == expected["overall"]["entries"]
    np.testing.assert_allclose(small.overall.norm, expected["overall"]["norm"], rtol=1e-12)
    assert small.overall.sign_conflict == expected["overall"]["sign_conflict"]


def test_only_the_named_floating_tensors_are_counted(models):
    base, parents = models
    chosen = measure_task_vectors(base, parents, ["blocks.1.norm1.bias"])
    assert list(chosen.layers) == ["blocks.1"] and chosen.overall.entries == 96
    steps = {"w": torch.ones(3), "steps": torch.tensor([4])}
    assert measure_task_vectors(Weights(steps), {"a": Weights(steps)}).overall.entries == 3


def test_half_precision_is_read_as_stored():
    base = Weights({"w": torch.linspace(-1, 1, 50).bfloat16()})
    tuned = Weights({"w": (torch.linspace(-1, 1, 50) + 0.125).bfloat16()})
    own = measure_task_vectors(base, {"a": tuned}).overall
    tau = (tuned.state["w"].double() - base.state["w"].double()).numpy()
    assert own.norm[0] == pytest.approx(np.linalg.norm(tau), rel=1e-12)


@pytest.mark.parametrize(("bad", "culprit"), [("base", "the base"), ("CTX", "CTX")])
def test_weights_that_are_not_finite_are_refused(bad, culprit):
    models = {name: Weights({"w": torch.ones(4)}) for name in ("base", "HiRISE", "CTX")}
    models[bad].state["w"] = torch.tensor([1.0, 1.0, torch.nan, 1.0])
    base = models.pop("base")
    with pytest.raises(MergeError, match=rf"weights are not finite: w of {culprit}\. Rule: no NaN or infinity"):
        measure_task_vectors(base, models)


def test_other_shapes_are_refused():
    with pytest.raises(MergeError, match=r"another shape than the base's: w of a is \(2, 1\), not \(2,\)"):
        measure_task_vectors(Weights({"w": torch.ones(2)}), {"a": Weights({"w": torch.ones(2, 1)})})
