"""What validation makes of the losses of tiles: means, standard errors, units and terms, and the protocol's hash."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from momo.corpus import Corpus
from momo.errors import CheckpointError, DataError
from momo.models import build_mae
from momo.models.objective import PixelObjective
from momo.normalise import Normalisation
from momo.pretrain.validation import (
    LossEstimate,
    TileLosses,
    measure_tiles,
    product_stderr,
    protocol_hash,
    summarise,
    tile_losses,
    validate_model,
)
from momo.pretrain.validation_tiles import read_units
from tests.conftest import PICO, write_corpus
from tests.momo.validation_helper import TwoTerms, set_units, tiles_of

# --- estimates --------------------------------------------------------------------------------------------------


def test_mean_and_standard_error_by_hand():
    estimate = LossEstimate.of(torch.tensor([1.0, 2.0, 3.0, 6.0]))
    assert (estimate.loss, estimate.count) == (3.0, 4)
    assert estimate.stderr == pytest.approx(np.std([1, 2, 3, 6], ddof=1) / 2)
    assert LossEstimate.of(torch.tensor([1.0])).to_dict()["stderr"] is None


def test_standard_error_over_products_by_hand():
    # Mean 3; the deviations sum to -3 in product a and 3 in b: sqrt(2 / 1 * (9 + 9)) / 4.
    losses = torch.tensor([1.0, 2.0, 3.0, 6.0])
    assert product_stderr(losses, ["a", "a", "b", "b"]) == pytest.approx(1.5)
    assert product_stderr(losses, ["a", "b", "b", "a"]) == pytest.approx(np.sqrt(2 * (1 + 1)) / 4)
    alone = product_stderr(losses, ["a", "b", "c", "d"])
    assert alone == pytest.approx(LossEstimate.of(losses).stderr)
    assert product_stderr(losses, ["a"] * 4) is None


def test_standard_error_over_products_covers_what_that_over_tiles_does_not():
    rng = np.random.default_rng(0)
    products = np.repeat(np.arange(40), 25)
    means, plain, robust = [], [], []
    for _ in range(200):
        losses = torch.from_numpy(rng.normal(size=40)[products] + rng.normal(size=1000))
        means.append(float(losses.mean()))
        plain.append(LossEstimate.of(losses).stderr)
        robust.append(product_stderr(losses, [str(p) for p in products]))
    assert np.mean(robust) == pytest.approx(np.std(means), rel=0.1)
    assert np.mean(plain) < 0.4 * np.std(means)


def test_sensors_products_and_units_are_told_apart(wide_corpus, tmp_path, model):
    themis = write_corpus(tmp_path / "t", sensor="THEMIS", tiles=4, val=6, seed=3)
    set_units(themis, {"THEMIS_0005": "Hnv", "THEMIS_0006": "Ahv", "THEMIS_0008": "Hnv", "THEMIS_0000": "train only"})
    tiles = {"CTX": tiles_of(wide_corpus, limit=15), "THEMIS": tiles_of(themis)}
    entry = validate_model(model, tiles, "p", batch_size=4)
    losses = {name: tile_losses(model, own, batch_size=4) for name, own in tiles.items()}
    plain = summarise(losses, "p")
    assert set(plain) == {"loss", "stderr", "count", "protocol", "per_sensor"}
    assert {key: entry[key] for key in ("loss", "stderr", "count")} == {
        k: plain[k] for k in ("loss", "stderr", "count")
    }
    assert (entry["count"], entry["protocol"]) == (21, "p")
    assert entry["loss"] == pytest.approx(float(torch.cat(list(losses.values())).mean()))
    ctx, own = entry["per_sensor"]["CTX"], entry["per_sensor"]["THEMIS"]
    assert "per_unit" not in ctx and "terms" not in ctx
    assert set(tiles["CTX"].products) == {"P3", "P4", "P5"}
    assert ctx["stderr_products"] == product_stderr(losses["CTX"], tiles["CTX"].products) > 0
    assert own["per_unit"] == {
        "Ahv": LossEstimate.of(losses["THEMIS"][2:3]).to_dict(),
        "Hnv": LossEstimate.of(losses["THEMIS"][[1, 4]]).to_dict(),
    }
    assert own["per_unit"]["Ahv"]["stderr"] is None
    json.dumps(entry, allow_nan=False)


def test_products_of_two_sensors_are_two_even_under_one_name(tmp_path, model):
    tiles = {
        sensor: tiles_of(write_corpus(tmp_path / sensor, sensor=sensor, tiles=2, val=4, seed=seed))
        for seed, sensor in enumerate(("CTX", "HiRISE"))
    }
    entry = validate_model(model, tiles, "p", batch_size=4)
    assert [own["stderr_products"] for own in entry["per_sensor"].values()] == [None, None]
    assert entry["stderr_products"] > 0


@pytest.mark.parametrize("statistics", [True, False])
def test_units_are_found_whatever_the_order_of_the_index(tmp_path, statistics):
    folder = write_corpus(tmp_path / "c", tiles=3, val=13)
    assert read_units(Corpus(folder), range(13)) is None
    named = {f"CTX_{number:04d}": f"unit {number % 3}" for number in range(5, 16, 2)}
    set_units(folder, named, statistics)
    table = pq.read_table(folder / "index.parquet")
    backwards = table.take(list(range(len(table)))[::-1])
    pq.write_table(backwards, folder / "index.parquet", write_statistics=statistics)
    tiles = tiles_of(folder, limit=9)
    assert tiles.units == [named.get(tiles[place]["key"], "") for place in range(9)]
    assert any(tiles.units) and not all(tiles.units)


def test_no_row_is_read_for_units_when_the_table_says_there_are_none(tiny_corpus, monkeypatch):
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", lambda *_, **__: pytest.fail("rows were read"))
    corpus = Corpus(tiny_corpus)
    assert read_units(corpus, range(8)) is None


def test_a_damaged_index_is_told(tmp_path):
    folder = write_corpus(tmp_path / "c", tiles=2, val=3)
    tiles = tiles_of(folder)
    tiles.corpus.index  # noqa: B018 - read before the damage
    (folder / "index.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(DataError, match=r"a table of the corpus cannot be read: .*index\.parquet"):
        _ = tiles.units


def test_terms_of_a_joined_loss_are_averaged(tiny_corpus, model):
    model.objective = TwoTerms()
    tiles = tiles_of(tiny_corpus)
    measured = measure_tiles(model, tiles, batch_size=3)
    assert sorted(measured.terms) == ["bright", "rough"]
    torch.testing.assert_close(measured.loss, 0.5 * (measured.terms["bright"] + measured.terms["rough"]))
    entry = validate_model(model, {"CTX": tiles}, "p", batch_size=3)
    terms = entry["per_sensor"]["CTX"]["terms"]
    assert terms == {name: float(measured.terms[name].mean()) for name in ("bright", "rough")}
    assert entry["loss"] == pytest.approx(sum(terms.values()) / 2)


def test_progress_is_told_tile_by_tile(tiny_corpus, model):
    steps: list[int] = []
    measure_tiles(model, tiles_of(tiny_corpus), batch_size=3, advance=steps.append)
    assert steps == [3, 3, 2]


def test_non_finite_validation_loss_is_refused_and_the_tile_named(tiny_corpus):
    losses = torch.ones(8, dtype=torch.float64)
    losses[3] = torch.nan
    with pytest.raises(CheckpointError, match=r"the validation loss is not finite: 1 of 8 tiles\."):
        summarise({"CTX": losses}, "p")
    with pytest.raises(CheckpointError, match="1 of 8 tiles, for example CTX_0027"):
        summarise({"CTX": losses}, "p", {"CTX": tiles_of(tiny_corpus)})
    with pytest.raises(CheckpointError, match="the validation loss is not finite: 1 of 8 tiles"):
        summarise({"CTX": TileLosses(torch.ones(8), {"a": losses, "b": torch.ones(8)})}, "p")


# --- protocol ---------------------------------------------------------------------------------------------------


def test_protocol_of_stored_runs_stays_what_it_was():
    model = build_mae(PICO, seed=0)
    expected = "d4832ef58479eb7d09a69504295fb27ba1f9a96c91d15117648391f3c5f56eda"
    assert protocol_hash(model, Normalisation(), 1) == expected
    model.objective = PixelObjective(PICO.patch_size, False)
    assert protocol_hash(model, Normalisation(), 1) == expected
    scored = build_mae(PICO, seed=0, norm_pix_loss=True)
    expected = "67449521ef0bf75448d5a744556c5bb8834a8cf91ee8face9ef7042f80ee10fb"
    assert protocol_hash(scored, Normalisation("sensor_zscore", mean=1.0, std=2.0), 20260101) == expected


def test_protocol_changes_with_everything_but_the_weights():
    model = build_mae(PICO, seed=0)
    base = protocol_hash(model, Normalisation(), 1)
    assert base == protocol_hash(build_mae(PICO, seed=5), Normalisation(), 1)
    joined = build_mae(PICO, seed=0)
    joined.objective = TwoTerms()
    other = build_mae(PICO, seed=0)
    other.objective = TwoTerms()
    other.objective.describe = lambda: {"loss": {"bright": 1.0}}
    changed = [
        protocol_hash(model, Normalisation(), 2),
        protocol_hash(model, Normalisation("per_tile_minmax"), 1),
        protocol_hash(model, Normalisation(clip=3.0), 1),
        protocol_hash(build_mae(PICO, seed=0, mask_ratio=0.5), Normalisation(), 1),
        protocol_hash(build_mae(PICO, seed=0, norm_pix_loss=True), Normalisation(), 1),
        protocol_hash(build_mae(dataclasses.replace(PICO, in_chans=3), seed=0), Normalisation(), 1),
        protocol_hash(joined, Normalisation(), 1),
        protocol_hash(other, Normalisation(), 1),
    ]
    assert len({base, *changed}) == 9
