"""A seeded procedural Mars, clearly synthetic: products of three cameras and two labelled sets.

world.json                      what everything is: seed, config, footprints, GSD, SHA-256 of every file
products/hirise/*.cub           ISIS3, 10 bit in uint16, special pixel values
products/ctx/*.xml, *.img       PDS4, 8 bit, slanted swath
products/themis/*.tif           GeoTIFF, float32 brightness temperature
labelled/demo-crater_seg/       binary crater masks, Mars-Bench layout
labelled/demo-landform_cls/     seven landforms, Mars-Bench layout
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from momo.config import to_dict
from momo.files import atomic_folder, sha256_file, write_json
from momo.version import __version__

from .cameras import CAMERAS
from .config import WorldConfig
from .ground import Ground
from .labelled import write_labelled
from .products import LICENCE, MARS_WKT, NOTE, plan_products, write_product

__all__ = ["WorldConfig", "make_world"]


def make_world(config: WorldConfig) -> Path:
    """Generates the synthetic world into `config.out`; the same config gives the same bytes.

    Args:
        config: What to generate.

    Returns:
        The folder, `config.out`.

    Raises:
        DataError: `config.out` exists, or the ground has too few places of some class.
        ConfigError: GDAL is not installed.
    """
    ground = Ground(config.seed, config.crater_density)
    plans = plan_products(config)
    with atomic_folder(config.out) as folder:
        bar = tqdm(plans, desc="synthetic products", leave=False, disable=None)
        products = [write_product(plan, ground, folder / "products") for plan in bar]
        labelled = write_labelled(config, ground, plans, folder / "labelled")
        write_json(folder / "world.json", _describe(config, products, labelled, folder))
    tiles = {name: sum(_tiles(p, config.tile_size) for p in products if p["sensor"] == name) for name in CAMERAS}
    print(f"synthetic world, seed {config.seed}: {config.out}")
    print("  products: " + ", ".join(f"{config.products} {name} ({tiles[name]} whole tiles)" for name in CAMERAS))
    print("  labelled: " + ", ".join(f"{entry['dataset']} ({len(entry['images'])} images)" for entry in labelled))
    return config.out


def _tiles(product: dict[str, Any], size: int) -> int:
    return (product["rows"] // size) * (product["columns"] // size)


def _describe(
    config: WorldConfig, products: list[dict[str, Any]], labelled: list[dict[str, Any]], folder: Path
) -> dict[str, Any]:
    settings = to_dict(config)
    del settings["out"]
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        "format": "momo-world",
        "format_version": 1,
        "synthetic": True,
        "description": NOTE,
        "licence": LICENCE,
        "momo_version": __version__,
        "seed": config.seed,
        "config": settings,
        "crs": MARS_WKT,
        "cameras": {name: asdict(camera) for name, camera in CAMERAS.items()},
        "products": products,
        "labelled": labelled,
        "files": {str(path.relative_to(folder)): sha256_file(path) for path in files},
    }
