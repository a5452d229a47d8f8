"""How much of a footprint's ground another footprint shows: pairs of polygons on the sphere that overlap.

Candidates are found by a k-d tree on the centres; the exact share is the area of the intersection in the gnomonic plane
of the first one's centre, in which great circles are straight. So neither the antimeridian nor a pole is special.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from momo.errors import DataError
from momo.extras import require

from .split import unit_vectors

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
_CANDIDATES = 1 << 20  # candidate pairs in memory
_VERTICES = 1 << 20  # vertices of one chunk of exact tests
MOST_RADIUS_DEG = 25.0  # so that no vertex of a candidate comes near the horizon of the gnomonic plane


@dataclass(frozen=True)
class Shapes:
    """N polygons on the sphere, with edges along great circles.

    Attributes:
        vertex_V2: Planetocentric longitude and latitude, degrees; rings are not closed.
        ring_R1: Ring r has the vertices `ring_R1[r] : ring_R1[r + 1]`.
        shape_N1: Polygon i has the rings `shape_N1[i] : shape_N1[i + 1]`, the outer one first.
    """

    vertex_V2: Floats
    ring_R1: Ints
    shape_N1: Ints

    def __len__(self) -> int:
        return len(self.shape_N1) - 1

    @cached_property
    def start_N1(self) -> Ints:
        """First vertex of each polygon, and the end."""
        return self.ring_R1[self.shape_N1]

    @cached_property
    def centre_N3(self) -> Floats:
        """Mean direction of the vertices, on the unit sphere."""
        total_N3 = np.add.reduceat(self._xyz_V3(), self.start_N1[:-1]) if len(self) else np.empty((0, 3))
        return total_N3 / np.linalg.norm(total_N3, axis=1, keepdims=True)

    @cached_property
    def radius_N(self) -> Floats:
        """Longest chord from the centre to a vertex, in radii of Mars."""
        if not len(self):
            return np.empty(0)
        far_V = np.linalg.norm(self._xyz_V3() - np.repeat(self.centre_N3, np.diff(self.start_N1), axis=0), axis=1)
        return np.asarray(np.maximum.reduceat(far_V, self.start_N1[:-1]))

    def _xyz_V3(self) -> Floats:
        return unit_vectors(self.vertex_V2[:, 0], self.vertex_V2[:, 1])

    def take(self, index_N: Ints) -> Shapes:
        """Returns the polygons with the given numbers."""
        ring = _ranges(self.shape_N1[index_N], self.shape_N1[index_N + 1])
        vertex = _ranges(self.ring_R1[ring], self.ring_R1[ring + 1])
        ring_R1 = _offsets(self.ring_R1[ring + 1] - self.ring_R1[ring])
        return Shapes(self.vertex_V2[vertex], ring_R1, _offsets(self.shape_N1[index_N + 1] - self.shape_N1[index_N]))


class Pairs(NamedTuple):
    """Pairs of overlapping polygons, in order of `i`, then `j`.

    Attributes:
        i: Numbers in the first set.
        j: Numbers in the second.
        share_i: Share of the ground of `i` that `j` shows too, 0..1.
        share_j: Share of the ground of `j` that `i` shows too.
    """

    i: Ints
    j: Ints
    share_i: Floats
    share_j: Floats


def quadrilaterals(corners_N8: Floats) -> Shapes:
    """Returns the ground of tiles.

    Args:
        corners_N8: Longitude and latitude of the corners in order, degrees; finite.
    """
    count = len(corners_N8)
    return Shapes(corners_N8.reshape(-1, 2), np.arange(count + 1) * 4, np.arange(count + 1))


def overlapping_pairs(
    a: Shapes,
    b: Shapes | None,
    min_share: float,
    *,
    either: bool = False,
    group_a: npt.NDArray[Any] | None = None,
    group_b: npt.NDArray[Any] | None = None,
) -> Pairs:
    """Returns all pairs in which more than a share of the ground of `i` lies in `j`.

    Args:
        a: Polygons i.
        b: Polygons j; None for the pairs i < j within `a`, where either share may be above the limit.
        min_share: The limit, 0..1.
        either: Take a pair also when the share of `j` is above the limit.
        group_a: When given, pairs of the same group are left out.
        group_b: Groups of `b`.

    Raises:
        DataError: A polygon has a radius of more than 25 degrees.
    """
    other, other_group = (a, group_a) if b is None else (b, group_b)
    parts = []
    for i, j in _candidates(a, other):
        good = i < j if b is None else np.ones(len(i), dtype=bool)
        if group_a is not None and other_group is not None:
            good &= group_a[i] != other_group[j]
        parts += list(_exact(a, other, i[good], j[good], min_share, either or b is None))
    if not parts:
        return Pairs(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0), np.empty(0))
    i, j, share_i, share_j = (np.concatenate([part[k] for part in parts]) for k in range(4))
    order = np.lexsort((j, i))
    return Pairs(i[order], j[order], share_i[order], share_j[order])


def _candidates(a: Shapes, b: Shapes) -> Iterator[tuple[Ints, Ints]]:
    """Yields pairs whose bounding circles meet, in portions of bounded size; polygons of like size go together."""
    spatial = require("scipy.spatial", "prep")
    for shapes in (a, b):
        _require_small(shapes)
    classes_a, classes_b = _size_classes(a.radius_N), _size_classes(b.radius_N)
    for mine_b in classes_b:
        tree_b = spatial.cKDTree(b.centre_N3[mine_b])
        for mine_a in classes_a:
            reach = float(a.radius_N[mine_a].max() + b.radius_N[mine_b].max())
            # In the order of a tree neighbours in a portion are neighbours on the ground.
            mine = mine_a[spatial.cKDTree(a.centre_N3[mine_a]).indices]
            counts = tree_b.query_ball_point(a.centre_N3[mine], reach, return_length=True)
            for portion in _portions(counts, _CANDIDATES):
                some = mine[portion]
                found = spatial.cKDTree(a.centre_N3[some]).sparse_distance_matrix(tree_b, reach, output_type="ndarray")
                i, j = some[found["i"]], mine_b[found["j"]]
                near = found["v"] <= a.radius_N[i] + b.radius_N[j]
                yield i[near], j[near]


def _size_classes(radius_N: Floats) -> list[Ints]:
    """Returns numbers of polygons whose radii differ by less than a factor of two."""
    power_N = np.floor(np.log2(np.maximum(radius_N, 1e-12)))
    return [np.flatnonzero(power_N == power) for power in np.unique(power_N)]


def _portions(counts: npt.NDArray[Any], limit: int) -> Iterator[slice]:
    """Yields slices of consecutive items whose counts add up to at most `limit` (or single items)."""
    total = np.cumsum(counts)
    start = 0
    while start < len(total):
        before = int(total[start - 1]) if start else 0
        end = max(start + 1, int(np.searchsorted(total, before + limit, side="right")))
        if total[end - 1] > before:
            yield slice(start, end)
        start = end


def _exact(a: Shapes, b: Shapes, i: Ints, j: Ints, min_share: float, either: bool) -> Iterator[tuple[Any, ...]]:
    shapely = require("shapely", "prep")
    size = np.diff(a.start_N1)[i] + np.diff(b.start_N1)[j]
    for portion in _portions(size, _VERTICES):
        some_i, some_j = i[portion], j[portion]
        axes_P33 = tangent_axes(a.centre_N3[some_i])
        plane_i, plane_j = _planar(a, some_i, axes_P33), _planar(b, some_j, axes_P33)
        low_i, high_i, low_j, high_j = *_box(plane_i), *_box(plane_j)
        side_P2 = np.minimum(high_i, high_j) - np.maximum(low_i, low_j)
        meet = np.all(side_P2 > 0.0, axis=1)
        shape_i, shape_j = _polygons(plane_i, meet), _polygons(plane_j, meet)
        area_i, area_j = shapely.area(shape_i), shapely.area(shape_j)
        # What two polygons share lies in what their boxes share.
        most = np.prod(side_P2[meet], axis=1)
        worth = (most > min_share * area_i) | (either & (most > min_share * area_j))
        common = _common_area(shapely, shape_i[worth], shape_j[worth])
        share_i, share_j = (
            np.minimum(1.0, common / np.where(area > 0, area, np.inf)) for area in (area_i[worth], area_j[worth])
        )
        good = (share_i > min_share) | (either & (share_j > min_share))
        yield some_i[meet][worth][good], some_j[meet][worth][good], share_i[good], share_j[good]


def tangent_axes(centre_P3: Floats) -> Floats:
    """Returns east, north and outward unit vectors at points of the unit sphere; shape (P, 3 vectors, 3)."""
    east = np.stack([-centre_P3[:, 1], centre_P3[:, 0], np.zeros(len(centre_P3))], axis=1)
    length = np.linalg.norm(east, axis=1, keepdims=True)
    east = np.where(length > 1e-9, east / np.maximum(length, 1e-9), [0.0, 1.0, 0.0])
    north = np.cross(centre_P3, east)
    return np.stack([east, north / np.linalg.norm(north, axis=1, keepdims=True), centre_P3], axis=1)


def _planar(shapes: Shapes, index_P: Ints, axes_P33: Floats) -> tuple[Floats, Shapes]:
    """Returns the vertices of the chosen polygons in the gnomonic planes, and the polygons."""
    chosen = shapes.take(index_P)
    axes_V33 = np.repeat(axes_P33, np.diff(chosen.start_N1), axis=0)
    local_V3 = np.einsum("vkc,vc->vk", axes_V33, chosen._xyz_V3())
    return local_V3[:, :2] / local_V3[:, 2:], chosen


def _box(plane: tuple[Floats, Shapes]) -> tuple[Floats, Floats]:
    xy_V2, shapes = plane
    if not len(shapes):
        return np.empty((0, 2)), np.empty((0, 2))
    return np.minimum.reduceat(xy_V2, shapes.start_N1[:-1]), np.maximum.reduceat(xy_V2, shapes.start_N1[:-1])


def _polygons(plane: tuple[Floats, Shapes], meet_P: npt.NDArray[np.bool_]) -> npt.NDArray[Any]:
    shapely = require("shapely", "prep")
    xy_V2, shapes = plane
    chosen = Shapes(xy_V2, shapes.ring_R1, shapes.shape_N1).take(np.flatnonzero(meet_P))
    first, count = chosen.ring_R1[:-1], np.diff(chosen.ring_R1)
    closed_R1 = _offsets(count + 1)
    vertex = _ranges(first, first + count + 1)
    vertex[closed_R1[1:] - 1] = first
    return shapely.from_ragged_array(
        shapely.GeometryType.POLYGON, chosen.vertex_V2[vertex], (closed_R1, chosen.shape_N1)
    )


def _common_area(shapely: Any, first: npt.NDArray[Any], second: npt.NDArray[Any]) -> Floats:
    try:
        return np.asarray(shapely.area(shapely.intersection(first, second)))
    except shapely.errors.GEOSException:  # a polygon that crosses itself in the plane
        return np.asarray(shapely.area(shapely.intersection(shapely.make_valid(first), shapely.make_valid(second))))


def _ranges(start: Ints, end: Ints) -> Ints:
    """Returns start[0] .. end[0] - 1, start[1] .. end[1] - 1, ... in one array."""
    count = end - start
    offsets = _offsets(count)
    return np.arange(offsets[-1]) + np.repeat(start - offsets[:-1], count)


def _offsets(count: Ints) -> Ints:
    return np.concatenate([[0], np.cumsum(count)]).astype(np.int64)


def _require_small(shapes: Shapes) -> None:
    limit = 2.0 * math.sin(math.radians(MOST_RADIUS_DEG) / 2.0)
    large = np.flatnonzero(~(shapes.radius_N <= limit))
    if len(large):
        lon, lat = shapes.vertex_V2[shapes.start_N1[large[0]]]
        raise DataError(
            "a footprint is too large to be compared",
            seen=f"{len(large)} of them, the first with a corner at {lon:.4g} E {lat:.4g} N",
            rule=f"every corner is within {MOST_RADIUS_DEG:g} degrees of the centre",
            fix="cut it into smaller ones",
        )
