"""`momo merge`: several checkpoints of one base become one weights folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from momo.errors import MergeError
from momo.files import atomic_folder
from momo.weights import Card, save_weights, weights_paths

from .audit import Parent, audit, is_made, open_parent
from .config import MergeConfig
from .methods import METHODS
from .selection import read_selection


def merge(config: MergeConfig) -> Path:
    """Merges checkpoints and writes WEIGHTS with a card that names every parent.

    Args:
        config: What to merge and how.

    Returns:
        The new weights folder.

    Raises:
        CheckpointError: A parent is missing, damaged or altered.
        MergeError: The parents do not fit together, or an integer tensor differs between them.
        DataError: `out` exists.
    """
    base, checkpoints = _open_parents(config)
    audit(base, checkpoints)
    # Fixed order, so that the sums do not depend on how the checkpoints were listed.
    checkpoints = sorted(checkpoints, key=lambda parent: parent.card.sha256)
    with atomic_folder(Path(config.out)) as folder:
        save_weights(folder, _merged_tensors(config, base, checkpoints), _merged_card(config, base, checkpoints))
    scale = f", coefficient {config.coefficient:g}" if METHODS[config.method].uses_coefficient else ""
    names = ", ".join(sorted(parent.name for parent in checkpoints))
    print(f"merged {names} by {config.method}{scale}: {len(base.header)} tensors -> {config.out}")
    return Path(config.out)


def _open_parents(config: MergeConfig) -> tuple[Parent, list[Parent]]:
    if config.selection is None:
        assert config.base is not None
        named: list[tuple[str, Path, str | None]] = [(_label(Path(p)), Path(p), None) for p in config.checkpoints]
        base = open_parent("base", "base", Path(config.base))
    else:
        selection = read_selection(Path(config.selection))
        base = open_parent("base", "base", Path(selection.base["path"]))
        _check_hash("base", selection.base["sha256"], base)
        named = [(name, Path(chosen.checkpoint), chosen.sha256) for name, chosen in selection.sensors.items()]
    checkpoints = []
    for name, path, sha256 in named:
        parent = open_parent("checkpoint", name, path)
        if sha256 is not None:
            _check_hash(name, sha256, parent)
        checkpoints.append(parent)
    return base, checkpoints


def _label(path: Path) -> str:
    card = open_parent("checkpoint", path.name, path).card
    return "+".join(sensor["name"] for sensor in card.sensors) or path.name


def _check_hash(name: str, wanted: str, parent: Parent) -> None:
    if parent.card.sha256 != wanted:
        raise MergeError(
            "a weights file is not the one that was selected",
            seen=f"{name}: {parent.path} has sha256 {parent.card.sha256[:12]}...",
            rule=f"the selection names {wanted[:12]}...",
            fix="run momo select again",
        )


def _merged_tensors(config: MergeConfig, base: Parent, checkpoints: Sequence[Parent]) -> dict[str, torch.Tensor]:
    method = METHODS[config.method]
    readers = [safe_open(weights_paths(parent.path)[0], framework="pt") for parent in (base, *checkpoints)]
    merged = {}
    for name in base.header:
        start, *tuned = (reader.get_tensor(name) for reader in readers)
        for parent, tensor in zip((base, *checkpoints), (start, *tuned), strict=True):
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise MergeError("a parent is not finite", seen=f"{name} of {parent.path}", rule="no NaN or infinity")
        if start.is_floating_point():
            merged[name] = method.apply(start, tuned, config.coefficient).to(start.dtype)
        elif all(torch.equal(start, tensor) for tensor in tuned):
            merged[name] = start
        else:
            raise MergeError("an integer tensor differs", seen=name, rule="only floating-point tensors are merged")
    return merged


def _merged_card(config: MergeConfig, base: Parent, checkpoints: Sequence[Parent]) -> Card:
    method = METHODS[config.method]
    used: dict[str, Any] = {"name": config.method, "reference": method.reference}
    if method.uses_coefficient:
        used["coefficient"] = config.coefficient
    ordered = sorted(checkpoints, key=lambda parent: parent.name)
    sensors = [sensor for parent in ordered for sensor in parent.card.sensors]
    trained = ordered[0].card if is_made(base.card) else base.card
    normalisation = trained.normalisation if len(sensors) > 1 else ordered[0].card.normalisation
    if len(sensors) > 1:
        normalisation = normalisation | {"mean": None, "std": None}
    return Card(
        kind="merged",
        architecture=base.card.architecture,
        contents=base.card.contents,
        normalisation=normalisation,
        objective=trained.objective,
        sensors=sensors,
        data_fingerprints={k: v for parent in ordered for k, v in parent.card.data_fingerprints.items()},
        synthetic=any(parent.card.synthetic for parent in (base, *ordered)),
        parents=[
            {"role": p.role, "name": p.name, "sha256": p.card.sha256, "samples": p.card.samples}
            for p in (base, *ordered)
        ],
        method=used,
        licence=" AND ".join(sorted({parent.card.licence for parent in (base, *ordered)})),
    )
