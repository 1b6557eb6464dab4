"""The divergence is TRL's, and its written-out gradient is autograd's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from stillhouse.studies.quantized_distillation.divergence import ROWS_AT_ONCE, generalized_jsd

BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]


def logits(rows: int = 7, vocabulary: int = 33) -> tuple[Tensor, Tensor]:
    drawing = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(rows, vocabulary, generator=drawing) * 3 for _ in range(2))
    return student.requires_grad_(), teacher


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("beta", BETAS)
def test_value_and_gradient_equal_trl(beta: float, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.gkd import GKDTrainer

    student, teacher = logits()
    labels = torch.zeros(1, len(student), dtype=torch.long)
    theirs = GKDTrainer.generalized_jsd_loss(student[None], teacher[None], labels, beta, temperature)
    [expected] = torch.autograd.grad(theirs, student)
    ours = generalized_jsd(student, teacher, beta, temperature).sum() / len(student)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.autograd.grad(ours, student)[0], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("beta", BETAS)
def test_rows_are_weighed_one_by_one_whatever_their_number(beta: float) -> None:
    student, teacher = logits(rows=ROWS_AT_ONCE + 3)
    weights = torch.rand(len(student))
    [together] = torch.autograd.grad((generalized_jsd(student, teacher, beta) * weights).sum(), student)
    for row in (0, ROWS_AT_ONCE - 1, ROWS_AT_ONCE, len(student) - 1):
        own = student[row : row + 1]
        alone = generalized_jsd(own, teacher[row : row + 1], beta)
        [gradient] = torch.autograd.grad(alone.sum() * weights[row], own)
        torch.testing.assert_close(together[row], gradient[0], rtol=1e-5, atol=1e-7)


def test_the_ends_are_the_two_kl_divergences_and_equal_models_have_none() -> None:
    student, teacher = logits()
    s, t = student.log_softmax(-1), teacher.log_softmax(-1)
    forward = functional.kl_div(s, t, reduction="none", log_target=True).sum(-1)
    reverse = functional.kl_div(t, s, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(generalized_jsd(student, teacher, 0.0), forward, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(generalized_jsd(student, teacher, 1.0), reverse, rtol=1e-5, atol=1e-6)
    for beta in BETAS:
        assert generalized_jsd(teacher, teacher, beta).abs().max() < 1e-6


def test_bf16_logits_are_compared_in_fp32() -> None:
    student, teacher = (each.detach().bfloat16() for each in logits())
    ours = generalized_jsd(student, teacher, 0.5)
    torch.testing.assert_close(ours, generalized_jsd(student.float(), teacher.float(), 0.5), rtol=0, atol=0)
