"""The gold answer's negative log-likelihood: a graded measure that moves where accuracy is still zero.

Computed by the training engine, never by vLLM, whose bf16 logits differ. Only rows that predict answer tokens pass
through the lm_head, and the softmax is taken in fp32 whatever the model's precision. Divide sums of nats by sums
of tokens (`statistics.bootstrap_ratio_interval`) for nats per token.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from stillhouse.data.packing import Sequence
from stillhouse.models.prefix import encode_prefix, shared_prefix_length, suffix_logits, token_batches


@dataclass(frozen=True)
class AnswerNll:
    """Negative log-likelihood of one answer, summed over its tokens."""

    sum_nats: float
    tokens: int


@torch.no_grad()
def answer_nll(
    model: nn.Module, sequences: Iterable[Sequence], batch_tokens: int = 8192, *, share_prefix: bool = False
) -> list[AnswerNll]:
    """Negative log-likelihood of each sequence's answer, given its prompt, in the order of `sequences`.

    `batch_tokens` bounds rows times longest row of one forward pass. `share_prefix` computes the tokens that all
    prompts have in common (fixed shots) once; the values are the same but for rounding. Dropout is off during the
    call, and the model's mode is as before after it.
    """
    sequences = list(sequences)
    ids, starts = [sequence.input_ids for sequence in sequences], [item.answer_start for item in sequences]
    offset = shared_prefix_length(ids, starts) if share_prefix else 0
    results: list[AnswerNll | None] = [None] * len(sequences)
    was_training = model.training
    model.eval()
    try:
        prefix = encode_prefix(model, ids[0][:offset]) if sequences else None
        for batch in token_batches([len(row) - offset for row in ids], batch_tokens):
            suffixes = [ids[index][offset:] for index in batch]
            logits = suffix_logits(model, suffixes, [starts[index] - 1 - offset for index in batch], prefix)
            for index, rows in zip(batch, logits, strict=True):
                labels = torch.tensor(ids[index][starts[index] :], device=rows.device)
                nats = functional.cross_entropy(rows[:-1].float(), labels, reduction="none")
                results[index] = AnswerNll(nats.double().sum().item(), len(labels))
    finally:
        model.train(was_training)
    return [result for result in results if result is not None]
