"""One reader's answers to a batch of prompts: likelihood of the gold answer, rank of its first token, and greedy text.

Stands between the arms, which make prompts, and `evaluate`, which keeps rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from stillhouse.evaluation.reading_comprehension import SquadVersion, score_reading_answer
from stillhouse.studies.latentwire.config import AnswerGenerationSettings
from stillhouse.studies.latentwire.data import AnswerTokens, WireExample, answer_tokens
from stillhouse.studies.latentwire.reader import Prompt, Reader

Render = Callable[[Sequence[int]], Prompt]


@dataclass(frozen=True)
class ItemScore:
    """What one reader made of one prompt.

    gold_nll: nats of the first gold answer, summed over its `gold_tokens`, its end included. first_token: the most
    likely one. first_token_rank: of the best-ranked first token of any gold answer, from 1. output: None where
    nothing was generated. seconds: the item's share of its batch.
    """

    gold_nll: float
    gold_tokens: int
    first_token: int
    first_token_rank: int
    output: str | None
    seconds: float


@dataclass(frozen=True)
class ScoringSettings:
    """generation: None where likelihoods are enough."""

    batch_size: int
    generation: AnswerGenerationSettings | None


@torch.no_grad()
def score_items(
    reader: Reader, examples: Sequence[WireExample], render: Render, settings: ScoringSettings, order: Sequence[int]
) -> list[ItemScore]:
    """Score all examples; `render` makes the prompts of a batch from the examples' indices.

    `order` lists the indices so that prompts of like length share a batch. Results are in the examples' order.
    """
    scores: dict[int, ItemScore] = {}
    for start in range(0, len(order), settings.batch_size):
        indices = order[start : start + settings.batch_size]
        began = time.monotonic()
        prompt = render(indices)
        batch = _gold_scores(reader, prompt, [examples[index] for index in indices])
        if settings.generation is not None:
            outputs = reader.generate(prompt, settings.generation)
            batch = [replace(one, output=output) for one, output in zip(batch, outputs, strict=True)]
        seconds = (time.monotonic() - began) / len(indices)
        scores |= {index: replace(one, seconds=seconds) for index, one in zip(indices, batch, strict=True)}
    return [scores[index] for index in range(len(examples))]


@torch.no_grad()
def candidate_nll(reader: Reader, prompt: Prompt, candidates: Sequence[str]) -> Tensor:
    """Nats per token of one candidate answer per prompt, [batch], its end included."""
    answers = answer_tokens([reader.answer_ids(candidate) for candidate in candidates])
    sums, counts = _sums(reader, prompt, answers)[:2]
    return sums / counts


def graded(score: ItemScore, example: WireExample, version: SquadVersion) -> dict[str, object]:
    """The item's columns: the score, and the output against all gold answers."""
    row: dict[str, object] = dict(vars(score))
    if score.output is not None:
        grade = score_reading_answer(score.output, example.answers, version)
        row |= {"exact": grade.exact, "f1": grade.f1}
    return row


def _gold_scores(reader: Reader, prompt: Prompt, examples: Sequence[WireExample]) -> list[ItemScore]:
    answers = answer_tokens([reader.answer_ids(example.answer) for example in examples])
    sums, counts, first = _sums(reader, prompt, answers)
    scores = []
    for row, example in enumerate(examples):
        logits = first[row]
        golds = {reader.answer_ids(gold)[0] for gold in example.answers or ("",)}
        best = logits[torch.tensor(sorted(golds), device=logits.device)].max()
        rank = int((logits > best).sum()) + 1
        scores.append(ItemScore(sums[row].item(), int(counts[row]), int(logits.argmax()), rank, None, 0.0))
    return scores


def _sums(reader: Reader, prompt: Prompt, answers: AnswerTokens) -> tuple[Tensor, Tensor, Tensor]:
    """Nats and tokens per answer, [batch] each, and the logits that predict the first tokens, [batch, vocabulary]."""
    rows = reader.answer_rows(prompt, answers.to(prompt.inputs_embeds.device))
    logits = rows.logits.float()
    nats = functional.cross_entropy(logits, rows.labels, reduction="none").double()
    batch = len(prompt.inputs_embeds)
    sums = torch.zeros(batch, dtype=torch.float64, device=nats.device).index_add_(0, rows.example, nats)
    counts = torch.bincount(rows.example, minlength=batch)
    return sums, counts, logits[rows.position == 0]
