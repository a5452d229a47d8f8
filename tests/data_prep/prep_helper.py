"""Small prep runs for the tests, and ways to look at what they made."""

from __future__ import annotations

import json

import pyarrow.parquet as parquet

from momo.config import config_from_dict
from momo.corpus import Corpus
from momo.data_prep import PrepConfig, prep
from tests.data_prep.products import mars_crs, terrain

LOCATED = {"crs": mars_crs(), "transform": (0.0, 10.0, 0.0, 0.0, 0.0, -10.0)}


def ground(height=128, width=160, seed=0, dtype="uint8", high=200):
    return (terrain(height, width, seed) * high + 10).astype(dtype)


DEFAULTS = {
    "sensor": "CTX", "tile_size": 32, "workers": 1, "on_error": "stop",
    "split": {"val_fraction": 0.3, "block_tiles": 2},
    "duplicates": {"max_overlap": None, "max_distance": None},
}  # fmt: skip


def config_of(products, out, **settings):
    """A small configuration; nested groups are merged over the defaults."""
    values = dict(DEFAULTS)
    for key, value in settings.items():
        old = values.get(key)
        values[key] = old | value if isinstance(old, dict) and isinstance(value, dict) else value
    products = [products] if isinstance(products, str) else products
    return config_from_dict(PrepConfig, {"products": products, "out": str(out), **values})


def run(products, out, **settings):
    lines: list[str] = []
    result = prep(config_of(products, out, **settings), report=lines.append)
    return Corpus(result.path, verify=True), "\n".join(lines)


def tiles(corpus):
    return [corpus.read(split, i) for split in ("train", "val") for i in range(corpus.count(split))]


def index(corpus):
    return parquet.read_table(corpus.path / "index.parquet").to_pylist()


def products_of(corpus):
    return parquet.read_table(corpus.path / "products.parquet").to_pylist()


def decisions(corpus):
    return json.loads((corpus.path / "report.json").read_text())
