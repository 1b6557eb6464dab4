"""Answers graded against gold, and answers made from those of several readers; no torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from stillhouse.evaluation.reading_comprehension import SquadVersion, normalise_answer, score_reading_answer
from stillhouse.studies.latentwire.data import WireExample

Outputs = Mapping[str, Sequence[str]]


def graded(examples: Sequence[WireExample], outputs: Sequence[str], version: SquadVersion) -> pd.DataFrame:
    """Each item's output against all its gold answers: columns item_id, output, exact, f1."""
    rows = []
    for example, output in zip(examples, outputs, strict=True):
        score = score_reading_answer(output, example.answers, version)
        rows.append((example.id, output, score.exact, score.f1))
    return pd.DataFrame(rows, columns=["item_id", "output", "exact", "f1"])


def oracle_rows(examples: Sequence[WireExample], outputs: Outputs, version: SquadVersion) -> pd.DataFrame:
    """Of all readers' answers, by reader, the one that scores best: what a perfect choice would reach."""
    grades = pd.concat([graded(examples, texts, version) for texts in outputs.values()])
    ordered = grades.sort_values(["f1", "exact"], ascending=False, kind="stable")
    return ordered.drop_duplicates("item_id").reset_index(drop=True)


def agreement_rows(examples: Sequence[WireExample], outputs: Outputs) -> pd.DataFrame:
    """Whether all readers give the same answer after normalisation, and the least F1 between the first and another.

    An answer of nothing agrees with an answer of nothing.
    """
    rows = []
    for index, example in enumerate(examples):
        first, *others = (texts[index] for texts in outputs.values())
        same = all(normalise_answer(other) == normalise_answer(first) for other in others)
        f1 = min((score_reading_answer(other, [first], "2.0").f1 for other in others), default=1.0)
        rows.append((example.id, first, same, f1))
    return pd.DataFrame(rows, columns=["item_id", "output", "exact", "f1"])
