from __future__ import annotations

import numpy as np
import pytest

from momo.errors import ConfigError
from momo.normalise import Normalisation


@pytest.fixture
def tile():
    rng = np.random.default_rng(0)
    value = rng.normal(200, 30, size=(16, 16)).astype(np.float32)
    valid = np.ones((16, 16), dtype=bool)
    valid[:4] = False
    value[:4] = -32768
    return value, valid


def test_per_tile_zscore_looks_at_valid_pixels_only(tile):
    scaled = Normalisation()(*tile)
    assert scaled.dtype == np.float32 and (scaled[:4] == 0).all()
    assert scaled[4:].mean() == pytest.approx(0, abs=1e-5) and scaled[4:].std() == pytest.approx(1, abs=1e-5)


def test_per_tile_minmax_spans_the_valid_range(tile):
    scaled = Normalisation("per_tile_minmax")(*tile)
    assert (scaled.min(), scaled.max()) == (-1, 1) and (scaled[:4] == 0).all()


def test_sensor_zscore_keeps_absolute_values(tile):
    scaled = Normalisation("sensor_zscore", mean=200.0, std=10.0)(*tile)
    expected = np.clip((tile[0][4:] - 200) / 10, -4, 4)
    np.testing.assert_allclose(scaled[4:], expected, rtol=1e-5)
    assert scaled.max() == 4


@pytest.mark.parametrize("policy", ["per_tile_zscore", "per_tile_minmax"])
@pytest.mark.parametrize("value", [0.0, 3.3333333e7])
def test_flat_and_empty_tiles_become_zero(policy, value):
    flat = np.full((4, 4), value, dtype=np.float32)
    assert (Normalisation(policy)(flat, np.ones((4, 4), dtype=bool)) == 0).all()
    assert (Normalisation(policy)(flat, np.zeros((4, 4), dtype=bool)) == 0).all()


def test_card_round_trip_and_errors():
    normalisation = Normalisation("sensor_zscore", mean=1.0, std=2.0)
    assert Normalisation.from_dict(normalisation.to_dict()) == normalisation
    with pytest.raises(ConfigError, match="sensor_zscore lacks its constants: mean=None"):
        Normalisation("sensor_zscore")
    with pytest.raises(ConfigError, match="did you mean 'per_tile_zscore'"):
        Normalisation("tile_zscore")
