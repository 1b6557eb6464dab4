"""Multiple choice by log-likelihood: the choice that the model finds most likely after the question.

Prompts, the split of text into context and continuation, and both scores are those of lm-evaluation-harness 0.4.13
(`acc`: the sum over the continuation's tokens; `acc_norm`: that over the choice's length in characters). What the
choices of an item, and the items of a task, have in common is computed once (`models.branches`, `models.prefix`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stillhouse.data.records import ChoiceQuestion
from stillhouse.models.branches import Branches, branch_logits
from stillhouse.models.prefix import encode_prefix, token_batches
from stillhouse.runtime.errors import UserError

# How a task asks: ARC and PIQA `Question: ... Answer:`; BoolQ the same after its passage; OpenBookQA and HellaSwag the
# text itself; WinoGrande each name in its blank, and the rest of the sentence is scored.
ChoiceStyle = Literal["question", "passage", "plain", "blank"]
BETWEEN_EXAMPLES = "\n\n"


@dataclass(frozen=True)
class ChoiceItem:
    """What the model reads of one question: for each choice a context, and the continuation that is scored.

    lengths: characters of each choice, for `acc_norm`. gold: index of the right choice.
    """

    id: str
    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    lengths: tuple[int, ...]
    gold: int

    @property
    def prompt(self) -> str:
        """What stands before the right answer."""
        return self.contexts[self.gold]

    @property
    def answer(self) -> str:
        """The right answer as it continues the prompt, its space included."""
        return self.continuations[self.gold]


@dataclass(frozen=True)
class ChoiceScore:
    """The log-likelihood of each continuation, in nats, and its length in tokens."""

    item: ChoiceItem
    log_likelihoods: tuple[float, ...]
    tokens: tuple[int, ...]

    @property
    def correct(self) -> bool:
        """`acc` of the item: the right choice is the most likely one (of equals the first counts)."""
        return self.log_likelihoods.index(max(self.log_likelihoods)) == self.item.gold

    @property
    def correct_norm(self) -> bool:
        """`acc_norm` of the item."""
        per_character = [value / length for value, length in zip(self.log_likelihoods, self.item.lengths, strict=True)]
        return per_character.index(max(per_character)) == self.item.gold

    @property
    def gold_nll(self) -> float:
        """Negative log-likelihood of the right answer, the sum in nats over `gold_tokens`."""
        return -self.log_likelihoods[self.item.gold]

    @property
    def gold_tokens(self) -> int:
        """Tokens of the right answer."""
        return self.tokens[self.item.gold]


def choice_item(question: ChoiceQuestion, style: ChoiceStyle) -> ChoiceItem:
    """The question as its task asks it. Raises `UserError` for a question that does not have the style's form."""
    choices, text = question.choices, question.question
    if style == "blank":
        before, blank, after = text.partition("_")
        if not blank:
            raise UserError(f"{question.id}: the question has no '_' for the choices to stand in: choose another style")
        contexts = tuple(before + choice for choice in choices)
        continuations: tuple[str, ...] = (f" {after.strip()}",) * len(choices)
        return ChoiceItem(question.id, contexts, continuations, tuple(map(len, contexts)), question.gold)
    if style == "passage":
        text = f"{question.context}\nQuestion: {text.removesuffix('?')}?\nAnswer:"
    elif style == "question":
        text = f"Question: {text}\nAnswer:"
    continuations = tuple(f" {choice}" for choice in choices)
    return ChoiceItem(question.id, (text,) * len(choices), continuations, tuple(map(len, choices)), question.gold)


def encoded(tokenizer: PreTrainedTokenizerBase, context: str, continuation: str) -> tuple[list[int], int]:
    """Tokens of the whole text, and the column at which the continuation's begin.

    The text is tokenised whole and cut at the length of its context, whose trailing spaces go to the continuation.
    """
    ids: list[int] = tokenizer(context + continuation).input_ids
    return ids, len(tokenizer(context.rstrip()).input_ids)


@torch.no_grad()
def score_choices(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[ChoiceItem],
    *,
    batch_tokens: int,
    examples: Sequence[str] = (),
) -> list[ChoiceScore]:
    """Score each item after the solved `examples`, in the order of the items; nothing is cut.

    Raises `UserError` for an item that is longer than the model's context, or whose continuation has no token.
    """
    before = "".join(f"{example}{BETWEEN_EXAMPLES}" for example in examples)
    rows = [_branches(model, tokenizer, item, before) for item in items]
    shared = _shared_prefix(rows) if before else 0
    prefix = encode_prefix(model, rows[0].sequences[0][:shared])
    rows = [
        Branches(tuple(ids[shared:] for ids in row.sequences), tuple(start - shared for start in row.starts))
        for row in rows
    ]
    scores: dict[int, ChoiceScore] = {}
    for batch in token_batches([row.tokens for row in rows], batch_tokens):
        for index, logits in zip(batch, branch_logits(model, [rows[index] for index in batch], prefix), strict=True):
            wanted = [ids[start:] for ids, start in zip(rows[index].sequences, rows[index].starts, strict=True)]
            labels = torch.tensor([token for tokens in wanted for token in tokens], device=logits[0].device)
            losses = functional.cross_entropy(torch.cat(logits).float(), labels, reduction="none").double()
            sums = tuple(-float(part.sum()) for part in losses.split([len(tokens) for tokens in wanted]))
            scores[index] = ChoiceScore(items[index], sums, tuple(map(len, wanted)))
    return [scores[index] for index in range(len(items))]


def _branches(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, item: ChoiceItem, before: str) -> Branches:
    pairs = [
        encoded(tokenizer, before + context, continuation)
        for context, continuation in zip(item.contexts, item.continuations, strict=True)
    ]
    limit = model.config.get_text_config().max_position_embeddings
    for ids, start in pairs:
        if len(ids) > limit:
            raise UserError(f"{item.id}: has {len(ids)} tokens, the model reads {limit}: use fewer examples")
        if not 0 < start < len(ids):
            raise UserError(f"{item.id}: a choice without a token of its own cannot be scored: remove the item")
    return Branches(tuple(tuple(ids) for ids, _ in pairs), tuple(start for _, start in pairs))


def _shared_prefix(rows: Sequence[Branches]) -> int:
    """Tokens that all items begin with, at least one of each stem left over."""
    firsts = [row.sequences[0][: max(row.stem - 1, 0)] for row in rows]
    lowest, highest = min(firsts), max(firsts)  # in lexical order, the others lie between
    return next((n for n, (one, two) in enumerate(zip(lowest, highest, strict=False)) if one != two), len(lowest))
