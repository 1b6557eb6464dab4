"""The generalised Jensen-Shannon divergence of GKD (arXiv 2306.13649, equation 1), with its gradient written out.

    D(T, S) = beta KL(T || M) + (1 - beta) KL(S || M),   M = beta T + (1 - beta) S

and at the ends of the range KL(T || S) for beta = 0, KL(S || T) for beta = 1. By the student's logits z at
temperature t, dD/dz = S (g - sum_v S g) / t with g = (1 - beta)(log S - log M); (S - T) / t for beta = 0; and
g = log S - log T for beta = 1. So the forward pass leaves one [rows, vocabulary] tensor, the gradient, where autograd
would keep four.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

# Rows that are worked on at once: temporaries of a few hundred rows stay small beside the logits.
ROWS_AT_ONCE = 256


def generalized_jsd(student: Tensor, teacher: Tensor, beta: float, temperature: float = 1.0) -> Tensor:
    """The divergence of each row in nats, fp32 [rows]; gradients reach the student alone.

    student, teacher: raw logits [rows, vocabulary].
    """
    divergence: Tensor = _GeneralizedJsd.apply(student, teacher, beta, temperature)
    return divergence


class _GeneralizedJsd(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, student: Tensor, teacher: Tensor, beta: float, temperature: float) -> Tensor:
        """Rows go through in chunks; each leaves its divergences and its part of the gradient."""
        divergences = student.new_empty(len(student), dtype=torch.float32)
        gradient = torch.empty_like(student) if context.needs_input_grad[0] else None
        for start in range(0, len(student), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            log_s = (student[rows].float() / temperature).log_softmax(-1)
            log_t = (teacher[rows].float() / temperature).log_softmax(-1)
            divergences[rows], slope = _chunk(log_s, log_t, beta)
            if gradient is not None:
                gradient[rows] = slope.div_(temperature)
        context.save_for_backward(gradient)
        return divergences

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        """The stored slope, times what comes from above."""
        (gradient,) = context.saved_tensors
        return gradient * gradients[0][:, None].to(gradient.dtype), None, None, None


def _chunk(log_s: Tensor, log_t: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Divergences [rows] and their slope by log-softmax's input [rows, vocabulary]; overwrites both arguments."""
    s = log_s.exp()
    if beta == 0:
        t = log_t.exp()
        return (t * log_t.sub_(log_s)).sum(-1), s.sub_(t)
    if beta == 1:
        ratio = log_s.sub_(log_t)
        expected = (s * ratio).sum(-1, keepdim=True)
        return expected[:, 0], ratio.sub_(expected).mul_(s)
    log_m = torch.logaddexp(log_s + math.log1p(-beta), log_t + math.log(beta))
    t = log_t.exp()
    divergence = beta * (t * log_t.sub_(log_m)).sum(-1)
    ratio = log_s.sub_(log_m)
    expected = (s * ratio).sum(-1, keepdim=True)
    divergence += (1 - beta) * expected[:, 0]
    return divergence, ratio.sub_(expected).mul_(s).mul_(1 - beta)
