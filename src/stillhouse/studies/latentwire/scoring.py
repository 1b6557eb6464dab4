"""One reader's answers to a batch of prompts: likelihood of the gold answer, rank of its first token, and greedy text.

Stands between the arms, which make prompts, and `evaluate`, which keeps rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from stillhouse.studies.latentwire.config import AnswerGenerationSettings
from stillhouse.studies.latentwire.data import AnswerTokens, WireExample, answer_tokens
from stillhouse.studies.latentwire.prompt import Prompt, ReadPrompt
from stillhouse.studies.latentwire.reader import Reader


@dataclass(frozen=True)
class Presentation:
    """How one arm presents every example to one reader.

    render: the prompts of a batch, from the examples' indices. content: positions that carry the content, per
    example, without BOS and anchor. bytes: what is sent for each; None where the arm sends nothing that counts.
    prepared: seconds that each took before: encoding and packing, or cutting, compressing and tokenising.
    """

    render: Callable[[Sequence[int]], Prompt]
    content: Sequence[int]
    bytes: Sequence[int | None]
    prepared: Sequence[float] | float = 0.0

    @property
    def order(self) -> list[int]:
        """The examples, longest first: prompts of like length share a batch."""
        return sorted(range(len(self.content)), key=lambda index: -self.content[index])


@dataclass(frozen=True)
class ItemScore:
    """What one reader made of one prompt.

    gold_nll: nats of the first gold answer, summed over its `gold_tokens`, its end included. first_token: the most
    likely one. first_token_rank: of the best-ranked first token of any gold answer, from 1. output: None where
    nothing was generated. seconds: the item's share of its batch, without what prepared it.
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
    reader: Reader,
    examples: Sequence[WireExample],
    presentation: Presentation,
    settings: ScoringSettings,
    indices: Collection[int] | None = None,
) -> dict[int, ItemScore]:
    """The scores of the examples at `indices` (None: all)."""
    wanted = [index for index in presentation.order if indices is None or index in indices]
    scores: dict[int, ItemScore] = {}
    for batch in batches(wanted, settings.batch_size):
        began = time.monotonic()
        read = reader.read(presentation.render(batch))
        found = _gold_scores(reader, read, [examples[index] for index in batch])
        if settings.generation is not None:
            outputs = reader.generate(read, settings.generation)
            found = [replace(one, output=output) for one, output in zip(found, outputs, strict=True)]
        seconds = (time.monotonic() - began) / len(batch)
        scores |= {index: replace(one, seconds=seconds) for index, one in zip(batch, found, strict=True)}
    return scores


@torch.no_grad()
def candidate_nll(
    reader: Reader, presentation: Presentation, candidates: Sequence[str], batch_size: int
) -> list[float]:
    """Nats per token of one candidate answer per example, its end included."""
    nll = [0.0] * len(candidates)
    for batch in batches(presentation.order, batch_size):
        answers = answer_tokens([reader.answer_ids(candidates[index]) for index in batch])
        sums, counts = _sums(reader, reader.read(presentation.render(batch)), answers)
        for index, value in zip(batch, (sums / counts).tolist(), strict=True):
            nll[index] = value
    return nll


def batches(indices: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """Consecutive parts of at most `size`."""
    for start in range(0, len(indices), size):
        yield indices[start : start + size]


def _gold_scores(reader: Reader, read: ReadPrompt, examples: Sequence[WireExample]) -> list[ItemScore]:
    answers = answer_tokens([reader.answer_ids(example.answer) for example in examples])
    sums, counts = _sums(reader, read, answers)
    scores = []
    for row, example in enumerate(examples):
        logits = read.first_logits[row].float()
        golds = {reader.answer_ids(gold)[0] for gold in example.answers or ("",)}
        best = logits[torch.tensor(sorted(golds), device=logits.device)].max()
        rank = int((logits > best).sum()) + 1
        scores.append(ItemScore(sums[row].item(), int(counts[row]), int(logits.argmax()), rank, None, 0.0))
    return scores


def _sums(reader: Reader, read: ReadPrompt, answers: AnswerTokens) -> tuple[Tensor, Tensor]:
    """Nats and tokens per answer, [batch] each."""
    logits, labels, example = reader.logits_after(read, answers.to(reader.device))
    nats = functional.cross_entropy(logits.float(), labels, reduction="none").double()
    batch = len(read.prompt)
    sums = torch.zeros(batch, dtype=torch.float64, device=nats.device).index_add_(0, example, nats)
    return sums, torch.bincount(example, minlength=batch)
