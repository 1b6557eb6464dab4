"""Exact match and F1 of extracted answers, as SQuAD's official evaluation scripts define them.

Rajpurkar et al., arXiv 1606.05250 (version 1.1) and 1806.03822 (version 2.0, with questions that the passage does
not answer). Both compare after lower-casing and without punctuation, articles and extra white space; the better of
all gold answers counts. Pure functions of strings; imports no torch.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

SquadVersion = Literal["1.1", "2.0"]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class ReadingScore:
    """One answer against all its gold answers; each measure is the best over them. f1 is a share of one."""

    exact: bool
    f1: float


def normalise_answer(text: str) -> str:
    """The form in which answers are compared: lower case, no ASCII punctuation, no English articles, single spaces.

    Punctuation goes before articles, so `a.` is an article and `the-end` is not one.
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def score_reading_answer(output: str, golds: Sequence[str], version: SquadVersion = "1.1") -> ReadingScore:
    """Score an answer against the gold answers.

    Version 2.0: no gold answer means that "" is right, and a gold answer that is nothing but articles and
    punctuation is left out. Raises ValueError where version 1.1 has no gold answer.
    """
    if version == "2.0":
        golds = [gold for gold in golds if normalise_answer(gold)] or [""]
    if not golds:
        raise ValueError("no gold answer: only SQuAD 2.0 has questions without one")
    answer = normalise_answer(output)
    targets = [normalise_answer(gold) for gold in golds]
    best = max(_token_f1(answer.split(), target.split(), version) for target in targets)
    return ReadingScore(answer in targets, best)


def squad_version(answers: Sequence[Sequence[str]]) -> SquadVersion:
    """The script that a data set needs: 2.0 as soon as one question has no gold answer."""
    return "1.1" if all(answers) else "2.0"


def _token_f1(output: Sequence[str], gold: Sequence[str], version: SquadVersion) -> float:
    """Harmonic mean of precision and recall of the tokens, as multisets."""
    if version == "2.0" and not (output and gold):
        return float(output == gold)
    shared = (Counter(output) & Counter(gold)).total()
    return 2 * shared / (len(output) + len(gold)) if shared else 0.0
