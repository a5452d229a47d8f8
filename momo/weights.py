"""WEIGHTS: a safetensors file and the card that says what it is.

<folder>/model.safetensors   tensors; the card without its own hash stands in the metadata too
<folder>/card.json           the card with the file's sha256; written last, so what has a card is whole
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .errors import CheckpointError
from .files import atomic_file, sha256_file, write_json
from .version import __version__

FORMAT_VERSION = 1
TENSORS_NAME = "model.safetensors"
CARD_NAME = "card.json"


@dataclass(kw_only=True)
class Card:
    """What a weights file is, where it came from and how to feed it.

    Attributes:
        kind: `checkpoint` (of a run), `merged` or `base`.
        architecture: Fields of `momo.models.Architecture`.
        contents: Which parts are inside: `encoder`, `decoder`.
        objective: `mask_ratio` and `norm_pix_loss` of the training loss; needed to read the decoder's output.
        normalisation: Fields of `momo.normalise.Normalisation`; `sensor_zscore` constants per sensor are in `sensors`.
        sensors: One entry a sensor: `name`, `gsd_m` (metres a pixel), `tiles` (training tiles).
        data_fingerprints: Fingerprint of every corpus the weights were trained on, by sensor.
        synthetic: True when any of the training data was generated rather than measured.
        samples: Training samples seen (for a merge: None).
        val_loss: `loss`, `stderr`, `count`, `protocol` (hash of masks, normalisation and loss) and `per_sensor`.
        parents: `role`, `name` and `sha256` of each weights file this one was made from. Roles: `base` and
            `checkpoint` (of a run or a merge), `source` (what `momo pretrain init` took a base from).
        method: Merge method and its coefficients, or how a base was made (`init`), or None.
        licence: SPDX identifier of the weights.
        sha256: Hash of the tensors file; empty inside the file itself.
        momo_version: Version that wrote the file.
        format_version: Version of this card's layout.
    """

    kind: str
    architecture: dict[str, Any]
    contents: list[str]
    normalisation: dict[str, Any]
    objective: dict[str, Any] = field(default_factory=dict)
    sensors: list[dict[str, Any]] = field(default_factory=list)
    data_fingerprints: dict[str, str] = field(default_factory=dict)
    synthetic: bool = False
    samples: int | None = None
    val_loss: dict[str, Any] | None = None
    parents: list[dict[str, Any]] = field(default_factory=list)
    method: dict[str, Any] | None = None
    licence: str = "CC-BY-4.0"
    sha256: str = ""
    momo_version: str = __version__
    format_version: int = FORMAT_VERSION

    def to_dict(self) -> dict[str, Any]:
        """Returns the card as plain values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any], source: object) -> Card:
        """Builds a card from plain values.

        Raises:
            CheckpointError: A field is missing or unknown, or the layout is of another version.
        """
        if not isinstance(fields, dict):
            raise CheckpointError("the card cannot be read", seen=source, rule="it is one JSON object")
        if fields.get("format_version") != FORMAT_VERSION:
            raise CheckpointError(
                "the card has another format version",
                seen=f"{fields.get('format_version')} in {source}",
                rule=f"this momo ({__version__}) reads version {FORMAT_VERSION}",
                fix="use the momo version named in the card",
            )
        try:
            return cls(**fields)
        except TypeError as error:
            raise CheckpointError("the card cannot be read", seen=f"{source}: {error}") from None

    @property
    def base_sha256(self) -> str | None:
        """Hash of the base these weights were trained from, or None."""
        return next((parent["sha256"] for parent in self.parents if parent["role"] == "base"), None)


def weights_paths(path: Path) -> tuple[Path, Path]:
    """Returns the tensors file and the card file that `path` (a folder or a safetensors file) stands for.

    Raises:
        CheckpointError: One of the two does not exist.
    """
    path = Path(path)
    tensors = path / TENSORS_NAME if path.is_dir() else path
    card = tensors.parent / CARD_NAME if tensors.name == TENSORS_NAME else tensors.with_suffix(".card.json")
    for wanted in (tensors, card):
        if not wanted.is_file():
            raise CheckpointError(
                "the weights are not there or not complete",
                seen=wanted,
                rule=f"a weights folder holds {TENSORS_NAME} and {CARD_NAME}",
                fix="give a checkpoint folder such as RUN/checkpoints/samples-000400000",
            )
    return tensors, card


def save_weights(folder: Path, tensors: dict[str, torch.Tensor], card: Card) -> str:
    """Writes tensors and card into an existing folder, the card last.

    Args:
        folder: Where to write.
        tensors: Name to tensor; written contiguous and on the CPU, in name order.
        card: Its `sha256` is filled in.

    Returns:
        The SHA-256 of the tensors file.

    Raises:
        CheckpointError: A tensor holds NaN or infinity.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CheckpointError(
                "refusing to write weights that are not finite",
                seen=name,
                rule="every value is a finite number",
                fix="look at the last lines of metrics.jsonl; lower the learning rate or use fp32",
            )
    card.sha256 = ""
    metadata = {"format": "pt", "momo_card": json.dumps(card.to_dict(), sort_keys=True)}
    ready = {name: tensors[name].detach().cpu().contiguous().clone() for name in sorted(tensors)}
    with atomic_file(folder / TENSORS_NAME) as partial:
        save_file(ready, partial, metadata=metadata)
        _sort_metadata(partial)
    card.sha256 = sha256_file(folder / TENSORS_NAME)
    write_json(folder / CARD_NAME, card.to_dict())
    return card.sha256


def sha256_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """Returns the SHA-256 over names, dtypes, shapes and values, in name order, of tensors that have no single file."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _sort_metadata(path: Path) -> None:
    """Sorts the metadata keys: safetensors writes them in random order, and the file's hash must repeat."""
    with open(path, "rb+") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > length:
            raise CheckpointError("the safetensors header grew", seen=path, rule="reordering keeps its length")
        stream.seek(8)
        stream.write(text.ljust(length))


def load_card(path: Path, *, check_hash: bool = False) -> Card:
    """Reads the card of a weights folder or file.

    Args:
        path: Folder or safetensors file.
        check_hash: Also hash the tensors file and compare.

    Raises:
        CheckpointError: Files are missing or unreadable, or the hash differs.
    """
    tensors, card_path = weights_paths(path)
    try:
        card = Card.from_dict(json.loads(card_path.read_text(encoding="utf-8")), card_path)
    except json.JSONDecodeError as error:
        raise CheckpointError("the card is not JSON", seen=f"{card_path}: {error}") from None
    if check_hash and (found := sha256_file(tensors)) != card.sha256:
        raise CheckpointError(
            "the weights file was altered or damaged",
            seen=f"{tensors} has sha256 {found[:12]}...",
            rule=f"its card says {card.sha256[:12]}...",
            fix="copy or train it again",
        )
    return card


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of one stored tensor, read from the header alone."""

    shape: tuple[int, ...]
    dtype: str


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Reads names, shapes and dtypes without reading tensor data.

    Raises:
        CheckpointError: The file is not a whole safetensors file.
    """
    tensors, _ = weights_paths(path)
    try:
        with safe_open(tensors, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            return {name: TensorInfo(tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
    except (SafetensorError, OSError) as error:
        raise _unreadable(tensors, error) from None


def load_weights(
    path: Path, *, expected: dict[str, torch.Tensor] | None = None, check_hash: bool = True
) -> tuple[dict[str, torch.Tensor], Card]:
    """Reads the tensors and card of a weights folder or file.

    Args:
        path: Folder or safetensors file.
        expected: When given, these names with these shapes must be there and only they are read, so that an encoder
            can be taken out of a whole autoencoder. None reads everything.
        check_hash: Compare the file's hash with the card's.

    Raises:
        CheckpointError: Damaged file, other hash, or a missing or misshapen tensor (all are listed).
    """
    card = load_card(path, check_hash=check_hash)
    tensors_path, _ = weights_paths(path)
    if expected is not None:
        header = read_header(path)
        problems = [f"{name} is missing" for name in expected if name not in header]
        problems += [
            f"{name} is {header[name].shape}, not {tuple(tensor.shape)}"
            for name, tensor in expected.items()
            if name in header and header[name].shape != tuple(tensor.shape)
        ]
        if problems:
            shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
            raise CheckpointError(
                "the weights do not fit the model",
                seen=f"{tensors_path}: {shown}",
                rule="every tensor of the model is in the file with its shape",
                fix="check model.size, image_size, patch_size and in_chans against the card",
            )
    try:
        with safe_open(tensors_path, framework="pt") as file:
            names = list(expected) if expected is not None else list(file.keys())
            return {name: file.get_tensor(name) for name in names}, card
    except (SafetensorError, OSError) as error:
        raise _unreadable(tensors_path, error) from None


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        "the weights file cannot be read",
        seen=f"{path}: {error}",
        rule="it is a complete safetensors file",
        fix="copy or train it again",
    )
