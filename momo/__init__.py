"""momo: foundation models for Mars orbital imagery.

Importing this package needs torch, timm and safetensors only; DeepSpeed, GDAL, WebDataset and matplotlib are
imported by the functions that use them.
"""

from .errors import CheckpointError, ConfigError, DataError, EvalError, MergeError, MomoError
from .models import MaskedAutoencoder, build_mae, load_encoder
from .version import __version__
from .weights import Card, load_card, load_weights, save_weights

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
