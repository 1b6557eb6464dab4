"""Reads and writes normalised task files: JSON lines, one dataclass of `assets.records` per kind of record.

Stands between `assets` and `data.split`, which write them, and the studies.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from stillhouse.assets.records import (
    ChoiceQuestion,
    MathProblem,
    Passage,
    Problem,
    ReadingQuestion,
    Record,
    RecordType,
    VerifiableInstruction,
    checked,
)
from stillhouse.runtime.errors import UserError
from stillhouse.runtime.files import atomic_write_chunks

__all__ = [
    "ChoiceQuestion",
    "MathProblem",
    "Passage",
    "Problem",
    "ReadingQuestion",
    "read_choice_questions",
    "read_passages",
    "read_problems",
    "read_reading_questions",
    "read_records",
    "write_records",
]


def read_problems(path: Path) -> list[Problem]:
    """Questions with answers that can be scored: rows with `checks` are verifiable instructions; see `read_records`."""
    verifiable = False
    if path.is_file():
        with path.open(encoding="utf-8", errors="replace") as lines:
            verifiable = '"checks": ' in lines.readline()
    return list(read_records(path, VerifiableInstruction if verifiable else MathProblem))


def read_passages(path: Path) -> list[Passage]:
    """The passages of one file; see `read_records`."""
    return read_records(path, Passage)


def read_reading_questions(path: Path) -> list[ReadingQuestion]:
    """The questions of one file with their passages; see `read_records`."""
    return read_records(path, ReadingQuestion)


def read_choice_questions(path: Path) -> list[ChoiceQuestion]:
    """The questions of one file with their choices; see `read_records`."""
    return read_records(path, ChoiceQuestion)


def read_records(path: Path, kind: type[RecordType]) -> list[RecordType]:
    """The records of one file, in its order.

    Raises `UserError` naming file and line for a missing file, invalid JSON, a missing field, an answer without
    result or an id that occurs twice, and naming the file where it is empty.
    """
    records: dict[str, RecordType] = {}
    for _, number, record in located_records(path, kind):
        if record.id in records:
            raise UserError(f"{path}:{number}: the id '{record.id}' occurs twice: make the ids unique")
        records[record.id] = record
    if not records:
        raise UserError(f"{path}: holds no examples: fill it, or correct the path")
    return list(records.values())


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Write records as JSON lines, in the order given, one in memory at a time."""
    lines = (json.dumps(asdict(record), ensure_ascii=False) + "\n" for record in records)
    atomic_write_chunks(path, (line.encode() for line in lines))


def located_records(path: Path, kind: type[RecordType]) -> Iterator[tuple[int, int, RecordType]]:
    """The records of one file, one in memory at a time, each after the offset and the number of its line.

    Raises what `read_records` does, but for ids that occur twice and for an empty file.
    """
    offset = 0
    try:
        with path.open("rb") as lines:
            for number, content in enumerate(lines, start=1):
                line = content.decode()
                if line.strip():
                    yield offset, number, parse_record(line, kind, f"{path}:{number}")
                offset += len(content)
    except FileNotFoundError:
        raise UserError(f"{path}: does not exist: run the rule that makes it, or correct the path") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text ({error.reason}): make it again") from None


def parse_record(line: str, kind: type[RecordType], where: str) -> RecordType:
    """The record of one line; a `UserError` that begins with `where` for invalid JSON or a field that does not fit."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: is not valid JSON ({error.msg}): correct the line") from None
    names = [field.name for field in fields(kind)]
    values = {name: row.get(name) if isinstance(row, dict) else None for name in names}
    wrong = [name for name, value in values.items() if not _fits(name, value)]
    if wrong:
        raise UserError(
            f"{where}: '{wrong[0]}' is missing or no {_KINDS.get(wrong[0], 'text')}: each line needs {', '.join(names)}"
        )
    arguments: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    return checked(kind(**arguments), where)


_KINDS = {"answers": "list of texts", "choices": "list of texts", "gold": "number"}


def _fits(name: str, value: object) -> bool:
    match _KINDS.get(name):
        case "list of texts":
            return isinstance(value, list) and all(isinstance(text, str) for text in value)
        case "number":
            return type(value) is int
        case _:
            return isinstance(value, str)
