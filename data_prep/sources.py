"""Which files are products: paths, folders and globs, each file once, data files of detached labels left out."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Sequence
from pathlib import Path

from momo.errors import DataError

# Extensions of the files taken from a folder; a file named by itself or by a glob may have any.
RASTER_SUFFIXES = frozenset({
    ".cub", ".gz", ".img", ".jp2", ".jpeg", ".jpg", ".lbl", ".pds", ".png", ".qub", ".tif", ".tiff", ".vic", ".vicar",
    ".vrt", ".xml",
})  # fmt: skip
_LABEL_SUFFIXES = (".lbl", ".xml")


def find_sources(patterns: Sequence[str]) -> tuple[list[Path], int]:
    """Expands paths, folders (with their sub-folders) and globs.

    Args:
        patterns: What the user gave. A path that is no folder and no glob is returned even if it does not exist.

    Returns:
        The files, each once, sorted by path, and the number of files in folders passed over for their extension.

    Raises:
        DataError: A folder or glob yields nothing.
    """
    found: dict[Path, Path] = {}
    passed_over = 0
    for pattern in patterns:
        path = Path(pattern).expanduser()
        is_glob = not path.exists() and glob.has_magic(str(path))
        matches = sorted(glob.glob(str(path), recursive=True)) if is_glob else [str(path)]
        files: list[Path] = []
        for match in map(Path, matches):
            inside = sorted(p for p in match.rglob("*") if p.is_file()) if match.is_dir() else [match]
            kept = [p for p in inside if not match.is_dir() or _is_candidate(p)]
            passed_over += len(inside) - len(kept)
            files += kept
        if not files:
            raise DataError(
                "no product is found",
                seen=pattern,
                rule=f"a folder is searched for {' '.join(sorted(RASTER_SUFFIXES))}",
                fix="check `products`; name a file with another extension by itself",
            )
        for file in files:
            found.setdefault(file.resolve(), file)
    return sorted(found.values(), key=str), passed_over


def _is_candidate(path: Path) -> bool:
    suffix = path.suffix.lower()
    if suffix not in RASTER_SUFFIXES or path.name.startswith(".") or path.name.lower().endswith(".aux.xml"):
        return False
    if suffix != ".xml":
        return True
    with open(path, "rb") as stream:
        return b"<Product_Observational" in stream.read(16384)


def described_by_labels(sources: Iterable[tuple[Path, Sequence[str]]]) -> set[Path]:
    """Returns the data files that detached labels describe, so that they are not read a second time.

    Args:
        sources: For each opened product its file and the list of files that GDAL says it consists of.
    """
    described = set()
    for source, files in sources:
        if source.suffix.lower() in _LABEL_SUFFIXES:
            described |= {Path(file).resolve() for file in files} - {source.resolve()}
    return described
