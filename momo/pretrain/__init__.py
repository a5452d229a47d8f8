"""Masked-autoencoder pretraining under DeepSpeed: corpora in, a RUN folder out."""

from .config import PretrainConfig
from .launch import pretrain

__all__ = ["PretrainConfig", "pretrain"]
