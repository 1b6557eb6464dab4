"""Data sets as JSONL with one schema per task (`assets.records`), one file per published split.

A reader knows the fields of one family of files; formats (JSONL, JSON, Parquet, Arrow, text, gzip) are told by suffix.
Rows are read and written a few at a time; only a JSON file that is one list is read whole.
Request files of evaluation harnesses, which hold the raw record as `doc`, are unwrapped and their repetitions
dropped. `assets.choice_readers` has the readers of multiple-choice sets.
"""

from __future__ import annotations

import gzip
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, fields
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stillhouse.assets.choice_readers import CHOICE_READERS
from stillhouse.assets.records import RECORD_OF_TASK, RecordType, checked
from stillhouse.config.assets import DatasetEntry
from stillhouse.config.layering import nearest
from stillhouse.runtime.errors import UserError
from stillhouse.runtime.files import atomic_write_chunks, reading_errors
from stillhouse.runtime.logs import logger

BATCH_ROWS = 1024

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
        counts[split] = atomic_write_chunks(output / f"{split}.jsonl", _normalised_lines(name, entry, files, split))
        if not counts[split]:
            raise UserError(f"datasets.{name}.splits.{split}: is empty: {files[0].name} holds no rows")
        logger.info("%s: %d examples in the published %s split", name, counts[split], split)
    return counts


def _normalised_lines(name: str, entry: DatasetEntry, files: list[Path], split: str) -> Iterator[bytes]:
    """The records of one split as they are written, one in memory at a time."""
    for where, identity, row in _identified_rows(files, split):
        where = f"datasets.{name}: {where}"
        values = _read(READERS[entry.reader], row, where)
        record = checked(_record(RECORD_OF_TASK[entry.task], {"id": identity, **values}, where), where)
        yield (json.dumps(asdict(record), ensure_ascii=False) + "\n").encode()


def _identified_rows(files: list[Path], split: str) -> Iterator[tuple[str, str, Row]]:
    """Place, id and raw record of each row; request files repeat a record per choice, and an id for two records."""
    seen: set[str] = set()
    requested: dict[str, set[bytes]] = defaultdict(set)
    for file in files:
        for number, row in enumerate(_rows(file), start=1):
            where = f"{file.name}:{number}"
            if not isinstance(row, dict):
                raise UserError(f"{file}:{number}: is not a record with fields: correct the file")
            if "doc" in row and "native_id" in row:
                identity = f"{row.get('task_name', split)}-{row['native_id']}"
                earlier = requested[identity]
                record = blake2b(json.dumps(row["doc"], sort_keys=True).encode(), digest_size=16).digest()
                if record not in earlier:
                    earlier.add(record)
                    yield where, identity if len(earlier) == 1 else f"{identity}.{len(earlier)}", row["doc"]
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
    with reading_errors(file):
        try:
            if kind in (".jsonl", ".json"):
                with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
                    yield from _json_rows(file, stream if kind == ".jsonl" else [stream.read()], lines=kind == ".jsonl")
            elif kind == ".parquet":
                with pq.ParquetFile(file) as table:
                    for batch in table.iter_batches(BATCH_ROWS):
                        yield from batch.to_pylist()
            elif kind == ".arrow":
                with pa.memory_map(str(file)) as mapped:
                    for batch in pa.ipc.open_stream(mapped):
                        yield from batch.to_pylist()
            elif kind == ".txt":
                with file.open(encoding="utf-8") as lines:
                    yield from ({"text": line.removesuffix("\n")} for line in lines if line.strip())
            else:
                known = ".jsonl, .json, .parquet, .arrow or .txt (.gz allowed)"
                raise UserError(f"{file}: has no known format: use {known}")
        except (pa.ArrowInvalid, EOFError, gzip.BadGzipFile, UnicodeDecodeError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{file}: is damaged or not of its suffix's format ({reason}): fetch it again") from None


def _json_rows(file: Path, documents: Iterable[bytes], lines: bool) -> Iterator[Any]:
    for number, content in enumerate(documents, start=1):
        document = content.decode()
        if not document.strip():
            continue
        try:
            value = json.loads(document)
        except json.JSONDecodeError as error:
            raise UserError(f"{file}:{number}: is not valid JSON ({error.msg}): correct the line") from None
        yield from value if not lines and isinstance(value, list) else [value]


def _read(reader: Callable[[Row], Row], row: Row, where: str) -> Row:
    try:
        return reader(row)
    except KeyError as error:
        raise UserError(f"{where}: has no field {error}: is this the right reader?") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{where}: cannot be read ({error}): is this the right reader?") from None


def _record(kind: type[RecordType], values: Row, where: str) -> RecordType:
    """The record of the task; raises `UserError` where the reader yields records of another task."""
    names = {field.name for field in fields(kind)}
    if names != set(values):
        raise UserError(
            f"{where}: the reader yields {', '.join(values)}, the task wants {', '.join(sorted(names))}: "
            "make reader and task agree"
        )
    return kind(**values)


def _problem(question: str, answer: str) -> Row:
    return {"question": question.strip(), "answer": answer.strip()}


def _gsm8k(row: Row) -> Row:
    """GSM8K (arXiv 2110.14168): the worked answer ends in `#### N`."""
    return _problem(row["question"], row["answer"])


def _math(row: Row) -> Row:
    """MATH (arXiv 2103.03874): the solution holds `\\boxed{...}`."""
    return _problem(row["problem"], row["solution"])


def _commonsense_qa(row: Row) -> Row:
    """CommonsenseQA (arXiv 1811.00937): options by letter; the answer is the option's text and `#### <letter>`."""
    options = dict(zip(row["choices"]["label"], row["choices"]["text"], strict=True))
    listed = "\n".join(f"({letter}) {text}" for letter, text in options.items())
    if row["answerKey"] not in options:
        raise ValueError(f"answerKey {row['answerKey']!r} is none of its options")
    return _problem(f"{row['question'].strip()}\n{listed}", f"{options[row['answerKey']]}\n#### {row['answerKey']}")


def _basic_arithmetic(row: Row) -> Row:
    """AllenAI's basic_arithmetic: `Calculate 5 + 91 =`; the answer is the sum alone, the options are left out."""
    options = dict(zip(row["choices"]["label"], row["choices"]["text"], strict=True))
    return _problem(row["question"], f"#### {options[row['answerKey']]}")


def _svamp(row: Row) -> Row:
    """SVAMP (arXiv 2103.07191): a story and a question; the answer is the number alone."""
    return _problem(f"{row['Body'].strip()} {row['Question'].strip()}", f"#### {_plain_number(row['Answer'])}")


def _multi_arith(row: Row) -> Row:
    """MultiArith (Roy and Roth 2015): the answer is the number alone."""
    return _problem(row["question"], f"#### {_plain_number(row['final_ans'])}")


def _asdiv(row: Row) -> Row:
    """ASDiv (arXiv 2106.15772): a story and a question; of `9 (apples)` the number is kept."""
    number = row["answer"].partition("(")[0].strip()
    return _problem(f"{row['body'].strip()} {row['question'].strip()}", f"#### {_plain_number(number)}")


def _plain_number(text: str) -> str:
    """`145.0` as `145`; what is no number stays as it is."""
    return text.strip().removesuffix(".0")


def _ifeval_like(row: Row) -> Row:
    """Prompts with IFEval's verifiable constraints (arXiv 2311.07911) and a response; `kwargs` a list or its JSON."""
    arguments = json.loads(row["kwargs"]) if isinstance(row["kwargs"], str) else row["kwargs"]
    checks = [
        # Parquet gives every row every argument of the set, null where the constraint has none.
        {"id": identity, "arguments": {key: value for key, value in given.items() if value is not None}}
        for identity, given in zip(row["instruction_id_list"], arguments, strict=True)
    ]
    return {**_problem(row["prompt"], row["response"]), "checks": json.dumps(checks, ensure_ascii=False)}


def _alpaca(row: Row) -> Row:
    """Alpaca's form: an instruction, perhaps with an input, and its output."""
    return _problem("\n\n".join(part for part in (row["instruction"], row["input"]) if part), row["output"])


def _conversation(row: Row) -> Row:
    """A list of messages: the first user turn, after what the system says, and the answer to it."""
    messages = row["messages"]
    asked = next(place for place, message in enumerate(messages) if message["role"] == "user")
    system = [message["content"] for message in messages[:asked] if message["role"] == "system"]
    answer = next((each["content"] for each in messages[asked + 1 :] if each["role"] == "assistant"), "")
    return _problem("\n\n".join([*system, messages[asked]["content"]]), answer)


def _text(row: Row) -> Row:
    """A document per row; a text file has one per line."""
    return {"text": row["text"].strip()}


def _story(row: Row) -> Row:
    """SimpleStories (arXiv 2504.09184): a whole story."""
    return {"text": row["story"].strip()}


def _lambada(row: Row) -> Row:
    """LAMBADA (arXiv 1606.06031): a narrative passage with the last word that is to be guessed put back."""
    return {"text": f"{row['query']} {row['answers_text'][0]}"}


def _squad(row: Row) -> Row:
    """SQuAD and SQuAD 2.0 (arXiv 1606.05250, 1806.03822) as published; no answers where the passage holds none."""
    return {
        "title": row["title"],
        "context": row["context"].strip(),
        "question": row["question"].strip(),
        "answers": tuple(row["answers"]["text"]),
    }


def _squad_query(row: Row) -> Row:
    """SQuAD as an evaluation harness keeps it: title, passage and question in one `query`."""
    lines = re.fullmatch(r"Title: (.*?)\nBackground: (.*)\nQuestion: (.*)\nAnswer:", row["query"], re.DOTALL)
    if lines is None:
        raise ValueError("'query' is not made of Title, Background, Question, Answer")
    title, context, question = (part.strip() for part in lines.groups())
    return {"title": title, "context": context, "question": question, "answers": tuple(row["answers_text"])}


def _hotpot_qa(row: Row) -> Row:
    """HotpotQA (arXiv 1809.09600), distractor setting: the paragraphs joined, titles kept."""
    paragraphs = zip(row["context"]["title"], row["context"]["sentences"], strict=True)
    context = "\n".join(f"{title}: {''.join(sentences)}" for title, sentences in paragraphs)
    return {
        "title": " / ".join(dict.fromkeys(row["supporting_facts"]["title"])),
        "context": context,
        "question": row["question"].strip(),
        "answers": (row["answer"],),
    }


READERS: dict[str, Callable[[Row], Row]] = {
    "gsm8k": _gsm8k,
    "math": _math,
    "commonsense_qa": _commonsense_qa,
    "basic_arithmetic": _basic_arithmetic,
    "svamp": _svamp,
    "multi_arith": _multi_arith,
    "asdiv": _asdiv,
    "ifeval_like": _ifeval_like,
    "alpaca": _alpaca,
    "conversation": _conversation,
    "text": _text,
    "story": _story,
    "lambada": _lambada,
    "squad": _squad,
    "squad_query": _squad_query,
    "hotpot_qa": _hotpot_qa,
    **CHOICE_READERS,
}
