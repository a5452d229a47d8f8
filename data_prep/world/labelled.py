"""Two labelled synthetic sets in the folder layout of Mars-Bench, cut from ground no product covers."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from tqdm import tqdm

from momo.errors import DataError

from .cameras import CAMERAS, Sun, blur, radiance
from .config import LANDFORM_CLASSES, WorldConfig
from .craters import Craters, rim_distance
from .ground import Ground
from .noise import Grid
from .products import NOTE, ORIGIN_EASTING_M, ORIGIN_NORTHING_M, ProductPlan

CRATER_SET, LANDFORM_SET = "demo-crater_seg", "demo-landform_cls"
SMALLEST_MASKED_PX = 5.0
OLDEST_MASKED = 0.7  # a crater degraded further is left out: nobody could outline it at this resolution
SHOTS = (1, 2, 5, 10)
FRACTIONS = (0.01, 0.02, 0.05, 0.10, 0.20, 0.25, 0.50)

_GAP_M = 3000.0  # empty ground between the products and the sets, and between splits
_PITCH = 1.25  # tiles per candidate cell, leaves room to jitter
_CELLS_ACROSS = 40
_MOST_ROWS = 2000
_WITH_CRATER = 0.8  # share of segmentation images that hold a crater
_TILES_PER_PATCH = 4
_LEAST_RELIEF = 0.1  # share of a landform image that its landform must shape
_BAND = 1  # the feature scale a CTX-like tile resolves
_GSD_M = CAMERAS["CTX"].gsd_m


@dataclass(frozen=True)
class Spot:
    """A place for one labelled image.

    Attributes:
        west: Ground easting of the upper left corner, metres.
        north: Ground northing of the same corner, metres.
        label: Class name.
    """

    west: float
    north: float
    label: str

    def footprint(self, size: int) -> list[list[float]]:
        """Returns the corners in projected metres, clockwise from the north-west."""
        east, south = self.west + size * _GSD_M, self.north - size * _GSD_M
        corners = ((self.west, self.north), (east, self.north), (east, south), (self.west, south))
        return [[ORIGIN_EASTING_M + x, ORIGIN_NORTHING_M + y] for x, y in corners]


def write_labelled(config: WorldConfig, ground: Ground, plans: Sequence[ProductPlan], folder: Path) -> list[dict]:
    """Writes both sets and returns their entries for world.json.

    Args:
        config: Counts, tile size and seed.
        ground: The ground.
        plans: The products whose ground must be left alone.
        folder: The `labelled` folder, made here.

    Raises:
        DataError: The ground has too few places of some class.
    """
    origin = max(plan.box[2] for plan in plans) + _GAP_M
    return [_write_craters(config, ground, origin, folder), _write_landforms(config, ground, origin, folder)]


def _strips(config: WorldConfig, origin: float) -> dict[str, float]:
    """Returns the west edge of each split's own strip of ground."""
    width = _CELLS_ACROSS * _PITCH * config.tile_size * _GSD_M
    return {split: origin + n * (width + _GAP_M) for n, split in enumerate(("train", "val", "test"))}


def _candidates(config: WorldConfig, west: float, rng: np.random.Generator) -> Iterator[tuple[Any, Any]]:
    """Yields rows of jittered, disjoint places: (west edges, north edges), growing northwards."""
    side = config.tile_size * _GSD_M
    pitch = _PITCH * side
    for row in range(_MOST_ROWS):
        jitter = np.rint(rng.uniform(0, pitch - side, (2, _CELLS_ACROSS)) / _GSD_M) * _GSD_M
        yield west + np.arange(_CELLS_ACROSS) * pitch + jitter[0], row * pitch + side + jitter[1]


def _touching(craters: Craters, west: float, north: float, side: float) -> Craters:
    """Returns the craters whose rim reaches into a square."""
    dx = np.maximum(np.maximum(west - craters.x, craters.x - west - side), 0)
    dy = np.maximum(np.maximum(north - side - craters.y, craters.y - north), 0)
    return craters.where(np.hypot(dx, dy) < craters.diameter / 2)


def _find(
    config: WorldConfig, ground: Ground, west: float, quota: dict[str, int], rng: np.random.Generator, classify: Any
) -> list[Spot]:
    """Walks north over a strip until every class has its quota."""
    side = config.tile_size * _GSD_M
    missing: Counter[str] = Counter(quota)
    found: list[Spot] = []
    for wests, norths in _candidates(config, west, rng):
        if not +missing:
            return found
        bounds = (float(wests[0]), float(norths.min()) - side, float(wests[-1]) + side, float(norths.max()))
        craters = visible_craters(ground, bounds)
        wanted = set(+missing)
        for x, y, label in zip(wests, norths, classify(craters, wests, norths, wanted), strict=True):
            if label and missing[label] > 0:
                missing[label] -= 1
                found.append(Spot(float(x), float(y), label))
    raise DataError(
        "the synthetic ground has too few places of a class",
        seen=", ".join(f"{count} more {label}" for label, count in (+missing).items()),
        fix="ask for fewer labelled images or another seed",
    )


def photograph(ground: Ground, grid: Grid, rng: np.random.Generator) -> tuple[npt.NDArray[np.uint8], Sun]:
    """Takes a CTX-like 8 bit picture with its own sun, sharpness, haze gradient, noise and contrast.

    Mean and contrast are drawn from the same distributions whatever is in the picture, so neither tells the class.

    Args:
        ground: What is seen.
        grid: Pixels.
        rng: Source of everything random.

    Returns:
        The picture and the sun it was taken in.
    """
    margin = 4
    gsd, (rows, columns) = grid.gsd_m, grid.shape
    west, _, _, north = grid.bounds
    wide = Grid.of(west - gsd / 2, north + gsd / 2, gsd, rows, columns, margin)
    sun = Sun(float(rng.uniform(235, 325)), float(rng.uniform(25, 55)))
    seen = radiance(ground.surface(wide), gsd, sun, thermal=False)
    seen = blur(seen, float(rng.uniform(0.5, 0.95)))[margin:-margin, margin:-margin]
    seen = (seen - seen.mean()) / max(float(seen.std()), 1e-4)
    slope = rng.normal(0, 0.2, 2)
    y, x = np.linspace(-1, 1, rows)[:, None], np.linspace(-1, 1, columns)[None, :]
    seen = seen + slope[0] * x + slope[1] * y + rng.normal(0, rng.uniform(0.02, 0.15), seen.shape)
    picture = rng.uniform(90, 165) + rng.uniform(16, 42) * seen / seen.std()
    return np.clip(np.rint(picture), 1, 255).astype(np.uint8), sun


def visible_craters(ground: Ground, bounds: tuple[float, float, float, float], reach: float = 1.0) -> Craters:
    """Returns the craters a mask holds: at least five pixels across and not degraded beyond recognition."""
    craters = ground.craters(bounds, SMALLEST_MASKED_PX * _GSD_M, reach=reach)
    return craters.where(craters.age <= OLDEST_MASKED)


def crater_mask(ground: Ground, grid: Grid) -> npt.NDArray[np.uint8]:
    """Returns 1 inside the true rim of every visible crater (see `visible_craters`), 0 elsewhere."""
    mask = np.zeros(grid.shape, dtype=np.uint8)
    craters = visible_craters(ground, grid.bounds, reach=1.3)
    for number in range(len(craters)):
        if (found := rim_distance(craters, number, grid, 1.15)) is not None:
            window, distance = found
            mask[window][distance < 1] = 1
    return mask


def _write_craters(config: WorldConfig, ground: Ground, origin: float, folder: Path) -> dict[str, Any]:
    root, size = folder / CRATER_SET, config.tile_size
    side = size * _GSD_M

    def classify(craters: Craters, wests: Any, norths: Any, wanted: set[str]) -> list[str]:
        labels = []
        for west, north in zip(wests, norths, strict=True):
            near = _touching(craters, west, north, side)
            inside = (near.x > west) & (near.x < west + side) & (near.y < north) & (near.y > north - side)
            if (near.diameter > 0.75 * side).any():
                labels.append("")  # nothing but the inside of a large crater
            elif len(near) == 0:
                labels.append("background")
            else:
                labels.append("crater" if (inside & (near.diameter > 8 * _GSD_M)).any() else "")
        return labels

    entries, rows = [], []
    for number, (split, west) in enumerate(_strips(config, origin).items()):
        rng = np.random.default_rng([config.seed, 3, number])
        count = config.crater_counts[split]
        with_crater = round(_WITH_CRATER * count)
        spots = _find(config, ground, west, {"crater": with_crater, "background": count - with_crater}, rng, classify)
        for kind in ("images", "masks"):
            (root / "data" / split / kind).mkdir(parents=True)
        for index, spot in enumerate(tqdm(spots, desc=f"{CRATER_SET} {split}", leave=False, disable=None)):
            name = f"synthetic_{split}_{index:04d}.png"
            grid = Grid.of(spot.west, spot.north, _GSD_M, size, size)
            picture, sun = photograph(ground, grid, rng)
            Image.fromarray(picture).save(root / "data" / split / "images" / name)
            Image.fromarray(crater_mask(ground, grid)).save(root / "data" / split / "masks" / name)
            rows.append({"file_id": name, "split": split})
            entries.append(_entry(spot, size, sun, name, split))
    _write_mapping(root, ["background", "crater"])
    rng = np.random.default_rng([config.seed, 4])
    (root / "partitions").mkdir()
    train = [row for row in rows if row["split"] == "train"]
    for fraction in FRACTIONS:
        chosen = sorted(rng.permutation(len(train))[: max(1, round(fraction * len(train)))])
        kept = [train[n] for n in chosen] + [row for row in rows if row["split"] != "train"]
        _write_csv(root / "partitions" / f"{fraction:.2f}x_partition.csv", kept)
    _write_readme(root, "binary crater masks (0 background, 1 crater), rims of 5 pixels and more")
    return {"dataset": CRATER_SET, "task": "segmentation", "classes": ["background", "crater"], "images": entries}


def _write_landforms(config: WorldConfig, ground: Ground, origin: float, folder: Path) -> dict[str, Any]:
    root, size = folder / LANDFORM_SET, config.tile_size
    entries, rows = [], []
    for number, (split, west) in enumerate(_strips(config, origin).items()):
        rng = np.random.default_rng([config.seed, 5, number])
        count, classes = config.landform_counts[split], len(LANDFORM_CLASSES)
        quota = {name: count // classes + (n < count % classes) for n, name in enumerate(LANDFORM_CLASSES)}
        spots = _find(config, ground, west, quota, rng, LandformFinder(ground, size))
        for name in LANDFORM_CLASSES:
            (root / "data" / split / name).mkdir(parents=True)
        for index, spot in enumerate(tqdm(spots, desc=f"{LANDFORM_SET} {split}", leave=False, disable=None)):
            file_id = f"synthetic_{split}_{index:04d}.png"
            picture, sun = photograph(ground, Grid.of(spot.west, spot.north, _GSD_M, size, size), rng)
            Image.fromarray(picture).save(root / "data" / split / spot.label / file_id)
            label = LANDFORM_CLASSES.index(spot.label)
            rows.append({"file_id": file_id, "feature_name": spot.label, "label": label, "split": split})
            entries.append(_entry(spot, size, sun, file_id, split))
    _write_csv(root / "annotation.csv", rows)
    _write_mapping(root, LANDFORM_CLASSES)
    _write_subsets(root, rows, np.random.default_rng([config.seed, 6]))
    _write_readme(root, f"one of {len(LANDFORM_CLASSES)} landforms an image: {', '.join(LANDFORM_CLASSES)}")
    return {"dataset": LANDFORM_SET, "task": "classification", "classes": list(LANDFORM_CLASSES), "images": entries}


class LandformFinder:
    """Tells which class, if any, a square of ground stands for.

    Args:
        ground: The ground.
        size: Side of a square in CTX-like pixels.
    """

    def __init__(self, ground: Ground, size: int) -> None:
        self.ground, self.side = ground, size * _GSD_M
        self._taken: Counter[tuple[int, int]] = Counter()

    def __call__(self, craters: Craters, wests: Any, norths: Any, wanted: set[str]) -> list[str]:
        """Returns a wanted class name, or an empty string, for each square."""
        share = np.linspace(0, 1, 6)
        x = wests[:, None, None] + share[None, None, :] * self.side + 0 * share[None, :, None]
        y = norths[:, None, None] - share[None, :, None] * self.side + 0 * share[None, None, :]
        kind, weight, cell = self.ground.kind_at(x, y, _BAND)
        coarse_kind, coarse_weight, _ = self.ground.kind_at(x, y, _BAND + 1)
        labels = []
        for n, (west, north) in enumerate(zip(wests, norths, strict=True)):
            near = _touching(craters, west, north, self.side)
            coarse_plain = ((coarse_kind[n] == "plains") | (coarse_weight[n] < 0.15)).all()
            # Coarse dunes bury the finer landforms; coarse troughs and ridges outshine them.
            buried = (np.isin(coarse_kind[n], ("dunes", "polygons", "rough")) & (coarse_weight[n] > 0.15)).any()
            label = self._label(near, kind[n], weight[n], bool(coarse_plain), bool(buried), west, north)
            labels.append(label if label in wanted and self._admit(label, west, north, cell[n, 3, 3]) else "")
        return labels

    def _label(
        self, near: Craters, kind: Any, weight: Any, coarse_plain: bool, buried: bool, west: float, north: float
    ) -> str:
        largest = float(near.diameter.max()) / self.side if len(near) else 0.0
        if 0.25 < largest < 0.8 and (kind == "plains").mean() > 0.6 and not buried:
            one = near.where(near.diameter == near.diameter.max())
            radius = one.diameter[0] / 2
            inside = (
                west + radius < one.x[0] < west + self.side - radius
                and north - self.side + radius < one.y[0] < north - radius
            )
            return "crater" if inside and one.age[0] < 0.8 else ""
        if largest > 0.14:
            return ""
        if (kind == "plains").all() and coarse_plain:
            return "smooth"
        name = str(kind[3, 3])
        pure = ((kind == name) & (weight > 0.5)).mean() > 0.85
        return name if pure and name != "plains" and not buried else ""

    def _admit(self, label: str, west: float, north: float, cell: Any) -> bool:
        """Checks that the landform shapes enough of the square and that its patch was not cut too often."""
        if label == "crater":
            return True
        if label != "smooth":
            pixels = round(self.side / _GSD_M)
            grid = Grid.of(west, north, _GSD_M, pixels, pixels)
            if self.ground.relief_share(grid, _BAND) < _LEAST_RELIEF:
                return False
        patch = (int(cell[0]), int(cell[1]))
        self._taken[patch] += 1
        return self._taken[patch] <= _TILES_PER_PATCH


def _entry(spot: Spot, size: int, sun: Sun, name: str, split: str) -> dict[str, Any]:
    return {
        "file_id": name,
        "split": split,
        "label": spot.label,
        "gsd_m": _GSD_M,
        "sun_azimuth_deg": sun.azimuth_deg,
        "sun_elevation_deg": sun.elevation_deg,
        "footprint": spot.footprint(size),
    }


def _write_subsets(root: Path, rows: list[dict[str, Any]], rng: np.random.Generator) -> None:
    """Writes few-shot and partition tables; a shot number that some class cannot fill is left out."""
    rest = [row for row in rows if row["split"] != "train"]
    by_class: dict[str, list[dict[str, Any]]] = {name: [] for name in LANDFORM_CLASSES}
    for row in rows:
        if row["split"] == "train":
            by_class[row["feature_name"]].append(row)
    shuffled = {name: [items[n] for n in rng.permutation(len(items))] for name, items in by_class.items()}
    (root / "few_shot").mkdir()
    for shots in SHOTS:
        if shots <= min(len(items) for items in shuffled.values()):
            kept = [row for items in shuffled.values() for row in items[:shots]]
            _write_csv(root / "few_shot" / f"{shots}_shot.csv", kept + rest)
    (root / "partitions").mkdir()
    for fraction in FRACTIONS:
        kept = [row for items in shuffled.values() for row in items[: max(1, round(fraction * len(items)))]]
        _write_csv(root / "partitions" / f"{fraction:.2f}x_partition.csv", kept + rest)


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _write_mapping(root: Path, classes: Sequence[str]) -> None:
    mapping = {str(number): name for number, name in enumerate(classes)}
    (root / "mapping.json").write_text(json.dumps(mapping, indent=2) + "\n", encoding="utf-8")
    facts = {"synthetic": True, "sensor": "CTX", "gsd_m": _GSD_M, "licence": "CC0-1.0"}
    (root / "dataset.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def _write_readme(root: Path, what: str) -> None:
    text = f"{NOTE}.\n\n{root.name}: {what}.\nCTX-like 8 bit images, {_GSD_M:.0f} m a pixel. Licence: CC0-1.0.\n"
    (root / "README.txt").write_text(text, encoding="utf-8")
