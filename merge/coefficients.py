"""Factors of task vectors: of each checkpoint, times that of the layer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from momo.errors import MergeError

_BLOCK = re.compile(r"^(?P<stack>.*?(?:blocks|layers))\.(?P<number>\d+)\.")
_FIRST = ("patch_embed", "cls_token", "pos_embed", "reg_token", "mask_token", "decoder_embed", "decoder_pos_embed")


def depths(names: Iterable[str]) -> dict[str, float]:
    """Returns how deep each tensor lies, 0 to 1, encoder and decoder each by itself.

    Blocks are spread evenly from 0 to 1; what comes before them has depth 0, what comes after has depth 1.
    """
    found = {name: _BLOCK.match(name) for name in names}
    last: dict[str, int] = {}
    for match in found.values():
        if match:
            last[match["stack"]] = max(last.get(match["stack"], 0), int(match["number"]))

    def depth(name: str) -> float:
        match = found[name]
        if match is None:
            return 0.0 if name.startswith(_FIRST) else 1.0
        return int(match["number"]) / last[match["stack"]] if last[match["stack"]] else 0.0

    return {name: depth(name) for name in found}


def layer_factors(names: Sequence[str], layers: dict[str, float], ramp: Sequence[float]) -> dict[str, float]:
    """Returns the factor of each tensor that its layer gives.

    Args:
        names: Tensors of the merge.
        layers: Glob of tensor names to factor; the last glob that matches counts, without a match 1.
        ramp: Factors of the first and the last block, or empty.

    Raises:
        MergeError: A glob matches no tensor.
    """
    if ramp:
        first, last = ramp
        return {name: first + (last - first) * depth for name, depth in depths(names).items()}
    check_globs("layers", list(layers), names)
    factors = dict.fromkeys(names, 1.0)
    for glob, factor in layers.items():
        factors |= {name: factor for name in names if fnmatchcase(name, glob)}
    return factors


def check_globs(key: str, globs: Sequence[str], names: Sequence[str]) -> None:
    """Refuses globs that match nothing: a misspelt layer would otherwise be left out without a word.

    Raises:
        MergeError: A glob matches none of the names.
    """
    unknown = [glob for glob in globs if not any(fnmatchcase(name, glob) for name in names)]
    if unknown:
        groups = list(dict.fromkeys(f"{m[0]}*" if (m := _BLOCK.match(name)) else name for name in names))
        raise MergeError(
            f"{key} names layers that are not there",
            seen=", ".join(unknown),
            rule="a glob of tensor names that matches at least one",
            fix=f"names are like {', '.join(groups[:10])}",
        )


def parent_factors(names: Sequence[str], coefficient: float, coefficients: dict[str, float]) -> dict[str, float]:
    """Returns the factor of each checkpoint.

    Args:
        names: Checkpoints.
        coefficient: Of those that `coefficients` does not name.
        coefficients: Checkpoint to factor.

    Raises:
        MergeError: `coefficients` names a checkpoint that is not merged.
    """
    check_names("coefficients", coefficients, names)
    return {name: coefficients.get(name, coefficient) for name in names}


def check_names(key: str, given: Iterable[str], names: Sequence[str]) -> None:
    """Refuses names of checkpoints that are not merged.

    Raises:
        MergeError: A name is unknown.
    """
    if unknown := sorted(set(given) - set(names)):
        raise MergeError(
            f"{key} names a checkpoint that is not merged",
            seen=", ".join(unknown),
            rule=f"the checkpoints are {', '.join(names)}",
            fix="correct the name; models={name: place} gives names of your own",
        )
