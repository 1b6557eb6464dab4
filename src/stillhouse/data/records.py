"""Reads normalised task files: JSON lines with `id`, `question`, `answer`.

Stands between `assets` and `data.split`, which write them, and the studies.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from stillhouse.assets.answers import final_answer
from stillhouse.runtime.errors import UserError

FIELDS = ("id", "question", "answer")


@dataclass(frozen=True)
class MathProblem:
    """A question and its full worked answer, which ends in `#### <result>` or holds `\\boxed{<result>}`."""

    id: str
    question: str
    answer: str

    @property
    def final_answer(self) -> str:
        """The result that the worked answer states."""
        return final_answer(self.answer) or ""


def read_problems(path: Path) -> list[MathProblem]:
    """The problems of one file, in its order.

    Raises `UserError` naming file and line for a missing file, invalid JSON, a missing field, an answer without
    result or an id that occurs twice, and naming the file where it is empty.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise UserError(f"{path}: does not exist: run the rule that makes it, or correct the path") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text ({error.reason}): make it again") from None
    problems: dict[str, MathProblem] = {}
    for number, line in enumerate(lines, start=1):
        if line.strip():
            problem = _problem(line, f"{path}:{number}")
            if problem.id in problems:
                raise UserError(f"{path}:{number}: the id '{problem.id}' occurs twice: make the ids unique")
            problems[problem.id] = problem
    if not problems:
        raise UserError(f"{path}: holds no examples: fill it, or correct the path")
    return list(problems.values())


def _problem(line: str, where: str) -> MathProblem:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: is not valid JSON ({error.msg}): correct the line") from None
    wrong = [field for field in FIELDS if not isinstance(row, dict) or not isinstance(row.get(field), str)]
    if wrong:
        raise UserError(f"{where}: '{wrong[0]}' is missing or no text: each line needs {', '.join(FIELDS)}")
    if final_answer(row["answer"]) is None:
        raise UserError(
            f"{where} (id {row['id']}): the answer has no '#### <result>' and no \\boxed{{...}}: mend or remove the row"
        )
    return MathProblem(*(row[field] for field in FIELDS))
