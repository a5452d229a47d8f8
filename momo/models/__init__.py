"""The masked autoencoder, its sizes and masks, and the encoder taken out of it."""

from .architecture import SIZES, Architecture
from .encoder import load_encoder, random_encoder
from .mae import MaskedAutoencoder, build_mae, load_mae
from .masking import augmentation_rng, mask_noise, sample_rng

__all__ = [
    "SIZES",
    "Architecture",
    "MaskedAutoencoder",
    "augmentation_rng",
    "build_mae",
    "load_encoder",
    "load_mae",
    "mask_noise",
    "random_encoder",
    "sample_rng",
]
