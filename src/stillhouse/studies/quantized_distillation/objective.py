"""Generalised knowledge distillation (GKD, arXiv 2306.13649) of a full-precision model into its own 4-bit form.

In each step the answers are, for all examples alike, the student's samples with probability lambda, else the data
set's (or the teacher's samples, under `seq_kd`). The loss is the generalised Jensen-Shannon divergence between teacher
and student, summed over answer tokens. No gradient passes through the sampling.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from pathlib import Path
from random import Random
from typing import Literal

import torch
from peft import PeftModel
from torch import Tensor

from stillhouse.data.packing import AnswerBatch, answer_rows_logits
from stillhouse.models.output_head import output_head
from stillhouse.models.quantized_lora import as_teacher, quantized_once
from stillhouse.models.target_cache import TargetCache
from stillhouse.runtime.errors import UserError
from stillhouse.runtime.seeds import derived_seed
from stillhouse.studies.quantized_distillation.batches import collate
from stillhouse.studies.quantized_distillation.divergence import generalized_jsd
from stillhouse.studies.quantized_distillation.run_settings import DistillationSettings, SamplingSettings
from stillhouse.studies.quantized_distillation.sampling import with_sampled_answers
from stillhouse.training.objective import LossTerms

AnswerSource = Literal["data", "student", "teacher"]


class CachedTeacher:
    """The teacher's logits on the data set's answers, from the hidden states that the step program stored.

    The student's own output embeddings, frozen, are the teacher's. Raises UserError for a cache of another model.
    """

    def __init__(self, directory: Path, student: PeftModel) -> None:
        self.cache, self.head = TargetCache(directory), output_head(student)
        stored = self.cache.head
        if self.cache.facts.mode != "hidden" or stored is None or not stored.equals(self.head):
            raise UserError(f"{directory}: is no cache of this teacher: delete it and run the same command again")

    def logits(self, batch: AnswerBatch) -> Tensor:
        """Raw logits [rows, vocabulary] for the batch's answer rows."""
        targets = self.cache.targets([sequence.example_id for sequence in batch.sequences])
        if list(targets.answers) != [tuple(sequence.answer_ids) for sequence in batch.sequences]:
            raise UserError(f"{self.cache.directory}: holds other answers of these examples: make it again")
        assert targets.hidden is not None
        # A row for each token, and one after the last that nothing here predicts from.
        lengths = [len(answer) + 1 for answer in targets.answers]
        rows = torch.cat([states[:-1] for states in targets.hidden.split(lengths)])
        return self.head.logits(rows.to(batch.input_ids.device))


class GkdObjective:
    """See the module's description. teacher: None computes every target with the adapter and the rounding off.

    stop_ids: tokens that end a sampled answer. packing: how sampled answers are collated.
    """

    def __init__(
        self,
        distillation: DistillationSettings,
        sampling: SamplingSettings,
        seed: int,
        stop_ids: Items[int] = (),
        teacher: CachedTeacher | None = None,
        *,
        packing: bool = True,
    ) -> None:
        self.distillation, self.sampling, self.seed = distillation, sampling, seed
        self.stop_ids, self.teacher, self.packing = stop_ids, teacher, packing

    def __call__(self, model: PeftModel, micro_batch: AnswerBatch, step: int) -> LossTerms:
        """The divergence over the answer tokens; `sampled` logs the share of them that a model sampled."""
        source = self.source(step)
        # One rounding serves sampling and loss; the backward pass keeps what it needs of it.
        with quantized_once(model):
            batch = self.answered(model, micro_batch, source, step)
            student = answer_rows_logits(model, batch)
        teacher = self._teacher_logits(model, batch, source)
        settings = self.distillation
        total = generalized_jsd(student, teacher, settings.beta, settings.temperature).sum()
        sampled = total.new_tensor(float(batch.answer_tokens if source != "data" else 0))
        return LossTerms(total, batch.answer_tokens, {"sampled": sampled})

    def source(self, step: int) -> AnswerSource:
        """Whose answers the update number `step` learns from: the same on every process."""
        if Random(derived_seed(self.seed, "answers", step)).random() < self.distillation.on_policy_share:
            return "student"
        return "teacher" if self.distillation.seq_kd else "data"

    def answered(self, model: PeftModel, batch: AnswerBatch, source: AnswerSource, step: int) -> AnswerBatch:
        """The batch itself, or its prompts with sampled answers."""
        if source == "data":
            return batch
        arguments = (batch.sequences, self.sampling, self.stop_ids, self.seed, step)
        if source == "student":
            sequences = with_sampled_answers(model, *arguments)
        else:
            with as_teacher(model):
                sequences = with_sampled_answers(model, *arguments)
        return collate(sequences, packing=self.packing).to(batch.input_ids.device)

    def _teacher_logits(self, model: PeftModel, batch: AnswerBatch, source: AnswerSource) -> Tensor:
        if source == "data" and self.teacher is not None:
            return self.teacher.logits(batch)
        with as_teacher(model), torch.no_grad():
            return answer_rows_logits(model, batch)
