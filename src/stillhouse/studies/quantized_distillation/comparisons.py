"""What the study's figures and tables share: measures, seeds taken together, differences, and the gap that was closed.

Stands above `results`; no torch here. Every number is an estimate over a test set's items, and over seeds where there
are several; every comparison is paired on the same items.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stillhouse.evaluation.statistics import (
    Estimate,
    PairedComparison,
    paired_difference_over_seeds,
    paired_rate_interval,
    wilson_interval,
)
from stillhouse.studies.quantized_distillation.evaluation_settings import CALIBRATED
from stillhouse.studies.quantized_distillation.results import (
    ANSWERS,
    PTQ,
    TEACHER,
    Kind,
    QuantizedEvaluation,
    Variant,
    load,
)

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Measure:
    """One number of a system. column: of the items; sets: the names that it is taken over.

    Over several sets it is the mean of theirs, each counting the same.
    """

    column: str
    kind: Kind
    sets: tuple[str, ...]
    name: str
    axis: str
    lower_is_better: bool
    scale: float = 1.0
    digits: int = 3

    @property
    def is_share(self) -> bool:
        """Whether an item's value is right or wrong."""
        return self.kind == "task"


def text_measures(evaluation: QuantizedEvaluation) -> list[Measure]:
    """NLL, KL and agreement on each text, then on the answers of the test split."""
    measures = []
    for kind in ("text", "answers"):
        for name in evaluation.results.sets(kind):
            where = "the test answers" if name == ANSWERS else name
            unit = "(nats per token)"
            measures += [
                Measure("nll", kind, (name,), f"NLL, {where}", f"NLL of {where} {unit}", True),
                Measure("kl", kind, (name,), f"KL, {where}", f"KL from the teacher on {where} {unit}", True),
                Measure("agrees", kind, (name,), f"top-1, {where}", f"Top-1 agreement on {where} (%)", False, 100, 1),
            ]
    return measures


def task_measures(evaluation: QuantizedEvaluation, column: str = "acc") -> list[Measure]:
    """Accuracy on each task, and their mean where there are several. column: `acc`, or `acc_norm`.

    The mean of `acc_norm` takes `acc` for tasks that do not define it.
    """
    tasks = evaluation.results.sets("task")
    rows = {name: evaluation.rows[TEACHER, 0, "deployed", "task", name] for name in tasks}
    defined = {name for name in tasks if not rows[name][column].isna().any()}
    found = [_accuracy(column, (name,), TASK_NAMES.get(name, name)) for name in tasks if name in defined]
    return [*found, _accuracy(column, tuple(tasks), "mean of the tasks")] if len(tasks) > 1 else found


def average_accuracy(evaluation: QuantizedEvaluation) -> Measure | None:
    """The mean over tasks of the published headline, acc_norm where it is defined; None without tasks."""
    tasks = tuple(evaluation.results.sets("task"))
    return _accuracy("acc_norm", tasks, "mean accuracy") if tasks else None


TASK_NAMES = {
    "hellaswag": "HellaSwag",
    "arc_easy": "ARC-Easy",
    "arc_challenge": "ARC-Challenge",
    "winogrande": "WinoGrande",
    "mmlu": "MMLU",
}


def _accuracy(column: str, sets: tuple[str, ...], name: str) -> Measure:
    return Measure(column, "task", sets, f"{column}, {name}", f"{name} ({column}, %)", False, 100, 1)


def load_evaluations(results: Sequence[Path]) -> list[QuantizedEvaluation]:
    """The evaluation behind each `results.json`; `UserError` names a missing or damaged file."""
    return [load(path) for path in results]


def students(evaluation: QuantizedEvaluation) -> list[str]:
    """The trained conditions, in the configuration's order."""
    results = evaluation.results
    return [one for one in results.conditions if any(system.trained for system in results.of(one))]


def shown(conditions: Sequence[str]) -> list[str]:
    """The conditions that have a place of their own in figures: sweep points, which have `+`, only if they are all."""
    named = [one for one in conditions if "+" not in one]
    untrained = {TEACHER, *CALIBRATED}
    return named if any(one not in untrained and not one.startswith(PTQ) for one in named) else list(conditions)


def recovering(evaluation: QuantizedEvaluation) -> list[str]:
    """The conditions that are to close the gap between `ptq` and the teacher."""
    found = shown(evaluation.results.conditions)
    return [one for one in found if one != TEACHER and not one.startswith(PTQ)]


def recoverable(evaluation: QuantizedEvaluation) -> list[Measure]:
    """The measures that rounding to nearest made worse beyond doubt."""
    mean = average_accuracy(evaluation)
    return [one for one in [*text_measures(evaluation), *([mean] if mean else [])] if damaged(evaluation, one)]


def estimate(
    evaluation: QuantizedEvaluation, condition: str, measure: Measure, variant: Variant = "deployed"
) -> Estimate | None:
    """A condition's value with its interval; None where it was not measured."""
    found = _values(evaluation, condition, measure, variant)
    if found is None:
        return None
    values, weights = found
    both = paired_difference_over_seeds(values, np.zeros_like(values), weights)
    low, high = both.low, both.high
    if measure.is_share:
        # The bootstrap's interval is a point where every item is right, or none.
        whole = wilson_interval(round(both.difference * both.n), both.n)
        low, high = min(low, whole.low), max(high, whole.high)
    return Estimate(both.difference, low, high, both.n)


@lru_cache(maxsize=4096)  # tables, figures and sentences ask the same again and again
def compare(
    evaluation: QuantizedEvaluation,
    condition: str,
    other: str,
    measure: Measure,
    variants: tuple[Variant, Variant] = ("deployed", "deployed"),
) -> PairedComparison | None:
    """`condition` minus `other` on the same items, over seeds where there are several; None where one is missing.

    What is not trained has no seed: it meets every seed of the other. Variants of one condition: the seeds of both.
    """
    both = None
    if condition == other:
        both = set.intersection(*(_seeds(evaluation, condition, variant, measure) for variant in variants))
    first = _values(evaluation, condition, measure, variants[0], both)
    second = _values(evaluation, other, measure, variants[1], both)
    if first is None or second is None:
        return None
    ours, theirs = np.broadcast_arrays(first[0], second[0])
    paired = paired_difference_over_seeds(ours, theirs, first[1])
    if not measure.is_share:
        return paired
    # Items of a mean over tasks count by their task's size; together they count as many as they are.
    apart = (ours - theirs).mean(axis=0) * paired.n / first[1].sum()
    whole = paired_rate_interval(apart.clip(min=0).sum(), -apart.clip(max=0).sum(), paired.n)
    low, high = min(paired.low, whole.low), max(paired.high, whole.high)
    return PairedComparison(paired.difference, low, high, paired.p_value, paired.n)


def rounded(evaluation: QuantizedEvaluation, condition: str) -> str:
    """The `ptq` of a condition's weight format: rounded to nearest without training."""
    formats = {one.condition: one.weight_format for one in evaluation.results.systems}
    same = [name for name in formats if name.startswith(PTQ) and formats[name] == formats.get(condition)]
    return same[0] if same else PTQ


def gap(evaluation: QuantizedEvaluation, measure: Measure, ptq: str = PTQ) -> PairedComparison | None:
    """What rounding to nearest changed: `ptq` minus the teacher."""
    return compare(evaluation, ptq, TEACHER, measure)


def damaged(evaluation: QuantizedEvaluation, measure: Measure, ptq: str = PTQ) -> bool:
    """Whether rounding made the measure worse beyond doubt: only then is there a gap to close."""
    found = gap(evaluation, measure, ptq)
    if found is None:
        return False
    return found.low > 0 if measure.lower_is_better else found.high < 0


def closed_share(evaluation: QuantizedEvaluation, condition: str, measure: Measure) -> Estimate | None:
    """The share of ptq's gap to the teacher that a condition closed: (ptq - x) / (ptq - teacher).

    1: as good as the teacher; 0: as ptq; below: worse than ptq. Seeds and items are both resampled. None where
    rounding did no damage, or something was not measured.
    """
    base = rounded(evaluation, condition)
    found = [_values(evaluation, name, measure) for name in (condition, base, TEACHER)]
    if any(one is None for one in found) or not damaged(evaluation, measure, base):
        return None
    ours, ptq, teacher = (one[0] for one in found if one is not None)
    both = paired_difference_over_seeds(np.broadcast_to(ptq, ours.shape), ours, (ptq - teacher)[0])
    return Estimate(both.difference, both.low, both.high, both.n)


def sample_note(evaluations: Sequence[QuantizedEvaluation]) -> str:
    """The n and the meaning of the intervals, for a figure's last line."""
    notes = []
    for one in evaluations:
        sizes = {(m.kind, m.name): m for m in one.results.measurements if m.variant == "deployed"}
        texts = [f"{m.name} {m.tokens:,} tokens" for (kind, _), m in sizes.items() if kind != "task"]
        tasks = [f"{TASK_NAMES.get(name, name)} {m.items:,}" for (kind, name), m in sizes.items() if kind == "task"]
        name = f"{one.results.model}: " if len(evaluations) > 1 else ""
        notes.append(f"{name}n: {'; '.join([*texts, *([', '.join(tasks)] if tasks else [])])}")
    seeds = seed_count(evaluations)
    over = f"items and {seeds} seeds" if seeds > 1 else "items; one seed"
    return f"{'. '.join(notes)}. 95 % intervals over {over}."


def seed_count(evaluations: Sequence[QuantizedEvaluation]) -> int:
    """How many seeds the students have; 0 without students."""
    return max((len({s.seed for s in one.results.systems if s.trained}) for one in evaluations), default=0)


def _seeds(evaluation: QuantizedEvaluation, condition: str, variant: Variant, measure: Measure) -> set[int]:
    """The seeds of a condition that were measured so."""
    where = (variant, measure.kind, measure.sets[0])
    return {one.seed for one in evaluation.results.of(condition) if (condition, one.seed, *where) in evaluation.rows}


def _values(
    evaluation: QuantizedEvaluation,
    condition: str,
    measure: Measure,
    variant: Variant = "deployed",
    seeds: Collection[int] | None = None,
) -> tuple[Floats, Floats] | None:
    """Per-item sums, [seeds, items], and each item's weight, [items]; their ratio of sums is the measure.

    Items are in the order of their ids. seeds: None for all that were measured.
    """
    values, weights = [], []
    chosen = sorted(_seeds(evaluation, condition, variant, measure) if seeds is None else seeds)
    if not chosen:
        return None
    for name in measure.sets:
        frames = [evaluation.rows[condition, seed, variant, measure.kind, name] for seed in chosen]
        tokens = frames[0]["tokens"].to_numpy(dtype=float)
        # Several sets: each counts the same, however many items it has.
        share = 1.0 if len(measure.sets) == 1 else 1.0 / tokens.sum()
        columns = [frame[measure.column].fillna(frame["acc"]) for frame in frames]
        values.append(np.stack([column.to_numpy(dtype=float) for column in columns]) * share)
        weights.append(tokens * share)
    return np.concatenate(values, axis=1), np.concatenate(weights)
