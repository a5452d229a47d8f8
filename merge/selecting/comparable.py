"""May these curves be compared and merged: one validation protocol, one validation set a run, one base."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from momo.errors import CheckpointError, MergeError

from ..sources import open_source
from .curves import Curve, Point


class Gate:
    """Refuses what does not belong together, unless the check was let through by name.

    Args:
        allow: Names of `momo.merge.selecting.config.ALLOWED`.

    Attributes:
        notes: One sentence for each check that was let through.
    """

    def __init__(self, allow: Sequence[str]) -> None:
        self._allow = tuple(allow)
        self.notes: list[str] = []

    def refuse(self, name: str, error: MergeError | CheckpointError) -> None:
        """Raises the error, or notes it when `name` is allowed."""
        if name not in self._allow:
            fix = f"{error.fix}; or let it through with allow=[{name}]" if error.fix else f"or allow=[{name}]"
            raise type(error)(error.what, seen=error.seen, rule=error.rule, fix=fix)
        self.notes.append(f"ALLOWED {name}: {error.what}: {error.seen}.")


def check_comparable(curves: Sequence[Curve], gate: Gate) -> None:
    """Checks that the losses of the curves may be compared.

    The validation sets of two sensors differ by nature; what must agree is the protocol: masks, normalisation, loss and
    input size. Within a run, and for two runs of one sensor, the tiles must agree too.

    Raises:
        MergeError: A check fails that `gate` does not let through.
    """
    _check_protocols(curves, gate)
    _check_tiles(curves, gate)


def check_names(curves: Sequence[Curve]) -> None:
    """Checks that the curves are of different runs under different names.

    Raises:
        MergeError: A run or a name is given twice.
    """
    places = [curve.place.resolve() for curve in curves]
    twice = [curve for curve in curves if places.count(curve.place.resolve()) > 1]
    if twice and len({curve.name for curve in twice}) > 1:
        raise MergeError("one run is given twice", seen=twice[0].place, rule="different runs", fix="leave one out")
    names = [curve.name for curve in curves]
    if len(set(names)) < len(names):
        raise MergeError(
            "two runs are of one sensor",
            seen=", ".join(names),
            rule="one run a sensor, or a name for each run",
            fix="write runs={early: runs/ctx-1, late: runs/ctx-2}",
        )


def _check_protocols(curves: Sequence[Curve], gate: Gate) -> None:
    unknown = [curve.name for curve in curves if any(point.protocol is None for point in curve.points)]
    if unknown:
        gate.refuse(
            "unknown_protocol",
            MergeError(
                "it is not known whether the losses are comparable",
                seen=f"no protocol for {', '.join(unknown)}",
                rule="same masks, normalisation, loss and input size for all runs",
                fix="give curves as JSON with a protocol",
            ),
        )
    protocols = {c.name: list(dict.fromkeys(p.protocol for p in c.points if p.protocol is not None)) for c in curves}
    if len({protocol for found in protocols.values() for protocol in found}) <= 1:
        return
    within = [f"within {name}: {' and '.join(p[:12] for p in found)}" for name, found in protocols.items() if found[1:]]
    shown = ", ".join(f"{name} {found[-1][:12]}" for name, found in protocols.items() if found)
    gate.refuse(
        "protocol",
        MergeError(
            "the validation losses are not comparable",
            seen=f"protocols {'; '.join(within) or shown}. {differing_parts(curves)}",
            rule="same masks, normalisation, loss and input size for all runs",
            fix="pretrain with the same model, loss, data.normalisation and validation.seed, or validate again",
        ),
    )


def differing_parts(curves: Sequence[Curve]) -> str:
    """Says which parts of the validation protocol differ, as far as cards and configurations tell."""
    parts = [(curve.name, _parts(curve, point)) for curve in curves for point in curve.points if point.card is not None]
    differing = []
    for key in dict.fromkeys(key for _, found in parts for key in found):
        values: dict[str, list[str]] = {}
        for name, found in parts:
            names = values.setdefault(str(found.get(key)), [])
            if name not in names:
                names.append(name)
        if len(values) > 1:
            differing.append(f"{key}: " + ", ".join(f"{value} ({'/'.join(names)})" for value, names in values.items()))
    if differing:
        return "What differs: " + "; ".join(differing)
    return "The cards do not tell which part differs: it is the masks' seed or a constant of the loss"


def _parts(curve: Curve, point: Point) -> dict[str, Any]:
    card = point.card
    assert card is not None
    validation = curve.settings.get("validation")
    parts = {f"normalisation {key}": card.normalisation.get(key) for key in ("policy", "clip")}
    parts |= {f"masks {key}": card.objective.get(key) for key in ("mask_ratio",)}
    parts["masks seed"] = validation.get("seed") if isinstance(validation, dict) else None
    parts["loss norm_pix_loss"] = card.objective.get("norm_pix_loss")
    parts["loss terms"] = card.objective.get("loss", "mse alone")
    return parts | {f"input {key}": card.architecture.get(key) for key in ("image_size", "patch_size", "in_chans")}


def _check_tiles(curves: Sequence[Curve], gate: Gate) -> None:
    fix = "select over checkpoints validated on the same tiles, or validate them again"
    prints: dict[str, dict[str, str]] = {}
    for curve in curves:
        cards = [point.card for point in curve.points if point.card is not None]
        counts = list(dict.fromkeys(card.val_loss["count"] for card in cards if card.val_loss is not None))
        if len(counts) > 1:
            error = MergeError(
                "the checkpoints of a run were validated on different numbers of tiles",
                seen=f"{curve.name}: {' and '.join(map(str, counts))}",
                rule="one validation set a run",
                fix=fix,
            )
            gate.refuse("count", error)
        for card in cards:
            if (found := card.data_fingerprints.get(curve.sensor)) is not None:
                prints.setdefault(curve.sensor, {}).setdefault(found, curve.name)
    for sensor, names in prints.items():
        if len(names) > 1:
            error = MergeError(
                "the losses of one sensor are from different corpora",
                seen=f"{sensor}: " + ", ".join(f"{name} {found[:12]}" for found, name in names.items()),
                rule="one validation set a sensor",
                fix=fix,
            )
            gate.refuse("fingerprint", error)


def find_base(path: str | None, curves: Sequence[Curve], gate: Gate) -> dict[str, str]:
    """Finds the base that all runs started from.

    Args:
        path: Where the user says it is; None: where the first run that names one took it from.
        curves: The runs.
        gate: What is let through.

    Returns:
        `path` and `sha256`.

    Raises:
        CheckpointError: The base is not there.
        MergeError: The runs start from different bases, from another one than given, or do not say.
    """
    hashes = {curve.name: list(dict.fromkeys(point.base_sha256 for point in curve.points)) for curve in curves}
    known = {sha for found in hashes.values() for sha in found if sha is not None}
    unknown = [name for name, found in hashes.items() if None in found]
    if len(known) > 1:
        shown = ", ".join(f"{name} {(sha or 'none')[:12]}" for name, found in hashes.items() for sha in found)
        error = MergeError(
            "the runs do not start from one base",
            seen=shown,
            rule="task vectors can be added only when they start at the same weights",
            fix="pretrain every sensor with the same base=...",
        )
        gate.refuse("base", error)
    if unknown:
        error = MergeError(
            "it is not known whether the runs start from one base",
            seen=f"no base for {', '.join(unknown)}",
            rule="task vectors can be added only when they start at the same weights",
            fix="pretrain with base=..., or give curves as JSON with the base's sha256",
        )
        gate.refuse("unknown_base", error)
    path = path or next((curve.base_path for curve in curves if curve.base_path), None)
    if path is None:
        raise MergeError("no run names the place of its base", rule="a selection names its base", fix="give base=...")
    sha256 = _hash_of_base(path)
    if known and sha256 not in known:
        error = MergeError(
            "the base is not the one the runs started from",
            seen=f"{path} has sha256 {sha256[:12]}...",
            rule=f"the runs name {', '.join(sorted(sha[:12] for sha in known))}...",
            fix="give the right one with base=...",
        )
        gate.refuse("base", error)
    return {"path": path, "sha256": sha256}


def _hash_of_base(path: str) -> str:
    try:
        return open_source(path).sha256
    except CheckpointError as error:
        raise CheckpointError(
            f"the base cannot be used: {error.what}",
            seen=error.seen,
            rule=error.rule,
            fix="give its place with base=...",
        ) from None


def hash_of_checkpoint(point: Point, gate: Gate) -> str:
    """Returns the hash of a chosen checkpoint; empty when it is not there and that was let through.

    Raises:
        CheckpointError: It is not there.
    """
    if point.card is not None:
        return point.card.sha256
    if not point.checkpoint.exists():
        error = CheckpointError(
            "a chosen checkpoint is not there",
            seen=point.checkpoint,
            rule="paths in a curve file are relative to the file",
            fix="correct the path in the curve file",
        )
        gate.refuse("missing_checkpoint", error)
        return ""
    return open_source(point.checkpoint).sha256
