from __future__ import annotations

import numpy as np
import pytest
import torch

from momo.corpus_index import StoredStatistics
from momo.errors import ConfigError, DataError
from momo.normalise import POLICIES, Normalisation, _scaled, _to_float, normalise_batch


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


def test_per_product_percentile_spans_the_product_and_cuts_beyond(tile):
    value, valid = tile
    policy = Normalisation("per_product_percentile")
    scaled = policy(value, valid, (150.0, 250.0))
    np.testing.assert_allclose(scaled[4:], np.clip((value[4:] - 200) / 50, -1, 1), atol=1e-6)
    assert (scaled.min(), scaled.max()) == (-1, 1) and policy.limit == 1 and (scaled[:4] == 0).all()
    own = policy(value, valid)
    low, high = np.percentile(value[4:], [1, 99])
    np.testing.assert_allclose(own[4:], np.clip((value[4:] - (low + high) / 2) / ((high - low) / 2), -1, 1), atol=1e-5)
    assert (policy(value, valid, (5.0, 5.0)) == 0).all()


@pytest.mark.parametrize("policy", ["per_tile_zscore", "per_tile_minmax", "per_product_percentile"])
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


# --- stored tiles -----------------------------------------------------------------------------------------------

SCALE, OFFSET = {"uint8": 0.5, "uint16": -0.015}, {"uint8": -3.0, "uint16": 40.0}


def stored_tiles(dtype):
    """Tiles with contrast, faint at a high level, masked, with one valid pixel, flat, empty."""
    rng = np.random.default_rng(1)
    top = int(np.iinfo(dtype).max)
    stored = rng.integers(0, top, size=(6, 24, 24), endpoint=True)
    stored[1] = top - rng.integers(0, 3, size=(24, 24))
    stored[4] = top
    valid = np.ones(stored.shape, dtype=bool)
    valid[2, :9], valid[3], valid[5] = False, False, False
    valid[3, 5, 5] = True
    return np.where(valid, stored, 0).astype(dtype), valid


def statistics_of(stored, valid, dtype):
    columns = []
    for pixels, mask in zip(stored, valid, strict=True):
        values = pixels[mask].astype(np.float64) if mask.any() else np.zeros(1)
        columns.append((values.mean(), values.std(), values.min(), values.max()))
    mean, std, low, high = np.array(columns).T
    ones = np.ones(len(stored))
    bounds = np.sort([0.2 * np.iinfo(dtype).max * SCALE[dtype], 0.7 * np.iinfo(dtype).max * SCALE[dtype]])
    ends = (bounds[0] + OFFSET[dtype]) * ones, (bounds[1] + OFFSET[dtype]) * ones
    return StoredStatistics(SCALE[dtype] * ones, OFFSET[dtype] * ones, mean, std, low, high, *ends)


def one_of(statistics, number):
    return StoredStatistics(**{name: float(column[number]) for name, column in vars(statistics).items()})


def policy_named(name):
    return Normalisation(name, mean=20.0, std=70.0) if name == "sensor_zscore" else Normalisation(name)


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("name", POLICIES)
def test_a_batch_of_stored_tiles_equals_the_plain_way(name, dtype):
    stored, valid = stored_tiles(dtype)
    statistics, policy = statistics_of(stored, valid, dtype), policy_named(name)
    affine = policy.affine(statistics)
    assert affine.shape == (6, 3) and affine.dtype == np.float32 and affine.flags.c_contiguous
    batch = normalise_batch(torch.from_numpy(stored), torch.from_numpy(valid), torch.from_numpy(affine), policy.limit)
    assert batch.shape == (6, 1, 24, 24) and batch.dtype == torch.float32
    for number in range(len(stored)):
        np.testing.assert_array_equal(policy.affine(one_of(statistics, number)), affine[number])
        # float64 values: float32 ones are too coarse for the faint tile.
        value = stored[number].astype(np.float64) * SCALE[dtype] + OFFSET[dtype]
        ends = float(statistics.percentile_low[number]), float(statistics.percentile_high[number])
        plain = policy(value, valid[number], ends)
        np.testing.assert_allclose(batch[number, 0].numpy(), plain, atol=1e-5)
        assert np.abs(plain).max() > 0.1 or number > 2 or name == "sensor_zscore"
    if name.startswith("per_tile"):
        assert (batch[3:] == 0).all()


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_without_mask_and_on_other_devices_the_numbers_are_the_same(dtype):
    stored, _ = stored_tiles(dtype)
    policy = Normalisation()
    everywhere = np.ones(stored.shape, dtype=bool)
    affine = torch.from_numpy(policy.affine(statistics_of(stored, everywhere, dtype)))
    unmasked = normalise_batch(torch.from_numpy(stored), None, affine, policy.limit)
    masked = normalise_batch(torch.from_numpy(stored), torch.from_numpy(everywhere), affine, policy.limit)
    assert torch.equal(unmasked, masked)
    # What runs on another device, run here.
    columns = [column[:, None, None] for column in affine.unbind(-1)]
    elsewhere = _scaled(_to_float(torch.from_numpy(stored)), *columns).clamp_(-policy.limit, policy.limit)
    assert torch.equal(elsewhere, unmasked[:, 0]) and float(elsewhere.max()) > 1


def test_missing_percentiles_of_a_product_are_refused():
    stored, valid = stored_tiles("uint8")
    fields = vars(statistics_of(stored, valid, "uint8")) | {"percentile_low": np.array([0.0] * 5 + [np.nan])}
    with pytest.raises(DataError, match="lacks the percentiles of a product: 1 tiles"):
        Normalisation("per_product_percentile").affine(StoredStatistics(**fields))
    with pytest.raises(DataError, match="lacks the percentiles of a product: 1 tiles"):
        Normalisation("per_product_percentile").affine(one_of(StoredStatistics(**fields), 5))
