"""The loss against its naive form: whole passes, torch's own KL, one term after another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical
from torch.nn import functional

from stillhouse.studies.consistency_lens.data import ActivationBatch
from stillhouse.studies.consistency_lens.model import Lens
from stillhouse.studies.consistency_lens.objective import LensObjective, language_model_kl
from stillhouse.studies.consistency_lens.run_settings import LensSchedules, LossSettings
from tests.consistency_lens.lenses import (
    lens_batch,
    naive_explanation,
    naive_original_logits,
    naive_reconstruction,
    perturbed,
    tiny_lens,
)

EVERY_TERM = {"reconstruction_kl": 0.7, "resample_kl": 0.4, "language_model": 2.0, "entropy": -0.1, "mse": 0.3}
TEMPERATURE, ALPHA = 0.6, 0.25


@pytest.fixture
def lens(tiny_model: Path) -> Lens:
    return perturbed(tiny_lens(tiny_model))


def objective(**settings: Any) -> LensObjective:
    schedules = LensSchedules(temperature=str(TEMPERATURE), alpha=f"0, linear to {ALPHA} over 2s")
    return LensObjective(LossSettings.model_validate(EVERY_TERM | settings), schedules, steps_per_epoch=4)


def kl(left: Tensor, right: Tensor) -> Tensor:
    return torch.distributions.kl_divergence(Categorical(logits=left), Categorical(logits=right))


def naive_terms(lens: Lens, batch: ActivationBatch, settings: LossSettings) -> dict[str, Tensor]:
    """The sums of the terms; torch's generator is used as the objective uses it."""
    assert batch.activations is not None and batch.other_activations is not None
    ids, text, logits = naive_explanation(lens, batch.activations, TEMPERATURE, True)
    reconstruction = naive_reconstruction(lens, text)
    _, other_text, _ = naive_explanation(lens, batch.other_activations, TEMPERATURE, True)
    error = batch.other_activations - naive_reconstruction(lens, other_text)
    if settings.resample_stop_gradient:
        error = error.detach()
    document = (batch.input_ids, batch.attention_mask, batch.positions)
    expected = naive_original_logits(lens, *document, batch.activations)
    read = lens.original(ids).logits.detach()
    if settings.language_model_positions == "one_late":
        language_model = torch.stack([kl(logits[:, t], read[:, t]) for t in range(4)]).mean(0)
    else:
        language_model = torch.stack([kl(logits[:, t], read[:, t - 1]) for t in range(1, 4)]).mean(0)
    return {
        "reconstruction_kl": kl(expected, naive_original_logits(lens, *document, reconstruction)).sum(),
        "resample_kl": kl(expected, naive_original_logits(lens, *document, reconstruction + error)).sum(),
        "language_model": language_model.sum(),
        "entropy": Categorical(logits=logits).entropy().mean(1).sum(),
        "mse": functional.mse_loss(reconstruction, batch.activations, reduction="none").mean(1).sum(),
    }


@pytest.mark.parametrize(
    "changes",
    [{}, {"resample_stop_gradient": False}, {"language_model_positions": "one_late"}, {"resample_kl": 0.0}],
    ids=lambda changes: ",".join(changes) or "as corrected",
)
def test_loss_terms_and_gradients_equal_the_naive_form(lens: Lens, changes: dict[str, Any]) -> None:
    batch, loss = lens_batch(lens), objective(**changes)
    parameters = [parameter for _, parameter in lens.trained_parameters()]
    torch.manual_seed(2)
    expected = naive_terms(lens, batch, loss.settings)
    weights = {**EVERY_TERM, **{k: v for k, v in changes.items() if k in EVERY_TERM}}
    weights["language_model"] *= ALPHA
    total = sum(weights[name] * expected[name] for name in expected)
    torch.manual_seed(2)
    found = loss(lens, batch, step=9)

    assert found.count == 3
    torch.testing.assert_close(
        {name: found.terms[name] for name in expected},
        {n: v.detach() for n, v in expected.items()},
        atol=1e-3,
        rtol=1e-3,
    )
    torch.testing.assert_close(found.total, total, atol=1e-3, rtol=1e-3)
    found_gradients = torch.autograd.grad(found.total, parameters)
    torch.testing.assert_close(found_gradients, torch.autograd.grad(total, parameters), atol=5e-3, rtol=5e-3)


def test_every_term_is_logged_whatever_its_weight(lens: Lens) -> None:
    only_mse = dict.fromkeys(EVERY_TERM, 0.0) | {"mse": 1.0}
    torch.manual_seed(2)
    found = objective(**only_mse)(lens, lens_batch(lens), step=1)
    assert set(found.terms) == {*EVERY_TERM, "temperature", "alpha", "noise"}
    assert all(float(found.terms[name]) > 0 for name in EVERY_TERM)
    assert found.total.item() == pytest.approx(found.terms["mse"].item())
    assert float(found.terms["alpha"]) == pytest.approx(3 * ALPHA / 2)
    assert float(found.terms["temperature"]) == pytest.approx(3 * TEMPERATURE)


def test_without_noise_training_explains_greedily(lens: Lens) -> None:
    batch = lens_batch(lens)
    silent = LensObjective(LossSettings(), LensSchedules(noise="1, linear to 0 over 4s"), steps_per_epoch=4)
    (half, sampled), (first, second) = (
        [float(silent(lens, batch, step).terms["mse"]) for _ in "ab"] for step in (2, 4)
    )
    assert half != sampled
    assert first == second == pytest.approx(float(silent.validation(lens, batch).terms["mse"]))


def test_identity_projections_start_where_the_model_alone_puts_the_loss(tiny_model: Path) -> None:
    """No projection at all in the expected value: text from the model's own prompt, its own hidden state back."""
    lens = tiny_lens(tiny_model)
    batch = lens_batch(lens)
    assert batch.activations is not None
    found = objective().validation(lens, batch)

    original = lens.original
    read = torch.cat(
        [lens.decoder.before.expand(3, -1, -1), batch.activations[:, None], lens.decoder.after.expand(3, -1, -1)], 1
    )
    ids = []
    for _ in range(4):
        ids.append(original(inputs_embeds=read).logits[:, -1].argmax(-1))
        read = torch.cat([read, original.get_input_embeddings()(ids[-1])[:, None]], 1)
    text = original.get_input_embeddings()(torch.stack(ids, 1))
    around = [lens.encoder.before.expand(3, -1, -1), text, lens.encoder.after.expand(3, -1, -1)]
    reconstruction = original(inputs_embeds=torch.cat(around, 1), output_hidden_states=True).hidden_states[1][:, -1]
    torch.testing.assert_close(found.terms["mse"], (reconstruction - batch.activations).square().mean(1).sum())
    document = (batch.input_ids, batch.attention_mask, batch.positions)
    expected = kl(*(naive_original_logits(lens, *document, a) for a in (batch.activations, reconstruction))).sum()
    torch.testing.assert_close(found.terms["reconstruction_kl"], expected, atol=1e-4, rtol=1e-4)


def test_activations_cached_and_on_the_fly_give_the_same_loss(lens: Lens) -> None:
    results = []
    for cached in (True, False):
        torch.manual_seed(2)
        results.append(objective()(lens, lens_batch(lens, cached=cached), step=3))
    torch.testing.assert_close(results[0].total, results[1].total, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(results[0].terms, results[1].terms, atol=1e-3, rtol=1e-4)


def test_aligned_predictions_of_the_same_model_do_not_differ_and_one_late_ones_do(lens: Lens) -> None:
    ids = torch.randint(3, 384, (2, 6), generator=torch.Generator().manual_seed(1))
    logits = lens.text_logits(ids)
    # What a decoder without prompt or activation would say of each token: the original itself, one position earlier.
    of_each_token = torch.cat([torch.zeros_like(logits[:, :1]), logits[:, :-1]], 1)
    torch.testing.assert_close(language_model_kl(of_each_token, logits), torch.zeros(2), atol=1e-5, rtol=0)
    assert (language_model_kl(of_each_token, logits, one_late=True) > 0.01).all()
    assert torch.equal(language_model_kl(of_each_token[:, :1], logits[:, :1]), torch.zeros(2))


def test_the_validation_loss_has_no_noise_and_the_final_alpha(lens: Lens) -> None:
    batch, loss = lens_batch(lens), objective()
    first, second = loss.validation(lens, batch), loss.validation(lens, batch)
    assert torch.equal(first.total, second.total) and not first.total.requires_grad
    weights = EVERY_TERM | {"language_model": EVERY_TERM["language_model"] * ALPHA}
    assert float(first.total) == pytest.approx(
        sum(w * float(first.terms[name]) for name, w in weights.items()), rel=1e-5
    )
