"""Attention, blocks and the hidden-only head against plain formulas."""

from __future__ import annotations

import copy
import hashlib
from functools import partial

import pytest
import torch
from timm.models.vision_transformer import Block as TimmBlock

from momo.errors import ConfigError
from momo.models import Architecture, build_mae
from momo.models.blocks import Block, PlainAttention, attention_kernel, run_blocks
from momo.models.mae import compile_blocks
from tests.conftest import PICO


def images(chans=1, seed=0, count=4):
    """Images, validity (whole, holes with whole patches, nothing, patches left out at the border) and noise."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(count, chans, 32, 32, generator=generator)
    valid = torch.ones(count, 32, 32, dtype=torch.bool)
    valid[1] = torch.rand(32, 32, generator=generator) > 0.3
    valid[1, 8:16, 8:24] = False
    valid[2] = False
    valid[3, :, :11] = False
    return image * valid[:, None], valid, torch.rand(count, 16, generator=generator)


def reference_loss(model, image, valid, noise):
    """The masked autoencoder as published: every patch embedded, tokens put back in order, every patch predicted."""
    patch_valid = model.patchify(valid[:, None].float()).amax(dim=2)
    order = torch.argsort(noise + (1 - patch_valid), dim=1, stable=True)
    shown, batch = order[:, : model.kept], len(image)

    def pick(values, numbers):
        return values.gather(1, numbers[..., None].expand(-1, -1, values.shape[-1]))

    tokens = pick(model.patch_embed(image) + model.pos_embed[:, 1:], shown)
    tokens = torch.cat([(model.cls_token + model.pos_embed[:, :1]).expand(batch, -1, -1), tokens], dim=1)
    for block in model.blocks:
        tokens = TimmBlock.forward(timm_block(block), tokens)
    tokens = model.decoder_embed(model.norm(tokens))
    hidden = model.mask_token.expand(batch, order.shape[1] - model.kept, -1)
    patches = pick(torch.cat([tokens[:, 1:], hidden], dim=1), torch.argsort(order, dim=1))
    tokens = torch.cat([tokens[:, :1], patches], dim=1) + model.decoder_pos_embed
    for block in model.decoder_blocks:
        tokens = TimmBlock.forward(timm_block(block), tokens)
    prediction = model.decoder_pred(model.decoder_norm(tokens))[:, 1:]
    target, scored = model.patchify(image), model.patchify(valid[:, None].expand_as(image)).float()
    if model.norm_pix_loss:
        count = scored.sum(dim=2, keepdim=True).clamp(min=1)
        mean = (target * scored).sum(dim=2, keepdim=True) / count
        target = (target - mean) / (((target - mean).square() * scored).sum(dim=2, keepdim=True) / count + 1e-6).sqrt()
    scored = scored * torch.ones_like(noise).scatter(1, shown, 0.0)[..., None]
    return ((prediction - target).square() * scored).sum(dim=(1, 2)) / scored.sum(dim=(1, 2)).clamp(min=1)


def timm_block(block):
    """timm's own block over the very same parameters."""
    dim, heads, eps = block.norm1.normalized_shape[0], block.attn.num_heads, block.norm1.eps
    plain = TimmBlock(dim, heads, qkv_bias=True, norm_layer=partial(torch.nn.LayerNorm, eps=eps))
    for name, module in plain.named_modules():
        for key in list(module._parameters):
            module._parameters[key] = block.get_submodule(name)._parameters[key]
    return plain


def gradients(model, *inputs):
    model.zero_grad()
    loss = model(*inputs)
    loss.sum().backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("chans", [1, 3])
@pytest.mark.parametrize("norm_pix_loss", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "plain"])
def test_loss_and_gradients_equal_the_published_formula(chans, norm_pix_loss, attention):
    architecture = Architecture(size="pico", image_size=32, patch_size=8, in_chans=chans)
    model = build_mae(architecture, seed=0, norm_pix_loss=norm_pix_loss, attention=attention)
    inputs = images(chans)
    loss, gradient = gradients(model, *inputs)
    model.zero_grad()
    expected = reference_loss(model, *inputs)
    torch.testing.assert_close(loss, expected.detach(), rtol=2e-6, atol=1e-6)
    assert loss[2] == 0 and (loss[[0, 1, 3]] > 0.5).all()
    expected.sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(gradient[name], parameter.grad, rtol=1e-4, atol=2e-6)


def test_hidden_predictions_are_those_of_all_patches():
    model, (image, valid, noise) = build_mae(PICO, seed=0), images()
    prediction, numbers = model.predict_hidden(image, valid, noise)
    every, hidden = model.predict(image, valid, noise)
    assert prediction.shape == (4, 12, 64) and numbers.dtype == torch.int64
    assert torch.equal(torch.zeros_like(hidden).scatter(1, numbers, 1.0), hidden)
    torch.testing.assert_close(prediction, every.gather(1, numbers[..., None].expand(-1, -1, 64)), rtol=1e-5, atol=2e-6)


def test_initial_weights_and_names_are_those_of_the_first_release():
    state = build_mae(PICO, seed=0).state_dict()
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode() + str(tuple(state[name].shape)).encode() + state[name].numpy().tobytes())
    assert digest.hexdigest() == "cff4209be6d9d37072efce57b9e3b10926c5f286984fa4818f69eb0dc1b8724e"


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.04), (torch.float16, 0.005)]
)
@pytest.mark.parametrize("last", [None, 5])
def test_fused_attention_equals_plain(dtype, tolerance, last):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(3, 17, 32, generator=generator)
    above = torch.randn(3, last or 17, 32, generator=generator)
    results = {}
    for kernel, cast in (("exact", torch.float64), ("sdpa", dtype), ("plain", dtype)):
        torch.manual_seed(0)
        block = Block(32, 4, qkv_bias=True).to(cast)
        block.attn.kernel = "sdpa" if kernel == "exact" else kernel
        given = tokens.to(cast, copy=True).requires_grad_()
        result = block.attn(given, last)
        result.backward(above.to(cast))
        results[kernel] = [result.detach(), given.grad, block.attn.qkv.weight.grad, block.attn.proj.weight.grad]
    for kernel in ("sdpa", "plain"):
        for seen, exact in zip(results[kernel], results["exact"], strict=True):
            assert seen.dtype == dtype
            torch.testing.assert_close(seen.double(), exact, rtol=0, atol=tolerance * float(exact.abs().max()))


@pytest.mark.parametrize(("batch", "heads"), [(1, 1), (1, 4), (3, 1), (2, 2)])
def test_plain_attention_leaves_its_input_and_has_the_right_gradient(batch, heads):
    qkv = torch.randn(batch, 5, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    before = qkv.clone()
    PlainAttention.apply(qkv, heads, 3)
    assert torch.equal(qkv, before)
    qkv.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: PlainAttention.apply(x, heads, 3), (qkv,))
    assert torch.autograd.gradcheck(lambda x: PlainAttention.apply(x, heads, 5), (qkv,))


def test_last_tokens_of_a_block_are_those_of_the_whole():
    block = Block(32, 4, qkv_bias=True)
    tokens = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(run_blocks(torch.nn.ModuleList([block]), tokens, last=4), block(tokens)[:, -4:])


def test_attention_kernel_of_each_device():
    assert [attention_kernel("auto", device) for device in ("cpu", "cuda")] == ["plain", "sdpa"]
    assert attention_kernel("sdpa", "cpu") == "sdpa" and attention_kernel("plain", "cuda:1") == "plain"
    with pytest.raises(ConfigError, match=r"model\.attention .*'fussed'"):
        attention_kernel("fussed", "cpu")
    with pytest.raises(ConfigError, match=r"model\.attention .*'flash'"):
        build_mae(PICO, seed=0, attention="flash")


def test_attention_can_be_changed_and_is_no_part_of_the_weights():
    model = build_mae(PICO, seed=0, attention="sdpa")
    names = list(model.state_dict())
    model.set_attention("plain")
    assert {block.attn.kernel for block in [*model.blocks, *model.decoder_blocks]} == {"plain"}
    assert list(model.state_dict()) == names == list(build_mae(PICO, seed=0).state_dict())


@pytest.mark.parametrize("attention", ["sdpa", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activation_checkpointing_changes_no_bit(attention, dtype):
    inputs = images()
    plain = build_mae(PICO, seed=0, attention=attention).to(dtype)
    again = build_mae(PICO, seed=0, attention=attention, activation_checkpointing=True).to(dtype)
    loss, gradient = gradients(plain, *inputs)
    loss_again, gradient_again = gradients(again, *inputs)
    assert torch.equal(loss, loss_again) and gradient.keys() == gradient_again.keys()
    assert all(torch.equal(gradient[name], gradient_again[name]) for name in gradient)


def test_activation_checkpointing_keeps_less():
    def kept(model):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            model(*images())
        return sum(sizes)

    full, again = (kept(build_mae(PICO, seed=0, activation_checkpointing=on)) for on in (False, True))
    assert again < full / 3


@pytest.mark.parametrize("attention", ["sdpa", "plain"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_take_float32_images(attention, dtype):
    exact = build_mae(PICO, seed=0, attention=attention)
    half = copy.deepcopy(exact).to(dtype)
    loss, gradient = gradients(half, *images())
    expected, exact_gradient = gradients(exact, *images())
    assert loss.dtype == torch.float32 and gradient["blocks.0.attn.qkv.weight"].dtype == dtype
    torch.testing.assert_close(loss, expected, rtol=0.01, atol=0)
    for name, value in exact_gradient.items():
        assert float((gradient[name].float() - value).norm()) < 0.08 * float(value.norm()) + 1e-4, name


@pytest.mark.parametrize("attention", ["sdpa", "plain"])
def test_autocast(attention):
    model = build_mae(PICO, seed=0, attention=attention)
    expected, exact_gradient = gradients(model, *images())
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        prediction, _ = model.predict_hidden(*images())
        loss = model(*images())
    loss.sum().backward()
    assert prediction.dtype == torch.bfloat16 and loss.dtype == torch.float32
    torch.testing.assert_close(loss.detach(), expected, rtol=0.01, atol=0)
    weight = model.blocks[0].attn.qkv.weight
    assert float((weight.grad - exact_gradient["blocks.0.attn.qkv.weight"]).norm()) < 0.08 * float(weight.grad.norm())


def test_objective_is_called_with_hidden_patches_and_stays_out_of_the_state():
    seen = []

    class Objective(torch.nn.Linear):
        def forward(self, prediction, numbers, image, valid):
            seen.append((prediction.shape, numbers.shape, image.shape, valid.shape))
            return prediction.float().square().mean(dim=(1, 2))

    model = build_mae(PICO, seed=0, objective=Objective(2, 2))
    assert model(*images()).shape == (4,)
    assert seen == [((4, 12, 64), (4, 12), (4, 1, 32, 32), (4, 32, 32))]
    assert list(model.state_dict()) == list(build_mae(PICO, seed=0).state_dict())
    assert sum(1 for _ in model.parameters()) == sum(1 for _ in build_mae(PICO, seed=0).parameters())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_compiled_blocks_keep_their_names_and_results(dtype, tolerance):
    model = build_mae(PICO, seed=0).to(dtype)
    model.blocks = model.blocks[:2]
    expected, exact_gradient = gradients(model, *images())
    names = list(model.state_dict())
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compile_blocks(model, backend="aot_eager")
    assert list(model.state_dict()) == names
    loss, gradient = gradients(model, *images())
    # Encoder blocks, decoder blocks and the last one.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3
    assert not torch._dynamo.utils.counters["graph_break"]
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=tolerance)
    for name, value in exact_gradient.items():
        assert float((gradient[name] - value).norm()) <= tolerance * float(value.norm()) + 1e-5, name
