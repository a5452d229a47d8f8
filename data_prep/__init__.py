"""Raw products to CORPUS: GDAL readers, tiles, splits, shards, and the synthetic demo world."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import PrepConfig as PrepConfig
    from .run import prep as prep
    from .world import WorldConfig as WorldConfig
    from .world import make_world as make_world

_HOME = {"PrepConfig": ".config", "prep": ".run", "WorldConfig": ".world", "make_world": ".world"}
__all__ = ["PrepConfig", "WorldConfig", "make_world", "prep"]


def __getattr__(name: str) -> Any:
    """Imports a public name where it is first used, so that importing the package needs no optional package."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name], __name__), name)
