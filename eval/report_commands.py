"""The command lines behind the artefacts a report shows, with the configuration each one read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf

from momo.corpus import Manifest
from momo.runs import CONFIG_NAME
from momo.weights import Card

from .report_inputs import Run, Selection


@dataclass(frozen=True)
class Command:
    """A command line, what it made, and the configuration or file it went with."""

    line: str
    made: str
    text: str = ""


def commands(
    corpora: list[tuple[str, Manifest]],
    runs: list[Run],
    selection: Selection | None,
    weights: dict[str, tuple[str, Card]],
    results: Path | None,
) -> list[Command]:
    """Lists the commands behind the artefacts shown, in the order of the stages.

    Args:
        corpora: Folder or URL, and manifest of each corpus.
        runs: Pretraining runs.
        selection: The selection.
        weights: Name to (path, card); the merged ones get a line.
        results: RESULTS folder.
    """
    found: list[Command] = []
    for path, manifest in corpora:
        prep = OmegaConf.to_yaml(OmegaConf.create(manifest.prep)) if manifest.prep else ""
        found.append(Command("momo prep --config prep.yaml", f"made {path} with momo {manifest.momo_version}", prep))
    for run in runs:
        found.append(Command(f"momo pretrain --config {run.path / CONFIG_NAME}", f"made {run.path}", run.config_text))
    if selection is not None:
        found.append(_select_command(selection))
    found += [_merge_command(name, path, card, selection) for name, (path, card) in weights.items() if card.method]
    if results is not None:
        config = results / CONFIG_NAME
        text = config.read_text(encoding="utf-8") if config.is_file() else ""
        found.append(Command(f"momo eval --config {config}", f"made {results}", text))
    return found


def _select_command(selection: Selection) -> Command:
    runs = ",".join(str(pick.run) for pick in selection.picks.values())
    epsilon = "" if selection.epsilon_requested is None else f" epsilon={selection.epsilon_requested:g}"
    line = f"momo select runs=[{runs}] rule={selection.rule}{epsilon} out={selection.path}"
    return Command(line, f"made {selection.path}", selection.path.read_text(encoding="utf-8"))


def _merge_command(name: str, path: str, card: Card, selection: Selection | None) -> Command:
    assert card.method is not None
    parents = {parent["sha256"] for parent in card.parents if parent["role"] == "checkpoint"}
    picked = {pick.sha256 for pick in selection.picks.values()} if selection else set()
    source = f"selection={selection.path}" if selection and parents == picked else "base=... checkpoints=[...]"
    factor = f" coefficient={card.method['coefficient']}" if card.method.get("coefficient") is not None else ""
    line = f"momo merge {source} method={card.method.get('name')}{factor} out={path}"
    return Command(line, f"made {name} from the parents below", OmegaConf.to_yaml(OmegaConf.create(card.parents)))
