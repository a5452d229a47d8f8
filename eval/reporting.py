"""The report: one self-contained page, and the same as Markdown, made from the five artefacts and nothing else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from momo.config import option
from momo.corpus import Corpus
from momo.errors import CheckpointError, ConfigError, EvalError
from momo.files import atomic_folder, holds_only
from momo.weights import Card, load_card

from .report_commands import commands
from .report_figures import forest_plot, run_plot, selection_plots
from .report_images import ShownModel, load_shown_model, reconstructions, tile_mosaic
from .report_inputs import Run, Selection, read_run, read_selection
from .report_overlays import overlays
from .report_page import Page, write_page
from .report_provenance import (
    corpus_table,
    dataset_table,
    facts,
    model_table,
    protocol_table,
    run_table,
    selection_lines,
    selection_table,
)
from .report_scores import build_comparisons, score_notes
from .report_tables import join_words
from .results import Result, load_results


@dataclass(kw_only=True)
class ShownWeights:
    """Weights whose reconstructions are shown."""

    name: str = option(help="name on the page, for example merged")
    path: str = option(help="weights folder or safetensors file, with decoder")


@dataclass(kw_only=True)
class ReportConfig:
    """What the report shows; everything but `out` may be left out, as long as something is given."""

    out: str = option(help="folder to write index.html, report.md and figures/ into; an older report there is replaced")
    title: str = option("momo report", "heading of the page")
    results: str | None = option(None, "RESULTS folder of momo eval: scores and segmentation pictures")
    runs: Any = option(None, "RUN folders of momo pretrain: loss curves; name: path pairs, or a list of paths")
    selection: str | None = option(None, "SELECTION file of momo select; its runs are shown when runs is empty")
    weights: list[ShownWeights] = option([], "weights whose reconstructions are shown, in this order")
    corpora: list[str] = option([], "CORPUS folders or URLs of momo prep: tiles, and input of the reconstructions")
    datasets: list[str] = option([], "labelled dataset folders; only needed when the RESULTS folder has no examples/")
    models: list[str] = option([], "models of the results to outline on test images; empty: untrained, base and merged")
    seed: int = option(0, "which tiles are drawn and which patches are hidden")
    tiles: int = option(12, "tiles shown of each corpus; 0 shows none")
    examples: int = option(3, "tiles reconstructed of each corpus; 0 shows none")
    test_images: int = option(4, "test images shown of each segmentation dataset; 0 shows none")

    def __post_init__(self) -> None:
        self.runs = {} if self.runs is None else self.runs
        if not isinstance(self.runs, (dict, list)) or not all(isinstance(path, str) for path in _values(self.runs)):
            raise ConfigError("runs cannot be read", seen=self.runs, rule="name: path pairs, or a list of paths")
        for key in ("tiles", "examples", "test_images"):
            if getattr(self, key) < 0:
                raise ConfigError(f"{key} is out of range", seen=getattr(self, key), rule="0 or more")
        twice = [name for name, count in Counter(shown.name for shown in self.weights).items() if count > 1]
        if twice:
            raise ConfigError("two weights have one name", seen=", ".join(twice), rule="each name once")

    def run_folders(self) -> dict[str, Path]:
        """Returns the RUN folders by name; the names of a list are those of its folders."""
        if isinstance(self.runs, dict):
            return {str(name): Path(path) for name, path in self.runs.items()}
        names = Counter(Path(path).name for path in self.runs)
        return {Path(path).name if names[Path(path).name] == 1 else path: Path(path) for path in self.runs}


def _values(runs: Any) -> list[Any]:
    return list(runs.values()) if isinstance(runs, dict) else list(runs)


@dataclass
class _Inputs:
    results: list[Result]
    runs: list[Run]
    selection: Selection | None
    models: list[ShownModel]
    corpora: list[Corpus]


def report(config: ReportConfig, *, say: Callable[[str], None] = print) -> Path:
    """Writes the report.

    Args:
        config: What to show and where to write.
        say: Takes one line on what was made.

    Returns:
        The path of `index.html`.

    Raises:
        ConfigError: Nothing to show was given.
        DataError: `out` holds something else than an older report.
        MomoError: Something that was given is missing, damaged or of another format.
    """
    out = Path(config.out)
    if not (config.results or config.runs or config.selection or config.weights or config.corpora):
        raise ConfigError(
            "there is nothing to report on",
            rule="at least one of results, runs, selection, weights, corpora is given",
            fix="see configs/report.yaml",
        )
    with atomic_folder(out, replaces=_is_report) as partial:
        page = _build(config, _read(config))
        write_page(page, partial)
    size = (out / "index.html").stat().st_size / 1e6
    say(f"report: {out / 'index.html'} ({size:.1f} MB, one file) and {out / 'report.md'}")
    return out / "index.html"


def _is_report(folder: Path) -> bool:
    page = folder / "index.html"
    if not page.is_file() or not holds_only(folder, "index.html", "report.md", "figures"):
        return False
    return '<meta name="generator" content="momo ' in page.read_text(encoding="utf-8", errors="replace")[:2000]


def _read(config: ReportConfig) -> _Inputs:
    results = load_results(Path(config.results)) if config.results else []
    if unknown := sorted(set(config.models) - {result.model for result in results}):
        raise EvalError(
            "models to outline are not in the results",
            seen=", ".join(unknown),
            rule=f"the results have {', '.join(sorted({r.model for r in results})) or 'none'}",
            fix="correct models in the configuration",
        )
    selection = read_selection(Path(config.selection)) if config.selection else None
    folders = config.run_folders()
    if not folders and selection is not None:
        folders = {sensor: pick.run for sensor, pick in selection.picks.items()}
    return _Inputs(
        results=results,
        runs=[read_run(name, path) for name, path in folders.items()],
        selection=selection,
        models=[load_shown_model(w.name, Path(w.path)) for w in config.weights],
        corpora=[Corpus(path) for path in config.corpora],
    )


def _build(config: ReportConfig, inputs: _Inputs) -> Page:
    page = Page(title=config.title)
    manifests = [corpus.manifest for corpus in inputs.corpora]
    if inputs.results:
        page.comparisons = build_comparisons(inputs.results, page.notes)
        page.score_notes = score_notes(inputs.results)
        page.forests = {comparison.key: forest_plot(comparison) for comparison in page.comparisons}
    if inputs.selection is not None:
        page.selection = inputs.selection
        page.selection_plots = selection_plots(inputs.runs, inputs.selection)
        page.selection_lines = selection_lines(inputs.selection)
        page.selection_table = selection_table(inputs.selection)
        page.notes += [f"Selection: {note}" for note in inputs.selection.notes]
    page.run_plots = [run_plot(run) for run in inputs.runs]
    page.notes += [
        f"{run.name}: the last line of metrics.jsonl was cut off and is left out." for run in inputs.runs if run.torn
    ]
    if config.tiles:
        page.mosaics = [tile_mosaic(corpus, count=config.tiles, seed=config.seed) for corpus in inputs.corpora]
    if config.examples and inputs.models:
        painted = [
            reconstructions(corpus, inputs.models, count=config.examples, seed=config.seed, skipped=page.notes)
            for corpus in inputs.corpora
        ]
        page.reconstructions = [gallery for gallery in painted if gallery is not None]
    if config.test_images and inputs.results:
        page.overlays = overlays(
            inputs.results,
            models=config.models or default_models(inputs.results, _base_hashes(inputs)),
            count=config.test_images,
            folders={Path(path).name: Path(path) for path in config.datasets},
            missing=page.notes,
        )
    page.synthetic = synthetic_words(inputs.corpora, inputs.results, [shown.card for shown in inputs.models])
    cards = _cards(inputs, page.notes)
    page.provenance = [
        table
        for table in (
            model_table(cards, inputs.results) if cards or inputs.results else None,
            corpus_table(manifests) if manifests else None,
            run_table(inputs.runs) if inputs.runs else None,
            dataset_table(inputs.results) if inputs.results else None,
            protocol_table(inputs.results) if inputs.results else None,
        )
        if table is not None
    ]
    results_folder = Path(config.results) if config.results else None
    named = list(zip(config.corpora, manifests, strict=True))
    merges = {w.name: (w.path, shown.card) for w, shown in zip(config.weights, inputs.models, strict=True)}
    page.commands = commands(named, inputs.runs, inputs.selection, merges, results_folder)
    page.facts = facts(manifests, inputs.runs, inputs.results, len(page.comparisons))
    return page


def _base_hashes(inputs: _Inputs) -> set[str]:
    """Returns the hashes of all weights that others were trained from or merged onto."""
    found = {shown.card.base_sha256 for shown in inputs.models} | {
        run.card.base_sha256 for run in inputs.runs if run.card
    }
    if inputs.selection is not None:
        found.add(inputs.selection.base_sha256)
    return {sha256 for sha256 in found if sha256}


def default_models(results: list[Result], bases: set[str]) -> list[str]:
    """Returns which models are outlined when none are named: untrained, base and merged ones; all if they are few.

    Args:
        results: Runs of the models.
        bases: Hashes of weights known to be a base (a joint run's checkpoint, for example).
    """
    kinds: dict[str, str] = {}
    for result in results:
        weights = result.weights
        kind = "untrained" if weights is None else "base" if weights["sha256"] in bases else str(weights["kind"])
        kinds.setdefault(result.model, kind)
    order = ("untrained", "base", "checkpoint", "merged")
    names = sorted(kinds, key=lambda name: order.index(kinds[name]) if kinds[name] in order else len(order))
    return names if len(names) <= 4 else [name for name in names if kinds[name] != "checkpoint"]


def _cards(inputs: _Inputs, notes: list[str]) -> dict[str, tuple[Card, str]]:
    """Returns every card at hand by name, with the part its weights play."""
    found = {shown.name: (shown.card, "") for shown in inputs.models}
    selection = inputs.selection
    if selection is None:
        return found
    wanted = [("base of the selection", selection.base_path, selection.base_sha256)]
    wanted += [(f"pick for {p.sensor}", p.checkpoint, p.sha256) for p in selection.picks.values()]
    for name, path, sha256 in wanted:
        try:
            card = load_card(path)
        except CheckpointError:
            notes.append(f"No card is shown for the {name} ({sha256[:12]}): no weights where the selection says.")
            continue
        if card.sha256 != sha256:
            raise CheckpointError(
                "the selection names other weights than those found",
                seen=f"{path} has sha256 {card.sha256[:12]}...",
                rule=f"the selection says {sha256[:12]}...",
                fix="run momo select again",
            )
        found[name] = (card, "")
    return found


def synthetic_words(corpora: list[Corpus], results: list[Result], cards: list[Card]) -> str:
    """Says which of the data were generated; empty when none were."""
    flags: list[tuple[str, bool | None]] = [("tiles", corpus.manifest.synthetic) for corpus in corpora]
    flags += [("labelled images", result.synthetic) for result in results]
    flags += [("the models' training data", result.pretrained_on_synthetic) for result in results if result.weights]
    flags += [("the models' training data", card.synthetic) for card in cards]
    made, unknown = ([kind for kind, flag in flags if flag is wanted] for wanted in (True, None))
    if not made:
        return ""
    if len(made) == len(flags):
        return (
            "Every image behind this page was generated by a procedural model, none was measured. The numbers show "
            "that the pipeline works; they say nothing about Mars."
        )
    words = f"Generated, not measured: {join_words(list(dict.fromkeys(made)))}."
    return words + (f" Not stated for: {join_words(list(dict.fromkeys(unknown)))}." if unknown else "")
