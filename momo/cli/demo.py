"""`momo demo`: every stage once, for real and small, on a synthetic Mars.

Each step is a command that could be typed by hand and is printed as such. A step that is finished is skipped; a
killed demo continues with the step it was in (pretraining and evaluation inside it).
"""

from __future__ import annotations

import json
import os
import resource
import shlex
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import config_from_dict, option, positive
from ..errors import ConfigError
from ..extras import require_installed
from ..files import sha256_json, write_json
from ..sensors import SENSORS
from ..version import __version__
from .commands import COMMANDS

# Modules of every extra: a missing one is told before minutes of work, not after.
_NEEDED = {
    "osgeo": "prep", "pyarrow": "prep", "zstandard": "prep", "shapely": "prep",
    "deepspeed": "pretrain", "tensorboard": "pretrain",
    "sklearn": "eval", "matplotlib": "eval", "jinja2": "eval",
}  # fmt: skip


@dataclass(kw_only=True)
class DemoConfig:
    """Size of the demo. The defaults take a few minutes on two cores without a GPU."""

    out: str = option("demo", "folder for everything the demo makes")
    seed: int = option(0, "seed of the synthetic ground, the models and the probes")
    tile_size: int = option(64, "side of a tile, pixels; a multiple of 8")
    base_samples: int = option(56_000, "training samples of the joint base")
    samples: int = option(20_000, "training samples of each sensor model")
    checkpoints: int = option(8, "checkpoints of each sensor model")
    batch_size: int = option(16, "samples a step, over all ranks")
    ranks: int | None = option(None, "training processes; null: two when there are two cores")
    tiles_per_product: int = option(320, "size of a synthetic product, in tiles")
    products: int = option(5, "synthetic products of each camera")
    labelled_images: int = option(420, "training images of each synthetic labelled set")
    decoder_steps: int = option(150, "steps of the segmentation decoder")
    seeds: list[int] = option([0, 1, 2], "seeds of the probes")

    def __post_init__(self) -> None:
        positive(
            base_samples=self.base_samples,
            samples=self.samples,
            checkpoints=self.checkpoints,
            batch_size=self.batch_size,
        )
        if self.tile_size % 8:
            raise ConfigError("tile_size is out of range", seen=self.tile_size, rule="a multiple of 8, the patch side")


@dataclass(frozen=True)
class Step:
    """One command of the demo.

    Attributes:
        name: Unique name, shown and used for the stamp.
        command: Sub-command of momo, or `world`.
        values: Its configuration.
        artefact: What it makes.
        continues: True when the command itself continues half-done work.
    """

    name: str
    command: str
    values: dict[str, Any]
    artefact: Path
    continues: bool = False


def demo(config: DemoConfig) -> Path:
    """Runs all steps and returns the report page.

    Args:
        config: Sizes and the output folder.

    Raises:
        MomoError: A package is missing, or a step failed.
    """
    for module, extra in _NEEDED.items():
        require_installed(module, extra)
    started = time.monotonic()
    out = Path(config.out)
    steps = plan(config)
    print(f"momo {__version__} demo: {len(steps)} steps on SYNTHETIC data, into {out}/")
    history = ""
    for number, step in enumerate(steps, start=1):
        # A step is redone when its own settings or those of any step before it changed.
        history = sha256_json([history, step.command, step.values, __version__])
        _run_step(step, history, out, f"[{number}/{len(steps)}]")
    page = out / "report" / "index.html"
    memory = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    minutes = (time.monotonic() - started) / 60
    print(f"\ndone in {minutes:.1f} min; largest process {memory / 2**20:.1f} GiB")
    print(f"open the page: {page.resolve()}")
    return page


def plan(config: DemoConfig) -> list[Step]:
    """Lists the steps of the demo with their configurations."""
    out = Path(config.out)
    names = {name: name.lower() for name in SENSORS}
    corpora = {name: out / "corpora" / low for name, low in names.items()}
    runs = {name: out / "runs" / low for name, low in names.items()}
    base_run = out / "runs" / "base"
    base = base_run / "checkpoints" / f"samples-{_whole(config.base_samples, config.batch_size):09d}"
    steps = [Step("synthetic Mars", "world", _world(config, out / "world"), out / "world")]
    for name, low in names.items():
        values = {
            "products": [str(out / "world" / "products" / low)],
            "sensor": name,
            "tile_size": config.tile_size,
            "split": {"seed": config.seed, "val_fraction": 0.15},
            "licence": "CC0-1.0",
            "synthetic": True,
            "on_error": "stop",
            "workers": 1,
            "out": str(corpora[name]),
        }
        steps.append(Step(f"prep {name}", "prep", values, corpora[name]))
    joint = _pretrain(config, base_run, list(corpora.values()), None, config.base_samples, 2)
    steps.append(Step("joint base", "pretrain", joint, base, continues=True))
    for name, run in runs.items():
        values = _pretrain(config, run, [corpora[name]], base, config.samples, config.checkpoints)
        last = run / "checkpoints" / f"samples-{_whole(config.samples, config.batch_size):09d}"
        steps.append(Step(f"pretrain {name}", "pretrain", values, last, continues=True))
    return steps + _after_training(config, out, base, runs, corpora)


def _after_training(
    config: DemoConfig, out: Path, base: Path, runs: dict[str, Path], corpora: dict[str, Path]
) -> list[Step]:
    selection, last = out / "selection.yaml", out / "selection-last.yaml"
    merged, average = out / "merged" / "evl", out / "merged" / "last-average"
    run_list = [str(run) for run in runs.values()]
    finals = {
        name: run / "checkpoints" / f"samples-{_whole(config.samples, config.batch_size):09d}"
        for name, run in runs.items()
    }
    models: list[dict[str, Any]] = [
        {"name": "random-init", "random_init": True, "like": str(base)},
        {"name": "joint-base", "weights": str(base)},
        *({"name": name, "weights": str(path)} for name, path in finals.items()),
        {"name": "last-average", "weights": str(average)},
        {"name": "evl-merge", "weights": str(merged)},
    ]
    labelled = [str(out / "world" / "labelled" / name) for name in ("demo-landform_cls", "demo-crater_seg")]
    evaluation = {
        "datasets": [{"path": path} for path in labelled],
        "models": models,
        "seeds": config.seeds,
        "decoder": {"steps": config.decoder_steps},
        "out": str(out / "results"),
    }
    report = {
        "title": "momo demo on a synthetic Mars",
        "results": str(out / "results"),
        "runs": [str(out / "runs" / "base"), *run_list],
        "selection": str(selection),
        "weights": [
            {"name": "evl-merge", "path": str(merged)},
            {"name": "joint-base", "path": str(base)},
            *({"name": name, "path": str(path)} for name, path in finals.items()),
        ],
        "corpora": [str(path) for path in corpora.values()],
        "out": str(out / "report"),
    }
    return [
        Step("select (EVL)", "select", {"runs": run_list, "out": str(selection)}, selection),
        Step("select (last)", "select", {"runs": run_list, "rule": "last", "out": str(last)}, last),
        Step("merge EVL", "merge", {"selection": str(selection), "out": str(merged)}, merged),
        Step(
            "average of last",
            "merge",
            {"selection": str(last), "method": "average", "out": str(average)},
            average,
        ),
        Step("eval", "eval", evaluation, out / "results", continues=True),
        Step("report", "report", report, out / "report"),
    ]


def _world(config: DemoConfig, out: Path) -> dict[str, Any]:
    return {
        "out": str(out),
        "seed": config.seed,
        "tile_size": config.tile_size,
        "products": config.products,
        "tiles_per_product": config.tiles_per_product,
        "crater_images": config.labelled_images * 4 // 7,
        "landform_images": config.labelled_images,
    }


def _pretrain(
    config: DemoConfig, out: Path, corpora: list[Path], base: Path | None, samples: int, checkpoints: int
) -> dict[str, Any]:
    samples = _whole(samples, config.batch_size)
    ranks = config.ranks or min(2, os.cpu_count() or 1)
    values: dict[str, Any] = {
        "out": str(out),
        "seed": config.seed,
        "ranks": ranks,
        "licence": "CC0-1.0",
        "data": {"corpora": [str(path) for path in corpora]},
        "train": {
            "samples": samples,
            "batch_size": config.batch_size,
            "base_lr": 0.016,
            "warmup_samples": samples // 10,
            "precision": "fp32",
        },
        # Standardised patches: with raw pixels so short a training learns brightness and little else.
        "model": {"norm_pix_loss": True},
        "validation": {"every": max(config.batch_size, samples // checkpoints), "samples": 256},
    }
    if base is None:
        values["model"] |= {"size": "pico", "patch_size": 8}
    else:
        values["base"] = str(base)
    return values


def _whole(samples: int, batch_size: int) -> int:
    return max(batch_size, samples - samples % batch_size)


def _run_step(step: Step, history: str, out: Path, counter: str) -> None:
    stamp = out / ".steps" / f"{step.name.replace(' ', '-').replace('(', '').replace(')', '').lower()}.json"
    state = json.loads(stamp.read_text(encoding="utf-8")) if stamp.is_file() else {}
    if state.get("history") == history and state.get("done") and step.artefact.exists():
        print(f"\n{counter} {step.name}: done before, skipped ({step.artefact})")
        return
    print(f"\n{counter} {step.name}\n$ {command_line(step)}")
    made = Path(step.values["out"])
    if made.exists() and state.get("history") != history:
        _remove_own(made, known=bool(state))
    write_json(stamp, {"history": history, "done": False})
    started = time.monotonic()
    # What is not continued is written in one go, so if it is there it is whole.
    if step.continues or not made.exists():
        schema, function = _load(step.command)
        function(config_from_dict(schema, step.values, f"demo step {step.name!r}"))
    write_json(stamp, {"history": history, "done": True})
    print(f"-> {step.artefact} ({time.monotonic() - started:.0f} s)")


def _remove_own(made: Path, *, known: bool) -> None:
    """Removes what an earlier demo with other settings made; anything else is the user's and stays."""
    if not known:
        raise ConfigError(
            "the demo would overwrite something it did not make",
            seen=made,
            rule="the demo's folder is new or an earlier demo's",
            fix="choose another folder with out=...",
        )
    print(f"settings changed since the last demo: {made} is made again")
    shutil.rmtree(made) if made.is_dir() else made.unlink()


def _load(command: str) -> tuple[type, Callable[[Any], Path]]:
    if command == "world":
        # The synthetic world is a part of the demo, not a stage with a command of its own.
        from momo.data_prep import WorldConfig, make_world

        return WorldConfig, make_world
    return COMMANDS[command].load()


def command_line(step: Step) -> str:
    """Returns a step as a line that can be typed; the synthetic world has a Python call instead."""
    if step.command == "world":
        arguments = ", ".join(f"{key}={value!r}" for key, value in step.values.items())
        return f"python -c 'from momo.data_prep import *; make_world(WorldConfig({arguments}))'"
    items = " ".join(shlex.quote(f"{key}={_yaml(value)}") for key, value in _flat(step.values))
    return f"momo {step.command} {items}"


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    items: list[tuple[str, Any]] = []
    for key, value in values.items():
        items += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]
    return items


def _yaml(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ",".join(_yaml(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}: {_yaml(item)}" for key, item in value.items()) + "}"
    return str(value).lower() if isinstance(value, bool) else str(value)
