"""Merge methods as pure functions of tensors, and the registry that names them."""

from .arithmetic import average, magmax, task_arithmetic, task_vector, weighted_average
from .fisher_average import fisher_average
from .geometry import model_stock, slerp
from .registry import METHODS, Method, Piece
from .sparse import breadcrumbs, dare, dare_mask, dare_ties, ties

__all__ = [
    "METHODS",
    "Method",
    "Piece",
    "average",
    "breadcrumbs",
    "dare",
    "dare_mask",
    "dare_ties",
    "fisher_average",
    "magmax",
    "model_stock",
    "slerp",
    "task_arithmetic",
    "task_vector",
    "ties",
    "weighted_average",
]
