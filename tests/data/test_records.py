"""Normalised task files are read as problems, or file and line of the fault are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stillhouse.data.records import (
    ChoiceQuestion,
    MathProblem,
    Passage,
    ReadingQuestion,
    read_choice_questions,
    read_passages,
    read_problems,
    read_reading_questions,
    write_records,
)
from stillhouse.runtime.errors import UserError

ROW = {"id": "a", "question": "1+1?", "answer": "2\n#### 2"}


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_problems_are_read_in_order(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", ROW, {**ROW, "id": "b", "question": "line\u2028separator"})
    assert read_problems(path) == [
        MathProblem("a", "1+1?", "2\n#### 2"),
        MathProblem("b", "line\u2028separator", "2\n#### 2"),
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"id": "b"', "is not valid JSON"),
        ({**ROW, "id": 3}, "'id' is missing or no text"),
        ({"id": "b", "question": "?"}, "'answer' is missing or no text"),
        (["a"], "'id' is missing or no text"),
        (ROW, "the id 'a' occurs twice"),
        ({**ROW, "id": "b", "answer": "2"}, r"\(id b\): the answer has no '#### <result>'"),
    ],
)
def test_a_fault_is_named_by_file_and_line(tmp_path: Path, row: object, message: str) -> None:
    path = write(tmp_path / "train.jsonl", ROW, row)
    with pytest.raises(UserError, match=rf"train\.jsonl:2.*{message}"):
        read_problems(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train\.jsonl: does not exist"):
        read_problems(tmp_path / "train.jsonl")


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train\.jsonl: holds no examples"):
        read_problems(write(tmp_path / "train.jsonl", ""))


def test_passages_and_reading_questions_are_read_as_they_were_written(tmp_path: Path) -> None:
    passages = [Passage("a", "One story."), Passage("b", "Another\u2028story.")]
    questions = [
        ReadingQuestion("a", "Fish", "Cod swim.", "Who?", ("Cod", "cod")),
        ReadingQuestion("b", "", "", "?", ()),
    ]
    write_records(tmp_path / "passages.jsonl", passages)
    write_records(tmp_path / "questions.jsonl", questions)
    assert read_passages(tmp_path / "passages.jsonl") == passages
    assert read_reading_questions(tmp_path / "questions.jsonl") == questions


def test_answers_that_are_no_list_of_texts_are_named(tmp_path: Path) -> None:
    row = {"id": "a", "title": "t", "context": "c", "question": "q", "answers": "Cod"}
    with pytest.raises(UserError, match=r"questions\.jsonl:1: 'answers' is missing or no list of texts"):
        read_reading_questions(write(tmp_path / "questions.jsonl", row))


CHOICE = {"id": "a", "context": "", "question": "?", "choices": ["x", "y"], "gold": 1}


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"choices": "xy"}, "'choices' is missing or no list of texts"),
        ({"gold": "1"}, "'gold' is missing or no number"),
        ({"gold": -1}, r"\(id b\): gold -1 is none of its 2 choices"),
    ],
)
def test_questions_with_choices_are_read_or_their_fault_named(
    tmp_path: Path, fault: dict[str, object], message: str
) -> None:
    whole = write(tmp_path / "whole.jsonl", CHOICE)
    assert read_choice_questions(whole) == [ChoiceQuestion("a", "", "?", ("x", "y"), 1)]
    path = write(tmp_path / "test.jsonl", CHOICE, {**CHOICE, "id": "b", **fault})
    with pytest.raises(UserError, match=rf"test\.jsonl:2.*{message}"):
        read_choice_questions(path)
