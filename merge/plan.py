"""A merge, opened and checked: which tensor is made of what, and the merged tensors one by one."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from momo.errors import MergeError
from momo.weights import TensorInfo

from .audit import Parent, audit
from .coefficients import check_globs, check_names, layer_factors, parent_factors
from .config import DROP, MergeConfig
from .fisher_files import open_fisher
from .methods.registry import METHODS, Method, Piece
from .selection import read_selection
from .sources import Source, open_source
from .trim import kept_count, magnitude_threshold

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_FLOATING = tuple(_DTYPES)
_STORED = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_SURVEY = 2**20  # entries of a task vector looked at together


@dataclass(frozen=True)
class MergePlan:
    """What `momo merge` will do.

    Attributes:
        config: The job.
        base: The base, or None for methods without one.
        parents: Checkpoints in the order of their hashes, so that sums do not depend on how they were listed.
        merged: Tensors that are merged, in name order.
        rest: Tensors that are taken over as they are, to the name of the parent they come from.
        dropped: Tensors that the result does not have.
        factors: Factor of each checkpoint, by name.
        layers: Factor of each merged tensor.
    """

    config: MergeConfig
    base: Parent | None
    parents: tuple[Parent, ...]
    merged: tuple[str, ...]
    rest: dict[str, str]
    dropped: tuple[str, ...]
    factors: dict[str, float]
    layers: dict[str, float]

    @property
    def names(self) -> list[str]:
        """Tensors of the result, in name order."""
        return sorted([*self.merged, *self.rest])

    @property
    def method(self) -> Method:
        """The merge method."""
        return METHODS[self.config.method]

    @property
    def everyone(self) -> tuple[Parent, ...]:
        """Base, when there is one, and checkpoints."""
        return (*([self.base] if self.base is not None else []), *self.parents)

    def info(self, name: str) -> TensorInfo:
        """Returns shape and dtype of a tensor of the result, from headers alone."""
        stored = self._giver(name).header[name]
        if self.config.dtype == "keep" or stored.dtype not in _FLOATING:
            return stored
        return TensorInfo(stored.shape, _STORED[self.config.dtype])

    def is_floating(self, name: str) -> bool:
        """Says whether a tensor is merged as numbers; others must be equal in all parents."""
        return self._giver(name).header[name].dtype in _FLOATING

    def dtype(self, name: str) -> torch.dtype:
        """Returns the dtype of a floating-point tensor of the result."""
        return _DTYPES[self.info(name).dtype]

    def tensor(self, name: str) -> torch.Tensor:
        """Returns one tensor of the result, whole.

        Raises:
            MergeError: A parent holds NaN or infinity, or an integer tensor differs between parents.
        """
        if name in self.rest:
            taken = check_finite(self._giver(name), name, self._giver(name).tensor(name))
            return taken.to(self.dtype(name)) if self.is_floating(name) else taken
        tensors = self.stored(name)
        self.check_finite(name, tensors)
        if not self.is_floating(name):
            return _equal(name, tensors)
        return self.method.apply(self.piece(name, tensors, fishers=self.fishers(name))).to(self.dtype(name))

    def check_finite(self, name: str, tensors: Sequence[torch.Tensor]) -> None:
        """Checks a tensor, or the same part of it, of base and checkpoints, as far as the method reads them.

        Raises:
            MergeError: One holds NaN or infinity.
        """
        for parent, tensor in zip(self.everyone, tensors, strict=True):
            if parent.role == "checkpoint" or self.method.needs_base:
                check_finite(parent.source, name, tensor)

    def stored(self, name: str) -> list[torch.Tensor]:
        """Returns a tensor of base and checkpoints as it is stored; not to be changed."""
        return [parent.source.tensor(name) for parent in self.everyone]

    def fishers(self, name: str) -> list[torch.Tensor] | None:
        """Returns the Fisher information of a tensor for each checkpoint, for methods that use it."""
        return [source.tensor(name) for source in self.fisher_sources] if "fisher" in self.method.uses else None

    def piece(
        self,
        name: str,
        tensors: Sequence[torch.Tensor],
        *,
        fishers: Sequence[torch.Tensor] | None = None,
        out: torch.Tensor | None = None,
    ) -> Piece:
        """Returns what the method takes.

        Args:
            name: Tensor.
            tensors: It, or the same part of it, of base and checkpoints.
            fishers: The same of the Fisher files.
            out: Tensor of the same shape and of the arithmetic's dtype that the method may fill.
        """
        has_base = self.base is not None
        return Piece(
            name=name,
            base=tensors[0] if has_base else None,
            tuned=tensors[has_base:],
            coefficients=[self.factors[parent.name] * self.layers[name] for parent in self.parents],
            keys=[parent.source.sha256 for parent in self.parents],
            thresholds=self._thresholds,
            fishers=fishers,
            density=self.config.used_density,
            outliers=self.config.outliers,
            seed=self.config.seed,
            dtype=self.arithmetic,
            out=out,
        )

    @property
    def elementwise(self) -> bool:
        """Says whether a part of a merged tensor depends on the same part of the parents alone."""
        return self.method.elementwise or self._is_trimmed_whole

    @property
    def _is_trimmed_whole(self) -> bool:
        return "trim" in self.method.uses and self.config.trim == "model"

    def replaced(self, **changes: object) -> MergePlan:
        """Returns the plan with other options, on the same opened parents: nothing is opened or audited again.

        Args:
            changes: Fields of `MergeConfig` other than those that name weights.
        """
        return _planned(dataclasses.replace(self.config, **changes), self.base, self.parents)  # type: ignore[arg-type]

    def _giver(self, name: str) -> Source:
        by_name = {parent.name: parent.source for parent in self.everyone}
        return by_name[self.rest[name]] if name in self.rest else self.everyone[0].source

    @functools.cached_property
    def _thresholds(self) -> list[float] | None:
        """Magnitude in each task vector below which entries are trimmed over the whole model."""
        if not self._is_trimmed_whole:
            return None
        names = [name for name in self.merged if self.is_floating(name)]
        count = sum(math.prod(self.info(name).shape) for name in names)
        keep = kept_count(count, self.config.used_density)
        if keep == count:
            return [0.0] * len(self.parents)
        surveys = (functools.partial(self._task_vector, parent, names) for parent in self.parents)
        return [magnitude_threshold(survey, count=count, keep=keep) for survey in surveys]

    def _task_vector(self, parent: Parent, names: Sequence[str]) -> Iterator[torch.Tensor]:
        """Yields the task vector of a checkpoint in parts."""
        assert self.base is not None
        dtype = self.arithmetic
        for name in names:
            start, tuned = (p.source.tensor(name).reshape(-1) for p in (self.base, parent))
            check_finite(self.base.source, name, start)
            check_finite(parent.source, name, tuned)
            for first in range(0, start.numel(), _SURVEY):
                part = slice(first, first + _SURVEY)
                yield tuned[part].to(dtype) - start[part].to(dtype)

    @property
    def arithmetic(self) -> torch.dtype:
        """Dtype of the sums."""
        return torch.float64 if self.config.precision == "fp64" else torch.float32

    @functools.cached_property
    def fisher_sources(self) -> list[Source]:
        """Opened Fisher files, one a checkpoint."""
        check_names("fisher", self.config.fisher, [parent.name for parent in self.parents])
        return [open_fisher(parent, self.config.fisher.get(parent.name), self.merged) for parent in self.parents]


def make_plan(config: MergeConfig) -> MergePlan:
    """Opens the parents of a merge and checks them against one another, from headers and cards alone.

    Raises:
        CheckpointError: A parent is missing or damaged; with `verify`, altered.
        MergeError: The parents do not fit together, or an option names what is not there.
    """
    base, parents = _open(config)
    if config.verify:
        for parent in (*([base] if base is not None else []), *parents):
            parent.source.verify()
    plan = _planned(config, base, parents)
    audit(base, parents, plan.merged, plan.rest)
    if "fisher" in plan.method.uses:
        assert plan.fisher_sources
    return plan


def merged_state(plan: MergePlan) -> dict[str, torch.Tensor]:
    """Returns all merged tensors in memory, for searches and tests; `momo merge` streams instead."""
    return {name: plan.tensor(name) for name in plan.names}


def check_finite(source: Source, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Returns the tensor.

    Raises:
        MergeError: It holds NaN or infinity.
    """
    if not is_finite(tensor):
        raise MergeError(
            "a parent is not finite",
            seen=f"{name} of {source.place}",
            rule="no NaN or infinity",
            fix="choose an earlier checkpoint: look at the incidents in the run's metrics.jsonl",
        )
    return tensor


def is_finite(tensor: torch.Tensor) -> bool:
    """Says whether a tensor holds neither NaN nor infinity."""
    if not tensor.is_floating_point():
        return True
    # A finite sum proves finite entries in one quick pass; only sums that overflow are looked at twice.
    return math.isfinite(tensor.sum().item()) or bool(torch.isfinite(tensor).all())


def _planned(config: MergeConfig, base: Parent | None, parents: tuple[Parent, ...]) -> MergePlan:
    method = METHODS[config.method]
    names = [parent.name for parent in parents]
    method.check_parents(len(parents))
    merged, rest, dropped = _split(config, base, parents)
    coefficient = config.coefficient if config.coefficient is not None else method.default_coefficient
    return MergePlan(
        config=config,
        base=base,
        parents=parents,
        merged=tuple(merged),
        rest=rest,
        dropped=tuple(dropped),
        factors=parent_factors(names, 1.0 if coefficient is None else coefficient, config.coefficients),
        layers=layer_factors(merged, config.layers, config.ramp),
    )


def _split(
    config: MergeConfig, base: Parent | None, parents: tuple[Parent, ...]
) -> tuple[list[str], dict[str, str], list[str]]:
    """Sorts tensors into those merged, those taken over and from whom, and those left out."""
    everyone = {parent.name: parent for parent in (*([base] if base is not None else []), *parents)}
    names = sorted({name for parent in everyone.values() for name in parent.source.header})
    check_globs("include", config.include, names)
    check_globs("exclude", config.exclude, names)
    merged = [name for name in names if _is_wanted(config, name)]
    others = sorted(set(names) - set(merged))
    if not merged:
        raise MergeError(
            "nothing is left to merge", seen=f"scope={config.scope}, include={config.include}, exclude={config.exclude}"
        )
    if config.rest == DROP:
        return merged, {}, others
    if config.rest not in everyone and (others or config.rest != MergeConfig.rest):
        raise MergeError(
            "rest names no parent of this merge",
            seen=config.rest,
            rule=f"one of {', '.join([*everyone, DROP])}",
            fix=f"add rest={parents[0].name} or rest={DROP}",
        )
    return merged, dict.fromkeys(others, config.rest), []


def _is_wanted(config: MergeConfig, name: str) -> bool:
    decoder = name == "mask_token" or name.startswith("decoder")
    if config.scope != "all" and decoder != (config.scope == "decoder"):
        return False
    if config.include and not any(fnmatchcase(name, glob) for glob in config.include):
        return False
    return not any(fnmatchcase(name, glob) for glob in config.exclude)


def _equal(name: str, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    if all(torch.equal(tensors[0], tensor) for tensor in tensors[1:]):
        return tensors[0]
    raise MergeError(
        "an integer tensor differs",
        seen=name,
        rule="only floating-point tensors are merged",
        fix=f"leave it out: exclude=[{name}]",
    )


# --- opening --------------------------------------------------------------------------------------------------------


def _open(config: MergeConfig) -> tuple[Parent | None, tuple[Parent, ...]]:
    base, opened = _open_selected(config) if config.selection is not None else _open_named(config)
    names = [parent.name for parent in opened]
    if base is not None:
        names.insert(0, base.name)
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise MergeError(
            "two parents of the merge have one name",
            seen=", ".join(twice),
            rule="names are those of the sensors, or of the folders",
            fix="give names of your own: models={first: place, second: place}",
        )
    return base, tuple(sorted(opened, key=lambda parent: (parent.source.sha256, parent.name)))


def _open_selected(config: MergeConfig) -> tuple[Parent | None, list[Parent]]:
    assert config.selection is not None
    selection = read_selection(Path(config.selection))
    base = Parent("base", "base", open_source(selection.base["path"]))
    _check_hash(base, selection.base["sha256"])
    opened = []
    for name, chosen in selection.sensors.items():
        opened.append(Parent("checkpoint", name, open_source(chosen.checkpoint)))
        _check_hash(opened[-1], chosen.sha256)
    return base, opened


def _open_named(config: MergeConfig) -> tuple[Parent | None, list[Parent]]:
    base = None if config.base is None else Parent("base", "base", open_source(config.base))
    if config.models:
        return base, [Parent("checkpoint", name, open_source(place)) for name, place in config.models.items()]
    sources = [open_source(place) for place in config.checkpoints]
    return base, [Parent("checkpoint", _label(source), source) for source in sources]


def _label(source: Source) -> str:
    sensors = source.card.sensors if source.card is not None else []
    path = Path(source.place)
    return "+".join(sensor["name"] for sensor in sensors) or (path.stem if path.suffix else path.name)


def _check_hash(parent: Parent, wanted: str) -> None:
    if not wanted:
        raise MergeError(
            "the selection does not say which weights were selected",
            seen=f"{parent.name}: {parent.source.place} without a sha256",
            rule="a checkpoint that was not there when it was selected (allow=[missing_checkpoint]) has none",
            fix="run momo select again where the checkpoints are",
        )
    if parent.source.sha256 != wanted:
        raise MergeError(
            "a weights file is not the one that was selected",
            seen=f"{parent.name}: {parent.source.place} has sha256 {parent.source.sha256[:12]}...",
            rule=f"the selection names {wanted[:12]}...",
            fix="run momo select again",
        )
