"""Puts the parts of the report together and writes them as one HTML file and as Markdown with figures."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from momo.pages import Picture, page_style, template_environment, tidy_markdown
from momo.sensors import sensor_colour
from momo.version import __version__

from .report_commands import Command
from .report_images import Gallery, montage
from .report_inputs import Selection
from .report_provenance import Table
from .report_tables import (
    Comparison,
    Score,
    comparison_sentence,
    join_words,
    rank_models,
    signed,
    summary_sentences,
)

TEMPLATES = Path(__file__).parent / "templates"

MISSING = {
    "scores": "No scores are shown: no RESULTS folder was given (`results` in the configuration; momo eval makes one).",
    "losses": "No loss curves are shown: no RUN folders and no selection were given (`runs`, `selection`).",
    "selection": "No picks are marked: no selection was given (`selection`; momo select makes one).",
    "tiles": "No tiles are shown: no corpora were given (`corpora`; momo prep makes them).",
    "reconstructions": "No reconstructions are shown: they need `corpora` and `weights` with a decoder trained on the "
    "same sensors.",
    "segmentation": "No segmentation is shown: the results given hold no segmentation run with example images.",
}


@dataclass(frozen=True)
class ScoreRow:
    """One model over all comparisons, None where it was not run."""

    model: str
    scores: list[Score | None]
    rank: str


@dataclass
class Page:
    """Everything the templates show; an empty part is replaced by the line in `missing`."""

    title: str
    synthetic: str = ""
    facts: list[tuple[str, str]] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    score_notes: list[str] = field(default_factory=list)
    forests: dict[str, Picture] = field(default_factory=dict)
    selection: Selection | None = None
    selection_plots: list[Picture] = field(default_factory=list)
    selection_lines: list[str] = field(default_factory=list)
    selection_table: Table | None = None
    run_plots: list[Picture] = field(default_factory=list)
    mosaics: list[Gallery] = field(default_factory=list)
    reconstructions: list[Gallery] = field(default_factory=list)
    overlays: list[Gallery] = field(default_factory=list)
    provenance: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    commands: list[Command] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=lambda: dict(MISSING))
    version: str = __version__

    @property
    def glossary(self) -> list[tuple[str, str]]:
        """Words explained, as (word, explanation)."""
        return [(str(word), str(text)) for word, text in OmegaConf.load(TEMPLATES / "glossary.yaml").items()]

    @cached_property
    def score_rows(self) -> list[ScoreRow]:
        """Rows of the large score table, best mean rank first."""
        rows = []
        for rank in rank_models(self.comparisons):
            by_test = [{score.model: score for score in comparison.scores} for comparison in self.comparisons]
            rows.append(ScoreRow(rank.model, [found.get(rank.model) for found in by_test], f"{rank.mean_rank:.1f}"))
        return rows

    @property
    def sentences(self) -> dict[str, str]:
        """What each comparison says, by its key."""
        return {comparison.key: comparison_sentence(comparison) for comparison in self.comparisons}

    @property
    def lead(self) -> str:
        """The first sentence of the summary."""
        if not self.comparisons:
            return "This page holds no scores; it shows what was prepared and trained so far."
        return summary_sentences(self.comparisons)[0]

    @property
    def points(self) -> list[str]:
        """The rest of the summary: the clearest test of each dataset, and how the merge was picked."""
        clearest: dict[str, Comparison] = {}
        for comparison in self.comparisons:
            known = clearest.get(comparison.dataset)
            if known is None or comparison.best.mean > known.best.mean:
                clearest[comparison.dataset] = comparison
        found = (
            [comparison_sentence(comparison) for comparison in clearest.values()] if len(self.comparisons) > 1 else []
        )
        if self.selection is not None:
            picks = join_words([f"{pick.sensor} at {pick.samples:,}" for pick in self.selection.picks.values()])
            within = "" if self.selection.epsilon is None else f", within an epsilon of {self.selection.epsilon:.3g}"
            found.append(f"Selected for the merge: {picks} samples, by {self.selection.rule_words}{within}.")
        return found

    def pictures(self) -> dict[str, bytes]:
        """Returns every figure of the Markdown by name: plots, and each gallery as one montage."""
        plots = [*self.forests.values(), *self.selection_plots, *self.run_plots]
        galleries = [*self.mosaics, *self.reconstructions, *self.overlays]
        return {plot.name: plot.png for plot in plots} | {gallery.name: montage(gallery) for gallery in galleries}


def _environment(*, html: bool) -> Any:
    return template_environment(TEMPLATES, "eval", html=html, colour=sensor_colour, signed=signed)


def render_html(page: Page) -> str:
    """Returns the page as one HTML document that needs nothing beside it."""
    environment = _environment(html=True)
    css = page_style(TEMPLATES / "report.css", "eval")
    return str(environment.get_template("report.html.j2").render(page=page, css=css))


def render_markdown(page: Page) -> str:
    """Returns the page as Markdown; its figures lie in `figures/`."""
    text = str(_environment(html=False).get_template("report.md.j2").render(page=page))
    return tidy_markdown(text)


def write_page(page: Page, folder: Path) -> None:
    """Writes `index.html`, `report.md` and `figures/` into an existing folder."""
    (folder / "figures").mkdir()
    for name, png in page.pictures().items():
        (folder / "figures" / f"{name}.png").write_bytes(png)
    (folder / "report.md").write_text(render_markdown(page), encoding="utf-8")
    (folder / "index.html").write_text(render_html(page), encoding="utf-8")
