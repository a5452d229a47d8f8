"""The data card as a page: its sections, made of the numbers, and how they become HTML and Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from momo.extras import require
from momo.pages import Picture, page_style, template_environment, tidy_markdown
from momo.version import __version__

from .describe_mosaic import Shown, mosaic

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Table:
    """One table of the card.

    Attributes:
        caption: Line above it.
        head: Names of the columns.
        rows: Cells as text, one a column.
        code: Columns whose cells are names or hashes.
    """

    caption: str
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    code: tuple[int, ...] = ()


@dataclass
class Section:
    """One section of the card.

    Attributes:
        key: Anchor.
        title: Heading.
        intro: Sentence under the heading.
        pictures: Plots, beside each other.
        tiles: Sample tiles.
        tables: Tables.
        words: (word, what it means).
        lines: Remarks.
        missing: Why something cannot be shown.
        wide: Pictures over the whole width.
        text: Preformatted text, (heading, text).
    """

    key: str
    title: str
    intro: str = ""
    pictures: list[Picture] = field(default_factory=list)
    tiles: list[Shown] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    words: list[tuple[str, str]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    wide: list[Picture] = field(default_factory=list)
    text: tuple[str, str] | None = None


@dataclass
class Card:
    """Everything the templates show.

    Attributes:
        title: Heading of the page.
        lead: What the corpus is, in a sentence or two.
        synthetic: Tiles were generated, not measured.
        facts: (name, value) pairs at the top.
        sections: The sections in order.
        front: Front matter of the Markdown.
        warnings: What a user of the corpus must know.
    """

    title: str
    lead: str
    synthetic: bool
    facts: list[tuple[str, str]]
    sections: list[Section]
    front: dict[str, Any]
    warnings: list[str] = field(default_factory=list)
    version: str = __version__

    def pictures(self) -> dict[str, bytes]:
        """Returns every figure of the Markdown by name."""
        found = {picture.name: picture.png for part in self.sections for picture in [*part.pictures, *part.wide]}
        return found | {f"{part.key}_tiles": mosaic(part.tiles) for part in self.sections if part.tiles}


def markdown_code(text: Any) -> str:
    """Makes a text a code span inside a table cell; there a bar is the only mark that must be escaped."""
    plain = " ".join(str(text).replace("`", "'").split())
    return f"`{plain}`".replace("|", "\\|") if plain else ""


def _fenced(text: str) -> str:
    """Returns text as a Markdown code block whose fence is longer than any inside it."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}yaml\n{text.rstrip()}\n{fence}"


def _environment(*, html: bool) -> Any:
    return template_environment(TEMPLATES, "prep", html=html, code=markdown_code, fenced=_fenced)


def render_html(card: Card) -> str:
    """Returns the card as one HTML document that needs nothing beside it."""
    css = page_style(TEMPLATES / "card.css", "prep")
    return str(_environment(html=True).get_template("card.html.j2").render(card=card, css=css))


def render_markdown(card: Card) -> str:
    """Returns the card as Markdown with YAML front matter; its figures lie in `figures/`."""
    front = require("yaml", "prep").safe_dump(card.front, sort_keys=False, allow_unicode=True, width=100)
    text = str(_environment(html=False).get_template("card.md.j2").render(card=card, front=front))
    return tidy_markdown(text)


def write_card(card: Card, folder: Path) -> None:
    """Writes `index.html`, `card.md` and `figures/` into an existing folder."""
    (folder / "figures").mkdir()
    for name, png in card.pictures().items():
        (folder / "figures" / f"{name}.png").write_bytes(png)
    (folder / "card.md").write_text(render_markdown(card), encoding="utf-8")
    (folder / "index.html").write_text(render_html(card), encoding="utf-8")
