"""Contact sheet: one picture of what was kept and what was dropped, by reason."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from momo.files import atomic_file

KEPT = "kept"
SIDE = 96
MAX_BYTES = 1_000_000
NOT_MEASURED = (213, 94, 0)  # vermilion of the Okabe-Ito palette: no grey, told apart with any colour vision

_INK, _SOFT, _LINE, _PAPER = (31, 35, 40), (90, 98, 107), (225, 221, 215), (255, 255, 255)
_KEPT, _DROPPED = (0, 114, 178), (166, 60, 27)
_COLOURS = (_PAPER, _INK, _SOFT, _LINE, _KEPT, _DROPPED, NOT_MEASURED)
_GAP, _MARGIN, _NOTE_HEIGHT, _HEAD_HEIGHT, _TITLE_HEIGHT = 10, 24, 34, 44, 78
_GREYS = (192, 96, 64, 32, 16)


@dataclass(frozen=True)
class Example:
    """One window to show.

    Attributes:
        reason: `kept`, or why it was dropped.
        key: Key of the tile.
        thumb_HW: uint8, at most 96 x 96 (see `thumbnail`).
        valid_HW: True where the thumbnail shows measured pixels, same shape (see `thumbnail_mask`).
        note: What decided, for example "valid 0.31".
    """

    reason: str
    key: str
    thumb_HW: npt.NDArray[np.uint8]
    valid_HW: npt.NDArray[np.bool_]
    note: str

    def __post_init__(self) -> None:
        shape = self.thumb_HW.shape
        if self.thumb_HW.dtype != np.uint8 or len(shape) != 2 or not 0 < min(shape) <= max(shape) <= SIDE:
            raise ValueError(f"{self.key}: a thumbnail is uint8 of at most {SIDE} x {SIDE}, got {shape}")
        if self.valid_HW.shape != shape:
            raise ValueError(f"{self.key}: thumbnail {shape} and validity {self.valid_HW.shape} differ")


def thumbnail(stored_HW: npt.NDArray[Any], valid_HW: npt.NDArray[np.bool_], side: int = SIDE) -> npt.NDArray[np.uint8]:
    """Returns a small grey picture of a window.

    Every thumbnail pixel is the mean of the valid pixels it covers, weighted by area; then the 1st percentile of the
    valid ones becomes black and the 99th white. Without contrast it is middle grey.

    Args:
        stored_HW: Pixels, any linear unit.
        valid_HW: True where measured.
        side: Longest side of the thumbnail, pixels; a smaller window keeps its size.

    Returns:
        uint8; 0 where nothing is valid.
    """
    weight_hH, weight_wW = _area_weights(stored_HW.shape, side)
    values_HW = np.where(valid_HW, stored_HW, 0).astype(np.float64)
    share_hw = weight_hH @ valid_HW.astype(np.float64) @ weight_wW.T
    measured_hw = share_hw > 1e-9
    mean_hw = (weight_hH @ values_HW @ weight_wW.T)[measured_hw] / share_hw[measured_hw]
    thumb_hw = np.zeros(share_hw.shape, dtype=np.uint8)
    if mean_hw.size:
        low, high = np.percentile(mean_hw, (1.0, 99.0))
        # The mean of equal pixels differs by rounding; that must not be stretched to full contrast.
        flat = high - low <= 1e-9 * max(1.0, abs(high))
        thumb_hw[measured_hw] = 128 if flat else np.clip((mean_hw - low) / (high - low) * 255, 0, 255).round()
    return thumb_hw


def thumbnail_mask(valid_HW: npt.NDArray[np.bool_], side: int = SIDE) -> npt.NDArray[np.bool_]:
    """Returns where a thumbnail shows measured pixels: at least half of the area it covers."""
    weight_hH, weight_wW = _area_weights(valid_HW.shape, side)
    share_hw: npt.NDArray[np.bool_] = weight_hH @ valid_HW.astype(np.float64) @ weight_wW.T >= 0.5 - 1e-9
    return share_hw


def _area_weights(shape: tuple[int, ...], side: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Returns for rows and columns the share of each pixel in each thumbnail pixel; every row sums to 1."""
    shrink = min(1.0, side / max(shape))
    weights = []
    for length in shape:
        cells = max(1, round(length * shrink))
        edge = np.arange(cells + 1) * (length / cells)
        first, last = edge[:-1, None], edge[1:, None]
        pixel = np.arange(length)
        covered = np.clip(np.minimum(last, pixel + 1) - np.maximum(first, pixel), 0, None)
        weights.append(covered / covered.sum(axis=1, keepdims=True))
    return weights[0], weights[1]


def draw_contact_sheet(
    examples: Sequence[Example], counts: Mapping[str, int], path: Path, *, per_reason: int = 12, title: str
) -> None:
    """Draws one PNG: a group of thumbnails for what was kept and for each reason of dropping, with its count.

    Which examples are shown depends on their keys alone, so the order in which they were found does not matter.

    Args:
        examples: Windows to show.
        counts: Windows by reason, `kept` among them; a reason without examples still gets its line.
        path: File to write, less than 1 MB.
        per_reason: Most thumbnails of one reason.
        title: First line of the picture.
    """
    reasons = sorted(set(counts) | {example.reason for example in examples})
    reasons.sort(key=lambda reason: (reason != KEPT, -counts.get(reason, 0)))
    with atomic_file(path) as partial:
        partial.write_bytes(_small_enough(examples, counts, reasons, per_reason, title))


def _small_enough(
    examples: Sequence[Example], counts: Mapping[str, int], reasons: Sequence[str], per_reason: int, title: str
) -> bytes:
    while True:
        groups = [(reason, _chosen(examples, reason, per_reason)) for reason in reasons]
        sheet = _sheet(groups, counts, title)
        for greys in _GREYS:
            png = _png(sheet, greys)
            if len(png) <= MAX_BYTES or (per_reason == 1 and greys == _GREYS[-1]):
                return png
        per_reason = max(1, per_reason // 2)


def _chosen(examples: Sequence[Example], reason: str, count: int) -> list[Example]:
    of_reason = [example for example in examples if example.reason == reason]
    drawn = sorted(of_reason, key=lambda example: (hashlib.sha256(example.key.encode()).digest(), example.note))
    return sorted(drawn[:count], key=lambda example: (example.key, example.note))


def _sheet(groups: Sequence[tuple[str, list[Example]]], counts: Mapping[str, int], title: str) -> Image.Image:
    columns = max(6, min(12, max((len(shown) for _, shown in groups), default=0)))
    width = 2 * _MARGIN + columns * (SIDE + _GAP) - _GAP
    rows = [-(-len(shown) // columns) for _, shown in groups]
    height = _TITLE_HEIGHT + sum(_HEAD_HEIGHT + n * (SIDE + _NOTE_HEIGHT) for n in rows) + _MARGIN
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, 16), _fitted(title, 22, width - 2 * _MARGIN), fill=_INK, font=_font(22))
    total = sum(counts.values())
    draw.rectangle((_MARGIN, 52, _MARGIN + 11, 63), fill=NOT_MEASURED)
    legend = f"not measured     {total:,} windows; each stretched from its 1st to its 99th percentile"
    draw.text((_MARGIN + 18, 50), legend, fill=_SOFT, font=_font(13))
    top = _TITLE_HEIGHT
    for (reason, shown), n in zip(groups, rows, strict=True):
        _draw_head(draw, reason, counts.get(reason, 0), total, shown=bool(shown), top=top, width=width)
        top += _HEAD_HEIGHT
        for number, example in enumerate(shown):
            left = _MARGIN + number % columns * (SIDE + _GAP)
            _draw_example(sheet, draw, example, left, top + number // columns * (SIDE + _NOTE_HEIGHT))
        top += n * (SIDE + _NOTE_HEIGHT)
    return sheet


def _draw_head(
    draw: ImageDraw.ImageDraw, reason: str, count: int, total: int, *, shown: bool, top: int, width: int
) -> None:
    draw.line((_MARGIN, top + 4, width - _MARGIN, top + 4), fill=_LINE)
    colour = _KEPT if reason == KEPT else _DROPPED
    draw.rectangle((_MARGIN, top + 14, _MARGIN + 4, top + 32), fill=colour)
    name = reason if reason == KEPT else f"dropped: {reason}"
    text = _fitted(name, 16, width - 2 * _MARGIN - 280)
    draw.text((_MARGIN + 12, top + 13), text, fill=_INK, font=_font(16))
    share = f", {count / total:.1%} of all" if total else ""
    missing = "" if shown else "; no example"
    left = _MARGIN + 12 + _font(16).getlength(text) + 12
    draw.text((left, top + 15), f"{count:,} windows{share}{missing}", fill=_SOFT, font=_font(14))


def _draw_example(sheet: Image.Image, draw: ImageDraw.ImageDraw, example: Example, left: int, top: int) -> None:
    grey_HW3 = np.repeat(example.thumb_HW[..., None], 3, axis=2)
    rgb_HW3 = np.where(example.valid_HW[..., None], grey_HW3, np.array(NOT_MEASURED, np.uint8)).astype(np.uint8)
    height, width = (max(1, round(length * SIDE / max(rgb_HW3.shape[:2]))) for length in rgb_HW3.shape[:2])
    picture = Image.fromarray(rgb_HW3)
    if width != rgb_HW3.shape[1]:  # a small window: its pixels stay what they are, only larger
        picture = picture.resize((width, height), Image.Resampling.NEAREST)
    sheet.paste(picture, (left, top))
    draw.text((left, top + SIDE + 2), _fitted(example.note, 12, SIDE + _GAP - 4), fill=_INK, font=_font(12))
    draw.text((left, top + SIDE + 16), _fitted(example.key, 9, SIDE + _GAP - 4, tail=True), fill=_SOFT, font=_font(9))


def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def _fitted(text: str, size: int, width: float, *, tail: bool = False) -> str:
    """Cuts a text to a width; of a tile key the end says more than the beginning."""
    font = _font(size)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}...") > width:
        text = text[1:] if tail else text[:-1]
    return f"...{text}" if tail else f"{text}..."


def _png(sheet: Image.Image, greys: int) -> bytes:
    ramp = np.linspace(0, 255, greys).round().astype(int)
    entries = [*_COLOURS, *((int(level),) * 3 for level in ramp)]
    palette = Image.new("P", (1, 1))
    palette.putpalette([channel for entry in entries for channel in entry])
    out = io.BytesIO()
    sheet.quantize(palette=palette, dither=Image.Dither.NONE).save(out, format="PNG", optimize=True)
    return out.getvalue()
