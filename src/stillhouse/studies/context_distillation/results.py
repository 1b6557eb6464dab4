"""What evaluation leaves behind and what figures and tables read: `results.json` and `items.parquet` of a model.

Stands between `evaluate`, which writes both, and `report` and `figures`, which read nothing else; no torch here.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from stillhouse.config.base import StrictModel
from stillhouse.evaluation import results_files
from stillhouse.evaluation.results_files import Interval, Selection
from stillhouse.evaluation.statistics import bootstrap_ratio_interval, wilson_interval

TRANSFER = "transfer:"

# One row per subject and item. `output` and the scores are null where nothing was generated.
ITEM_COLUMNS = {
    "model": "string",
    "condition": "string",
    "seed": "Int64",
    "step": "Int64",
    "shots": "Int64",
    "split": "string",
    "item_id": "string",
    "gold_nll": "float64",
    "gold_tokens": "Int64",
    "output": "string",
    "output_tokens": "Int64",
    "finished": "boolean",
    "strict_correct": "boolean",
    "flexible_correct": "boolean",
    "wrote_marker": "boolean",
}
SUBJECT_COLUMNS = ["condition", "seed", "step", "shots"]


class Count(Interval):
    """A proportion of items with Wilson's 95 % interval."""

    count: int


class PerToken(Interval):
    """Nats per gold answer token with a 95 % bootstrap interval over items."""

    tokens: int


class Measurement(StrictModel):
    """One subject (a condition's checkpoint, or the base with some shots) on one split."""

    condition: str
    seed: int
    step: int
    shots: int
    split: str
    gold_nll: PerToken
    strict: Count | None
    flexible: Count | None
    marker: Count | None
    finished: Count | None
    mean_output_tokens: float | None


class ModelResults(StrictModel):
    """`results.json`: everything that was measured of one model.

    repeated_mistakes: settings that repeat a mistake of the published code, each with the conditions that have it.
    skipped: by condition, how many training examples were left out because they were over the limit of tokens.
    """

    model: str
    model_note: str
    dataset: str
    dataset_note: str
    engine: str
    evaluation: dict[str, object]
    repeated_mistakes: dict[str, tuple[str, ...]]
    skipped: dict[str, int]
    conditions: tuple[str, ...]
    selections: tuple[Selection, ...]
    measurements: tuple[Measurement, ...]

    def selected_step(self, condition: str, seed: int) -> int:
        """The headline checkpoint's step; 0 for the untrained base."""
        steps = {(choice.condition, choice.seed): choice.step for choice in self.selections}
        return steps.get((condition, seed), 0)

    def of(self, split: str, condition: str | None = None) -> list[Measurement]:
        """The measurements on one split, of one condition where named, by seed and step."""
        chosen = [m for m in self.measurements if m.split == split and condition in (None, m.condition)]
        return sorted(chosen, key=lambda m: (self.conditions.index(m.condition), m.shots, m.seed, m.step))

    def headline(self, split: str) -> list[Measurement]:
        """One measurement per condition, shots and seed: the selected checkpoint's."""
        return [m for m in self.of(split) if m.step == self.selected_step(m.condition, m.seed)]

    @property
    def transfer_datasets(self) -> list[str]:
        """The further data sets that were scored."""
        splits = dict.fromkeys(m.split for m in self.measurements)
        return [split.removeprefix(TRANSFER) for split in splits if split.startswith(TRANSFER)]


Evaluation = results_files.Evaluation[ModelResults]


def transfer_split(dataset: str) -> str:
    """How rows and measurements of a further data set name their split; the others are validation and test."""
    return f"{TRANSFER}{dataset}"


def load_evaluation(results: Path) -> Evaluation:
    """Read a model's `results.json` and the rows beside it; a missing or damaged file is a `UserError`."""
    return results_files.load_evaluation(ModelResults, results, [*SUBJECT_COLUMNS, "split"])


def measure(items: pd.DataFrame) -> list[Measurement]:
    """One measurement per subject and split."""
    measurements = []
    for (condition, seed, step, shots, split), group in items.groupby([*SUBJECT_COLUMNS, "split"], sort=True):
        generated = group[group["output"].notna()]
        nll = bootstrap_ratio_interval(group["gold_nll"].astype(float), group["gold_tokens"].astype(float))
        measurements.append(
            Measurement(
                condition=condition,
                seed=seed,
                step=step,
                shots=shots,
                split=split,
                gold_nll=PerToken.of(nll, tokens=int(group["gold_tokens"].sum())),
                strict=_count(generated["strict_correct"]),
                flexible=_count(generated["flexible_correct"]),
                marker=_count(generated["wrote_marker"]),
                finished=_count(generated["finished"]),
                mean_output_tokens=round(float(generated["output_tokens"].mean()), 1) if len(generated) else None,
            )
        )
    return measurements


def select_checkpoints(measurements: list[Measurement], rule: str) -> list[Selection]:
    """Choose each trained condition's headline checkpoint by `EvaluationSettings.selection`; ties take the earlier."""
    split = "test" if rule == "best_on_test" else "validation"
    candidates = [m for m in measurements if m.split == split and m.step > 0]
    selections = []
    for condition, seed in sorted({(m.condition, m.seed) for m in candidates}):
        runs = sorted((m for m in candidates if (m.condition, m.seed) == (condition, seed)), key=lambda m: m.step)
        if rule == "last":
            best = runs[-1]
        elif rule == "gold_nll":
            best = min(runs, key=lambda m: m.gold_nll.value)
        else:
            best = max(runs, key=lambda m: m.strict.value if m.strict else 0.0)
        selections.append(Selection(condition=condition, seed=seed, step=best.step))
    return selections


def _count(values: pd.Series) -> Count | None:
    if values.empty:
        return None
    successes = int(values.sum())
    return Count.of(wilson_interval(successes, len(values)), count=successes)
