"""The loss of the lens: whether the original behaves the same, and whether the text is one.

Per example, with A the activation, A^ its reconstruction, p(.) the original's next-token distribution when the
argument stands at the chosen token:

- reconstruction_kl: KL(p(A) || p(A^)).
- resample_kl: KL(p(A) || p(A^ + A' - A'^)), A' of another document: the reconstruction must be right where
  another activation's error is added to it.
- language_model: KL of the decoder's distribution over a token against the original's, which has read the text before
  that token, not the activation; mean over the tokens that have such a text. Times alpha(step).
- entropy of the decoder's distributions, mean over tokens; mse of A^, mean over dimensions.

`one_late` compares with the original's logits one position late, as the published code does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from stillhouse.studies.consistency_lens.data import ActivationBatch
from stillhouse.studies.consistency_lens.model import Lens
from stillhouse.studies.consistency_lens.run_settings import LensSchedules, LossSettings
from stillhouse.studies.consistency_lens.schedules import parse_schedule
from stillhouse.training.objective import LossTerms


@dataclass(frozen=True)
class LensTerms:
    """The terms of a batch, each [batch], unweighted. Those of weight 0 carry no gradient."""

    reconstruction_kl: Tensor
    resample_kl: Tensor
    language_model: Tensor
    entropy: Tensor
    mse: Tensor


class LensObjective:
    """The weighted sum of the terms, for the training loop and for the validation loss."""

    def __init__(self, settings: LossSettings, schedules: LensSchedules, steps_per_epoch: float) -> None:
        self.settings, self.steps_per_epoch = settings, steps_per_epoch
        self.temperature, self.alpha = parse_schedule(schedules.temperature), parse_schedule(schedules.alpha)
        self.noise = parse_schedule(schedules.noise)

    def __call__(self, model: nn.Module, micro_batch: ActivationBatch, step: int) -> LossTerms:
        """The sums of loss and terms over the examples; what follows a schedule is logged with them."""
        assert isinstance(model, Lens)
        temperature = self.temperature.value(step, self.steps_per_epoch)
        alpha = self.alpha.value(step, self.steps_per_epoch)
        noise = self.noise.value(step, self.steps_per_epoch)
        sums = self._sums(model, micro_batch, temperature, alpha, noise)
        count = sums.count
        logged = {"temperature": temperature, "alpha": alpha, "noise": noise}
        return LossTerms(
            sums.total, count, {**sums.terms, **{name: torch.tensor(value * count) for name, value in logged.items()}}
        )

    @torch.no_grad()
    def validation(self, model: Lens, micro_batch: ActivationBatch) -> LossTerms:
        """The same without noise, alpha at its last value: comparable over a run's checkpoints."""
        return self._sums(model, micro_batch, 1.0, self.alpha.values[-1], noise=0.0)

    def _sums(self, lens: Lens, batch: ActivationBatch, temperature: float, alpha: float, noise: float) -> LossTerms:
        terms = lens_terms(lens, batch, self.settings, temperature, noise)
        settings = self.settings
        weights = {
            "reconstruction_kl": settings.reconstruction_kl,
            "resample_kl": settings.resample_kl,
            "language_model": settings.language_model * alpha,
            "entropy": settings.entropy,
            "mse": settings.mse,
        }
        sums = {name: getattr(terms, name).sum() for name in weights}
        # A weight of 0 leaves its term out: 0 times infinity would be no number.
        total = sum((weight * sums[name] for name, weight in weights.items() if weight), start=torch.zeros(()))
        return LossTerms(total, len(terms.mse), {name: value.detach() for name, value in sums.items()})


def lens_terms(
    lens: Lens, batch: ActivationBatch, settings: LossSettings, temperature: float, noise: float
) -> LensTerms:
    """All terms of the loss for a batch. Gumbel noise, times `noise`, is drawn for examples first, then partners."""
    reading = lens.read(batch.input_ids, batch.attention_mask, batch.positions)
    activations = batch.activations if batch.activations is not None else lens.chosen_activations(reading)
    explanation = lens.explain(activations, temperature=temperature, gumbel_noise=noise)
    reconstruction = lens.reconstruct(explanation.embeddings)
    expected = lens.next_token_logits(reading, activations)

    def behaviour_kl(weight: float, replaced: Tensor) -> Tensor:
        with torch.set_grad_enabled(weight > 0 and torch.is_grad_enabled()):
            return kl_divergence(expected, lens.next_token_logits(reading, replaced))

    through_partner = settings.resample_kl > 0 and not settings.resample_stop_gradient
    with torch.set_grad_enabled(through_partner and torch.is_grad_enabled()):
        error = partner_error(lens, batch, temperature, noise)
    logits = explanation.logits.float()
    return LensTerms(
        reconstruction_kl=behaviour_kl(settings.reconstruction_kl, reconstruction),
        resample_kl=behaviour_kl(settings.resample_kl, reconstruction + error),
        language_model=language_model_kl(
            logits, lens.text_logits(explanation.token_ids), one_late=settings.language_model_positions == "one_late"
        ),
        entropy=entropy(logits).mean(-1),
        mse=(reconstruction - activations).square().mean(-1),
    )


def partner_error(lens: Lens, batch: ActivationBatch, temperature: float, noise: float) -> Tensor:
    """A' - A'^ of the partners, [batch, hidden]."""
    others = batch.other_activations
    if others is None:
        others = lens.activations_of(batch.other_input_ids, batch.other_attention_mask, batch.other_positions)
    explanation = lens.explain(others, temperature=temperature, gumbel_noise=noise)
    return others - lens.reconstruct(explanation.embeddings)


def language_model_kl(decoder: Tensor, original: Tensor, *, one_late: bool = False) -> Tensor:
    """Mean over tokens of KL(decoder || original), [batch], from logits [batch, T, vocabulary] on the same text.

    decoder[:, t] is over token t; original[:, t] is over the token after t. So token t is compared at
    original[:, t - 1], and the first token, which has no text before it, is not: a text of one token gives 0.
    `one_late` compares decoder[:, t] with original[:, t].
    """
    if one_late:
        return kl_divergence(decoder, original).mean(-1)
    if decoder.shape[1] == 1:
        return decoder.new_zeros(len(decoder))
    return kl_divergence(decoder[:, 1:], original[:, :-1]).mean(-1)


def kl_divergence(left: Tensor, right: Tensor) -> Tensor:
    """KL(left || right) in nats over the last dimension, from logits [..., vocabulary]."""
    log_left, log_right = functional.log_softmax(left, dim=-1), functional.log_softmax(right, dim=-1)
    return (log_left.exp() * (log_left - log_right)).sum(-1)


def entropy(logits: Tensor) -> Tensor:
    """Entropy in nats over the last dimension, from logits [..., vocabulary]."""
    log_probabilities = functional.log_softmax(logits, dim=-1)
    return -(log_probabilities.exp() * log_probabilities).sum(-1)
