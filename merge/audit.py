"""Checks before a merge, from headers and cards alone: every difference at once, nothing written when one is found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from momo.errors import MergeError
from momo.weights import Card

from .sources import Source

_SHOWN = 40


@dataclass(frozen=True)
class Parent:
    """One set of weights of a merge.

    Attributes:
        role: `base` or `checkpoint`.
        name: Name in tables and cards: the sensor, or what the user called it.
        source: Its tensors and card.
    """

    role: str
    name: str
    source: Source

    @property
    def card(self) -> Card | None:
        """Its card; None for weights from elsewhere."""
        return self.source.card


def audit(base: Parent | None, checkpoints: Sequence[Parent], merged: Sequence[str], rest: dict[str, str]) -> None:
    """Refuses a merge whose parts do not fit.

    Compared are names, shapes and dtypes of the tensors that are merged, architecture, contents, normalisation and
    objective of the cards, and the hash of the base that every checkpoint names. Weights without a card have no more
    than their tensors to compare.

    Args:
        base: The base, or None for methods without one.
        checkpoints: What is merged.
        merged: Tensors that are merged.
        rest: Tensors that are taken over, to the name of the parent they are taken from.

    Raises:
        MergeError: Something differs; the message holds one table with all differences.
    """
    parents = [*([base] if base is not None else []), *checkpoints]
    carded = [parent for parent in parents if parent.card is not None]
    found = [*_card_rows(carded), *_base_rows(base, checkpoints)]
    rows = [(what, *(cells.get(parent.name, "no card") for parent in parents)) for what, cells in found]
    rows += [*_tensor_rows(parents, merged), *_rest_rows(parents, rest)]
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
        fix="pretrain every sensor from the same base=..., correct the paths, or leave tensors out by exclude",
    )


_Row = tuple[str, dict[str, str]]


def _card_rows(parents: Sequence[Parent]) -> list[_Row]:
    cards = {parent.name: parent.card for parent in parents if parent.card is not None}
    rows: list[_Row] = []
    for field in sorted({field for card in cards.values() for field in card.architecture}):
        cells = {name: str(card.architecture.get(field, "missing")) for name, card in cards.items()}
        if len(set(cells.values())) > 1:
            rows.append((f"architecture {field}", cells))
    # A base made of foreign weights was trained by no momo: what it was fed and scored with says nothing here.
    trained = [name for name, card in cards.items() if not is_made(card)]
    for label, cells, compared in (
        ("normalisation", {n: str(card.normalisation.get("policy")) for n, card in cards.items()}, trained),
        ("objective", {n: _text(card.objective) for n, card in cards.items()}, trained),
        ("contents", {n: "+".join(sorted(card.contents)) for n, card in cards.items()}, list(cards)),
    ):
        if len({cells[name] for name in compared}) > 1:
            rows.append((label, cells))
    return rows


def is_made(card: Card) -> bool:
    """Says whether weights come from `momo pretrain init` and not from training."""
    return card.kind == "base" and (card.method or {}).get("name") == "init"


def _text(fields: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in sorted(fields.items())) or "none named"


def _base_rows(base: Parent | None, checkpoints: Sequence[Parent]) -> list[_Row]:
    named = {parent.name: parent.card.base_sha256 for parent in checkpoints if parent.card is not None}
    if not named:
        return []
    wanted = base.source.sha256 if base is not None else next(iter(named.values()))
    if all(sha256 == wanted for sha256 in named.values()):
        return []
    cells = {name: (sha256 or "none named")[:12] for name, sha256 in named.items()}
    if base is not None:
        cells[base.name] = base.source.sha256[:12]
    return [("sha256 of the base", cells)]


def _tensor_rows(parents: Sequence[Parent], names: Sequence[str]) -> list[tuple[str, ...]]:
    rows = []
    for name in names:
        infos = [parent.source.header.get(name) for parent in parents]
        if None in infos or len(set(infos)) > 1:
            cells = [f"{info.dtype}{list(info.shape)}" if info is not None else "missing" for info in infos]
            rows.append((name, *cells))
    return rows


def _rest_rows(parents: Sequence[Parent], rest: dict[str, str]) -> list[tuple[str, ...]]:
    headers = {parent.name: parent.source.header for parent in parents}
    return [
        (name, *("missing" if parent.name == giver else "" for parent in parents))
        for name, giver in rest.items()
        if name not in headers[giver]
    ]
