"""momo: foundation models for Mars orbital imagery.

Importing this package needs torch, timm and safetensors only, and imports even those where they are first used:
a worker that cuts tiles needs none of them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .errors import CheckpointError, ConfigError, DataError, EvalError, MergeError, MomoError
from .version import __version__

if TYPE_CHECKING:
    from .models import MaskedAutoencoder as MaskedAutoencoder
    from .models import build_mae as build_mae
    from .models import load_encoder as load_encoder
    from .weights import Card as Card
    from .weights import load_card as load_card
    from .weights import load_weights as load_weights
    from .weights import save_weights as save_weights

_HOME = {
    "MaskedAutoencoder": ".models", "build_mae": ".models", "load_encoder": ".models", "Card": ".weights",
    "load_card": ".weights", "load_weights": ".weights", "save_weights": ".weights",
}  # fmt: skip

__all__ = [
    "Card",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "EvalError",
    "MaskedAutoencoder",
    "MergeError",
    "MomoError",
    "__version__",
    "build_mae",
    "load_card",
    "load_encoder",
    "load_weights",
    "save_weights",
]


def __getattr__(name: str) -> Any:
    """Imports a public name where it is first used."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name], __name__), name)
