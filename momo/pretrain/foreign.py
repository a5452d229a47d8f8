"""Weights files that others made, read as data: the MAE paper's, MOMO's, timm's and other state dicts.

A pickle is read by `torch.load(weights_only=True)` with `ALLOWED_GLOBALS` and nothing else. Names come out as momo's
(they are timm's); whether the shapes fit is for `momo.pretrain.base` to say.
"""

from __future__ import annotations

import argparse
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..errors import CheckpointError
from ..files import sha256_file
from ..weights import CARD_NAME, TENSORS_NAME, Card, load_weights

# The published files of MOMO and training checkpoints of the MAE paper hold their command line as a Namespace.
ALLOWED_GLOBALS: list[Any] = [argparse.Namespace]
PICKLE_SUFFIXES = (".pth", ".pt", ".bin")
_WRAPPERS = ("module.", "_orig_mod.", "encoder.", "backbone.")
_NOT_ENCODER = ("head.", "head_dist.", "fc_norm.", "pre_logits.", "lpips_fn.")
_MOMO_ARGUMENTS = ("which_instrument", "model_combinations")
_FEATURES = {
    r"reg_token|register_tokens": "register tokens",
    r"\.(ls1|ls2|gamma_1|gamma_2|gamma)(\.|$)": "layer scale",
    r"\.(q_norm|k_norm)\.": "normalised queries and keys (qk_norm)",
    r"^norm_pre\.|ln_pre": "a norm before the blocks (CLIP)",
    r"^attn_pool\.": "attention pooling",
    r"dist_token": "a distillation token",
    r"rope|relative_position|rel_pos": "rotary or relative positions",
    r"\.(attn\.norm|mlp\.norm)\.": "norms inside the blocks",
    r"^(visual|vision_model)\.": "CLIP's own names",
}


@dataclass(kw_only=True)
class Source:
    """Tensors of one source under momo's names, float32 on the CPU.

    Attributes:
        name: As it stands in the card, without folders.
        tensors: Encoder and, when there is one, decoder tensors.
        sha256: Hash of the file, or of the tensors when there is no single file (see `hashed`).
        hashed: `file` or `tensors`.
        dropped: Names that were left out on purpose: heads, perceptual networks, optimizer.
        layer_norm_eps: Epsilon the weights were trained with.
        eps_reason: Where that number comes from.
        licence: SPDX identifier when the source names one.
        objective: `Card.objective` of the decoder inside, when known.
        notes: What the reader changed.
        card: The card, when the source is WEIGHTS of momo.
    """

    name: str
    tensors: dict[str, torch.Tensor]
    sha256: str
    hashed: str
    dropped: list[str]
    layer_norm_eps: float
    eps_reason: str
    licence: str | None = None
    objective: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    card: Card | None = None


def read_path(path: Path) -> Source:
    """Reads a weights file or folder: WEIGHTS of momo, or a state dict.

    Raises:
        CheckpointError: It is missing, damaged, holds more than data, or holds no state dict.
    """
    if path.is_dir():
        if (path / CARD_NAME).is_file():
            return _read_weights(path)
        path = _only_file(path)
    if not path.is_file():
        raise CheckpointError("the weights file does not exist", seen=path, fix="check the path after file=")
    if path.suffix == ".safetensors":
        own = path.parent / CARD_NAME if path.name == TENSORS_NAME else path.with_suffix(".card.json")
        if own.is_file():
            return _read_weights(path)
    state, arguments, others = _state_dict(_load(path), path)
    tensors, dropped = clean_names(state, path.name)
    notes: list[str] = []
    eps, reason = 1e-6, "timm's and the MAE paper's; the file does not say"
    if any(hasattr(arguments, key) for key in _MOMO_ARGUMENTS):
        eps, reason = 1e-5, "of MOMO's autoencoder, whose options stand in the file"
    objective = {key: getattr(arguments, key, None) for key in ("mask_ratio", "norm_pix_loss")}
    known = isinstance(objective["mask_ratio"], float) and isinstance(objective["norm_pix_loss"], bool)
    return Source(
        name=path.name,
        tensors=as_float32(tensors, notes),
        sha256=sha256_file(path),
        hashed="file",
        dropped=dropped + others,
        layer_norm_eps=eps,
        eps_reason=reason,
        objective=objective if known else {},
        notes=notes,
    )


def clean_names(state: Mapping[str, torch.Tensor], where: str) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Strips the prefixes of wrappers and takes out what belongs to no autoencoder (classifier heads, LPIPS).

    Returns:
        The remaining tensors under their short names, and the sorted names that were taken out.

    Raises:
        CheckpointError: Two names become the same one.
    """
    kept: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        short = name
        while (prefix := next((p for p in _WRAPPERS if short.startswith(p)), None)) is not None:
            short = short.removeprefix(prefix)
        if short in kept:
            raise CheckpointError(
                "two tensors have the same name once prefixes are stripped",
                seen=f"{short} (from {name} and another) in {where}",
                rule=f"prefixes {', '.join(_WRAPPERS)} wrap one model",
                fix="save the state dict of the encoder alone",
            )
        kept[short] = tensor
    dropped = sorted(name for name in kept if name.startswith(_NOT_ENCODER))
    return {name: tensor for name, tensor in kept.items() if name not in dropped}, dropped


def tensor_problems(tensors: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Size]) -> list[str]:
    """Lists what is missing, misshapen or no finite floating-point tensor among the wanted names."""
    problems = []
    for name, shape in wanted.items():
        tensor = tensors.get(name)
        if tensor is None:
            problems.append(f"{name} is missing")
        elif tensor.shape != shape:
            problems.append(f"{name} is {tuple(tensor.shape)}, not {tuple(shape)}")
        elif not tensor.is_floating_point():
            problems.append(f"{name} is {tensor.dtype}, not floating point")
        elif not torch.isfinite(tensor).all():
            problems.append(f"{name} holds NaN or infinity")
    return problems


def refuse(where: object, problems: list[str], unexpected: set[str]) -> None:
    """Raises one error that lists every problem and every unexpected name, with the feature that explains it."""
    problems = problems + [f"{name} is unexpected" for name in sorted(unexpected)]
    if not problems:
        return
    names = " ".join(problems)
    features = [text for pattern, text in _FEATURES.items() if any(re.search(pattern, name) for name in unexpected)]
    if "cls_token is missing" in names:
        features.append("no class token")
    why = f" (this model has {', '.join(features)}, which momo's encoder has not)" if features else ""
    raise CheckpointError(
        f"the source does not fit momo's encoder{why}",
        seen=f"{where}: {'; '.join(problems)}",
        rule="every encoder tensor is there with its shape and nothing else but heads and a decoder",
        fix="give a plain ViT with class token (timm vit_tiny/small/base/large), or convert the names first",
    )


def _read_weights(path: Path) -> Source:
    tensors, card = load_weights(path)
    return Source(
        name=path.name if path.is_dir() else path.stem,
        tensors=tensors,
        sha256=card.sha256,
        hashed="file",
        dropped=[],
        layer_norm_eps=card.architecture["layer_norm_eps"],
        eps_reason="of its card",
        licence=card.licence,
        objective=card.objective,
        card=card,
    )


def _only_file(folder: Path) -> Path:
    found = sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", *PICKLE_SUFFIXES))
    if len(found) != 1:
        raise CheckpointError(
            "the folder does not name one weights file",
            seen=f"{folder}: {', '.join(p.name for p in found) or 'none'}",
            rule=f"{CARD_NAME} (momo), config.json (timm), or exactly one .safetensors, {', '.join(PICKLE_SUFFIXES)}",
            fix="give the file itself",
        )
    return found[0]


def _load(path: Path) -> Any:
    if path.suffix not in (".safetensors", *PICKLE_SUFFIXES):
        raise CheckpointError(
            "the weights file is of an unknown kind",
            seen=path,
            rule=f"one of .safetensors, {', '.join(PICKLE_SUFFIXES)}",
            fix="load it with timm and save its state dict as safetensors",
        )
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(ALLOWED_GLOBALS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            "the file holds more than data and was not read",
            seen=f"{path}: {_foreign_globals(path) or str(error).splitlines()[0]}",
            rule=f"tensors, plain values and {_dotted(*ALLOWED_GLOBALS)} only: anything else can run code",
            fix="where it is trusted, load it there and save the state dict as safetensors",
        ) from None
    except (SafetensorError, Exception) as error:  # damaged bytes make these parsers raise almost any kind
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            "the weights file cannot be read",
            seen=f"{path}: {reason}",
            rule="it is a complete safetensors or torch file",
            fix="download or copy it again",
        ) from error


def _foreign_globals(path: Path) -> str:
    try:
        found = set(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # only files in torch's zip layout can be listed
        return ""
    return "it asks for " + ", ".join(sorted(found - {_dotted(g) for g in ALLOWED_GLOBALS}))


def _dotted(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _state_dict(content: Any, path: Path) -> tuple[dict[str, torch.Tensor], Any, list[str]]:
    """Finds the state dict in a loaded file: itself, or nested under `model` or `state_dict`."""
    arguments, others = None, []
    while isinstance(content, Mapping) and (
        inner := next((key for key in ("state_dict", "model") if isinstance(content.get(key), Mapping)), None)
    ):
        arguments = content.get("args", arguments)
        others += [f"{key} (not weights)" for key in content if key != inner]
        content = content[inner]
    seen = f"a {type(content).__name__}"
    if isinstance(content, Mapping):
        strange = [str(key) for key, value in content.items() if not isinstance(value, torch.Tensor)]
        if content and not strange and all(isinstance(key, str) for key in content):
            return dict(content), arguments, others
        seen = f"values that are no tensors: {', '.join(strange[:8])}" if strange else "no tensors"
    raise CheckpointError(
        "no state dict was found",
        seen=f"{path} holds {seen}",
        rule="names and tensors, by themselves or under 'model' or 'state_dict'",
        fix="save model.state_dict() alone",
    )


def as_float32(tensors: Mapping[str, torch.Tensor], notes: list[str]) -> dict[str, torch.Tensor]:
    """Converts half precision to float32 and says so in `notes`; integers stay, to be refused by name."""
    kinds = sorted({str(t.dtype) for t in tensors.values() if t.is_floating_point() and t.dtype != torch.float32})
    if kinds:
        notes.append(f"{', '.join(kinds)} converted to torch.float32")
    return {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}
