"""Reading labelled images and masks as numbers, with the pixels that were measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, UnidentifiedImageError

from momo.errors import DataError
from momo.extras import require

EXTENSIONS = (".jpg", ".jpeg", ".png", ".tif", ".tiff")
_TIFF = (".tif", ".tiff")

# ITU-R BT.601, as Pillow's mode "L".
_LUMINANCE = np.array([0.299, 0.587, 0.114], dtype=np.float32)


def read_array(path: Path) -> npt.NDArray[Any]:
    """Reads a file as it is stored: (H, W) or (H, W, bands), indices for a palette.

    Raises:
        DataError: The file is missing or cannot be decoded.
    """
    try:
        try:
            with Image.open(path) as image:
                if getattr(image, "n_frames", 1) > 1 and path.suffix.lower() in _TIFF:
                    return _read_tiff(path)
                return np.array(image.convert("RGB") if image.mode == "CMYK" else image)
        except UnidentifiedImageError:
            if path.suffix.lower() in _TIFF:
                return _read_tiff(path)
            raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(
            "an image cannot be read",
            seen=f"{path}: {' '.join(str(error).split())}",
            rule=f"a whole image file ({', '.join(EXTENSIONS)})",
            fix="download or export the file again",
        ) from None


def _read_tiff(path: Path) -> npt.NDArray[Any]:
    """Reads what Pillow cannot: more than four bands, or one page a band."""
    tifffile = require("tifffile", "eval")
    try:
        array = np.asarray(tifffile.imread(path))
    except tifffile.TiffFileError as error:
        raise OSError(str(error)) from None
    planar = array.ndim == 3 and array.shape[0] < min(array.shape[1:])
    return np.moveaxis(array, 0, -1) if planar else array


def read_image(path: Path, *, bands: list[int] | None = None) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """Reads an image as grey or RGB values and a validity mask.

    Args:
        path: Image file.
        bands: Zero-based bands to take, 1 (grey) or 3 (in the order R, G, B). When None: the only band, the first
            three of three or four, the first of grey with alpha.

    Returns:
        float32 of shape (C, H, W) with C 1 or 3, in the stored unit; bool of shape (H, W), False where alpha is 0 or a
        value is not finite. Invalid values are 0.

    Raises:
        DataError: Unreadable file, or bands that do not exist or must be named.
    """
    array = read_array(path)
    if array.ndim == 2:
        array = array[..., None]
    count = array.shape[-1] if array.ndim == 3 else 0
    alpha = path.suffix.lower() == ".png" and count in (2, 4)
    if count == 0 or (bands is None and not alpha and count not in (1, 3, 4)):
        raise DataError(
            "it is not clear which bands of an image are meant",
            seen=f"{path} has shape {array.shape}",
            rule="grey, RGB, or a list of bands",
            fix="set bands of the dataset, for example [2, 1, 0]",
        )
    chosen = bands if bands is not None else [0] if count <= 2 else [0, 1, 2]
    if max(chosen) >= count:
        raise DataError(
            "an image has fewer bands than asked for",
            seen=f"{path}: {count} bands, bands={chosen}",
            fix="correct bands of the dataset",
        )
    value_CHW = np.ascontiguousarray(np.moveaxis(array[..., chosen], -1, 0)).astype(np.float32)
    valid_HW: npt.NDArray[np.bool_] = np.isfinite(value_CHW).min(axis=0)
    if alpha:
        valid_HW = valid_HW & (array[..., -1] > 0)
    value_CHW[:, ~valid_HW] = 0
    return value_CHW, valid_HW


def read_mask(path: Path) -> npt.NDArray[np.uint8]:
    """Reads a mask of class indices, (H, W).

    Raises:
        DataError: Unreadable, several bands, or values that are no class indices.
    """
    array = read_array(path)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim != 2:
        raise DataError(
            "a mask has several bands",
            seen=f"{path} has shape {array.shape}",
            rule="one band of class indices",
            fix="export it as a grey or palette image",
        )
    if array.dtype == np.bool_:
        return array.astype(np.uint8)
    low, high = array.min(), array.max()
    if low < 0 or high > 255 or (array.dtype.kind == "f" and (array != np.rint(array)).any()):
        raise DataError(
            "a mask holds values that are no class indices", seen=f"{path}: {low}..{high}", rule="whole numbers 0..255"
        )
    return array.astype(np.uint8)


def image_size(path: Path) -> tuple[int, int]:
    """Returns height and width without decoding the pixels where the format allows it."""
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except OSError:
        height, width = read_array(path).shape[:2]
        return int(height), int(width)


def to_channels(value_CHW: npt.NDArray[np.float32], in_chans: int) -> npt.NDArray[np.float32]:
    """Fits an image to a network: luminance for one channel, grey repeated for three."""
    if in_chans == 1 and len(value_CHW) == 3:
        return np.tensordot(_LUMINANCE, value_CHW, axes=1)[None].astype(np.float32)
    return np.repeat(value_CHW, in_chans, axis=0) if len(value_CHW) < in_chans else value_CHW


def resize_image(
    value_CHW: npt.NDArray[np.float32], valid_HW: npt.NDArray[np.bool_], side: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """Resizes an image to side x side pixels (bilinear, antialiased) and its validity (nearest)."""
    if valid_HW.shape == (side, side):
        return value_CHW, valid_HW
    image = torch.nn.functional.interpolate(
        torch.from_numpy(value_CHW)[None], size=(side, side), mode="bilinear", antialias=True
    )
    return image[0].numpy(), resize_mask(valid_HW.astype(np.uint8), side).astype(bool)


def resize_mask(mask_HW: npt.NDArray[np.uint8], side: int) -> npt.NDArray[np.uint8]:
    """Resizes a mask to side x side pixels by nearest neighbour (pixel centres)."""
    if mask_HW.shape == (side, side):
        return mask_HW
    mask = torch.from_numpy(mask_HW)[None, None].float()
    return torch.nn.functional.interpolate(mask, size=(side, side), mode="nearest-exact")[0, 0].to(torch.uint8).numpy()
