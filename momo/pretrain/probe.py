"""A k-nearest-neighbours probe inside pretraining: do the features tell classes apart, and more so as time goes on?

The folder has one subfolder for each split and in it one for each class:

    train/crater/0001.png    val/crater/0107.png
    train/dune/0002.png      val/dune/0108.png

The probe is a gauge for whoever watches a run. It chooses nothing: selection rests on the validation loss alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from ..errors import ConfigError, DataError
from ..models import MaskedAutoencoder
from ..normalise import Normalisation

_SPLITS = ("train", "val")
_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
_BATCH, _QUERIES = 64, 1024


@dataclass(frozen=True)
class KnnResult:
    """What a probe found.

    Attributes:
        accuracy: Share of validation images whose class was predicted.
        weighted_f1: F1 of the classes, weighted by their validation images.
        neighbours: k; the number of training images when there are fewer.
        classes: Number of classes.
        train_images: Images that vote.
        val_images: Images that are classified.
    """

    accuracy: float
    weighted_f1: float
    neighbours: int
    classes: int
    train_images: int
    val_images: int

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values."""
        return asdict(self)


class KnnProbe:
    """Classifies the validation images of a folder by their nearest training images.

    Images are made grey, fitted to the model's input (bilinear, antialiased) and normalised as the run's tiles are;
    transparent pixels are invalid. Features are the encoder's patch tokens after its final LayerNorm, averaged. There
    is no randomness: same weights, same folder, same numbers.

    Args:
        folder: See the top of this file.
        normalisation: Of the run.
        neighbours: k.

    Raises:
        ConfigError: The normalisation needs constants of a sensor, which labelled images do not share.
        DataError: The folder is not laid out as above, or the first image of a split cannot be read.
    """

    def __init__(self, folder: Path, normalisation: Normalisation, *, neighbours: int) -> None:
        if normalisation.policy == "sensor_zscore":
            raise ConfigError(
                "the probe cannot normalise its images as the run does",
                seen="data.normalisation=sensor_zscore, telemetry.probe is set",
                rule="labelled images are not in the physical unit of the sensor's mean and standard deviation",
                fix="leave telemetry.probe out, or choose a normalisation by tile or product",
            )
        self.normalisation, self.neighbours = normalisation, neighbours
        self.classes, self._images = _list_images(Path(folder))
        for split in _SPLITS:
            read_grey(self._images[split][0][0], side=1)

    def run(self, model: MaskedAutoencoder) -> KnnResult:
        """Probes the encoder of a model.

        Args:
            model: The autoencoder in float32; its mode is left as found.

        Raises:
            DataError: An image cannot be read.
        """
        features = {split: self._features(model, split) for split in _SPLITS}
        label = {split: torch.tensor([number for _, number in self._images[split]]) for split in _SPLITS}
        predicted = knn_predict(
            features["train"], label["train"], features["val"], k=self.neighbours, classes=len(self.classes)
        )
        accuracy, weighted_f1 = scores(label["val"], predicted, len(self.classes))
        return KnnResult(
            accuracy=accuracy,
            weighted_f1=weighted_f1,
            neighbours=min(self.neighbours, len(label["train"])),
            classes=len(self.classes),
            train_images=len(label["train"]),
            val_images=len(label["val"]),
        )

    @torch.no_grad()
    def _features(self, model: MaskedAutoencoder, split: str) -> torch.Tensor:
        shapes, device = model.architecture, next(model.parameters()).device
        was_training = model.training
        model.eval()
        pooled = []
        paths = [path for path, _ in self._images[split]]
        with ThreadPoolExecutor(4, thread_name_prefix="probe-images") as readers:
            for first in range(0, len(paths), _BATCH):
                tiles = readers.map(lambda path: self._tile(path, shapes.image_size), paths[first : first + _BATCH])
                image_BHW = torch.from_numpy(np.stack(list(tiles))).to(device)
                tokens = model.forward_features(image_BHW[:, None].expand(-1, shapes.in_chans, -1, -1))
                pooled.append(tokens[:, model.num_prefix_tokens :].mean(dim=1).float().cpu())
        model.train(was_training)
        return torch.cat(pooled)

    def _tile(self, path: Path, side: int) -> npt.NDArray[np.float32]:
        value_HW, valid_HW = read_grey(path, side)
        return self.normalisation(value_HW, valid_HW)


def read_grey(path: Path, side: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """Reads an image as grey values of a square.

    Args:
        path: Image file of 8 or 16 bit; colours are weighted to luminance (ITU-R BT.601).
        side: Side of the result in pixels.

    Returns:
        float32 and bool of shape (side, side); False where transparent.

    Raises:
        DataError: The file cannot be read.
    """
    try:
        with Image.open(path) as image:
            image.load()
            alpha = image.getchannel("A") if image.mode in ("LA", "RGBA") else None
            grey = image if image.mode.startswith(("I", "F")) else image.convert("L")
            value_HW = np.asarray(grey, dtype=np.float32)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(
            "an image of the probe cannot be read",
            seen=f"{path}: {' '.join(str(error).split())}",
            rule=f"a whole image file ({', '.join(_SUFFIXES)})",
            fix="export the file again, or take it out of telemetry.probe",
        ) from None
    valid_HW = np.isfinite(value_HW)
    if alpha is not None:
        valid_HW &= np.asarray(alpha) > 0
    value_HW = np.where(valid_HW, value_HW, 0).astype(np.float32)
    if value_HW.shape != (side, side):
        value_HW = np.asarray(Image.fromarray(value_HW).resize((side, side), Image.Resampling.BILINEAR))
        shown = Image.fromarray(valid_HW.astype(np.uint8)).resize((side, side), Image.Resampling.NEAREST)
        valid_HW = np.asarray(shown).astype(bool)
    return value_HW, valid_HW


def knn_predict(
    train_ND: torch.Tensor, label_N: torch.Tensor, query_MD: torch.Tensor, *, k: int, classes: int
) -> torch.Tensor:
    """Predicts by the majority of the k training features nearest in angle.

    A tie goes to the class of the nearest neighbour among the tied; equal angles keep the order of the training set.

    Args:
        train_ND: Training features.
        label_N: Their classes, int64.
        query_MD: Features to classify.
        k: Neighbours; with fewer training features all of them vote.
        classes: Number of classes.

    Returns:
        int64 of shape (M,).
    """
    train, query = (torch.nn.functional.normalize(x.double(), dim=1) for x in (train_ND, query_MD))
    k = min(k, len(train))
    # Ranks decide between equal numbers of votes alone: what they add stays below one vote.
    vote_k = 1 + 0.25 ** torch.arange(1, k + 1, dtype=torch.float64)
    predicted = []
    for block in query.split(_QUERIES):
        nearest = (block @ train.T).argsort(dim=1, descending=True, stable=True)[:, :k]
        votes = torch.zeros(len(block), classes, dtype=torch.float64)
        votes.scatter_add_(1, label_N[nearest], vote_k.expand(len(block), -1))
        predicted.append(votes.argmax(dim=1))
    return torch.cat(predicted)


def scores(label_N: torch.Tensor, predicted_N: torch.Tensor, classes: int) -> tuple[float, float]:
    """Returns accuracy and F1 weighted by the number of labels of each class; a class never hit has F1 0."""
    hits, real, said = (
        torch.bincount(x, minlength=classes).double() for x in (label_N[label_N == predicted_N], label_N, predicted_N)
    )
    f1 = 2 * hits / (real + said).clamp(min=1)
    return float(hits.sum() / len(label_N)), float((f1 * real).sum() / len(label_N))


def _list_images(folder: Path) -> tuple[list[str], dict[str, list[tuple[Path, int]]]]:
    """Returns the classes and, by split, each image with the number of its class, in the order of names."""
    layout = "train/<class>/ and val/<class>/ with images, the same classes in both, at least two"
    fix = "correct telemetry.probe, or leave it out"
    names = {split: _subfolders(folder / split) for split in _SPLITS}
    for split in _SPLITS:
        if not names[split]:
            raise DataError("the probe's folder has no classes", seen=folder / split, rule=layout, fix=fix)
    if names["train"] != names["val"]:
        differing = sorted(set(names["train"]) ^ set(names["val"]))
        raise DataError("the probe's splits have other classes", seen=", ".join(differing), rule=layout, fix=fix)
    if len(names["train"]) < 2:
        raise DataError("the probe's folder has one class only", seen=names["train"][0], rule=layout, fix=fix)
    images: dict[str, list[tuple[Path, int]]] = {}
    for split in _SPLITS:
        images[split] = []
        for number, name in enumerate(names[split]):
            found = _images(folder / split / name)
            if not found:
                raise DataError(
                    "a class of the probe has no images",
                    seen=folder / split / name,
                    rule=f"at least one of {', '.join(_SUFFIXES)} in each",
                    fix=fix,
                )
            images[split] += [(path, number) for path in found]
    return names["train"], images


def _subfolders(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _images(folder: Path) -> Sequence[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES and path.is_file())
