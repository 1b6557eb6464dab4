"""The straight-through sampler against torch's gumbel_softmax, in values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from stillhouse.studies.consistency_lens.sampling import gumbel_noise, straight_through

BATCH, VOCABULARY, HIDDEN = 6, 17, 5


@pytest.fixture
def tensors() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    logits = torch.randn(BATCH, VOCABULARY, requires_grad=True)
    weight = torch.randn(VOCABULARY, HIDDEN, requires_grad=True)
    return logits, weight, torch.randn(BATCH, HIDDEN)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_values_and_gradients_equal_torchs_gumbel_softmax(
    tensors: tuple[torch.Tensor, ...], temperature: float
) -> None:
    logits, weight, towards = tensors
    torch.manual_seed(7)
    reference = functional.gumbel_softmax(logits, temperature, hard=True) @ weight
    expected = torch.autograd.grad((reference * towards).sum(), (logits, weight))

    torch.manual_seed(7)
    ids, embeddings = straight_through(logits, temperature, weight, gumbel_noise(logits))
    found = torch.autograd.grad((embeddings * towards).sum(), (logits, weight))

    torch.testing.assert_close(embeddings, reference)
    assert torch.equal(embeddings, weight[ids])
    torch.testing.assert_close(found, expected)


def test_without_noise_the_most_probable_token_is_taken(tensors: tuple[torch.Tensor, ...]) -> None:
    logits, weight, _ = tensors
    ids, _ = straight_through(logits, 1.0, weight, None)
    assert torch.equal(ids, logits.argmax(-1))


def test_sampling_follows_the_softmax_whatever_the_temperature() -> None:
    torch.manual_seed(0)
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    many = logits.expand(20_000, -1)
    with torch.no_grad():
        for temperature in (0.1, 5.0):
            ids, _ = straight_through(many, temperature, torch.eye(4), gumbel_noise(many))
            shares = torch.bincount(ids, minlength=4) / len(ids)
            torch.testing.assert_close(shares, logits.softmax(0), atol=0.02, rtol=0)


def test_a_frozen_embedding_matrix_gets_no_gradient(tensors: tuple[torch.Tensor, ...]) -> None:
    logits, weight, towards = tensors
    frozen = weight.detach()
    _, embeddings = straight_through(logits, 1.0, frozen, None)
    (embeddings * towards).sum().backward()
    assert frozen.grad is None and logits.grad is not None
