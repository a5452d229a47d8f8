"""Metrics with one fixed definition each.

Everything is computed from confusion counts. Axes: N test images, D bootstrap draws, C classes; in a matrix the row
is the label and the column the prediction. For classification an image's matrix holds a single 1, for segmentation
it counts pixels. A metric that is undefined (nothing to score) is NaN.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]


def confusion_counts(label: npt.NDArray[np.integer], prediction: npt.NDArray[np.integer], classes: int) -> Counts:
    """Counts how often each class was taken for each other.

    Args:
        label: True classes, any shape, in [0, classes).
        prediction: Predicted classes, same shape and range.
        classes: Number of classes C.

    Returns:
        int64 of shape (C, C).
    """
    joint = label.astype(np.int64).ravel() * classes + prediction.astype(np.int64).ravel()
    return np.bincount(joint, minlength=classes * classes).reshape(classes, classes)


def _parts(matrix: Floats) -> tuple[Floats, Floats, Floats]:
    """Returns true positives, label counts and prediction counts, each (..., C)."""
    return np.diagonal(matrix, axis1=-2, axis2=-1), matrix.sum(axis=-1), matrix.sum(axis=-2)


def _ratio(top: Floats, bottom: Floats) -> Floats:
    top, bottom = np.broadcast_arrays(top, bottom)
    return np.divide(top, bottom, out=np.full(top.shape, np.nan), where=bottom > 0)


def _mean_defined(values: Floats) -> Floats:
    """Mean over the last axis without the NaN entries; NaN when there is no other."""
    return _ratio(np.nansum(values, axis=-1), np.isfinite(values).sum(axis=-1).astype(np.float64))


def iou_per_class(matrix: Floats) -> Floats:
    """Intersection over union of each class, (..., C, C) to (..., C); NaN where neither labelled nor predicted."""
    hit, labelled, predicted = _parts(matrix)
    return _ratio(hit, labelled + predicted - hit)


def f1_per_class(matrix: Floats) -> Floats:
    """F1 (Dice) of each class, (..., C, C) to (..., C); NaN where neither labelled nor predicted."""
    hit, labelled, predicted = _parts(matrix)
    return _ratio(2 * hit, labelled + predicted)


def accuracy(matrix: Floats) -> Floats:
    """Share of images that got their own class."""
    return _ratio(np.trace(matrix, axis1=-2, axis2=-1), matrix.sum(axis=(-2, -1)))


def f1_weighted(matrix: Floats) -> Floats:
    """Mean F1 of the classes, weighted by how many labels each has; the headline of Mars-Bench classification.

    Equals scikit-learn's `f1_score(average="weighted")`, two-class sets included.
    """
    labelled = matrix.sum(axis=-1)
    return _ratio(np.nansum(f1_per_class(matrix) * labelled, axis=-1), labelled.sum(axis=-1))


def f1_macro(matrix: Floats) -> Floats:
    """Plain mean F1 of the classes that occur in labels or predictions (scikit-learn's `average="macro"`)."""
    return _mean_defined(f1_per_class(matrix))


def iou_fg(matrix: Floats) -> Floats:
    """IoU of the foreground over all test pixels; with several foreground classes the mean of those that occur."""
    return _mean_defined(iou_per_class(matrix)[..., 1:])


def miou_incl_bg(matrix: Floats) -> Floats:
    """Mean IoU over all test pixels of the classes that occur, background (class 0) included."""
    return _mean_defined(iou_per_class(matrix))


def f1_fg(matrix: Floats) -> Floats:
    """F1 (Dice) of the foreground over all test pixels; of several foreground classes the mean of those that occur."""
    return _mean_defined(f1_per_class(matrix)[..., 1:])


def miou_imagewise(counts_NCC: Counts, weights_DN: Floats) -> Floats:
    """Mean IoU as in Mars-Bench: each class over the images it occurs in, then over the classes, background included.

    An image where a class is in neither mask does not count for that class (torchmetrics
    `MeanIoU(per_class=True, input_format="index")`, then the mean of the classes seen).

    Args:
        counts_NCC: Pixel counts of each image.
        weights_DN: How often each image stands in each draw.

    Returns:
        Shape (D,).
    """
    iou_NC = iou_per_class(counts_NCC.astype(np.float64))
    occurs_NC = np.isfinite(iou_NC)
    per_class_DC = _ratio(weights_DN @ np.where(occurs_NC, iou_NC, 0.0), weights_DN @ occurs_NC.astype(np.float64))
    return _mean_defined(per_class_DC)


_OF_TOTAL: dict[str, dict[str, Callable[[Floats], Floats]]] = {
    "classification": {"f1_weighted": f1_weighted, "f1_macro": f1_macro, "accuracy": accuracy},
    "segmentation": {"miou_incl_bg": miou_incl_bg, "iou_fg": iou_fg, "f1_fg": f1_fg},
}

#: Metric that is printed and that hyper-parameters are chosen by, for each task.
HEADLINE: dict[str, str] = {"classification": "f1_weighted", "segmentation": "miou_incl_bg"}
#: Every metric of each task, headline first.
METRICS: dict[str, tuple[str, ...]] = {
    "classification": tuple(_OF_TOTAL["classification"]),
    "segmentation": (*_OF_TOTAL["segmentation"], "miou_imagewise"),
}


def score(metric: str, counts_NCC: Counts, weights_DN: Floats | None = None) -> Floats:
    """Computes one metric for several weightings of the test images.

    Args:
        metric: A name in `METRICS`.
        counts_NCC: Confusion counts of each test image.
        weights_DN: How often each image stands in each draw; every image once when None.

    Returns:
        float64 of shape (D,); (1,) when `weights_DN` is None.

    Raises:
        KeyError: No metric has the name.
    """
    if weights_DN is None:
        weights_DN = np.ones((1, len(counts_NCC)))
    if metric == "miou_imagewise":
        return miou_imagewise(counts_NCC, weights_DN)
    of_total = {name: function for table in _OF_TOTAL.values() for name, function in table.items()}
    images, classes, _ = counts_NCC.shape
    total_DCC = weights_DN @ counts_NCC.reshape(images, classes * classes).astype(np.float64)
    return of_total[metric](total_DCC.reshape(-1, classes, classes))


def all_scores(task: str, counts_NCC: Counts) -> dict[str, float]:
    """Returns every metric of the task over all test images; NaN where undefined."""
    return {metric: float(score(metric, counts_NCC)[0]) for metric in METRICS[task]}
