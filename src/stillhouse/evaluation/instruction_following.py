"""Whether an output obeys the verifiable constraints of its prompt, by lm-evaluation-harness's own IFEval checks.

Beside `scorers`, and apart from it because the checks need a sentence tokenizer that no package carries:
`python -m nltk.downloader punkt_tab`.
"""

from __future__ import annotations

import json

from stillhouse.evaluation.scorers import AnswerScore
from stillhouse.runtime.errors import UserError


def check_instruction_scorer() -> None:
    """Raise `UserError` where the sentence tokenizer is missing, and say how to install it."""
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        raise UserError(
            "task instruction_following: nltk's sentence tokenizer is missing: python -m nltk.downloader punkt_tab"
        ) from None


def score_instructions(output: str, checks: str) -> AnswerScore:
    """Score an output against `checks`, the JSON list of a `VerifiableInstruction`.

    strict_correct and flexible_correct are IFEval's prompt-level strict and loose accuracy (arXiv 2311.07911);
    wrote_marker tells that at least one constraint is obeyed. Raises `UserError` naming an unknown constraint.
    """
    from lm_eval.tasks.ifeval.instructions_registry import INSTRUCTION_DICT
    from lm_eval.tasks.ifeval.utils import (
        InputExample,
        test_instruction_following_loose,
        test_instruction_following_strict,
    )

    instructions = json.loads(checks)
    names = [instruction["id"] for instruction in instructions]
    if unknown := [name for name in names if name not in INSTRUCTION_DICT]:
        raise UserError(f"task instruction_following: unknown constraint '{unknown[0]}' in a row's checks: remove it")
    example = InputExample(0, names, "", [instruction["arguments"] for instruction in instructions])
    strict = test_instruction_following_strict(example, output)
    loose = test_instruction_following_loose(example, output)
    return AnswerScore(
        strict.follow_all_instructions, loose.follow_all_instructions, any(strict.follow_instruction_list)
    )
