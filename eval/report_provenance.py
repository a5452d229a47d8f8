"""The section "how each number was made": models, data, protocols and commands as tables."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from momo.corpus import Manifest
from momo.weights import Card

from .report_figures import short_count
from .report_inputs import Run, Selection, with_error
from .report_scores import budget_words
from .report_tables import PROTOCOL_WORDS, signed
from .results import Result


@dataclass(frozen=True)
class Table:
    """A table of texts; `code` marks columns of identifiers, such as hashes."""

    caption: str
    head: list[str]
    rows: list[list[str]]
    code: list[bool] = field(default_factory=list)

    @classmethod
    def build(cls, caption: str, columns: list[str], rows: Iterable[list[Any]], code: tuple[str, ...] = ()) -> Table:
        """Makes a table; empty cells become dashes."""
        cells = [["–" if cell in (None, "") else str(cell) for cell in row] for row in rows]
        return cls(caption, columns, cells, [name in code for name in columns])


def short_hash(sha256: str | None) -> str:
    """Returns the first 12 digits of a hash."""
    return sha256[:12] if sha256 else ""


def selection_table(selection: Selection) -> Table:
    """What was picked for each sensor."""
    rows = [
        [
            pick.sensor,
            f"{pick.samples:,}",
            with_error(pick.val_loss, pick.val_stderr),
            f"{pick.early_stop_samples:,}",
            signed(pick.samples - pick.early_stop_samples, 0),
            short_hash(pick.sha256),
        ]
        for pick in selection.picks.values()
    ]
    return Table.build(
        "Picked checkpoint of each sensor",
        ["sensor", "samples", "validation loss ± standard error", "early stop at", "samples from early stop", "sha256"],
        rows,
        ("sha256",),
    )


def selection_lines(selection: Selection) -> list[str]:
    """The selection in sentences: spread of losses, epsilon, distance, what was rejected."""
    lines = [f"The picks' validation losses differ by at most {selection.spread:.4g}."]
    if selection.epsilon is not None:
        lines[0] = lines[0][:-1] + f"; epsilon is {selection.epsilon:.4g}."
        asked = selection.epsilon_requested
        if asked is not None and selection.epsilon > asked:
            lines.append(
                f"No tuple of checkpoints agreed within the epsilon asked for ({asked:.4g}); "
                f"{selection.epsilon:.4g} is the smallest at which one does."
            )
    if selection.distance is not None:
        lines.append(f"Mean distance of the picks from the early stops: {selection.distance:,.0f} samples.")
    return [" ".join(lines)]


def model_table(weights: dict[str, tuple[Card, str]], results: list[Result]) -> Table:
    """One row for each set of weights met anywhere: by name, from cards first, then from result files.

    Args:
        weights: Name to (card, role on this page).
        results: Runs whose models are listed too.
    """
    names: dict[str, list[str]] = defaultdict(list)
    cards: dict[str, Card] = {}
    for name, (card, role) in weights.items():
        cards.setdefault(card.sha256, card)
        label = f"{name} ({role})" if role else name
        if label not in names[card.sha256]:
            names[card.sha256].append(label)
    bare: dict[str, Result] = {}
    for result in results:
        key = result.weights["sha256"] if result.weights else f"untrained {result.model}"
        if result.model not in [label.split(" (")[0] for label in names[key]]:
            names[key].append(result.model)
        bare.setdefault(key, result)
    rows = []
    for key, labels in names.items():
        if key in cards:
            rows.append(_card_row(", ".join(labels), cards[key]))
            continue
        rows.append(_bare_row(", ".join(labels), bare[key]))
    return Table.build(
        "Models",
        ["model", "kind", "sha256", "size", "sensors", "samples seen", "validation loss", "method", "parents"],
        rows,
        ("sha256", "parents"),
    )


def _card_row(name: str, card: Card) -> list[Any]:
    loss = card.val_loss or {}
    shown = with_error(loss["loss"], loss.get("stderr")) if loss.get("loss") is not None else ""
    parents = ", ".join(f"{p.get('name') or p['role']} {short_hash(p['sha256'])}" for p in card.parents)
    sensors = ", ".join(str(entry["name"]) for entry in card.sensors)
    samples = "" if card.samples is None else f"{card.samples:,}"
    size, method = _size_words(card.architecture), method_words(card.method)
    return [name, card.kind, short_hash(card.sha256), size, sensors, samples, shown, method, parents]


def _bare_row(name: str, result: Result) -> list[Any]:
    """Describes weights of which only a result file is at hand, or an untrained encoder."""
    weights, size = result.weights, _size_words(result.architecture)
    if weights is None:
        kind = "untrained" if result.provenance == "rerun" else "copied"
        return [name, kind, "", size, "", "", "", "", ""]
    method = method_words(weights.get("method"))
    return [name, weights["kind"], short_hash(weights["sha256"]), size, ", ".join(result.sensors), "", "", method, ""]


def _size_words(architecture: dict[str, Any]) -> str:
    return f"{architecture['size']}, {architecture['image_size']} px, patch {architecture['patch_size']}"


def method_words(method: dict[str, Any] | None) -> str:
    """Returns a merge method and its coefficients as words."""
    if not method:
        return ""
    name = str(method.get("name") or method.get("method") or "")
    rest = {key: value for key, value in method.items() if key not in ("name", "method") and value is not None}
    return ", ".join([part for part in [name] if part] + [f"{key} {_short(value)}" for key, value in rest.items()])


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return "(" + ", ".join(f"{key} {_short(inner)}" for key, inner in value.items()) + ")"
    if isinstance(value, list):
        return ", ".join(_short(inner) for inner in value)
    return str(value)


def run_table(runs: list[Run]) -> Table:
    """One row a pretraining run."""
    rows = [
        [
            run.name,
            ", ".join(run.sensors),
            f"{run.last.samples:,}",
            len(run.val),
            with_error(run.early_stop.loss, run.early_stop.stderr),
            f"{run.early_stop.samples:,}",
            run.early_stop.count,
            short_hash(run.protocol),
        ]
        for run in runs
    ]
    return Table.build(
        "Pretraining runs; only losses under one protocol hash may be compared",
        [
            "run",
            "sensors",
            "samples",
            "validations",
            "lowest loss ± standard error",
            "at samples",
            "tiles scored",
            "protocol",
        ],
        rows,
        ("protocol",),
    )


def corpus_table(manifests: list[Manifest]) -> Table:
    """One row a corpus."""
    rows = [
        [
            m.sensor,
            ", ".join(f"{count:,} {split}" for split, count in m.splits.items()),
            f"{m.tile_size} px, {m.dtype}",
            m.products,
            "synthetic" if m.synthetic else "measured",
            m.licence,
            short_hash(m.fingerprint),
        ]
        for m in manifests
    ]
    return Table.build(
        "Pretraining corpora",
        ["sensor", "tiles", "tile", "products", "data", "licence", "fingerprint"],
        rows,
        ("fingerprint",),
    )


def dataset_table(results: list[Result]) -> Table:
    """One row a labelled dataset."""
    rows: dict[tuple[str, str], list[Any]] = {}
    for r in results:
        kind = {True: "synthetic", False: "measured", None: "not stated"}[r.synthetic]
        info = r.dataset_info
        splits = ", ".join(f"{count} {split}" for split, count in (info.get("splits") or {}).items())
        rows.setdefault(
            (r.dataset, r.dataset_fingerprint),
            [
                r.dataset,
                r.task,
                splits,
                ", ".join(r.classes),
                info.get("sensor"),
                kind,
                info.get("licence"),
                short_hash(r.dataset_fingerprint),
            ],
        )
    return Table.build(
        "Labelled datasets",
        ["dataset", "task", "images", "classes", "sensor", "data", "licence", "fingerprint"],
        rows.values(),
        ("fingerprint",),
    )


def protocol_table(results: list[Result]) -> Table:
    """One row for each dataset and protocol: budget, seeds, what was searched, what was chosen."""
    groups: dict[tuple[Any, ...], list[Result]] = defaultdict(list)
    for r in results:
        groups[(r.dataset, r.protocol, r.fraction, r.train_subset)].append(r)
    rows = []
    for (dataset, protocol, fraction, subset), runs in groups.items():
        first = runs[0]
        seeds = ", ".join(str(seed) for seed in sorted({run.seed for run in runs}))
        trained = _spread([run.n_train for run in runs])
        budget = (budget_words(fraction, subset) or "all labels") + f"; each seed draws {first.train_draw:.4g} of them"
        rows.append(
            [
                dataset,
                PROTOCOL_WORDS.get(protocol, protocol),
                len(runs),
                seeds,
                budget,
                f"{trained} / {_spread([run.n_val for run in runs])} / {_spread([run.n_test for run in runs])}",
                first.image_size or "native",
                first.headline,
                grid_words(runs),
                chosen_words(runs),
            ]
        )
    return Table.build(
        "Protocols: hyper-parameters are chosen on the validation split, then tested once",
        [
            "dataset",
            "protocol",
            "runs",
            "seeds",
            "labels",
            "images fitted / chosen on / tested",
            "image px",
            "headline",
            "grid",
            "fixed or chosen",
        ],
        rows,
    )


def _spread(values: list[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"


def _values_by_name(dicts: list[dict[str, Any]]) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for candidate in dicts:
        for key, value in candidate.items():
            if key != "val_score" and value not in found.setdefault(key, []):
                found[key].append(value)
    return found


def _value_words(values: list[Any]) -> str:
    numbers = [value for value in values if isinstance(value, (int, float)) and not isinstance(value, bool)]
    return ", ".join(_short(value) for value in (sorted(numbers) if len(numbers) == len(values) else values))


def grid_words(runs: list[Result]) -> str:
    """The values each hyper-parameter was chosen from."""
    searched = _values_by_name([candidate for run in runs for candidate in run.grid])
    return "; ".join(f"{key}: {_value_words(values)}" for key, values in searched.items() if len(values) > 1)


def chosen_words(runs: list[Result]) -> str:
    """The hyper-parameters that were tested, over all models and seeds."""
    chosen = _values_by_name([run.hyper_parameters for run in runs])
    return "; ".join(f"{key}: {_value_words(values)}" for key, values in chosen.items())


def facts(manifests: list[Manifest], runs: list[Run], results: list[Result], comparisons: int) -> list[tuple[str, str]]:
    """Returns the few counts shown at the top of the page, as (label, value)."""
    found: list[tuple[str, str]] = []
    if manifests:
        found.append(("sensors", str(len({m.sensor for m in manifests}))))
        found.append(("tiles", f"{sum(sum(m.splits.values()) for m in manifests):,}"))
    if runs:
        found.append(("pretraining runs", str(len(runs))))
        found.append(("samples seen", short_count(sum(run.last.samples for run in runs))))
    if results:
        found.append(("models compared", str(len({r.model for r in results}))))
        found.append(("comparisons", str(comparisons)))
        found.append(("evaluation runs", str(len(results))))
    return found
