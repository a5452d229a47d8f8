"""Hand-made runs: checkpoints of pico weights that share one base, with chosen validation losses."""

from __future__ import annotations

from pathlib import Path

import torch

from momo.config import to_yaml
from momo.models import build_mae
from momo.normalise import Normalisation
from momo.pretrain.config import DataOptions, PretrainConfig
from momo.runs import checkpoint_name
from momo.weights import Card, load_card, save_weights
from tests.conftest import PICO

SENSORS = ("HiRISE", "CTX", "THEMIS")
LOSSES = ([0.9, 0.6, 0.4], [0.8, 0.62, 0.5], [0.95, 0.7, 0.61])


def write_run(run: Path, base: Path, sensor: str, losses: list[float], *, seed: int = 1, **card_fields) -> Path:
    """Writes a run with one checkpoint a loss, at 100, 200, ... samples; weights drift from the base."""
    start = build_mae(PICO, seed=0).state_dict()
    generator = torch.Generator().manual_seed(seed)
    fields = {
        "kind": "checkpoint",
        "architecture": PICO.to_dict(),
        "contents": ["encoder", "decoder"],
        "normalisation": Normalisation().to_dict(),
        "sensors": [{"name": sensor, "tiles": 10}],
        "data_fingerprints": {sensor: f"{seed:064d}"},
        "parents": [{"role": "base", "name": base.name, "sha256": load_card(base).sha256}],
        "synthetic": True,
    } | card_fields
    for number, loss in enumerate(losses, start=1):
        folder = run / "checkpoints" / checkpoint_name(100 * number)
        folder.mkdir(parents=True)
        tensors = {
            name: tensor + 0.01 * number * torch.randn(tensor.shape, generator=generator)
            for name, tensor in start.items()
        }
        val_loss = {"loss": loss, "stderr": 0.01, "count": 20, "protocol": "p" * 64, "per_sensor": {}}
        save_weights(folder, tensors, Card(**({"val_loss": val_loss} | fields), samples=100 * number))
    config = PretrainConfig(out=str(run), base=str(base), data=DataOptions(corpora=["c"]))
    (run / "config.yaml").write_text(to_yaml(config))
    return run
