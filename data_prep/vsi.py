"""Names of GDAL's virtual file systems: taking them apart, listing and reading what they name."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from momo.errors import DataError
from momo.extras import require

_REMOTE = re.compile(r"/vsi(curl|s3|gs|az|adls|oss|swift|hdfs|webhdfs)(_streaming)?[/?]")
_URL_SAFE = "/%:@!$&'()*+,;=~-._"
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, 9)  # 9: deflate64, which GDAL reads and Python does not
_CHUNK = 1 << 20
_DAMAGE = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError, ValueError, OverflowError, RuntimeError)

# So that a dead or silent host becomes an error within a minute or two.
_NETWORK = {
    "GDAL_HTTP_CONNECTTIMEOUT": "10",
    "GDAL_HTTP_TIMEOUT": "300",
    "GDAL_HTTP_LOW_SPEED_TIME": "20",
    "GDAL_HTTP_LOW_SPEED_LIMIT": "1",
    "GDAL_HTTP_MAX_RETRY": "2",
    "GDAL_HTTP_RETRY_DELAY": "1",
    # GDAL would write a file beside each .gz it reads.
    "CPL_VSIL_GZIP_WRITE_PROPERTIES": "NO",
}


@functools.cache
def configured_gdal() -> Any:
    """Returns GDAL with exceptions and, where the user has set nothing else, with time limits for the network.

    The user's settings are GDAL's own: environment variables or a GDAL configuration file.

    Raises:
        ConfigError: GDAL is not installed.
    """
    gdal = require("osgeo.gdal", "prep")
    gdal.UseExceptions()
    for key, value in _NETWORK.items():
        if gdal.GetConfigOption(key) is None:
            gdal.SetConfigOption(key, value)
    key = "GDAL_DISABLE_READDIR_ON_OPEN"
    if gdal.GetConfigOption(key) is None and hasattr(gdal, "SetPathSpecificOption"):  # GDAL 3.6
        # Side files are asked for by name: the listing of an archive's folder may be megabytes, or not be allowed.
        for root in ("/vsicurl/", "/vsis3/"):
            gdal.SetPathSpecificOption(root, key, "TRUE")
    return gdal


@contextlib.contextmanager
def _quiet() -> Iterator[list[str]]:
    gdal, messages = configured_gdal(), []
    gdal.PushErrorHandler(lambda level, number, text: messages.append(" ".join(text.split())))
    try:
        yield messages
    finally:
        gdal.PopErrorHandler()


# Names


def is_remote(name: str) -> bool:
    """True for a name that is read over the network."""
    return name.startswith("/vsi") and _REMOTE.search(name) is not None


def without_gzip(name: str) -> str:
    """Returns the name of the compressed file."""
    while name.startswith("/vsigzip/"):
        name = name.removeprefix("/vsigzip/")
    return name


def zip_name(archive: str, member: str) -> str:
    """Returns the name of a zip member; braces where GDAL could not tell the archive from the member."""
    plain = archive.lower().endswith(".zip") and archive.lower().count(".zip") == 1
    return f"/vsizip/{archive}/{member}" if plain else f"/vsizip/{{{archive}}}/{member}"


def split_zip(name: str) -> tuple[str, str] | None:
    """Returns archive and member of a `/vsizip/` name ("" for the whole archive); None when it is no such name."""
    if not name.startswith("/vsizip/"):
        return None
    rest = name.removeprefix("/vsizip/")
    if rest.startswith("{"):
        archive, closed, member = rest[1:].partition("}")
        return (archive, member.lstrip("/")) if closed else None
    for found in re.finditer(r"\.zip(?=/|$)", rest, re.IGNORECASE):
        archive = rest[: found.end()]
        if is_remote(archive) or os.path.isfile(archive):
            return archive, rest[found.end() :].lstrip("/")
    return None


def place(name: str) -> str:
    """Returns the same for every name of the same file: links and relative paths resolved, compression left out."""
    name = without_gzip(name)
    parts = split_zip(name)
    if parts:
        archive, member = parts
        return zip_name(archive if archive.startswith("/vsi") else os.path.realpath(archive), member)
    return name if name.startswith("/vsi") else os.path.realpath(name)


def address_name(scheme: str, rest: str) -> str:
    """Returns GDAL's name of an address.

    Raises:
        DataError: It is of an unknown kind, or names no host or bucket.
    """
    scheme = scheme.lower()
    if scheme not in ("http", "https", "ftp", "s3") or not rest.partition("/")[0]:
        raise DataError(
            "an address cannot be read",
            seen=f"{scheme}://{rest}",
            rule="http://host/path, https://host/path, ftp://host/path or s3://bucket/key",
            fix="for other stores give the name that GDAL opens (/vsigs/..., /vsiaz/...)",
        )
    if scheme == "s3":
        return f"/vsis3/{rest}"
    host, slash, path = rest.partition("/")
    path, question, query = path.replace("#", "%23").partition("?")
    return f"/vsicurl/{scheme}://{host}{slash}{quote(path, _URL_SAFE)}{question}{quote(query, _URL_SAFE + '?')}"


def file_name(name: str) -> str:
    """Returns the last part of a virtual name, without the query of a URL."""
    name = without_gzip(name)
    if name.startswith("/vsicurl"):
        url = urlsplit(name.partition("/vsicurl/")[2])
        return unquote(PurePosixPath(url.path).name) or url.hostname or name
    return PurePosixPath(name).name


def split_remote_zip(name: str) -> tuple[str, str] | None:
    """Returns archive and member when a remote name is, or lies in, a zip archive."""
    if not is_remote(name) or name.startswith(("/vsizip/", "/vsigzip/")):
        return None
    path, question, query = name.partition("?") if name.startswith("/vsicurl/") else (name, "", "")
    found = re.fullmatch(r"(.*?\.zip)(?:/(.*))?", path, re.IGNORECASE | re.DOTALL)
    if found is None or (query and found[2]):
        return None
    return found[1] + question + query, found[2] or ""


# Reading


def list_folder(name: str) -> list[str]:
    """Returns the files below a virtual folder, as sorted paths relative to it.

    Raises:
        DataError: It cannot be listed.
    """
    with _quiet() as messages:
        try:
            entries = configured_gdal().ReadDirRecursive(name.rstrip("/"))
        except (RuntimeError, UnicodeDecodeError) as error:
            entries, messages = None, [*messages, " ".join(str(error).split())]
    if entries is None:
        raise DataError(
            "a folder cannot be listed",
            seen=f"{name}: {messages[-1]}" if messages else name,
            rule="a whole zip archive, a bucket that may be listed, a web server that answers with an index of links",
            fix="check address and credentials, or give a text list of the files",
        )
    return sorted({entry for entry in entries if entry and not entry.endswith("/")})


def peek(name: str, size: int) -> bytes:
    """Returns the first bytes of a file, b"" when it cannot be read."""
    with _quiet(), contextlib.suppress(RuntimeError, UnicodeDecodeError):
        gdal = configured_gdal()
        stream = gdal.VSIFOpenL(name, "rb")
        if stream is not None:
            try:
                return bytes(gdal.VSIFReadL(1, size, stream) or b"")
            finally:
                gdal.VSIFCloseL(stream)
    return b""


def chunks(name: str) -> Iterator[bytes]:
    """Yields the bytes of a file of any virtual file system.

    Raises:
        DataError: It ends before its stated size or cannot be opened.
    """
    gdal, got = configured_gdal(), 0
    with _quiet(), contextlib.suppress(RuntimeError, UnicodeDecodeError):
        status, stream = gdal.VSIStatL(name), gdal.VSIFOpenL(name, "rb")
        if status is not None and stream is not None:
            try:
                while block := gdal.VSIFReadL(1, _CHUNK, stream):
                    got += len(block)
                    yield bytes(block)
            finally:
                gdal.VSIFCloseL(stream)
            if got == status.size:
                return
    raise damaged(name, f"{got} bytes can be read")


def remote_state(name: str) -> tuple[int | None, str | int | None]:
    """Returns size and ETag (or time of change) of a file that is not local; None for what is not known."""
    gdal = configured_gdal()
    with _quiet(), contextlib.suppress(RuntimeError, UnicodeDecodeError):
        status = gdal.VSIStatL(name)
        if status is None:
            return None, None
        headers: dict[str, str] = {}
        if is_remote(name) and hasattr(gdal, "GetFileMetadata"):
            headers = {key.lower(): value for key, value in (gdal.GetFileMetadata(name, "HEADERS") or {}).items()}
        return status.size, headers.get("etag") or headers.get("last-modified") or status.mtime
    return None, None


# Local zip archives


def zip_members(archive: Path) -> list[zipfile.ZipInfo]:
    """Returns the files of a zip archive in its order.

    Raises:
        DataError: It is damaged, or a member would lie outside of it.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            members = [member for member in opened.infolist() if not member.is_dir()]
    except _DAMAGE as error:
        raise _bad_archive("an archive cannot be read", f"{archive}: {error}", "a whole zip file") from None
    for member in members:
        if member.filename.startswith("/") or ".." in member.filename.split("/"):
            raise _bad_archive(
                "an archive's member lies outside of it", f"{archive}: {member.filename}", "paths inside the archive"
            )
    return members


def check_member(archive: Path, member: zipfile.ZipInfo) -> None:
    """Checks that GDAL can read a member.

    Raises:
        DataError: It is encrypted or compressed by a method that GDAL does not read.
    """
    if member.flag_bits & 1:
        raise _bad_archive("an archive is encrypted", f"{archive}: {member.filename}", "archives without a password")
    if member.compress_type not in _METHODS:
        method = zipfile.compressor_names.get(member.compress_type, str(member.compress_type))  # type: ignore[attr-defined]
        raise _bad_archive(
            "an archive's compression is not supported", f"{archive}: {member.filename}: {method}", "deflate or none"
        )


def _bad_archive(what: str, seen: str, rule: str) -> DataError:
    fix = "test it with `unzip -t`, fetch it again, or give its files unpacked"
    return DataError(what, seen=seen, rule=rule, fix=fix)


def member_chunks(archive: str, member: str) -> Iterator[bytes]:
    """Yields the unpacked bytes of a member of a local zip archive; its checksum is compared at the end.

    Raises:
        DataError: It cannot be unpacked, or the checksum is wrong.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            if opened.getinfo(member).compress_type == 9:
                yield from chunks(zip_name(archive, member))
                return
            with opened.open(member) as stream:
                while block := stream.read(_CHUNK):
                    yield block
    except (*_DAMAGE, KeyError) as error:
        raise damaged(zip_name(archive, member), str(error)) from None


def damaged(name: str, seen: str) -> DataError:
    """Returns the error for a file that cannot be read to its end."""
    return DataError("a product is damaged", seen=f"{name}: {seen}", fix="fetch it again and compare its checksum")
