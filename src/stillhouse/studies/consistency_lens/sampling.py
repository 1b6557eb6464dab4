"""Tokens that pass gradients: straight-through Gumbel-softmax (Jang et al., arXiv 1611.01144), as embeddings.

Forward, a token is the one-hot argmax of logits plus Gumbel noise, a sample of softmax(logits) whatever the
temperature; backward it is softmax((logits + noise) / temperature). Fused with the look-up in the embedding matrix, so
that the forward pass multiplies nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def gumbel_noise(logits: Tensor) -> Tensor:
    """Standard Gumbel noise like `logits`, in fp32, from torch's global generator."""
    return -torch.empty_like(logits, dtype=torch.float32).exponential_().log()


class _StraightThroughEmbedding(torch.autograd.Function):
    """weight[ids] forward; backward as if the one-hot ids were `probabilities`."""

    @staticmethod
    def forward(context: Any, probabilities: Tensor, ids: Tensor, weight: Tensor) -> Tensor:
        context.save_for_backward(ids, weight)
        return functional.embedding(ids, weight)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        [gradient] = gradients
        ids, weight = context.saved_tensors
        for_probabilities = for_weight = None
        if context.needs_input_grad[0]:
            for_probabilities = gradient.float() @ weight.float().T
        if context.needs_input_grad[2]:
            for_weight = torch.zeros_like(weight).index_add_(0, ids, gradient.to(weight.dtype))
        return for_probabilities, None, for_weight


def straight_through(logits: Tensor, temperature: float, weight: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
    """Token ids [batch] and their rows [batch, hidden] of the embedding matrix `weight` [vocabulary, hidden].

    logits: [batch, vocabulary]. noise: the same shape, or None for the most probable token.
    Values and gradients equal `functional.gumbel_softmax(logits, temperature, hard=True) @ weight`.
    """
    perturbed = logits.float() if noise is None else logits.float() + noise
    ids = perturbed.detach().argmax(-1)
    if not torch.is_grad_enabled():
        return ids, functional.embedding(ids, weight)
    probabilities = functional.softmax(perturbed / temperature, dim=-1)
    embeddings: Tensor = _StraightThroughEmbedding.apply(probabilities, ids, weight)
    return ids, embeddings
