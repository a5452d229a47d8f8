"""Black collars: the area outside the imaged ground that a file fills with 0 and does not declare as no-data."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from momo.extras import require

from .vsi import is_remote

_SIDE = 1024  # samples across and down; below a fifth of a percent no collar matters
# Pixels that may be decoded for the sake of the samples: some seconds for compressed formats without overviews.
_MOST_DECODED = 1 << 30
_FEWEST_ROWS = 8  # what is left of a damaged file tells nothing below that
_REMOTE_ROWS = 64  # each row of a remote file without overviews is a request

# A collar has at least this share of the image: less is not worth a rule that masks every 0.
_LEAST_AREA = 0.002
_LEAST_SAMPLES = 64
# ... and touches the border along one run: shadows clipped at 0 touch it in spots and lie all over the image in tens
# of pieces (25 to 258 in HiRISE and THEMIS tiles), while the wedge that a projected swath leaves runs along it. Share
# of the perimeter, and share of all zeros that must then lie in such areas: a gap between mosaic strips touches the
# border with its narrow end only, but it is all the zeros there are.
_RULES = ((0.02, 0.5), (0.0025, 0.99))


def find_collar(dataset: Any, band_number: int, dtype: str, declared: bool) -> float | None:
    """Tells whether 0 is an undeclared no-data value: whether zeros lie as a collar around the imaged ground.

    It is one when areas of exactly 0, seen in at most 1024 x 1024 samples (nearest neighbour) of the band, touch the
    border along one run of at least 2 % of the perimeter, cover together at least 0.2 % of the image, and hold more
    zeros than there are elsewhere; or when the run has at least 0.25 % and hardly a zero (1 %) lies elsewhere. The
    zeros elsewhere tell images in which 0 is a measurement too, such as shadows clipped at 0 and elevations. Fewer than
    64 samples are no collar; an image of nothing but zeros is all collar.

    Work and memory are bounded: overviews are used where there are any; where whole blocks must be decoded for a few
    samples, fewer rows are read; a part of the file that cannot be read is left out (it is reported where its tiles are
    cut).

    Args:
        dataset: An open GDAL dataset.
        band_number: Band, from 1.
        dtype: numpy name of the pixel type.
        declared: The file declares a no-data value or has a mask; nothing is looked for then.

    Returns:
        0.0 when there is a collar, else None.
    """
    if declared or np.dtype(dtype).kind not in "uif":
        return None
    band = dataset.GetRasterBand(band_number)
    zero_HW = _sample(band, _row_count(dataset, band)) == 0
    if not zero_HW.any():
        return None
    return 0.0 if _is_collar(zero_HW, band.XSize / zero_HW.shape[1], band.YSize / zero_HW.shape[0]) else None


def _row_count(dataset: Any, band: Any) -> int:
    """Returns how many rows to sample so that the work stays bounded."""
    rows = min(band.YSize, _SIDE)
    if band.GetOverviewCount() > 0:
        return rows
    if is_remote(dataset.GetDescription()):
        rows = min(rows, _REMOTE_ROWS)
    height = min(band.GetBlockSize()[1], band.YSize)
    if height * band.XSize * -(-band.YSize // height) <= _MOST_DECODED:
        return rows
    return max(2, min(rows, _MOST_DECODED // (height * band.XSize)))


def _sample(band: Any, rows: int) -> npt.NDArray[Any]:
    """Reads `rows` rows of at most `_SIDE` samples, spread evenly; rows that cannot be read are left out."""
    columns = min(band.XSize, _SIDE)
    try:
        return band.ReadAsArray(buf_xsize=columns, buf_ysize=rows)
    except (RuntimeError, UnicodeDecodeError):
        pass
    kept = []
    for row in range(rows):
        try:
            kept.append(band.ReadAsArray(0, int((row + 0.5) * band.YSize / rows), band.XSize, 1, buf_xsize=columns)[0])
        except (RuntimeError, UnicodeDecodeError):
            continue
    return np.stack(kept) if len(kept) >= _FEWEST_ROWS else np.ones((1, columns))


def _is_collar(zero_HW: npt.NDArray[np.bool_], step_x: float, step_y: float) -> bool:
    """Decides by the rules of `find_collar`; a sample stands for `step_x` x `step_y` pixels."""
    ndimage = require("scipy.ndimage", "prep")
    label_HW, count = ndimage.label(zero_HW, structure=np.ones((3, 3), dtype=bool))
    border, length = _border(label_HW, step_x, step_y)
    areas = np.bincount(label_HW.ravel(), minlength=count + 1)
    runs = {int(n): _longest_run(border == n, length) for n in np.unique(border[border > 0])}
    for least_run, share in _RULES:
        collar = sum(int(areas[n]) for n, run in runs.items() if run >= least_run)
        if collar >= max(_LEAST_AREA * zero_HW.size, _LEAST_SAMPLES) and collar > share * int(zero_HW.sum()):
            return True
    return False


def _border(
    label_HW: npt.NDArray[np.int32], step_x: float, step_y: float
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float64]]:
    """Returns the labels once around the image and the share of the perimeter that each stands for."""
    height, width = label_HW.shape
    sides = (label_HW[0], label_HW[:, -1], label_HW[-1, ::-1], label_HW[::-1, 0])
    length = np.concatenate([np.full(n, step) for n, step in ((width, step_x), (height, step_y)) * 2])
    return np.concatenate(sides), length / length.sum()


def _longest_run(touches: npt.NDArray[np.bool_], length: npt.NDArray[np.float64]) -> float:
    """Returns the length of the longest run of True around a closed line."""
    if touches.all():
        return float(length.sum())
    start = int(np.argmin(touches))  # from a gap on, no run goes over the end
    touches, length = np.roll(touches, -start), np.roll(length, -start)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], touches, [False]]).astype(np.int8)))
    total = np.concatenate([[0.0], np.cumsum(length)])
    return max((float(total[stop] - total[first]) for first, stop in edges.reshape(-1, 2)), default=0.0)
