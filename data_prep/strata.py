"""Strata of tiles (geologic unit, latitude band, HEALPix cell), and which tiles of each a sampling plan takes."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from momo.extras import require

from .split import cells_at
from .vectors import Polygons, is_closed, read_polygons, unwrapped, without_holes

Floats = npt.NDArray[np.float64]
Codes = npt.NDArray[np.int32]
NO_PLACE = "no place known"
_POINTS = 200_000  # points in memory as geometries
_NONE = np.iinfo(np.int32).max


def units_at(
    lon_N: Floats, lat_N: Floats, path: str, column: str, layer: str | None = None
) -> tuple[Codes, list[str], list[str]]:
    """Returns the geologic unit of points, by point in polygon in the coordinates of the map file.

    Args:
        lon_N: Planetocentric longitudes, degrees east; NaN for no place.
        lat_N: Planetocentric latitudes, degrees.
        path: Vector file of polygons in a Mars CRS (or without one, in planetocentric degrees).
        column: Column that names the unit.
        layer: Layer; the first when None.

    Returns:
        A code for each point, the name of each code, and notes. The first name is "", for points outside all polygons;
        the others are in alphabetical order. A point on several polygons gets the first of their units.

    Raises:
        DataError: The file, layer or column is missing, or the file is not of Mars; see `read_polygons`.
    """
    polygons = read_polygons(path, column=column, layer=layer)
    names = sorted({value.strip() for value in polygons.value_P} - {""})
    code_of = {name: code for code, name in enumerate(names, start=1)} | {"": _NONE}
    code_P = np.array([code_of[value.strip()] for value in polygons.value_P], dtype=np.int32)
    shapely = require("shapely", "prep")
    geometry_P = _flat_polygons(polygons)
    code_N = np.full(len(lon_N), _NONE, dtype=np.int32)
    place = np.flatnonzero(np.isfinite(lon_N) & np.isfinite(lat_N))
    x, y = polygons.frame.from_lonlat(lon_N[place], lat_N[place])
    bounds = shapely.total_bounds(geometry_P)
    period = polygons.frame.period
    for turn in (0.0,) if period is None else period * np.arange(-2.0, 3.0):
        inside = np.isfinite(x) & np.isfinite(y) & (x + turn >= bounds[0]) & (x + turn <= bounds[2])
        for some in _chunks(np.flatnonzero(inside)):
            # A tree of the points, asked with the polygons: shapely prepares what it asks with.
            tree = shapely.STRtree(shapely.points(x[some] + turn, y[some]))
            polygon, point = tree.query(geometry_P, predicate="intersects")
            np.minimum.at(code_N, place[some[point]], code_P[polygon])
    code_N[code_N == _NONE] = 0
    return code_N, ["", *names], polygons.notes


def _chunks(index_N: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
    return [index_N[k : k + _POINTS] for k in range(0, len(index_N), _POINTS)]


def _flat_polygons(polygons: Polygons) -> npt.NDArray[Any]:
    """Returns the polygons, those round a pole closed along it."""
    flat = polygons.geometry_P.copy()
    period = polygons.frame.period
    for p, polygon in enumerate(flat):
        west, _, east, _ = polygon.bounds
        if period is not None and east - west > period / 2.0:
            flat[p] = _flat_polygon(polygon, period, polygons)
    return flat


def _flat_polygon(polygon: Any, period: float, polygons: Polygons) -> Any:
    rings = [np.asarray(ring.coords)[:, :2] for ring in (polygon.exterior, *polygon.interiors)]
    open_rings = [unwrapped(ring_V2, period) for ring_V2 in rings]
    if all(is_closed(ring_V2) for ring_V2 in open_rings):
        return polygon
    drawn = without_holes([_closed(ring_V2, polygons) for ring_V2 in open_rings], period)
    return require("shapely", "prep").make_valid(drawn)


def _closed(ring_V2: Floats, polygons: Polygons) -> Floats:
    if is_closed(ring_V2):
        return ring_V2
    pole = math.copysign(90.0, ring_V2[:, 1].mean())
    _, y = polygons.frame.from_lonlat(np.zeros(1), np.array([pole]))
    return np.vstack([ring_V2, [ring_V2[-1, 0], y[0]], [ring_V2[0, 0], y[0]], ring_V2[:1]])


def latitude_bands(lat_N: Floats, height_deg: float) -> tuple[Codes, list[str]]:
    """Returns bands of latitude counted from the south pole, for example "-15..0"; the last may be lower.

    Args:
        lat_N: Planetocentric latitudes, degrees; NaN for no place.
        height_deg: Height of a band, degrees.

    Returns:
        A code for each point and the name of each code that occurs.
    """
    count = max(1, math.ceil(180.0 / height_deg - 1e-9))
    known = np.isfinite(lat_N)
    band_N = np.full(len(lat_N), -1, dtype=np.int64)
    band_N[known] = np.clip(np.floor((lat_N[known] + 90.0) / height_deg), 0, count - 1)
    return _named(band_N, lambda k: f"{k * height_deg - 90:g}..{min(90.0, (k + 1) * height_deg - 90):g}")


def cells(lon_N: Floats, lat_N: Floats, order: int) -> tuple[Codes, list[str]]:
    """Returns HEALPix cells (nested) as strata: a code for each point and the name of each code that occurs."""
    return _named(cells_at(lon_N, lat_N, order), lambda k: f"healpix{order}_{k}")


def _named(number_N: npt.NDArray[np.int64], name: Any) -> tuple[Codes, list[str]]:
    number_K, code_N = np.unique(number_N, return_inverse=True)
    return code_N.reshape(-1).astype(np.int32), [NO_PLACE if k < 0 else name(int(k)) for k in number_K]


def priorities(
    product_N: npt.NDArray[Any], product_ids: Sequence[str], row_N: npt.NDArray[Any], col_N: npt.NDArray[Any], seed: int
) -> npt.NDArray[np.uint64]:
    """Returns a random number for each tile that depends on its key and the seed alone.

    SplitMix64's output function (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators", OOPSLA) of
    the product's SHA-256, row, column and seed.
    """
    digests = [hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8] for name in product_ids]
    hash_K = np.array([int.from_bytes(digest, "big") for digest in digests], dtype=np.uint64)
    place_N = (row_N.astype(np.uint64) << np.uint64(32)) | col_N.astype(np.uint64)
    return _mix(_mix(hash_K[product_N]) ^ _mix(place_N))


def _mix(value_N: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    value_N = value_N + np.uint64(0x9E3779B97F4A7C15)
    value_N = (value_N ^ (value_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value_N = (value_N ^ (value_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value_N ^ (value_N >> np.uint64(31))


def sample(
    stratum_N: npt.NDArray[Any], plan: str, priority_N: npt.NDArray[np.uint64], *, tiles: int | None, cap: int | None
) -> npt.NDArray[np.bool_]:
    """Returns which tiles a sampling plan takes: of each stratum those with the smallest priorities.

    Args:
        stratum_N: Stratum of each tile, a code from 0.
        plan: `all`, `uniform`, `sqrt` or `capped`; see `allotment`.
        priority_N: Random number of each tile.
        tiles: Tiles to take in all, for uniform and sqrt.
        cap: Most tiles of one stratum, for capped.
    """
    count_K = np.bincount(stratum_N)
    take_K = allotment(count_K, plan, tiles=tiles, cap=cap)
    order = np.lexsort((priority_N, stratum_N))
    place = np.arange(len(order)) - np.repeat(np.cumsum(count_K) - count_K, count_K)
    keep_N = np.zeros(len(order), dtype=bool)
    keep_N[order] = place < take_K[stratum_N[order]]
    return keep_N


def allotment(count_K: npt.NDArray[Any], plan: str, *, tiles: int | None, cap: int | None) -> npt.NDArray[np.int64]:
    """Returns how many tiles of each stratum a sampling plan takes.

    all: every tile. uniform: as equal as possible; strata that hold less than an equal share are taken whole and the
    others fill up. sqrt: in proportion to the square root of the stratum's size, none beyond its size. capped: at most
    `cap` of each. Without `tiles`, uniform takes as many of each as the smallest stratum holds, and sqrt the most with
    which all strata keep the proportion.

    Args:
        count_K: Tiles of each stratum.
        plan: The plan.
        tiles: Tiles to take in all, for uniform and sqrt.
        cap: Most tiles of one stratum, for capped.
    """
    count_K = count_K.astype(np.int64)
    if plan == "all" or not count_K.any():
        return count_K
    if plan == "capped":
        assert cap is not None
        return np.minimum(count_K, cap)
    if tiles is not None:
        weight_K = np.ones(len(count_K)) if plan == "uniform" else np.sqrt(count_K)
        return _filled(count_K, weight_K, min(int(count_K.sum()), tiles))
    smallest = int(count_K[count_K > 0].min())
    if plan == "uniform":
        return np.minimum(count_K, smallest)
    return np.array([math.isqrt(int(count) * smallest) for count in count_K], dtype=np.int64)


def _filled(count_K: npt.NDArray[np.int64], weight_K: Floats, total: int) -> npt.NDArray[np.int64]:
    """Divides a total by weights, no part above its count; the sum is exact (largest remainders, then first ones)."""
    ratio_K = count_K / np.where(weight_K > 0, weight_K, 1.0)
    order = np.argsort(ratio_K, kind="stable")
    whole = np.concatenate([[0], np.cumsum(count_K[order])])[:-1]
    rest = np.cumsum(weight_K[order][::-1])[::-1]
    # Strata up to the first that the level, the tiles for a unit of weight, does not fill are taken whole.
    level_K = np.where(rest > 0, (total - whole) / np.where(rest > 0, rest, 1.0), 0.0)
    unfilled = np.flatnonzero(level_K < ratio_K[order])
    level = level_K[unfilled[0]] if len(unfilled) else np.inf
    exact_K = np.where(ratio_K <= level, count_K, np.minimum(level, ratio_K) * weight_K)
    take_K = np.minimum(np.floor(exact_K).astype(np.int64), count_K)
    open_K = np.flatnonzero(take_K < count_K)
    by_remainder = open_K[np.argsort(-(exact_K - take_K)[open_K], kind="stable")]
    take_K[by_remainder[: total - int(take_K.sum())]] += 1
    return take_K
