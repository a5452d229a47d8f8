"""`momo merge fisher`: how much the loss of one checkpoint depends on each of its parameters.

Computed is the diagonal of the empirical Fisher information of the masked-autoencoder objective. With L(x; theta) the
loss of tile x under the mask drawn from its key,

    F_j = 1/N * sum over N tiles x of (dL(x; theta) / dtheta_j)^2

which weighs parameters in a Fisher-weighted average (Matena & Raffel 2022, arXiv 2111.09832, equation 2). L, a mean
squared error, is the negative log-likelihood of a Gaussian of fixed variance up to a factor that is the same for all
checkpoints of one objective, tile size and mask ratio; such a factor cancels in the average. "Empirical" says that the
targets are the tiles' own pixels and not drawn from the model's prediction, so F is the second moment of gradients
and no estimate of the Hessian far from a minimum (Kunstner et al. 2019, arXiv 1905.12558).
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file

from momo.config import one_of, option, positive
from momo.corpus import SPLITS, Corpus
from momo.errors import CheckpointError, ConfigError, DataError
from momo.extras import require
from momo.files import atomic_file
from momo.models import Architecture, MaskedAutoencoder
from momo.models.masking import mask_noise, sample_rng
from momo.normalise import Normalisation
from momo.pretrain.exact import exact_float32, map_exactly
from momo.pretrain.from_card import autoencoder_of
from momo.pretrain.validating import normalisation_for
from momo.pretrain.validation_tiles import TileBatch
from momo.version import __version__
from momo.weights import Card, load_card, load_weights

from .fisher_files import FISHER_KEY

_READ = 32  # tiles read at once


@dataclass(kw_only=True)
class FisherConfig:
    """The diagonal Fisher information of one checkpoint."""

    weights: str = option(help="checkpoint folder or weights file, with encoder and decoder")
    corpora: list[str] = option([], "corpora the checkpoint was trained on, folders or URLs")
    out: str = option(help="file to write (.safetensors)")
    samples: int = option(1000, "tiles of each corpus at most; a fixed, seeded subset")
    seed: int = option(0, "seed of subset and masks")
    split: str = option("train", f"split the tiles are of, one of {', '.join(SPLITS)}; validation tiles choose merges")
    lpips_backbone: str | None = option(None, "AlexNet weights, for checkpoints whose loss has an LPIPS term")

    def __post_init__(self) -> None:
        positive(samples=self.samples)
        one_of("split", self.split, SPLITS)
        if not self.corpora:
            raise ConfigError(
                "no corpus is given", seen="corpora=[]", rule="one or more", fix="add corpora=[my/corpus]"
            )
        if not self.out.endswith(".safetensors"):
            raise ConfigError("Fisher information is one file", seen=self.out, fix="let `out` end in .safetensors")


@dataclass(frozen=True)
class FisherTiles:
    """A fixed subset of the tiles of one corpus, each with a mask drawn from its key.

    Attributes:
        corpus: The corpus.
        normalisation: How its tiles are scaled.
        split: `train` or `val`.
        positions: Of the tiles in the split, ascending.
        patches: Number of patches of the model.
        seed: Of the masks.
    """

    corpus: Corpus
    normalisation: Normalisation
    split: str
    positions: npt.NDArray[np.int64]
    patches: int
    seed: int

    def __len__(self) -> int:
        return len(self.positions)

    def __iter__(self) -> Iterator[TileBatch]:
        """Yields the tiles one by one.

        Raises:
            DataError: A tile cannot be read.
        """
        for first in range(0, len(self), _READ):
            found = self.corpus.read_batch(self.split, self.positions[first : first + _READ])
            affine_B3 = torch.from_numpy(self.normalisation.affine(found.statistics))
            for row, key in enumerate(found.keys):
                one = slice(row, row + 1)
                noise_N = mask_noise(sample_rng(key, self.seed, "fisher mask"), self.patches)
                yield TileBatch(
                    keys=[key],
                    stored_BHW=torch.from_numpy(found.stored_BHW[one]),
                    valid_BHW=None if found.valid_BHW is None else torch.from_numpy(found.valid_BHW[one]),
                    affine_B3=affine_B3[one],
                    noise_BN=torch.from_numpy(noise_N)[None],
                )


def fisher(config: FisherConfig) -> Path:
    """Computes the diagonal Fisher information of a checkpoint and writes it.

    The file holds one float32 tensor >= 0 of the parameter's shape under each name of the checkpoint. Tensors that are
    not trained (position embeddings) are all 1, so that merging by these weights takes their plain average. Its
    metadata says what it is of.

    Args:
        config: Weights, tiles and output.

    Returns:
        The file.

    Raises:
        CheckpointError: The weights are missing, altered, without a decoder or of another size than the tiles, or a
            gradient is not finite.
        DataError: `out` exists, or a corpus is missing, has no tile in the split, or has one that cannot be read.
        ConfigError: The card lacks normalisation constants of a sensor.
    """
    out = Path(config.out)
    if out.exists():
        fix = "choose another `out`, or remove the file"
        raise DataError("the output exists already", seen=out, rule="Fisher information is never overwritten", fix=fix)
    card = load_card(Path(config.weights))
    sets = _open_tiles(config, card)
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    model = autoencoder_of(card, limit=sets[0].normalisation.limit, lpips_backbone=config.lpips_backbone, device=device)
    tensors, card = load_weights(Path(config.weights), expected=model.state_dict())
    model.load_state_dict(tensors)
    squares, losses = squared_gradients(model, sets, device=device)
    diagonal = {
        name: squares[name].cpu() if name in squares else torch.ones(tensor.shape)
        for name, tensor in sorted(tensors.items())
    }
    with atomic_file(out) as partial:
        # One key: the library would write several in any order, and equal jobs give equal bytes.
        save_file(diagonal, partial, metadata={FISHER_KEY: json.dumps(_metadata(config, card, sets), sort_keys=True)})
    print("\n".join(_table(card, sets, squares, losses, len(diagonal))))
    print(f"written: {out}")
    return out


def squared_gradients(
    model: MaskedAutoencoder, sets: Sequence[FisherTiles], *, device: torch.device | str = "cpu"
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Averages the squared gradient of the loss of each tile over tiles, float32.

    Each tile has its own forward and backward pass: the square of a batch's gradient is another quantity. On a CPU
    the tiles are shared out to the threads, with the same bits on any number of them.

    Args:
        model: The autoencoder with float32 weights in evaluation mode.
        sets: The tiles, scaled by one policy; all count alike, whatever their corpus.
        device: Where the model is.

    Returns:
        Trained parameter name to its mean square, and the losses of the N tiles, float64 of shape (N,). A tile
        without a scored pixel has loss and gradient 0 and is counted.

    Raises:
        CheckpointError: A gradient is not finite.
        DataError: A tile cannot be read.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    sums = {name: torch.zeros_like(parameter) for name, parameter in trained.items()}
    parameters, in_chans = list(trained.values()), model.architecture.in_chans
    kind, count = torch.device(device).type, sum(map(len, sets))
    losses = torch.zeros(count, dtype=torch.float64)

    limit = sets[0].normalisation.limit

    def gradients(tile: TileBatch) -> tuple[str, torch.Tensor, tuple[torch.Tensor, ...]]:
        with torch.enable_grad():
            loss_B = model(*tile.to_inputs(limit=limit, in_chans=in_chans, device=device))
            return tile.keys[0], loss_B.detach(), torch.autograd.grad(loss_B.sum(), parameters)

    queue = itertools.chain.from_iterable(sets)
    bar = require("tqdm", "merge").tqdm(total=count, unit="tile", disable=None, desc="fisher")
    with bar, exact_float32(kind):
        for number, (key, loss_B, found) in enumerate(map_exactly(gradients, queue, kind)):
            losses[number] = loss_B.item()
            for (name, total), gradient in zip(sums.items(), found, strict=True):
                if not torch.isfinite(gradient).all():
                    raise CheckpointError(
                        "a gradient is not finite",
                        seen=f"{name} on tile {key}, loss {loss_B.item():g}",
                        rule="the loss of every tile has a finite gradient",
                        fix="look at the checkpoint with momo validate; take an earlier one",
                    )
                total.addcmul_(gradient, gradient)
            bar.update()
    return {name: total / count for name, total in sums.items()}, losses


def _open_tiles(config: FisherConfig, card: Card) -> list[FisherTiles]:
    if "decoder" not in card.contents:
        raise CheckpointError(
            "the weights have no decoder",
            seen=f"{config.weights} holds {', '.join(card.contents) or 'nothing'}",
            rule="the loss whose gradient is squared is that of the reconstruction, which the decoder makes",
            fix="give a checkpoint of a run, or a merge of whole checkpoints",
        )
    architecture = Architecture.from_dict(card.architecture)
    sets = []
    for place in config.corpora:
        corpus = Corpus(place)
        if corpus.manifest.tile_size != architecture.image_size:
            raise CheckpointError(
                "the weights do not fit the tiles",
                seen=f"{config.weights} takes {architecture.image_size} pixels, tiles of {corpus.location} have "
                f"{corpus.manifest.tile_size}",
                rule="tiles are used as they are, without resampling",
                fix=f"run momo prep with tile_size={architecture.image_size}",
            )
        if corpus.count(config.split) == 0:
            raise DataError(f"the corpus has no {config.split} tile", seen=corpus.location, fix="give another split")
        sets.append(
            FisherTiles(
                corpus=corpus,
                normalisation=normalisation_for(card, corpus),
                split=config.split,
                positions=fisher_subset(corpus, config.split, config.samples, config.seed),
                patches=architecture.patches,
                seed=config.seed,
            )
        )
    return sets


def fisher_subset(corpus: Corpus, split: str, samples: int, seed: int) -> npt.NDArray[np.int64]:
    """Returns the positions of the tiles used, ascending; depends on the corpus, split, count and seed alone."""
    count = corpus.count(split)
    if count <= samples:
        return np.arange(count)
    rng = sample_rng(corpus.manifest.fingerprint, seed, f"fisher subset of {split}")
    return np.sort(rng.choice(count, size=samples, replace=False))


def _metadata(config: FisherConfig, card: Card, sets: Sequence[FisherTiles]) -> dict[str, Any]:
    return {
        "checkpoint_sha256": card.sha256,
        "samples": sum(map(len, sets)),
        "corpora": [
            {"sensor": t.corpus.sensor, "fingerprint": t.corpus.manifest.fingerprint, "samples": len(t)} for t in sets
        ],
        "seed": config.seed,
        "split": config.split,
        "kind": "diagonal, empirical; 1 for tensors that are not trained",
        "momo_version": __version__,
    }


def _table(
    card: Card, sets: Sequence[FisherTiles], squares: dict[str, torch.Tensor], losses: torch.Tensor, names: int
) -> list[str]:
    parts = losses.split([len(tiles) for tiles in sets])
    rows = [f"  {'sensor':<10} {'tiles':>8} {'loss':>9}"]
    for tiles, own in zip(sets, parts, strict=True):
        rows.append(f"  {tiles.corpus.sensor:<10} {len(tiles):>8,} {own.mean().item():>9.4f}  {_remark(card, tiles)}")
    rows.append(f"  {'part':<10} {'values':>8} {'mean':>9} {'zeros':>7}")
    for part in ("encoder", "decoder"):
        own = torch.cat([f.flatten() for name, f in squares.items() if _is_decoder(name) == (part == "decoder")])
        zeros = (own == 0).double().mean().item()
        rows.append(f"  {part:<10} {own.numel() / 1e6:>7.2f}M {own.double().mean().item():>9.2e} {zeros:>7.2%}")
    return [*(line.rstrip() for line in rows), f"  {names - len(squares)} of {names} tensors are not trained: 1"]


def _is_decoder(name: str) -> bool:
    return name.startswith("decoder_") or name == "mask_token"


def _remark(card: Card, tiles: FisherTiles) -> str:
    if tiles.corpus.sensor not in card.data_fingerprints:
        return "NOT A SENSOR the checkpoint was trained on"
    if card.data_fingerprints[tiles.corpus.sensor] != tiles.corpus.manifest.fingerprint:
        return "OTHER TILES than the checkpoint was trained on"
    return ""
