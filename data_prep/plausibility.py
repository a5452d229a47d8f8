"""Whether a reading of raw samples is an image: byte order, shape, band order and tiles, judged by smoothness.

A wrong label cannot be told by its own words. But the file allows a few other readings (bytes swapped, lines and
columns exchanged, longer lines, another order of bands), and the right one is the smooth one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from momo.errors import DataError
from momo.extras import require

from .raw import Declared, RawLayout, contradiction, next_object
from .validity import ISIS_VALID_MIN4

ROWS = 64  # lines read to judge a reading
SMOOTHER = 2.0  # a rival reading must be this much smoother to be believed
_LEAST = 240  # neighbours needed to judge a reading
_ROUGH = 0.4  # roughness from which on a reading is doubted
_NOISE = 2.0  # roughness of white noise: 2.67 (uniform) to 2.82 (normal)
_EXPONENTS = (1e-20, 1e20)  # magnitudes of measurements; floats with their bytes swapped are spread over 1e-38..1e38


def roughness(values_HW: npt.NDArray[Any]) -> float:
    """Returns how much neighbours differ, vertical plus horizontal, in mean deviations from the median.

    About 2.7 for white noise, 1.4 for unrelated smooth lines, near 0 for a smooth image; NaN when the image is constant
    or has too few numbers.

    Args:
        values_HW: Raw values; non-finite ones and ISIS special pixels are left out.
    """
    jump, spread = _jump_and_spread(values_HW)
    return jump / spread if spread > 0 else math.nan


def _jump_and_spread(values_HW: npt.NDArray[Any]) -> tuple[float, float]:
    value_HW = values_HW.astype(np.float64)
    valid_HW = np.isfinite(value_HW)
    if values_HW.dtype.kind == "f":
        valid_HW &= np.abs(value_HW) <= -ISIS_VALID_MIN4
    jump = 0.0
    for a, b in ((np.s_[1:], np.s_[:-1]), (np.s_[:, 1:], np.s_[:, :-1])):
        pairs = valid_HW[a] & valid_HW[b]
        if pairs.sum() < _LEAST:
            return math.nan, math.nan
        with np.errstate(over="ignore", invalid="ignore"):
            jump += float(np.abs(np.where(pairs, value_HW[a] - value_HW[b], 0.0)).sum() / pairs.sum())
    values = value_HW[valid_HW]
    with np.errstate(over="ignore", invalid="ignore"):
        return jump, float(np.abs(values - np.median(values)).mean())


def _windows(layout: RawLayout) -> Iterator[int]:
    """Yields first rows of windows to judge: the middle first, others in case it is constant."""
    rows = min(ROWS, layout.height)
    for share in (0.5, 0.25, 0.75, 0.0, 1.0):
        yield int(share * (layout.height - rows))


def check_byte_order(layout: RawLayout, name: str, band: int) -> list[str]:
    """Refuses samples that are an image only with their bytes swapped.

    Integers are refused when they look like noise and differ less from their neighbours swapped; floating-point
    numbers when most have no magnitude of a measurement, and swapped nearly all do.

    Args:
        layout: The reading.
        name: File for messages.
        band: Band number, from 1.

    Returns:
        A note when the order cannot be told: every low byte is 0.

    Raises:
        DataError: The other byte order is clearly the file's.
    """
    if np.dtype(layout.dtype).itemsize == 1:
        return []
    rows = min(ROWS, layout.height)
    for row in dict.fromkeys(_windows(layout)):
        value_HW = layout.read(band, row, rows)
        swapped_HW = value_HW.byteswap()
        if value_HW.dtype.kind == "f":
            magnitudes = [_plausible(values) for values in (value_HW, swapped_HW)]
            if math.isnan(magnitudes[0]):
                continue
            if magnitudes[0] < 0.75 and magnitudes[1] > 0.98:
                raise _swapped(name, layout, f"{magnitudes[0]:.0%} of the numbers are of a measurement's magnitude",
                               f"{magnitudes[1]:.0%}")  # fmt: skip
            return []
        (jump, spread), (jump_swapped, _) = _jump_and_spread(value_HW), _jump_and_spread(swapped_HW)
        if not spread > 0:
            continue
        if not value_HW.view(np.uint8).reshape(-1, value_HW.itemsize)[:, 0].any() and np.little_endian:
            return ["all its samples are multiples of 256: it may be of 8 bits, or its bytes the other way round"]
        if jump / spread > _NOISE and jump_swapped * SMOOTHER < jump:
            raise _swapped(name, layout, f"neighbours differ by {jump:.4g}", f"by {jump_swapped:.4g}")
        return []
    return []


def _plausible(values_HW: npt.NDArray[Any]) -> float:
    """Returns the share of finite, non-zero numbers that have a measurement's magnitude; NaN for too few."""
    size = np.abs(values_HW[np.isfinite(values_HW) & (values_HW != 0)].astype(np.float64))
    size = size[size <= -ISIS_VALID_MIN4]
    return float(((size > _EXPONENTS[0]) & (size < _EXPONENTS[1])).mean()) if size.size >= _LEAST else math.nan


def _swapped(name: str, layout: RawLayout, own: str, swapped: str) -> DataError:
    return contradiction(
        name,
        f"read as {'most' if layout.dtype.startswith('>') else 'least'} significant byte first, as the label says, "
        f"{own}, the other way round {swapped}",
        "SAMPLE_TYPE, ByteOrder, INTFMT or data_type names the byte order of the file",
    )


def check_rivals(declared: Declared, name: str, band: int) -> None:
    """Refuses a shape when another that fits the same bytes is clearly the image.

    Args:
        declared: What the label says.
        name: File for messages.
        band: Band number, from 1.

    Raises:
        DataError: Another reading is clearly smoother.
    """
    layout = declared.layout
    size = require("osgeo.gdal", "prep").VSIStatL(layout.path).size
    rows = min(ROWS, layout.height)
    if layout.height < 16 or layout.width < 16:
        if layout.bands >= 16 and layout.height >= 16 and not layout.tile:
            _check_thin(layout, name)
        return
    for top in dict.fromkeys(_windows(layout)):
        jump, spread = _jump_and_spread(layout.read(band, top, rows))
        if spread > 0:
            break
    else:
        return
    for what, rival, factor in _rivals(declared, size):
        if rival.end > size or rival.height < 16:
            continue
        top_rival = min(int(top * rival.height / layout.height), rival.height - min(ROWS, rival.height))
        jump_rival, _ = _jump_and_spread(rival.read(band, top_rival, min(ROWS, rival.height)))
        if jump_rival * factor < jump and (factor < SMOOTHER or jump / spread > _ROUGH):
            raise contradiction(
                name,
                f"read by the label, neighbours differ by {jump:.3g} on average, {what} by {jump_rival:.3g}",
                "the label's numbers of lines, samples and bands, and their order, are those of the file",
            )


def _check_thin(layout: RawLayout, name: str) -> None:
    """Refuses a strip of a few columns in many bands when it is an image with columns and bands exchanged."""
    item = np.dtype(layout.dtype).itemsize
    width, bands = layout.bands, layout.width
    line, step = width * item, width * item * layout.height
    rival = replace(layout, width=width, bands=bands, pixel=item, line=line, band=step)
    rough = roughness(rival.read(1, 0, min(ROWS, layout.height)))
    if (layout.pixel, layout.line) == (item, layout.width * item) and rough < _ROUGH:
        raise contradiction(
            name,
            f"{layout.width} columns in {layout.bands} bands are smooth as {width} columns in {bands} bands",
            "the label's numbers of samples and bands are those of the file",
        )


def check_tiles(layout: RawLayout, name: str, band: int) -> list[str]:
    """Refuses tiles whose borders show all over the image, and notes pixels behind its right border.

    Args:
        layout: A tiled layout.
        name: File for messages.
        band: Band number, from 1.

    Raises:
        DataError: Neighbours differ much more across the borders of tiles than inside them.
    """
    assert layout.tile
    rows = min(ROWS, layout.height)
    top = (layout.height - rows) // 2
    value_HW = layout.read(band, top, rows).astype(np.float64)
    notes = []
    across = -(-layout.width // layout.tile[0]) * layout.tile[0]
    behind_HW = replace(layout, width=across).read(band, top, rows)[:, layout.width :]
    if behind_HW.size and len(np.unique(behind_HW)) > 1:
        notes.append(f"its tiles of {layout.tile[0]} x {layout.tile[1]} hold other pixels behind the right border")
    with np.errstate(invalid="ignore", over="ignore"):
        lines, columns = (np.abs(np.diff(value_HW, axis=axis)).mean(axis=1 - axis) for axis in (0, 1))
        spread = float(np.abs(value_HW - np.median(value_HW)).mean())
    steps = {1: (lines, np.arange(top + 1, top + rows)), 0: (columns, np.arange(1, layout.width))}
    usual = np.median(np.concatenate([jumps[at % layout.tile[axis] != 0] for axis, (jumps, at) in steps.items()]))
    for axis, (jumps, at) in steps.items():
        seams = jumps[at % layout.tile[axis] == 0]
        jump = float(np.median(seams)) if seams.size else 0.0
        if jump > 2 * SMOOTHER * usual and jump > _ROUGH * spread:
            told = (
                f"neighbours differ by {jump:.3g} on average across the borders of tiles of {layout.tile[0]} x "
                f"{layout.tile[1]}, inside them by {usual:.3g}"
            )
            # One border alone may be that of two detectors.
            if seams.size > 1:
                raise contradiction(name, told, "TileSamples and TileLines are those of the file: tiles join smoothly")
            notes.append(told)
    return notes


def _rivals(declared: Declared, size: int) -> Iterator[tuple[str, RawLayout, float]]:
    """Yields readings that the file would allow too, and how much smoother they must be to be believed."""
    layout, item = declared.layout, np.dtype(declared.layout.dtype).itemsize
    width, height, bands = layout.width, layout.height, layout.bands
    if layout.tile:
        across, down = layout.tile
        if across != down:
            tiles = -(-width // down) * -(-height // across)
            yield (
                f"in tiles of {down} x {across}",
                replace(layout, tile=(down, across), band=tiles * across * down * item),
                SMOOTHER,
            )
        return
    if layout.pixel == item and bands == 1:
        if width != height:
            line = height * item + layout.line - width * item
            yield f"as {height} x {width} pixels", replace(layout, width=height, height=width, line=line), SMOOTHER
        first = layout.start - declared.extra[0]
        line, rest = divmod(next_object(declared, size) - first, height)
        if rest == 0 and line > layout.line:
            # Nothing but a wrong LINE_SAMPLES, or undeclared bytes in each line, leaves just these bytes over.
            yield f"with lines of {line} bytes", replace(layout, line=line), 1.0
    if bands > 1:
        orders = {
            "band after band": (item, width * item, width * height * item),
            "bands line by line": (item, width * bands * item, width * item),
            "bands pixel by pixel": (bands * item, width * bands * item, item),
        }
        if (layout.pixel, layout.line, layout.band) in orders.values():
            for what, (pixel, line, step) in orders.items():
                yield what, replace(layout, pixel=pixel, line=line, band=step), SMOOTHER
