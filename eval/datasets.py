"""Labelled datasets in the Mars-Bench folder layout (arXiv 2510.24010, unzipped from Zenodo).

Classification:
    annotation.csv                                   columns file_id, feature_name, label, split
    mapping.json                                     {"0": "name", ...} or a list; optional
    data/<split>/<feature_name>/<file_id>
Segmentation:
    data/<split>/images/<name>, data/<split>/masks/<name>   same stem, or Image<k> and Mask<k>; masks are class indices
    mapping.json                                     optional
Both: `few_shot/*.csv` and `partitions/*.csv` name training subsets; momo's own `dataset.json` (optional) says
`synthetic`, `sensor`, `gsd_m` and `licence`. Splits are train, val (or validation) and test.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from momo.errors import DataError
from momo.files import sha256_file, sha256_json

from .config import DatasetConfig
from .dataset_tables import read_csv, read_info, read_mapping
from .images import EXTENSIONS, image_size, read_array, read_mask

SPLITS = ("train", "val", "test")
_FOLDERS = {"train": ("train",), "val": ("val", "validation"), "test": ("test",)}
_LAYOUTS = (
    "classification has annotation.csv and data/<split>/<feature_name>/<file_id>; "
    "segmentation has data/<split>/images and data/<split>/masks"
)


@dataclass(frozen=True)
class Sample:
    """One labelled image.

    Attributes:
        key: Path of the image relative to the dataset folder.
        image: Path of the image.
        label: Class index; classification only.
        mask: Path of the mask; segmentation only.
        stratum: Samples are drawn within it: the class, or 1 where the mask has foreground and 0 elsewhere.
    """

    key: str
    image: Path
    label: int | None = None
    mask: Path | None = None
    stratum: int = 0


@dataclass
class LabelledDataset:
    """A dataset that passed every check.

    Attributes:
        name: Name in the results.
        root: Its folder.
        task: `classification` or `segmentation`.
        classes: Class names in index order.
        splits: Samples of train, val and test, in order of their keys; `train` is already cut to the subset.
        fingerprint: SHA-256 over the sorted (relative path, sha256) of every file used.
        info: Fields of `dataset.json`; empty without one.
        duplicates: Images of val or test with the very pixels of an image of another split: (key, other key).
        bands: See `DatasetConfig`.
    """

    name: str
    root: Path
    task: str
    classes: list[str]
    splits: dict[str, list[Sample]]
    fingerprint: str
    info: dict[str, Any] = field(default_factory=dict)
    duplicates: list[tuple[str, str]] = field(default_factory=list)
    bands: list[int] | None = None

    @property
    def synthetic(self) -> bool | None:
        """Whether the dataset says it was generated; None when it says nothing."""
        value = self.info.get("synthetic")
        return None if value is None else bool(value)


def open_dataset(config: DatasetConfig, *, report: Callable[[str], None] = print) -> LabelledDataset:
    """Reads the layout of a dataset and checks every file of it.

    Args:
        config: Folder and options.
        report: Takes lines the user should see (duplicates, files without a label).

    Raises:
        DataError: Missing folder, unknown layout, empty split, image without mask or mask without image, sizes that
            differ, a mask value or label without a class, an unreadable file, or a label without its file.
    """
    root = Path(config.path)
    if not root.is_dir():
        raise DataError(
            "the dataset is not there",
            seen=root,
            rule="datasets.path is a folder",
            fix="unzip the dataset and give the folder that holds data/",
        )
    name = config.name or root.resolve().name
    if any(_split_folder(root, split, "masks").is_dir() for split in SPLITS):
        task = "segmentation"
        splits = {split: _paired_samples(root, split) for split in SPLITS}
    elif (root / "annotation.csv").is_file():
        task = "classification"
        splits = _annotated_samples(root, report)
    else:
        raise DataError(
            "the folder is in neither layout",
            seen=root,
            rule=_LAYOUTS,
            fix="give the folder that holds data/ (multi-label and detection sets are not read yet)",
        )
    _require_splits(root, splits)
    classes = read_mapping(root)
    files = [sample.image for samples in splits.values() for sample in samples]
    files += [sample.mask for samples in splits.values() for sample in samples if sample.mask is not None]
    files += [path for name_ in ("annotation.csv", "mapping.json", "dataset.json") if (path := root / name_).is_file()]
    fingerprint = sha256_json(sorted([path.relative_to(root).as_posix(), sha256_file(path)] for path in files))
    duplicates = _duplicates(splits)
    if task == "segmentation":
        splits, classes = _checked_masks(splits, classes)
    else:
        classes = _checked_labels(root, splits, classes)
    if config.train_subset is not None:
        splits["train"] = _subset(root, config.train_subset, splits["train"])
    if duplicates:
        shown = "; ".join(f"{a} = {b}" for a, b in duplicates[:3]) + ("; ..." if len(duplicates) > 3 else "")
        report(
            f"WARNING: {name}: {len(duplicates)} val or test images have the pixels of an image of another "
            f"split, so its scores are too good: {shown}"
        )
    return LabelledDataset(
        name=name,
        root=root,
        task=task,
        classes=classes,
        splits=splits,
        fingerprint=fingerprint,
        info=read_info(root),
        duplicates=duplicates,
        bands=config.bands,
    )


def _split_folder(root: Path, split: str, *below: str) -> Path:
    folders = [root / "data" / alias for alias in _FOLDERS[split]]
    return next((folder for folder in folders if folder.is_dir()), folders[0]).joinpath(*below)


def _require_splits(root: Path, splits: dict[str, list[Sample]]) -> None:
    empty = [split for split in SPLITS if not splits[split]]
    if empty:
        raise DataError(
            "a split has no images",
            seen=f"{', '.join(empty)} in {root}",
            rule="train, val and test are all needed: fit, choose, score",
            fix="check the split column or the folders under data/",
        )


# ---- segmentation


def _image_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in EXTENSIONS and not p.name.startswith("."))


def _paired_samples(root: Path, split: str) -> list[Sample]:
    images = {p.stem: p for p in _image_files(_split_folder(root, split, "images"))}
    masks = {p.stem: p for p in _image_files(_split_folder(root, split, "masks"))}
    # MMLS numbers its files Image1.tif and Mask1.tif.
    if images and masks and all(s.startswith("Image") for s in images) and all(s.startswith("Mask") for s in masks):
        masks = {"Image" + stem.removeprefix("Mask"): path for stem, path in masks.items()}
    for what, path in (
        ("an image has no mask", next((p for s, p in images.items() if s not in masks), None)),
        ("a mask has no image", next((p for s, p in masks.items() if s not in images), None)),
    ):
        if path is not None:
            count = len(images.keys() - masks.keys()) if "image has" in what else len(masks.keys() - images.keys())
            raise DataError(
                what,
                seen=f"{path.relative_to(root)} ({count} in {split}) of {root}",
                rule="data/<split>/images and data/<split>/masks hold the same names",
                fix="restore the missing file or remove its partner",
            )
    return [
        Sample(key=path.relative_to(root).as_posix(), image=path, mask=masks[stem])
        for stem, path in sorted(images.items(), key=lambda item: item[1].name)
    ]


def _checked_masks(
    splits: dict[str, list[Sample]], classes: list[str] | None
) -> tuple[dict[str, list[Sample]], list[str]]:
    def check(sample: Sample) -> tuple[int, int]:
        assert sample.mask is not None
        mask = read_mask(sample.mask)
        if mask.shape != image_size(sample.image):
            raise DataError(
                "an image and its mask differ in size",
                fix="export the pair again",
                seen=f"{sample.key} is {image_size(sample.image)}, its mask {mask.shape} (height, width)",
                rule="they are equal pixel for pixel",
            )
        top = int(mask.max())
        if classes is not None and top >= len(classes):
            advice = "divide the masks by 255" if set(np.unique(mask)) <= {0, 255} else "correct mask or mapping.json"
            raise DataError(
                "a mask value has no class",
                seen=f"{top} in the mask of {sample.key}",
                fix=advice,
                rule=f"mapping.json names the classes 0..{len(classes) - 1}",
            )
        return top, int((mask > 0).any())

    found = {split: _each(check, samples) for split, samples in splits.items()}
    if classes is None:
        top = max(top for values in found.values() for top, _ in values)
        classes = ["background", *(f"class {index}" for index in range(1, max(top, 1) + 1))]
    strata = {
        split: [
            Sample(s.key, s.image, None, s.mask, foreground)
            for s, (_, foreground) in zip(samples, found[split], strict=True)
        ]
        for split, samples in splits.items()
    }
    return strata, classes


# ---- classification


def _annotated_samples(root: Path, report: Callable[[str], None]) -> dict[str, list[Sample]]:
    splits: dict[str, list[Sample]] = {split: [] for split in SPLITS}
    missing = []
    for number, row in read_csv(root / "annotation.csv", ("file_id", "label", "split")):
        split = "val" if row["split"].strip() == "validation" else row["split"].strip()
        place = f"line {number} of {root / 'annotation.csv'}"
        if split not in SPLITS:
            raise DataError(
                "an annotation names an unknown split", seen=f"{split!r} in {place}", rule=", ".join(SPLITS)
            )
        path = _split_folder(root, split, row.get("feature_name") or "", row["file_id"])
        if ".." in path.relative_to(root).parts or Path(row["file_id"]).is_absolute():
            raise DataError(
                "an annotation leaves the dataset folder",
                seen=f"{row['file_id']!r} in {place}",
                rule="file_id is a plain file name",
            )
        if not path.is_file():
            missing.append(path.relative_to(root).as_posix())
            continue
        splits[split].append(Sample(path.relative_to(root).as_posix(), path, label=_label(row["label"], place)))
    if missing:
        raise DataError(
            "labelled images are missing",
            seen=f"{len(missing)}, the first {missing[0]} in {root}",
            rule="every row of annotation.csv has data/<split>/<feature_name>/<file_id>",
            fix="unzip the dataset again",
        )
    keys = Counter(sample.key for samples in splits.values() for sample in samples)
    if twice := [key for key, count in keys.items() if count > 1]:
        raise DataError(
            "an image is annotated twice",
            seen=f"{twice[0]} ({len(twice)} images) in {root}",
            rule="one row an image",
            fix="remove the extra rows from annotation.csv",
        )
    unlabelled = [
        p
        for p in (root / "data").rglob("*")
        if p.suffix.lower() in EXTENSIONS and p.relative_to(root).as_posix() not in keys
    ]
    if unlabelled:
        report(
            f"{root}: {len(unlabelled)} images have no row in annotation.csv and are left out, "
            f"the first {min(unlabelled).relative_to(root)}"
        )
    return {split: sorted(samples, key=lambda sample: sample.key) for split, samples in splits.items()}


def _label(text: str, place: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise DataError(
            "a label is not a class index",
            seen=f"{text!r} in {place}",
            rule="a whole number from 0",
            fix="multi-label sets are not read yet" if text.startswith("[") else None,
        ) from None


def _checked_labels(root: Path, splits: dict[str, list[Sample]], classes: list[str] | None) -> list[str]:
    labelled = [(sample.label or 0, sample.key) for samples in splits.values() for sample in samples]
    top = max(labelled)
    if classes is None:
        classes = [f"class {index}" for index in range(top[0] + 1)]
    wrong = min(labelled) if min(labelled)[0] < 0 else top
    if not 0 <= wrong[0] < len(classes):
        raise DataError(
            "a label has no class",
            seen=f"{wrong[0]} of {wrong[1]}",
            rule=f"mapping.json names the classes 0..{len(classes) - 1}",
            fix="correct the label or mapping.json",
        )
    if len({sample.label for sample in splits["train"]}) < 2:
        raise DataError("the training images are all of one class", seen=root, rule="at least two classes")
    for split in SPLITS:
        splits[split] = [Sample(s.key, s.image, s.label, None, s.label or 0) for s in splits[split]]
    return classes


# ---- both


def _subset(root: Path, name: str, train: list[Sample]) -> list[Sample]:
    path = root / name
    wanted = {
        row["file_id"] for _, row in read_csv(path, ("file_id", "split")) if row["split"].strip() in ("", "train")
    }
    chosen = [sample for sample in train if sample.image.name in wanted or sample.image.stem in wanted]
    if not chosen:
        raise DataError("a training subset names no training image", seen=path, rule="file_id as in the training split")
    return chosen


def _each(function: Callable[[Sample], Any], samples: list[Sample]) -> list[Any]:
    """Maps over samples with a few threads (decoding releases the interpreter); the first error is raised."""
    with ThreadPoolExecutor(max_workers=4) as pool:
        return list(pool.map(function, samples))


def _duplicates(splits: dict[str, list[Sample]]) -> list[tuple[str, str]]:
    """Decodes every image and pairs those of val and test with an equal one of an earlier split."""

    def digest(sample: Sample) -> str:
        pixels = read_array(sample.image)
        return sha256(
            repr((pixels.shape, pixels.dtype.str)).encode() + np.ascontiguousarray(pixels).tobytes()
        ).hexdigest()

    first: dict[str, tuple[str, str]] = {}
    pairs = []
    for split in SPLITS:
        for sample, key in zip(splits[split], _each(digest, splits[split]), strict=True):
            seen_split, seen_key = first.setdefault(key, (split, sample.key))
            if seen_split != split:
                pairs.append((sample.key, seen_key))
    return pairs
