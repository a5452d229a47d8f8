"""The merge methods by name: what each needs, what it uses, and how it is applied to one tensor."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from momo.errors import MergeError

from .arithmetic import average, magmax, task_arithmetic, weighted_average
from .fisher_average import fisher_average
from .geometry import model_stock, slerp
from .sparse import breadcrumbs, dare, dare_ties, ties

FISHER_FLOOR = 1e-12
"""Least Fisher information of an entry. The paper's code has 1e-6 for classifiers; the squared gradients of a masked
autoencoder are often below that, and such a floor would turn the method into a plain average."""


@dataclass(frozen=True)
class Piece:
    """One tensor (or, for an elementwise method, a part of one) with all a method may need.

    Attributes:
        name: Name of the tensor.
        base: The tensor all checkpoints started from; None where there is no base.
        tuned: The same tensor in each checkpoint, in a fixed order.
        coefficients: Scaling coefficient, or weight, of each checkpoint.
        keys: A string that identifies each checkpoint (its sha256); random masks are drawn from it.
        thresholds: Magnitude of each checkpoint below which entries are trimmed; None: found in this tensor.
        fishers: Fisher information of each checkpoint for this tensor, none negative.
        density: Fraction of the entries that is kept, above 0 and at most 1.
        outliers: Fraction of largest entries that is dropped, at least 0 and below 1.
        seed: Of random masks.
        dtype: Of the arithmetic and of the result: torch.float32 or torch.float64.
        out: Contiguous tensor that a method may fill and return instead of a new one.
    """

    name: str
    base: torch.Tensor | None
    tuned: Sequence[torch.Tensor]
    coefficients: Sequence[float]
    keys: Sequence[str] = ()
    thresholds: Sequence[float] | None = None
    fishers: Sequence[torch.Tensor] | None = None
    density: float = 1.0
    outliers: float = 0.0
    seed: int = 0
    dtype: torch.dtype = torch.float32
    out: torch.Tensor | None = None

    @property
    def start(self) -> torch.Tensor:
        """The base.

        Raises:
            MergeError: There is none.
        """
        if self.base is None:
            raise MergeError(
                "this method needs a base", seen=self.name, rule="task vectors start at it", fix="give base=..."
            )
        return self.base

    @property
    def mask_seeds(self) -> list[int]:
        """Seed of each checkpoint's random mask: neither order nor threads nor other tensors change it."""
        return [mask_seed(self.seed, key, self.name) for key in self.keys]


@dataclass(frozen=True)
class Method:
    """A merge method as the command line knows it.

    Attributes:
        name: Name in the configuration.
        reference: Paper, as `arXiv NUMBER`.
        summary: One line for help and documentation.
        apply: From a piece to the merged tensor in the piece's dtype; never changes an input.
        default_coefficient: Used where the configuration names none; None: the method has no coefficient.
        needs_base: Whether it works on task vectors.
        elementwise: Whether the result of a part of a tensor is that part of the result, so tensors may be cut.
        uses: Options it reads, out of `density`, `outliers`, `trim`, `seed`, `fisher`, `coefficients`.
        parents: Exact number of checkpoints; None: any from `least_parents` on.
        default_density: Used where the configuration names none; None: the method has no density.
        least_parents: Smallest number of checkpoints.
    """

    name: str
    reference: str
    summary: str
    apply: Callable[[Piece], torch.Tensor]
    default_coefficient: float | None
    needs_base: bool
    elementwise: bool
    uses: frozenset[str]
    parents: int | None = None
    default_density: float | None = None
    least_parents: int = 1

    def check_parents(self, count: int) -> None:
        """Checks the number of checkpoints.

        Raises:
            MergeError: The method cannot merge so many.
        """
        if self.parents is not None and count != self.parents:
            rule = f"{self.name} merges exactly {self.parents}"
        elif count < self.least_parents:
            rule = f"{self.name} merges {self.least_parents} or more"
        else:
            return
        raise MergeError(
            "wrong number of checkpoints for this method", seen=count, rule=rule, fix="choose others or another method"
        )


def mask_seed(seed: int, key: str, name: str) -> int:
    """Returns the seed of one checkpoint's random mask for one tensor: 63 bits of sha256("seed/key/name")."""
    digest = hashlib.sha256(f"{seed}/{key}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _task_arithmetic(piece: Piece) -> torch.Tensor:
    return task_arithmetic(piece.start, piece.tuned, piece.coefficients, dtype=piece.dtype, out=piece.out)


def _magmax(piece: Piece) -> torch.Tensor:
    return magmax(piece.start, piece.tuned, piece.coefficients, dtype=piece.dtype, out=piece.out)


def _ties(piece: Piece) -> torch.Tensor:
    return ties(
        piece.start,
        piece.tuned,
        piece.coefficients,
        density=piece.density,
        thresholds=piece.thresholds,
        dtype=piece.dtype,
    )


def _dare(piece: Piece) -> torch.Tensor:
    return dare(
        piece.start,
        piece.tuned,
        piece.coefficients,
        density=piece.density,
        seeds=piece.mask_seeds,
        dtype=piece.dtype,
    )


def _dare_ties(piece: Piece) -> torch.Tensor:
    return dare_ties(
        piece.start,
        piece.tuned,
        piece.coefficients,
        density=piece.density,
        seeds=piece.mask_seeds,
        dtype=piece.dtype,
    )


def _breadcrumbs(piece: Piece) -> torch.Tensor:
    return breadcrumbs(
        piece.start,
        piece.tuned,
        piece.coefficients,
        density=piece.density,
        outliers=piece.outliers,
        dtype=piece.dtype,
    )


def _slerp(piece: Piece) -> torch.Tensor:
    METHODS["slerp"].check_parents(len(piece.tuned))
    total = sum(piece.coefficients)
    if len(piece.coefficients) != 2 or not (min(piece.coefficients) >= 0 and 0 < total < math.inf):
        raise MergeError(
            "the coefficients of slerp are not usable",
            seen=list(piece.coefficients),
            rule="two, none negative, at least one above 0; their shares are the position between the checkpoints",
        )
    share = piece.coefficients[1] / total
    return slerp(piece.tuned[0], piece.tuned[1], share, dtype=piece.dtype)


def _fisher(piece: Piece) -> torch.Tensor:
    if piece.fishers is None:
        raise MergeError(
            "there is no Fisher information for this tensor",
            seen=piece.name,
            rule="fisher needs one Fisher file a checkpoint",
            fix="give fisher={NAME: FILE, ...}",
        )
    return fisher_average(piece.tuned, piece.fishers, piece.coefficients, floor=FISHER_FLOOR, dtype=piece.dtype)


_ALL = (
    Method(
        "average",
        "arXiv 2203.05482",
        "plain average of the checkpoints",
        lambda piece: average(piece.tuned, dtype=piece.dtype, out=piece.out),
        default_coefficient=None,
        needs_base=False,
        elementwise=True,
        uses=frozenset(),
    ),
    Method(
        "weighted_average",
        "arXiv 2203.05482",
        "average of the checkpoints with the coefficients as weights",
        lambda piece: weighted_average(piece.tuned, piece.coefficients, dtype=piece.dtype, out=piece.out),
        default_coefficient=1.0,
        needs_base=False,
        elementwise=True,
        uses=frozenset({"coefficients"}),
    ),
    Method(
        "task_arithmetic",
        "arXiv 2212.04089",
        "base plus the scaled sum of task vectors (MOMO: 0.5)",
        _task_arithmetic,
        default_coefficient=0.5,
        needs_base=True,
        elementwise=True,
        uses=frozenset({"coefficients"}),
    ),
    Method(
        "ties",
        "arXiv 2306.01708",
        "trim small entries, elect a sign, average the entries that agree",
        _ties,
        default_coefficient=1.0,
        needs_base=True,
        elementwise=False,
        uses=frozenset({"coefficients", "density", "trim"}),
        default_density=0.2,
    ),
    Method(
        "dare",
        "arXiv 2311.03099",
        "drop task vector entries at random, rescale the rest, add",
        _dare,
        default_coefficient=0.5,
        needs_base=True,
        elementwise=False,
        uses=frozenset({"coefficients", "density", "seed"}),
        default_density=0.5,
    ),
    Method(
        "dare_ties",
        "arXiv 2311.03099",
        "drop entries at random and rescale, then elect signs and average as ties does",
        _dare_ties,
        default_coefficient=1.0,
        needs_base=True,
        elementwise=False,
        uses=frozenset({"coefficients", "density", "seed"}),
        default_density=0.5,
    ),
    Method(
        "magmax",
        "arXiv 2407.06322",
        "base plus the scaled task vector entry of largest magnitude",
        _magmax,
        default_coefficient=0.5,
        needs_base=True,
        elementwise=True,
        uses=frozenset({"coefficients"}),
    ),
    Method(
        "breadcrumbs",
        "arXiv 2312.06795",
        "drop the largest and the smallest entries of each tensor, add the rest",
        _breadcrumbs,
        default_coefficient=0.5,
        needs_base=True,
        elementwise=False,
        uses=frozenset({"coefficients", "density", "outliers"}),
        default_density=0.1,
    ),
    Method(
        "model_stock",
        "arXiv 2403.19522",
        "between base and average, by the angle between the task vectors",
        lambda piece: model_stock(piece.start, piece.tuned, dtype=piece.dtype),
        default_coefficient=None,
        needs_base=True,
        elementwise=False,
        uses=frozenset(),
        least_parents=2,
    ),
    Method(
        "slerp",
        "Shoemake 1985, doi 10.1145/325165.325242",
        "spherical interpolation between two checkpoints",
        _slerp,
        default_coefficient=1.0,
        needs_base=False,
        elementwise=False,
        uses=frozenset({"coefficients"}),
        parents=2,
    ),
    Method(
        "fisher",
        "arXiv 2111.09832",
        "average weighted entry by entry with the diagonal Fisher information",
        _fisher,
        default_coefficient=1.0,
        needs_base=False,
        elementwise=True,
        uses=frozenset({"coefficients", "fisher"}),
    ),
)

METHODS: dict[str, Method] = {method.name: method for method in _ALL}
