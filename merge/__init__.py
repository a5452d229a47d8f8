"""Checkpoint selection (EVL) and model merging: RUNs in, SELECTION and merged WEIGHTS out."""

from .config import MergeConfig, SelectConfig
from .evl import Candidate, Pick, select_evl
from .merging import merge
from .methods import METHODS, average, task_arithmetic
from .selecting import select
from .selection import Selection, read_selection

__all__ = [
    "METHODS",
    "Candidate",
    "MergeConfig",
    "Pick",
    "SelectConfig",
    "Selection",
    "average",
    "merge",
    "read_selection",
    "select",
    "select_evl",
    "task_arithmetic",
]
