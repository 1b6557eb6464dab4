"""The loss of context distillation: `L = CE + weight * distillation`, summed over answer tokens.

- mse_top_k: mean over the teacher's K largest logits of the squared difference of raw logits (as published).
- mse_random_k: the same over K random ids per position, the control for the choice of the top K.
- kl: KL(teacher || student) over the full vocabulary at temperature T, times T^2, which keeps the size of its
  gradient comparable between temperatures (Hinton et al., arXiv 1503.02531).

Student and teacher are compared at the logits that predict each answer token. `one_late` takes the logits one
position later, as the published code does: the first answer token is never distilled, and the logits after the
last one are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from stillhouse.data.packing import NO_LABEL, AnswerBatch, answer_rows_logits
from stillhouse.models.target_cache import TeacherTargets
from stillhouse.runtime.seeds import generator
from stillhouse.studies.context_distillation.data import check_alignment
from stillhouse.studies.context_distillation.run_settings import DistillationSettings
from stillhouse.studies.context_distillation.teacher import TargetSource
from stillhouse.training.objective import LossTerms


class ContextDistillationObjective:
    """Cross entropy on the gold answer, and the distance to a teacher's targets where there is a teacher.

    steps: length of the run, for `only_last_steps`. seed: draws the ids of mse_random_k, per example.
    """

    def __init__(
        self, settings: DistillationSettings, steps: int, seed: int = 0, teacher: TargetSource | None = None
    ) -> None:
        if teacher is None and settings.loss != "none" and settings.weight > 0:
            raise ValueError(f"distillation.loss {settings.loss} needs a teacher")
        self.settings, self.steps, self.seed, self.teacher = settings, steps, seed, teacher

    def __call__(self, model: nn.Module, micro_batch: AnswerBatch, step: int) -> LossTerms:
        """The sums of `ce` and `distillation` over the batch's answer tokens; both are always logged."""
        logits = answer_rows_logits(model, micro_batch).float()
        ce = functional.cross_entropy(logits, micro_batch.labels, ignore_index=NO_LABEL, reduction="sum")
        terms = {"ce": ce.detach()}
        total = ce
        if self.teacher is not None:
            weight = self.weight(step)
            student = logits if weight else logits.detach()
            distance = self._distance(student, micro_batch)
            terms["distillation"] = distance.detach()
            total = ce + weight * distance if weight else ce
        return LossTerms(total, micro_batch.answer_tokens, terms)

    def weight(self, step: int) -> float:
        """Lambda, or 0 where update `step` (from 1) is outside the window of a timing ablation."""
        first, last = self.settings.only_first_steps, self.settings.only_last_steps
        inside = (
            (first is None and last is None)
            or (first is not None and step <= first)
            or (last is not None and step > self.steps - last)
        )
        return self.settings.weight if inside else 0.0

    def _distance(self, logits: Tensor, batch: AnswerBatch) -> Tensor:
        """Sum over the distilled rows of the distance between student logits [R, vocab] and the targets."""
        assert self.teacher is not None
        targets = self.teacher.targets([sequence.example_id for sequence in batch.sequences])
        check_alignment(batch.sequences, targets.answers)
        targets = targets.to(logits.device)
        late = self.settings.positions == "one_late"
        lengths = [len(answer) for answer in targets.answers]
        rows = _distilled_rows(lengths, late=late).to(logits.device)
        # A batch made with_last has the teacher's rows; a predicting one has just those that are distilled.
        student = logits[rows] if len(logits) == sum(lengths) + len(lengths) else logits
        if len(student) != len(rows):
            raise ValueError(f"positions {self.settings.positions} does not fit a batch of {len(logits)} rows")
        if self.settings.loss == "mse_top_k":
            assert targets.top_ids is not None and targets.top_logits is not None
            ids, values = (tensor[rows, : self.settings.top_k] for tensor in (targets.top_ids, targets.top_logits))
            return mean_squared_difference(student, ids.long(), values)
        teacher = self._teacher_logits(targets, rows)
        if self.settings.loss == "mse_random_k":
            ids = self._random_ids(batch, teacher.shape[1]).to(logits.device)[rows]
            return mean_squared_difference(student, ids, teacher.gather(1, ids))
        return kl_divergence(student, teacher, self.settings.temperature)

    def _teacher_logits(self, targets: TeacherTargets, rows: Tensor) -> Tensor:
        assert self.teacher is not None and self.teacher.head is not None and targets.hidden is not None
        return self.teacher.head.logits(targets.hidden[rows]).float()

    def _random_ids(self, batch: AnswerBatch, vocab_size: int) -> Tensor:
        """Ids [target rows, K], the same in every epoch.

        Drawn with replacement: the mean over them estimates the mean over the whole vocabulary.
        """
        top_k = self.settings.top_k
        draws = [
            torch.randint(
                vocab_size,
                (len(sequence.answer_ids) + 1, top_k),
                generator=generator(self.seed, "random ids", sequence.example_id),
            )
            for sequence in batch.sequences
        ]
        return torch.cat(draws)


def mean_squared_difference(student: Tensor, ids: Tensor, values: Tensor) -> Tensor:
    """Sum over rows of the mean over K of (student logit - value)^2. student: [R, vocab]; ids, values: [R, K]."""
    chosen: Tensor = _Chosen.apply(student, ids)
    return (chosen - values.float()).square().mean(1).sum()


class _Chosen(torch.autograd.Function):
    """`gather(1, ids)` that keeps the ids alone: torch's own holds the logits, which nothing else needs any more."""

    @staticmethod
    def forward(context: Any, logits: Tensor, ids: Tensor) -> Tensor:
        """logits: [R, vocab]; ids: [R, K], which may repeat."""
        context.save_for_backward(ids)
        context.vocabulary = logits.shape[1]
        return logits.gather(1, ids)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """The gradient of the logits."""
        [ids] = context.saved_tensors
        return gradients[0].new_zeros(len(ids), context.vocabulary).scatter_add_(1, ids, gradients[0]), None


def kl_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 times the sum over rows of KL(teacher || student), in nats, of logits [R, vocab] divided by T."""
    log_student = functional.log_softmax(student / temperature, dim=-1)
    log_teacher = functional.log_softmax(teacher / temperature, dim=-1)
    return temperature**2 * functional.kl_div(log_student, log_teacher, reduction="sum", log_target=True)


def _distilled_rows(lengths: list[int], *, late: bool) -> Tensor:
    """Of n + 1 target rows per answer: the n that predict its tokens, or the n one position later."""
    rows: list[int] = []
    start = 0
    for length in lengths:
        rows.extend(range(start + late, start + late + length))
        start += length + 1
    return torch.tensor(rows)
