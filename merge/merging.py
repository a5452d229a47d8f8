"""`momo merge`: several checkpoints of one base become one weights folder."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from momo.errors import CheckpointError, DataError, MergeError
from momo.extras import require
from momo.files import atomic_folder, holds_only, write_json
from momo.weights import CARD_NAME, TENSORS_NAME, load_card

from .card import card_metadata, merged_card
from .config import MergeConfig
from .plan import MergePlan, make_plan
from .stream import free_bytes, memory_bytes, output_bytes, write_merged

_SHOWN = 12


def merge(config: MergeConfig) -> Path | None:
    """Merges checkpoints and writes WEIGHTS with a card that names every parent.

    The parents are mapped and merged piece by piece, so memory does not grow with the model. The result does not
    depend on the order of the checkpoints or on the number of threads, bit for bit.

    Args:
        config: What to merge and how.

    Returns:
        The new weights folder; None with `dry_run`.

    Raises:
        CheckpointError: A parent is missing or damaged; with `verify`, altered.
        MergeError: The parents do not fit together, are not finite, an option names what is not there, or the disk
            is full. What stood at `out` is untouched.
        DataError: `out` exists and `overwrite` is false, or it is no merge and stays.
    """
    plan = make_plan(config)
    print(describe(plan))
    if config.dry_run:
        return None
    out = Path(config.out)
    if os.path.lexists(out) and not config.overwrite:
        raise DataError(
            "the output exists already",
            seen=out,
            rule="an artefact is never overwritten in passing",
            fix="choose another out=, or add --overwrite",
        )
    _check_place(out, plan)
    _check_room(out, output_bytes(plan))
    tqdm = require("tqdm", "merge").tqdm
    with (
        atomic_folder(out, replaces=_is_merge if config.overwrite else None) as folder,
        tqdm(total=output_bytes(plan), unit="B", unit_scale=True, desc="merge", disable=None, leave=False) as bar,
    ):
        card = merged_card(plan)
        card.sha256 = write_merged(plan, folder / TENSORS_NAME, card_metadata(card), bar.update)
        write_json(folder / CARD_NAME, card.to_dict())
    print(f"written: {out} (sha256 {card.sha256[:12]})")
    return out


def describe(plan: MergePlan) -> str:
    """Returns what will be merged, in lines for a reader: method, parents, tensors, memory and size."""
    config, method = plan.config, plan.method
    size, memory = output_bytes(plan), memory_bytes(plan)
    lines = [f"{method.name} ({method.reference}): {len(plan.merged)} tensors of {len(plan.parents)} checkpoints"]
    for parent in plan.everyone:
        factor = ""
        if parent.role == "checkpoint" and "coefficients" in method.uses:
            factor = f"  factor {plan.factors[parent.name]:g}"
        samples = f"  {parent.card.samples:,} samples" if parent.card is not None and parent.card.samples else ""
        card = "" if parent.card is not None else "  no card: nothing but its tensors was compared"
        lines.append(f"  {parent.name:<10} {parent.source.sha256[:12]}  {parent.source.place}{samples}{factor}{card}")
    scaled = sum(factor != 1 for factor in plan.layers.values())
    if scaled:
        low, high = min(plan.layers.values()), max(plan.layers.values())
        lines.append(f"  layer factors from {low:g} to {high:g}, other than 1 in {scaled} tensors")
    for giver in sorted(set(plan.rest.values())):
        lines.append(f"  not merged, from {giver}: {_some(name for name, of in plan.rest.items() if of == giver)}")
    for first, second in _twins(plan):
        lines.append(f"  WARNING: {first} and {second} are the same file")
    if plan.dropped:
        lines.append(f"  not merged, left out: {_some(plan.dropped)}")
    lines.append(f"  result {size / 1e6:,.1f} MB, memory for tensors about {memory / 1e6:,.1f} MB, {config.precision}")
    return "\n".join(lines)


def _twins(plan: MergePlan) -> list[tuple[str, str]]:
    seen: dict[str, str] = {}
    twins = []
    for parent in plan.parents:
        if first := seen.get(parent.source.sha256):
            twins.append((first, parent.name))
        seen.setdefault(parent.source.sha256, parent.name)
    return twins


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - _SHOWN} more (all in the card)" if len(listed) > _SHOWN else ""
    return ", ".join(listed[:_SHOWN]) + more


def _is_merge(folder: Path) -> bool:
    if not holds_only(folder, TENSORS_NAME, CARD_NAME):
        return False
    try:
        return load_card(folder).kind == "merged"
    except CheckpointError:
        return False


def _check_place(out: Path, plan: MergePlan) -> None:
    """Refuses to write into an input, or to take the place of one."""
    here = out.resolve()
    for parent in plan.everyone:
        place = Path(parent.source.place)
        if not place.exists():  # a timm model
            continue
        there = place.resolve()
        if here.is_relative_to(there) or there.is_relative_to(here):
            raise MergeError(
                "the output is or lies in an input of the merge",
                seen=f"out={out}, {parent.name} is {place}",
                rule="inputs stay as they are",
                fix="choose another out=",
            )


def _check_room(out: Path, needed: int) -> None:
    room = free_bytes(out.parent)
    if room < needed:
        raise MergeError(
            "the disk is full",
            seen=f"{room / 1e6:,.0f} MB free at {out.parent}",
            rule=f"the merged weights take {needed / 1e6:,.0f} MB",
            fix="make room or choose another out=",
        )
