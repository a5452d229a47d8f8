"""Choosing checkpoints: validation curves of several runs in, one SELECTION out."""

from .choose import select
from .config import SelectConfig
from .evl import Candidate, Pick, select_evl, sweep_epsilon

__all__ = ["Candidate", "Pick", "SelectConfig", "select", "select_evl", "sweep_epsilon"]
