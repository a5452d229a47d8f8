"""LPIPS against its authors' code, where its weights come from, and what it refuses."""

from __future__ import annotations

import copy
import urllib.error
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from momo.errors import ConfigError
from momo.models import MaskedAutoencoder
from momo.models.lpips import BACKBONE_FILE, PerceptualDistance, load_lpips
from momo.models.objective import CombinedObjective, make_objective
from momo.pretrain.config import LossOptions
from tests.conftest import PICO
from tests.momo.objective_helper import LIMIT, PATCH, random_alexnet


@pytest.mark.filterwarnings("ignore:.*'(pretrained|weights)':UserWarning")
@pytest.mark.parametrize("size", [31, 64])
def test_lpips_agrees_with_its_authors_code(size: int, alexnet: Path) -> None:
    import lpips

    with torch.random.fork_rng():
        theirs = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    places = {0: "slice1.0", 3: "slice2.3", 6: "slice3.6", 8: "slice4.8", 10: "slice5.10"}
    for name, tensor in random_alexnet().items():
        _, place, kind = name.split(".")
        theirs.net.get_parameter(f"{places[int(place)]}.{kind}").data.copy_(tensor)
    generator = torch.Generator().manual_seed(4)
    image, target = (torch.rand(3, 3, size, size, generator=generator) * 2 - 1 for _ in range(2))
    ours = load_lpips(alexnet)
    torch.testing.assert_close(ours(image, target), theirs(image, target).flatten().detach(), rtol=1e-5, atol=1e-7)
    image.requires_grad_()
    (ours_grad,) = torch.autograd.grad(ours(image, target).sum(), image)
    (their_grad,) = torch.autograd.grad(theirs(image, target).sum(), image)
    torch.testing.assert_close(ours_grad, their_grad, rtol=1e-3, atol=1e-7)
    grey = torch.rand(2, 1, size, size, generator=generator)
    torch.testing.assert_close(ours(grey, -grey), ours(grey.expand(-1, 3, -1, -1), -grey.expand(-1, 3, -1, -1)))


def test_lpips_is_finite_where_no_feature_is_active() -> None:
    pytest.importorskip("lpips", reason='the heads of LPIPS need pip install "momo[pretrain]"')
    dead = {name: torch.zeros_like(tensor) for name, tensor in random_alexnet().items()}
    heads = {f"lin{k}.model.1.weight": torch.ones(1, chans, 1, 1) for k, chans in enumerate((64, 192, 384, 256, 256))}
    image = torch.rand(1, 1, 32, 32, requires_grad=True)
    distance = PerceptualDistance(dead, heads)(image, torch.zeros(1, 1, 32, 32))
    distance.sum().backward()
    assert distance.item() == 0
    assert image.grad is not None and image.grad.isfinite().all()


def test_lpips_is_the_same_from_either_format_and_named_by_its_hash(alexnet: Path, tmp_path: Path) -> None:
    save_file(random_alexnet(), tmp_path / "alexnet.safetensors")
    save_file(random_alexnet(seed=1), tmp_path / "other.safetensors")
    first, second = load_lpips(alexnet), load_lpips(tmp_path / "alexnet.safetensors")
    other = load_lpips(tmp_path / "other.safetensors")
    assert first.sha256 == second.sha256 != other.sha256
    image, target = torch.rand(1, 1, 32, 32), torch.rand(1, 1, 32, 32)
    assert torch.equal(first(image, target), second(image, target))


def test_lpips_is_frozen_and_outside_the_model(alexnet: Path) -> None:
    lpips = load_lpips(alexnet)
    objective = CombinedObjective(PICO.patch_size, False, {"mse": 0.5, "lpips": 0.5}, LIMIT, lpips)
    torch.manual_seed(0)
    plain, model = MaskedAutoencoder(PICO), MaskedAutoencoder(PICO, objective=objective)
    assert set(model.state_dict()) == set(plain.state_dict())
    assert len(list(model.parameters())) == len(list(plain.parameters()))
    assert len(list(model.modules())) == len(list(plain.modules()))
    image, noise = torch.randn(2, 1, 32, 32), torch.rand(2, PICO.patches)
    valid = torch.ones(2, 32, 32, dtype=torch.bool)
    loss = model.train()(image, valid, noise)
    loss.sum().backward()
    assert all(weight.grad is not None for weight in model.parameters() if weight.requires_grad)
    assert all(not weight.requires_grad and weight.grad is None for weight in lpips._layers.parameters())
    assert torch.equal(model.eval()(image, valid, noise), loss), "no dropout is active in either mode"
    assert torch.equal(copy.deepcopy(model)(image, valid, noise), loss)
    half = model.to(torch.bfloat16)(image, valid, noise)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, loss, rtol=0.05, atol=0.05)
    assert all(weight.dtype == torch.float32 for weight in lpips._layers.parameters())
    assert not lpips._layers.training


def test_loading_leaves_the_global_generator_alone(alexnet: Path) -> None:
    state = torch.random.get_rng_state()
    load_lpips(alexnet)
    assert torch.equal(state, torch.random.get_rng_state())


def test_lpips_refuses_small_images(alexnet: Path) -> None:
    small = torch.zeros(1, 1, 30, 30)
    with pytest.raises(ConfigError, match=r"too small for LPIPS: 30 x 30 pixels.*at least 31.*loss\.lpips=0"):
        load_lpips(alexnet)(small, small)


def test_lpips_names_a_backbone_that_cannot_be_used(tmp_path: Path) -> None:
    pytest.importorskip("lpips", reason='the heads of LPIPS need pip install "momo[pretrain]"')
    fix = rf"fetch https://\S+/{BACKBONE_FILE} .* loss\.lpips_backbone"
    with pytest.raises(ConfigError, match=rf"AlexNet weights cannot be read: .*none\.pth.*{fix}"):
        load_lpips(tmp_path / "none.pth")
    for name in ("junk.pth", "junk.safetensors", "empty.pth"):
        (tmp_path / name).write_bytes(b"" if "empty" in name else b"not tensors at all")
        with pytest.raises(ConfigError, match=rf"AlexNet weights cannot be read: .*{name}.*{fix}"):
            load_lpips(tmp_path / name)
    torch.save({"features.0.weight": Path("x"), "net": CombinedObjective}, tmp_path / "code.pth")
    with pytest.raises(ConfigError, match=r"AlexNet weights cannot be read: .*code\.pth"):
        load_lpips(tmp_path / "code.pth")
    weights = random_alexnet()
    del weights["features.8.bias"]
    torch.save(weights, tmp_path / "short.pth")
    with pytest.raises(ConfigError, match=rf"do not fit: features\.8\.bias: missing.*shape \(256,\).*{fix}"):
        load_lpips(tmp_path / "short.pth")
    torch.save(random_alexnet() | {"features.0.weight": torch.zeros(64, 1, 11, 11)}, tmp_path / "grey.pth")
    with pytest.raises(ConfigError, match=r"features\.0\.weight: \(64, 1, 11, 11\).*\(64, 3, 11, 11\)"):
        load_lpips(tmp_path / "grey.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ConfigError, match=r"features\.0\.weight: missing"):
        load_lpips(tmp_path / "list.pth")


@pytest.mark.parametrize("error", [urllib.error.URLError("no route"), RuntimeError("invalid hash value")])
def test_a_failed_download_says_what_to_fetch(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lpips", reason='the heads of LPIPS need pip install "momo[pretrain]"')

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    options = LossOptions(lpips=0.25)
    with pytest.raises(
        ConfigError, match=rf"cannot be downloaded: .*(no route|invalid hash).*fetch .*{BACKBONE_FILE}.*lpips_backbone"
    ):
        make_objective(options, patch_size=PATCH, norm_pix_loss=False, limit=LIMIT, device="cpu")


def test_torchvisions_cache_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lpips", reason='the heads of LPIPS need pip install "momo[pretrain]"')
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(random_alexnet(), folder / BACKBONE_FILE)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert load_lpips(None).sha256 == PerceptualDistance(random_alexnet(), _heads()).sha256


def _heads() -> dict[str, torch.Tensor]:
    import lpips

    return torch.load(Path(lpips.__file__).parent / "weights/v0.1/alex.pth", map_location="cpu", weights_only=True)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"'lpips' cannot be imported.*extra 'pretrain'.*momo\[pretrain\]"):
        load_lpips(None)
