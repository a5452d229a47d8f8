"""Test images, labels and predicted masks kept for pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from .datasets import LabelledDataset
from .features import Preparation
from .images import to_channels
from .results import Examples


def example_indices(images: int, wanted: int) -> npt.NDArray[np.int64]:
    """Returns at most `wanted` evenly spaced positions among the test images."""
    return np.unique(np.linspace(0, images - 1, min(wanted, images)).round().astype(np.int64))


def pad_masks(
    masks: Sequence[npt.NDArray[np.uint8]],
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Stacks masks of any size, padded with 0 at right and bottom.

    Returns:
        uint8 of shape (M, H, W), and the true height and width of each, (M, 2).
    """
    sizes = np.array([mask.shape for mask in masks], dtype=np.int64).reshape(-1, 2)
    height, width = sizes.max(axis=0, initial=0)
    padded = np.zeros((len(masks), height, width), dtype=np.uint8)
    for row, mask in zip(padded, masks, strict=True):
        row[: mask.shape[0], : mask.shape[1]] = mask
    return padded, sizes


def write_examples(out: Path, dataset: LabelledDataset, prepared: Preparation, wanted: int) -> None:
    """Writes evenly spaced test images of a dataset with their labels (see `Examples`)."""
    test = dataset.splits["test"]
    samples = [test[index] for index in example_indices(len(test), wanted)]
    images, sizes = pad_masks([_grey(*prepared.read(sample)) for sample in samples])
    examples = Examples(
        key_M=np.array([sample.key for sample in samples], dtype=np.str_), image_MHW=images, size_M2=sizes
    )
    if dataset.task == "segmentation":
        examples.mask_MHW, _ = pad_masks([prepared.mask(sample) for sample in samples])
    else:
        examples.label_M = np.array([sample.label for sample in samples], dtype=np.int64)
    examples.write(out / "examples" / f"{dataset.name}.npz")


def _grey(value_CHW: npt.NDArray[np.float32], valid_HW: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint8]:
    value_HW = to_channels(value_CHW, 1)[0]
    values = value_HW[valid_HW]
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 1.0)
    stretched = (value_HW - low) / (high - low if high > low else 1.0)
    return np.where(valid_HW, np.clip(stretched, 0, 1) * 255, 0).round().astype(np.uint8)
