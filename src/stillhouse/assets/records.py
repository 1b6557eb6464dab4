"""The normalised form of data sets: one dataclass per kind of record, whose fields are the keys of a JSON line.

`assets.datasets` writes them, `data.records` reads them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from stillhouse.assets.answers import final_answer
from stillhouse.config.assets import Task
from stillhouse.runtime.errors import UserError


@dataclass(frozen=True)
class Passage:
    """A document of plain text."""

    id: str
    text: str


@dataclass(frozen=True)
class ReadingQuestion:
    """A question about a passage, with every gold answer; no answers: the passage does not hold one."""

    id: str
    title: str
    context: str
    question: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Instruction:
    """A prompt and its response."""

    id: str
    question: str
    answer: str


@dataclass(frozen=True)
class VerifiableInstruction(Instruction):
    """A prompt whose constraints a program can check, with a response.

    checks: JSON list of `{"id": <IFEval instruction id>, "arguments": {...}}`.
    """

    checks: str

    @property
    def gold(self) -> str:
        """What a scorer compares an output with."""
        return self.checks


@dataclass(frozen=True)
class MathProblem(Instruction):
    """A question and its full worked answer, which ends in `#### <result>` or holds `\\boxed{<result>}`."""

    @property
    def gold(self) -> str:
        """What a scorer compares an output with."""
        return self.answer

    @property
    def final_answer(self) -> str:
        """The result that the worked answer states."""
        return final_answer(self.answer) or ""


Problem = MathProblem | VerifiableInstruction

Record = Passage | ReadingQuestion | Instruction
RecordType = TypeVar("RecordType", bound=Record)

RECORD_OF_TASK: dict[Task, type[Record]] = {
    "math_word_problem": MathProblem,
    "multiple_choice": MathProblem,
    "competition_math": MathProblem,
    "instruction_following": VerifiableInstruction,
    "instruction": Instruction,
    "passages": Passage,
    "reading_comprehension": ReadingQuestion,
}


def checked(record: RecordType, where: str) -> RecordType:
    """The record itself; raises `UserError` for a problem whose answer states no result."""
    if isinstance(record, MathProblem) and final_answer(record.answer) is None:
        raise UserError(
            f"{where} (id {record.id}): the answer has no '#### <result>' and no \\boxed{{...}}: mend or remove the row"
        )
    return record
