"""The `momo` command: one sub-command a stage, each with a configuration and a function."""

from .main import main

__all__ = ["main"]
