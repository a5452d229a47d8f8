"""Times pretraining steps on the CPU against a plain reference, a process each, step by step in turn.

python scripts/bench/pretrain.py                      # ViT-B/16, 224 px, batch 16, mask 0.75
python scripts/bench/pretrain.py --size small --rounds 12
python scripts/bench/pretrain.py --profile bf16       # where a step of one contender goes

All train the same model from the same weights with the same mask ratio and the same loss, on the same generated tiles:

    plain   float32, one PNG a tile opened with PIL, every patch embedded and predicted, timm's default attention,
            unfused AdamW over one parameter group
    fp32    momo at equal precision: corpus reader, hidden-only head, DeepSpeed engine, fused AdamW, clipping
    bf16    the same with bfloat16 weights and float32 masters
    loop    bf16 with one flat float32 master stepped here instead of by DeepSpeed: what the engine costs

A round is one step of each, one after another; ratios are taken round by round, so that a busy machine disturbs all
alike.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from PIL import Image
from timm.models.vision_transformer import Block
from torch import nn

from momo.config import load_config
from momo.data_prep.shards import CorpusWriter, TileRecord
from momo.machine import keep_freed_memory
from momo.models import Architecture, MaskedAutoencoder, build_mae
from momo.models.blocks import Block as MomoBlock
from momo.pretrain import PretrainConfig
from momo.pretrain.data import open_sources, to_inputs
from momo.pretrain.engine import Engine
from momo.pretrain.loader import make_loader
from momo.pretrain.setup import engine_config, make_model

CONTENDERS = ("plain", "fp32", "bf16", "loop")
TILES, PIXELS, RATE = 256, 224, 1e-4
Step = Callable[[], float]
Train = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], float]


def write_tiles(folder: Path) -> None:
    """Writes generated terrain as a corpus and, beside it, as single PNG files of the same pixels."""
    (folder / "files").mkdir()
    (folder / "corpus").mkdir()
    writer = CorpusWriter(folder / "corpus", sensor="CTX", tile_size=PIXELS, dtype="uint8", synthetic=True)
    rng = np.random.default_rng(0)
    wavenumber = np.hypot(np.fft.fftfreq(PIXELS)[:, None], np.fft.rfftfreq(PIXELS))
    for number in range(TILES + 8):
        spectrum = np.fft.rfft2(rng.normal(size=(PIXELS, PIXELS))) / np.maximum(wavenumber, 0.01) ** 1.5
        field = np.fft.irfft2(spectrum, s=(PIXELS, PIXELS))
        stored = np.clip(np.round((field - field.mean()) / field.std() * 30 + 120), 0, 255).astype(np.uint8)
        valid: npt.NDArray[np.bool_] = np.ones(stored.shape, dtype=np.bool_)
        meta = {"product_id": "P", "row": 0, "col": number, "scale": 0.01, "offset_value": 1.0}
        split = "train" if number < TILES else "val"
        writer.add(TileRecord(key=f"t{number:05d}", split=split, stored_HW=stored, valid_HW=valid, meta=meta))
        if split == "train":
            Image.fromarray(stored).save(folder / "files" / f"t{number:05d}.png")
    writer.finish(products=[{"product_id": "P"}], prep={}, licence="CC0-1.0")


# --- the reference ------------------------------------------------------------------------------------------------


class PlainAutoencoder(nn.Module):
    """The masked autoencoder as published, on timm's own blocks and the weights of a `MaskedAutoencoder`."""

    def __init__(self, model: MaskedAutoencoder) -> None:
        super().__init__()
        self.model = model
        for blocks in (model.blocks, model.decoder_blocks):
            for number, block in enumerate(blocks):
                assert isinstance(block, MomoBlock)
                width, eps = block.norm1.normalized_shape[0], block.norm1.eps
                plain = Block(width, block.attn.num_heads, qkv_bias=True)
                plain.load_state_dict(block.state_dict())
                plain.norm1.eps = plain.norm2.eps = eps
                blocks[number] = plain

    def forward(self, image_BCHW: torch.Tensor, noise_BN: torch.Tensor) -> torch.Tensor:
        """Mean squared error over the hidden patches."""
        model = self.model
        order_BN = noise_BN.argsort(dim=1)
        back_BN, shown_BK = order_BN.argsort(dim=1), order_BN[:, : model.kept]
        tokens_BND = model.patch_embed(image_BCHW) + model.pos_embed[:, 1:]
        width = tokens_BND.shape[-1]
        tokens_BKD = tokens_BND.gather(1, shown_BK[..., None].expand(-1, -1, width))
        cls_B1D = (model.cls_token + model.pos_embed[:, :1]).expand(len(tokens_BKD), -1, -1)
        encoded = model.norm(model.blocks(torch.cat([cls_B1D, tokens_BKD], dim=1)))
        tokens = model.decoder_embed(encoded)
        hidden = model.mask_token.expand(len(tokens), order_BN.shape[1] - model.kept, -1)
        patches = torch.cat([tokens[:, 1:], hidden], dim=1)
        patches = patches.gather(1, back_BN[..., None].expand(-1, -1, tokens.shape[-1]))
        tokens = torch.cat([tokens[:, :1], patches], dim=1) + model.decoder_pos_embed
        for block in model.decoder_blocks:
            tokens = block(tokens)
        prediction_BNP = model.decoder_pred(model.decoder_norm(tokens))[:, 1:]
        error_BN = (prediction_BNP - model.patchify(image_BCHW)).square().mean(dim=-1)
        hidden_BN = torch.ones_like(noise_BN).scatter(1, shown_BK, 0.0)
        return (error_BN * hidden_BN).sum() / hidden_BN.sum()


def plain_step(folder: Path, model: MaskedAutoencoder, batch: int) -> Step:
    """One step of the reference, opening its tiles first."""
    files = sorted((folder / "files").iterdir())
    rng = np.random.default_rng(0)
    plain = PlainAutoencoder(model)
    optimizer = torch.optim.AdamW(
        [p for p in plain.parameters() if p.requires_grad], lr=RATE, weight_decay=0.05, foreach=False, fused=False
    )

    def read(path: Path) -> torch.Tensor:
        grey_HW = np.asarray(Image.open(path), dtype=np.float32)
        return torch.from_numpy((grey_HW - grey_HW.mean()) / grey_HW.std())[None]

    def step() -> float:
        image_BCHW = torch.stack([read(files[number]) for number in rng.integers(0, len(files), batch)])
        optimizer.zero_grad()
        loss = plain(image_BCHW, torch.rand(batch, model.architecture.patches))
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


# --- momo ---------------------------------------------------------------------------------------------------------


def momo_step(folder: Path, model: MaskedAutoencoder, batch: int, contender: str, options: list[str]) -> Step:
    """One step of `momo pretrain`: its loader, its model and its engine."""
    overrides = [
        f"out={folder / 'run'}",
        f"data.corpora=[{folder / 'corpus'}]",
        "ranks=1",
        "augment.symmetries=false",
        f"train.batch_size={batch}",
        f"train.precision={'fp32' if contender == 'fp32' else 'bf16'}",
        *options,
    ]
    keep_freed_memory()
    os.environ["LOCAL_RANK"] = "0"  # DeepSpeed asks for it
    dist.init_process_group("gloo", init_method=f"file://{folder / f'store-{contender}'}", rank=0, world_size=1)
    config = load_config(PretrainConfig, None, overrides)
    sources = open_sources(config, verify=False)
    trained = make_model(config, sources, model, torch.device("cpu"))
    train = flat_loop(trained) if contender == "loop" else engine_loop(trained, config)
    loader = make_loader(
        sources,
        config,
        patches=model.architecture.patches,
        start=0,
        stop=config.train.samples,
        rank=0,
        ranks=1,
        device=torch.device("cpu"),
    )
    batches, limit = iter(loader), sources.normalisations[0].limit

    def step() -> float:
        return train(*to_inputs(next(batches), limit=limit, in_chans=model.architecture.in_chans, device="cpu"))

    return step


def engine_loop(model: MaskedAutoencoder, config: PretrainConfig) -> Train:
    """Trains by momo's engine."""
    engine = Engine(model, config, engine_config(config))

    def train(image_BCHW: torch.Tensor, valid_BHW: torch.Tensor, noise_BN: torch.Tensor) -> float:
        loss_B = engine.micro_step(image_BCHW, valid_BHW, noise_BN, last=True)
        engine.finish_step(RATE)
        return float(loss_B.mean())

    return train


def flat_loop(model: MaskedAutoencoder) -> Train:
    """Trains bfloat16 weights by fused AdamW over one flat float32 master."""
    weights = [p for p in model.parameters() if p.requires_grad]
    master = torch.cat([p.detach().flatten() for p in weights]).requires_grad_()
    master.grad = torch.empty_like(master)
    sizes = [p.numel() for p in weights]
    masters = [part.view_as(p) for part, p in zip(master.detach().split(sizes), weights, strict=True)]
    gradients = [part.view_as(p) for part, p in zip(master.grad.split(sizes), weights, strict=True)]
    model.to(torch.bfloat16)
    optimizer = torch.optim.AdamW([master], lr=RATE, betas=(0.9, 0.95), weight_decay=0.05, fused=True)

    def train(image_BCHW: torch.Tensor, valid_BHW: torch.Tensor, noise_BN: torch.Tensor) -> float:
        loss = model(image_BCHW, valid_BHW, noise_BN).mean()
        loss.backward()
        with torch.no_grad():
            torch._foreach_copy_(gradients, [p.grad for p in weights])
            optimizer.step()
            torch._foreach_copy_(weights, masters)
        for p in weights:
            p.grad = None
        return float(loss.detach())

    return train


# --- measuring ----------------------------------------------------------------------------------------------------


def make_step(contender: str, folder: Path, given: argparse.Namespace) -> Step:
    """Builds one contender in this process."""
    torch.set_num_threads(given.threads)
    model = build_mae(Architecture(size=given.size, image_size=PIXELS), seed=0)
    if contender == "plain":
        return plain_step(folder, model, given.batch)
    with contextlib.redirect_stdout(io.StringIO()):
        return momo_step(folder, model, given.batch, contender, given.options)


def contend(contender: str, folder: Path, given: argparse.Namespace, pipe: Connection) -> None:
    """Takes a step whenever the parent asks for one, and answers with seconds, seconds of CPU and the loss."""
    step = make_step(contender, folder, given)
    while pipe.recv():
        started, busy = time.perf_counter(), time.process_time()
        loss = step()
        pipe.send((time.perf_counter() - started, time.process_time() - busy, loss))


def measure(folder: Path, given: argparse.Namespace) -> None:
    """Prints images a second of each contender and its ratio to the first."""
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    for contender in given.only.split(","):
        pipes[contender], end = context.Pipe()
        context.Process(target=contend, args=(contender, folder, given, end), daemon=True).start()
        end.close()  # so that a contender that dies ends the wait for it
    found: dict[str, list[tuple[float, float, float]]] = {contender: [] for contender in pipes}
    for _ in range(given.warm + given.rounds):
        for contender, pipe in pipes.items():
            pipe.send(True)
            found[contender].append(pipe.recv())
    batch = given.batch
    print(f"ViT-{given.size}/16, {PIXELS} px, batch {batch}, {given.threads} threads, {given.rounds} rounds")
    first: list[float] = []
    for contender, pipe in pipes.items():
        pipe.send(False)
        taken, busy, losses = map(list, zip(*found[contender][given.warm :], strict=True))
        first = first or taken
        ratios = sorted(a / b for a, b in zip(first, taken, strict=True))
        rates = f"{batch / statistics.median(taken):6.2f} images/s (best {batch / min(taken):6.2f})"
        spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f}, best to best {min(first) / min(taken):.2f}"
        rest = f"CPU {statistics.median(busy):.2f} s a step, loss {losses[-1]:.4f}"
        print(f"  {contender:6s} {rates}   ratio {statistics.median(ratios):5.2f} ({spread})   {rest}", flush=True)


def profile(folder: Path, given: argparse.Namespace, steps: int = 3) -> None:
    """Prints the share of each operation in the time of a step."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    step = make_step(given.profile, folder, given)
    for _ in range(given.warm):
        step()
    with profiler(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(steps):
            step()
    rows = sorted(found.key_averages(), key=lambda row: -row.self_cpu_time_total)
    total = sum(row.self_cpu_time_total for row in rows)
    for row in rows[:25]:
        share, milliseconds = 100 * row.self_cpu_time_total / total, row.self_cpu_time_total / 1000 / steps
        print(f"{share:6.1f} %  {milliseconds:8.1f} ms  {row.count // steps:5d} calls  {row.key}")


def main() -> None:
    """Measures all contenders, or profiles one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="base")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--warm", type=int, default=2, help="rounds before the first that counts")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--only", default=",".join(CONTENDERS), help="contenders, divided by commas; ratios are to the first"
    )
    parser.add_argument("--profile", choices=CONTENDERS)
    parser.add_argument("options", nargs="*", help="of momo pretrain, for example model.compile=true")
    given = parser.parse_intermixed_args()
    if unknown := set(given.only.split(",")) - set(CONTENDERS):
        parser.error(f"--only: no contender {', '.join(sorted(unknown))}; one or more of {','.join(CONTENDERS)}")
    with tempfile.TemporaryDirectory() as name:
        write_tiles(Path(name))
        (profile if given.profile else measure)(Path(name), given)


if __name__ == "__main__":
    main()
