"""Files of `momo merge fisher`, as a merge reads them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open

from momo.errors import MergeError

from .audit import Parent
from .sources import Source, open_source

FISHER_KEY = "momo_fisher"


def open_fisher(parent: Parent, place: str | None, names: Sequence[str]) -> Source:
    """Opens the Fisher information of a checkpoint.

    Args:
        parent: The checkpoint.
        place: The file, or None when none was given.
        names: Tensors that are merged.

    Raises:
        MergeError: It is missing, of another checkpoint, or does not fit it.
    """
    if place is None:
        raise MergeError(
            "a checkpoint has no Fisher file",
            seen=parent.name,
            rule="one file a checkpoint: fisher={name: file, ...}",
            fix="make it with momo merge fisher",
        )
    source = open_source(place)
    _check_origin(parent, place)
    header, wanted = source.header, parent.source.header
    different = [name for name in names if name not in header or header[name].shape != wanted[name].shape]
    if different:
        raise MergeError(
            "a Fisher file does not fit its checkpoint",
            seen=f"{place}: {', '.join(different[:5])}",
            rule="one tensor of the same shape for each tensor that is merged",
            fix="make it again with momo merge fisher",
        )
    return source


def _check_origin(parent: Parent, place: str) -> None:
    try:
        with safe_open(Path(place), framework="pt") as file:
            stored = json.loads((file.metadata() or {})[FISHER_KEY])["checkpoint_sha256"]
    except (SafetensorError, OSError, KeyError, TypeError, json.JSONDecodeError):
        raise MergeError(
            "this is no Fisher file",
            seen=place,
            rule=f"safetensors with {FISHER_KEY} in its metadata",
            fix="make it with momo merge fisher",
        ) from None
    if stored != parent.source.sha256:
        raise MergeError(
            "a Fisher file is of another checkpoint",
            seen=f"{place}: sha256 {stored[:12]}..., {parent.name} has {parent.source.sha256[:12]}...",
            rule="the Fisher information is taken at the weights that are merged",
            fix="make it again with momo merge fisher",
        )
