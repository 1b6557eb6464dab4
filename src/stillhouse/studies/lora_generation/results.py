"""What evaluation leaves behind and what figures and tables read: `results.json` and `items.parquet` of a model.

Stands between `evaluate`, which writes both, and `report` and `figures`, which read nothing else; no torch here. A
*case* is a held-out teacher adapter with the prompts that stand for it; an *arm* is one way to do its task.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import pandas as pd

from stillhouse.config.base import StrictModel
from stillhouse.evaluation import results_files
from stillhouse.evaluation.results_files import Interval, Selection
from stillhouse.evaluation.statistics import bootstrap_ratio_interval, wilson_interval
from stillhouse.studies.lora_generation.config import Arm
from stillhouse.studies.lora_generation.manifest import AdapterRow
from stillhouse.studies.lora_generation.teacher_settings import Role

# Arms that depend on which adapters a generator learns from, and so on its held-out tasks.
OF_COLLECTION: tuple[Arm, ...] = ("mean_adapter", "nearest_adapter", "other_task")

# One row per subject and item. Condition and seed: of the generator, null for other arms. Shard and teacher seed: of
# the case, null for the base. held_out: the tasks that the generator, or the collection of an arm, never sees.
ITEM_COLUMNS = {
    "model": "string",
    "task": "string",
    "arm": "string",
    "condition": "string",
    "seed": "Int64",
    "held_out": "string",
    "shard": "Int64",
    "teacher_seed": "Int64",
    "item_id": "string",
    "correct": "boolean",
    "gold_nll": "float64",
    "gold_tokens": "Int64",
}


@dataclass(frozen=True)
class Subject:
    """What is scored on one task: an arm for a case, generated arms by condition and seed."""

    task: str
    arm: Arm
    shard: int | None = None
    teacher_seed: int | None = None
    condition: str | None = None
    seed: int | None = None
    held_out: str | None = None

    def __str__(self) -> str:
        """How logs call it."""
        parts = (self.task, self.arm, self.condition, self.held_out and f"without {self.held_out}", self.shard)
        return " ".join(str(part) for part in parts if part is not None)


class Closeness(StrictModel):
    """How near an adapter comes to the case's teacher.

    cosine, norm_ratio: of their delta activations. relative_error: ||dW - dW_teacher|| / ||dW_teacher||.
    """

    cosine: float
    norm_ratio: float
    relative_error: float


class Measurement(StrictModel):
    """One subject. gold_nll: nats per token of the right answers. seconds: to make the adapter.

    source: the adapter of the collection that the arm took.
    """

    task: str
    arm: Arm
    shard: int | None
    teacher_seed: int | None
    condition: str | None
    seed: int | None
    held_out: str | None
    role: Role | None
    accuracy: Interval
    gold_nll: Interval
    closeness: Closeness | None
    seconds: float | None
    source: str | None


class Point(StrictModel):
    """A teacher adapter on the maps of delta activations and of weights, two principal components each."""

    name: str
    task: str
    by_delta: tuple[float, float]
    by_weights: tuple[float, float]


class Clusters(StrictModel):
    """Mean silhouette of the adapters by task, of cosine distances; 1: tasks far apart, 0: no order."""

    by_delta: Interval
    by_weights: Interval


class TaskFacts(StrictModel):
    """What the tables say of a task."""

    task: str
    dataset: str
    dataset_note: str
    style: str
    items: int


class ChosenGenerator(Selection):
    """The checkpoint that is scored. validation_loss: there, on the validation shards, where there are any."""

    validation_loss: float | None = None


class GeneratorFacts(StrictModel):
    """What the tables say of a condition. adapters: those that it learns from. apart_from_losses: of all its settings.

    Generators of one digest differ in nothing but what their loss weighs.
    """

    condition: str
    held_out: str
    kind: str
    weight: float
    weight_kind: str
    delta: float
    delta_kind: str
    norm: float
    guided: bool
    prompts: int
    parameters: int
    adapters: int
    start: str
    apart_from_losses: str


class ModelResults(StrictModel):
    """`results.json`: everything that was measured of one base model."""

    model: str
    model_note: str
    evaluation: dict[str, object]
    condition: str
    flagged: str  # what became of adapters that are no better than the base: exclude or use
    loss_tokens: str  # what teachers learn: answer or all
    probes: str
    probe_texts: int
    tasks: tuple[TaskFacts, ...]
    adapters: tuple[AdapterRow, ...]
    points: tuple[Point, ...]
    clusters: Clusters
    generators: tuple[GeneratorFacts, ...]
    selections: tuple[ChosenGenerator, ...]
    measurements: tuple[Measurement, ...]

    def generator(self, condition: str) -> GeneratorFacts:
        """The facts of a condition."""
        return next(one for one in self.generators if one.condition == condition)


Evaluation = results_files.Evaluation[ModelResults]


def load_evaluation(results: Path) -> Evaluation:
    """Read a model's `results.json` and the rows beside it; a missing or damaged file is a `UserError`."""
    return results_files.load_evaluation(ModelResults, results, [field.name for field in fields(Subject)])


def measured(rows: pd.DataFrame) -> tuple[Interval, Interval]:
    """Accuracy, and the right answers' NLL in nats per token, of per-item rows."""
    accuracy = wilson_interval(int(rows["correct"].sum()), len(rows))
    nll = bootstrap_ratio_interval(rows["gold_nll"].astype(float), rows["gold_tokens"].astype(float))
    return Interval.of(accuracy), Interval.of(nll)
