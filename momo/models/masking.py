"""Random numbers that depend on a sample's key, never on the order, rank or worker that reads it."""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt


def sample_rng(key: str, seed: int, purpose: str) -> np.random.Generator:
    """Returns a generator seeded by a tile key, a seed and a purpose.

    Args:
        key: Unique key of the tile.
        seed: Seed of the run, or the fixed seed of validation.
        purpose: Keeps draws for different uses apart, for example `mask`.
    """
    digest = hashlib.blake2b(f"{purpose}\0{seed}\0{key}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest, dtype=np.uint64)))


def augmentation_rng(key: str, seed: int, epoch: int) -> np.random.Generator:
    """Returns the generator of one training visit to a tile: other draws each epoch, same draws on resume."""
    return sample_rng(key, seed, f"train epoch {epoch}")


def mask_noise(rng: np.random.Generator, patches: int) -> npt.NDArray[np.float32]:
    """Draws the noise whose smallest entries mark the patches the encoder sees.

    Args:
        rng: Source of randomness.
        patches: Number of patches N.

    Returns:
        float32 of shape (N,) in [0, 1).
    """
    return rng.random(patches, dtype=np.float32)
