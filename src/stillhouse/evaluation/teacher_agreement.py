"""How far a model is from its teacher on given tokens: KL divergence and agreement of the likeliest token.

The teacher's final hidden states are computed once and serve every model: with the teacher's output embeddings they
give its logits again, exactly, and are a hundred times smaller. Only rows that predict an answer's token are
computed; the softmax is taken in fp32 whatever the models' precision.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from stillhouse.data.packing import Sequence
from stillhouse.models.output_head import OutputHead
from stillhouse.models.prefix import suffix_hidden_states, suffix_logits, token_batches

# Rows of logits that are compared at once: a few hundred keep temporaries small beside the model.
ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class TokenScores:
    """Per token of one sequence's answer, each [tokens] fp32 on the CPU.

    nll: of the text's own token, nats. kl: KL(teacher || model), nats. agrees: whether both find one token likeliest.
    """

    nll: Tensor
    kl: Tensor
    agrees: Tensor


@torch.no_grad()
def teacher_states(teacher: nn.Module, sequences: Items[Sequence], batch_tokens: int) -> list[Tensor]:
    """The teacher's final hidden states [answer tokens, hidden] that predict each sequence's answer."""
    states: dict[int, Tensor] = {}
    for batch in token_batches(list(map(len, sequences)), batch_tokens):
        ids, starts = _columns(sequences, batch)
        for index, rows in zip(batch, suffix_hidden_states(teacher, ids, starts), strict=True):
            states[index] = rows[:-1].clone()
    return [states[index] for index in range(len(sequences))]


@torch.no_grad()
def token_scores(
    model: nn.Module, sequences: Items[Sequence], states: Items[Tensor], head: OutputHead, batch_tokens: int
) -> list[TokenScores]:
    """Compare `model`, in evaluation mode, with the teacher whose `states` and output embeddings `head` these are."""
    scores: dict[int, TokenScores] = {}
    for batch in token_batches(list(map(len, sequences)), batch_tokens):
        ids, starts = _columns(sequences, batch)
        for index, logits in zip(batch, suffix_logits(model, ids, starts), strict=True):
            labels = torch.tensor(sequences[index].answer_ids, device=logits.device)
            scores[index] = _compared(logits[:-1], states[index].to(logits.device), head, labels)
    return [scores[index] for index in range(len(sequences))]


def _columns(sequences: Items[Sequence], batch: Items[int]) -> tuple[list[list[int]], list[int]]:
    """The sequences of a batch, and the column before each one's answer."""
    return [sequences[index].input_ids for index in batch], [sequences[index].answer_start - 1 for index in batch]


def _compared(logits: Tensor, hidden: Tensor, head: OutputHead, labels: Tensor) -> TokenScores:
    parts = []
    for start in range(0, len(labels), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        ours = logits[rows].float().log_softmax(-1)
        theirs = head.logits(hidden[rows]).float().log_softmax(-1)
        nll = functional.nll_loss(ours, labels[rows], reduction="none")
        agrees = (ours.argmax(-1) == theirs.argmax(-1)).float()
        kl = (theirs.exp() * (theirs - ours)).sum(-1)
        parts.append(torch.stack([nll, kl, agrees]).cpu())
    return TokenScores(*torch.cat(parts, dim=1))
