"""RESULTS: one JSON file a run, never edited, and the predictions it was computed from.

    config.yaml                        resolved configuration of the last `momo eval` into this folder
    runs/<run>.json                    one run: (dataset, protocol, model, seed); see `Result`
    predictions/<run>.npz              what the run predicted for every test image; see `Predictions`
    examples/<dataset>.npz             some test images with their labels, for pictures; see `Examples`

Arrays are written and read without pickle.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from momo.errors import EvalError
from momo.files import atomic_file, sha256_file, write_json
from momo.version import __version__

from .metrics import METRICS, Counts, confusion_counts

FORMAT = "momo-result"
FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Score:
    """One metric of one run.

    Attributes:
        value: Over all test images, 0..1; None when the metric is undefined (nothing to score).
        ci_low: Lower end of the 95 % bootstrap interval over test images; None when undefined.
        ci_high: Upper end.
    """

    value: float | None
    ci_low: float | None
    ci_high: float | None


@dataclass(kw_only=True)
class Result:
    """One run as its JSON file tells it.

    Attributes:
        task: `classification` or `segmentation`.
        dataset: Name of the dataset.
        dataset_fingerprint: SHA-256 over the paths and bytes of its files.
        dataset_info: `classes` (names in index order), `splits` (images by split), `sensor`, `gsd_m`, `licence` (None
            when the dataset does not say), `duplicates_across_splits` (test or val images with the pixels of an image
            of another split).
        synthetic: Whether the dataset was generated; None when it does not say (no `dataset.json`).
        protocol: `knn`, `linear` or `decoder`.
        model: Name of the model.
        weights: `file` and `sha256` of the weights and `kind` and `method` of their card; None for random init.
        architecture: Fields of `momo.models.Architecture`.
        sensors: Names of the sensors the encoder was pretrained on; empty for random init.
        pretrained_on_synthetic: `synthetic` of the card; None for random init.
        seed: Seed of the run.
        seed_varies: What another seed changes; the spread over seeds means these things and no others.
        fraction: Label budget; each run trains on fraction * train_draw of the training images.
        train_draw: Share of the budget that the seed draws.
        train_subset: CSV that named the training images, or None.
        n_train: Images trained on.
        n_val: Images hyper-parameters were chosen on.
        n_test: Images scored.
        image_size: Side every image was resized to before encoding and scoring; None for the native size.
        normalisation: Policy and constants that were used, with `constants_from`.
        hyper_parameters: The values that were tested.
        grid: Every candidate with its `val_score`; the best one was tested. Empty when nothing was chosen.
        headline: Name of the metric that is printed and that candidates were chosen by.
        metrics: Every metric by its exact name (definitions: `momo.eval.metrics`).
        bootstrap: `draws`, `level`, `unit` and `seed` of the intervals.
        predictions: `file` (relative to the RESULTS folder) and `sha256`; None for copied numbers.
        few_seeds: True when the evaluation had fewer than 3 seeds.
        device: Where it was computed: `cpu` or `cuda`.
        wall_seconds: Time of fitting and testing, without shared encoding.
        provenance: `rerun` (computed here) or `copied` (taken from a publication; then `source` says which).
        source: Reference of a copied number, or None.
        settings: The options this run depends on; `config_hash` is their SHA-256.
        config_hash: See `settings`.
        momo_version: Version that computed it.
        format: `momo-result`.
        format_version: Version of this layout.
        root: RESULTS folder it was read from; not part of the file.
    """

    task: str
    dataset: str
    dataset_fingerprint: str
    dataset_info: dict[str, Any]
    synthetic: bool | None
    protocol: str
    model: str
    weights: dict[str, Any] | None
    architecture: dict[str, Any]
    sensors: list[str]
    pretrained_on_synthetic: bool | None
    seed: int
    seed_varies: list[str]
    fraction: float
    train_draw: float
    train_subset: str | None
    n_train: int
    n_val: int
    n_test: int
    image_size: int | None
    normalisation: dict[str, Any]
    hyper_parameters: dict[str, Any]
    grid: list[dict[str, Any]]
    headline: str
    metrics: dict[str, Score]
    bootstrap: dict[str, Any]
    predictions: dict[str, str] | None
    few_seeds: bool
    device: str
    wall_seconds: float
    settings: dict[str, Any]
    config_hash: str
    provenance: str = "rerun"
    source: str | None = None
    momo_version: str = __version__
    format: str = FORMAT
    format_version: int = FORMAT_VERSION
    root: Path | None = field(default=None, compare=False)

    @property
    def name(self) -> str:
        """File name of the run without ending."""
        return run_name(self.dataset, self.protocol, self.model, self.seed, self.fraction, self.train_subset)

    @property
    def classes(self) -> list[str]:
        """Class names in index order."""
        return list(self.dataset_info["classes"])

    @property
    def group(self) -> tuple[str, str, str, float, str | None]:
        """Runs with this key in common differ in the seed alone: dataset, protocol, model, fraction, train_subset."""
        return self.dataset, self.protocol, self.model, self.fraction, self.train_subset

    def identity(self) -> dict[str, Any]:
        """Returns what decides whether a run would have to be computed again."""
        return {
            "dataset fingerprint": self.dataset_fingerprint,
            "weights sha256": self.weights["sha256"] if self.weights else None,
            "architecture": self.architecture,
            "normalisation policy": self.normalisation["policy"],
            "config hash": self.config_hash,
        }

    def load_predictions(self) -> Predictions:
        """Reads the run's predictions.

        Raises:
            EvalError: The run has none, or the file is missing, altered or unreadable.
        """
        if self.predictions is None or self.root is None:
            raise EvalError("the run has no predictions", seen=self.name, rule=f"its provenance is {self.provenance}")
        return Predictions.read(self.root / self.predictions["file"], self.predictions["sha256"], len(self.classes))

    def to_dict(self) -> dict[str, Any]:
        """Returns the run as plain values, `root` left out."""
        fields = dataclasses.asdict(self)
        del fields["root"]
        return fields


def run_name(
    dataset: str, protocol: str, model: str, seed: int, fraction: float = 1.0, train_subset: str | None = None
) -> str:
    """Returns the file name of a run without ending; double underscores part its fields."""
    budget = ([f"fraction{fraction:g}"] if fraction != 1 else []) + ([Path(train_subset).stem] if train_subset else [])
    return "__".join([dataset, protocol, *budget, model, f"seed{seed}"])


@dataclass(kw_only=True)
class Predictions:
    """What a run predicted.

    Attributes:
        key_N: Test images as paths relative to the dataset folder, in order.
        counts_NCC: Confusion counts of each test image (row label, column prediction).
        label_N: Class of each image; classification only.
        prediction_N: Predicted class of each image; classification only.
        index_M: Which test images have their predicted mask kept; segmentation only.
        mask_MHW: uint8 predicted classes of those, padded with 0 to a common size.
        size_M2: True height and width of each kept mask, pixels.
    """

    key_N: npt.NDArray[np.str_]
    counts_NCC: Counts
    label_N: npt.NDArray[np.int64] | None = None
    prediction_N: npt.NDArray[np.int64] | None = None
    index_M: npt.NDArray[np.int64] | None = None
    mask_MHW: npt.NDArray[np.uint8] | None = None
    size_M2: npt.NDArray[np.int64] | None = None

    @classmethod
    def of_classes(
        cls, keys: Sequence[str], label_N: npt.NDArray[np.int64], prediction_N: npt.NDArray[np.int64], classes: int
    ) -> Predictions:
        """Builds the predictions of a classification run."""
        counts = np.stack(
            [confusion_counts(a, b, classes) for a, b in zip(label_N[:, None], prediction_N[:, None], strict=True)]
        )
        return cls(key_N=np.array(keys), counts_NCC=counts, label_N=label_N, prediction_N=prediction_N)

    def masks(self) -> dict[str, npt.NDArray[np.uint8]]:
        """Returns the kept masks by key, each (H, W); empty for classification."""
        if self.index_M is None or self.mask_MHW is None or self.size_M2 is None:
            return {}
        trimmed = zip(self.index_M, self.mask_MHW, self.size_M2, strict=True)
        return {str(self.key_N[index]): mask[: size[0], : size[1]] for index, mask, size in trimmed}

    def write(self, path: Path) -> str:
        """Writes the file in one step and returns its SHA-256."""
        arrays = {name: value for name, value in vars(self).items() if value is not None}
        if self.label_N is not None:
            del arrays["counts_NCC"]  # follows from label and prediction, and is C * C times as large
        return write_arrays(path, arrays)

    @classmethod
    def read(cls, path: Path, sha256: str, classes: int) -> Predictions:
        """Reads a file that `write` made; see `Result.load_predictions`."""
        arrays = read_arrays(path, sha256)
        try:
            if "label_N" in arrays:
                return cls.of_classes(list(arrays["key_N"]), arrays["label_N"], arrays["prediction_N"], classes)
            return cls(**arrays)
        except (KeyError, TypeError, ValueError) as error:
            raise EvalError(
                "the predictions lack a field", seen=f"{path}: {error}", fix="run the evaluation again"
            ) from None


@dataclass(kw_only=True)
class Examples:
    """Some test images of a dataset, for pictures.

    Attributes:
        key_M: Paths relative to the dataset folder; runs keep the masks of the same images.
        image_MHW: uint8, each image stretched from its own minimum to its maximum, padded with 0 to a common size.
        size_M2: True height and width of each, pixels.
        label_M: Class of each image; classification only.
        mask_MHW: uint8 labelled classes, padded like the images; segmentation only.
    """

    key_M: npt.NDArray[np.str_]
    image_MHW: npt.NDArray[np.uint8]
    size_M2: npt.NDArray[np.int64]
    label_M: npt.NDArray[np.int64] | None = None
    mask_MHW: npt.NDArray[np.uint8] | None = None

    def write(self, path: Path) -> str:
        """Writes the file in one step and returns its SHA-256."""
        return write_arrays(path, {name: value for name, value in vars(self).items() if value is not None})


def load_examples(folder: Path, dataset: str) -> Examples:
    """Reads the example images of one dataset.

    Raises:
        EvalError: The file is missing or unreadable.
    """
    return Examples(**read_arrays(Path(folder) / "examples" / f"{dataset}.npz"))


def write_arrays(path: Path, arrays: dict[str, npt.NDArray[Any]]) -> str:
    """Writes named arrays as a compressed npz in one step and returns its SHA-256."""
    with atomic_file(path) as partial, open(partial, "wb") as stream:
        np.savez_compressed(stream, **arrays)  # type: ignore[arg-type]
    return sha256_file(path)


def read_arrays(path: Path, sha256: str | None = None) -> dict[str, npt.NDArray[Any]]:
    """Reads a file of `write_arrays`, never unpickling; checks its hash when one is given.

    Raises:
        EvalError: The file is missing, altered or unreadable.
    """
    if not path.is_file():
        raise EvalError("a file of the results is missing", seen=path, fix="copy the whole folder, or evaluate again")
    if sha256 is not None and (found := sha256_file(path)) != sha256:
        raise EvalError(
            "the predictions were altered or damaged",
            seen=f"{path} has sha256 {found[:12]}...",
            rule=f"the run's JSON says {sha256[:12]}...",
            fix="remove the run's JSON and run momo eval again",
        )
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError) as error:
        raise EvalError(
            "a file of the results cannot be read", seen=f"{path}: {error}", rule="npz without pickle"
        ) from None


def write_result(root: Path, result: Result) -> Path:
    """Writes one run; its predictions must be there already.

    Raises:
        EvalError: The run is there already (results are never edited).
    """
    path = root / "runs" / f"{result.name}.json"
    if path.exists():
        raise EvalError(
            "the run is there already", seen=path, rule="results are never edited", fix="choose another `out`"
        )
    write_json(path, result.to_dict())
    return path


def load_result(path: Path) -> Result:
    """Reads and checks one run's JSON; see `load_results`."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise EvalError("a result cannot be read", seen=f"{path}: {error}", rule="one JSON object a run") from None
    if not isinstance(fields, dict) or fields.get("format") != FORMAT or fields.get("format_version") != FORMAT_VERSION:
        found = fields if not isinstance(fields, dict) else f"{fields.get('format')} {fields.get('format_version')}"
        raise EvalError(
            "this is no result of this version",
            seen=f"{found} in {path}",
            rule=f"this momo ({__version__}) reads {FORMAT} {FORMAT_VERSION}",
            fix="evaluate again, or use the momo version named in the file",
        )
    try:
        scores = {name: Score(**value) for name, value in fields.pop("metrics").items()}
        result = Result(**fields, metrics=scores, root=path.parent.parent)
    except (KeyError, TypeError, AttributeError) as error:
        raise EvalError("a field of the result is missing or unknown", seen=f"{path}: {error}") from None
    problems = list(_problems(result, path))
    if problems:
        raise EvalError(
            "the result does not hold together",
            seen=f"{path}: {'; '.join(problems)}",
            rule="results are never edited",
            fix="remove the file and run momo eval again",
        )
    return result


def _problems(result: Result, path: Path) -> list[str]:
    found = []
    if result.task not in METRICS:
        return [f"task {result.task!r} is unknown"]
    if unknown := sorted(set(result.metrics) - set(METRICS[result.task])):
        found.append(f"unknown metrics {', '.join(unknown)}")
    if result.headline not in result.metrics:
        found.append(f"headline {result.headline!r} is not among its metrics")
    for name, score in result.metrics.items():
        for key, value in vars(score).items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if value is not None and not (number and math.isfinite(value) and 0 <= value <= 1):
                found.append(f"{name}.{key} is {value}, not within 0..1")
    if result.provenance not in ("rerun", "copied") or (result.provenance == "copied" and not result.source):
        found.append(f"provenance {result.provenance!r} with source {result.source!r}")
    if result.provenance == "rerun" and result.name != path.stem:
        found.append(f"its fields say {result.name!r}, its file name says otherwise")
    return found


def load_results(folder: Path) -> list[Result]:
    """Reads every run of a RESULTS folder.

    Args:
        folder: The `out` of `momo eval`.

    Returns:
        Runs in order of their file names.

    Raises:
        EvalError: The folder has no runs, or a file is damaged or edited into nonsense.
    """
    paths = sorted((Path(folder) / "runs").glob("[!.]*.json"))
    if not paths:
        raise EvalError(
            "there are no results here",
            seen=folder,
            rule="a RESULTS folder holds runs/*.json",
            fix="run momo eval first",
        )
    return [load_result(path) for path in paths]
