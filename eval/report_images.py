"""Pictures of the report: tiles with their invalid pixels hatched, and what the models paint into hidden patches."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont

from momo.corpus import Corpus, StoredTile
from momo.errors import CheckpointError
from momo.models import MaskedAutoencoder, load_mae, mask_noise, sample_rng
from momo.normalise import Normalisation, normalise_batch
from momo.weights import Card, load_card

from .report_figures import slug

Bytes_HW3 = npt.NDArray[np.uint8]
SHOWN_SIDE = 192
MOSAIC_SIDE = 160
HATCH_DARK, HATCH_LIGHT = (196, 104, 72), (244, 222, 212)
HIDDEN = (222, 214, 203)


@dataclass(frozen=True)
class Panel:
    """One small image with its title, text for those who do not see it, and a note under it."""

    title: str
    png: bytes
    alt: str
    note: str = ""


@dataclass(frozen=True)
class Gallery:
    """Rows of panels about one sensor or dataset; every row has the same columns when `columns` is given.

    Attributes:
        name: File name of the montage without suffix.
        heading: Sensor or dataset.
        text: One line on what is seen.
        rows: Panels by row.
        columns: Column titles, for comparisons; empty for a plain mosaic.
    """

    name: str
    heading: str
    text: str
    rows: list[list[Panel]]
    columns: list[str] = field(default_factory=list)


def display_range(value_HW: npt.NDArray[np.float32], valid_HW: npt.NDArray[np.bool_]) -> tuple[float, float]:
    """Returns the 1st and 99th percentile of the valid pixels: what black and white mean on the page."""
    values = value_HW[valid_HW]
    if values.size == 0:
        return 0.0, 1.0
    low, high = (float(edge) for edge in np.percentile(values, [1, 99]))
    return (low, high) if high > low else (low - 0.5, low + 0.5)


def to_rgb(
    value_HW: npt.NDArray[np.float32],
    valid_HW: npt.NDArray[np.bool_],
    limits: tuple[float, float],
    *,
    side: int = SHOWN_SIDE,
    hidden_HW: npt.NDArray[np.bool_] | None = None,
) -> Bytes_HW3:
    """Turns values into an RGB image at the size shown; invalid pixels become a diagonal hatch.

    Args:
        value_HW: Values in any unit.
        valid_HW: True where the pixel was measured.
        limits: Values shown black and white.
        side: Length of the longer side, pixels (see `fit`).
        hidden_HW: Pixels shown in one flat colour: those a model does not see.
    """
    low, high = limits
    scaled = np.clip((np.nan_to_num(value_HW) - low) / (high - low), 0, 1) * 255
    image = fit(np.repeat(scaled.round().astype(np.uint8)[..., None], 3, axis=2), side)
    height, width = image.shape[:2]
    if hidden_HW is not None:
        image = np.where(resize_nearest(hidden_HW, height, width)[..., None], np.array(HIDDEN, np.uint8), image)
    row, col = np.indices((height, width))
    stripe = ((row + col) % 9 < 3)[..., None]
    hatch = np.where(stripe, np.array(HATCH_DARK, np.uint8), np.array(HATCH_LIGHT, np.uint8))
    return np.where(resize_nearest(valid_HW, height, width)[..., None], image, hatch).astype(np.uint8)


def fit(image_HW3: Bytes_HW3, side: int = SHOWN_SIDE) -> Bytes_HW3:
    """Brings an image to about `side` pixels: whole-number enlargement, or area averaging when it is larger."""
    height, width = image_HW3.shape[:2]
    longest = max(height, width)
    if longest > side:
        size = (max(1, round(width * side / longest)), max(1, round(height * side / longest)))
        return np.asarray(Image.fromarray(image_HW3).resize(size, Image.Resampling.BOX))
    times = max(1, side // longest)
    return image_HW3.repeat(times, axis=0).repeat(times, axis=1)


def resize_nearest(mask_HW: npt.NDArray[Any], height: int, width: int) -> npt.NDArray[Any]:
    """Resizes a mask by nearest neighbour (pixel centres)."""
    rows = (2 * np.arange(height) + 1) * mask_HW.shape[0] // (2 * height)
    cols = (2 * np.arange(width) + 1) * mask_HW.shape[1] // (2 * width)
    return mask_HW[rows][:, cols]


def to_png(image_HW3: Bytes_HW3, colours: int = 96) -> bytes:
    """Returns PNG bytes with a palette of at most `colours` colours, which keeps the page small."""
    out = io.BytesIO()
    palette = Image.fromarray(image_HW3).quantize(colours, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    palette.save(out, format="PNG", optimize=True)
    return out.getvalue()


def montage(gallery: Gallery, gap: int = 8) -> bytes:
    """Joins the panels of a gallery into one PNG with column titles, for Markdown."""
    images = [[Image.open(io.BytesIO(panel.png)).convert("RGB") for panel in row] for row in gallery.rows]
    width = max(image.width for row in images for image in row)
    height = max(image.height for row in images for image in row)
    columns = max(len(row) for row in images)
    top = 26 if gallery.columns else gap
    sheet = Image.new("RGB", (columns * (width + gap) + gap, top + len(images) * (height + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(13)
    for col, title in enumerate(gallery.columns):
        draw.text((gap + col * (width + gap), 6), title, fill="#22262b", font=font)
    for line, row in enumerate(images):
        for col, image in enumerate(row):
            sheet.paste(image, (gap + col * (width + gap), top + line * (height + gap)))
    return to_png(np.asarray(sheet), 128)


def tile_mosaic(corpus: Corpus, *, count: int, seed: int) -> Gallery:
    """Shows tiles drawn at random from all splits of a corpus."""
    places = [(split, index) for split in corpus.manifest.splits for index in range(corpus.count(split))]
    rng = sample_rng(corpus.manifest.fingerprint, seed, "report tiles")
    chosen = sorted(rng.choice(len(places), size=min(count, len(places)), replace=False).tolist())
    panels, gsds = [], []
    for index in chosen:
        tile = corpus.read(*places[index])
        limits = display_range(tile.value_HW, tile.valid_HW)
        rgb = to_rgb(tile.value_HW, tile.valid_HW, limits, side=MOSAIC_SIDE)
        share = float(tile.valid_HW.mean())
        if np.isfinite(gsd_m := float(tile.meta.get("gsd_m") or "nan")):
            gsds.append(gsd_m)
        note = "" if share == 1 else f"{share:.1%} valid" if share > 0.99 else f"{share:.0%} valid"
        product = tile.meta.get("product_id", "unknown product")
        alt = f"{corpus.manifest.sensor} tile of {product}, {share:.0%} of its pixels valid"
        panels.append(
            Panel(
                f"{product}, row {tile.meta.get('row')}, column {tile.meta.get('col')}",
                to_png(rgb),
                alt,
                note,
            )
        )
    sensor, size = corpus.manifest.sensor, corpus.manifest.tile_size
    gsd = list(dict.fromkeys(f"{value:.4g}" for value in sorted(gsds)))
    scale = f", {' to '.join(gsd[:1] + gsd[1:][-1:])} m a pixel" if gsd else ""
    return Gallery(
        name=f"tiles-{slug(sensor)}-{corpus.manifest.fingerprint[:6]}",
        heading=sensor,
        text=f"{len(chosen)} of {len(places)} tiles of {size} × {size} pixels{scale}, drawn at random.",
        rows=[panels[start : start + 6] for start in range(0, len(panels), 6)],
    )


@dataclass(frozen=True)
class ShownModel:
    """A masked autoencoder to paint with."""

    name: str
    model: MaskedAutoencoder
    card: Card

    @property
    def sensors(self) -> list[str]:
        """Sensors it was trained on; empty when the card names none."""
        return [str(entry["name"]) for entry in self.card.sensors]

    def knows(self, sensor: str) -> bool:
        """Tells whether the model was trained on a sensor (or says nothing about it)."""
        return not self.sensors or sensor in self.sensors


def load_shown_model(name: str, path: Path) -> ShownModel:
    """Loads weights that can paint.

    Raises:
        CheckpointError: The weights are missing, damaged, or hold no decoder.
    """
    card = load_card(path)
    if "decoder" not in card.contents:
        raise CheckpointError(
            "these weights cannot reconstruct",
            seen=f"{name} at {path} holds {', '.join(card.contents) or 'nothing'}",
            rule="a reconstruction needs encoder and decoder",
            fix="take a checkpoint of a run or a merge of whole checkpoints, or leave it out of weights",
        )
    model, card = load_mae(path)
    return ShownModel(name, model.eval(), card)


def normalisation_for(card: Card, sensor: str) -> Normalisation:
    """Returns the card's normalisation with the constants of a sensor filled in where the policy needs them."""
    fields = dict(card.normalisation)
    if fields.get("policy") == "sensor_zscore":
        own = next((entry for entry in card.sensors if entry["name"] == sensor), {})
        fields.update({key: own[key] for key in ("mean", "std") if own.get(key) is not None})
    return Normalisation.from_dict(fields)


def reconstructions(
    corpus: Corpus, models: list[ShownModel], *, count: int, seed: int, skipped: list[str]
) -> Gallery | None:
    """Shows input, masked input and what each model paints, on validation tiles (training tiles if there are none).

    Args:
        corpus: Tiles of one sensor.
        models: Those that know the sensor are shown, in this order.
        count: Tiles, one a row.
        seed: Of the masks and of the choice of tiles.
        skipped: One line is appended for each model that cannot take these tiles.

    Returns:
        The gallery, or None when no model can be shown.
    """
    sensor, size = corpus.manifest.sensor, corpus.manifest.tile_size
    known = [shown for shown in models if shown.knows(sensor)]
    fitting = [shown for shown in known if shown.card.architecture["image_size"] == size]
    for shown in known:
        if shown not in fitting:
            wanted = shown.card.architecture["image_size"]
            skipped.append(f"{shown.name} is not shown on {sensor}: it takes {wanted} px, the tiles have {size} px.")
    if not fitting:
        return None
    split = "val" if corpus.count("val") else "train"
    rng = sample_rng(corpus.manifest.fingerprint, seed, "report reconstructions")
    order = rng.permutation(corpus.count(split)).tolist()
    # A tile that is half empty shows little of what a model can paint, so fuller ones go first.
    drawn = (corpus.read_stored(split, index) for index in order[: 4 * count])
    tiles = sorted((tile for tile in drawn if tile.valid.any()), key=lambda tile: -_fullness(tile))
    rows = [_painted_row(tile, sensor, fitting, seed) for tile in tiles[:count]]
    return Gallery(
        name=f"reconstructions-{slug(sensor)}-{corpus.manifest.fingerprint[:6]}",
        heading=sensor,
        text=f"{'Validation' if split == 'val' else 'Training'} tiles. Error: mean squared error over the "
        "hidden, valid pixels of that tile, in normalised units; lower is better."
        + (_STANDARDISED if any(shown.card.objective.get("norm_pix_loss") for shown in fitting) else ""),
        rows=rows,
        columns=["input", "masked", *(shown.name for shown in fitting)],
    )


_STANDARDISED = (
    " These models predict standardised patches: the shape inside a hidden patch is theirs, its mean and contrast are"
    " taken from the true patch, because the model does not say them."
)


def _fullness(tile: StoredTile) -> float:
    return round(float(tile.valid.mean()), 1)


def _painted_row(tile: StoredTile, sensor: str, models: list[ShownModel], seed: int) -> list[Panel]:
    row: list[Panel] = []
    for shown in models:
        result = _paint(tile, sensor, shown, seed)
        limits = display_range(result.input_HW, result.valid_HW)
        if not row:
            whole = to_rgb(result.input_HW, result.valid_HW, limits)
            masked = to_rgb(result.input_HW, result.valid_HW, limits, hidden_HW=result.hidden_HW)
            share = float(result.hidden_HW.mean())
            row.append(Panel("input", to_png(whole), f"{sensor} tile {tile.key}"))
            row.append(Panel("masked", to_png(masked), f"the same tile with {share:.0%} of it hidden"))
        painted = to_rgb(result.painted_HW, result.valid_HW, limits)
        alt = f"the tile as painted by {shown.name}, error {result.error:.3f}"
        row.append(Panel(shown.name, to_png(painted), alt, f"error {result.error:.3f}"))
    return row


@dataclass(frozen=True)
class _Painted:
    input_HW: Any
    painted_HW: Any
    hidden_HW: Any
    valid_HW: Any
    error: float


def _paint(tile: StoredTile, sensor: str, shown: ShownModel, seed: int) -> _Painted:
    architecture = shown.model.architecture
    side = architecture.image_size
    valid_HW = tile.valid
    normalisation = normalisation_for(shown.card, sensor)
    valid_BHW, affine = torch.from_numpy(valid_HW)[None], torch.from_numpy(normalisation.affine(tile.statistics))
    input_BCHW = normalise_batch(torch.from_numpy(tile.stored_HW)[None], valid_BHW, affine[None], normalisation.limit)
    noise_N = mask_noise(sample_rng(tile.key, seed, "mask"), architecture.patches)
    image_BCHW = input_BCHW.expand(1, architecture.in_chans, side, side)
    noise_BN = torch.from_numpy(noise_N)[None]
    with torch.no_grad():
        error = float(shown.model(image_BCHW, valid_BHW, noise_BN)[0])
        painted_BCHW, hidden_BHW = shown.model.reconstruct(image_BCHW, valid_BHW, noise_BN)
    return _Painted(input_BCHW[0, 0].numpy(), painted_BCHW[0].mean(0).numpy(), hidden_BHW[0].numpy(), valid_HW, error)
