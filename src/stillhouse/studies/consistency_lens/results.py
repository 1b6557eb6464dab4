"""What evaluation leaves behind and what figures and tables read: `results.json` and `items.parquet` of a model.

Stands between `evaluate`, which writes both, and `report` and `figures`, which read nothing else; no torch here.
A *variant* is one way to get a reconstruction: the lens itself, a baseline, a control, or the best of K samples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Literal

import pandas as pd

from stillhouse.config.base import StrictModel
from stillhouse.evaluation import results_files
from stillhouse.evaluation.results_files import Interval, Selection
from stillhouse.evaluation.statistics import (
    Estimate,
    bootstrap_mean_interval,
    bootstrap_ratio_interval,
    wilson_interval,
)

Split = Literal["validation", "test"]
LENS, MEAN, ZERO = "lens", "mean", "zero"
BEST_OF = "best_of_"
# What each baseline and control puts in the place of the lens's explanation or reconstruction.
CONTROLS = {
    MEAN: "the mean activation of the training documents",
    ZERO: "zeros",
    "original_tokens": "the last T tokens of the document, through the lens's encoder",
    "shuffled": "the lens's own explanation with its tokens in random order",
    "other_explanation": "the lens's explanation of another document's activation",
    "hard_coded": "one fixed text for every activation, through the lens's encoder",
    "text_continuation": "T tokens that the original writes after the document, through the lens's encoder",
    "text_regression": "ridge regression of the activation on the document's token embeddings: no activation, no text",
    "untrained": "the lens before any training",
}

# One row per lens, checkpoint, variant and item. Text and its NLL are null for variants that have no text.
ITEM_COLUMNS = {
    "model": "string",
    "condition": "string",
    "seed": "Int64",
    "step": "Int64",
    "split": "string",
    "variant": "string",
    "item_id": "string",
    "kl": "float64",
    "squared_error": "float64",
    "squared_deviation": "float64",
    "top1": "boolean",
    "text": "string",
    "text_nll": "float64",
    "text_tokens": "Int64",
    "token_ids": "object",
}
SUBJECT_COLUMNS = ["condition", "seed", "step", "split", "variant"]


class Diversity(StrictModel):
    """Whether explanations differ at all; a collapsed decoder says the same of every activation.

    distinct_texts: different texts over texts. distinct_tokens: different tokens over tokens.
    most_common_token: its share of all tokens.
    repeated_within: share of a text's tokens that it has said before.
    """

    n: int
    distinct_texts: float
    distinct_tokens: float
    most_common_token: float
    repeated_within: float


class Measurement(StrictModel):
    """One variant of one lens on one split.

    kl: nats, of the original's next-token distribution with the activation against that with the reconstruction.
    mse: per component. recovered: 1 - KL / KL of the baseline. variance_explained: 1 - squared error / squared
    distance from the training mean. fluency: NLL of the text under the original, nats per token after the first.
    """

    condition: str
    seed: int
    step: int
    split: Split
    variant: str
    kl: Interval
    mse: Interval
    recovered_from_mean: Interval
    recovered_from_zero: Interval
    variance_explained: Interval
    top1: Interval
    fluency: Interval | None
    diversity: Diversity | None


class LensFacts(StrictModel):
    """What the tables and figures say of a condition."""

    condition: str
    layer: int
    text_length: int
    train_examples: int
    activations: str
    language_model_positions: str


class ModelResults(StrictModel):
    """`results.json`: everything that was measured of one model."""

    model: str
    model_note: str
    dataset: str
    dataset_note: str
    evaluation: dict[str, object]
    lenses: tuple[LensFacts, ...]
    selections: tuple[Selection, ...]
    measurements: tuple[Measurement, ...]

    @property
    def split(self) -> str:
        """The split that the selected checkpoints are scored on."""
        return str(self.evaluation["split"])

    def headline(self, variant: str = LENS) -> list[Measurement]:
        """One measurement per condition and seed on the evaluation's split, in the configured order."""
        return self.chosen(self.split, variant)

    def chosen(self, split: str, variant: str = LENS) -> list[Measurement]:
        """One measurement per condition and seed: the selected checkpoint's, in the configured order."""
        steps = {(choice.condition, choice.seed): choice.step for choice in self.selections}
        order = [facts.condition for facts in self.lenses]
        chosen = [
            one
            for one in self.measurements
            if one.variant == variant and one.split == split and one.step == steps[one.condition, one.seed]
        ]
        return sorted(chosen, key=lambda one: (order.index(one.condition), one.seed))


Evaluation = results_files.Evaluation[ModelResults]


def load_evaluation(results: Path) -> Evaluation:
    """Read a model's `results.json` and the rows beside it; a missing or damaged file is a `UserError`."""
    return results_files.load_evaluation(ModelResults, results, SUBJECT_COLUMNS)


def measure(items: pd.DataFrame) -> list[Measurement]:
    """One measurement per lens, checkpoint, split and variant."""
    measurements = []
    for keys, lens in items.groupby(SUBJECT_COLUMNS[:-1], sort=True):
        condition, seed, step, split = keys
        by_variant = {
            name: group.set_index("item_id").sort_index() for name, group in lens.groupby("variant", sort=True)
        }
        for variant, group in by_variant.items():
            baselines = {name: by_variant[name].loc[group.index, "kl"] for name in (MEAN, ZERO)}
            written = group[group["text_tokens"].fillna(0).gt(0)]
            texts = [list(text) for text in group["token_ids"] if text is not None]
            measurements.append(
                Measurement(
                    condition=condition,
                    seed=seed,
                    step=step,
                    split=split,
                    variant=variant,
                    kl=Interval.of(bootstrap_mean_interval(group["kl"])),
                    mse=Interval.of(bootstrap_mean_interval(group["squared_error"])),
                    recovered_from_mean=share(group["kl"], baselines[MEAN]),
                    recovered_from_zero=share(group["kl"], baselines[ZERO]),
                    variance_explained=share(group["squared_error"], group["squared_deviation"]),
                    top1=Interval.of(wilson_interval(int(group["top1"].sum()), len(group))),
                    fluency=fluency(written) if len(written) else None,
                    diversity=diversity(texts) if texts else None,
                )
            )
    return measurements


def fluency(written: pd.DataFrame) -> Interval:
    """Nats per token of the texts under the original model."""
    return Interval.of(bootstrap_ratio_interval(written["text_nll"], written["text_tokens"].astype(float)))


def share(errors: pd.Series, baseline: pd.Series) -> Interval:
    """`1 - sum(errors) / sum(baseline)` with its bootstrap interval over items; below 0 is worse than the baseline."""
    ratio = bootstrap_ratio_interval(errors.to_numpy(), baseline.to_numpy())
    return Interval.of(Estimate(1 - ratio.value, 1 - ratio.high, 1 - ratio.low, ratio.n))


def diversity(texts: Sequence[Sequence[int]]) -> Diversity:
    """How much the texts [items][tokens] differ from one another and within themselves."""
    tokens = list(chain.from_iterable(texts))
    return Diversity(
        n=len(texts),
        distinct_texts=len(set(map(tuple, texts))) / len(texts),
        distinct_tokens=len(set(tokens)) / len(tokens),
        most_common_token=max(Counter(tokens).values()) / len(tokens),
        repeated_within=sum(len(text) - len(set(text)) for text in texts) / len(tokens),
    )


def select_checkpoints(measurements: Sequence[Measurement], rule: str) -> list[Selection]:
    """Each lens's scored checkpoint: lowest KL on validation (ties: the earlier), or the last."""
    candidates = [one for one in measurements if one.split == "validation" and one.variant == LENS]
    selections = []
    for condition, seed in sorted({(one.condition, one.seed) for one in candidates}):
        runs = sorted((m for m in candidates if (m.condition, m.seed) == (condition, seed)), key=lambda m: m.step)
        best = runs[-1] if rule == "last" else min(runs, key=lambda m: m.kl.value)
        selections.append(Selection(condition=condition, seed=seed, step=best.step))
    return selections
