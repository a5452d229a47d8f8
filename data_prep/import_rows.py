"""Rows and images of MOMO's published layout; part of `momo prep import`."""

from __future__ import annotations

import csv
import hashlib
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from momo.errors import DataError

COLUMNS = ("which_instrument", "GMoM_Unit_acronym", "Filename", "Split")
_KEY_LENGTH = 90
_NOT_IN_KEYS = re.compile(r"[^A-Za-z0-9_+-]")
_GREY_MODES = {"L": "uint8", "I;16": "uint16", "I;16B": "uint16", "I;16L": "uint16"}


@dataclass(frozen=True)
class Row:
    """One row of the CSV that belongs to the sensor; `line` is its line in the file, from 1."""

    line: int
    instrument: str
    unit: str
    name: str
    split: str

    @property
    def stem(self) -> str:
        """File name without its suffix."""
        return Path(self.name).stem

    @property
    def key(self) -> str:
        """Key of the tile; one that is too long ends in a hash of the whole."""
        text = _NOT_IN_KEYS.sub("_", f"{self.unit}__{self.stem}")
        if len(text) <= _KEY_LENGTH:
            return text
        return f"{text[: _KEY_LENGTH - 17]}_{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    @property
    def path(self) -> str:
        """File, relative to the root."""
        return f"{self.instrument}/processed_data/{self.unit}/{self.name}"


class BadRow(Exception):
    """A row that gives no tile.

    Args:
        reason: Under which it is counted.
        seen: What was seen.
    """

    def __init__(self, reason: str, seen: str = "") -> None:
        self.reason, self.seen = reason, seen
        super().__init__(f"{reason}: {seen}" if seen else reason)


def csv_lines(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Yields the rows of MOMO's CSV with their line numbers.

    Raises:
        DataError: The file is missing, is no UTF-8 CSV, or lacks a column.
    """
    line = 1
    try:
        with open(path, encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream)
            missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
            if missing:
                raise DataError(
                    "the CSV lacks columns",
                    seen=f"{', '.join(missing)} in {path}; it has {', '.join(reader.fieldnames or ()) or 'none'}",
                    rule=f"MOMO's columns are {', '.join(COLUMNS)}",
                )
            for values in reader:
                line = reader.line_num
                yield line, {name: (values[name] or "").strip() for name in COLUMNS}
    except FileNotFoundError:
        raise DataError("the CSV does not exist", seen=path, fix="check `csv`") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError("the CSV cannot be read", seen=f"{path}, after line {line}: {error}", rule="UTF-8") from None


def is_plain(part: str) -> bool:
    """Tells whether a text is one plain name, which cannot lead out of its folder."""
    return bool(part) and part.isprintable() and part not in (".", "..") and not any(mark in part for mark in "/\\\0")


class Hashes:
    """Finds hashes that occur more than once, at 8 bytes each."""

    def __init__(self) -> None:
        self._blocks: list[npt.NDArray[np.uint64]] = []
        self._open: list[int] = []
        self.count = 0

    def add(self, value: int) -> None:
        """Appends one hash."""
        self._open.append(value)
        self.count += 1
        if len(self._open) == 1 << 16:
            self._close()

    def _close(self) -> None:
        self._blocks.append(np.array(self._open, dtype=np.uint64))
        self._open = []

    def repeated(self) -> set[int]:
        """Returns the hashes that were added more than once."""
        self._close()
        ordered = np.sort(np.concatenate(self._blocks))
        return set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())


def name_hash(text: str) -> int:
    """Returns a fixed 64-bit hash of a name."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def decode_grey(data: bytes) -> npt.NDArray[Any]:
    """Returns the pixels of an 8 or 16 bit grey image, or of an RGB image with three equal channels.

    Raises:
        BadRow: The bytes are damaged or hold another kind of image.
    """
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
    except Exception as error:  # image libraries raise many kinds for damaged bytes
        raise BadRow("image cannot be decoded", " ".join(str(error).split())[:120]) from None
    if image.mode in _GREY_MODES:
        return np.asarray(image).astype(_GREY_MODES[image.mode], copy=False)
    if image.mode == "I":  # 16 bit PNGs in some versions of PIL
        value_HW = np.asarray(image)
        if value_HW.min() < 0 or value_HW.max() > 65535:
            raise BadRow("not 8 or 16 bit", f"values from {value_HW.min()} to {value_HW.max()}")
        return value_HW.astype(np.uint16)
    if image.mode in ("RGB", "P"):
        rgb_HW3 = np.asarray(image.convert("RGB"))
        if (rgb_HW3 == rgb_HW3[..., :1]).all():
            return np.ascontiguousarray(rgb_HW3[..., 0])
        raise BadRow("coloured image", "its three channels differ")
    if image.mode == "F":
        what = "NaN among them" if np.isnan(np.asarray(image)).any() else "not to be stored without loss"
        raise BadRow("not 8 or 16 bit", f"floating-point pixels, {what}")
    raise BadRow("not 8 or 16 bit", f"image mode {image.mode}")
