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
class ChoiceQuestion:
    """A question whose choices a language model scores one by one.

    context: the passage that it is about (BoolQ) or its subject (MMLU); empty where there is none.
    question: for WinoGrande the sentence with `_` where a choice goes; for HellaSwag the text to be continued.
    gold: index of the right choice.
    """

    id: str
    context: str
    question: str
    choices: tuple[str, ...]
    gold: int


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

Record = Passage | ReadingQuestion | ChoiceQuestion | Instruction
RecordType = TypeVar("RecordType", bound=Record)

RECORD_OF_TASK: dict[Task, type[Record]] = {
    "math_word_problem": MathProblem,
    "multiple_choice": MathProblem,
    "competition_math": MathProblem,
    "instruction_following": VerifiableInstruction,
    "instruction": Instruction,
    "passages": Passage,
    "reading_comprehension": ReadingQuestion,
    "answer_choices": ChoiceQuestion,
}


def checked(record: RecordType, where: str) -> RecordType:
    """The record itself; raises `UserError` for a problem without result and a gold that is none of the choices."""
    if isinstance(record, ChoiceQuestion) and not 0 <= record.gold < len(record.choices):
        raise UserError(
            f"{where} (id {record.id}): gold {record.gold} is none of its {len(record.choices)} choices: "
            "mend or remove the row"
        )
    if isinstance(record, MathProblem) and final_answer(record.answer) is None:
        raise UserError(
            f"{where} (id {record.id}): the answer has no '#### <result>' and no \\boxed{{...}}: mend or remove the row"
        )
    return record
