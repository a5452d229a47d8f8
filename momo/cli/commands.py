"""The sub-commands: where each one's configuration and function live, and what its help shows.

Stages are named as text and imported only when their command runs, so that `momo --help` needs nothing but momo.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Command:
    """One sub-command.

    Attributes:
        name: As typed.
        summary: One line.
        module: Module that holds schema and function.
        schema: Name of the configuration dataclass.
        function: Name of the function; it takes the configuration.
        keys: The configuration keys its help shows; the others are listed by --show-config.
        example: A command to copy.
        positional: Key that a bare argument sets, such as the corpus of `momo prep verify corpora/ctx`, or "".
    """

    name: str
    summary: str
    module: str
    schema: str
    function: str
    keys: tuple[str, ...]
    example: str
    positional: str = ""

    def load(self) -> tuple[type, Callable[[Any], Any]]:
        """Imports the stage and returns its configuration class and function.

        What the function returns may have an `exit_code`; else the command exits with 0.
        """
        module = importlib.import_module(self.module)
        return getattr(module, self.schema), getattr(module, self.function)


COMMANDS: dict[str, Command] = {
    command.name: command
    for command in (
        Command(
            "demo",
            "the whole way once on a small synthetic Mars, ending with a report page",
            "momo.cli.demo",
            "DemoConfig",
            "demo",
            ("out", "seed", "samples", "base_samples", "ranks"),
            "momo demo out=demo",
        ),
        Command(
            "prep",
            "raw products -> CORPUS (tiles in WebDataset shards)",
            "momo.data_prep",
            "PrepConfig",
            "prep",
            ("products", "out", "sensor", "tile_size", "resample.gsd_m", "quality.min_valid", "split.val_fraction",
             "strata.units", "strata.plan", "duplicates.max_overlap", "workers", "scheduler"),
            "momo prep products=raw/ctx sensor=CTX tile_size=224 out=corpora/ctx",
        ),
        Command(
            "prep describe",
            "CORPUS -> a data card: figures, diversity, map of tiles, sources",
            "momo.data_prep",
            "DescribeConfig",
            "describe",
            ("corpus", "out"),
            "momo prep describe corpora/ctx",
            positional="corpus",
        ),
        Command(
            "prep verify",
            "checks every hash of a CORPUS and decodes every tile",
            "momo.data_prep",
            "VerifyConfig",
            "verify",
            ("corpus",),
            "momo prep verify corpora/ctx",
            positional="corpus",
        ),
        Command(
            "prep import",
            "MOMO's published tiles (folders and CSV) -> CORPUS",
            "momo.data_prep",
            "ImportConfig",
            "import_momo",
            ("root", "csv", "out", "sensor"),
            "momo prep import root=momo-data csv=tiles.csv sensor=CTX out=corpora/ctx",
        ),
        Command(
            "pretrain",
            "CORPUS -> RUN (masked autoencoder, checkpoints with validation losses)",
            "momo.pretrain",
            "PretrainConfig",
            "pretrain",
            ("data.corpora", "out", "resume", "base", "ranks", "model.size", "train.samples", "train.batch_size",
             "train.precision", "validation.every", "checkpoint.resume_every"),
            "momo pretrain data.corpora=[corpora/ctx] base=weights/base ranks=4 out=runs/ctx",
        ),
        Command(
            "pretrain init",
            "timm model, file or seed -> WEIGHTS (the shared base)",
            "momo.pretrain.base",
            "InitConfig",
            "init",
            ("out", "timm", "file", "seed", "image_size", "in_chans", "licence"),
            "momo pretrain init timm=vit_base_patch16_224.augreg_in21k out=weights/base",
        ),
        Command(
            "validate",
            "checkpoints + CORPUS -> validation losses by sensor and geologic unit",
            "momo.pretrain.validating",
            "ValidateConfig",
            "validate",
            ("weights", "corpora", "out", "samples", "seed", "normalisation"),
            "momo validate runs/ctx/checkpoints/samples-000400000 corpora=[corpora/ctx]",
            positional="weights",
        ),
        Command(
            "select",
            "RUNs -> SELECTION (checkpoints of equal validation loss)",
            "momo.merge",
            "SelectConfig",
            "select",
            ("runs", "out", "rule", "epsilon", "distance", "smoothing", "base", "allow"),
            "momo select runs=[runs/hirise,runs/ctx,runs/themis] out=selection.yaml",
        ),
        Command(
            "merge",
            "SELECTION -> WEIGHTS (one merged model)",
            "momo.merge",
            "MergeConfig",
            "merge",
            ("selection", "out", "method", "coefficient", "coefficients", "layers", "scope", "base", "checkpoints",
             "dry_run"),
            "momo merge selection=selection.yaml out=weights/momo",
        ),
        Command(
            "merge diagnose",
            "SELECTION + CORPORA -> a page on task vectors, loss landscape and CKA",
            "momo.merge.diagnose",
            "DiagnoseConfig",
            "diagnose",
            ("selection", "merged", "corpora", "out", "samples"),
            "momo merge diagnose selection=selection.yaml corpora=[c/hirise,c/ctx] out=diagnosis",
        ),
        Command(
            "merge search",
            "SELECTION + CORPORA -> a YAML with the coefficients of lowest validation loss",
            "momo.merge.search",
            "SearchConfig",
            "search",
            ("selection", "corpora", "out", "methods", "per", "trials"),
            "momo merge search selection=selection.yaml corpora=[c/hirise,c/ctx,c/themis] out=found.yaml",
        ),
        Command(
            "merge fisher",
            "checkpoint + CORPUS -> Fisher information for method=fisher",
            "momo.merge.fisher",
            "FisherConfig",
            "fisher",
            ("weights", "corpora", "out", "samples"),
            "momo merge fisher weights=weights/ctx corpora=[corpora/ctx] out=ctx.safetensors",
        ),
        Command(
            "eval",
            "WEIGHTS -> RESULTS (probes on labelled Mars-Bench datasets)",
            "momo.eval",
            "EvalConfig",
            "evaluate",
            ("datasets", "models", "out", "seeds", "protocols.classification", "protocols.segmentation"),
            "momo eval --config configs/eval.yaml out=results",
        ),
        Command(
            "report",
            "everything -> one HTML page with the scores and pictures",
            "momo.eval",
            "ReportConfig",
            "report",
            ("out", "results", "runs", "selection", "weights", "corpora"),
            "momo report results=results runs=[runs/ctx] out=report",
        ),
    )
}  # fmt: skip
