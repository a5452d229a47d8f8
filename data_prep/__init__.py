"""Raw products to CORPUS: GDAL readers, tiles, splits, shards, and the synthetic demo world."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import PrepConfig as PrepConfig
    from .describing import DescribeConfig as DescribeConfig
    from .describing import describe as describe
    from .importing import ImportConfig as ImportConfig
    from .importing import import_momo as import_momo
    from .run import PrepResult as PrepResult
    from .run import prep as prep
    from .verifying import VerifyConfig as VerifyConfig
    from .verifying import verify as verify
    from .world import WorldConfig as WorldConfig
    from .world import make_world as make_world

_HOME = {
    "PrepConfig": ".config", "PrepResult": ".run", "prep": ".run", "DescribeConfig": ".describing",
    "describe": ".describing", "VerifyConfig": ".verifying", "verify": ".verifying", "ImportConfig": ".importing",
    "import_momo": ".importing", "WorldConfig": ".world", "make_world": ".world",
}  # fmt: skip
__all__ = [
    "DescribeConfig",
    "ImportConfig",
    "PrepConfig",
    "PrepResult",
    "VerifyConfig",
    "WorldConfig",
    "describe",
    "import_momo",
    "make_world",
    "prep",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Imports a public name where it is first used, so that importing the package needs no optional package."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name], __name__), name)
