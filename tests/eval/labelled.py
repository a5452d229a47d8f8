"""Tiny seeded labelled sets in the Mars-Bench layout, and weights to score on them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

CLASSES = ["dunes", "craters", "plains"]
COUNTS = {"train": 24, "val": 12, "test": 15}


def striped(rng: np.random.Generator, label: int, size: int) -> npt.NDArray[np.uint8]:
    """Stripes across, stripes down, or noise alone."""
    ramp = np.arange(size)[:, None] + rng.integers(8)
    wave = 60 * np.sin(ramp * 1.3) * np.ones((1, size))
    field = [wave, wave.T, np.zeros((size, size))][label] + 110 + rng.normal(scale=25, size=(size, size))
    return np.clip(field, 0, 255).astype(np.uint8)


def write_classification(folder: Path, *, counts: dict[str, int] = COUNTS, size: int = 24, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    rows = []
    for split, count in counts.items():
        for number in range(count):
            label = number % len(CLASSES)
            path = folder / "data" / split / CLASSES[label] / f"{split}_{number:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(striped(rng, label, size)).save(path)
            rows.append([path.name, CLASSES[label], label, split])
    write_annotation(folder, rows)
    (folder / "mapping.json").write_text(json.dumps({str(i): name for i, name in enumerate(CLASSES)}))
    (folder / "dataset.json").write_text(json.dumps({"synthetic": True, "sensor": "CTX", "licence": "CC0-1.0"}))
    return folder


def write_annotation(folder: Path, rows: list[list[object]]) -> None:
    with open(folder / "annotation.csv", "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["file_id", "feature_name", "label", "split"])
        writer.writerows(rows)


def disc_pair(rng: np.random.Generator, height: int, width: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """A bright disc on dark noise, and its mask."""
    row, column = np.mgrid[:height, :width]
    radius = rng.uniform(0.15, 0.3) * min(height, width)
    centre = rng.uniform(0.2, 0.8, size=2) * (height, width)
    mask = ((row - centre[0]) ** 2 + (column - centre[1]) ** 2 < radius**2).astype(np.uint8)
    image = np.clip(70 + 110.0 * mask + rng.normal(scale=15, size=mask.shape), 0, 255)
    return image.astype(np.uint8), mask


def write_segmentation(
    folder: Path, *, counts: dict[str, int] = COUNTS, height: int = 28, width: int = 36, seed: int = 0
) -> Path:
    rng = np.random.default_rng(seed)
    for split, count in counts.items():
        for part in ("images", "masks"):
            (folder / "data" / split / part).mkdir(parents=True)
        for number in range(count):
            image, mask = disc_pair(rng, height, width)
            Image.fromarray(image).save(folder / "data" / split / "images" / f"{number:03d}.png")
            Image.fromarray(mask).save(folder / "data" / split / "masks" / f"{number:03d}.png")
    (folder / "mapping.json").write_text(json.dumps(["background", "crater"]))
    return folder
