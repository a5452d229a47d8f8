"""What stands between several checkpoints, in their weights, their losses and their features."""

from .diagnosing import DiagnoseConfig, diagnose

__all__ = ["DiagnoseConfig", "diagnose"]
