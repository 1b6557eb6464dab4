"""The loss of LatentWire: what each reader makes of the prefix, averaged over readers, summed over examples.

Every term is a mean over one example's answer tokens, so that the sum over examples does not depend on how they are
divided into micro-batches. The readers are trained in one step together, or one after the other with the same
gradient: then only one model's activations exist at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from stillhouse.studies.latentwire.adapters import Adapter, root_mean_square
from stillhouse.studies.latentwire.channel import Channel, Latents
from stillhouse.studies.latentwire.data import WireBatch
from stillhouse.studies.latentwire.prompt import AnswerRows
from stillhouse.studies.latentwire.reader import Reader
from stillhouse.studies.latentwire.run_settings import LossSettings, RunSettings
from stillhouse.studies.latentwire.text_teacher import TextTeacher
from stillhouse.training.objective import LossTerms

Observer = Callable[[Channel, int], None]


@dataclass(frozen=True)
class ReaderLoss:
    """One reader's loss: the weighted sum per example, [batch], and its parts before weights, each [batch]."""

    total: Tensor
    terms: Mapping[str, Tensor]


class LatentWireObjective:
    """The loss of a channel's batch; its unit is the example.

    teachers: per reader, where kd or state_kd compare with the model on the full text. observe: called with the
    channel and the step every `diagnostics_every` steps, before the update.
    """

    def __init__(
        self, run: RunSettings, teachers: Mapping[str, TextTeacher] | None = None, observe: Observer | None = None
    ) -> None:
        if run.losses.needs_teacher and not teachers:
            raise ValueError("losses.kd and losses.state_kd need a teacher for each reader")
        self.run, self.teachers, self.observe = run, teachers or {}, observe
        self._observed = 0

    def __call__(self, model: nn.Module, micro_batch: WireBatch, step: int) -> LossTerms:
        """The sums of the weighted total, and of each term by reader, over the batch's examples."""
        assert isinstance(model, Channel)
        if self.observe and step % self.run.diagnostics_every == 0 and self._observed != step:
            self._observed = step  # once in a step, however many micro-batches it has
            self.observe(model, step)
        message = model.encoder(micro_batch.texts)
        parts: dict[str, Callable[[Tensor], ReaderLoss]] = {
            name: self._part(model, name, micro_batch, step) for name in micro_batch.targets
        }
        if model.gist is not None:
            parts["gist"] = self._gist(model.gist.loss, micro_batch)
        total, terms = (one_after_the_other if self.run.sequential_models else together)(message, parts)
        return LossTerms(total, len(micro_batch.texts), terms)

    def _part(self, channel: Channel, name: str, batch: WireBatch, step: int) -> Callable[[Tensor], ReaderLoss]:
        def loss(message: Tensor) -> ReaderLoss:
            one = self.reader_loss(channel, name, channel.latents(message), batch, step)
            return ReaderLoss(one.total / len(batch.targets), one.terms)

        return loss

    def _gist(self, decode: Callable[..., Tensor], batch: WireBatch) -> Callable[[Tensor], ReaderLoss]:
        def loss(message: Tensor) -> ReaderLoss:
            distance = decode(message, batch.texts)
            return ReaderLoss(self.run.losses.gist * distance, {"ce": distance})

        return loss

    def reader_loss(self, channel: Channel, name: str, latents: Latents, batch: WireBatch, step: int) -> ReaderLoss:
        """One reader's loss on the latents of a batch."""
        reader, losses = channel.reader(name), self.run.losses
        own = latents.of_model(name)
        prefix, raw = channel.adapted(name, latents, self.visible(own, step))
        prompt = reader.prompt_embeddings(prefix, self.texts_before(reader, batch, step))
        answers = reader.answer_rows(prompt, batch.targets[name])
        terms = answer_terms(answers, len(batch.texts), losses)
        weights = {"ce": losses.ce, "first_token": losses.first_token, "first_k": losses.first_k}
        if losses.needs_teacher:
            terms |= teacher_terms(answers, self.teachers[name].hidden(batch), reader, len(batch.texts), losses)
            weights |= {"kd": losses.kd, "state_kd": losses.state_kd}
        if losses.scale or losses.rms:
            adapter = channel.adapters[name]
            assert isinstance(adapter, Adapter)
            terms |= penalties(adapter, raw, prefix.mask)
            weights |= {"scale": losses.scale, "rms": losses.rms}
        weighted = {key: weight * terms[key] for key, weight in weights.items() if weight}
        if losses.first_token_autoscale and losses.first_token:
            weighted["first_token"] = weighted["first_token"] * autoscale(terms)
        return ReaderLoss(torch.stack(list(weighted.values())).sum(0), terms)

    def visible(self, latents: Tensor, step: int) -> Tensor | None:
        """Which vectors a reader sees, [batch, M]; None: all. The share that is dropped moves along the run."""
        curriculum, progress = self.run.curriculum, step / self.run.training.steps
        start, end = curriculum.latent_dropout, curriculum.latent_dropout_end
        dropped = start + (end - start) * progress
        if not (start or end):
            return None
        chance = torch.rand(latents.shape[:2], device=latents.device)
        # The luckiest vector always stays: a prompt without any would teach nothing about Z.
        return ((chance >= dropped) | (chance == chance.amax(dim=1, keepdim=True))).long()

    def texts_before(self, reader: Reader, batch: WireBatch, step: int) -> list[list[int]]:
        """The first tokens of each text that the warm-up still shows; empty after it."""
        warmup = self.run.curriculum.text_warmup * self.run.training.steps
        share = 1 - (step - 1) / warmup if warmup else 0.0
        if share <= 0:
            return []
        ids = (reader.text_ids(text) for text in batch.texts)
        return [row[: math.ceil(share * len(row))] for row in ids]


def answer_terms(answers: AnswerRows, examples: int, losses: LossSettings) -> dict[str, Tensor]:
    """Cross entropies against the gold answer, and whether the first token is right; each [examples]."""
    nll = functional.cross_entropy(answers.logits.float(), answers.labels, reduction="none")
    right = (answers.logits.detach().argmax(dim=-1) == answers.labels).float()
    return {
        "ce": mean_per_example(nll, answers, examples),
        "first_token": mean_per_example(nll, answers, examples, first=1),
        "first_k": mean_per_example(nll, answers, examples, first=losses.k),
        "first_token_accuracy": mean_per_example(right, answers, examples, first=1),
    }


def teacher_terms(
    answers: AnswerRows, hidden: Tensor, reader: Reader, examples: int, losses: LossSettings
) -> dict[str, Tensor]:
    """Distances over the first k steps to the same model on the full text; each [examples].

    hidden: [R, hidden], the teacher's states at the same answer tokens. kd: tau^2 KL(text || latent), whose factor
    keeps the size of the gradient (Hinton et al., arXiv 1503.02531). state_kd: squared distance of the states over
    the teacher's squared norm.
    """
    with torch.no_grad():
        teacher = reader.model.get_output_embeddings()(hidden.to(answers.hidden.dtype)).float()
    tau = losses.temperature
    log_teacher = functional.log_softmax(teacher / tau, dim=-1)
    log_student = functional.log_softmax(answers.logits.float() / tau, dim=-1)
    divergence = tau**2 * functional.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(-1)
    states = hidden.float()
    distance = (answers.hidden.float() - states).square().sum(-1) / states.square().sum(-1)
    return {
        "kd": mean_per_example(divergence, answers, examples, first=losses.k),
        "state_kd": mean_per_example(distance, answers, examples, first=losses.k),
    }


def penalties(adapter: Adapter, raw: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
    """How far an adapter is from its calibrated size, per example; raw: the prefix before calibration."""
    ratio = root_mean_square(raw, mask) / adapter.target_rms
    return {"scale": (adapter.scale - 1).square().expand(len(raw)), "rms": ratio.log().square()}


def autoscale(terms: Mapping[str, Tensor]) -> Tensor:
    """How hard an example's first token is beside its whole answer: a weight in [1/4, 4] without a gradient."""
    return (terms["first_token"] / terms["ce"].clamp(min=1e-6)).detach().clamp(0.25, 4.0)


def mean_per_example(values: Tensor, answers: AnswerRows, examples: int, first: int | None = None) -> Tensor:
    """Mean of values [R] over each example's answer tokens, or over the `first` so many of them: [examples]."""
    kept = torch.ones_like(values) if first is None else (answers.position < first).to(values.dtype)
    sums = values.new_zeros(examples).index_add(0, answers.example, values * kept)
    return sums / values.new_zeros(examples).index_add(0, answers.example, kept)


def together(message: Tensor, parts: Mapping[str, Callable[[Tensor], ReaderLoss]]) -> tuple[Tensor, dict[str, Tensor]]:
    """All parts in one graph: the summed total with its gradient, and the terms by part."""
    losses = {name: part(message) for name, part in parts.items()}
    return torch.stack([loss.total.sum() for loss in losses.values()]).sum(), _logged(losses)


def one_after_the_other(
    message: Tensor, parts: Mapping[str, Callable[[Tensor], ReaderLoss]]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Each part's backward pass at once, so that its activations are gone before the next begins.

    What is left to do is the encoder: the returned total has the value of the sum, and its backward pass sends the
    gradient that the parts left at Z into the encoder.
    """
    cut = message.detach().requires_grad_()
    losses = {}
    value = torch.zeros((), device=message.device)
    for name, part in parts.items():
        loss = part(cut)
        loss.total.sum().backward()
        value = value + loss.total.detach().sum()
        losses[name] = ReaderLoss(loss.total.detach(), {key: term.detach() for key, term in loss.terms.items()})
    assert cut.grad is not None
    carried = (message * cut.grad).sum()
    return carried + (value - carried.detach()), _logged(losses)


def _logged(losses: Mapping[str, ReaderLoss]) -> dict[str, Tensor]:
    return {f"{key}/{name}": term.detach().sum() for name, loss in losses.items() for key, term in loss.terms.items()}
