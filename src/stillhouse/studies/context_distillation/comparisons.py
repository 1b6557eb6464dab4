"""What the study's figures and tables share: measures, seeds taken together, paired differences to the baseline.

Stands above `results`; no torch here. Every number that is drawn or printed is an estimate from the test split's
items, at checkpoints that evaluation chose.
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
    mcnemar,
    paired_difference_over_seeds,
    paired_rate_interval,
    wilson_interval,
)
from stillhouse.studies.context_distillation.results import Evaluation, Measurement, load_evaluation

BASELINE = "baseline"
METHOD = "online_v1"
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Measure:
    """A column of the items: a rate over answers, or nats over gold tokens."""

    column: str
    name: str
    axis: str
    difference_axis: str
    per_token: bool = False

    @property
    def scale(self) -> float:
        """Factor from values to the axis: rates are drawn in per cent."""
        return 1.0 if self.per_token else 100.0


GOLD_NLL = Measure(
    "gold_nll",
    "gold NLL",
    "Gold answer NLL (nats per token)",
    "gold answer NLL\n(nats per token; lower is better)",
    per_token=True,
)
STRICT = Measure(
    "strict_correct", "strict accuracy", "Strict accuracy (% of answers)", "strict accuracy\n(percentage points)"
)
MARKER = Measure(
    "wrote_marker", "#### share", "Answers that wrote #### (%)", "answers that wrote ####\n(percentage points)"
)
FLEXIBLE = Measure(
    "flexible_correct",
    "flexible accuracy",
    "Flexible accuracy (% of answers)",
    "flexible accuracy\n(percentage points)",
)
FINISHED = Measure(
    "finished", "finished share", "Answers that ended before the limit (%)", "finished answers\n(percentage points)"
)
DRAWN_MEASURES = (GOLD_NLL, STRICT, MARKER)


@dataclass(frozen=True)
class Subject:
    """A condition (and number of shots) with the measurements of all its seeds, at one checkpoint each."""

    condition: str
    shots: int
    measurements: tuple[Measurement, ...]

    @property
    def label(self) -> str:
        """How figures and tables call it."""
        if self.condition == "base_zero_shot":
            return "base, zero-shot"
        return f"base, {self.shots}-shot" if self.condition == "base_few_shot" else self.condition

    @property
    def trained(self) -> bool:
        """Whether it is a student rather than the base model."""
        return self.measurements[0].step > 0


@dataclass(frozen=True)
class Comparison:
    """A subject minus the baseline on the same items; counts are of answers that one of the two alone got right."""

    subject: Subject
    difference: float
    low: float
    high: float
    p_value: float
    n: int
    only_subject: int
    only_baseline: int

    @property
    def estimate(self) -> Estimate:
        """The difference as an estimate, for tables and error bars."""
        return Estimate(self.difference, self.low, self.high, self.n)

    @property
    def excludes_zero(self) -> bool:
        """Whether the 95 % interval lies on one side of zero."""
        return self.low > 0 or self.high < 0


def load_evaluations(results: Sequence[Path]) -> list[Evaluation]:
    """The evaluation behind each `results.json`; `UserError` names a missing or damaged file."""
    return [load_evaluation(path) for path in results]


def headline(evaluation: Evaluation, split: str = "test") -> list[Subject]:
    """Every condition at its headline checkpoint, in the configured order."""
    groups: dict[tuple[str, int], list[Measurement]] = {}
    for measurement in evaluation.results.headline(split):
        groups.setdefault((measurement.condition, measurement.shots), []).append(measurement)
    return [Subject(condition, shots, tuple(group)) for (condition, shots), group in groups.items()]


def trajectory(evaluation: Evaluation, condition: str) -> dict[int, Subject]:
    """A trained condition by step; step 0 is the untrained base, where that was measured."""
    groups: dict[int, list[Measurement]] = {}
    for measurement in evaluation.results.of("test"):
        if measurement.condition in (condition, "base_zero_shot"):
            groups.setdefault(measurement.step, []).append(measurement)
    return {step: Subject(group[0].condition, 0, tuple(group)) for step, group in sorted(groups.items())}


def find(subjects: Sequence[Subject], condition: str) -> Subject | None:
    """The subject of a condition, None where it was not run."""
    return next((subject for subject in subjects if subject.condition == condition), None)


def estimate(evaluation: Evaluation, subject: Subject, measure: Measure) -> Estimate:
    """A measure with its 95 % interval: of one seed over items, of several seeds' mean over seeds and items.

    A rate's interval is never narrower than Wilson's of one seed: the bootstrap's is a point at 0 and at 1.
    """
    values, units = _values(evaluation, subject, measure)
    if len(values) == 1 and measure.per_token:
        return bootstrap_ratio_interval(values[0], units)
    one_seed = None if measure.per_token else wilson_interval(round(values.mean(axis=0).sum()), len(units))
    if one_seed and len(values) == 1:
        return one_seed
    both = paired_difference_over_seeds(values, np.zeros_like(values), units)
    low, high = both.low, both.high
    if one_seed:
        low, high = min(low, one_seed.low), max(high, one_seed.high)
    return Estimate(both.difference, low, high, both.n)


def by_seed(evaluation: Evaluation, subject: Subject, measure: Measure) -> list[float]:
    """The measure of each seed alone."""
    values, units = _values(evaluation, subject, measure)
    return [float(row.sum() / units.sum()) for row in values]


def compare(evaluation: Evaluation, subject: Subject, baseline: Subject, measure: Measure) -> Comparison:
    """`subject` minus `baseline`: interval by paired bootstrap, over seeds too where there are several.

    A rate's interval is never narrower than Bonett and Price's of one seed: the bootstrap's is a point where no item
    tells the two apart. With one seed the p-value of a rate is McNemar's exact one. With several it is the bootstrap's:
    the seeds' answers to one item are not independent.
    """
    ours, units = _values(evaluation, subject, measure)
    theirs, _ = _values(evaluation, baseline, measure)
    seeds = max(len(ours), len(theirs))
    # The untrained base has one run: it meets every seed of the baseline.
    ours, theirs = (np.tile(values, (seeds // len(values), 1)) for values in (ours, theirs))
    paired = paired_difference_over_seeds(ours, theirs, units)
    p_value, only_subject, only_baseline = paired.p_value, 0, 0
    low, high = paired.low, paired.high
    if not measure.per_token:
        counts = mcnemar(ours.ravel(), theirs.ravel())
        only_subject, only_baseline = counts.only_a, counts.only_b
        p_value = counts.p_value if seeds == 1 else p_value
        one_seed = paired_rate_interval(only_subject / seeds, only_baseline / seeds, paired.n)
        low, high = (one_seed.low, one_seed.high) if seeds == 1 else (min(low, one_seed.low), max(high, one_seed.high))
    return Comparison(subject, paired.difference, low, high, p_value, paired.n, only_subject, only_baseline)


def sample_note(evaluations: Sequence[Evaluation], dots: bool = True) -> str:
    """The n and the meaning of the intervals (and of the seeds' dots), for a figure's last line."""
    notes = []
    for evaluation in evaluations:
        subject = headline(evaluation)[0].measurements[0]
        answered = subject.strict.n if subject.strict else 0
        note = f"n = {subject.gold_nll.n} test items for NLL, {answered} answers for rates"
        notes.append(f"{evaluation.results.model}: {note}" if len(evaluations) > 1 else note)
    several = any(len(subject.measurements) > 1 for one in evaluations for subject in headline(one))
    over = "seeds and items" if several else "items; one seed"
    seeds = " Small dots: single seeds." if several and dots else ""
    return f"{'. '.join(dict.fromkeys(notes))}. 95 % intervals over {over}.{seeds}{data_note(evaluations)}"


def data_note(evaluations: Sequence[Evaluation]) -> str:
    """What the catalogue says of the data, for what may be seen apart from the page; "" where it says nothing."""
    notes = dict.fromkeys(one.results.dataset_note.rstrip(".") for one in evaluations if one.results.dataset_note)
    return f" Data: {'; '.join(notes)}." if notes else ""


def _values(evaluation: Evaluation, subject: Subject, measure: Measure) -> tuple[Floats, Floats]:
    """Per-item values, [seeds, items] in the order of item ids, and each item's units (tokens or one), [items]."""
    frames = [
        evaluation.rows[tuple(getattr(measurement, name) for name in evaluation.subject)]
        for measurement in subject.measurements
    ]
    # Left out by a mask: dropping rows is slow in pandas, and a figure asks hundreds of times.
    columns = [frame[measure.column].to_numpy(dtype=float, na_value=np.nan) for frame in frames]
    values = np.stack([column[~np.isnan(column)] for column in columns])
    if not measure.per_token:
        return values, np.ones(values.shape[1])
    tokens = frames[0]["gold_tokens"].to_numpy(dtype=float, na_value=np.nan)
    return values, tokens[~np.isnan(columns[0])]
