"""Data sets become JSONL of one schema per published split, or file and row of the fault are named."""

from __future__ import annotations

import errno
import gzip
import json
import tracemalloc
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stillhouse.assets import datasets
from stillhouse.assets.answers import final_answer
from stillhouse.assets.datasets import normalise_dataset
from stillhouse.assets.materialise import DatasetStep, main
from stillhouse.assets.records import Instruction, Passage, ReadingQuestion, VerifiableInstruction
from stillhouse.config.assets import DatasetEntry, PathSource, Task
from stillhouse.data.records import read_problems, read_records
from stillhouse.runtime.errors import UserError
from stillhouse.runtime.files import verify_manifest

GSM8K = [{"question": f"What is {n} + 1?", "answer": f"It is {n + 1}.\n#### {n + 1}"} for n in range(4)]
QUESTION = {
    "id": "q1",
    "question": "Where do fish live?",
    "choices": {"label": ["A", "B"], "text": ["tree", "water"]},
    "answerKey": "B",
}


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def step(
    source: Path, output: Path, reader: str = "gsm8k", task: Task = "math_word_problem", **splits: str
) -> DatasetStep:
    entry = DatasetEntry(
        sources=(PathSource(path=str(source)),), reader=reader, task=task, splits=splits or {"test": "*"}
    )
    return DatasetStep(kind="dataset", name="mine", entry=entry, output=output)


def test_request_files_are_unwrapped_and_their_repetitions_dropped(tmp_path: Path) -> None:
    requests = [
        {"doc": row, "native_id": number, "task_name": "gsm8k", "request": {"continuation": option}}
        for number, row in enumerate(GSM8K)
        for option in "ab"
    ]
    lines = "\n".join(json.dumps(request) for request in requests)
    (tmp_path / "requests.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    main(step(tmp_path / "requests.jsonl.gz", tmp_path / "out", test="requests.jsonl.gz"))
    problems = read_problems(tmp_path / "out/test.jsonl")
    assert [problem.id for problem in problems] == ["gsm8k-0", "gsm8k-1", "gsm8k-2", "gsm8k-3"]
    assert [problem.final_answer for problem in problems] == ["1", "2", "3", "4"]
    manifest = verify_manifest(tmp_path / "out")
    assert manifest["examples"] == {"test": 4}
    assert manifest["task"] == "math_word_problem"


def test_each_published_split_becomes_a_file(tmp_path: Path) -> None:
    (tmp_path / "main").mkdir()
    pq.write_table(pa.Table.from_pylist(GSM8K[:3]), tmp_path / "main/train-00000-of-00001.parquet")
    pq.write_table(pa.Table.from_pylist(GSM8K[3:]), tmp_path / "main/test-00000-of-00001.parquet")
    main(step(tmp_path, tmp_path / "out", train="main/train-*.parquet", test="main/test-*.parquet"))
    assert [len(read_problems(tmp_path / f"out/{split}.jsonl")) for split in ("train", "test")] == [3, 1]


def test_commonsense_questions_list_their_options_and_answer_with_the_letter(tmp_path: Path) -> None:
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink:
        table = pa.Table.from_pylist([QUESTION])
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    main(step(tmp_path / "a.arrow", tmp_path / "out", reader="commonsense_qa"))
    problem = read_problems(tmp_path / "out/test.jsonl")[0]
    assert problem.question == "Where do fish live?\n(A) tree\n(B) water"
    assert problem.answer == "water\n#### B"
    assert problem.final_answer == "B"


def test_competition_problems_keep_their_solution_and_its_boxed_result(tmp_path: Path) -> None:
    rows = [{"problem": "Halve 1.", "solution": r"So $\boxed{\frac{1}{2}}$."}]
    main(step(write_jsonl(tmp_path / "m.jsonl", rows), tmp_path / "out", reader="math"))
    assert read_problems(tmp_path / "out/test.jsonl")[0].final_answer == r"\frac{1}{2}"


def test_arithmetic_is_answered_with_the_number_alone(tmp_path: Path) -> None:
    row = {"id": "a", "question": "Calculate 5 + 91 =", "choices": {"label": ["A"], "text": ["96"]}, "answerKey": "A"}
    main(step(write_jsonl(tmp_path / "a.jsonl", [row]), tmp_path / "out", reader="basic_arithmetic"))
    assert read_problems(tmp_path / "out/test.jsonl")[0].answer == "#### 96"


@pytest.mark.parametrize(
    ("reader", "row", "question", "answer"),
    [
        ("svamp", {"Body": "Ann has 3.", "Question": "And twice?", "Answer": "6.0"}, "Ann has 3. And twice?", "#### 6"),
        ("multi_arith", {"question": "Twice 3? ", "final_ans": "6"}, "Twice 3?", "#### 6"),
        ("asdiv", {"body": "Ann has 3.", "question": "And?", "answer": "9 (apples)"}, "Ann has 3. And?", "#### 9"),
    ],
)
def test_short_arithmetic_is_answered_with_the_number_alone(
    tmp_path: Path, reader: str, row: dict[str, Any], question: str, answer: str
) -> None:
    main(step(write_jsonl(tmp_path / "a.jsonl", [row]), tmp_path / "out", reader=reader))
    [problem] = read_problems(tmp_path / "out/test.jsonl")
    assert (problem.question, problem.answer) == (question, answer)


IFEVAL_ROW = {
    "key": 7,
    "prompt": "Name a fish, without commas. ",
    "response": "A cod",
    "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
}
SQUAD_RECORD = ("Fish", "Cod swim.", "Who swims?", ("Cod", "cod"))


@pytest.mark.parametrize(
    ("reader", "task", "row", "record"),
    [
        (
            "ifeval_like",
            "instruction_following",
            {**IFEVAL_ROW, "kwargs": '[{}, {"relation": "at least", "num_words": 2}]'},
            VerifiableInstruction(
                "test-0",
                "Name a fish, without commas.",
                "A cod",
                '[{"id": "punctuation:no_comma", "arguments": {}}, {"id": "length_constraints:number_words", '
                '"arguments": {"relation": "at least", "num_words": 2}}]',
            ),
        ),
        (
            "alpaca",
            "instruction",
            {"instruction": "Add.", "input": "1 and 2", "output": "3 "},
            Instruction("test-0", "Add.\n\n1 and 2", "3"),
        ),
        (
            "conversation",
            "instruction",
            {
                "messages": [
                    {"role": "system", "content": "Be brief."},
                    {"role": "user", "content": "Add 1 and 2."},
                    {"role": "assistant", "content": "3"},
                    {"role": "user", "content": "And 3?"},
                ]
            },
            Instruction("test-0", "Be brief.\n\nAdd 1 and 2.", "3"),
        ),
        ("text", "passages", {"text": " A story. "}, Passage("test-0", "A story.")),
        ("story", "passages", {"story": "a story. ", "topic": "fish"}, Passage("test-0", "a story.")),
        (
            "lambada",
            "passages",
            {"query": "I do not care about", "answers_text": ["signs"]},
            Passage("test-0", "I do not care about signs"),
        ),
        (
            "squad",
            "reading_comprehension",
            {"title": "Fish", "context": "Cod swim.", "question": "Who swims?", "answers": {"text": ["Cod", "cod"]}},
            ReadingQuestion("test-0", *SQUAD_RECORD),
        ),
        (
            "squad_query",
            "reading_comprehension",
            {
                "query": "Title: Fish\nBackground: Cod swim.\nQuestion: Who swims?\nAnswer:",
                "answers_text": ["Cod", "cod"],
            },
            ReadingQuestion("test-0", *SQUAD_RECORD),
        ),
        (
            "hotpot_qa",
            "reading_comprehension",
            {
                "question": "Who swims?",
                "answer": "cod",
                "supporting_facts": {"title": ["Cod", "Cod", "Sea"]},
                "context": {"title": ["Cod", "Sea"], "sentences": [["A fish.", " It swims."], ["Wet."]]},
            },
            ReadingQuestion("test-0", "Cod / Sea", "Cod: A fish. It swims.\nSea: Wet.", "Who swims?", ("cod",)),
        ),
    ],
)
def test_each_task_has_its_schema(tmp_path: Path, reader: str, task: Task, row: dict[str, Any], record: Any) -> None:
    main(step(write_jsonl(tmp_path / "rows.jsonl", [row]), tmp_path / "out", reader=reader, task=task))
    assert read_records(tmp_path / "out/test.jsonl", type(record)) == [record]


def test_constraints_of_a_table_lose_the_arguments_that_are_null(tmp_path: Path) -> None:
    kwargs = [{"num_words": None}, {"num_words": 2}]
    pq.write_table(pa.Table.from_pylist([{**IFEVAL_ROW, "kwargs": kwargs}]), tmp_path / "a.parquet")
    main(step(tmp_path / "a.parquet", tmp_path / "out", reader="ifeval_like", task="instruction_following"))
    [problem] = read_problems(tmp_path / "out/test.jsonl")
    assert [check["arguments"] for check in json.loads(problem.gold)] == [{}, {"num_words": 2}]


def test_a_text_file_holds_a_document_per_line(tmp_path: Path) -> None:
    (tmp_path / "wiki.txt").write_text("First article.\n\nSecond article.\n")
    main(step(tmp_path / "wiki.txt", tmp_path / "out", reader="text", task="passages"))
    assert [passage.text for passage in read_records(tmp_path / "out/test.jsonl", Passage)] == [
        "First article.",
        "Second article.",
    ]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.txt", "a.parquet", "a.arrow", "requests.jsonl"])
def test_a_corpus_is_read_and_written_a_few_documents_at_a_time(tmp_path: Path, name: str) -> None:
    """4,000 documents, 16 MB."""
    texts = [f"{number} " + "x" * 4000 for number in range(4000)]
    source = tmp_path / name
    rows = [{"text": text} for text in texts]
    if name == "a.txt":
        source.write_text("\n".join(texts))
    elif name == "a.parquet":
        pq.write_table(pa.Table.from_pylist(rows), source)
    elif name == "a.arrow":
        table = pa.Table.from_pylist(rows)
        with pa.OSFile(str(source), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=500)
    else:
        asked = [{"doc": row, "native_id": number} for number, row in enumerate(rows)]
        write_jsonl(source, asked if name.startswith("requests") else rows)
        if name.endswith(".gz"):
            source.write_bytes(gzip.compress(source.read_bytes(), compresslevel=1))
    (tmp_path / "out").mkdir()
    entry = step(source, tmp_path, "text", "passages", train="*").entry
    tracemalloc.start()
    counts = normalise_dataset("mine", entry, source, tmp_path / "out")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert counts == {"train": 4000}
    # Tables come in batches of 1,024 rows.
    assert peak < (7_000_000 if name.endswith((".parquet", ".arrow")) else 3_000_000)
    assert [passage.text for passage in read_records(tmp_path / "out/train.jsonl", Passage)] == texts


def test_a_reader_of_another_task_is_refused(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", GSM8K)
    with pytest.raises(UserError, match=r"a\.jsonl:1: the reader yields .* the task wants id, text: make reader and"):
        main(step(source, tmp_path / "out", task="passages"))


@pytest.mark.parametrize(
    ("answer", "result"),
    [
        ("x\n#### 1,200", "1,200"),
        ("#### -5 ", "-5"),
        (r"\boxed{1} or \boxed{2}", "2"),
        (r"\boxed 7$.", "7"),
        (r"\boxed{1", None),
        ("18", None),
        ("#### ", None),
    ],
)
def test_the_result_of_a_worked_answer(answer: str, result: str | None) -> None:
    assert final_answer(answer) == result


def test_an_unknown_reader_is_named_with_the_nearest(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", GSM8K)
    with pytest.raises(UserError, match=r"datasets\.mine\.reader: unknown reader 'gsm8': did you mean 'gsm8k'\?"):
        main(step(source, tmp_path / "out", reader="gsm8"))


def test_a_row_without_result_is_named_by_file_line_and_id(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [*GSM8K, {"id": "x9", "question": "?", "answer": "no result"}])
    with pytest.raises(UserError, match=r"a\.jsonl:5 \(id x9\): the answer has no '#### <result>'"):
        main(step(source, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_row_without_a_field_is_named(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [{"problem": "?", "answer": "#### 1"}])
    with pytest.raises(UserError, match=r"a\.jsonl:1: has no field 'question': is this the right reader\?"):
        main(step(source, tmp_path / "out"))


def test_an_answer_key_that_is_no_option_is_named(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [{**QUESTION, "answerKey": ""}])
    with pytest.raises(UserError, match=r"a\.jsonl:1: cannot be read \(answerKey '' is none of its options\)"):
        main(step(source, tmp_path / "out", reader="commonsense_qa"))


def test_broken_json_is_named_by_line(tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text(json.dumps(GSM8K[0]) + '\n{"question": \n')
    with pytest.raises(UserError, match=r"a\.jsonl:2: is not valid JSON"):
        main(step(source, tmp_path / "out"))


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.jsonl.gz"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"PAR1 this is not what the suffix says")
    with pytest.raises(UserError, match=f"{name}: is damaged or not of its suffix's format"):
        main(step(tmp_path / name, tmp_path / "out"))


def test_an_empty_data_set_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(UserError, match=r"datasets\.mine\.splits\.test: is empty: a\.jsonl holds no rows"):
        main(step(tmp_path / "a.jsonl", tmp_path / "out"))


def test_a_split_without_files_is_named(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "data/a.jsonl", GSM8K)
    with pytest.raises(UserError, match=r"datasets\.mine\.splits\.train: no file of .* matches 'train-\*'"):
        main(step(tmp_path / "data", tmp_path / "out", train="train-*"))


def test_ids_that_repeat_are_refused(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [{"id": "same", **GSM8K[0]}, {"id": "same", **GSM8K[1]}])
    with pytest.raises(UserError, match=r"a\.jsonl:2: the id 'same' occurs twice"):
        main(step(source, tmp_path / "out"))


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, chunks: Iterable[bytes]) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    source = write_jsonl(tmp_path / "in/a.jsonl", GSM8K)
    monkeypatch.setattr(datasets, "atomic_write_chunks", full)
    with pytest.raises(UserError, match="the disk is full"):
        main(step(source, tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
