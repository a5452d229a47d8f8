"""`momo select`: from validation curves of several runs to one SELECTION."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import yaml

from momo.errors import MergeError
from momo.extras import require
from momo.runs import CONFIG_NAME
from momo.weights import load_card

from .config import SelectConfig
from .curves import Curve, read_curve, sensor_order
from .evl import Pick, distance, early_stop, last, select_evl
from .plot import plot_selection
from .selection import Chosen, Selection


def select(config: SelectConfig) -> Path:
    """Chooses one checkpoint of each run and writes SELECTION and its plot.

    Args:
        config: Runs, rule and epsilon.

    Returns:
        The SELECTION file.

    Raises:
        CheckpointError: A run is missing, empty, or its base is not there.
        MergeError: The runs do not belong together: other base, other validation protocol, two of one sensor.
    """
    require("matplotlib.figure", "eval")
    curves = sorted((read_curve(Path(run)) for run in config.runs), key=lambda curve: sensor_order(curve.sensor))
    _check_comparable(curves)
    base = _find_base(config, curves)
    requested = config.epsilon
    epsilon = requested if requested is not None else epsilon_from_errors(curves)
    pick, notes = _apply_rule(config.rule, curves, epsilon)
    if requested is None:
        notes.insert(0, f"Epsilon {epsilon:.4g} is twice the standard error of a difference of two losses.")
    selection = Selection(
        rule=config.rule,
        epsilon=pick.epsilon,
        epsilon_requested=requested,
        distance=pick.distance,
        base=base,
        sensors={c.sensor: _chosen(c, i) for c, i in zip(curves, pick.indices, strict=True)},
        rejected=_rejected(curves, pick),
        notes=notes,
    )
    out = Path(config.out)
    selection.write(out)
    plot_selection(curves, pick, config.rule, out.with_suffix(".png"))
    print(_table(selection))
    for note in notes:
        print(f"  note: {note}")
    return out


def epsilon_from_errors(curves: list[Curve]) -> float:
    """Returns twice the standard error of the difference of two losses: 2 * sqrt(a^2 + b^2).

    a and b are the two largest of the curves' median standard errors. Losses closer than this cannot be told apart at
    about the 95 % level.

    Raises:
        MergeError: A checkpoint has no standard error (one validation tile).
    """
    medians = []
    for curve in curves:
        errors = [curve.val_loss(i)["stderr"] for i in range(len(curve.checkpoints))]
        if any(error is None for error in errors):
            raise MergeError(
                "a validation loss has no standard error",
                seen=curve.run,
                rule="two validation tiles or more",
                fix="give epsilon=... yourself, or validate on more tiles",
            )
        medians.append(sorted(errors)[len(errors) // 2])
    first, second = sorted(medians)[-2:]
    return 2 * math.hypot(first, second)


def _check_comparable(curves: list[Curve]) -> None:
    names = [curve.sensor for curve in curves]
    if len(set(names)) < len(names):
        raise MergeError("two runs are of one sensor", seen=", ".join(names), rule="one run a sensor")
    bases = {c.sensor: checkpoint.card.base_sha256 for c in curves for checkpoint in c.checkpoints}
    if len(set(bases.values())) > 1 or None in bases.values():
        shown = ", ".join(f"{name} {(sha or 'none')[:12]}" for name, sha in bases.items())
        raise MergeError(
            "the runs do not start from one base",
            seen=shown,
            rule="task vectors can be added only when they start at the same weights",
            fix="pretrain every sensor with the same base=...",
        )
    protocols = {c.sensor: c.val_loss(i)["protocol"] for c in curves for i in range(len(c.checkpoints))}
    if len(set(protocols.values())) > 1:
        shown = ", ".join(f"{name} {protocol[:12]}" for name, protocol in protocols.items())
        raise MergeError(
            "the validation losses are not comparable",
            seen=f"protocols {shown}",
            rule="same masks, normalisation, loss and input size for all runs",
            fix="pretrain with the same model, data.normalisation and validation.seed",
        )


def _find_base(config: SelectConfig, curves: list[Curve]) -> dict[str, str]:
    wanted = curves[0].checkpoints[-1].card.base_sha256
    assert wanted is not None
    path = config.base
    if path is None:
        stored = yaml.safe_load((curves[0].run / CONFIG_NAME).read_text(encoding="utf-8"))
        path = str(stored["base"])
    found = load_card(Path(path)).sha256
    if found != wanted:
        raise MergeError(
            "the base is not the one the runs started from",
            seen=f"{path} has sha256 {found[:12]}...",
            rule=f"the runs name {wanted[:12]}...",
            fix="give the right one with base=...",
        )
    return {"path": path, "sha256": wanted}


def _apply_rule(rule: str, curves: list[Curve], epsilon: float) -> tuple[Pick, list[str]]:
    candidates = [curve.candidates for curve in curves]
    if rule == "evl":
        pick = select_evl(candidates, epsilon)
        if pick.feasible:
            return pick, []
        return pick, [
            f"NO TUPLE AGREES within epsilon {epsilon:.4g}: the smallest feasible epsilon "
            f"{pick.epsilon:.4g} was used instead, so these losses are not equal at the level asked for."
        ]
    indices = tuple((early_stop if rule == "early_stop" else last)(curve) for curve in candidates)
    losses = [curve[i].loss for curve, i in zip(candidates, indices, strict=True)]
    spread = max(losses) - min(losses)
    return Pick(indices, spread, distance(candidates, indices), True), [
        f"Rule {rule!r} does not look at epsilon; {spread:.4g} is the spread of the chosen losses."
    ]


def _chosen(curve: Curve, index: int) -> Chosen:
    checkpoint, val_loss = curve.checkpoints[index], curve.val_loss(index)
    return Chosen(
        run=str(curve.run),
        checkpoint=str(checkpoint.path),
        sha256=checkpoint.card.sha256,
        samples=checkpoint.samples,
        val_loss=val_loss["loss"],
        val_stderr=val_loss["stderr"],
        early_stop_samples=curve.checkpoints[early_stop(curve.candidates)].samples,
    )


def _rejected(curves: list[Curve], pick: Pick) -> list[dict[str, Any]]:
    chosen_losses = [curve.val_loss(i)["loss"] for curve, i in zip(curves, pick.indices, strict=True)]
    rejected = []
    for number, (curve, chosen) in enumerate(zip(curves, pick.indices, strict=True)):
        others = chosen_losses[:number] + chosen_losses[number + 1 :]
        for index, checkpoint in enumerate(curve.checkpoints):
            if index == chosen:
                continue
            loss = curve.val_loss(index)["loss"]
            gap = max(abs(loss - other) for other in others)
            far = gap > pick.epsilon
            reason = f"differs by {gap:.4g} from another chosen loss" if far else "another checkpoint ranked before it"
            rejected.append({"sensor": curve.sensor, "samples": checkpoint.samples, "val_loss": loss, "reason": reason})
    return rejected


def _table(selection: Selection) -> str:
    lines = [f"rule {selection.rule}, epsilon {selection.epsilon:.4g}, distance {selection.distance:,.0f} samples"]
    lines.append(f"  {'sensor':<8} {'samples':>12} {'val loss':>9} {'+-':>8} {'early stop at':>14}")
    for name, chosen in selection.sensors.items():
        error = f"{chosen.val_stderr:.4f}" if chosen.val_stderr is not None else "-"
        lines.append(
            f"  {name:<8} {chosen.samples:>12,} {chosen.val_loss:>9.4f} {error:>8} {chosen.early_stop_samples:>14,}"
        )
    return "\n".join(lines)
