"""What the pages that momo writes have in common: pictures inside the page, safe Markdown, templates and style."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .extras import require

_STYLE = Path(__file__).parent / "page.css"


@dataclass(frozen=True)
class Picture:
    """One image of a page.

    Attributes:
        name: File name without suffix, unique on the page.
        png: The bytes.
        alt: What it shows, for those who do not see it.
        caption: Line under it.
        width: Shown width at most, CSS pixels.
    """

    name: str
    png: bytes
    alt: str
    caption: str = ""
    width: int = 520


def data_uri(png: bytes) -> str:
    """Returns an image as text that stands in the page itself."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def markdown_cell(text: Any) -> str:
    """Makes a text safe inside a Markdown table cell, heading, line or alt text."""
    escaped = str(text).replace("\\", "\\\\")
    for mark in "|*_[]<>`#":
        escaped = escaped.replace(mark, "\\" + mark)
    return " ".join(escaped.split())


def tidy_markdown(text: str) -> str:
    """Returns rendered Markdown without trailing blanks and with at most one empty line in a row."""
    lines = [line.rstrip() for line in text.split("\n")]
    kept = [line for number, line in enumerate(lines) if line or (number and lines[number - 1])]
    return "\n".join(kept).strip("\n") + "\n"


def template_environment(folder: Path, extra: str, *, html: bool, **filters: Any) -> Any:
    """Returns a Jinja environment with the filters `data_uri` and `cell`, and strict about unknown names.

    Args:
        folder: Folder of the templates.
        extra: The extra of momo that installs Jinja for the caller.
        html: Escape what is put in.
        **filters: More filters by name.
    """
    jinja2 = require("jinja2", extra)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=html,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters.update(data_uri=data_uri, cell=markdown_cell, **filters)
    return environment


def page_style(own: Path, extra: str) -> Any:
    """Returns the common style with a page's own rules after it, as markup that is not escaped again."""
    text = _STYLE.read_text(encoding="utf-8") + own.read_text(encoding="utf-8")
    return require("markupsafe", extra).Markup(text)
