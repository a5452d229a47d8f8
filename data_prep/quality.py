"""Quality measures of a tile, over its valid pixels alone; dead lines are found before, in `dead_lines`.

All measures are unchanged by brightness and contrast, saturation aside. With x the stored values, s2 their variance
over the valid pixels, and every difference taken only where all its pixels are valid:

* `quality`, structural score, 0..1: max(0, 1 - g(1) / s2) with the semivariance g(h) = mean((x_i - x_j)^2) / 2 of
  pixels h apart, horizontally and vertically together. It is the lag-one spatial autocorrelation: near 1 for smooth
  terrain, near 0 for white noise (the variogram: Matheron 1963, Economic Geology 58, 1246-1266).
* `noise`, 0..about 3: sqrt(pi / 2) / 6 * mean(|x * N|) / sqrt(s2) with N = [1 -2 1]^T [1 -2 1], the noise standard
  deviation as a share of the tile's (Immerkaer 1996, Computer Vision and Image Understanding 64, 300-302). 1 for white
  noise. Fine texture counts as noise, as in any estimate from one image.
* `blur`, 0..1: log2((g(4) - g(2)) / (g(2) - g(1))) / 2, clipped. Where g(h) = n + c h^(2H), the variogram of a
  self-affine surface with white noise of variance n, it is H, whatever n and c: noise cancels. Sharp images of
  terrain have H well below 1 (edges: 1/2); blur makes a surface differentiable, which means H = 1 (Gneiting,
  Sevcikova and Percival 2012, Statistical Science 27, 247-277, for the estimate of H from lags 1 and 2). A smear in
  one direction alone counts only in part. 0 too where g(2) - g(1) is below 4 g(1) / sqrt(valid pixels), the scatter
  that white noise has: then nothing but noise is seen.
* `stripes`, 0..1: share of the variance of the second differences across the lines that is common to all parts of a
  line. A line is divided into at least 8 sections; the share is the mean product of two pixels of a line that lie in
  different sections (U-statistic) over the mean square, so white noise gives 0 on average, and terrain too unless it
  is coherent along most of a line. The larger of rows and columns. Independent offsets of variance o on each line
  over white noise of variance n give o / (o + n).
* `saturation`, 0..1: share of the valid pixels at or beyond the two given stored levels.

Where a measure is undefined (no contrast, too few pixels) it is 0.

Accuracy: stored values less a whole number near their mean, all their differences, and the sums over sections are
integers below 2^24, exact in float32. Sums of squares are float32 over 1024 values and float64 beyond; each measure
agrees with float64 within 1e-5 relative. Neither the number of processes nor of BLAS threads changes a bit: no
product with rounding is large enough for OpenBLAS to divide among threads.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from .dead_lines import mask_dead_lines
from .phash import perceptual_hash

__all__ = ["Measures", "is_constant", "mask_dead_lines", "measure", "structure_score"]

_CHUNK = 1024
_SECTIONS = 8
# 64 second differences of 16-bit levels add up to less than 2^24.
_WIDEST = 64
_FLOAT = np.float32

Array = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Measures:
    """What is measured on a tile; definitions at the top of this file.

    Attributes:
        valid_fraction: Share of measured pixels, 0..1.
        quality: Structural score, 0..1.
        noise: Noise standard deviation as a share of the tile's, 0..about 3.
        blur: 0 (sharp) to 1.
        stripes: 0..1.
        saturation: Share of the valid pixels, 0..1.
        stored_mean: Mean of the valid stored values.
        stored_std: Their standard deviation (population).
        stored_min: Their minimum.
        stored_max: Their maximum.
        phash: 64-bit perceptual hash; see `phash.perceptual_hash`.
    """

    valid_fraction: float
    quality: float
    noise: float
    blur: float
    stripes: float
    saturation: float
    stored_mean: float
    stored_std: float
    stored_min: int
    stored_max: int
    phash: int


@dataclass(frozen=True, slots=True)
class _Texture:
    """Averages of squared (or absolute) differences.

    Attributes:
        lag1: Mean squared difference of pixels 1 apart; infinite when there is no such pair.
        lag2: The same, 2 apart.
        lag4: The same, 4 apart.
        ripple: Mean absolute response of Immerkaer's mask; 0 without one.
        stripes: See the top of this file.
    """

    lag1: float
    lag2: float
    lag4: float
    ripple: float
    stripes: float


def measure(stored_HW: Array, valid_HW: Mask, saturated: tuple[int, int]) -> Measures:
    """Measures a tile.

    Args:
        stored_HW: Tile, uint8 or uint16.
        valid_HW: True where measured.
        saturated: Stored levels at or below which, and at or above which, a pixel is saturated; levels that the type
            cannot hold (-1 and 65536) mean that there is no such end.

    Returns:
        The measures; all 0 when no pixel is valid.
    """
    count = int(np.count_nonzero(valid_HW))
    if count == 0:
        return Measures(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0, 0, 0)
    share = count / valid_HW.size
    valid = None if count == valid_HW.size else valid_HW
    values = stored_HW if valid is None else stored_HW[valid]
    low, high = int(values.min()), int(values.max())
    saturation = _saturated_share(values, low, high, saturated)
    if low == high:
        return Measures(share, 0.0, 0.0, 0.0, 0.0, saturation, float(low), 0.0, low, high, 0)
    room = _room(stored_HW.shape)
    mean, variance = _centre(room, stored_HW, valid, count)
    texture = _whole_texture(room) if valid is None else _masked_texture(room, valid)
    std = math.sqrt(variance)
    return Measures(
        valid_fraction=share,
        quality=max(0.0, 1.0 - texture.lag1 / 2 / variance),
        noise=math.sqrt(math.pi / 2) / 6 * texture.ripple / std,
        blur=_blur(texture, count),
        stripes=texture.stripes,
        saturation=saturation,
        stored_mean=mean,
        stored_std=std,
        stored_min=low,
        stored_max=high,
        phash=perceptual_hash(room.tile_HW),
    )


def _saturated_share(values: Array, low: int, high: int, saturated: tuple[int, int]) -> float:
    if low > saturated[0] and high < saturated[1]:
        return 0.0
    if high <= saturated[0] or low >= saturated[1]:
        return 1.0
    beyond = 0
    if low <= saturated[0]:
        beyond += int(np.count_nonzero(values <= saturated[0]))
    if high >= saturated[1]:
        beyond += int(np.count_nonzero(values >= saturated[1]))
    return min(1.0, beyond / values.size)


def is_constant(stored_HW: Array, valid_HW: Mask) -> bool:
    """Returns True when all valid pixels have one value, or none is valid."""
    if valid_HW.all():
        first = stored_HW[:1].ravel()
        # Nearly every tile varies within its first row, so the others are seldom looked at.
        if first.size and first.min() != first.max():
            return False
        return stored_HW.size == 0 or bool(stored_HW.min() == stored_HW.max())
    values = stored_HW[valid_HW]
    return values.size == 0 or bool(values.min() == values.max())


def structure_score(stored_HW: Array, valid_HW: Mask) -> float:
    """Returns the structural score alone (`quality` at the top of this file), in float64, of a tile of any type.

    Args:
        stored_HW: Tile, any linear unit.
        valid_HW: True where measured.

    Returns:
        The score, 0..1.
    """
    value_HW = stored_HW.astype(np.float64)
    spread = float(value_HW[valid_HW].var()) if valid_HW.any() else 0.0
    total, pairs = 0.0, 0
    for a, b in ((np.s_[:, 1:], np.s_[:, :-1]), (np.s_[1:, :], np.s_[:-1, :])):
        both = valid_HW[a] & valid_HW[b]
        total += float(np.square(value_HW[a] - value_HW[b])[both].sum())
        pairs += int(both.sum())
    if spread == 0.0 or pairs == 0:
        return 0.0
    return float(np.clip(1.0 - total / pairs / 2.0 / spread, 0.0, 1.0))


def _blur(texture: _Texture, count: int) -> float:
    near, far = texture.lag2 - texture.lag1, texture.lag4 - texture.lag2
    if not (math.isfinite(texture.lag4) and near > 4 * texture.lag1 / math.sqrt(count) and far > near):
        return 0.0
    return min(1.0, math.log2(far / near) / 2)


class _Room:
    """Work space for tiles of one shape, kept by each thread; flat arrays are padded with zeros to whole chunks."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self.shape, self.used = shape, shape[0] * shape[1]
        size = -(-self.used // _CHUNK) * _CHUNK
        # numpy aligns to 16 bytes only; whole cache lines make the subtractions a third faster.
        memory = np.zeros(4 * size + 16, dtype=_FLOAT)
        start = -memory.ctypes.data % 64 // memory.itemsize
        self.tile, self.a, self.b, self.c = memory[start : start + 4 * size].reshape(4, size)
        self.tile_HW = self.as_tile(self.tile)
        self.sections_HK = np.zeros((shape[0], _sections(shape[1]).shape[1]), dtype=_FLOAT)

    def as_tile(self, flat: Array) -> Array:
        return flat[: self.used].reshape(self.shape)

    def difference(self, source: Array, out: Array, lag: tuple[int, int], unused: tuple[int, int]) -> Array:
        """Writes source[r + lag0, c + lag1] - source[r, c] into `out`, and 0 into its last `unused` rows and columns.

        On the flat array this is one long subtraction; pairs that run over the end of a row fall into `unused`.
        """
        step = lag[0] * self.shape[1] + lag[1]
        if step < self.used:
            np.subtract(source[step : self.used], source[: self.used - step], out=out[: self.used - step])
        out_HW = self.as_tile(out)
        if unused[0]:
            out_HW[max(0, self.shape[0] - unused[0]) :] = 0
        if unused[1]:
            out_HW[:, max(0, self.shape[1] - unused[1]) :] = 0
        return out


_LOCAL = threading.local()


def _room(shape: tuple[int, ...]) -> _Room:
    room: _Room | None = getattr(_LOCAL, "room", None)
    if room is None or room.shape != shape:
        room = _LOCAL.room = _Room((shape[0], shape[1]))
    return room


def _centre(room: _Room, stored_HW: Array, valid: Mask | None, count: int) -> tuple[float, float]:
    """Puts the tile, less a whole number near its mean and 0 where invalid, into `room`; returns mean and variance."""
    tile_HW = room.tile_HW
    np.copyto(tile_HW, stored_HW)
    if valid is not None:
        np.multiply(tile_HW, valid, out=tile_HW)
    np.matmul(tile_HW, _sections(room.shape[1]), out=room.sections_HK)
    mean = float(room.sections_HK.sum(dtype=np.float64)) / count
    centre = round(mean)
    np.subtract(tile_HW, _FLOAT(centre), out=tile_HW)
    if valid is not None:
        np.multiply(tile_HW, valid, out=tile_HW)
    return mean, _sum_of_squares(room.tile) / count - (mean - centre) ** 2


@lru_cache(maxsize=32)
def _sections(side: int) -> Array:
    """Returns which of the sections each pixel of a line is in; shape (side, sections), 0 or 1."""
    number = min(side, max(_SECTIONS, -(-side // _WIDEST)))
    member = (np.arange(side) * number // side)[:, None] == np.arange(number)
    return np.ascontiguousarray(member.astype(_FLOAT))


_ONES = np.ones((_CHUNK, 1), dtype=_FLOAT)


def _sum_of_squares(flat: Array) -> float:
    chunks = flat.reshape(-1, 1, _CHUNK)
    return math.fsum(np.matmul(chunks, chunks.transpose(0, 2, 1)).ravel().tolist())


def _sum_of_sizes(flat: Array) -> float:
    return math.fsum(np.matmul(np.abs(flat, out=flat).reshape(-1, 1, _CHUNK), _ONES).ravel().tolist())


def _mean(total: float, count: int, empty: float = 0.0) -> float:
    return max(0.0, total) / count if count > 0 else empty


def _common_share(products: float, pairs: float, mean_square: float) -> float:
    """Returns the mean product of two sections of a line as a share of `mean_square`, 0..1."""
    if pairs <= 0 or mean_square <= 0:
        return 0.0
    return min(1.0, max(0.0, products / pairs / mean_square))


def _products(values_LK: npt.NDArray[np.float64]) -> float:
    """Returns the sum over lines of the products of all ordered pairs of different sections."""
    totals_L = values_LK @ np.ones(values_LK.shape[1])
    # einsum, unlike dot, stays within one thread at any size.
    return float(np.einsum("l,l->", totals_L, totals_L) - np.einsum("lk,lk->", values_LK, values_LK))


def _whole_texture(room: _Room) -> _Texture:
    """Returns the averages of a tile without an invalid pixel.

    Lag 2 needs no pass of its own: with d the differences at lag 1, (d1 + d0)^2 + (d1 - d0)^2 = 2 (d1^2 + d0^2).
    """
    height, width = room.shape
    a_HW, b_HW = room.as_tile(room.a), room.as_tile(room.b)
    across = _sum_of_squares(room.difference(room.tile, room.a, (0, 1), (0, 1)))
    across_ends = _ends(a_HW[:, 0], a_HW[:, width - 2]) if width > 1 else 0.0
    across_second = _sum_of_squares(room.difference(room.a, room.c, (0, 1), (0, 2)))
    down = _sum_of_squares(room.difference(room.tile, room.b, (1, 0), (1, 0)))
    down_ends = _ends(b_HW[0], b_HW[height - 2]) if height > 1 else 0.0
    down_second = _sum_of_squares(room.difference(room.b, room.a, (1, 0), (2, 0)))
    ripple_once = room.difference(room.a, room.c, (0, 1), (2, 1))
    ripple = _sum_of_sizes(room.difference(ripple_once, room.b, (0, 1), (2, 2)))
    lag4 = _sum_of_squares(room.difference(room.tile, room.a, (0, 4), (0, 4)))
    lag4 += _sum_of_squares(room.difference(room.tile, room.b, (4, 0), (4, 0)))
    wide, high = (max(0, width - 2), max(0, height - 2))
    lag2 = 2 * (2 * across - across_ends) - across_second + 2 * (2 * down - down_ends) - down_second
    return _Texture(
        lag1=_mean(across + down, height * (width - 1) + width * (height - 1), math.inf),
        lag2=_mean(lag2, height * wide + width * high, math.inf),
        lag4=_mean(lag4, height * max(0, width - 4) + width * max(0, height - 4), math.inf),
        ripple=_mean(ripple, wide * high),
        stripes=max(
            _line_share(room.sections_HK, width, _mean(down_second, high * width)),
            _line_share((_sections(height).T @ room.tile_HW).T, height, _mean(across_second, wide * height)),
        ),
    )


def _ends(first: Array, last: Array) -> float:
    return float(np.dot(first, first)) + float(np.dot(last, last))


def _line_share(sums_LK: Array, length: int, mean_square: float) -> float:
    value_LK = sums_LK.astype(np.float64)
    second_LK = value_LK[2:] - 2 * value_LK[1:-1] + value_LK[:-2]
    return _common_share(_products(second_LK), len(second_LK) * _pairs(length), mean_square)


@lru_cache(maxsize=32)
def _pairs(length: int) -> float:
    """Returns how many ordered pairs of pixels of one line lie in different sections."""
    return _products(_sections(length).sum(axis=0, dtype=np.float64)[None])


def _masked_texture(room: _Room, valid_HW: Mask) -> _Texture:
    """Returns the averages of a tile with invalid pixels: differences that touch one are left out."""
    height, width = room.shape
    lag1, lag2, lag4 = (_masked_lag(room, valid_HW, lag) for lag in (1, 2, 4))
    triple_down = _also(_also(valid_HW, 1, 0), 1, 0)
    down = room.difference(room.tile, room.b, (1, 0), (1, 0))
    rows = room.as_tile(room.difference(down, room.a, (1, 0), (2, 0)))
    block = _also(_also(triple_down, 0, 1), 0, 1)
    once = room.difference(room.a, room.c, (0, 1), (2, 1))
    ripple = room.as_tile(room.difference(once, room.b, (0, 1), (2, 2)))
    np.multiply(ripple, block, out=ripple)
    ripple_mean = _mean(_sum_of_sizes(room.b), int(np.count_nonzero(block)))
    row_share = _masked_share(room.a, rows, triple_down, _sections(width))
    triple_across = _also(_also(valid_HW, 0, 1), 0, 1)
    across = room.difference(room.tile, room.b, (0, 1), (0, 1))
    cols = room.as_tile(room.difference(across, room.a, (0, 1), (0, 2)))
    col_share = _masked_share(room.a, cols, triple_across, _sections(height), turn=True)
    return _Texture(lag1, lag2, lag4, ripple=ripple_mean, stripes=max(row_share, col_share))


def _also(mask_HW: Mask, rows: int, cols: int) -> Mask:
    """Returns where both a pixel and the one `rows` down and `cols` across are True."""
    both = np.zeros_like(mask_HW)
    height, width = mask_HW.shape
    both[: max(0, height - rows), : max(0, width - cols)] = mask_HW[rows:, cols:]
    return np.logical_and(both, mask_HW, out=both)


def _masked_lag(room: _Room, valid_HW: Mask, lag: int) -> float:
    total, pairs = 0.0, 0
    for step in ((0, lag), (lag, 0)):
        both = _also(valid_HW, *step)
        out_HW = room.as_tile(room.difference(room.tile, room.a, step, step))
        np.multiply(out_HW, both, out=out_HW)
        total += _sum_of_squares(room.a)
        pairs += int(np.count_nonzero(both))
    return _mean(total, pairs, math.inf)


def _masked_share(flat: Array, second_HW: Array, used_HW: Mask, sections: Array, turn: bool = False) -> float:
    np.multiply(second_HW, used_HW, out=second_HW)
    mean_square = _mean(_sum_of_squares(flat), int(np.count_nonzero(used_HW)))
    counted_HW = used_HW.astype(_FLOAT)
    if turn:
        second_HW, counted_HW = second_HW.T, counted_HW.T
    products, pairs = (_products((values @ sections).astype(np.float64)) for values in (second_HW, counted_HW))
    return _common_share(products, pairs, mean_square)
