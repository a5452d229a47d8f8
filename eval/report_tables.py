"""Score tables of the report and the sentences said about them, all computed from the result files."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

METRIC_WORDS = {
    "accuracy": "accuracy",
    "f1_weighted": "weighted F1",
    "f1_macro": "macro F1",
    "iou_fg": "foreground IoU",
    "f1_fg": "foreground F1",
    "miou_incl_bg": "mean IoU with background",
    "miou_imagewise": "mean IoU by image",
}
PROTOCOL_WORDS = {"knn": "kNN probe", "linear": "linear probe", "decoder": "segmentation decoder"}


def plain(value: float, digits: int = 3) -> str:
    """Writes a number with fixed digits and a true minus sign."""
    text = f"{value:.{digits}f}"
    return "−" + text[1:] if text.startswith("-") and float(text) != 0 else text.lstrip("-")


def signed(value: float, digits: int = 3) -> str:
    """Writes a difference with its sign, which is kept when the digits round to zero: it decides a verdict."""
    text = plain(abs(value), digits)
    return text if value == 0 else f"{'−' if value < 0 else '+'}{text}"


@dataclass(frozen=True)
class Score:
    """One model in one comparison.

    Attributes:
        model: Name.
        mean: Mean of the metric over seeds.
        std: Sample standard deviation over seeds; None with one seed.
        low: Lower end of the 95 % interval of the mean; None when it was not computed.
        high: Upper end.
        seeds: Seeds run.
        n_test: Test images of each run.
        best: True for the highest mean of the comparison.
        difference: Mean difference to the best model (at most 0); None for the best itself.
        difference_low: Lower end of the difference's 95 % interval.
        difference_high: Upper end.
        untrained: True for a randomly initialised encoder.
        copied_from: Source of the number when it was copied rather than run here; empty otherwise.
        all_metrics: Mean over seeds of every metric by its exact name; undefined ones are left out.
    """

    model: str
    mean: float
    std: float | None
    low: float | None
    high: float | None
    seeds: tuple[int, ...]
    n_test: int
    best: bool = False
    difference: float | None = None
    difference_low: float | None = None
    difference_high: float | None = None
    untrained: bool = False
    copied_from: str = ""
    all_metrics: dict[str, float] = field(default_factory=dict)

    @property
    def tied(self) -> bool:
        """True when the interval of the difference to the best includes 0."""
        if self.best or self.difference_low is None or self.difference_high is None:
            return False
        return self.difference_low <= 0 <= self.difference_high

    @property
    def mean_words(self) -> str:
        """Mean and spread, such as `0.812 ± 0.010`."""
        return plain(self.mean) + ("" if self.std is None else f" ± {plain(self.std)}")

    @property
    def interval(self) -> str:
        """The 95 % interval, or a dash."""
        return "–" if self.low is None or self.high is None else f"{plain(self.low)} to {plain(self.high)}"

    @property
    def interval_words(self) -> str:
        """Mean with its interval in brackets."""
        return plain(self.mean) + ("" if self.low is None else f" ({self.interval})")

    @property
    def difference_words(self) -> str:
        """Difference to the best with its interval, or a dash."""
        if self.difference is None:
            return "–"
        if self.difference_low is None or self.difference_high is None:
            return signed(self.difference)
        return f"{signed(self.difference)} ({signed(self.difference_low)} to {signed(self.difference_high)})"

    @property
    def verdict(self) -> str:
        """Best, not separable from the best, below it, or untested."""
        if self.best:
            return "best mean"
        if self.tied:
            return "not separable from the best"
        return "below the best" if self.difference_high is not None else "difference not tested"


@dataclass(frozen=True)
class Comparison:
    """All models under one dataset, task, protocol and label budget; scores sorted from best to worst."""

    key: str
    dataset: str
    task: str
    protocol: str
    budget: str
    metric: str
    split: str
    scores: tuple[Score, ...]

    @property
    def metric_words(self) -> str:
        """The metric in words."""
        return METRIC_WORDS.get(self.metric, self.metric)

    @property
    def protocol_words(self) -> str:
        """The protocol in words."""
        return PROTOCOL_WORDS.get(self.protocol, self.protocol)

    @property
    def title(self) -> str:
        """Dataset, protocol and label budget in words."""
        return f"{self.dataset}, {self.protocol_words}" + (f", {self.budget}" if self.budget else "")

    @property
    def best(self) -> Score:
        """The model with the highest mean."""
        return self.scores[0]

    @property
    def seeds(self) -> str:
        """Seeds of each model, or their range when the models differ."""
        return _range([len(score.seeds) for score in self.scores])

    @property
    def n_test(self) -> str:
        """Test images, or their range when the models differ."""
        return _range([score.n_test for score in self.scores])

    @property
    def untrained(self) -> Score | None:
        """The untrained encoder, when it was run."""
        return next((score for score in self.scores if score.untrained), None)

    @property
    def all_metrics(self) -> list[str]:
        """Every metric that some model has, headline first."""
        names = dict.fromkeys([self.metric, *(name for score in self.scores for name in score.all_metrics)])
        return [name for name in names if any(name in score.all_metrics for score in self.scores)]


def _range(counts: list[int]) -> str:
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high}"


@dataclass(frozen=True)
class Rank:
    """Standing of one model over all comparisons it takes part in."""

    model: str
    mean_rank: float
    wins: int
    best_or_tied: int
    comparisons: int


def rank_models(comparisons: list[Comparison]) -> list[Rank]:
    """Ranks models by their mean rank over comparisons; equal means share the better rank."""
    ranks: dict[str, list[int]] = defaultdict(list)
    wins: dict[str, int] = defaultdict(int)
    tied: dict[str, int] = defaultdict(int)
    for comparison in comparisons:
        for score in comparison.scores:
            ranks[score.model].append(1 + sum(other.mean > score.mean for other in comparison.scores))
            wins[score.model] += score.best
            tied[score.model] += score.best or score.tied
    table = [
        Rank(model, sum(values) / len(values), wins[model], tied[model], len(values)) for model, values in ranks.items()
    ]
    return sorted(table, key=lambda rank: (-rank.comparisons, rank.mean_rank, rank.model))


def summary_sentences(comparisons: list[Comparison]) -> list[str]:
    """Says in words which model is best overall and in each comparison, by how much, and how sure that is."""
    sentences = []
    if len(comparisons) > 1:
        ranks = rank_models(comparisons)
        first = ranks[0]
        sentences.append(
            f"Over {first.comparisons} comparisons of {len(ranks)} models, {first.model} has the best mean rank "
            f"({first.mean_rank:.1f}); in {first.best_or_tied} of them it is the best or not separable from the best."
        )
    return sentences + [comparison_sentence(comparison) for comparison in comparisons]


def comparison_sentence(comparison: Comparison) -> str:
    """Says which model is best, what cannot be separated from it, and where the untrained encoder stands."""
    best, others = comparison.best, comparison.scores[1:]
    sentence = f"On {comparison.title}, {best.model} has the highest {comparison.metric_words}, {plain(best.mean)}"
    if best.low is not None:
        sentence += f" (95 % interval {best.interval})"
    tied = [score.model for score in others if score.tied]
    clear = [score for score in others if score.difference is not None and score.difference_high is not None]
    if tied:
        sentence += f"; {join_words(tied)} {'is' if len(tied) == 1 else 'are'} not separable from it"
    elif clear:
        sentence += f", {_ahead(clear[0])}"
    untrained = comparison.untrained
    if untrained is not None and untrained.best:
        sentence += "; no pretrained model is above this untrained encoder"
    elif untrained is not None and not untrained.tied and untrained in clear and (tied or untrained is not clear[0]):
        sentence += f"; it is {_ahead(untrained)}"
    return sentence + "."


def _ahead(score: Score) -> str:
    assert score.difference is not None and score.difference_low is not None and score.difference_high is not None
    interval = f"{plain(-score.difference_high)} to {plain(-score.difference_low)}"
    return f"{plain(-score.difference)} ({interval}) above {score.model}{' (untrained)' if score.untrained else ''}"


def join_words(words: list[str]) -> str:
    """Joins words with commas and a final `and`."""
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + f" and {words[-1]}"
