"""What evaluation leaves for figures and tables: `results.json` and per-item rows; no torch here.

A system is one set of weights: the teacher, a baseline, a student of one seed; and, for students, also the weights
before they were converted, with LoRA merged or beside. An item is a question of a task, an example of the test split,
or a stretch of a text; its nll, kl and agreement are sums over its tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from stillhouse.config.base import StrictModel
from stillhouse.config.quantization import LoraQuantisation
from stillhouse.evaluation.results_files import Evaluation, Interval, load_evaluation, typed
from stillhouse.evaluation.statistics import bootstrap_ratio_interval, wilson_interval
from stillhouse.studies.quantized_distillation.run_settings import Selection

Variant = Literal["deployed", "merged", "beside"]
Kind = Literal["task", "text", "answers"]

TEACHER, PTQ = "teacher", "ptq"
ANSWERS = "answers"  # the name of the set that is the study's own test split
SYSTEM_COLUMNS = ("condition", "seed", "variant")
SET_COLUMNS = ("kind", "name")
ITEM_COLUMNS = {
    "condition": "str",
    "seed": "int64",
    "variant": "str",
    "kind": "str",
    "name": "str",
    "item_id": "str",
    "tokens": "float64",
    "nll": "float64",
    "kl": "float64",
    "agrees": "float64",
    "acc": "float64",
    "acc_norm": "float64",
}


class SystemFacts(StrictModel):
    """One evaluated model and how it was made.

    seed: 0 for what is not trained. weight_format: None for the teacher. placement to validation_kl: of students.
    selection: how the checkpoint was chosen. validation_kl: KL to the teacher at that checkpoint, on the validation
    split. largest_logit_difference: between the fake-quantised and the converted model, as a share of the largest
    logit.
    """

    condition: str
    seed: int
    weight_format: str | None
    weight_bytes: int
    placement: LoraQuantisation | None = None
    learning_rate: float | None = None
    beta: float | None = None
    on_policy_share: float | None = None
    lora_rank: int | None = None
    checkpoint_step: int | None = None
    selection: Selection | None = None
    validation_kl: float | None = None
    largest_logit_difference: float | None = None

    @property
    def trained(self) -> bool:
        """Whether it is a student."""
        return self.checkpoint_step is not None


class Measurement(StrictModel):
    """What one system did on one set. nll, kl, agreement: per token; acc, acc_norm: shares of the questions."""

    condition: str
    seed: int
    variant: Variant
    kind: Kind
    name: str
    items: int
    tokens: int
    nll: Interval | None = None
    kl: Interval | None = None
    agreement: Interval | None = None
    acc: Interval | None = None
    acc_norm: Interval | None = None


class QuantizedResults(StrictModel):
    """The evaluation of one model.

    not_run: baselines that were not run, each with the reason. task_versions: of lm-evaluation-harness' definitions.
    """

    model: str
    model_note: str
    dataset: str
    dataset_note: str
    set_notes: dict[str, str]
    conditions: tuple[str, ...]
    task_versions: dict[str, str]
    evaluation: dict[str, Any]
    not_run: dict[str, str]
    systems: tuple[SystemFacts, ...]
    measurements: tuple[Measurement, ...]

    def of(self, condition: str) -> list[SystemFacts]:
        """A condition's systems, one a seed."""
        return [one for one in self.systems if one.condition == condition]

    def sets(self, kind: Kind) -> list[str]:
        """The names of the sets of a kind, in the order in which they were measured."""
        return list(dict.fromkeys(one.name for one in self.measurements if one.kind == kind))


QuantizedEvaluation = Evaluation[QuantizedResults]


@dataclass(frozen=True)
class System:
    """The key of a system's rows."""

    condition: str
    seed: int
    variant: Variant = "deployed"


def load(results: Path) -> QuantizedEvaluation:
    """One model's evaluation; a subject is a system and a set."""
    return load_evaluation(QuantizedResults, results, [*SYSTEM_COLUMNS, *SET_COLUMNS])


def measure(items: pd.DataFrame) -> list[Measurement]:
    """One measurement a system and set, in the order of the rows."""
    groups = typed(items, ITEM_COLUMNS).groupby([*SYSTEM_COLUMNS, *SET_COLUMNS], sort=False)
    return [_measurement(key, rows) for key, rows in groups]


def _measurement(key: Sequence[Any], rows: pd.DataFrame) -> Measurement:
    condition, seed, variant, kind, name = key
    return Measurement(
        condition=condition,
        seed=seed,
        variant=variant,
        kind=kind,
        name=name,
        items=len(rows),
        tokens=int(rows["tokens"].sum()) if kind != "task" else 0,
        nll=_per_token(rows, "nll"),
        kl=_per_token(rows, "kl"),
        agreement=_per_token(rows, "agrees"),
        acc=_share(rows["acc"]),
        acc_norm=_share(rows["acc_norm"]),
    )


def _per_token(rows: pd.DataFrame, column: str) -> Interval | None:
    if rows[column].isna().any():
        return None
    return Interval.of(bootstrap_ratio_interval(rows[column], rows["tokens"]))


def _share(values: pd.Series) -> Interval | None:
    return None if values.isna().any() else Interval.of(wilson_interval(round(values.sum()), len(values)))
