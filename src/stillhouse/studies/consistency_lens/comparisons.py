"""What the study's figures and tables share: measures over seeds, and controls minus the lens on the same documents.

Stands above `results`; no torch here. Every number that is drawn or printed is an estimate from held-out documents, at
checkpoints that validation chose.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stillhouse.evaluation.statistics import (
    Estimate,
    bootstrap_ratio_interval,
    holm,
    paired_difference_over_seeds,
    wilson_interval,
)
from stillhouse.studies.consistency_lens.results import (
    BEST_OF,
    CONTROLS,
    LENS,
    MEAN,
    ZERO,
    Evaluation,
    LensFacts,
    Measurement,
    load_evaluation,
)

Floats = NDArray[np.float64]
# The controls that say whether the text, and not only its encoder, carries the activation.
DECISIVE = ("other_explanation", "hard_coded", "text_continuation")
LABELS = {
    LENS: "lens",
    MEAN: "mean activation",
    ZERO: "zeros",
    "original_tokens": "original last T tokens",
    "shuffled": "own text, shuffled",
    "other_explanation": "another's explanation",
    "hard_coded": "hard-coded text",
    "text_continuation": "original's continuation",
    "text_regression": "regression on the input text",
    "untrained": "untrained lens",
}


@dataclass(frozen=True)
class Subject:
    """A condition of one model: its lenses of all seeds, at the checkpoints that were chosen."""

    evaluation: Evaluation
    facts: LensFacts

    @property
    def condition(self) -> str:
        """The condition's name."""
        return self.facts.condition

    @property
    def measurements(self) -> list[Measurement]:
        """The lens's own measurement of each seed."""
        return self.of(LENS)

    def of(self, variant: str) -> list[Measurement]:
        """A variant's measurement of each seed."""
        return [m for m in self.evaluation.results.headline(variant) if m.condition == self.condition]

    @property
    def sample_counts(self) -> list[int]:
        """The K of best-of-K."""
        variants = {m.variant for m in self.evaluation.results.measurements if m.condition == self.condition}
        return sorted(int(name.removeprefix(BEST_OF)) for name in variants if name.startswith(BEST_OF))

    def values(self, variant: str, column: str) -> Floats:
        """A column of a variant, [seeds, items], items in the order of their ids."""
        rows = [
            self.evaluation.rows[self.condition, one.seed, one.step, one.split, variant][column]
            for one in self.measurements
        ]
        return np.stack([row.to_numpy(dtype=float) for row in rows])


@dataclass(frozen=True)
class Comparison:
    """KL of a control minus the lens's, on the same documents; above 0 the lens is better."""

    variant: str
    estimate: Estimate
    p_value: float

    @property
    def lens_is_better(self) -> bool:
        """Whether the interval lies above zero."""
        return self.estimate.low > 0

    @property
    def lens_is_worse(self) -> bool:
        """Whether the interval lies below zero."""
        return self.estimate.high < 0


def load_evaluations(results: Sequence[Path]) -> list[Evaluation]:
    """The evaluation behind each `results.json`; `UserError` names a damaged file."""
    return [load_evaluation(path) for path in results]


def subjects(evaluations: Sequence[Evaluation]) -> list[Subject]:
    """Every condition of every model, in the configured order."""
    return [Subject(one, facts) for one in evaluations for facts in one.results.lenses]


def kl(subject: Subject, variant: str = LENS) -> Estimate:
    """Mean KL in nats."""
    return _ratio(subject.values(variant, "kl"), None)


def recovered(subject: Subject, variant: str = LENS, baseline: str = MEAN) -> Estimate:
    """The share of the baseline's KL that the variant takes away."""
    return _complement(_ratio(subject.values(variant, "kl"), subject.values(baseline, "kl")[0]))


def mse(subject: Subject, variant: str = LENS) -> Estimate:
    """Mean squared error per component."""
    return _ratio(subject.values(variant, "squared_error"), None)


def variance_explained(subject: Subject, variant: str = LENS) -> Estimate:
    """1 - squared error over squared distance from the training mean."""
    errors = subject.values(variant, "squared_error")
    return _complement(_ratio(errors, subject.values(variant, "squared_deviation")[0]))


def top1(subject: Subject, variant: str = LENS) -> Estimate:
    """The share of documents where the most probable next token stays; never narrower than one seed's Wilson."""
    values = subject.values(variant, "top1")
    one_seed = wilson_interval(round(values.mean(axis=0).sum()), values.shape[1])
    if len(values) == 1:
        return one_seed
    both = _ratio(values, None)
    return Estimate(both.value, min(both.low, one_seed.low), max(both.high, one_seed.high), both.n)


def compare(subject: Subject, variant: str) -> Comparison:
    """A variant's KL minus the lens's, paired."""
    paired = paired_difference_over_seeds(subject.values(variant, "kl"), subject.values(LENS, "kl"))
    return Comparison(variant, Estimate(paired.difference, paired.low, paired.high, paired.n), paired.p_value)


def comparisons(subject: Subject) -> list[tuple[Comparison, float]]:
    """Every control against the lens, with its p-value adjusted for their number."""
    found = [compare(subject, variant) for variant in CONTROLS]
    return list(zip(found, holm([one.p_value for one in found]), strict=True))


def sample_note(chosen: Sequence[Subject]) -> str:
    """The n and the meaning of the intervals, for a figure's last line."""
    first = chosen[0]
    counts = sorted({one.kl.n for subject in chosen for one in subject.measurements})
    several = any(len(subject.measurements) > 1 for subject in chosen)
    over = "seeds and documents" if several else "documents; one seed"
    split = first.evaluation.results.split
    return f"n = {'/'.join(map(str, counts))} {split} documents. 95 % intervals over {over}."


def _ratio(values: Floats, weights: Floats | None) -> Estimate:
    """Sum over sum, or the mean, of [seeds, items], with its interval over both."""
    units = np.ones(values.shape[1]) if weights is None else weights
    if len(values) == 1:
        return bootstrap_ratio_interval(values[0], units)
    both = paired_difference_over_seeds(values, np.zeros_like(values), units)
    return Estimate(both.difference, both.low, both.high, both.n)


def _complement(ratio: Estimate) -> Estimate:
    return Estimate(1 - ratio.value, 1 - ratio.high, 1 - ratio.low, ratio.n)
