from __future__ import annotations

import numpy as np
import pytest
import timm
import torch

from momo.errors import CheckpointError, ConfigError
from momo.models import (
    SIZES,
    Architecture,
    build_mae,
    load_encoder,
    load_mae,
    mask_noise,
    random_encoder,
    sample_rng,
)
from momo.models.mae import MaskedAutoencoder
from momo.weights import load_weights, save_weights
from tests.conftest import PICO, write_weights


def batch(count=3, seed=0, valid=True):
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(count, 1, 32, 32, generator=generator)
    noise = torch.rand(count, 16, generator=generator)
    return image, torch.full((count, 32, 32), valid), noise


def naive_loss(model, image, valid, noise):
    """The loss patch by patch and sample by sample, straight from its definition."""
    losses = []
    for b in range(len(image)):
        prediction, hidden = model.predict(image[b : b + 1], valid[b : b + 1], noise[b : b + 1])
        total = count = 0.0
        for n in range(16):
            if not hidden[0, n]:
                continue
            top, left = 8 * (n // 4), 8 * (n % 4)
            for y in range(8):
                for x in range(8):
                    if valid[b, top + y, left + x]:
                        total += float(prediction[0, n, 8 * y + x] - image[b, 0, top + y, left + x]) ** 2
                        count += 1
        losses.append(total / max(count, 1))
    return losses


def test_loss_equals_its_definition_with_invalid_pixels():
    model = build_mae(PICO, seed=0).eval()
    image, valid, noise = batch()
    valid[0, :10, :20] = False
    valid[1] = torch.rand(32, 32, generator=torch.Generator().manual_seed(1)) > 0.3
    image = image * valid[:, None]
    with torch.no_grad():
        torch.testing.assert_close(
            model(image, valid, noise).tolist(), naive_loss(model, image, valid, noise), rtol=1e-4, atol=1e-6
        )


def test_invalid_pixels_cannot_change_the_loss():
    model = build_mae(PICO, seed=0).eval()
    image, valid, noise = batch()
    valid[:, 8:16, 8:24] = False  # two whole patches
    loss = model(image, valid, noise)
    image[:, :, 8:16, 8:24] = 1e3
    assert torch.equal(loss, model(image, valid, noise))


def test_wholly_invalid_patches_are_never_shown():
    model = build_mae(PICO, seed=0)
    image, valid, _ = batch(count=50)
    valid[:, :16] = False  # the upper 8 of 16 patches; 4 are shown
    noise = torch.rand(50, 16, generator=torch.Generator().manual_seed(0))
    _, hidden = model.predict(image, valid, noise)
    assert (hidden[:, :8] == 1).all() and (hidden[:, 8:].sum(dim=1) == 4).all()


def test_a_tile_without_valid_pixels_has_loss_zero_and_finite_gradients():
    model = build_mae(PICO, seed=0, norm_pix_loss=True)
    loss = model(*batch(valid=False))
    loss.sum().backward()
    assert loss.tolist() == [0, 0, 0]
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_norm_pix_loss_ignores_offset_and_gain_of_a_patch():
    model = build_mae(PICO, seed=0, norm_pix_loss=True).eval()
    image, valid, noise = batch()
    _, hidden = model.predict(image, valid, noise)
    scaled = model.unpatchify(torch.where(hidden[..., None] > 0, 3 * model.patchify(image) + 7, model.patchify(image)))
    torch.testing.assert_close(model(image, valid, noise), model(scaled, valid, noise), rtol=1e-3, atol=1e-4)


def test_three_equal_channels_and_patches_round_trip():
    model = build_mae(Architecture(size="pico", image_size=32, patch_size=8, in_chans=3), seed=0)
    image = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.unpatchify(model.patchify(image)), image)
    assert model(image, torch.ones(2, 32, 32, dtype=torch.bool), torch.rand(2, 16)).shape == (2,)


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_reconstruct_keeps_what_was_shown(norm_pix_loss):
    model = build_mae(PICO, seed=0, norm_pix_loss=norm_pix_loss).eval()
    image, valid, noise = batch()
    painted, hidden = model.reconstruct(image, valid, noise)
    assert painted.shape == image.shape and hidden.dtype == torch.bool
    assert hidden.float().mean() == pytest.approx(0.75)
    assert torch.equal(painted[:, 0][~hidden], image[:, 0][~hidden])
    assert not torch.equal(painted, image)


@pytest.mark.parametrize(("size", "millions"), [("tiny", 31.34), ("small", 47.58), ("base", 111.91)])
def test_sizes_have_the_published_parameter_counts(size, millions):
    with torch.device("meta"):
        model = MaskedAutoencoder(Architecture(size=size, in_chans=3))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.01)
    assert len(model.state_dict()) == 254


def test_encoder_tensors_load_into_timm_by_name():
    mae = build_mae(Architecture(size="tiny", in_chans=3), seed=0).eval()
    plain = timm.create_model("vit_tiny_patch16_224", num_classes=0).eval()
    missing, unexpected = plain.load_state_dict(mae.state_dict(), strict=False)
    assert not missing and all(n.startswith(("decoder", "mask_token")) for n in unexpected)
    image = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        tokens = mae.patch_embed(image) + mae.pos_embed[:, 1:]
        tokens = torch.cat([mae.cls_token + mae.pos_embed[:, :1], tokens], dim=1)
        torch.testing.assert_close(plain.forward_features(image), mae.norm(mae.blocks(tokens)))


def test_encoder_of_a_file_equals_the_autoencoders(pico_weights):
    mae, _ = load_mae(pico_weights)
    encoder, card = load_encoder(pico_weights)
    image = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        tokens = mae.patch_embed(image) + mae.pos_embed[:, 1:]
        tokens = torch.cat([(mae.cls_token + mae.pos_embed[:, :1]).expand(2, -1, -1), tokens], dim=1)
        torch.testing.assert_close(encoder.forward_features(image), mae.norm(mae.blocks(tokens)))
    assert card.contents == ["encoder", "decoder"] and not encoder.training


def test_border_pixels_reach_the_encoder(pico_weights):
    encoder, _ = load_encoder(pico_weights)
    image = torch.zeros(1, 1, 35, 43)
    with torch.no_grad():
        before = encoder(image)
        image[..., -1, -1] = 5.0
        assert not torch.equal(before, encoder(image))


def test_random_encoder_is_where_pretraining_starts():
    encoder, mae = random_encoder(PICO, seed=3), build_mae(PICO, seed=3)
    assert all(torch.equal(tensor, mae.state_dict()[name]) for name, tensor in encoder.state_dict().items())
    assert not torch.equal(random_encoder(PICO, seed=4).cls_token, encoder.cls_token)


def test_building_a_model_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    build_mae(PICO, seed=0)
    assert torch.equal(torch.rand(1), expected)


def test_masks_depend_on_key_seed_and_purpose_only():
    draw = lambda *a: mask_noise(sample_rng(*a), 16)  # noqa: E731
    first = draw("k", 1, "mask")
    assert np.array_equal(first, draw("k", 1, "mask")) and first.dtype == np.float32 and first.max() < 1
    others = [draw("l", 1, "mask"), draw("k", 2, "mask"), draw("k", 1, "other")]
    assert not any(np.array_equal(first, other) for other in others)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": "pica"}, "did you mean 'pico'"),
        ({"image_size": 30, "patch_size": 8}, "cannot be cut into patches: image_size=30, patch_size=8"),
        ({"in_chans": 2}, "model.in_chans is out of range: 2"),
    ],
)
def test_impossible_architectures(fields, message):
    with pytest.raises(ConfigError, match=message):
        Architecture(**fields)
    assert set(SIZES) == {"pico", "tiny", "small", "base", "large"}


def test_mask_ratio_out_of_range():
    with pytest.raises(ConfigError, match="mask_ratio is out of range: 1"):
        build_mae(PICO, seed=0, mask_ratio=1)


def test_encoder_file_with_a_missing_tensor(tmp_path):
    folder = write_weights(tmp_path / "w")
    tensors, card = load_weights(folder)
    del tensors["blocks.2.attn.qkv.weight"]
    tensors["norm.bias"] = tensors["norm.bias"][:3]
    save_weights(folder, tensors, card)
    with pytest.raises(CheckpointError, match=r"blocks.2.attn.qkv.weight is missing; norm.bias is \(3,\), not \(96,\)"):
        load_encoder(folder)
