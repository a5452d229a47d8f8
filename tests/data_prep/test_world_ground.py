"""The synthetic ground: noise, crater population, terrain."""

from __future__ import annotations

import numpy as np
import pytest

from momo.data_prep.world.cameras import Sun, radiance
from momo.data_prep.world.craters import Craters, craters_in, profile, rim_distance
from momo.data_prep.world.ground import BAND_SCALES_M, KINDS, Ground
from momo.data_prep.world.landforms import RELIEF, Patch
from momo.data_prep.world.noise import Grid, hash_cells, lattice_noise, resample, uniform, uniform_of


def test_hash_is_the_same_for_one_cell_and_for_many():
    columns, rows = np.arange(-3, 4), np.arange(-2, 3)
    many = uniform(hash_cells(7, 11, columns[None, :], rows[:, None]), 5)
    assert many.shape == (5, 7) and many.min() >= 0 and many.max() < 1
    for row in rows:
        for column in columns:
            assert many[row + 2, column + 3] == uniform_of(7, 11, int(column), int(row), 5)


def test_noise_has_unit_variance_and_no_mean():
    noise = lattice_noise(1, 2, Grid.of(0, 0, 1.0, 600, 600), spacing=4.0)
    assert abs(noise.mean()) < 0.05
    assert noise.std() == pytest.approx(1.0, abs=0.05)


def test_noise_depends_on_the_coordinate_not_on_the_window():
    whole = Grid.of(-900.0, 700.0, 3.0, 120, 150)
    part = Grid.of(-900.0 + 3 * 40, 700.0 - 3 * 30, 3.0, 20, 25)
    a = lattice_noise(3, 4, whole, 17.0)
    assert np.allclose(a[30:50, 40:65], lattice_noise(3, 4, part, 17.0), atol=1e-5)


def test_resample_reproduces_a_plane_with_y_running_north():
    fine = Grid.of(100.0, 900.0, 2.0, 40, 50)
    nodes = fine.coarse(16.0, margin=2)
    plane = (0.5 * nodes.x_W[None, :] + 2.0 * nodes.y_H[:, None]).astype(np.float32)
    expected = 0.5 * fine.x_W[None, :] + 2.0 * fine.y_H[:, None]
    assert np.allclose(resample(plane, nodes, fine), expected, atol=1e-2)


def test_crater_counts_follow_the_power_law():
    side = 6000.0
    craters = craters_in(5, (0.0, 0.0, side, side), density=0.02, smallest_m=8.0, reach=0.0)
    diameters = np.array([8.0, 16.0, 32.0, 64.0, 128.0])
    counts = np.array([(craters.diameter >= d).sum() for d in diameters])
    slope = np.polyfit(np.log(diameters), np.log(counts), 1)[0]
    assert slope == pytest.approx(-2.0, abs=0.12)
    assert counts[0] == pytest.approx(0.02 * (side / 8.0) ** 2, rel=0.05)


def test_catalogue_is_the_same_from_any_window():
    ground = Ground(9, 0.02)
    wide = ground.craters((0.0, 0.0, 4000.0, 4000.0), 20.0, reach=0.0)
    narrow = ground.craters((1000.0, 1500.0, 2500.0, 2500.0), 20.0, reach=0.0)
    inside = (wide.x > 1000) & (wide.x < 2500) & (wide.y > 1500) & (wide.y < 2500)
    assert len(narrow) > 20
    assert np.array_equal(np.sort(wide.x[inside]), np.sort(narrow.x))


def test_dunes_bury_craters_and_plains_keep_them():
    ground = Ground(2, 0.1)
    bounds = (0.0, 0.0, 15000.0, 15000.0)
    every = craters_in(2, bounds, density=0.1, smallest_m=70.0, reach=0.0)
    kept = ground.craters(bounds, 70.0, reach=0.0)

    def density(craters: Craters, kind: str) -> float:
        close = craters.where(craters.diameter < 130)
        kinds, weight, _ = ground.kind_at(close.x, close.y, 1)
        return float(((kinds == kind) & (weight > 0.99)).sum())

    assert density(kept, "plains") == density(every, "plains") > 100
    assert 0 < density(kept, "dunes") < 0.25 * density(every, "dunes")


def test_fresh_crater_has_the_depth_and_rim_of_the_literature():
    distance = np.linspace(0, 3, 601, dtype=np.float32)[None, :]
    height = profile(distance, 100.0, 0.0)
    rim, floor = height.max(), height.min()
    assert abs(distance[0, height.argmax()] - 1) < 0.05
    assert (rim - floor) / 100.0 == pytest.approx(0.2, abs=0.05)
    assert rim / 100.0 == pytest.approx(0.04, abs=0.015)
    assert np.all(height[distance > 2.6] == 0)
    old = profile(distance, 100.0, 1.0)
    assert old.max() - old.min() < 0.5 * (rim - floor)


def test_rim_distance_window_is_clipped_and_missing_outside():
    one = Craters(*(np.array([v]) for v in (50.0, 50.0, 40.0, 0.1, 0.0, 0.0, 0.0)))
    grid = Grid.of(0.0, 60.0, 1.0, 30, 60)
    found = rim_distance(one, 0, grid, 1.0)
    assert found is not None
    (rows, columns), distance = found
    assert rows.start == 0 and columns.stop == 60
    y, x = grid.y_H[rows][:, None], grid.x_W[columns][None, :]
    assert np.allclose(distance, np.hypot(x - 50, y - 50) / 20, atol=1e-3)
    assert rim_distance(one, 0, Grid.of(500.0, 60.0, 1.0, 30, 60), 1.0) is None


@pytest.mark.parametrize("kind", sorted(RELIEF))
def test_landforms_are_finite_varied_and_positive_in_albedo(kind: str):
    grid = Grid.of(0.0, 960.0, 6.0, 160, 160)
    seen = []
    for cell in range(4):
        patch = Patch(0, 1, (cell, 0), kind, (480.0, 480.0), BAND_SCALES_M[1])
        height, albedo = RELIEF[kind](grid, patch)
        assert height.shape == albedo.shape == grid.shape and height.dtype == albedo.dtype == np.float32
        assert np.isfinite(height).all() and height.std() > 0.3
        assert albedo.min() > 0.3 and albedo.max() < 2
        seen.append(height)
    assert all(np.abs(np.corrcoef(seen[0].ravel(), other.ravel())[0, 1]) < 0.6 for other in seen[1:])


def test_every_kind_of_terrain_occurs_on_every_band():
    ground = Ground(4, 0.02)
    for band, scale in enumerate(BAND_SCALES_M):
        x, y = np.meshgrid(np.linspace(0, 400 * scale, 200), np.linspace(0, 400 * scale, 200))
        kinds, weight, _ = ground.kind_at(x, y, band)
        shares = {kind: float((kinds == kind).mean()) for kind in KINDS}
        assert min(shares.values()) > 0.05, shares
        assert weight.min() == 0 and weight.max() == 1


def test_surface_is_one_ground_at_two_resolutions():
    ground = Ground(6, 0.02)
    west, north, size = 3000.0, 9000.0, 768
    fine = ground.surface(Grid.of(west, north, 1.0, size, size)).elevation
    coarse = ground.surface(Grid.of(west, north, 6.0, size // 6, size // 6)).elevation
    averaged = fine.reshape(size // 6, 6, size // 6, 6).mean(axis=(1, 3))
    assert np.corrcoef(averaged.ravel(), coarse.ravel())[0, 1] > 0.995
    highpass = [a - a.mean() - _plane(a - a.mean()) for a in (averaged, coarse)]
    assert np.std(highpass[0] - highpass[1]) < 0.25 * np.std(highpass[1])


def _plane(image: np.ndarray) -> np.ndarray:
    rows, columns = np.mgrid[-1 : 1 : image.shape[0] * 1j, -1 : 1 : image.shape[1] * 1j]
    design = np.stack([rows.ravel(), columns.ravel(), np.ones(image.size)], axis=1)
    return (design @ np.linalg.lstsq(design, image.ravel(), rcond=None)[0]).reshape(image.shape)


def test_slopes_that_face_the_sun_are_bright_and_warm():
    ground = Ground(1, 0.002)
    grid = Grid.of(0.0, 20.0, 1.0, 20, 20)
    surface = ground.surface(grid)
    surface.albedo[:], surface.inertia[:] = 0.2, 200.0
    for azimuth, direction in ((90.0, (1.0, 0.0)), (0.0, (0.0, 1.0))):
        for thermal in (False, True):
            facing = []
            for sign in (1.0, -1.0):  # a plane that falls towards the sun, then away from it
                x, y = np.meshgrid(grid.x_W, grid.y_H)
                surface.elevation = (-0.2 * sign * (direction[0] * x + direction[1] * y)).astype(np.float32)
                facing.append(float(radiance(surface, 1.0, Sun(azimuth, 35.0), thermal=thermal).mean()))
            assert facing[0] > facing[1] * 1.01


def test_low_thermal_inertia_is_warmer_in_the_afternoon():
    surface = Ground(1, 0.002).surface(Grid.of(0.0, 20.0, 1.0, 20, 20))
    surface.elevation[:] = 0
    surface.inertia[:, :10], surface.inertia[:, 10:] = 100.0, 800.0
    seen = radiance(surface, 1.0, Sun(270.0, 45.0), thermal=True)
    assert seen[:, :10].mean() > seen[:, 10:].mean() + 10
    assert seen.min() > 180 and seen.max() < 300
