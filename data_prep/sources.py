"""Which files are products: paths, folders, globs, lists, zip members and URLs, each once."""

from __future__ import annotations

import contextlib
import fnmatch
import glob
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from momo.errors import DataError
from momo.files import sha256_file, sha256_json

from . import vsi

# Extensions of the files taken from a folder or archive; a file named by itself or by a glob may have any.
RASTER_SUFFIXES = frozenset({
    ".cub", ".gz", ".img", ".jp2", ".jpeg", ".jpg", ".lbl", ".pds", ".png", ".qub", ".tif", ".tiff", ".vic", ".vicar",
    ".vrt", ".xml",
})  # fmt: skip
_LABEL_SUFFIXES = (".lbl", ".xml")
_PEEK = 16384  # bytes of an .xml file that tell a PDS4 label from other XML
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://(.*)", re.DOTALL)


@dataclass(frozen=True)
class Source:
    """One file to read, wherever it is.

    Attributes:
        name: What GDAL opens: an absolute path, or a name such as `/vsizip/...`, `/vsigzip/...`, `/vsicurl/...`.
        display: File name for messages and for the globs of rules: `a.IMG`, `b.zip/a.IMG`, the last part of a URL.
        path: The local file (for a member of an archive the archive), None when it is not on this machine.
    """

    name: str
    display: str
    path: Path | None

    @property
    def place(self) -> str:
        """The same for every name of the same file, whatever links lead to it."""
        return vsi.place(self.name)

    def identity(self) -> str:
        """Returns name, size and state as JSON: as long as it is unchanged, the file is taken to be the same.

        The state is a local file's time of change in nanoseconds, a remote file's ETag or time of change; null when it
        cannot be asked. For a member of an archive it is the archive's.
        """
        size: int | None = None
        state: int | str | None = None
        if self.path is None:
            inner = vsi.without_gzip(self.name)
            size, state = vsi.remote_state((vsi.split_zip(inner) or (inner, ""))[0])
        else:
            with contextlib.suppress(OSError):
                status = self.path.stat()
                size, state = status.st_size, status.st_mtime_ns
        return json.dumps([self.name, size, state])


BadSource = Callable[[Source, DataError], None]


def find_sources(patterns: Sequence[str], bad: BadSource | None = None) -> tuple[list[Source], int]:
    """Finds the files that patterns mean.

    A pattern is a path, a folder (searched with its sub-folders), a glob, a text list (`*.txt`: one pattern a line, `#`
    starts a comment, paths are relative to the list's folder), a zip archive (all products in it), `archive.zip/member`
    (or a folder or glob in it), an address `http://`, `https://`, `ftp://` or `s3://bucket/key` (a folder when it ends
    in `/`), or a name of a GDAL virtual file system (`/vsi...`).

    Args:
        patterns: What the user gave. A path that is no folder and no glob is returned even if it does not exist.
        bad: Gets an archive or remote folder that cannot be read and the reason; None raises it.

    Returns:
        The files, each once, sorted, and the number of files in folders and archives passed over for their extension.

    Raises:
        DataError: A pattern yields nothing or cannot be understood; an archive is damaged or encrypted; a remote folder
            cannot be listed.
    """
    finder = _Finder(bad)
    found: dict[str, Source] = {}
    for pattern in patterns:
        for source in finder.expand(pattern):
            found.setdefault(source.place, source)
    return sorted(found.values(), key=lambda source: (str(source.path or source.name), source.name)), finder.passed_over


def described_by_labels(sources: Iterable[tuple[Source, Sequence[str]]]) -> set[str]:
    """Finds the data files that detached labels describe, so that they are not read a second time.

    Args:
        sources: For each opened product its source and the list of files that GDAL says it consists of.

    Returns:
        Their places, to compare with `Source.place`.
    """
    described: set[str] = set()
    for source, files in sources:
        if PurePosixPath(source.display).suffix.lower() in _LABEL_SUFFIXES:
            described |= {vsi.place(file) for file in files} - {source.place}
    return described


def digest(product_files: Sequence[str], source: Source) -> str:
    """Returns the SHA-256 of a product as 64 hexadecimal digits; "" for a remote one.

    Of one file it is that of its bytes (a `.gz` as it lies on disk, a zip member unpacked); of several, such as label
    and image, that of their names and hashes.

    Args:
        product_files: What GDAL says the product consists of.
        source: The product's source; counts alone when none of the files can be read by itself.

    Raises:
        DataError: A file cannot be read, or the checksum of a zip member is wrong.
    """
    if vsi.is_remote(source.name):
        return ""
    files = {vsi.place(file): vsi.without_gzip(file) for file in product_files if not vsi.is_remote(file)}
    readable = [files[key] for key in sorted(files) if files[key].startswith("/vsi") or os.path.isfile(files[key])]
    hashes: dict[str, str] = {}
    for file in readable or [vsi.without_gzip(source.name)]:
        name = os.path.basename(file)
        hashes[f"{name}#{len(hashes)}" if name in hashes else name] = _sha256(file)
    return next(iter(hashes.values())) if len(hashes) == 1 else sha256_json(hashes)


def _sha256(name: str) -> str:
    parts = vsi.split_zip(name)
    if parts is None and not name.startswith("/vsi"):
        try:
            return sha256_file(Path(name))
        except OSError as error:
            raise vsi.damaged(name, str(error)) from None
    sha256 = hashlib.sha256()
    local = parts is not None and not parts[0].startswith("/vsi")
    for block in vsi.member_chunks(*parts) if parts and local else vsi.chunks(name):
        sha256.update(block)
    return sha256.hexdigest()


# Finding


def _source(name: str, display: str, path: Path | None) -> Source:
    is_gzip = display.lower().endswith(".gz") and not name.startswith("/vsigzip/")
    return Source(f"/vsigzip/{name}" if is_gzip else name, display, path)


def _may_be_product(file: str) -> bool:
    name = PurePosixPath(file).name.lower()
    is_raster = PurePosixPath(name).suffix in RASTER_SUFFIXES
    return is_raster and not name.startswith(".") and not name.endswith(".aux.xml")


def _clean(path: Path) -> Path:
    """Returns an existing path without `..`."""
    return path.parent.resolve() / path.name if ".." in path.parts else path


def _is_label(beginning: bytes) -> bool:
    """Tells a PDS4 label of a product from other XML."""
    return b"<Product_Observational" in beginning


class _Finder:
    """Expands patterns; counts what it passes over."""

    def __init__(self, bad: BadSource | None) -> None:
        self.passed_over = 0
        self._bad = bad
        self._bad_ones = 0

    def expand(self, pattern: str, folder: Path | None = None) -> list[Source]:
        """Expands a pattern of the user, or one of a list that lies in `folder`."""
        before = self._bad_ones
        address = _ADDRESS.fullmatch(pattern)
        try:
            if address or pattern.startswith("/vsi"):
                found = self._virtual(vsi.address_name(*address.groups()) if address else pattern)
            else:
                found = self._local(os.path.expanduser(pattern), folder)
        except (OSError, ValueError) as error:
            raise DataError("a path cannot be read", seen=f"{pattern!r}: {error}", fix="check `products`") from None
        if not found and self._bad_ones == before:
            raise DataError(
                "no product is found",
                seen=pattern,
                rule=f"folders and archives are searched for {' '.join(sorted(RASTER_SUFFIXES))}",
                fix="check `products`; name a file with another extension by itself",
            )
        return found

    def _local(self, pattern: str, folder: Path | None) -> list[Source]:
        root = (folder or Path()).absolute()
        path = root / pattern
        if path.exists():
            matches = [path]
        elif glob.has_magic(pattern):
            matches = [root / match for match in sorted(glob.glob(pattern, root_dir=root, recursive=True))]
        else:
            matches = []
        if matches:
            return [source for match in matches for source in self._match(_clean(match), pattern, folder)]
        inside = self._inside_archives(pattern, root)
        if inside is not None or glob.has_magic(pattern):
            return inside or []
        if path.suffix.lower() == ".txt":
            raise DataError("a list of products does not exist", seen=path, fix="check `products`")
        return [_source(str(path), path.name, path)]

    def _match(self, path: Path, pattern: str, folder: Path | None) -> list[Source]:
        if path.is_dir():
            return self._folder(path)
        if pattern.lower().endswith(".txt"):
            if folder is not None:
                raise DataError(
                    "a list of products names another list", seen=path, rule="lists name products, folders or archives"
                )
            return self._list(path)
        return self._archive(path, "") if path.suffix.lower() == ".zip" else [_source(str(path), path.name, path)]

    def _folder(self, folder: Path) -> list[Source]:
        found = []
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            if path.suffix.lower() == ".zip" and not path.name.startswith("."):
                found += self._archive(path, "")
            elif _may_be_product(path.name) and (path.suffix.lower() != ".xml" or _is_label(_beginning(path))):
                found.append(_source(str(path), path.name, path))
            else:
                self.passed_over += 1
        return found

    def _list(self, path: Path) -> list[Source]:
        found = []
        for number, line in enumerate(_lines(path), start=1):
            pattern = re.sub(r"(^|\s)#.*", "", line).strip()
            if not pattern:
                continue
            try:
                found += self.expand(pattern, path.parent)
            except DataError as error:
                seen = f"{error.seen} ({path}, line {number})"
                raise DataError(error.what, seen=seen, rule=error.rule, fix=error.fix) from None
        return found

    # Archives

    def _inside_archives(self, pattern: str, root: Path) -> list[Source] | None:
        """Expands `archive.zip/member`; None when the pattern names no archive that exists."""
        for found in re.finditer(r"\.zip(?=/)", pattern, re.IGNORECASE):
            archive, member = pattern[: found.end()], pattern[found.end() + 1 :]
            matches = [archive] if (root / archive).is_file() else []
            if not matches and glob.has_magic(archive):
                matches = sorted(glob.glob(archive, root_dir=root, recursive=True))
            archives = [_clean(root / match) for match in matches if (root / match).is_file()]
            if archives:
                return [source for path in archives for source in self._archive(path, member)]
        return None

    def _archive(self, path: Path, inside: str) -> list[Source]:
        try:
            members = {member.filename: member for member in vsi.zip_members(path)}
            names = self._select(
                list(members), inside, lambda name: vsi.check_member(path, members[name]), vsi.zip_name(str(path), "")
            )
        except DataError as error:
            return self._report(_source(str(path), path.name, path), error)
        return [_source(vsi.zip_name(str(path), name), f"{path.name}/{name}", path) for name in names]

    def _select(self, names: list[str], inside: str, check: Callable[[str], None], root: str) -> list[str]:
        """Chooses files of an archive or a remote folder: one file, the products of a folder, or by a glob.

        In a glob `*` stands for any characters, `/` too.
        """
        below = [name for name in names if name.startswith(f"{inside.rstrip('/')}/" if inside else "")]
        if inside in names or not below:
            chosen = [inside] if inside in names else fnmatch.filter(names, inside)
            for name in chosen:
                check(name)
            return chosen
        kept = []
        for name in filter(_may_be_product, below):
            check(name)
            if not name.lower().endswith(".xml") or _is_label(vsi.peek(root + name, _PEEK)):
                kept.append(name)
        self.passed_over += len(below) - len(kept)
        return kept

    def _report(self, source: Source, error: DataError) -> list[Source]:
        if self._bad is None:
            raise error
        self._bad_ones += 1
        self._bad(source, error)
        return []

    # Virtual file systems

    def _virtual(self, name: str) -> list[Source]:
        parts = vsi.split_zip(name) or vsi.split_remote_zip(name)
        if parts and not parts[0].startswith("/vsi"):
            return self._archive(Path(parts[0]).absolute(), parts[1])
        if parts:
            return self._remote(vsi.zip_name(parts[0], ""), parts[1], f"{vsi.file_name(parts[0])}/")
        if name.endswith("/"):
            return self._remote(name, "")
        if "*" in name and not name.startswith("/vsicurl"):
            root = name[: name.index("*")].rpartition("/")[0] + "/"
            return self._remote(root, name.removeprefix(root))
        inner = vsi.without_gzip(name)
        if inner != name and not inner.startswith("/vsi"):
            path = Path(inner).absolute()
            return [Source(f"/vsigzip/{path}", path.name, path)]
        return [_source(name, vsi.file_name(name), None)]

    def _remote(self, root: str, inside: str, archive: str = "") -> list[Source]:
        """Expands what lies below a virtual folder or archive."""
        try:
            names = self._select(vsi.list_folder(root), inside, lambda name: None, root)
        except DataError as error:
            return self._report(_source(root.rstrip("/"), archive.rstrip("/") or root, None), error)
        return [_source(root + name, archive + name if archive else vsi.file_name(root + name), None) for name in names]


def _beginning(path: Path) -> bytes:
    with open(path, "rb") as stream:
        return stream.read(_PEEK)


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
        if "\0" in text:
            raise ValueError("it holds a zero byte")
    except (OSError, ValueError) as error:
        raise DataError(
            "a list of products cannot be read", seen=f"{path}: {error}", rule="UTF-8 text, one pattern a line"
        ) from None
    return text.splitlines()
