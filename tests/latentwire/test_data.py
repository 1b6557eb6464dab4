"""Examples and batches: what is sent, and each reader's own tokens of the answer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stillhouse.data.records import ReadingQuestion, write_records
from stillhouse.runtime.errors import UserError
from stillhouse.studies.latentwire.data import (
    WireData,
    WireExample,
    answer_tokens,
    read_examples,
    wire_example,
    wire_text,
)

EXAMPLES = [
    WireExample(f"q{index}", "Title", wire_text(f"What is {index}?", "x" * (10 * index)), f"What is {index}?", answers)
    for index, answers in enumerate([("one",), ("two words", "2"), (), ("naïve",)])
]


def by_bytes(answer: str) -> list[int]:
    return [*answer.encode(), 0]


def by_words(answer: str) -> list[int]:
    return [*(len(word) for word in answer.split()), 0]


def wire_data(**changes: int) -> WireData:
    return WireData(EXAMPLES, {"bytes": by_bytes, "words": by_words}, **changes)


def test_the_question_stands_before_the_passage_that_a_budget_may_cut() -> None:
    example = wire_example(ReadingQuestion("1", "T", " Long passage. ", "Who? ", ("A", "B")))
    assert example.text == "Question: Who?\nContext: Long passage.\n"
    assert (example.answer, example.answers) == ("A", ("A", "B"))


def test_a_question_without_an_answer_teaches_the_end_alone() -> None:
    batch = wire_data().batch([2])
    assert EXAMPLES[2].answer == ""
    assert batch.targets["words"].input_ids.tolist() == [[0]]


def test_each_reader_has_its_own_tokens_of_the_same_answers() -> None:
    batch = wire_data().batch([0, 1])
    assert batch.texts == (EXAMPLES[0].text, EXAMPLES[1].text)
    assert batch.targets["bytes"].attention_mask.sum(1).tolist() == [4, 10]
    assert batch.targets["words"].labels.tolist() == [[3, 0, -100], [3, 5, 0]]


def test_padding_is_minus_100_in_the_labels_and_zero_in_the_mask_whatever_the_ids() -> None:
    padded = answer_tokens([[0, 0], [0]])
    assert padded.labels.tolist() == [[0, 0], [0, -100]]
    assert padded.attention_mask.tolist() == [[1, 1], [1, 0]]


def test_throughput_counts_positions_without_padding() -> None:
    batch = wire_data(prompt_tokens=7).batch([0, 1])
    assert batch.tokens == 2 * 7 + (4 + 10) + (2 + 3)
    assert batch.to(torch.device("cpu")).tokens == batch.tokens


def test_micro_batches_keep_order_and_drop_nothing() -> None:
    data = wire_data(prompt_tokens=5)
    whole = list(data.micro_batches([3, 1, 0, 2], 10**6))
    alone = list(data.micro_batches([3, 1, 0, 2], 1))
    assert [batch.ids for batch in whole] == [("q3", "q1", "q0", "q2")]
    assert [batch.ids for batch in alone] == [("q3",), ("q1",), ("q0",), ("q2",)]


def test_texts_over_the_limit_are_left_out_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    write_records(path, [ReadingQuestion(f"q{n}", "T", "x" * 10 * n, "Why?", ("x",)) for n in range(6)])
    shortest = len(wire_text("Why?", "").encode())
    read = read_examples(path, limit=2, max_text_bytes=shortest + 30)
    assert ([example.id for example in read.examples], read.left_out) == (["q0", "q1"], 2)
    assert len(read_examples(path).examples) == 6
    with pytest.raises(UserError, match=r"train\.jsonl: no text has at most 5 bytes \(the shortest has"):
        read_examples(path, max_text_bytes=5)
