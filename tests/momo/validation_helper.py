"""Subsets of tiles, altered corpora and an objective of two terms for the tests of validation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from momo.corpus import Corpus
from momo.files import sha256_file
from momo.normalise import Normalisation
from momo.pretrain.validation_tiles import ValidationTiles


def tiles_of(corpus: Path | str, **options: Any) -> ValidationTiles:
    fields = {"patches": 16, "limit": 100, "seed": 1} | options
    return ValidationTiles(Corpus(corpus), fields.pop("normalisation", Normalisation()), **fields)


def set_units(corpus: Path, unit_of: dict[str, str], statistics: bool = True) -> None:
    """Writes geologic units into the index, and the index's new hash into the manifest."""
    path = corpus / "index.parquet"
    table = pq.read_table(path)
    units = [unit_of.get(key, "") for key in table["key"].to_pylist()]
    place = table.schema.get_field_index("unit")
    pq.write_table(table.set_column(place, "unit", pa.array(units)), path, write_statistics=statistics)
    manifest = json.loads((corpus / "manifest.json").read_text())
    manifest["tables"]["index.parquet"] = sha256_file(path)
    (corpus / "manifest.json").write_text(json.dumps(manifest))


def damage(corpus: Corpus, position: int) -> None:
    """Alters a byte of a validation tile's pixels; the shard keeps its size."""
    shard, offset, nbytes = corpus.index["val"].place(position)
    path = corpus.path / "shards" / corpus.manifest.shards[shard].name
    raw = bytearray(path.read_bytes())
    frame = raw.index(b"\x28\xb5\x2f\xfd", offset, offset + nbytes)  # the magic number of Zstandard
    raw[frame + 40] ^= 0xFF
    path.chmod(0o644)
    path.write_bytes(raw)


class TwoTerms:
    """An objective that joins two terms."""

    def __init__(self) -> None:
        self.terms: dict[str, torch.Tensor] = {}

    def __call__(self, prediction_BMP, hidden_BM, image_BCHW, valid_BHW):
        bright_B, rough_B = image_BCHW.square().mean(dim=(1, 2, 3)), image_BCHW.diff(dim=3).square().mean(dim=(1, 2, 3))
        self.terms = {"rough": rough_B, "bright": bright_B}
        return 0.5 * bright_B + 0.5 * rough_B

    def describe(self) -> dict[str, Any]:
        return {"loss": {"bright": 0.5, "rough": 0.5}}
