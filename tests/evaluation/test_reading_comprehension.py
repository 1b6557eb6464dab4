"""Exact match and F1 equal the official scripts', on their own cases and on random ones."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from transformers.data.metrics import squad_metrics

from stillhouse.evaluation.reading_comprehension import (
    ReadingScore,
    normalise_answer,
    score_reading_answer,
    squad_version,
)

WORDS = [
    "The",
    "a",
    "an",
    "the",
    "Denver",
    "Broncos",
    "broncos,",
    "10-0",
    "(2015)",
    "Ana",
    "a.",
    "",
    "“x”",
    "naïve",
    "U.S.",
]


def random_answers(count: int, seed: int) -> list[str]:
    generator = random.Random(seed)
    return [" ".join(generator.choices(WORDS, k=generator.randint(0, 5))) for _ in range(count)]


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Denver\tBroncos!", "denver broncos"),
        ("a.", ""),
        ("U.S.", "us"),
        ("10,000", "10000"),
        ("the-end", "theend"),
        ("An apple a day", "apple day"),
        ("Athens", "athens"),
        ("“quoted”", "“quoted”"),  # the scripts know ASCII punctuation only
        ("naïve the", "naïve"),
    ],
)
def test_answers_are_compared_without_case_punctuation_and_articles(text: str, normal: str) -> None:
    assert normalise_answer(text) == normal == squad_metrics.normalize_answer(text)


@pytest.mark.parametrize(
    ("output", "golds", "expected"),
    [
        # The best of all gold answers counts, for each measure on its own.
        ("Denver Broncos", ["The Denver Broncos", "Broncos"], ReadingScore(True, 1.0)),
        ("the Broncos of Denver", ["Carolina", "Denver Broncos"], ReadingScore(False, 0.8)),
        # A multiset: a word said twice is right once, and twice where the gold answer has it twice.
        ("yes yes", ["yes"], ReadingScore(False, 2 / 3)),
        ("yes yes no", ["yes yes"], ReadingScore(False, 0.8)),
        ("1976", ["1977"], ReadingScore(False, 0.0)),
        ("", ["1976"], ReadingScore(False, 0.0)),
        # Articles alone are an exact match of each other, and share no word.
        ("the", ["a"], ReadingScore(True, 0.0)),
    ],
)
def test_version_1_1_scores_as_its_script(output: str, golds: list[str], expected: ReadingScore) -> None:
    score = score_reading_answer(output, golds)
    assert (score.exact, score.f1) == (expected.exact, pytest.approx(expected.f1))


@pytest.mark.parametrize(
    ("output", "golds", "expected"),
    [
        ("", [], ReadingScore(True, 1.0)),
        ("the", [], ReadingScore(True, 1.0)),
        ("1976", [], ReadingScore(False, 0.0)),
        ("", ["1976"], ReadingScore(False, 0.0)),
        ("", ["the", "1976"], ReadingScore(False, 0.0)),
        ("", ["the"], ReadingScore(True, 1.0)),
        ("1976", ["1976", "in 1976"], ReadingScore(True, 1.0)),
    ],
)
def test_version_2_0_scores_questions_without_an_answer(output: str, golds: list[str], expected: ReadingScore) -> None:
    assert score_reading_answer(output, golds, "2.0") == expected


def test_version_2_0_equals_the_reference_implementation() -> None:
    outputs = random_answers(300, seed=0)
    golds = [random_answers(generator % 4, seed=100 + generator) for generator in range(300)]
    for output, answers in zip(outputs, golds, strict=True):
        candidates = [gold for gold in answers if squad_metrics.normalize_answer(gold)] or [""]
        score = score_reading_answer(output, answers, "2.0")
        assert score.exact == max(squad_metrics.compute_exact(gold, output) for gold in candidates)
        assert score.f1 == pytest.approx(max(squad_metrics.compute_f1(gold, output) for gold in candidates))


def test_version_1_1_equals_precision_and_recall_written_out() -> None:
    for output, gold in zip(random_answers(300, seed=1), random_answers(300, seed=2), strict=True):
        ours, theirs = normalise_answer(output).split(), normalise_answer(gold).split()
        shared = sum((Counter(ours) & Counter(theirs)).values())
        expected = 0.0
        if shared:
            precision, recall = shared / len(ours), shared / len(theirs)
            expected = 2 * precision * recall / (precision + recall)
        assert score_reading_answer(output, [gold]).f1 == pytest.approx(expected)


def test_version_1_1_needs_a_gold_answer() -> None:
    with pytest.raises(ValueError, match=r"only SQuAD 2\.0"):
        score_reading_answer("1976", [])


def test_a_data_set_with_an_unanswerable_question_is_scored_by_version_2_0() -> None:
    assert squad_version([("a",), ("b", "c")]) == "1.1"
    assert squad_version([("a",), ()]) == "2.0"
