"""Answers of several readers taken together: agreement by value."""

from __future__ import annotations

from stillhouse.studies.latentwire.combine import agreement_rows
from stillhouse.studies.latentwire.data import WireExample

EXAMPLES = [WireExample(f"q{n}", "T", "text", "question", ("gold",)) for n in range(4)]


def test_readers_agree_after_normalisation_by_their_overlap_and_on_having_nothing_to_say() -> None:
    outputs = {
        "llama": ["The Eiffel Tower.", "red apple", "", "red apple"],
        "gemma": ["eiffel tower", "red car", "", ""],
    }
    rows = agreement_rows(EXAMPLES, outputs)
    assert list(rows["exact"]) == [True, False, True, False]
    assert list(rows["f1"]) == [1.0, 0.5, 1.0, 0.0]
    assert list(rows["output"]) == outputs["llama"]


def test_three_readers_agree_as_far_as_the_first_and_the_one_that_is_farthest_from_it() -> None:
    outputs = {"a": ["red apple"] * 4, "b": ["red apple"] * 4, "c": ["a red apple", "red car", "plum", "apple"]}
    rows = agreement_rows(EXAMPLES, outputs)
    assert list(rows["exact"]) == [True, False, False, False]
    assert list(rows["f1"].round(3)) == [1.0, 0.5, 0.0, 0.667]
