"""A task file that is read record by record gives what it gives whole, and memory holds none of its text."""

from __future__ import annotations

import json
import random
import tracemalloc
from pathlib import Path

import pytest

from stillhouse.config.data import SplitSettings
from stillhouse.data import split
from stillhouse.data.record_files import Digests, RecordFile
from stillhouse.data.records import Passage, read_passages, write_records
from stillhouse.runtime.errors import UserError
from stillhouse.runtime.files import write_manifest

ROW = {"id": "a", "text": "One."}


def test_records_are_those_of_the_whole_file_in_any_order(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    passages = [
        Passage(str(number), text) for number, text in enumerate(["Ünï", "line\u2028separator", "", "z" * 9999])
    ]
    write_records(path, passages)
    path.write_text("\n" + path.read_text().replace("\n", "\n \n"))
    records = RecordFile(path, Passage)
    assert len(records) == 4
    assert list(records) == read_passages(path) == passages
    assert [records[row] for row in (3, 0, 2, 1)] == [passages[row] for row in (3, 0, 2, 1)]


@pytest.mark.parametrize(
    "rows",
    [
        (),
        (ROW, '{"id": "b"'),
        (ROW, {"id": "b"}),
        (ROW, ["a"]),
        (ROW, {"id": "b", "text": "Two."}, "", {"id": "b", "text": "3"}, {"id": "a", "text": "4"}, ROW),
        (b"\xff\xfe",),
    ],
)
def test_what_is_refused_whole_is_refused_in_the_same_words(tmp_path: Path, rows: tuple[object, ...]) -> None:
    path = tmp_path / "train.jsonl"
    lines = [row if isinstance(row, str | bytes) else json.dumps(row) for row in rows]
    path.write_bytes(b"".join((line.encode() if isinstance(line, str) else line) + b"\n" for line in lines))
    with pytest.raises(UserError) as whole:
        read_passages(path)
    with pytest.raises(UserError) as one_by_one:
        RecordFile(path, Passage)
    assert str(one_by_one.value) == str(whole.value)
    path.unlink()
    with pytest.raises(UserError, match="does not exist"):
        RecordFile(path, Passage)


def test_digests_tell_the_repetitions_of_a_list() -> None:
    chance = random.Random(0)
    texts = ["", "\ud800", *(str(chance.randrange(300)) for _ in range(1000))]
    digests = Digests()
    for text in texts:
        digests.add(text)
    expected = [text not in texts[:place] for place, text in enumerate(texts)]
    assert digests.first_of_each.tolist() == expected and not all(expected)
    assert len(Digests()) == 0 and Digests().first_of_each.tolist() == []


def split_corpus(folder: Path, documents: int, letters: int) -> tuple[Path, int]:
    """Divide a corpus of so many documents; returns where its splits are, and the most memory it took."""
    (folder / "dataset").mkdir(parents=True)
    passages = (Passage(f"train-{number}", f"{number} " + "x" * letters) for number in range(documents))
    write_records(folder / "dataset" / "train.jsonl", passages)
    write_manifest(folder / "dataset")
    step = split.SplitStep(
        dataset=folder / "dataset",
        output=folder / "splits",
        task="passages",
        split_seed=3,
        splits={
            "train": SplitSettings(source="train", size=None),
            "test": SplitSettings(source="train", size=documents // 4),
        },
    )
    tracemalloc.start()
    split.main(step)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return step.output, peak


def test_dividing_a_corpus_holds_none_of_its_text(tmp_path: Path) -> None:
    _, alone = split_corpus(tmp_path / "small", 8, 10)
    splits, peak = split_corpus(tmp_path / "large", 2000, 8000)
    assert sum(file.stat().st_size for file in splits.glob("*.jsonl")) > 16_000_000
    assert peak - alone < 1_000_000
    ids = [passage.id for name in ("train", "test") for passage in RecordFile(splits / f"{name}.jsonl", Passage)]
    assert len(ids) == len(set(ids)) == 2000
