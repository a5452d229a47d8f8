"""Reading and checking manifest.json, and the files of a corpus against it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from .codecs import CODECS
from .corpus_format import FORMAT_VERSION, Manifest, ShardEntry, fingerprint
from .errors import DataError
from .files import sha256_file
from .stores import LocalStore, Store

_TABLES = ("index.parquet", "products.parquet", "stats.json")


def read_json(store: Store, name: str) -> Any:
    """Reads a JSON file of a corpus.

    Raises:
        DataError: It is missing or damaged.
    """
    where = f"{store.location}/{name}"
    try:
        return _parsed(store.read_bytes(name), where)
    except FileNotFoundError:
        raise DataError("a file of the corpus is missing", seen=where, fix="run momo prep again") from None


def _parsed(raw: bytes, where: str) -> Any:
    try:
        return json.loads(raw.decode("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(
            "a file of the corpus is not JSON", seen=f"{where}: {error}", fix="run momo prep again"
        ) from None


def read_manifest(corpus: Path | Store) -> Manifest:
    """Reads and checks manifest.json.

    Args:
        corpus: Corpus folder, or its store.

    Raises:
        DataError: There is none, it is of another format, or it was altered.
    """
    store = corpus if isinstance(corpus, Store) else LocalStore(corpus)
    where = f"{store.location}/manifest.json"
    try:
        fields = _parsed(store.read_bytes("manifest.json"), where)
    except FileNotFoundError:
        raise DataError(
            "this is no corpus",
            seen=store.location,
            rule="a corpus is a folder with manifest.json",
            fix="make one with momo prep",
        ) from None
    if not isinstance(fields, dict) or fields.get("format") != "momo-corpus":
        raise DataError("this is no corpus", seen=where, rule="its format is momo-corpus")
    if fields.get("format_version") != FORMAT_VERSION:
        raise DataError(
            "the corpus has another format",
            seen=f"{store.location}: version {fields.get('format_version')}",
            rule=f"this momo reads version {FORMAT_VERSION}",
            fix="run momo prep again",
        )
    try:
        fields["shards"] = [ShardEntry(**shard) for shard in fields["shards"]]
        manifest = Manifest(**fields)
        _check_manifest(manifest)
    except (TypeError, KeyError, ValueError) as error:
        raise DataError("the manifest cannot be read", seen=f"{where}: {error}") from None
    if fingerprint(manifest.shards) != manifest.fingerprint:
        raise DataError(
            "the manifest was altered",
            seen=where,
            rule="its fingerprint is the hash of its shard list",
            fix="run momo prep again",
        )
    return manifest


def _check_manifest(manifest: Manifest) -> None:
    if manifest.dtype not in ("uint8", "uint16") or manifest.codec not in CODECS:
        raise ValueError(f"dtype {manifest.dtype}, codec {manifest.codec}; uint8 or uint16, one of {', '.join(CODECS)}")
    if not isinstance(manifest.tile_size, int) or manifest.tile_size < 1:
        raise ValueError(f"tile_size {manifest.tile_size}")
    for shard in manifest.shards:
        if Path(shard.name).name != shard.name:
            raise ValueError(f"a shard is called {shard.name!r}, a file name is expected")


def open_table(store: Store, manifest: Manifest, name: str) -> Path | bytes:
    """Returns a table of a corpus: its path, or its bytes when it had to be fetched (then compared by SHA-256).

    Raises:
        DataError: It is missing, or what was fetched was altered.
    """
    if store.folder is not None:
        path = store.folder / name
        if not path.is_file():
            raise _missing("table", path)
        return path
    where = f"{store.location.rstrip('/')}/{name}"
    try:
        raw = store.read_bytes(name)
    except FileNotFoundError:
        raise _missing("table", where) from None
    if name in manifest.tables:
        _compare_hash(where, hashlib.sha256(raw).hexdigest(), manifest.tables[name], "table")
    return raw


def check_files(store: Store, manifest: Manifest, *, hashes: bool) -> list[str]:
    """Compares the files of a corpus with its manifest, as far as they are on this machine.

    Args:
        store: Where the corpus is.
        manifest: Its manifest.
        hashes: Compare the SHA-256 of shards and tables too; else the sizes of the shards alone.

    Returns:
        Lines for the user about what was not compared.

    Raises:
        DataError: A file is missing or was altered.
    """
    if store.folder is not None:
        for name in _TABLES if hashes else ():
            if name in manifest.tables:
                _check_hash(store.folder / name, manifest.tables[name], "table")
        if store.shards_here:
            for shard in manifest.shards:
                _check_shard(store.folder / "shards" / shard.name, shard, hashes=hashes)
            return []
    if store.streamed:
        return [f"{store.location}: shards are compared with their sha256 as they arrive, not before the start"]
    return [f"{store.location}: tiles are read one by one, so shards are not compared with their sha256"]


def _check_shard(path: Path, shard: ShardEntry, *, hashes: bool) -> None:
    if not path.is_file():
        raise DataError("a shard is missing", seen=path, fix="copy it back, or run momo prep again")
    if path.stat().st_size != shard.bytes:
        raise DataError(
            "a shard has another size than the manifest says",
            seen=f"{path}: {path.stat().st_size} bytes",
            rule=f"{shard.bytes} bytes",
            fix="copy it again, or run momo prep again",
        )
    if hashes:
        _check_hash(path, shard.sha256, "shard")


def _check_hash(path: Path, expected: str, kind: str) -> None:
    if not path.is_file():
        raise _missing(kind, path)
    _compare_hash(path, sha256_file(path), expected, kind)


def _compare_hash(where: object, found: str, expected: str, kind: str) -> None:
    if found != expected:
        raise DataError(
            f"a {kind} was altered",
            seen=f"{where} has sha256 {found[:12]}...",
            rule=f"the manifest says {expected[:12]}...",
            fix="copy it again, or run momo prep again",
        )


def _missing(kind: str, where: object) -> DataError:
    return DataError(f"a {kind} of the corpus is missing", seen=where, fix="copy it back, or run momo prep again")
