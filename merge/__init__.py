"""Checkpoint selection (EVL) and model merging: RUNs in, SELECTION and merged WEIGHTS out.

`momo.merge.diagnose`, `momo.merge.search` and `momo.merge.fisher` evaluate models and are imported by their own names.
"""

from .config import MergeConfig
from .merging import merge
from .methods.arithmetic import average, task_arithmetic, task_vector
from .methods.registry import METHODS
from .plan import MergePlan, make_plan, merged_state
from .selecting.choose import select
from .selecting.config import SelectConfig
from .selecting.evl import Candidate, Pick, select_evl, sweep_epsilon
from .selection import Selection, read_selection
from .sources import Source, open_source

__all__ = [
    "METHODS",
    "Candidate",
    "MergeConfig",
    "MergePlan",
    "Pick",
    "SelectConfig",
    "Selection",
    "Source",
    "average",
    "make_plan",
    "merge",
    "merged_state",
    "open_source",
    "read_selection",
    "select",
    "select_evl",
    "sweep_epsilon",
    "task_arithmetic",
    "task_vector",
]
