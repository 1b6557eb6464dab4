"""Instructions as token sequences, through the published quality filter; what it leaves out is counted by reason.

Training, the teacher cache, validation and evaluation all read their examples here, so that they agree on them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from stillhouse.assets.records import Instruction
from stillhouse.data.packing import Sequence
from stillhouse.data.prompts import PromptRenderer
from stillhouse.data.records import read_records
from stillhouse.runtime.errors import UserError
from stillhouse.runtime.logs import logger

EMPTY_TURN, LONG_PROMPT, SHORT_RESPONSE = "empty_turn", "long_prompt", "short_response"


@dataclass(frozen=True)
class Instructions:
    """Prompts with their answers, at most `max_length` tokens each.

    left_out: number of examples by reason. cut: number of answers that lost their end to `max_length`.
    """

    sequences: tuple[Sequence, ...]
    left_out: dict[str, int]
    cut: int


def read_instructions(
    path: Path, renderer: PromptRenderer, max_length: int, response_room: int, limit: int | None = None
) -> Instructions:
    """The first `limit` examples of a split that pass the filter, in its order; None: all.

    Raises `UserError` for what `read_records` refuses, and where the filter leaves nothing, with the reasons.
    """
    kept = filtered(read_records(path, Instruction), renderer, max_length, response_room, limit)
    if not kept.sequences:
        reasons = ", ".join(f"{count} {_WORDS[reason]}" for reason, count in kept.left_out.items())
        raise UserError(
            f"{path}: no example is left after filtering ({reasons}; max_length {max_length}, response_room "
            f"{response_room}): raise max_length, lower response_room, or take other data"
        )
    if kept.left_out:
        logger.info("%s: %d examples kept, left out: %s", path, len(kept.sequences), kept.left_out)
    return kept


def filtered(
    examples: Iterable[Instruction], renderer: PromptRenderer, max_length: int, response_room: int, limit: int | None
) -> Instructions:
    """Leave out empty turns, prompts of `max_length - response_room` tokens or more, and shorter answers than that."""
    sequences: list[Sequence] = []
    left_out: Counter[str] = Counter()
    cut = 0
    for example in examples:
        if len(sequences) == limit:
            break
        found = _sequence(example, renderer, max_length, response_room)
        if isinstance(found, str):
            left_out[found] += 1
            continue
        cut += len(found) > max_length
        sequences.append(Sequence(found.input_ids[:max_length], found.answer_start, found.example_id))
    return Instructions(tuple(sequences), dict(sorted(left_out.items())), cut)


_WORDS = {
    EMPTY_TURN: "with an empty turn",
    LONG_PROMPT: "with too long a prompt",
    SHORT_RESPONSE: "with too short a response",
}


def _sequence(example: Instruction, renderer: PromptRenderer, max_length: int, response_room: int) -> Sequence | str:
    """The example's tokens, not cut yet, or the reason to leave it out."""
    if not example.question.strip() or not example.answer.strip():
        return EMPTY_TURN
    prompt, answer = renderer.prompt_ids(example.question), renderer.answer_ids(example.answer)
    if len(prompt) >= max_length - response_room:
        return LONG_PROMPT
    if len(answer) < response_room:  # the room for it is there: the prompt is short enough
        return SHORT_RESPONSE
    return Sequence([*prompt, *answer], len(prompt), example.id)
