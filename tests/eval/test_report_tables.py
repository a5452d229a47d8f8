"""Scores, ranks and the sentences made from them."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from momo.errors import EvalError
from momo.eval import load_results
from momo.eval.report_provenance import grid_words, method_words, model_table, protocol_table
from momo.eval.report_scores import budget_words, build_comparisons, score_notes
from momo.eval.report_tables import (
    Comparison,
    Score,
    comparison_sentence,
    plain,
    rank_models,
    signed,
    summary_sentences,
)
from momo.eval.results import write_result
from momo.eval.statistics import compare
from tests.conftest import write_weights
from tests.eval.report_fixtures import write_results


def score(model, mean, difference=None, low=None, high=None, **fields):
    return Score(model=model, mean=mean, std=0.01, low=mean - 0.02, high=mean + 0.02, seeds=(0, 1, 2), n_test=50,
                 best=difference is None, difference=difference, difference_low=low, difference_high=high,
                 **fields)  # fmt: skip


def comparison(*scores, dataset="set"):
    return Comparison(dataset, dataset, "classification", "linear", "", "f1_weighted", "test", scores)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    root = tmp_path_factory.mktemp("results")
    weights = {
        "base": write_weights(root / "base"),
        "merged": write_weights(root / "merged", seed=1, sensors=[{"name": "CTX", "tiles": 1}]),
        "CTX": write_weights(root / "ctx", seed=2),
    }
    return load_results(write_results(root, weights))


def test_comparisons_hold_the_statistics_of_the_result_files(results):
    notes: list[str] = []
    found = {comparison.protocol: comparison for comparison in build_comparisons(results, notes)}
    assert notes == [] and sorted(found) == ["decoder", "knn", "linear"]
    linear = found["linear"]
    runs = [r for r in results if r.protocol == "linear"]
    for entry in linear.scores:
        values = [r.metrics["f1_weighted"].value for r in runs if r.model == entry.model]
        assert entry.mean == pytest.approx(np.mean(values)) and entry.std == pytest.approx(np.std(values, ddof=1))
        assert entry.low < entry.mean < entry.high and entry.n_test == 60
        assert entry.all_metrics["accuracy"] == pytest.approx(
            np.mean([r.metrics["accuracy"].value for r in runs if r.model == entry.model])
        )
    assert [entry.mean for entry in linear.scores] == sorted((entry.mean for entry in linear.scores), reverse=True)
    best, worst = linear.best, linear.scores[-1]
    assert best.best and not any(entry.best for entry in linear.scores[1:])
    assert worst.model == "random" and worst.untrained and not worst.tied
    paired = compare(*([r for r in runs if r.model == model] for model in (worst.model, best.model)))
    assert (worst.difference, worst.difference_high) == (pytest.approx(paired.value), pytest.approx(paired.high))


def test_models_that_cannot_be_paired_have_no_interval_and_are_named(results):
    kept = [r for r in results if r.protocol == "linear" and not (r.model == "random" and r.seed == 2)]
    notes: list[str] = []
    only = build_comparisons(kept, notes)[0]
    random = next(entry for entry in only.scores if entry.model == "random")
    assert random.difference_low is None and not random.tied and random.verdict == "difference not tested"
    assert len(notes) == 1 and "random could not be paired" in notes[0]


def test_copied_numbers_are_shown_with_their_source_and_never_paired(results):
    copied = dataclasses.replace(
        next(r for r in results if r.protocol == "linear"), model="published", weights=None, predictions=None,
        provenance="copied", source="doi:10.0/x", seed=0,
    )  # fmt: skip
    kept = [r for r in results if r.protocol == "linear"]
    notes: list[str] = []
    entry = next(e for e in build_comparisons([*kept, copied], notes)[0].scores if e.model == "published")
    assert entry.copied_from == "doi:10.0/x" and not entry.untrained and entry.interval == "–"
    assert any(note == "Copied, not run here: published (doi:10.0/x)." for note in score_notes([*kept, copied]))


def test_undefined_scores_are_left_out_and_told(results):
    undefined = [
        dataclasses.replace(
            r, metrics={**r.metrics, r.headline: dataclasses.replace(r.metrics[r.headline], value=None)}
        )
        for r in results
        if r.protocol == "linear" and r.model == "random"
    ]
    others = [r for r in results if r.protocol == "linear" and r.model != "random"]
    notes: list[str] = []
    assert len(build_comparisons([*others, *undefined], notes)[0].scores) == 3
    assert notes == ["random has no defined f1_weighted on demo-landform_cls, linear."]
    with pytest.raises(EvalError, match="no result has a defined score: 3 runs"):
        build_comparisons(undefined, [])


def test_different_headlines_are_not_mixed(results):
    linear = [r for r in results if r.protocol == "linear"]
    mixed = [dataclasses.replace(r, headline="accuracy") if r.model == "CTX" else r for r in linear]
    with pytest.raises(EvalError, match="different headline metrics: accuracy, f1_weighted on demo-landform_cls"):
        build_comparisons(mixed, [])


def test_altered_predictions_are_refused(results, tmp_path):
    first = results[0]
    (tmp_path / "runs").mkdir()
    (tmp_path / first.predictions["file"]).parent.mkdir(parents=True)
    (tmp_path / first.predictions["file"]).write_bytes(b"other")
    write_result(tmp_path, first)
    with pytest.raises(EvalError, match="the predictions were altered or damaged"):
        build_comparisons(load_results(tmp_path), [])


def test_notes_say_seeds_and_what_they_change(results):
    notes = score_notes(results)
    assert notes[0].startswith("3 seeds (0, 1, 2). A seed changes which 80% of the training images are used.")
    few = [dataclasses.replace(r, few_seeds=True) for r in results if r.model == "CTX"]
    assert "Fewer than 3 seeds for CTX: the spread over seeds is not to be trusted." in score_notes(few)
    edge = [
        dataclasses.replace(r, hyper_parameters={"lr": 1, "at_grid_edge": r.seed == 1})
        for r in results
        if r.protocol == "decoder"
    ]
    assert score_notes(edge)[-1].startswith("demo-crater_seg, segmentation decoder: in 4 of 12 runs the value")
    info = {**results[0].dataset_info, "duplicates_across_splits": 4}
    doubtful = score_notes([dataclasses.replace(results[0], dataset_info=info)])
    assert doubtful[-1].endswith("has 4 validation or test images that also stand in another split.")


def test_sentence_names_ties_and_the_gain_over_the_untrained_encoder():
    tied = comparison(
        score("merged", 0.9),
        score("base", 0.89, -0.01, -0.03, 0.01),
        score("rnd", 0.5, -0.4, -0.5, -0.3, untrained=True),
    )
    assert comparison_sentence(tied) == (
        "On set, linear probe, merged has the highest weighted F1, 0.900 (95 % interval 0.880 to 0.920); base is not "
        "separable from it; it is 0.400 (0.300 to 0.500) above rnd (untrained)."
    )
    clear = comparison(score("merged", 0.9), score("base", 0.8, -0.1, -0.12, -0.08))
    assert comparison_sentence(clear).endswith(", 0.100 (0.080 to 0.120) above base.")
    bad = comparison(score("rnd", 0.9, untrained=True), score("base", 0.8, -0.1, -0.12, -0.08))
    assert "no pretrained model is above this untrained encoder" in comparison_sentence(bad)
    assert comparison_sentence(comparison(score("only", 0.5))).endswith("0.500 (95 % interval 0.480 to 0.520).")


def test_ranks_share_ties_and_count_wins():
    first = comparison(score("a", 0.9), score("b", 0.8, -0.1, -0.2, -0.05), dataset="one")
    second = comparison(
        score("b", 0.7), score("a", 0.7, 0.0, -0.1, 0.1), score("c", 0.1, -0.6, -0.7, -0.5), dataset="two"
    )
    ranks = {rank.model: rank for rank in rank_models([first, second])}
    assert (ranks["a"].mean_rank, ranks["b"].mean_rank, ranks["c"].mean_rank) == (1.0, 1.5, 3.0)
    assert (ranks["a"].wins, ranks["a"].best_or_tied, ranks["b"].best_or_tied) == (1, 2, 1)
    assert [rank.model for rank in rank_models([first, second])] == ["a", "b", "c"]
    assert summary_sentences([first, second])[0].startswith(
        "Over 2 comparisons of 3 models, a has the best mean rank (1.0)"
    )
    assert summary_sentences([]) == []


def test_numbers_are_written_with_true_minus_signs():
    assert (plain(-0.1234), plain(0.5), plain(-0.0001)) == ("−0.123", "0.500", "0.000")
    assert (signed(0.1), signed(-0.1), signed(0.0), signed(400, 0)) == ("+0.100", "−0.100", "0.000", "+400")
    assert (signed(-0.0002), signed(0.0002)) == ("−0.000", "+0.000")


def test_budgets_in_words():
    assert budget_words(1.0, None) == ""
    assert budget_words(0.1, None) == "0.1 of the labels"
    assert budget_words(1.0, "few_shot/5_shot.csv") == "5 shot"


def test_protocols_show_the_grid_and_what_was_chosen(results):
    decoder = [r for r in results if r.protocol == "decoder"]
    assert grid_words(decoder) == "lr: 0.001, 0.004"
    row = dict(zip(protocol_table(results).head, protocol_table(decoder).rows[0], strict=True))
    assert row["runs"] == "12" and row["seeds"] == "0, 1, 2" and row["fixed or chosen"] == "lr: 0.001"
    assert row["images fitted / chosen on / tested"] == "32 / 20 / 12"


def test_models_of_results_and_cards_are_one_row_each(results):
    from momo.weights import load_card

    merged = next(r for r in results if r.model == "merged")
    card = load_card(merged.root / "merged")
    table = model_table({"evl": (card, ""), "pick": (card, "")}, results)
    names = [row[0] for row in table.rows]
    assert "evl, pick, merged" in names and "random" in names and len(names) == 4
    assert next(row for row in table.rows if row[0] == "random")[1:4] == ["untrained", "–", "pico, 32 px, patch 8"]
    assert method_words({"name": "average", "reference": "arXiv", "x": 0.12345}) == "average, reference arXiv, x 0.1235"
    assert method_words(None) == ""
    json.dumps(table.rows)
