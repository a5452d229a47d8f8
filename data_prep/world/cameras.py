"""Three simulated cameras over the synthetic ground.

The real ground sample distances (0.25, 5 and 100 m a pixel) are drawn together to 1, 6 and 36 m, so that a small
ground fills all three; blur, noise, bit depth, sun and no-data habits follow the real ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .ground import Ground, Surface
from .noise import Float32, Grid

_ROWS = 256  # rows evaluated at once: bounds the memory
_MARGIN = 4  # pixels around a block for slopes and blur


@dataclass(frozen=True)
class Camera:
    """One simulated camera.

    Attributes:
        name: Sensor it stands in for (see `momo.sensors`).
        gsd_m: Ground sample distance, metres a pixel.
        psf_px: Standard deviation of the point spread function, pixels.
        noise: Standard deviation of the pixel noise: I/F for reflected light, kelvin for thermal infrared.
        line_noise: The same for noise that a whole row or column shares.
        thermal: Measures brightness temperature rather than I/F.
        shape_tiles: Columns to rows of a product, as a ratio.
        tilt: Eastward drift of the swath per metre of northward flight.
        margin: Share of the width left empty on both sides.
    """

    name: str
    gsd_m: float
    psf_px: float
    noise: float
    line_noise: float
    thermal: bool
    shape_tiles: float
    tilt: float
    margin: float


CAMERAS: dict[str, Camera] = {
    camera.name: camera
    for camera in (
        Camera("HiRISE", 1.0, 0.6, 0.0010, 0.0002, False, 0.32, 0.02, 0.03),
        Camera("CTX", 6.0, 0.7, 0.0016, 0.0005, False, 0.8, 0.12, 0.0),
        Camera("THEMIS", 36.0, 0.7, 0.25, 0.18, True, 0.8, 0.12, 0.0),
    )
}


@dataclass(frozen=True)
class Sun:
    """Where the sun stands.

    Attributes:
        azimuth_deg: Clockwise from north, degrees.
        elevation_deg: Above the horizon, degrees.
    """

    azimuth_deg: float
    elevation_deg: float

    @property
    def vector(self) -> tuple[float, float, float]:
        """Unit vector to the sun: east, north, up."""
        azimuth, elevation = np.radians(self.azimuth_deg), np.radians(self.elevation_deg)
        across = np.cos(elevation)
        return float(across * np.sin(azimuth)), float(across * np.cos(azimuth)), float(np.sin(elevation))


def expose(ground: Ground, camera: Camera, grid: Grid, sun: Sun, rng: np.random.Generator) -> Iterator[Float32]:
    """Takes a picture in blocks of rows, north to south.

    Args:
        ground: What is seen.
        camera: How it is seen.
        grid: Pixels of the product.
        sun: Illumination of the whole product.
        rng: Source of noise; the column noise is drawn first.

    Yields:
        float32 blocks (rows, columns): I/F for reflected light, kelvin for thermal infrared.
    """
    rows, columns = grid.shape
    column_noise = rng.standard_normal(columns, dtype=np.float32) * np.float32(camera.line_noise)
    west, _, _, north = grid.bounds
    corner = west - grid.gsd_m / 2, north + grid.gsd_m / 2
    for first in range(0, rows, _ROWS):
        count = min(_ROWS, rows - first)
        wide = Grid.of(corner[0], corner[1] - first * grid.gsd_m, grid.gsd_m, count, columns, margin=_MARGIN)
        seen = radiance(ground.surface(wide), grid.gsd_m, sun, thermal=camera.thermal)
        block = blur(seen, camera.psf_px)[_MARGIN:-_MARGIN, _MARGIN:-_MARGIN]
        block += column_noise
        block += rng.standard_normal((count, 1), dtype=np.float32) * np.float32(camera.line_noise)
        block += rng.standard_normal(block.shape, dtype=np.float32) * np.float32(camera.noise)
        yield block


def radiance(surface: Surface, gsd_m: float, sun: Sun, *, thermal: bool) -> Float32:
    """Returns what reaches the camera: I/F, or brightness temperature in kelvin."""
    north_south, east_west = np.gradient(surface.elevation, np.float32(gsd_m))
    east, north, up = sun.vector
    normal = np.sqrt(1 + np.square(north_south) + np.square(east_west))
    # Rows run south, so the northward slope is -north_south.
    incidence = np.maximum(0, (up - east * east_west + north * north_south) / normal)
    if thermal:
        return brightness_temperature(incidence, surface)
    return reflectance(incidence, 1 / normal, surface.albedo)


def reflectance(incidence: Float32, emission: Float32, albedo: Float32) -> Float32:
    """Returns I/F by the lunar-Lambert law (McEwen 1991) with a weight of 0.5, over a thin bright haze.

    Args:
        incidence: Cosine of the incidence angle.
        emission: Cosine of the emission angle.
        albedo: Normal albedo, 0..1.
    """
    lommel = 2 * incidence / (incidence + emission + np.float32(1e-6))
    return np.asarray(albedo * (0.5 * lommel + 0.5 * incidence) + 0.012, dtype=np.float32)


def brightness_temperature(incidence: Float32, surface: Surface) -> Float32:
    """Returns an afternoon brightness temperature in kelvin.

    The ground is between the daily mean (205 K) and radiative equilibrium with the sun it faces; the higher its
    thermal inertia the less it follows. A caricature of a thermal model, with its signs and its range.
    """
    solar = 590.0 / 5.67e-8 / 0.95  # W m-2 at Mars over sigma and emissivity
    equilibrium = np.sqrt(np.sqrt(solar * (1 - surface.albedo) * (0.85 * incidence + 0.08)))
    follows = 1 / (1 + surface.inertia / 450)
    return np.asarray(205 + (equilibrium - 205) * follows, dtype=np.float32)


def blur(image_HW: Float32, sigma: float) -> Float32:
    """Convolves with a Gaussian point spread function, seven taps on each axis."""
    taps = np.exp(-0.5 * np.square(np.arange(-3, 4) / sigma))
    taps = (taps / taps.sum()).astype(np.float32)
    rows, columns = image_HW.shape
    padded = np.pad(image_HW, 3, mode="edge")
    across = taps[0] * padded[:, :columns]
    for k in range(1, 7):
        across += taps[k] * padded[:, k : k + columns]
    out = taps[0] * across[:rows]
    for k in range(1, 7):
        out += taps[k] * across[k : k + rows]
    return np.asarray(out, dtype=np.float32)
