"""What evaluation leaves behind and what figures and tables read: `results.json` and `items.parquet` of a pair.

Stands between `evaluate`, which writes both, and `report` and `figures`, which read nothing else; no torch here.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from stillhouse.config.base import StrictModel
from stillhouse.evaluation import results_files
from stillhouse.evaluation.results_files import Interval, Selection, typed
from stillhouse.evaluation.statistics import (
    Estimate,
    bootstrap_mean_interval,
    bootstrap_ratio_interval,
    wilson_interval,
)
from stillhouse.studies.latentwire.config import Arm
from stillhouse.studies.latentwire.run_settings import WireKind

Split = Literal["validation", "test"]

# Answers that are made from those of all readers stand in the rows under a reader's name of their own.
JOINT, ORACLE, AGREEMENT = COMBINED = ("joint_rescoring", "oracle", "agreement")

# What is scored. Unused keys are "" and 0, never null, so that rows can be grouped by them.
SUBJECT_COLUMNS = ["arm", "reader", "condition", "seed", "step", "wire", "budget"]

# One row per subject and item. `output` and its scores are null where no answer was generated, the gold answer's
# columns where it was not scored. bytes: what is sent for this prompt. seconds: from the text to the answer, encoding
# and packing included, an item's share where a batch or equal prompts are computed once.
ITEM_COLUMNS = {
    "pair": "string",
    "arm": "string",
    "reader": "string",
    "condition": "string",
    "seed": "Int64",
    "step": "Int64",
    "wire": "string",
    "budget": "Int64",
    "split": "string",
    "item_id": "string",
    "bytes": "Int64",
    "text_bytes": "Int64",
    "prompt_tokens": "Int64",
    "text_tokens": "Int64",
    "gold_nll": "float64",
    "gold_tokens": "Int64",
    "first_token": "Int64",
    "first_token_rank": "Int64",
    "output": "string",
    "exact": "boolean",
    "f1": "float64",
    "seconds": "float64",
}
_MEANS = ("bytes", "text_bytes", "prompt_tokens", "text_tokens", "seconds")
_MEASURED = ("f1", "exact", "gold_nll", "gold_tokens", "first_token", "first_token_rank", *_MEANS)
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Subject:
    """Something to score: one reader under one arm.

    condition, seed, step, wire: the channel, its checkpoint and the format of the wire, for arms that use a channel.
    budget: the tokens or bytes that a cut text may have, for the budget arms.
    """

    arm: Arm
    reader: str
    condition: str = ""
    seed: int = 0
    step: int = 0
    wire: WireKind | Literal[""] = ""
    budget: int = 0

    @property
    def key(self) -> tuple[str | int, ...]:
        """The values of SUBJECT_COLUMNS."""
        return tuple(asdict(self)[name] for name in SUBJECT_COLUMNS)

    def __str__(self) -> str:
        """How logs call it."""
        channel = f" of {self.condition} (seed {self.seed}, step {self.step}, {self.wire})" if self.condition else ""
        return f"{self.arm}{channel}{f' of {self.budget}' if self.budget else ''}, read by {self.reader}"


class Measurement(StrictModel):
    """One subject on one split. Shares are of one; None where the arm does not have the measure."""

    arm: Arm
    reader: str
    condition: str
    seed: int
    step: int
    wire: WireKind | Literal[""]
    budget: int
    split: Split
    items: int
    f1: Interval | None
    exact: Interval | None
    gold_nll: Interval | None
    first_at_1: Interval | None
    first_at_5: Interval | None
    top_first_token_share: float | None
    bytes: float | None
    text_bytes: float
    prompt_tokens: float | None
    text_tokens: float | None
    seconds: float | None

    @property
    def subject(self) -> Subject:
        """What was measured."""
        return Subject(**{name: getattr(self, name) for name in SUBJECT_COLUMNS})


class ChannelFacts(StrictModel):
    """One trained channel: its size, and how much of the test texts its encoder had to cut."""

    condition: str
    seed: int
    length: int
    dimension: int
    encoder: str
    trained_parameters: int
    cut_texts: int


class ReaderFacts(StrictModel):
    """One frozen model of the pair."""

    name: str
    note: str
    text_prompt: str


class PairResults(StrictModel):
    """`results.json`: everything that was measured of one pair."""

    pair: str
    readers: tuple[ReaderFacts, ...]
    dataset: str
    dataset_note: str
    squad_version: str
    left_out: dict[str, int]
    evaluation: dict[str, object]
    condition: str
    wire: str
    channels: tuple[ChannelFacts, ...]
    selections: tuple[Selection, ...]
    measurements: tuple[Measurement, ...]

    @property
    def reader_names(self) -> tuple[str, ...]:
        """The readers, in the pair's order."""
        return tuple(reader.name for reader in self.readers)

    def selected_step(self, condition: str, seed: int) -> int:
        """The step of the channel's reported checkpoint."""
        return {(one.condition, one.seed): one.step for one in self.selections}[condition, seed]

    def of(self, arm: Arm, reader: str, split: Split = "test") -> list[Measurement]:
        """The measurements of an arm as a reader reads it, at the chosen checkpoints alone, in order of budget."""
        chosen = [m for m in self.measurements if (m.arm, m.reader, m.split) == (arm, reader, split)]
        if split == "test":
            chosen = [m for m in chosen if not m.condition or m.step == self.selected_step(m.condition, m.seed)]
        return sorted(chosen, key=lambda m: (m.budget, m.condition, m.seed, m.bytes or 0))


Evaluation = results_files.Evaluation[PairResults]


def load_evaluation(results: Path) -> Evaluation:
    """Read a pair's `results.json` and its rows, by subject and split; damage is a `UserError`."""
    return results_files.load_evaluation(PairResults, results, [*SUBJECT_COLUMNS, "split"])


def measure(items: pd.DataFrame) -> list[Measurement]:
    """One measurement per subject and split."""
    return [
        _measurement(Subject(*key[:-1]), key[-1], group)
        for key, group in typed(items, ITEM_COLUMNS).groupby([*SUBJECT_COLUMNS, "split"], sort=True)
    ]


def select_checkpoints(measurements: list[Measurement], rule: str) -> list[Selection]:
    """Choose each channel's checkpoint by `EvaluationSettings.selection`, by the mean over readers.

    Ties take the earlier step. `best_on_test` takes the best F1 on the test split.
    """
    split = "test" if rule == "best_on_test" else "validation"
    latent = [m for m in measurements if m.arm == "latent" and m.split == split and m.reader not in COMBINED]
    selections = []
    for condition, seed in sorted({(m.condition, m.seed) for m in latent}):
        steps = sorted({m.step for m in latent if (m.condition, m.seed) == (condition, seed)})
        runs = {s: [m for m in latent if (m.condition, m.seed, m.step) == (condition, seed, s)] for s in steps}
        if rule == "last":
            best = steps[-1]
        elif rule == "gold_nll":
            best = min(steps, key=lambda step: sum(m.gold_nll.value for m in runs[step] if m.gold_nll))
        else:
            best = max(steps, key=lambda step: (sum(m.f1.value for m in runs[step] if m.f1), -step))
        selections.append(Selection(condition=condition, seed=seed, step=best))
    return selections


def numbers(column: pd.Series) -> Floats:
    """A column as plain numbers, NaN where it has no value; whatever pandas calls its type."""
    return column.to_numpy(dtype=float, na_value=np.nan)


def _measurement(subject: Subject, split: Split, rows: pd.DataFrame) -> Measurement:
    columns = {name: numbers(rows[name]) for name in _MEASURED}
    known = {name: values[~np.isnan(values)] for name, values in columns.items()}
    gold = ~np.isnan(columns["gold_nll"])
    ranks = columns["first_token_rank"][gold & ~np.isnan(columns["first_token_rank"])]
    return Measurement(
        **asdict(subject),
        split=split,
        items=len(rows),
        f1=Interval.of(share_interval(known["f1"])) if known["f1"].size else None,
        exact=_rate(known["exact"]),
        gold_nll=_per_token(columns["gold_nll"][gold], columns["gold_tokens"][gold]),
        first_at_1=_rate(ranks <= 1),
        first_at_5=_rate(ranks <= 5),
        top_first_token_share=_top_share(known["first_token"]),
        **{name: round(float(known[name].mean()), 6) if known[name].size else None for name in _MEANS},
    )


def share_interval(values: ArrayLike) -> Estimate:
    """Mean of values in [0, 1], such as F1, with its interval.

    Never narrower than Wilson's of as many whole successes: the bootstrap's is a point where every value is 0 or 1.
    """
    shares = np.asarray(values, dtype=float)
    mean, whole = bootstrap_mean_interval(shares), wilson_interval(round(shares.sum()), len(shares))
    return Estimate(mean.value, min(mean.low, whole.low), max(mean.high, whole.high), mean.n)


def _rate(values: NDArray[Any]) -> Interval | None:
    return Interval.of(wilson_interval(int(values.sum()), len(values))) if values.size else None


def _per_token(nats: Floats, tokens: Floats) -> Interval | None:
    return Interval.of(bootstrap_ratio_interval(nats, tokens)) if nats.size else None


def _top_share(tokens: Floats) -> float | None:
    """The share of the most frequent first token: near 1 where a reader says the same whatever it is sent."""
    return round(float(np.unique(tokens, return_counts=True)[1].max() / tokens.size), 6) if tokens.size else None
