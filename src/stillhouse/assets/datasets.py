"""Data sets as JSONL with one schema: `id`, `question`, `answer`, one file per published split.

A reader knows the fields of one family of files; formats (JSONL, JSON, Parquet, Arrow, gzip) are told by suffix.
Request files of evaluation harnesses, which hold the raw record as `doc`, are unwrapped and their repetitions
dropped by `native_id`.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stillhouse.assets.answers import final_answer
from stillhouse.config.assets import DatasetEntry
from stillhouse.config.layering import nearest
from stillhouse.runtime.errors import UserError
from stillhouse.runtime.files import atomic_write_text
from stillhouse.runtime.logs import logger

Row = dict[str, Any]


def normalise_dataset(name: str, entry: DatasetEntry, source: Path, output: Path) -> dict[str, int]:
    """Write `<split>.jsonl` per split below `output` and return their sizes.

    Raises `UserError` naming file and row for an unknown reader, an unreadable or incomplete row, an empty split.
    """
    if entry.reader not in READERS:
        raise UserError(f"datasets.{name}.reader: unknown reader '{entry.reader}': {nearest(entry.reader, [*READERS])}")
    counts = {}
    for split, pattern in entry.splits.items():
        files = [source] if source.is_file() else sorted(source.glob(pattern))
        if not files:
            raise UserError(f"datasets.{name}.splits.{split}: no file of {source} matches '{pattern}'")
        lines = []
        for where, identity, row in _identified_rows(files, split):
            question, answer = _read(READERS[entry.reader], row, f"datasets.{name}: {where}")
            if final_answer(answer) is None:
                raise UserError(
                    f"datasets.{name}: {where} (id {identity}): the answer has no '#### <result>' and no "
                    "\\boxed{...}: mend or remove the row"
                )
            lines.append(json.dumps({"id": identity, "question": question, "answer": answer}, ensure_ascii=False))
        if not lines:
            raise UserError(f"datasets.{name}.splits.{split}: is empty: {files[0].name} holds no rows")
        atomic_write_text(output / f"{split}.jsonl", "\n".join(lines) + "\n")
        counts[split] = len(lines)
        logger.info("%s: %d examples in the published %s split", name, len(lines), split)
    return counts


def _identified_rows(files: list[Path], split: str) -> Iterator[tuple[str, str, Row]]:
    """Place, id and raw record of each row; an id that repeats in request files is one record, elsewhere a number."""
    seen: set[str] = set()
    for file in files:
        for number, row in enumerate(_rows(file), start=1):
            where = f"{file.name}:{number}"
            if not isinstance(row, dict):
                raise UserError(f"{file}:{number}: is not a record with fields: correct the file")
            if "doc" in row and "native_id" in row:
                identity = f"{row.get('task_name', split)}-{row['native_id']}"
                if identity not in seen:
                    yield where, identity, row["doc"]
            else:
                identity = str(row["id"]) if "id" in row else f"{split}-{len(seen)}"
                if identity in seen:
                    raise UserError(f"{file}:{number}: the id '{identity}' occurs twice: make the ids unique")
                yield where, identity, row
            seen.add(identity)


def _rows(file: Path) -> Iterator[Any]:
    """The records of one file; raises `UserError` naming the file, and the line where there are lines."""
    suffixes = [suffix for suffix in file.suffixes if suffix != ".gz"]
    kind = suffixes[-1] if suffixes else ""
    try:
        if kind in (".jsonl", ".json"):
            content = file.read_bytes()
            text = (gzip.decompress(content) if file.suffix == ".gz" else content).decode()
            yield from _json_rows(file, text, lines=kind == ".jsonl")
        elif kind == ".parquet":
            yield from pq.read_table(file).to_pylist()
        elif kind == ".arrow":
            with pa.memory_map(str(file)) as stream:
                yield from pa.ipc.open_stream(stream).read_all().to_pylist()
        else:
            raise UserError(f"{file}: has no known format: use .jsonl, .json, .parquet or .arrow (.gz allowed)")
    except (pa.ArrowInvalid, EOFError, gzip.BadGzipFile, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{file}: is damaged or not of its suffix's format ({reason}): fetch it again") from None


def _json_rows(file: Path, text: str, lines: bool) -> Iterator[Any]:
    documents = enumerate(text.split("\n"), start=1) if lines else [(1, text)]
    for number, document in documents:
        if not document.strip():
            continue
        try:
            value = json.loads(document)
        except json.JSONDecodeError as error:
            raise UserError(f"{file}:{number}: is not valid JSON ({error.msg}): correct the line") from None
        yield from value if not lines and isinstance(value, list) else [value]


def _read(reader: Callable[[Row], tuple[str, str]], row: Row, where: str) -> tuple[str, str]:
    try:
        return reader(row)
    except KeyError as error:
        raise UserError(f"{where}: has no field {error}: is this the right reader?") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{where}: cannot be read ({error}): is this the right reader?") from None


def _gsm8k(row: Row) -> tuple[str, str]:
    """GSM8K (arXiv 2110.14168): the worked answer ends in `#### N`."""
    return row["question"].strip(), row["answer"].strip()


def _math(row: Row) -> tuple[str, str]:
    """MATH (arXiv 2103.03874): the solution holds `\\boxed{...}`."""
    return row["problem"].strip(), row["solution"].strip()


def _commonsense_qa(row: Row) -> tuple[str, str]:
    """CommonsenseQA (arXiv 1811.00937): options by letter; the answer is the option's text and `#### <letter>`."""
    options = dict(zip(row["choices"]["label"], row["choices"]["text"], strict=True))
    listed = "\n".join(f"({letter}) {text}" for letter, text in options.items())
    if row["answerKey"] not in options:
        raise ValueError(f"answerKey {row['answerKey']!r} is none of its options")
    return f"{row['question'].strip()}\n{listed}", f"{options[row['answerKey']]}\n#### {row['answerKey']}"


def _basic_arithmetic(row: Row) -> tuple[str, str]:
    """AllenAI's basic_arithmetic: `Calculate 5 + 91 =`; the answer is the sum alone, the options are left out."""
    options = dict(zip(row["choices"]["label"], row["choices"]["text"], strict=True))
    return row["question"].strip(), f"#### {options[row['answerKey']]}"


READERS: dict[str, Callable[[Row], tuple[str, str]]] = {
    "gsm8k": _gsm8k,
    "math": _math,
    "commonsense_qa": _commonsense_qa,
    "basic_arithmetic": _basic_arithmetic,
}
