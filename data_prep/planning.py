"""Which tiles of a whole corpus are taken, and into which split, on columns of numbers alone.

The steps: ground that must not be trained on; tiles off the map or over ground of both splits; a check that no
training tile overlaps a validation tile; duplicates; last the sampling plan. What the split drops goes before
duplicates are looked for, so that no tile goes in favour of one that the split drops.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from momo.errors import DataError

from .config import PrepConfig
from .duplicates import Removed, remove_alike, remove_overlapping
from .footprints import read_footprints
from .overlap import Shapes, overlapping_pairs, quadrilaterals
from .pieces import tile_key
from .split import TRAIN, VAL, Blocks, SplitRule, balanced, make_blocks
from .strata import cells, latitude_bands, priorities, sample, units_at

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
LEAK, OFF_MAP, BORDER = "on ground of the given footprints", "off the map", "across train and val ground"
OVERLAP, ALIKE = "overlaps a better tile", "looks like a better tile"
VAL_GROUND, NOT_DRAWN = "overlaps validation ground", "not drawn by the sampling plan"
REASONS = ("", LEAK, OFF_MAP, BORDER, OVERLAP, ALIKE, VAL_GROUND, NOT_DRAWN)
_SLIVER = 1e-6  # share of ground; less is rounding
_EXAMPLES = 12
_ROWS = 1000  # strata listed in the report


@dataclass(frozen=True)
class TileTable:
    """What planning needs of N tiles, in order of product, row and column.

    Attributes:
        product_ids: Key of each product.
        product_N: Product of each tile, an index into `product_ids`.
        row_N: First row of the window.
        col_N: First column.
        size: Side of a window, pixels.
        lon_N: Planetocentric longitude of the centre, degrees east; NaN without a CRS.
        lat_N: Planetocentric latitude, degrees; NaN without a CRS.
        corners_N8: Longitude and latitude of the corners in order, degrees; NaN without a CRS.
        cell_N: HEALPix cell (nested) of the centre; -1 without a CRS.
        touched: Blocks of all tiles; see `split.Places`.
        start_N1: Where each tile's blocks start in `touched`.
        phash_N: 64-bit perceptual hash.
        gsd_N: Metres a pixel; NaN when unknown.
        quality_N: Structural score; of two duplicates the better one stays.
    """

    product_ids: list[str]
    product_N: npt.NDArray[np.int32]
    row_N: npt.NDArray[np.int32]
    col_N: npt.NDArray[np.int32]
    size: int
    lon_N: Floats
    lat_N: Floats
    corners_N8: Floats
    cell_N: Ints
    touched: Ints
    start_N1: Ints
    phash_N: npt.NDArray[np.uint64]
    gsd_N: Floats
    quality_N: Floats

    def __len__(self) -> int:
        return len(self.product_N)

    def key(self, tile: int) -> str:
        """Returns the key of a tile."""
        return tile_key(self.product_ids[self.product_N[tile]], int(self.row_N[tile]), int(self.col_N[tile]))


@dataclass(frozen=True)
class Plan:
    """What becomes of each tile.

    Attributes:
        split_N: 0 train, 1 validation, -1 not taken.
        reason_N: Why a tile is not taken, an index into `reasons`; 0 for those taken.
        reasons: Texts of the reasons.
        unit_N: Geologic unit, an index into `units`; known for tiles that reached the sampling plan.
        units: Names of the units; the first is "", for no unit.
        report: What was decided and why, as JSON values.
    """

    split_N: npt.NDArray[np.int8]
    reason_N: npt.NDArray[np.uint8]
    reasons: tuple[str, ...]
    unit_N: npt.NDArray[np.int32]
    units: list[str]
    report: dict[str, Any]
    _block_N: Ints = field(repr=False)
    _block_name: list[str] = field(repr=False)

    def block_names(self, indices: npt.NDArray[Any] | Sequence[int]) -> list[str]:
        """Returns what decided the split of tiles: their cell, block of pixels, or product; "" off the map."""
        return [self._block_name[block] if block >= 0 else "" for block in self._block_N[np.asarray(indices, int)]]


def make_plan(table: TileTable, config: PrepConfig, order: int) -> Plan:
    """Decides which tiles are taken, and into which split.

    Args:
        table: All tiles that are good by themselves.
        config: Settings: `leakage`, `split`, `duplicates` and `strata`.
        order: HEALPix order of the cells in the table; -1 when no product has a CRS.

    Raises:
        DataError: A footprint or unit file is bad, or a tile leaks and `leakage.on_overlap` is `stop`.
    """
    return _Planner(table, config, order).plan()


class _Planner:
    def __init__(self, table: TileTable, config: PrepConfig, order: int) -> None:
        self.table, self.config, self.order = table, config, order
        self.reason_N = np.zeros(len(table), dtype=np.uint8)
        self.located_N: Bools = np.all(np.isfinite(table.corners_N8), axis=1)
        self.notes: list[str] = []
        self.report: dict[str, Any] = {}

    def plan(self) -> Plan:
        self._drop_leaks()
        blocks, split_N = self._split()
        self._drop_validation_ground(split_N)
        self._drop_duplicates()
        unit_N, units = self._units()
        self._sample(split_N, unit_N, units)
        split_N[self.reason_N != 0] = -1
        self._count(split_N)
        inside = np.flatnonzero(np.diff(blocks.start_N1) > 0)
        block_N = np.full(len(self.table), -1, dtype=np.int64)
        block_N[inside] = blocks.touched[blocks.start_N1[inside]]
        return Plan(split_N, self.reason_N, REASONS, unit_N, units, self.report, block_N, blocks.names)

    def _alive(self, among_N: Bools | None = None) -> Ints:
        taken = self.reason_N == 0
        return np.flatnonzero(taken if among_N is None else taken & among_N)

    def _drop(self, tiles: Ints, reason: str) -> None:
        self.reason_N[tiles] = REASONS.index(reason)

    def _ground(self, tiles: Ints) -> Shapes:
        return quadrilaterals(self.table.corners_N8[tiles])

    def _drop_leaks(self) -> None:
        leakage = self.config.leakage
        if leakage.footprints is None:
            return
        footprints, places, notes = read_footprints(leakage.footprints)
        self.notes += notes
        placed = self._alive(self.located_N)
        pairs = overlapping_pairs(self._ground(placed), footprints, _SLIVER, either=True)
        leaks, first = np.unique(placed[pairs.i], return_index=True)
        examples = [
            [self.table.key(tile), places[pairs.j[k]], round(float(pairs.share_i[k]), 4)]
            for tile, k in zip(leaks[:_EXAMPLES].tolist(), first[:_EXAMPLES].tolist(), strict=True)
        ]
        if len(leaks) and leakage.on_overlap == "stop":
            raise DataError(
                "tiles lie on ground that must not be trained on",
                seen=f"{len(leaks)} tiles; the first: {examples[0][0]} on {examples[0][1]} of {leakage.footprints}",
                rule="leakage.on_overlap=stop: no tile overlaps a footprint",
                fix="leave these products out, or set leakage.on_overlap=drop",
            )
        self._drop(leaks, LEAK)
        self._note_unplaced("overlap with the given footprints")
        self.report["leakage"] = {
            "footprints": len(footprints), "touched_footprints": len(np.unique(pairs.j)), "tiles": len(leaks),
            "examples": examples,
        }  # fmt: skip

    def _note_unplaced(self, what: str) -> None:
        count = len(self._alive(~self.located_N & (np.diff(self.table.start_N1) > 0)))
        if count:
            self.notes.append(f"{count} tiles of products without a CRS have no place on Mars: {what} is not checked")

    def _split(self) -> tuple[Blocks, npt.NDArray[np.int8]]:
        table, settings = self.table, self.config.split
        inside_N = np.diff(table.start_N1) > 0
        if settings.by == "product":
            start_N1 = np.concatenate([[0], np.cumsum(inside_N)]).astype(np.int64)
            blocks = Blocks(table.product_ids, table.product_N[inside_N].astype(np.int64), start_N1)
        else:
            blocks = make_blocks(table.touched, table.start_N1, table.product_N, table.product_ids, self.order)
        self._drop(self._alive(~inside_N), OFF_MAP)
        rule = balanced(SplitRule(settings.seed, settings.val_fraction), blocks, self.reason_N == 0)
        for block, split in rule.forced.items():
            self.notes.append(f"few blocks: the hash left {split} empty, so block {block} was moved to {split}")
        split_N = blocks.splits(rule)
        self._drop(self._alive(split_N < 0), BORDER)
        self.report["split"] = {
            "by": settings.by, "order": self.order, "seed": settings.seed, "val_fraction": settings.val_fraction,
            "blocks": len(blocks.names), "forced": rule.forced,
        }  # fmt: skip
        return blocks, split_N

    def _best_first(self, tiles: Ints) -> Ints:
        """Returns tiles by falling quality; equal ones in order of product id, row and column."""
        table = self.table
        rank_K = np.empty(len(table.product_ids), dtype=np.int64)
        rank_K[np.argsort(np.array(table.product_ids, dtype=object), kind="stable")] = np.arange(len(rank_K))
        quality = np.nan_to_num(table.quality_N[tiles], nan=-np.inf)
        keys = (table.col_N[tiles], table.row_N[tiles], rank_K[table.product_N[tiles]], -quality)
        return tiles[np.lexsort(keys)]

    def _drop_duplicates(self) -> None:
        settings, table = self.config.duplicates, self.table
        found: dict[str, Removed] = {}
        if settings.max_overlap is not None:
            order = self._best_first(self._alive(self.located_N))
            found[OVERLAP] = remove_overlapping(order, table.corners_N8, table.product_N, settings.max_overlap)
            self._drop(found[OVERLAP].tile, OVERLAP)
            self._note_unplaced("overlap with other products")
        if settings.max_distance is not None:
            order = self._best_first(self._alive())
            found[ALIKE] = remove_alike(order, table.phash_N, settings.max_distance)
            self._drop(found[ALIKE].tile, ALIKE)
        # First as many of each rule, then what is left of the other.
        listed = {why: list(range(len(removed.tile))) for why, removed in found.items()}
        few = min((len(numbers) for numbers in listed.values()), default=0)
        each = max(_EXAMPLES // 2, _EXAMPLES - few) if len(listed) == 2 else _EXAMPLES
        examples = [
            [table.key(int(removed.tile[n])), table.key(int(removed.kept[n])), why, round(float(removed.value[n]), 4)]
            for why, removed in found.items()
            for n in listed[why][:each]
        ]
        self.report["duplicates"] = {
            "overlap": len(found[OVERLAP].tile) if OVERLAP in found else None,
            "hash": len(found[ALIKE].tile) if ALIKE in found else None,
            "examples": examples[:_EXAMPLES],
        }

    def _drop_validation_ground(self, split_N: npt.NDArray[np.int8]) -> None:
        train, val = (self._alive(self.located_N & (split_N == split)) for split in (TRAIN, VAL))
        pairs = overlapping_pairs(self._ground(train), self._ground(val), _SLIVER, either=True)
        offenders = np.unique(train[pairs.i])
        self._drop(offenders, VAL_GROUND)
        self.report["ground_check"] = {"train_tiles": len(train), "val_tiles": len(val), "dropped": len(offenders)}
        if len(val) and self.config.split.by == "product":
            self._note_unplaced("overlap of train and validation")

    def _units(self) -> tuple[npt.NDArray[np.int32], list[str]]:
        strata, table = self.config.strata, self.table
        unit_N = np.zeros(len(table), dtype=np.int32)
        if strata.units is None:
            return unit_N, [""]
        assert strata.column is not None
        alive = self._alive()
        unit_N[alive], units, notes = units_at(
            table.lon_N[alive], table.lat_N[alive], strata.units, strata.column, strata.layer
        )
        self.notes += notes
        outside = int((unit_N[alive] == 0).sum())
        if outside:
            self.notes.append(f"{outside} tiles lie in no polygon of {strata.units}: their unit is empty")
        return unit_N, units

    def _sample(self, split_N: npt.NDArray[np.int8], unit_N: npt.NDArray[np.int32], units: list[str]) -> None:
        """Applies the plan to each split by itself; `tiles` and `cap` are divided by the splits' shares of tiles."""
        strata, table, alive = self.config.strata, self.table, self._alive()
        if strata.by == "latitude":
            stratum, names = latitude_bands(table.lat_N[alive], strata.latitude_deg)
        elif strata.by == "healpix":
            stratum, names = cells(table.lon_N[alive], table.lat_N[alive], strata.order)
        elif strata.units is not None:
            stratum, names = unit_N[alive], units
        else:
            return
        priority = priorities(
            table.product_N[alive], table.product_ids, table.row_N[alive], table.col_N[alive], strata.seed
        )
        members = [np.flatnonzero(split_N[alive] == split) for split in (TRAIN, VAL)]
        tiles, cap = (_divided(total, [len(m) for m in members]) for total in (strata.tiles, strata.cap))
        taken = np.zeros(len(alive), dtype=bool)
        for split, mine in enumerate(members):
            taken[mine] = sample(stratum[mine], strata.plan, priority[mine], tiles=tiles[split], cap=cap[split])
        self._drop(alive[~taken], NOT_DRAWN)
        counts_KS = np.stack(
            [np.bincount(stratum[which], minlength=len(names)) for which in (slice(None), taken)]
            + [np.bincount(stratum[mine[taken[mine]]], minlength=len(names)) for mine in members],
            axis=1,
        )
        self._report_strata(names, counts_KS)

    def _report_strata(self, names: list[str], counts_KS: Ints) -> None:
        strata = self.config.strata
        present = np.flatnonzero(counts_KS[:, 0])
        listed = present[np.argsort(-counts_KS[present, 0], kind="stable")][:_ROWS]
        columns = ("available", "taken", "train", "val")
        self.report["strata"] = {
            "by": "unit" if strata.by == "none" else strata.by, "plan": strata.plan, "seed": strata.seed,
            "strata": len(present),
            "table": [
                {"name": names[k], **dict(zip(columns, counts_KS[k].tolist(), strict=True))} for k in listed.tolist()
            ],
        }  # fmt: skip
        if len(present) > _ROWS:
            self.notes.append(f"report.json lists the {_ROWS} largest of {len(present)} strata")
        if strata.plan in ("uniform", "sqrt") and strata.tiles is None and len(present):
            smallest = present[np.argmin(counts_KS[present, 0])]
            self.notes.append(
                f"strata.plan={strata.plan} without strata.tiles goes by the smallest stratum of each split; over "
                f"both the smallest is {names[smallest] or 'no unit'!r} with {counts_KS[smallest, 0]} tiles"
            )

    def _count(self, split_N: npt.NDArray[np.int8]) -> None:
        counts = np.bincount(self.reason_N, minlength=len(REASONS))
        train, val = int((split_N == TRAIN).sum()), int((split_N == VAL).sum())
        self.report["planning"] = {
            "tiles": len(self.table), "train": train, "val": val,
            "dropped": {REASONS[k]: int(counts[k]) for k in range(1, len(REASONS)) if counts[k]},
        }  # fmt: skip
        if self.config.split.val_fraction > 0 and val == 0 and train:
            self.notes.append(
                "no validation tile is left: all tiles lie in one block, or those of the validation blocks were "
                "dropped; make blocks smaller (split.order, split.block_tiles), raise split.val_fraction, or take "
                "another split.seed"
            )
        if train == 0 and len(self.table):
            self.notes.append("no training tile is left: see the counts of dropped tiles")
        self.report["notes"] = self.notes


def _divided(total: int | None, counts: Sequence[int]) -> list[int | None]:
    """Divides a number over train and validation by their tiles; a split with tiles gets at least 1."""
    if total is None:
        return [None, None]
    train, val = counts
    second = round(total * val / max(1, train + val))
    second = max(1, second) if val else 0
    return [max(1, total - second) if train else 0, second]
