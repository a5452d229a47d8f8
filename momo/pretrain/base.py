"""`momo pretrain init`: the shared base that the runs of all sensors start from.

The encoder comes from a timm model, a file or a seed; the decoder from the file, or from the seed, once, so that all
runs and their merge share it. What was taken, changed, dropped and drawn is printed and stands in the card.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from timm.models import adapt_input_conv

from ..config import one_of, option, positive
from ..errors import CheckpointError, ConfigError
from ..files import atomic_folder
from ..models import SIZES, Architecture, build_mae
from ..normalise import POLICIES, Normalisation
from ..weights import CARD_NAME, Card, save_weights
from .foreign import Source, read_path, refuse, tensor_problems
from .timm_models import read_timm

DECODERS = ("auto", "file", "seed")
_FINAL_NORM = ("norm.weight", "norm.bias")
_PATCH, _POSITIONS, _DECODER_POSITIONS = "patch_embed.proj.weight", "pos_embed", "decoder_pos_embed"


@dataclass(kw_only=True)
class InitConfig:
    """One base: a WEIGHTS folder with the encoder and the decoder that every sensor's run starts from."""

    out: str = option(help="WEIGHTS folder to make")
    timm: str | None = option(
        None, "timm model to start from: vit_base_patch16_224.augreg_in21k, hf-hub:owner/name, ..."
    )
    file: str | None = option(None, "file or folder to start from: timm's, the MAE paper's, MOMO's or momo's weights")
    seed: int = option(0, "seed of what the source has not: the decoder, or everything without timm and file")
    size: str | None = option(None, f"one of {', '.join(SIZES)}; null: the source's, without a source base")
    image_size: int | None = option(None, "input side in pixels; null: the source's, without a source 224")
    patch_size: int | None = option(None, "patch side in pixels; null: the source's, without a source 16")
    in_chans: int = option(1, "1 (grey; RGB weights are summed over their channels) or 3 (grey repeated)")
    layer_norm_eps: float | None = option(None, "null: the source's; MOMO's files 1e-5, all others 1e-6")
    decoder: str = option("auto", "auto (the file's when it fits, else from the seed), file (refuse otherwise) or seed")
    normalisation: str = option("per_tile_zscore", "how the base wants its input when it is used as it is")
    licence: str | None = option(None, "SPDX identifier; null: the timm model's or card's, without a source CC-BY-4.0")

    def __post_init__(self) -> None:
        one_of("decoder", self.decoder, DECODERS)
        one_of("normalisation", self.normalisation, POLICIES)
        if self.size is not None:
            one_of("size", self.size, list(SIZES))
        if self.layer_norm_eps is not None:
            positive(layer_norm_eps=self.layer_norm_eps)
        if self.in_chans not in (1, 3):
            raise ConfigError("in_chans is out of range", seen=self.in_chans, rule="1 or 3")
        if self.timm is not None and self.file is not None:
            raise ConfigError(
                "a base has one source",
                seen=f"timm={self.timm} and file={self.file}",
                rule="timm or file, or neither (a seed only)",
            )
        if self.normalisation == "sensor_zscore":
            raise ConfigError(
                "a base has no sensor",
                seen="normalisation=sensor_zscore",
                rule="its constants belong to one corpus",
                fix="name another policy here; the runs that start from the base choose their own",
            )


@dataclass
class Base:
    """A base in the making.

    Attributes:
        architecture: Shapes of the result.
        tensors: Every key of the autoencoder's `state_dict()`.
        taken: Names that came from the source.
        adapted: What was changed on the way, in words.
        fresh: Names drawn from the seed although there is a source.
        dropped: Names of the source that were left out.
        decoder: `file` or `seed`.
    """

    architecture: Architecture
    tensors: dict[str, torch.Tensor]
    taken: list[str] = field(default_factory=list)
    adapted: list[str] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    decoder: str = "seed"


def init(config: InitConfig) -> Path:
    """Makes the shared base and prints what it consists of.

    Args:
        config: Source and shapes; the same configuration and source give the same bytes.

    Returns:
        The WEIGHTS folder.

    Raises:
        ConfigError: An option contradicts the source, or a licence is missing.
        CheckpointError: The source cannot be read or does not fit momo's encoder.
        DataError: `out` exists.
    """
    source = _read_source(config)
    licence = _licence(config, source)
    base = make_base(config, source)
    with atomic_folder(Path(config.out)) as folder:
        sha256 = save_weights(folder, base.tensors, _card(config, source, base, licence))
    print(_summary(config, source, base, licence, sha256))
    return Path(config.out)


def make_base(config: InitConfig, source: Source | None) -> Base:
    """Builds the tensors of the base: from the source where it has them, else from the seed.

    Raises:
        ConfigError: An option contradicts the source.
        CheckpointError: The source does not fit momo's encoder, or `decoder=file` and its decoder does not fit.
    """
    if source is None:
        architecture = Architecture(
            size=config.size or "base",
            image_size=config.image_size or 224,
            patch_size=config.patch_size or 16,
            in_chans=config.in_chans,
            layer_norm_eps=config.layer_norm_eps or 1e-6,
        )
        return Base(architecture, dict(build_mae(architecture, seed=config.seed).state_dict()))
    origin = _origin(source)
    if config.size not in (None, origin.size):
        raise ConfigError("size contradicts the source", seen=f"size={config.size}, {source.name} is {origin.size}")
    architecture = Architecture(
        size=origin.size,
        image_size=config.image_size or origin.image_size,
        patch_size=config.patch_size or origin.patch_size,
        in_chans=config.in_chans,
        layer_norm_eps=config.layer_norm_eps or source.layer_norm_eps,
    )
    base = Base(architecture, dict(build_mae(architecture, seed=config.seed).state_dict()), dropped=source.dropped[:])
    base.adapted += source.notes
    _take_encoder(base, source, origin)
    _take_decoder(base, source, config.decoder)
    return base


def _read_source(config: InitConfig) -> Source | None:
    if config.timm is not None:
        return read_timm(config.timm)
    if config.file is None:
        return None
    path = Path(config.file)
    if (path / "config.json").is_file() and not (path / CARD_NAME).is_file():
        return read_timm(f"local-dir:{path}")
    return read_path(path)


def _licence(config: InitConfig, source: Source | None) -> str:
    licence = config.licence or ("CC-BY-4.0" if source is None else source.licence)
    if not licence:
        raise ConfigError(
            "the licence of the source is not known",
            seen=f"file={config.file}" if config.file else f"timm={config.timm}",
            rule="weights are released under a licence that their source allows",
            fix="look it up and add licence=..., an SPDX identifier such as Apache-2.0 or CC-BY-NC-4.0",
        )
    return licence


def _origin(source: Source) -> Architecture:
    """Infers size, image and patch from the shapes of the source's tensors."""
    shapes = {name: tuple(tensor.shape) for name, tensor in source.tensors.items()}
    patch, positions, cls = shapes.get(_PATCH, ()), shapes.get(_POSITIONS, ()), shapes.get("cls_token", ())
    depth = 1 + max((int(m[1]) for name in shapes if (m := re.match(r"blocks\.(\d+)\.", name))), default=-1)
    problems = [
        f"{n} is missing" for n in (_PATCH, _POSITIONS, "cls_token", "blocks.0.norm1.weight") if n not in shapes
    ]
    if _PATCH in shapes and not (len(patch) == 4 and patch[1] in (1, 3) and patch[2] == patch[3] > 0):
        problems.append(f"{_PATCH} is {patch}, not (width, 1 or 3, side, side)")
    side = math.isqrt(positions[1] - 1) if len(positions) == 3 and positions[1] > 1 else 0
    if _POSITIONS in shapes and not (side and positions[1] == side * side + 1 and positions[0] == 1):
        problems.append(f"{_POSITIONS} is {positions}, not (1, 1 + a square, width): a class token and a square grid")
    if problems:
        refuse(source.name, problems, _strangers(source))
    dim = cls[-1] if cls else 0
    size = next((key for key, widths in SIZES.items() if (widths.dim, widths.depth) == (dim, depth)), None)
    if size is None:
        known = ", ".join(f"{key} ({widths.dim}, {widths.depth})" for key, widths in SIZES.items())
        raise CheckpointError(
            "the source is of no size that momo has",
            seen=f"{source.name}: width {dim}, depth {depth}",
            rule=f"width and depth are one of: {known}",
        )
    return Architecture(size=size, image_size=side * patch[2], patch_size=patch[2], in_chans=patch[1])


def _strangers(source: Source) -> set[str]:
    """Names of the source that stand neither in momo's encoder nor in its decoder."""
    block = r"blocks\.\d+\.(norm[12]|attn\.(qkv|proj)|mlp\.fc[12])\.(weight|bias)"
    known = rf"cls_token|pos_embed|patch_embed\.proj\.(weight|bias)|norm\.(weight|bias)|{block}|mask_token|decoder_.*"
    return {name for name in source.tensors if not re.fullmatch(known, name)}


def _take_encoder(base: Base, source: Source, origin: Architecture) -> None:
    """Copies the encoder, summing channels and resampling patches and positions where the shapes ask for it."""
    architecture = base.architecture
    names = [name for name in base.tensors if not _is_decoder(name)]
    tensors = {name: tensor for name, tensor in source.tensors.items() if not _is_decoder(name)}
    if not any(name in tensors for name in _FINAL_NORM):
        base.fresh += _FINAL_NORM
        names = [name for name in names if name not in _FINAL_NORM]
    wanted = {name: base.tensors[name].shape for name in names}
    wanted |= {name: tensors[name].shape for name in (_PATCH, _POSITIONS)}
    dim = architecture.widths.dim
    problems = [
        f"{name} is of width {width}, not {dim}"
        for name, width in ((_PATCH, tensors[_PATCH].shape[0]), (_POSITIONS, tensors[_POSITIONS].shape[2]))
        if width != dim
    ]
    refuse(source.name, problems + tensor_problems(tensors, wanted), tensors.keys() - wanted.keys())
    weight = adapt_input_conv(architecture.in_chans, tensors[_PATCH], base_chans=origin.in_chans)
    if architecture.in_chans != origin.in_chans:
        how = "summed" if architecture.in_chans == 1 else "spread evenly"
        base.adapted.append(f"patch embedding {how} from {origin.in_chans} to {architecture.in_chans} channel(s)")
    if architecture.patch_size != origin.patch_size:
        weight = resample_patch_embed(weight, [architecture.patch_size] * 2)
        base.adapted.append(f"patches resampled from {origin.patch_size} to {architecture.patch_size} pixels")
    positions, old, new = tensors[_POSITIONS], _grid(origin), _grid(architecture)
    if new != old:
        positions = resample_abs_pos_embed(positions, [new, new], [old, old], num_prefix_tokens=1)
        base.adapted.append(f"positions resampled from {old} x {old} to {new} x {new}")
    for name in names:
        base.tensors[name] = {_PATCH: weight, _POSITIONS: positions}.get(name, tensors[name])
    base.taken += names


def _take_decoder(base: Base, source: Source, choice: str) -> None:
    """Copies the decoder when the source has a fitting one; else the one drawn from the seed stays."""
    found = {name: tensor for name, tensor in source.tensors.items() if _is_decoder(name)}
    wanted = {name: tensor.shape for name, tensor in base.tensors.items() if _is_decoder(name)}
    positions = found.get(_DECODER_POSITIONS)
    if positions is not None and positions.shape != wanted[_DECODER_POSITIONS]:
        # They are a fixed function of the grid: the ones of the new grid stand in the new model already.
        del wanted[_DECODER_POSITIONS], found[_DECODER_POSITIONS]
        moved = f"decoder positions computed for {_grid(base.architecture)} x {_grid(base.architecture)}"
    else:
        moved = ""
    problems = tensor_problems(found, wanted) + [
        f"{name} is unexpected" for name in sorted(found.keys() - wanted.keys())
    ]
    if choice != "seed" and not problems:
        base.tensors |= found
        base.taken += wanted
        base.decoder = "file"
        base.adapted += [moved] if moved else []
        return
    if choice == "file":
        raise CheckpointError(
            "the source has no decoder that fits",
            seen=f"{source.name}: {_some(problems) if found else 'no decoder tensors'}",
            rule="decoder=file takes the whole decoder of the source",
            fix="use decoder=auto or decoder=seed to start a new one",
        )
    base.fresh += [name for name in base.tensors if _is_decoder(name)]
    if found:
        base.dropped += sorted(found)
        base.adapted.append(f"decoder not taken ({_some(problems) if choice == 'auto' else 'decoder=seed'})")


def _is_decoder(name: str) -> bool:
    return name == "mask_token" or name.startswith("decoder_")


def _grid(architecture: Architecture) -> int:
    return architecture.image_size // architecture.patch_size


def _card(config: InitConfig, source: Source | None, base: Base, licence: str) -> Card:
    method: dict[str, Any] = {"name": "init", "source": None, "seed": config.seed, "decoder": base.decoder}
    card = Card(
        kind="base",
        architecture=base.architecture.to_dict(),
        contents=["encoder", "decoder"],
        normalisation=Normalisation(policy=config.normalisation).to_dict(),
        method=method,
        licence=licence,
    )
    if source is None:
        return card
    kind = "timm" if config.timm is not None else "file"
    method |= {"source": {kind: source.name, "hashed": source.hashed}, "layer_norm_eps": _eps_words(config, source)}
    method |= {"adapted": base.adapted, "fresh": base.fresh, "dropped": base.dropped}
    card.parents = [{"role": "source", "name": source.name, "sha256": source.sha256}]
    if base.decoder == "file":
        card.objective = dict(source.objective)
    if source.card is not None:
        card.sensors, card.data_fingerprints = source.card.sensors, source.card.data_fingerprints
        card.synthetic, card.samples = source.card.synthetic, source.card.samples
    return card


def _eps_words(config: InitConfig, source: Source) -> str:
    return "given" if config.layer_norm_eps is not None else source.eps_reason


def _summary(config: InitConfig, source: Source | None, base: Base, licence: str, sha256: str) -> str:
    shapes = base.architecture
    parameters = sum(tensor.numel() for tensor in base.tensors.values()) / 1e6
    eps = f"LayerNorm eps {shapes.layer_norm_eps:g}" + (f" ({_eps_words(config, source)})" if source else "")
    lines = [
        (
            "source",
            f"{source.name}, sha256 of its {source.hashed} {source.sha256}" if source else f"seed {config.seed}",
        ),
        (
            "model",
            f"{shapes.size}, {shapes.image_size} px in patches of {shapes.patch_size}, {shapes.in_chans} channel(s), "
            f"{parameters:.2f} M parameters, {eps}",
        ),
    ]
    if source is not None:
        decoder = sum(_is_decoder(name) for name in base.taken)
        lines.append(("taken", f"{len(base.taken) - decoder} encoder tensors, {decoder} decoder tensors"))
        lines += [("adapted", text) for text in base.adapted]
        lines.append(("dropped", _some(base.dropped) or "nothing"))
        drawn = [*(["final norm (1 and 0)"] if "norm.weight" in base.fresh else [])]
        drawn += [f"decoder, from seed {config.seed}"] if base.decoder == "seed" else []
        lines.append(("new", ", ".join(drawn) or "nothing"))
    lines += [("licence", licence), ("base", f"{config.out}, sha256 {sha256}")]
    return "\n".join(f"{label:<9} {text}" for label, text in lines)


def _some(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
