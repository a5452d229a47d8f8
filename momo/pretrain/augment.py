"""Augmentations for nadir images: the eight symmetries of the square, and resized crops that change the GSD.

A view is six numbers, the affine map from a pixel of the view to its place in the tile, in units of half a tile with
the origin at the centre, rows before columns:

    row = v0 * row' + v1 * col' + v2
    col = v3 * row' + v4 * col' + v5

Its linear part is a symmetry times the side of the crop. It is drawn on the CPU from the tile's key and applied to a
whole batch on the device that trains.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch


class Augmentations(Protocol):
    """What `draw_view` needs to know; see `momo.pretrain.config.AugmentOptions`."""

    @property
    def symmetries(self) -> bool:
        """Draw one of the eight symmetries."""

    @property
    def crop_min(self) -> float:
        """Smallest side of a crop as a share of the tile."""

    @property
    def gsd_jitter(self) -> float:
        """Largest further change of the side, in octaves."""


def draws_views(options: Augmentations) -> bool:
    """Says whether a view can differ from its tile; if not, batches need no views."""
    return options.symmetries or options.crop_min < 1 or options.gsd_jitter > 0


def draw_view(rng: np.random.Generator, options: Augmentations) -> npt.NDArray[np.float32]:
    """Draws one view of a tile.

    The side of a crop is uniform in [crop_min, 1] of the tile, times 2^u with u uniform in +-gsd_jitter, at most 1; its
    place is uniform within the tile. Shown at the tile's size, a crop of side s has s times the GSD of its tile. Only
    what the options ask for is drawn, the symmetry first.

    Args:
        rng: Source of randomness, made from the tile's key.
        options: Which augmentations.

    Returns:
        float32 of shape (6,), see the top of this file; the linear part of a whole tile is exactly 0 and +-1.
    """
    turns, mirror = 0, False
    if options.symmetries:
        turns, mirror = int(rng.integers(4)), bool(rng.integers(2))
    side, row, col = 1.0, 0.0, 0.0
    if options.crop_min < 1 or options.gsd_jitter > 0:
        side = rng.uniform(options.crop_min, 1.0) * 2.0 ** rng.uniform(-options.gsd_jitter, options.gsd_jitter)
        side = min(1.0, side)
        row, col = (1 - side) * rng.uniform(-1.0, 1.0, size=2)
    (v0, v1), (v3, v4) = side * _symmetry(turns, mirror)
    return np.array([v0, v1, row, v3, v4, col], dtype=np.float32)


def _symmetry(turns: int, mirror: bool) -> npt.NDArray[np.float64]:
    """The map of `np.rot90(image[:, ::-1] if mirror else image, turns)`, from its pixels to those of `image`."""
    quarter = np.array([[0, 1], [-1, 0]])
    flip = np.diag([1, -1 if mirror else 1])
    return (flip @ np.linalg.matrix_power(quarter, turns)).astype(np.float64)


def apply_views(
    image_BCHW: torch.Tensor, valid_BHW: torch.Tensor | None, views_B6: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Takes a view of each image of a batch, on the device the images are on.

    Whole tiles keep their pixels bit for bit. Crops are interpolated bilinearly; a crop is never larger than its tile,
    so nothing shrinks and no low-pass filter is needed. At the edge of the tile the outermost pixel goes on.

    Args:
        image_BCHW: Square float images; invalid pixels hold 0.
        valid_BHW: bool, True where the pixel was measured; None when every pixel was.
        views_B6: float32, from `draw_view`, best left on the CPU (elsewhere it costs a synchronisation); None: as is.

    Returns:
        Images and validity of the same shapes. A pixel is valid when all pixels that have a part in it are; others
        are 0.
    """
    if views_B6 is None:
        return image_BCHW, valid_BHW
    sources = _sources(views_B6.to("cpu", torch.float64).numpy(), image_BCHW.shape[-1])
    apply = _apply_by_tile if image_BCHW.device.type == "cpu" else _apply_by_batch
    return apply(image_BCHW, valid_BHW, sources)


class _Sources(NamedTuple):
    """Which pixels of their tiles B views are made of.

    Each row (first of the axis of 2) and column (second) of a view, before its transposition, is mixed of two rows or
    columns of the tile, given by number. The second has the weight, in [0, 1]; where that is 0 it is the same as the
    first, so that it makes nothing invalid.
    """

    whole_B: npt.NDArray[np.bool_]
    turned_B: npt.NDArray[np.bool_]
    first_B2S: npt.NDArray[np.int64]
    second_B2S: npt.NDArray[np.int64]
    weight_B2S: npt.NDArray[np.float32]


def _sources(views_B6: npt.NDArray[np.float64], size: int) -> _Sources:
    views_B23 = views_B6.reshape(-1, 2, 3)
    # One of the two is 0: a row of the tile becomes a row of the view, or a column.
    scale_B21, shift_B21 = views_B23[..., :1] + views_B23[..., 1:2], views_B23[..., 2:]
    middle = (size - 1) / 2
    place_B2S = (scale_B21 * (np.arange(size) - middle) + shift_B21 * (size / 2) + middle).clip(0, size - 1)
    first_B2S = np.floor(place_B2S)
    weight_B2S = (place_B2S - first_B2S).astype(np.float32)
    return _Sources(
        whole_B=((np.abs(scale_B21) == 1) & (shift_B21 == 0)).all(axis=(1, 2)),
        turned_B=views_B23[:, 0, 0] == 0,
        first_B2S=first_B2S.astype(np.int64),
        second_B2S=(first_B2S + (weight_B2S > 0)).astype(np.int64),
        weight_B2S=weight_B2S,
    )


def _apply_by_tile(
    image_BCHW: torch.Tensor, valid_BHW: torch.Tensor | None, sources: _Sources
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """For the CPU, where NumPy, tile by tile, is the faster: every pass over a tile finds it in the cache."""
    images = torch.empty(image_BCHW.shape, dtype=image_BCHW.dtype)
    valids = None if valid_BHW is None else torch.empty(valid_BHW.shape, dtype=torch.bool)
    for number, (whole, turned, first_2S, second_2S, weight_2S) in enumerate(zip(*sources, strict=True)):
        steps = tuple(slice(None, None, -1 if first_S[0] > first_S[-1] else 1) for first_S in first_2S)
        valid_HW = seen_HW = None
        if valid_BHW is not None and valids is not None:
            valid_HW, seen_HW = valid_BHW[number].numpy(), valids[number].numpy()
            seen = valid_HW[steps] if whole else _valid_crop(valid_HW, first_2S, second_2S)
            seen_HW[...] = seen.T if turned else seen
        for tile_HW, out_HW in zip(image_BCHW[number].numpy(), images[number].numpy(), strict=True):
            view_HW = tile_HW[steps] if whole else _crop(tile_HW, first_2S, second_2S, weight_2S)
            out_HW[...] = view_HW.T if turned else view_HW
            if seen_HW is not None and not whole:
                np.multiply(out_HW, seen_HW, out=out_HW)
    return images, valids


def _crop(
    tile_HW: npt.NDArray[np.float32],
    first_2S: npt.NDArray[np.int64],
    second_2S: npt.NDArray[np.int64],
    weight_2S: npt.NDArray[np.float32],
) -> npt.NDArray[np.float32]:
    row_weight, col_weight = weight_2S[0][:, None], weight_2S[1]
    rows = tile_HW.take(first_2S[0], 0) * (1 - row_weight) + tile_HW.take(second_2S[0], 0) * row_weight
    return rows.take(first_2S[1], 1) * (1 - col_weight) + rows.take(second_2S[1], 1) * col_weight


def _valid_crop(
    valid_HW: npt.NDArray[np.bool_], first_2S: npt.NDArray[np.int64], second_2S: npt.NDArray[np.int64]
) -> npt.NDArray[np.bool_]:
    rows = valid_HW.take(first_2S[0], 0) & valid_HW.take(second_2S[0], 0)
    return rows.take(first_2S[1], 1) & rows.take(second_2S[1], 1)


def _apply_by_batch(
    image_BCHW: torch.Tensor, valid_BHW: torch.Tensor | None, sources: _Sources
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """For accelerators: the same, a batch at a time."""
    device = image_BCHW.device
    turned_B = torch.from_numpy(sources.turned_B).to(device)
    (rows, cols), (next_rows, next_cols), (row_weight, col_weight) = (
        torch.from_numpy(numbers_B2S).to(device).unbind(1)
        for numbers_B2S in (sources.first_B2S, sources.second_B2S, sources.weight_B2S)
    )
    whole = bool(sources.whole_B.all())
    image, valid = image_BCHW, None if valid_BHW is None else valid_BHW[:, None]
    if whole:
        image = _cols(_rows(image, rows), cols)
    else:
        row_weight, col_weight = row_weight[:, None, :, None], col_weight[:, None, None, :]
        image = _rows(image, rows) * (1 - row_weight) + _rows(image, next_rows) * row_weight
        image = _cols(image, cols) * (1 - col_weight) + _cols(image, next_cols) * col_weight
    image = _transposed(image, turned_B)
    if valid is None:
        return image, None
    if whole:
        return image, _transposed(_cols(_rows(valid, rows), cols), turned_B)[:, 0]
    valid = _rows(valid, rows) & _rows(valid, next_rows)
    valid = _transposed(_cols(valid, cols) & _cols(valid, next_cols), turned_B)
    return image.masked_fill_(~valid, 0.0), valid[:, 0]


def _transposed(image_BCHW: torch.Tensor, turned_B: torch.Tensor) -> torch.Tensor:
    return torch.where(turned_B[:, None, None, None], image_BCHW.mT, image_BCHW)


def _rows(image_BCHW: torch.Tensor, row_BS: torch.Tensor) -> torch.Tensor:
    return image_BCHW.gather(2, row_BS[:, None, :, None].expand_as(image_BCHW))


def _cols(image_BCHW: torch.Tensor, col_BS: torch.Tensor) -> torch.Tensor:
    return image_BCHW.gather(3, col_BS[:, None, None, :].expand_as(image_BCHW))
