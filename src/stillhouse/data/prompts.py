"""Few-shot prompts as token ids: chat templates with thinking off, or plain `Question:/Answer:` text.

A prompt and its answer are tokenised apart, so that the answer's tokens do not depend on what precedes them:
teacher and student then end with the same tokens. Nothing is ever truncated: a sequence over the limit is an error,
or a skip that is counted and reported. Which worked examples go into a prompt is decided in `exemplars`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerBase

from stillhouse.data.exemplars import Shot
from stillhouse.data.packing import Sequence
from stillhouse.data.records import Problem
from stillhouse.runtime.errors import UserError

logger = logging.getLogger(__name__)

PromptFormat = Literal["auto", "chat", "plain"]
_MARKER = "ANSWER"


@dataclass(frozen=True)
class SkippedReport:
    """Examples left out because their sequence is over `limit` tokens: (example id, length) pairs."""

    limit: int
    examples: tuple[tuple[str, int], ...] = ()

    def __len__(self) -> int:
        return len(self.examples)


@dataclass(frozen=True)
class PromptRenderer:
    """Renders prompts and answers for one tokenizer in one format; make it with `prompt_renderer`."""

    tokenizer: PreTrainedTokenizerBase
    chat: bool
    turn_end: int

    def text(self, question: str, shots: Items[Shot] = ()) -> str:
        """The prompt's text, up to where the answer begins.

        Shots without an answer (the question-only control) are listed before the question: in a chat inside the
        same user turn, since templates want turns to alternate.
        """
        worked = [(shot.question, shot.answer) for shot in shots if shot.answer is not None]
        bare = [shot.question for shot in shots if shot.answer is None]
        if not self.chat:
            parts = [f"Question: {asked}\nAnswer: {answer}" for asked, answer in worked]
            return "\n\n".join([*parts, *(f"Question: {asked}" for asked in bare), f"Question: {question}\nAnswer:"])
        messages = [
            {"role": role, "content": content}
            for pair in worked
            for role, content in zip(("user", "assistant"), pair, strict=True)
        ]
        messages.append({"role": "user", "content": "\n\n".join([*bare, question])})
        return _rendered(self.tokenizer, messages, thinking=False)

    def prompt_ids(self, question: str, shots: Items[Shot] = ()) -> list[int]:
        """The prompt's tokens, with the tokenizer's beginning-of-sequence token exactly once where it has one."""
        ids = self._ids(self.text(question, shots))
        if not self.chat and (start := self.tokenizer("").input_ids[:1]) == [self.tokenizer.bos_token_id]:
            return [*start, *ids]
        return ids

    def answer_ids(self, answer: str) -> list[int]:
        """The answer's tokens and the token that ends the turn; independent of the prompt."""
        return [*self._ids(answer if self.chat else f" {answer}"), self.turn_end]

    def sequence(self, problem: Problem, shots: Items[Shot] = ()) -> Sequence:
        """Prompt and gold answer of one problem."""
        prompt = self.prompt_ids(problem.question, shots)
        return Sequence([*prompt, *self.answer_ids(problem.answer)], len(prompt), problem.id)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return ids


def prompt_renderer(tokenizer: PreTrainedTokenizerBase, prompt_format: PromptFormat = "auto") -> PromptRenderer:
    """Choose chat or plain and check that the tokenizer can do it.

    Raises UserError where chat was asked of a tokenizer without a template, where the template leaves a thinking
    block open or ignores `enable_thinking=False`, and where no end-of-sequence token is known.
    """
    if prompt_format == "chat" and not tokenizer.chat_template:
        raise UserError(
            f"{tokenizer.name_or_path}: prompt_format is chat but the tokenizer has no chat template: "
            "set prompt_format to plain or auto"
        )
    chat = prompt_format != "plain" and bool(tokenizer.chat_template)
    if chat:
        _require_thinking_off(tokenizer)
    turn_end = _turn_end(tokenizer) if chat else tokenizer.eos_token_id
    if turn_end is None:
        raise UserError(f"{tokenizer.name_or_path}: the tokenizer has no end-of-sequence token: set eos_token")
    return PromptRenderer(tokenizer, chat, turn_end)


def render_prompt(
    tokenizer: PreTrainedTokenizerBase,
    question: str,
    shots: Items[Shot] = (),
    prompt_format: PromptFormat = "auto",
) -> list[int]:
    """Token ids of one prompt, up to where the answer begins; see `prompt_renderer` for the errors."""
    return prompt_renderer(tokenizer, prompt_format).prompt_ids(question, shots)


def within_limit(
    sequences: Iterable[Sequence], limit: int, overlong: Literal["error", "skip"], key: str = "max_length"
) -> tuple[list[Sequence], SkippedReport]:
    """Keep the sequences of at most `limit` tokens; `key` names the setting in messages.

    Raises UserError for the first longer one when `overlong` is error; otherwise skips are counted and logged.
    """
    kept: list[Sequence] = []
    skipped: list[tuple[str, int]] = []
    for sequence in sequences:
        if len(sequence) <= limit:
            kept.append(sequence)
        elif overlong == "error":
            raise UserError(
                f"{sequence.example_id}: the sequence has {len(sequence)} tokens but {key} is {limit}: "
                "raise the limit, or set overlong to skip"
            )
        else:
            skipped.append((sequence.example_id, len(sequence)))
    if skipped:
        logger.warning("skipped %d of %d examples over %s=%d", len(skipped), len(skipped) + len(kept), key, limit)
    return kept, SkippedReport(limit, tuple(skipped))


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], *, thinking: bool) -> str:
    # enable_thinking is a keyword of its own: transformers 5 ignores it inside chat_template_kwargs.
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=thinking)
    assert isinstance(text, str)
    if not thinking and text.rfind("<think>") > text.rfind("</think>"):
        raise UserError(
            f"{tokenizer.name_or_path}: the rendered prompt ends inside an open <think> block although thinking "
            "is off: use a chat template that honours enable_thinking, or set prompt_format to plain"
        )
    return text


def _require_thinking_off(tokenizer: PreTrainedTokenizerBase) -> None:
    """Check on rendered text, not on the call, that a template with a thinking switch obeys it."""
    messages = [{"role": "user", "content": _MARKER}]
    off, on = (_rendered(tokenizer, messages, thinking=thinking) for thinking in (False, True))
    if "enable_thinking" in str(tokenizer.get_chat_template()) and off == on:
        raise UserError(
            f"{tokenizer.name_or_path}: the chat template names enable_thinking but renders the same prompt with "
            "thinking on and off: use a template that honours it, or set prompt_format to plain"
        )


def _turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that the template writes after an assistant's message, else the end of sequence."""
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _MARKER}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, enable_thinking=False)
    assert isinstance(text, str)
    after = tokenizer(text.rpartition(_MARKER)[2].lstrip(), add_special_tokens=False).input_ids[:1]
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    return after[0] if after and after[0] in special else tokenizer.eos_token_id
