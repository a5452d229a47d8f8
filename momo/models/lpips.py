"""Learned perceptual distance, LPIPS v0.1 with AlexNet (Zhang et al. 2018, arXiv 1801.03924), as a fixed function.

The five linear heads come with the package `lpips`, the backbone is torchvision's AlexNet. Neither is part of the model
that is trained: not in its parameters, state dict, precision or checkpoints.
"""

from __future__ import annotations

import hashlib
import importlib.util
import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from ..errors import ConfigError
from ..extras import require, require_installed

BACKBONE_FILE = "alexnet-owt-7be5be79.pth"
BACKBONE_URL = f"https://download.pytorch.org/models/{BACKBONE_FILE}"
SMALLEST_IMAGE = 31
_CHANNELS = {1: 64, 4: 192, 7: 384, 9: 256, 11: 256}  # of the ReLUs compared, by their place among the layers
_FIX = f"fetch {BACKBONE_URL} where there is a network and give it as loss.lpips_backbone"


class PerceptualDistance:
    """Distance of two images in the features of a frozen AlexNet.

    A plain callable and no `nn.Module`, so that a model that holds it neither trains, casts nor saves it.

    Args:
        backbone: State dict of torchvision's AlexNet; the classifier is not needed.
        heads: State dict of the linear heads: `lin<k>.model.1.weight` of shape (1, channels, 1, 1).
        device: Where the images will be.

    Raises:
        ConfigError: A tensor is missing or has another shape.
    """

    def __init__(
        self,
        backbone: dict[str, torch.Tensor],
        heads: dict[str, torch.Tensor],
        *,
        device: torch.device | str = "cpu",
    ) -> None:
        with torch.device("meta"):
            layers = require("torchvision", "pretrain").models.alexnet(weights=None).features[: max(_CHANNELS) + 1]
        expected = {f"features.{name}": tuple(tensor.shape) for name, tensor in layers.state_dict().items()}
        kept = _take(backbone, expected, "the AlexNet weights do not fit", _FIX)
        layers.load_state_dict({name.removeprefix("features."): tensor for name, tensor in kept.items()}, assign=True)
        self._layers: nn.Sequential = layers.eval().requires_grad_(False).to(device)
        expected = {f"lin{k}.model.1.weight": (1, chans, 1, 1) for k, chans in enumerate(_CHANNELS.values())}
        linear = _take(heads, expected, "the linear heads of LPIPS do not fit", "pip install --force-reinstall lpips")
        self._heads = [tensor.reshape(-1, 1, 1).to(device) for tensor in linear.values()]
        # The constants of LPIPS, from -1..1 to what AlexNet was trained on.
        self._shift = torch.tensor([-0.030, -0.088, -0.188], device=device)[:, None, None]
        self._scale = torch.tensor([0.458, 0.448, 0.450], device=device)[:, None, None]
        self.sha256 = _digest(kept | linear)

    def __call__(self, image_BCHW: torch.Tensor, target_BCHW: torch.Tensor) -> torch.Tensor:
        """Computes the distance of each image to its target.

        Args:
            image_BCHW: float32, about -1..1, 1 (grey) or 3 channels, at least 31 pixels a side; may need gradients.
            target_BCHW: The same shape; gets no gradient.

        Returns:
            Shape (B,), float32, 0 or more.

        Raises:
            ConfigError: The images are too small.
        """
        if min(image_BCHW.shape[-2:]) < SMALLEST_IMAGE:
            raise ConfigError(
                "the images are too small for LPIPS",
                seen=f"{image_BCHW.shape[-2]} x {image_BCHW.shape[-1]} pixels",
                rule=f"AlexNet needs at least {SMALLEST_IMAGE}",
                fix="set loss.lpips=0 or use larger tiles",
            )
        with torch.no_grad():
            targets = self._features(target_BCHW)
        terms = [
            ((image - target).square() * head).sum(dim=1).mean(dim=(1, 2))
            for image, target, head in zip(self._features(image_BCHW), targets, self._heads, strict=True)
        ]
        return torch.stack(terms).sum(dim=0)

    def _features(self, image_BCHW: torch.Tensor) -> list[torch.Tensor]:
        values = (image_BCHW.float().expand(-1, 3, -1, -1) - self._shift) / self._scale
        found = []
        for place, layer in enumerate(self._layers):
            values = layer(values)
            if place in _CHANNELS:
                # Inside the root, so that the gradient stays finite where no feature is active.
                found.append(values / (values.square().sum(dim=1, keepdim=True) + 1e-8).sqrt())
        return found


def load_lpips(backbone: str | Path | None, *, device: torch.device | str = "cpu") -> PerceptualDistance:
    """Loads the heads and the backbone.

    Args:
        backbone: `.safetensors` or `.pth` file with torchvision's AlexNet weights; None: torchvision's own, from its
            cache or downloaded.
        device: Where the images will be.

    Raises:
        ConfigError: The package `lpips` or the backbone is missing, cannot be read or does not fit.
    """
    require_installed("lpips", "pretrain")
    # Its file is all that is needed; importing the package takes seconds.
    spec = importlib.util.find_spec("lpips")
    folder = Path(spec.origin).parent if spec is not None and spec.origin else Path("lpips")
    heads = _read(folder / "weights" / "v0.1" / "alex.pth", "the linear heads of LPIPS", 'pip install "momo[pretrain]"')
    weights = _download() if backbone is None else _read(Path(backbone), "the AlexNet weights", _FIX)
    return PerceptualDistance(weights, heads, device=device)


def _download() -> dict[str, torch.Tensor]:
    require_installed("torchvision", "pretrain")
    try:
        return torch.hub.load_state_dict_from_url(BACKBONE_URL, map_location="cpu", check_hash=True, weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise ConfigError(
            "AlexNet, the backbone of LPIPS, cannot be downloaded",
            seen=f"{BACKBONE_URL}: {error}",
            rule="loss.lpips above 0 needs torchvision's AlexNet weights",
            fix=_FIX,
        ) from error


def _read(path: Path, what: str, fix: str) -> dict[str, torch.Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, KeyError, ValueError, pickle.UnpicklingError, SafetensorError) as error:
        raise ConfigError(
            f"{what} cannot be read",
            seen=f"{path}: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
            rule="a state dict in a .safetensors file or in a .pth file of tensors only",
            fix=fix,
        ) from error
    return tensors if isinstance(tensors, dict) else {}


def _take(
    tensors: dict[str, torch.Tensor], expected: dict[str, tuple[int, ...]], what: str, fix: str
) -> dict[str, torch.Tensor]:
    """Takes the tensors named, in float32."""
    taken = {}
    for name, shape in expected.items():
        tensor = tensors.get(name)
        seen = tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else "missing"
        if not isinstance(tensor, torch.Tensor) or seen != shape:
            raise ConfigError(what, seen=f"{name}: {seen}", rule=f"{name} has the shape {shape}", fix=fix)
        taken[name] = tensor.detach().to("cpu", torch.float32).contiguous()
    return taken


def _digest(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
