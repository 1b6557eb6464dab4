"""Controls: each puts something else where the lens's explanation or reconstruction would stand."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from stillhouse.models.activations import swapped
from stillhouse.models.loading import load_model, load_tokenizer
from stillhouse.studies.consistency_lens import controls
from stillhouse.studies.consistency_lens.data import CachedExamples, Example
from tests.consistency_lens.conftest import Artefacts
from tests.consistency_lens.corpus import activation_settings


@pytest.fixture
def examples(artefacts: Artefacts) -> list[Example]:
    cached = CachedExamples(artefacts.activations, "test", activation_settings(), artefacts.model)
    return [cached[index] for index in range(len(cached))]


def test_original_tokens_end_with_the_chosen_one_and_are_filled_before_the_start(examples: Sequence[Example]) -> None:
    texts = controls.original_tokens(examples, 6, filler=1)
    for text, example in zip(texts.tolist(), examples, strict=True):
        seen = example.token_ids[: example.position + 1].tolist()
        assert text == ([1] * 6 + seen)[-6:]


def test_shuffled_keeps_each_texts_tokens_and_is_fixed_by_the_seed() -> None:
    texts = torch.arange(40).reshape(5, 8)
    mixed = controls.shuffled(texts, seed=1)
    assert not torch.equal(mixed, texts)
    assert torch.equal(mixed.sort(dim=1).values, texts)
    assert torch.equal(mixed, controls.shuffled(texts, seed=1))


def test_the_hard_coded_text_is_cut_or_repeated_to_the_explanations_length(artefacts: Artefacts) -> None:
    tokenizer = load_tokenizer(artefacts.model)
    tokens = tokenizer("Ada buys apples", add_special_tokens=False).input_ids
    long = controls.hard_coded(tokenizer, "Ada buys apples", 2 * len(tokens) + 1, 3)
    assert long.tolist() == [[*tokens, *tokens, tokens[0]]] * 3
    assert controls.hard_coded(tokenizer, "Ada buys apples", 2, 1).tolist() == [tokens[:2]]


def test_continuations_are_greedy_one_document_at_a_time(artefacts: Artefacts, examples: Sequence[Example]) -> None:
    model = load_model(artefacts.model, "fp32")
    together = controls.text_continuation(model, examples, 4, batch_size=3)
    for example, written in zip(examples, together.tolist(), strict=True):
        ids = example.token_ids[: example.position + 1]
        for token in written:
            assert int(model(ids[None]).logits[0, -1].argmax()) == token
            ids = torch.cat([ids, torch.tensor([token])])


def test_a_continuation_with_the_activation_swapped_for_itself_is_the_originals(
    artefacts: Artefacts, examples: Sequence[Example]
) -> None:
    model = load_model(artefacts.model, "fp32")
    for example in examples[:3]:
        assert example.activation is not None
        place = torch.tensor([example.position])
        plain = controls.continuations(model, [example], 5)
        with swapped(model, 1, place, example.activation[None]):
            same = controls.continuations(model, [example], 5, cached=False)
        with swapped(model, 1, place, -20 * example.activation[None]):
            other = controls.continuations(model, [example], 5, cached=False)
        assert torch.equal(plain, same)
        assert not torch.equal(plain, other)


def linear_examples(count: int, embeddings: torch.Tensor, weights: torch.Tensor) -> list[Example]:
    """Activations that are a linear function of the regression's features."""
    made = []
    for number in range(count):
        tokens = torch.randint(len(embeddings), (9,), generator=torch.Generator().manual_seed(number))
        read = embeddings[tokens[:8]]
        made.append(Example(str(number), tokens, 7, torch.cat([read[-1], read.mean(0)]) @ weights + 3))
    return made


def test_the_regression_finds_a_linear_function_of_the_text() -> None:
    chance = torch.Generator().manual_seed(0)
    embeddings, weights = torch.randn(50, 6, generator=chance), torch.randn(12, 5, generator=chance)
    made = linear_examples(300, embeddings, weights)
    regression = controls.TextRegression(embeddings, made[:200], made[200:250])
    expected = torch.stack([example.activation for example in made[250:]])  # type: ignore[misc]
    torch.testing.assert_close(regression.predict(made[250:]), expected, atol=0.05, rtol=0.01)


def test_the_regression_is_the_closed_form_at_the_strength_that_validation_likes_best() -> None:
    chance = torch.Generator().manual_seed(0)
    embeddings = torch.randn(50, 6, generator=chance).double()
    noise = linear_examples(60, embeddings.float(), torch.zeros(12, 5))
    made = [Example(e.document_id, e.token_ids, e.position, torch.randn(5, generator=chance)) for e in noise]
    train, validation = made[:40], made[40:]
    regression = controls.TextRegression(embeddings, train, validation)

    def features(examples: Sequence[Example]) -> torch.Tensor:
        reads = [embeddings[example.token_ids[:8]] for example in examples]
        return torch.stack([torch.cat([read[-1], read.mean(0)]) for read in reads])

    inputs, targets = features(train), torch.stack([e.activation for e in train]).double()  # type: ignore[misc]
    held_out = torch.stack([example.activation for example in validation]).double()  # type: ignore[misc]
    centred, errors, predictions = inputs - inputs.mean(0), [], []
    unit = torch.linalg.eigvalsh(centred @ centred.T).mean()
    for strength in controls.RIDGE_STRENGTHS:
        penalty = strength * unit * torch.eye(12, dtype=torch.float64)
        weights = torch.linalg.solve(centred.T @ centred + penalty, centred.T @ (targets - targets.mean(0)))
        predictions.append((features(validation) - inputs.mean(0)) @ weights + targets.mean(0))
        errors.append(float((predictions[-1] - held_out).square().sum()))
    best = predictions[errors.index(min(errors))]
    torch.testing.assert_close(regression.predict(validation).double(), best, atol=1e-5, rtol=1e-5)
    # Of targets that are noise the strongest penalty predicts best: nearly the mean.
    assert errors.index(min(errors)) == len(errors) - 1
