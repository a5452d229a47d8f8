"""Evaluation on labelled Mars datasets, and the report page."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import EvalConfig
    from .reporting import ReportConfig, report
    from .results import Result, load_results
    from .run import evaluate
    from .statistics import summarise

# Name -> module that has it; imported on first use, so that the scores do not need what the pictures need.
_EXPORTS = {
    "EvalConfig": ".config",
    "ReportConfig": ".reporting",
    "Result": ".results",
    "evaluate": ".run",
    "load_results": ".results",
    "report": ".reporting",
    "summarise": ".statistics",
}

__all__ = ["EvalConfig", "ReportConfig", "Result", "evaluate", "load_results", "report", "summarise"]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
