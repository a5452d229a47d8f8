"""Checks before a merge, from headers and cards alone: every difference at once, nothing written when one is found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from momo.errors import MergeError
from momo.weights import Card, TensorInfo, load_card, read_header

_SHOWN = 40


@dataclass(frozen=True)
class Parent:
    """One weights file of a merge.

    Attributes:
        role: `base` or `checkpoint`.
        name: Name in tables and cards: the sensor, or the folder.
        path: Weights folder or file.
        card: Its card.
        header: Its tensors' shapes and dtypes.
    """

    role: str
    name: str
    path: Path
    card: Card
    header: dict[str, TensorInfo]


def open_parent(role: str, name: str, path: Path) -> Parent:
    """Opens a weights file for merging; its hash is compared with its card.

    Raises:
        CheckpointError: Files are missing, damaged or altered.
    """
    return Parent(role, name, Path(path), load_card(path, check_hash=True), read_header(path))


def audit(base: Parent, checkpoints: Sequence[Parent]) -> None:
    """Refuses a merge whose parts do not fit.

    Compared are the tensor names, shapes and dtypes, the architecture and normalisation of the cards, and the hash
    of the base that every checkpoint names.

    Raises:
        MergeError: Something differs; the message holds one table with all differences.
    """
    parents = [base, *checkpoints]
    rows = [*_card_rows(parents), *_base_rows(base, checkpoints), *_tensor_rows(parents)]
    if not rows:
        return
    shown = [("what", *(parent.name for parent in parents)), *rows[:_SHOWN]]
    widths = [max(len(row[column]) for row in shown) for column in range(len(parents) + 1)]
    table = "\n".join("  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in shown)
    if len(rows) > _SHOWN:
        table += f"\n  and {len(rows) - _SHOWN} more"
    raise MergeError(
        f"the checkpoints do not fit together: {len(rows)} difference(s)",
        seen=f"\n{table}\n",
        rule="base and checkpoints have the same tensors and the checkpoints started from this very base",
        fix="pretrain every sensor from the same base=..., or correct the paths",
    )


def _card_rows(parents: Sequence[Parent]) -> list[tuple[str, ...]]:
    rows = []
    fields = sorted({field for parent in parents for field in parent.card.architecture})
    for field in fields:
        cells = [str(parent.card.architecture.get(field, "missing")) for parent in parents]
        if len(set(cells)) > 1:
            rows.append((f"architecture {field}", *cells))
    # A base made of foreign weights was trained by no momo: what it was fed and scored with says nothing here.
    trained = [parent for parent in parents if not is_made(parent.card)]
    for label, cells, compared in (
        ("normalisation", [str(parent.card.normalisation.get("policy")) for parent in parents], trained),
        ("objective", [_text(parent.card.objective) for parent in parents], trained),
        ("contents", ["+".join(sorted(parent.card.contents)) for parent in parents], parents),
    ):
        if len({cell for cell, parent in zip(cells, parents, strict=True) if parent in compared}) > 1:
            rows.append((label, *cells))
    return rows


def is_made(card: Card) -> bool:
    """Says whether weights come from `momo pretrain init` and not from training."""
    return card.kind == "base" and (card.method or {}).get("name") == "init"


def _text(fields: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in sorted(fields.items())) or "none named"


def _base_rows(base: Parent, checkpoints: Sequence[Parent]) -> list[tuple[str, ...]]:
    named = [(parent.card.base_sha256 or "none named")[:12] for parent in checkpoints]
    if all(parent.card.base_sha256 == base.card.sha256 for parent in checkpoints):
        return []
    return [("sha256 of the base", base.card.sha256[:12], *named)]


def _tensor_rows(parents: Sequence[Parent]) -> list[tuple[str, ...]]:
    rows = []
    for name in sorted({name for parent in parents for name in parent.header}):
        cells = [
            f"{parent.header[name].dtype}{list(parent.header[name].shape)}" if name in parent.header else "missing"
            for parent in parents
        ]
        if len(set(cells)) > 1:
            rows.append((name, *cells))
    return rows
