"""Reading and checking manifest.json, and the files of a corpus against it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .codecs import CODECS
from .corpus_format import FORMAT_VERSION, Manifest, ShardEntry, fingerprint
from .errors import DataError
from .files import sha256_file

_TABLES = ("index.parquet", "products.parquet", "stats.json")


def read_json(path: Path) -> Any:
    """Reads a JSON file of a corpus.

    Raises:
        DataError: It is missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError("a file of the corpus is missing", seen=path, fix="run momo prep again") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(
            "a file of the corpus is not JSON", seen=f"{path}: {error}", fix="run momo prep again"
        ) from None


def read_manifest(path: Path) -> Manifest:
    """Reads and checks manifest.json.

    Args:
        path: Corpus folder.

    Raises:
        DataError: There is none, it is of another format, or it was altered.
    """
    if not (path / "manifest.json").is_file():
        raise DataError(
            "this is no corpus",
            seen=path,
            rule="a corpus is a folder with manifest.json",
            fix="make one with momo prep",
        )
    fields = read_json(path / "manifest.json")
    if not isinstance(fields, dict) or fields.get("format") != "momo-corpus":
        raise DataError("this is no corpus", seen=path / "manifest.json", rule="its format is momo-corpus")
    if fields.get("format_version") != FORMAT_VERSION:
        raise DataError(
            "the corpus has another format",
            seen=f"{path}: version {fields.get('format_version')}",
            rule=f"this momo reads version {FORMAT_VERSION}",
            fix="run momo prep again",
        )
    try:
        fields["shards"] = [ShardEntry(**shard) for shard in fields["shards"]]
        manifest = Manifest(**fields)
        _check_manifest(manifest)
    except (TypeError, KeyError, ValueError) as error:
        raise DataError("the manifest cannot be read", seen=f"{path / 'manifest.json'}: {error}") from None
    if fingerprint(manifest.shards) != manifest.fingerprint:
        raise DataError(
            "the manifest was altered",
            seen=path / "manifest.json",
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


def check_files(path: Path, manifest: Manifest, *, hashes: bool) -> None:
    """Compares the files of a corpus with its manifest.

    Args:
        path: Corpus folder.
        manifest: Its manifest.
        hashes: Compare the SHA-256 of shards and tables too; else the sizes of the shards alone.

    Raises:
        DataError: A file is missing or was altered.
    """
    for shard in manifest.shards:
        _check_shard(path / "shards" / shard.name, shard, hashes=hashes)
    for name in _TABLES if hashes else ():
        if name in manifest.tables:
            _check_hash(path / name, manifest.tables[name])


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


def _check_hash(path: Path, expected: str, kind: str = "table") -> None:
    if not path.is_file():
        raise DataError(f"a {kind} of the corpus is missing", seen=path, fix="copy it back, or run momo prep again")
    if (found := sha256_file(path)) != expected:
        raise DataError(
            f"a {kind} was altered",
            seen=f"{path} has sha256 {found[:12]}...",
            rule=f"the manifest says {expected[:12]}...",
            fix="copy it again, or run momo prep again",
        )
