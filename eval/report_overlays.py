"""Segmentation pictures: test image, true mask, and the outline each model predicts."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import numpy.typing as npt

from momo.errors import EvalError
from momo.normalise import Normalisation

from .config import DatasetConfig
from .datasets import open_dataset
from .features import Preparation
from .metrics import confusion_counts, score
from .pictures import write_examples
from .report_figures import slug
from .report_images import Bytes_HW3, Gallery, Panel, fit, resize_nearest, to_png
from .results import Examples, Result, load_examples

# Okabe-Ito colours of the classes above background, by index; light enough to stand out on grey.
CLASS_COLOURS = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (204, 121, 167), (213, 94, 0))


def outline(mask_HW: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Returns the pixels of a region that touch a pixel outside it (4-neighbours); the border counts as inside."""
    padded = np.pad(mask_HW, 1, mode="edge")
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask_HW & ~inner


def class_colour(index: int) -> tuple[int, int, int]:
    """Returns the colour of a class above background."""
    return CLASS_COLOURS[(index - 1) % len(CLASS_COLOURS)]


def draw_classes(image_HW: npt.NDArray[np.uint8], mask_HW: npt.NDArray[np.uint8], *, filled: bool) -> Bytes_HW3:
    """Draws the classes above background over a grey image, at the size shown on the page.

    Args:
        image_HW: Grey image.
        mask_HW: Class of each pixel, of any size.
        filled: Tint the regions as well as outlining them.
    """
    shown = fit(np.repeat(image_HW[..., None], 3, axis=2)).copy()
    mask = resize_nearest(mask_HW, *shown.shape[:2])
    for index in sorted(set(np.unique(mask).tolist()) - {0}):
        region, colour = mask == index, np.array(class_colour(index), dtype=np.float32)
        if filled:
            shown[region] = (0.55 * shown[region] + 0.45 * colour).round().astype(np.uint8)
        edge = outline(region)
        # Two pixels wide, so that it survives being shown smaller.
        shown[edge | (outline(region & ~edge) & region)] = colour.astype(np.uint8)
    return shown


def overlays(
    results: list[Result], *, models: list[str], count: int, folders: dict[str, Path], missing: list[str]
) -> list[Gallery]:
    """Builds one gallery for each segmentation dataset and protocol, at the lowest seed and full label budget.

    Args:
        results: All runs.
        models: Which models to show, in this order; names without a run are skipped.
        count: Images shown.
        folders: Labelled dataset folders by name, for datasets whose example images are not with the results.
        missing: One line is appended for each dataset without example images or kept masks.
    """
    tests: dict[tuple[str, str], dict[str, Result]] = defaultdict(dict)
    for result in sorted(results, key=lambda run: (-run.fraction, run.train_subset or "", run.seed)):
        if result.task == "segmentation" and result.predictions is not None and result.root is not None:
            tests[(result.dataset, result.protocol)].setdefault(result.model, result)
    galleries = []
    for (dataset, protocol), by_model in sorted(tests.items()):
        shown = [by_model[model] for model in models if model in by_model]
        if not shown:
            continue
        examples = _examples(shown[0], folders.get(dataset))
        if examples is None:
            missing.append(
                f"{dataset}: no segmentation is shown, because the RESULTS folder has no example images and `datasets` "
                "does not name its folder."
            )
            continue
        gallery = _gallery(dataset, protocol, shown, examples, count)
        if gallery is None:
            missing.append(f"{dataset}: no predicted masks were kept for the example images.")
        else:
            galleries.append(gallery)
    return galleries


def _examples(run: Result, folder: Path | None) -> Examples | None:
    """Returns the example images of a run's dataset: those with the results, else cut anew from its folder."""
    assert run.root is not None
    if (run.root / "examples" / f"{run.dataset}.npz").is_file():
        return load_examples(run.root, run.dataset)
    if folder is None:
        return None
    config = DatasetConfig(path=str(folder), name=run.dataset, train_subset=run.train_subset)
    dataset = open_dataset(config, report=lambda line: None)
    if dataset.fingerprint != run.dataset_fingerprint:
        raise EvalError(
            "a labelled dataset is not the one that was evaluated",
            seen=f"{folder} has fingerprint {dataset.fingerprint[:12]}...",
            rule=f"the results of {run.dataset} say {run.dataset_fingerprint[:12]}...",
            fix="correct datasets in the configuration, or evaluate again",
        )
    prepared = Preparation(Normalisation(), "each image", 1, run.image_size, dataset.bands)
    with TemporaryDirectory() as scratch:
        write_examples(Path(scratch), dataset, prepared, len(run.load_predictions().masks()))
        return load_examples(Path(scratch), run.dataset)


def _gallery(dataset: str, protocol: str, runs: list[Result], examples: Examples, count: int) -> Gallery | None:
    if examples.mask_MHW is None:
        return None
    truth_MHW, masks = examples.mask_MHW, [run.load_predictions().masks() for run in runs]
    usable = [m for m, key in enumerate(examples.key_M) if all(str(key) in kept for kept in masks)]
    # Images with something to find come first: an empty one shows only false alarms.
    usable.sort(key=lambda m: not _crop(truth_MHW[m], examples.size_M2[m]).any())
    rows = [_row(examples, m, runs, masks) for m in usable[:count]]
    if not rows:
        return None
    seed = sorted({run.seed for run in runs})
    return Gallery(
        name=f"segmentation-{slug(dataset)}-{slug(protocol)}",
        heading=f"{dataset}: {', '.join(runs[0].classes[1:])}",
        text=f"{len(rows)} test images, images with labels first; seed {seed[0]}. The number is the foreground IoU of "
        "that image alone; the scores above are over all test images.",
        rows=rows,
        columns=["image", "truth", *(run.model for run in runs)],
    )


def _crop(array_HW: npt.NDArray[np.uint8], size: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
    return array_HW[: size[0], : size[1]]


def _row(examples: Examples, m: int, runs: list[Result], masks: list[dict[str, npt.NDArray[np.uint8]]]) -> list[Panel]:
    assert examples.mask_MHW is not None
    key, size = str(examples.key_M[m]), examples.size_M2[m]
    image, truth = _crop(examples.image_MHW[m], size), _crop(examples.mask_MHW[m], size)
    labelled = f"{(truth > 0).mean():.1%} labelled"
    filled = draw_classes(image, truth, filled=True)
    row = [
        Panel("image", to_png(fit(np.repeat(image[..., None], 3, axis=2))), f"test image {key}"),
        Panel("truth", to_png(filled), f"true mask of {key}, {labelled}", labelled),
    ]
    for run, kept in zip(runs, masks, strict=True):
        predicted = kept[key]
        if predicted.shape != truth.shape:
            # A run at another image size predicts a mask of that size.
            predicted = resize_nearest(predicted, *truth.shape)
        value = float(score("iou_fg", confusion_counts(truth, predicted, len(run.classes))[None])[0])
        note = "nothing to find, nothing found" if np.isnan(value) else f"IoU {value:.2f}"
        picture = to_png(draw_classes(image, predicted, filled=False))
        row.append(Panel(run.model, picture, f"outline predicted by {run.model} on {key}, {note}", note))
    return row
