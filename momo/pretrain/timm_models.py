"""Weights of timm models, through timm's own download route."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import Mlp
from timm.models import load_pretrained
from timm.models.vision_transformer import Attention, Block, VisionTransformer, checkpoint_filter_fn
from torch import nn

from ..errors import CheckpointError, ConfigError
from ..models import SIZES
from ..weights import sha256_tensors
from .foreign import Source, as_float32, clean_names, refuse, tensor_problems

_SPDX = {"apache-2.0": "Apache-2.0", "mit": "MIT", "cc-by-4.0": "CC-BY-4.0", "cc-by-nc-4.0": "CC-BY-NC-4.0"}


def read_timm(name: str) -> Source:
    """Builds a timm model and fills it through timm's own download (or `local-dir:`) route.

    Args:
        name: As `timm.create_model` takes it: `vit_base_patch16_224.mae`, `hf-hub:owner/name`, `local-dir:folder`.

    Raises:
        ConfigError: timm has no such model.
        CheckpointError: It cannot be downloaded, is no plain vision transformer, or its file does not fit it.
    """
    try:
        model: Any = timm.create_model(name, pretrained=False, num_classes=0)
    except Exception as error:  # timm and the hub raise many kinds; the next lines sort them
        raise _no_model(name, error) from error
    _check_plain(name, model)
    config = dict(model.pretrained_cfg)
    # Marked first: timm loads loosely when the head differs, and would leave what a file lacks at random values.
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(float("nan"))
    stored: dict[str, torch.Tensor] = {}
    notes: list[str] = []

    def record(state: Mapping[str, Any], target: nn.Module) -> dict[str, torch.Tensor]:
        found = checkpoint_filter_fn(dict(state), target)  # type: ignore[arg-type]
        before, after = state.get("pos_embed"), found.get("pos_embed")
        if before is not None and after is not None and before.shape != after.shape:
            notes.append(f"timm resampled the positions of its file from {before.shape[1]} to {after.shape[1]} tokens")
        stored.update(found)
        return found

    try:
        load_pretrained(
            model, config, num_classes=0, in_chans=model.patch_embed.proj.in_channels, filter_fn=record, strict=False
        )
    except Exception as error:
        if not stored:
            raise _not_downloaded(name, config, error) from error
    wanted = {key: tensor.shape for key, tensor in clean_names(model.state_dict(), name)[0].items()}
    tensors, dropped = clean_names(stored or model.state_dict(), name)
    dropped += sorted(key for key in tensors if key == "mask_token" or key.startswith("decoder_"))
    tensors = {key: tensor for key, tensor in tensors.items() if key not in dropped}
    refuse(name, tensor_problems(tensors, wanted), tensors.keys() - wanted.keys())
    return Source(
        name=_shown_name(name, config),
        tensors=as_float32(tensors, notes),
        sha256=sha256_tensors(tensors),
        hashed="tensors",
        dropped=dropped,
        layer_norm_eps=model.blocks[0].norm1.eps,
        eps_reason="of the timm model",
        licence=spdx(config.get("license")),
        notes=notes,
    )


def spdx(licence: str | None) -> str | None:
    """Returns the SPDX identifier of a licence as timm writes it; unknown ones become a `LicenseRef-`."""
    if not licence:
        return None
    return _SPDX.get(licence.lower(), f"LicenseRef-{re.sub('[^A-Za-z0-9.-]+', '-', licence)}")


def _check_plain(name: str, model: nn.Module) -> None:
    """Refuses a timm model whose arithmetic is not that of momo's encoder, also where no tensor name tells."""
    if type(model) is not VisionTransformer:
        problems = [f"it is a {type(model).__name__}, not a VisionTransformer"]
    elif type(model.blocks[0]) is not Block or type(model.blocks[0].attn) is not Attention:
        block = model.blocks[0]
        problems = [f"its blocks are {type(block).__name__} with {type(getattr(block, 'attn', None)).__name__}"]
    else:
        problems = [f"it has {text}" for text, wrong in _differences(model, model.blocks[0]).items() if wrong]
    if problems:
        sizes = ", ".join(f"{key} ({s.dim}, {s.depth}, {s.heads})" for key, s in SIZES.items())
        raise CheckpointError(
            "the timm model is not one that momo can start from",
            seen=f"{name}: {'; '.join(problems)}",
            rule=f"a plain ViT with class token, of width, depth and heads: {sizes}",
            fix="for example timm=vit_base_patch16_224.augreg_in21k or timm=vit_base_patch16_224.mae",
        )


def _differences(model: VisionTransformer, block: Any) -> dict[str, bool]:
    widths = (model.embed_dim, len(model.blocks), block.attn.num_heads)
    epsilons = {getattr(norm, "eps", None) for b in model.blocks for norm in (b.norm1, b.norm2)}
    identity = nn.Identity
    return {
        "no class token": model.cls_token is None,
        "no position embedding, or none for the class token": model.pos_embed is None or model.no_embed_class,
        "register tokens": model.num_reg_tokens > 0,
        "a norm before the blocks (CLIP norm_pre)": not isinstance(model.norm_pre, identity),
        "layer scale": not isinstance(block.ls1, identity),
        "qk_norm": not isinstance(block.attn.q_norm, identity),
        "norms inside the blocks": any(
            not isinstance(getattr(part, "norm", identity()), identity) for part in (block.attn, block.mlp)
        ),
        "attention pooling": model.attn_pool is not None,
        f"an MLP of kind {type(block.mlp).__name__}": type(block.mlp) is not Mlp,
        "an activation other than exact GELU": getattr(block.mlp.act, "approximate", None) != "none",
        "norms other than LayerNorm": not isinstance(block.norm1, nn.LayerNorm) or len(epsilons) > 1,
        "no bias in queries, keys and values": block.attn.qkv.bias is None,
        "patches or images that are not square": len({*model.patch_embed.patch_size}) > 1
        or len({*model.patch_embed.grid_size}) > 1,
        f"width, depth and heads {widths}": widths not in [(s.dim, s.depth, s.heads) for s in SIZES.values()],
    }


def _shown_name(name: str, config: Mapping[str, Any]) -> str:
    if name.startswith("local-dir:"):
        return f"local-dir:{Path(name.removeprefix('local-dir:')).name}"
    if ":" in name or "." in name or not config.get("tag"):
        return name
    return f"{name}.{config['tag']}"


def _no_model(name: str, error: Exception) -> ConfigError | CheckpointError:
    if name.startswith(("hf-hub:", "hf_hub:", "local-dir:")):
        return _not_downloaded(name, {"hf_hub_id": name.partition(":")[2]}, error)
    near = difflib.get_close_matches(name, timm.list_pretrained("*vit*"), n=3, cutoff=0.0)
    return ConfigError(
        "timm has no such model",
        seen=f"{name} ({str(error).splitlines()[0] if str(error) else type(error).__name__})",
        rule=f"a name that timm {timm.__version__} knows, hf-hub:owner/name or local-dir:folder",
        fix=f"did you mean {' or '.join(near)}?",
    )


def _not_downloaded(name: str, config: Mapping[str, Any], error: Exception) -> CheckpointError:
    where = config.get("hf_hub_id") or config.get("url") or name
    elsewhere = f"download the weights of {where} where there is a network, copy them here and give file=..."
    cause = f" ({error.__cause__})" if error.__cause__ is not None else ""
    reason = " ".join(f"{type(error).__name__}: {error}{cause}".split())[:400]
    return CheckpointError(
        "the timm model could not be loaded",
        seen=f"{name}: {reason}",
        rule="its weights are in the cache, or can be downloaded, whole",
        fix=elsewhere if not name.startswith("local-dir:") else "check the folder: config.json and model.safetensors",
    )
