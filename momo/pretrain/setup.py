"""What a job needs before the first step, checked once in the launching process and built again in every rank."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from ..config import to_dict, to_yaml
from ..errors import CheckpointError, ConfigError
from ..files import write_text
from ..models import Architecture, MaskedAutoencoder, build_mae, load_mae
from ..models.mae import compile_blocks
from ..models.objective import make_objective
from ..runs import CONFIG_NAME
from ..weights import Card, load_card
from .checkpoint import check_same_run
from .config import PretrainConfig
from .data import Sources


@dataclass(frozen=True)
class Start:
    """The weights a run starts from.

    Attributes:
        model: The autoencoder with the base's or the seed's weights.
        parents: `Card.parents` of every checkpoint of the run.
        synthetic: True when the base was trained on generated data.
        licence: SPDX identifier of the base; without one, of weights that are nobody else's.
    """

    model: MaskedAutoencoder
    parents: list[dict[str, Any]]
    synthetic: bool
    licence: str = "CC-BY-4.0"


def resolve_architecture(config: PretrainConfig, tile_size: int) -> Architecture:
    """Joins the base's card, the model options and the tile size into one architecture.

    Raises:
        ConfigError: An option contradicts the base, or the input is not the tile.
        CheckpointError: The base is missing or damaged.
    """
    options = config.model
    given: dict[str, Any] = {
        "size": options.size,
        "image_size": options.image_size,
        "patch_size": options.patch_size,
        "in_chans": options.in_chans,
    }
    given = {key: value for key, value in given.items() if value is not None}
    if config.base is None:
        architecture = Architecture(**{"image_size": tile_size, **given})
    else:
        architecture = Architecture.from_dict(load_card(Path(config.base)).architecture)
        for key, value in given.items():
            if getattr(architecture, key) != value:
                raise ConfigError(
                    f"model.{key} contradicts the base",
                    seen=f"{value}, the base has {getattr(architecture, key)}",
                    rule="a run keeps the shapes of its base, or the two cannot be merged",
                    fix=f"leave model.{key} out, or give another base",
                )
    if architecture.image_size != tile_size:
        raise ConfigError(
            "the input size is not the tile size",
            seen=f"image_size={architecture.image_size}, tiles of {tile_size} pixels",
            rule="tiles are used as they are, without resampling",
            fix=f"run momo prep with tile_size={architecture.image_size}, or use model.image_size={tile_size}",
        )
    return architecture


def make_start(config: PretrainConfig, tile_size: int) -> Start:
    """Builds the model with the weights the run starts from."""
    options = config.model
    architecture = resolve_architecture(config, tile_size)
    if config.base is None:
        model = build_mae(
            architecture, seed=config.seed, mask_ratio=options.mask_ratio, norm_pix_loss=options.norm_pix_loss
        )
        return Start(model, [], False)
    model, card = load_mae(Path(config.base), mask_ratio=options.mask_ratio, norm_pix_loss=options.norm_pix_loss)
    if "decoder" not in card.contents:
        raise CheckpointError("the base has no decoder", seen=config.base, rule="pretraining needs both parts")
    parent = {"role": "base", "name": Path(config.base).name, "sha256": card.sha256}
    return Start(model, [parent], card.synthetic, card.licence)


def make_model(
    config: PretrainConfig, sources: Sources, reference: MaskedAutoencoder, device: torch.device
) -> MaskedAutoencoder:
    """Makes the model that is trained, with the weights of `reference`, and gives both the loss of the configuration.

    Args:
        config: The job.
        sources: Its corpora; their normalisation bounds the network's input.
        reference: float32 weights on `device`.
        device: Where to train.
    """
    options = config.model
    patch_size = reference.architecture.patch_size
    objective = make_objective(
        config.loss,
        patch_size=patch_size,
        norm_pix_loss=options.norm_pix_loss,
        limit=sources.normalisations[0].limit,
        device=device,
    )
    # Not registered: an objective's weights are no part of the model's.
    object.__setattr__(reference, "objective", objective)
    model = MaskedAutoencoder(
        reference.architecture,
        mask_ratio=options.mask_ratio,
        norm_pix_loss=options.norm_pix_loss,
        objective=objective,
        attention=options.attention,
        activation_checkpointing=options.activation_checkpointing,
    )
    model.load_state_dict(reference.state_dict())
    model.to(device)
    if options.compile:
        compile_blocks(model)
    return model


def make_card(config: PretrainConfig, sources: Sources, start: Start) -> Card:
    """Makes the card that every checkpoint of the run shares."""
    single = sources.normalisations[0].to_dict()
    if len(sources.corpora) > 1:
        single |= {"mean": None, "std": None}
    return Card(
        kind="checkpoint",
        architecture=start.model.architecture.to_dict(),
        contents=["encoder", "decoder"],
        normalisation=single,
        objective=_objective(config, start.model),
        sensors=sources.card_sensors(),
        data_fingerprints={corpus.sensor: corpus.manifest.fingerprint for corpus in sources.corpora},
        synthetic=start.synthetic or any(corpus.manifest.synthetic for corpus in sources.corpora),
        parents=start.parents,
        licence=config.licence or start.licence,
    )


def _objective(config: PretrainConfig, model: MaskedAutoencoder) -> dict[str, Any]:
    """What the loss is; the weights of its terms only where it joins several, so that older cards compare as before."""
    weights = {"mse": config.loss.mse, "ssim": config.loss.ssim, "lpips": config.loss.lpips}
    weights = {name: weight for name, weight in (weights | {"gradient": config.loss.gradient}).items() if weight}
    plain = {"mask_ratio": model.mask_ratio, "norm_pix_loss": model.norm_pix_loss}
    return plain if weights == {"mse": 1.0} else plain | {"loss": weights}


# Beside the batch arithmetic, what the train options say.
_RESERVED = ("optimizer", "scheduler", "bf16", "fp16", "data_types", "torch_autocast")


def engine_config(config: PretrainConfig) -> dict[str, Any]:
    """Returns DeepSpeed's configuration: the user's JSON with batch arithmetic, clipping and precision filled in.

    Half precision needs an optimizer with float32 masters, which DeepSpeed has from stage 1 on: stage 0 becomes 1
    where momo's own does not do (`keeps_own_masters`).

    Raises:
        ConfigError: The file is missing or not JSON, sets what momo fills in, or asks for what cannot be.
    """
    settings: dict[str, Any] = {}
    if config.deepspeed is not None:
        settings = _read_settings(Path(config.deepspeed))
    precision = config.train.precision
    filled: dict[str, Any] = {
        "train_batch_size": config.train.batch_size,
        "train_micro_batch_size_per_gpu": config.micro_batch,
        "gradient_accumulation_steps": config.accumulation,
        "gradient_clipping": config.train.clip_grad,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if precision != "fp32":
        filled |= {precision: {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    reserved = [key for key in (*filled, *_RESERVED) if key in settings]
    if reserved:
        raise ConfigError(
            "the DeepSpeed file sets what momo fills in",
            seen=", ".join(dict.fromkeys(reserved)),
            rule="batch sizes, optimizer, schedule, clipping and precision come from the train options",
            fix="remove these keys from the JSON",
        )
    zero = {"stage": 0} | _zero_section(settings)
    if zero["stage"] not in (0, 1, 2, 3):
        raise ConfigError("the ZeRO stage is not supported", seen=zero["stage"], rule="0, 1, 2 or 3")
    offloads = [
        key for key in ("offload_optimizer", "offload_param") if zero.get(key, {}).get("device", "none") != "none"
    ]
    if offloads and zero["stage"] < (3 if "offload_param" in offloads else 1):
        raise ConfigError(
            "the ZeRO stage cannot offload",
            seen=f"stage {zero['stage']} with {', '.join(offloads)}",
            rule="offload_optimizer needs stage 1, 2 or 3, offload_param stage 3",
            fix="raise zero_optimization.stage, or remove the offload section",
        )
    if precision == "fp32" or zero["stage"] > 0:
        return settings | filled | {"zero_optimization": zero}
    if keeps_own_masters(config):
        own = {key: value for key, value in filled.items() if key not in _HALF_KEYS}
        own["gradient_clipping"] = 0.0
        return settings | own | {"zero_optimization": zero}
    return settings | filled | {"zero_optimization": zero | {"stage": 1}}


_HALF_KEYS = ("bf16", "fp16", "data_types")


def keeps_own_masters(config: PretrainConfig) -> bool:
    """Says whether bf16 at stage 0 has momo's own float32 masters: on one rank, with one micro-batch a step.

    Sums over micro-batches and ranks have to be float32 too, and fp16 needs a loss scale; DeepSpeed has all that from
    stage 1 on.
    """
    return config.train.precision == "bf16" and config.accumulation == 1 and config.world == 1


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            "the DeepSpeed file does not exist", seen=path, fix="examples are in configs/deepspeed"
        ) from None
    except json.JSONDecodeError as error:
        raise ConfigError("the DeepSpeed file is not JSON", seen=f"{path}: {error}") from None
    if not isinstance(settings, dict):
        raise ConfigError("the DeepSpeed file is not a mapping", seen=path, rule="top level is {...}")
    return settings


def _zero_section(settings: dict[str, Any]) -> dict[str, Any]:
    section = settings.get("zero_optimization", {})
    if not isinstance(section, dict):
        raise ConfigError("zero_optimization is not a mapping", seen=section, rule='it looks like {"stage": 1}')
    return section


def store_config(config: PretrainConfig) -> list[str]:
    """Writes the resolved configuration into the run, or compares it with the one that is there.

    Returns:
        Lines about changes that are allowed and alter the arithmetic.
    """
    path = Path(config.out) / CONFIG_NAME
    if path.is_file():
        return check_same_run(yaml.safe_load(path.read_text(encoding="utf-8")), to_dict(config), config)
    write_text(path, to_yaml(config))
    return []
