"""Negative log-likelihood of gold answers, a graded measure that moves where accuracy is still zero, and of texts.

A text is scored in sliding windows, each a `Sequence` whose answer is what the window adds: perplexity is the
exponential of nats per token over all of them. Computed by the training engine, never by vLLM, whose bf16 logits
differ. Only rows that predict answer tokens pass through the lm_head, and the softmax is taken in fp32 whatever the
model's precision. Divide sums of nats by sums of tokens (`statistics.bootstrap_ratio_interval`) for nats per token.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from stillhouse.data.packing import Sequence
from stillhouse.models.prefix import encode_prefix, shared_prefix_length, suffix_logits, token_batches


@dataclass(frozen=True)
class AnswerNll:
    """Negative log-likelihood of one answer, summed over its tokens."""

    sum_nats: float
    tokens: int


def text_tokens(tokenizer: PreTrainedTokenizerBase, passages: Iterable[str], limit: int | None = None) -> list[int]:
    """The tokens of a text, its passages joined by empty lines; at most the first `limit`."""
    ids: list[int] = tokenizer("\n\n".join(passages), verbose=False).input_ids
    return ids[:limit]


def sliding_windows(ids: list[int], window: int, stride: int, name: str = "window") -> list[Sequence]:
    """Windows of at most `window` tokens over a text that together score each of its tokens but the first once.

    The first window scores all that it can, every other one the `stride` tokens that it adds (the last one perhaps
    fewer), with the `window - stride` tokens before them as context at least.
    """
    if len(ids) < 2:
        raise ValueError("a text needs two tokens: the first is context only")
    windows: list[Sequence] = []
    scored = 1
    while scored < len(ids):
        end = min(len(ids), window if scored == 1 else scored + stride)
        start = max(0, end - window)
        windows.append(Sequence(ids[start:end], scored - start, f"{name}-{len(windows)}"))
        scored = end
    return windows


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
