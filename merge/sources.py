"""Where the tensors of a merge come from: opened by their headers, read one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from momo.errors import CheckpointError
from momo.files import sha256_file, sha256_json
from momo.runs import CONFIG_NAME
from momo.weights import CARD_NAME, TENSORS_NAME, Card, TensorInfo, load_card

INDEX_SUFFIX = ".safetensors.index.json"
TIMM = "timm:"
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """The tensors of one model.

    Attributes:
        place: As the user named it.
        header: Shape and dtype by tensor name.
        card: Its card, or None for weights from elsewhere.
        licence: SPDX identifier, or None when nothing says.
    """

    place: str
    header: dict[str, TensorInfo]
    card: Card | None
    licence: str | None
    _read: Callable[[str], torch.Tensor]
    _hash: Callable[[], str]
    _files: tuple[Path, ...] = ()

    def tensor(self, name: str) -> torch.Tensor:
        """Returns a tensor as it is stored; it may lie in a mapped file and must not be changed."""
        try:
            return self._read(name)
        except (SafetensorError, OSError) as error:
            raise _unreadable(self.place, error) from None

    @cached_property
    def sha256(self) -> str:
        """What the card says; without a card, the hash of the file, or over the hashes of several files."""
        return self.card.sha256 if self.card is not None else self._hash()

    def verify(self) -> None:
        """Hashes the file and compares with the card.

        Raises:
            CheckpointError: They differ.
        """
        if self.card is not None and self._files:
            load_card(self._files[0], check_hash=True)


def open_source(place: str | Path) -> Source:
    """Opens one model without reading its tensors.

    Args:
        place: A WEIGHTS folder, a checkpoint of a RUN, a safetensors file with or without a card, a folder with a
            sharded safetensors index, `timm:NAME`, or a state dict of torch (`.pth`; data only, read into memory).

    Raises:
        CheckpointError: Nothing is there, or it is damaged, ambiguous, or a file that can run code.
        ConfigError: timm knows no such model.
    """
    text = str(place)
    if text.startswith(TIMM):
        from momo.pretrain.timm_models import read_timm

        return _in_memory(text, read_timm(text.removeprefix(TIMM)))
    path = Path(place)
    if path.is_dir():
        path = _file_in(path)
    if not path.is_file():
        raise CheckpointError(
            "the weights are not there",
            seen=path,
            rule="a weights folder, a safetensors file, or timm:NAME",
            fix="check the path; checkpoints of a run are RUN/checkpoints/samples-...",
        )
    if path.name.endswith(INDEX_SUFFIX):
        return _open_sharded(text, path)
    if path.suffix == ".safetensors":
        return _open_files(text, [path], _card_of(path))
    from momo.pretrain.foreign import read_path

    return _in_memory(text, read_path(path))


def _file_in(folder: Path) -> Path:
    if (folder / CONFIG_NAME).is_file() and (folder / "checkpoints").is_dir():
        raise CheckpointError(
            "this is a run, not a checkpoint",
            seen=folder,
            rule="one set of weights is merged",
            fix="choose a checkpoint with momo select, or name RUN/checkpoints/samples-...",
        )
    if (folder / TENSORS_NAME).is_file():
        return folder / TENSORS_NAME
    found = sorted(folder.glob(f"*{INDEX_SUFFIX}")) or sorted(folder.glob("*.safetensors"))
    if len(found) != 1:
        raise CheckpointError(
            "it is not clear which weights are meant",
            seen=f"{folder} holds {', '.join(path.name for path in found[:5]) or 'no safetensors file'}",
            rule=f"{TENSORS_NAME}, one safetensors file, or one index of shards",
            fix="give the file itself",
        )
    return found[0]


def _card_of(path: Path) -> Card | None:
    card = path.parent / CARD_NAME if path.name == TENSORS_NAME else path.with_suffix(".card.json")
    return load_card(path) if card.is_file() else None


def _open_sharded(place: str, index: Path) -> Source:
    try:
        named = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted({index.parent / str(name) for name in named.values()})
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            "the index of shards cannot be read",
            seen=f"{index}: {error!r}",
            rule="JSON with weight_map: {tensor: file}",
            fix="download or copy it again",
        ) from None
    if missing := [path.name for path in files if not path.is_file()]:
        raise CheckpointError(
            "shards are missing",
            seen=f"{index} names {', '.join(missing[:5])}",
            rule="every file of the index lies beside it",
            fix="download or copy them",
        )
    source = _open_files(place, files, None)
    if different := sorted(set(named) ^ set(source.header)):
        raise CheckpointError(
            "the index and its shards differ",
            seen=f"{index}: {', '.join(different[:5])}",
            rule="the index names every tensor of the shards and no other",
            fix="download or copy both again",
        )
    return source


def _open_files(place: str, files: list[Path], card: Card | None) -> Source:
    header: dict[str, TensorInfo] = {}
    readers: dict[str, Any] = {}
    for path in files:
        try:
            reader: Any = safe_open(path, framework="pt")
            slices = {name: reader.get_slice(name) for name in reader.keys()}  # noqa: SIM118 - not a dict
            header |= {name: TensorInfo(tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
            readers |= dict.fromkeys(slices, reader)
        except (SafetensorError, OSError) as error:
            raise _unreadable(str(path), error) from None
    return Source(
        place=place,
        header=header,
        card=card,
        licence=None if card is None else card.licence,
        _read=lambda name: readers[name].get_tensor(name),
        _hash=lambda: sha256_file(files[0]) if len(files) == 1 else sha256_json([sha256_file(path) for path in files]),
        _files=tuple(files),
    )


def _in_memory(place: str, found: Any) -> Source:
    header = {name: TensorInfo(tuple(t.shape), _DTYPES.get(t.dtype, str(t.dtype))) for name, t in found.tensors.items()}
    return Source(
        place=place,
        header=header,
        card=None,
        licence=found.licence,
        _read=found.tensors.__getitem__,
        _hash=lambda: str(found.sha256),
    )


def _unreadable(place: str, error: Exception) -> CheckpointError:
    return CheckpointError(
        "the weights file cannot be read",
        seen=f"{place}: {error}",
        rule="it is a complete safetensors file",
        fix="copy or download it again",
    )
