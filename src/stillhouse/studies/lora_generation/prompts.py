"""The prompts that stand for an adapter: `prompts.json` in its folder, examples of the shard that it learnt from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stillhouse.runtime.errors import UserError
from stillhouse.runtime.files import read_json, write_json

PROMPTS_FILE = "prompts.json"


@dataclass(frozen=True)
class SolvedPrompt:
    """A prompt as its task asks it, and the right answer as it continues it."""

    id: str
    prompt: str
    answer: str


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file, in order. Raises `UserError` for a file that is missing, damaged or without prompts."""
    return _texts(path, "prompts")


def read_solved_prompts(path: Path) -> list[SolvedPrompt]:
    """The same with ids and answers."""
    columns = [_texts(path, name) for name in ("ids", "prompts", "answers")]
    if len({len(column) for column in columns}) > 1:
        raise UserError(f"{path}: ids, prompts and answers are not equally many: make the adapter again")
    return [SolvedPrompt(*values) for values in zip(*columns, strict=True)]


def write_prompts(path: Path, solved: Sequence[SolvedPrompt]) -> None:
    """Write a `prompts.json`."""
    columns = {"ids": [one.id for one in solved], "prompts": [one.prompt for one in solved]}
    write_json(path, columns | {"answers": [one.answer for one in solved]})


def _texts(path: Path, name: str) -> list[str]:
    content = read_json(path)
    texts = content.get(name) if isinstance(content, dict) else None
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{path}: holds no list '{name}' of texts: make the adapter again")
    return texts
