"""Coefficients of a merge, found by the sensors' own validation losses."""

from .config import SearchConfig
from .searching import search

__all__ = ["SearchConfig", "search"]
