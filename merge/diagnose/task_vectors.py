"""What task vectors say about a merge: norms, energy, cosines and sign conflicts, layer by layer.

The task vector of a parent is tau = theta - theta_0, its weights minus the base's (Ilharco et al. 2022, arXiv
2212.04089). Sign conflicts are what TIES resolves (Yadav et al. 2023, arXiv 2306.01708).

Tensors are read one at a time and in pieces of a fixed length; every sum is of float64, in a fixed order and by one
thread, so the figures do not depend on the number of threads.

Axes: P parents, E entries of a piece.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from momo.errors import MergeError
from momo.weights import TensorInfo

Array = npt.NDArray[np.float64]
_PIECE = 1 << 18
_ORDER = (
    *("cls_token", "reg_token", "pos_embed", "patch_embed", "norm_pre", "blocks", "norm", "fc_norm", "head"),
    *("decoder_embed", "mask_token", "decoder_pos_embed", "decoder_blocks", "decoder_norm", "decoder_pred"),
)


class TensorReader(Protocol):
    """Weights that are read tensor by tensor, such as `Source`."""

    @property
    def header(self) -> Mapping[str, TensorInfo]:
        """Shape and dtype by name."""
        ...

    def tensor(self, name: str) -> torch.Tensor:
        """Reads one tensor; it is not changed."""
        ...


def layer_of(name: str) -> str:
    """Returns the layer of a tensor: `blocks.3` for `blocks.3.attn.qkv.weight`, else the name up to its first dot."""
    numbered = re.match(r"(.*?\.\d+)(\.|$)", name)
    return numbered.group(1) if numbered else name.partition(".")[0]


def layer_order(layer: str) -> tuple[int, str, int]:
    """Sort key: from the input to the output of the autoencoder; what it does not know comes last, by name."""
    stem, _, number = layer.rpartition(".")
    stem, position = (stem, int(number)) if number.isdigit() else (layer, -1)
    return _ORDER.index(stem) if stem in _ORDER else len(_ORDER), stem, position


@dataclass
class _Sums:
    """Sums over the entries of a layer; those of two layers add up."""

    gram_PP: Array
    pair_changed_PP: Array
    pair_conflict_PP: Array
    base: float = 0.0
    entries: int = 0
    changed: int = 0
    conflict: int = 0
    magnitude: float = 0.0
    conflict_magnitude: float = 0.0
    joint_magnitude: float = 0.0

    @classmethod
    def zero(cls, parents: int) -> _Sums:
        square = (parents, parents)
        return cls(np.zeros(square), np.zeros(square), np.zeros(square))

    def add(self, other: _Sums) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass(frozen=True)
class LayerFigures:
    """The figures of one layer, or of the whole model.

    Lists are by parent, in the order of `TaskVectors.parents`; a figure that is not defined is None.

    Attributes:
        entries: Number of weights.
        norm: ||tau||, the Euclidean norm.
        relative: ||tau|| / ||theta_0|| of the same layer.
        energy: ||tau of the layer||^2 / ||tau of the whole model||^2, 0 to 1.
        cosine: <tau_p, tau_q> / (||tau_p|| ||tau_q||) of each pair, -1 to 1.
        sign_conflict: Share of entries, of those that some parent changed, that one parent raises and another lowers.
        sign_conflict_by_magnitude: The same with every entry weighing sum_p |tau_p|.
        cancelled: 1 - sum |sum_p tau_p| / sum sum_p |tau_p|, the share of the change that a plain sum loses, 0 to 1.
        pair_conflict: `sign_conflict` of each pair.
    """

    entries: int
    norm: list[float]
    relative: list[float | None]
    energy: list[float | None]
    cosine: list[list[float | None]]
    sign_conflict: float | None
    sign_conflict_by_magnitude: float | None
    cancelled: float | None
    pair_conflict: list[list[float | None]]

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values."""
        return dict(vars(self))


@dataclass(frozen=True)
class TaskVectors:
    """Figures of the task vectors of several parents.

    Attributes:
        parents: Their names.
        layers: Figures by layer, from the input to the output.
        overall: Figures of all layers together.
    """

    parents: list[str]
    layers: dict[str, LayerFigures]
    overall: LayerFigures

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Every two parents, by number."""
        return [(p, q) for p in range(len(self.parents)) for q in range(p + 1, len(self.parents))]

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values."""
        return {
            "parents": self.parents,
            "overall": self.overall.to_dict(),
            "layers": {layer: figures.to_dict() for layer, figures in self.layers.items()},
        }


def measure_task_vectors(
    base: TensorReader,
    parents: Mapping[str, TensorReader],
    names: Sequence[str] | None = None,
    advance: Callable[[int], object] | None = None,
) -> TaskVectors:
    """Computes the figures of task vectors.

    Args:
        base: The weights that the parents were trained from.
        parents: Name to weights, one or more; they hold the tensors `names` with the base's shapes.
        names: Tensors to count; None: all of the base. Those that are not floating-point are left out.
        advance: Called with the number of entries after each piece.

    Raises:
        MergeError: A tensor has another shape, or a weight is NaN or infinite.
    """
    sums: dict[str, _Sums] = {}
    # A fixed order, so that the sums do not depend on how the tensors are listed.
    for name in sorted(base.header if names is None else names):
        own = sums.setdefault(layer_of(name), _Sums.zero(len(parents)))
        for base_E, tau_PE in _pieces(name, base, parents):
            own.add(_sums_of(base_E, tau_PE))
            if advance is not None:
                advance(len(base_E))
    whole = _Sums.zero(len(parents))
    layers = sorted((layer for layer, own in sums.items() if own.entries), key=layer_order)
    for layer in layers:
        whole.add(sums[layer])
    return TaskVectors(
        parents=list(parents),
        layers={layer: _figures(sums[layer], whole) for layer in layers},
        overall=_figures(whole, whole),
    )


def _pieces(name: str, base: TensorReader, parents: Mapping[str, TensorReader]) -> Iterator[tuple[Array, Array]]:
    """Yields the base's entries (E,) and the task vectors (P, E) of one tensor, piece by piece."""
    start = base.tensor(name)
    if not start.is_floating_point():
        return
    tuned = [parent.tensor(name) for parent in parents.values()]
    for parent, tensor in zip(parents, tuned, strict=True):
        if tensor.shape != start.shape:
            raise MergeError(
                "a tensor has another shape than the base's",
                seen=f"{name} of {parent} is {tuple(tensor.shape)}, not {tuple(start.shape)}",
                rule="a task vector is the difference of two tensors of one shape",
            )
    flat, flats = start.reshape(-1), [tensor.reshape(-1) for tensor in tuned]
    for first in range(0, flat.numel(), _PIECE):
        here = slice(first, first + _PIECE)
        base_E = flat[here].double().numpy()
        tau_PE = np.stack([tensor[here].double().numpy() for tensor in flats]) - base_E
        if not np.isfinite(tau_PE).all():
            bad = [parent for parent, row in zip(parents, tau_PE, strict=True) if not np.isfinite(row).all()]
            culprit = ", ".join(bad) if np.isfinite(base_E).all() else "the base"
            raise MergeError("weights are not finite", seen=f"{name} of {culprit}", rule="no NaN or infinity")
        yield base_E, tau_PE


def _sums_of(base_E: Array, tau_PE: Array) -> _Sums:
    # Sums of NumPy and not of torch or BLAS: these share a sum among threads, in an order of their own.
    parents = len(tau_PE)
    own = _Sums.zero(parents)
    sign_PE = np.sign(tau_PE).astype(np.int8)
    for p in range(parents):
        for q in range(p, parents):
            both = [p, q], [q, p]
            own.gram_PP[both] = float((tau_PE[p] * tau_PE[q]).sum())
            own.pair_changed_PP[both] = np.count_nonzero(sign_PE[p] | sign_PE[q])
            own.pair_conflict_PP[both] = np.count_nonzero(sign_PE[p] * sign_PE[q] == -1)
    magnitude_E = np.abs(tau_PE).sum(axis=0)
    conflict_E = (sign_PE == 1).any(axis=0) & (sign_PE == -1).any(axis=0)
    own.base, own.entries = float((base_E * base_E).sum()), len(base_E)
    own.changed, own.conflict = int(np.count_nonzero(magnitude_E)), int(np.count_nonzero(conflict_E))
    own.magnitude = float(magnitude_E.sum())
    own.conflict_magnitude = float(magnitude_E[conflict_E].sum())
    own.joint_magnitude = float(np.abs(tau_PE.sum(axis=0)).sum())
    return own


def _figures(own: _Sums, whole: _Sums) -> LayerFigures:
    parents = range(len(own.gram_PP))
    norm = [float(np.sqrt(own.gram_PP[p, p])) for p in parents]
    return LayerFigures(
        entries=own.entries,
        norm=norm,
        relative=[_share(value, float(np.sqrt(own.base))) for value in norm],
        energy=[_share(float(own.gram_PP[p, p]), float(whole.gram_PP[p, p])) for p in parents],
        cosine=[[_share(float(own.gram_PP[p, q]), norm[p] * norm[q]) for q in parents] for p in parents],
        sign_conflict=_share(own.conflict, own.changed),
        sign_conflict_by_magnitude=_share(own.conflict_magnitude, own.magnitude),
        cancelled=None if not own.magnitude else 1 - own.joint_magnitude / own.magnitude,
        pair_conflict=[
            [_share(float(own.pair_conflict_PP[p, q]), float(own.pair_changed_PP[p, q])) for q in parents]
            for p in parents
        ],
    )


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None
