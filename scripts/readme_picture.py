"""Puts figures of a finished demo together into the picture of the README.

python scripts/readme_picture.py demo docs/images/demo.png
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image

_WIDTH, _GAP = 1200, 16


def scaled(path: Path, width: int) -> Image.Image:
    """Opens a figure and scales it to a width."""
    image = Image.open(path).convert("RGB")
    return image.resize((width, round(image.height * width / image.width)), Image.Resampling.LANCZOS)


def beside(left: Image.Image, right: Image.Image) -> Image.Image:
    """Places two pictures side by side on white, aligned at the top."""
    sheet = Image.new("RGB", (left.width + _GAP + right.width, max(left.height, right.height)), "white")
    sheet.paste(left, (0, 0))
    sheet.paste(right, (left.width + _GAP, 0))
    return sheet


def main() -> None:
    """Reads `<demo>/report/figures` and writes the picture."""
    figures, out = Path(sys.argv[1]) / "report" / "figures", Path(sys.argv[2])
    third = (_WIDTH - 2 * _GAP) // 3
    tiles = [scaled(next(figures.glob(f"tiles-{name}-*.png")), third) for name in ("hirise", "ctx", "themis")]
    top = beside(beside(tiles[0], tiles[1]), tiles[2])
    half = (_WIDTH - _GAP) // 2
    painted = scaled(next(figures.glob("reconstructions-themis-*.png")), half)
    bottom = beside(painted, scaled(figures / "selection.png", half))
    sheet = Image.new("RGB", (_WIDTH, top.height + 2 * _GAP + bottom.height), "white")
    sheet.paste(top, (0, 0))
    sheet.paste(bottom, (0, top.height + 2 * _GAP))
    sheet.save(out, optimize=True)


if __name__ == "__main__":
    main()
