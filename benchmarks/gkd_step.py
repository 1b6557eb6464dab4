"""GKD steps beside TRL's trainers, which take torchao's student and a teacher of their own.

Off-policy, on the data set's answers, the losses and gradients must be equal. On-policy, chance decides the answers:
every sampled one has the same length, and all sample from the full vocabulary at one temperature; what is compared is
each trainer's step on the answers that ours has just sampled. TRL's GKDTrainer samples without a KV cache under its
default gradient checkpointing, its DistillationTrainer with one. The latter divides the logits of its loss by the
sampling temperature, and ours does so too where the two are compared. The two libraries put the adapter beside the
rounded weight; `merged`, which the study trains, has plain autograd as its reference.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence as Items
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor

from benchmarks.context_distillation import forward_operations
from benchmarks.fake_quantization import autograd_student, our_student, torchao_student
from benchmarks.harness import Aim, Benchmark, Floor, Form, Outcome, Work
from benchmarks.scale import Scale, loss_and_gradients, model_directory, random_ids
from stillhouse.config.quantization import LoraQuantisation
from stillhouse.data.packing import NO_LABEL, AnswerBatch, Sequence, answer_rows_logits
from stillhouse.evaluation.teacher_agreement import teacher_states
from stillhouse.models.loading import frozen, load_model, load_tokenizer
from stillhouse.models.output_head import output_head
from stillhouse.models.quantized_lora import as_teacher, quantized_once
from stillhouse.studies.quantized_distillation.batches import StudentData
from stillhouse.studies.quantized_distillation.divergence import generalized_jsd
from stillhouse.studies.quantized_distillation.objective import GkdObjective
from stillhouse.studies.quantized_distillation.run_settings import DistillationSettings, SamplingSettings

BETA, TEMPERATURE = 0.5, 0.9
Answers = Literal["data", "sampled", "ours"]


class HeldTeacher:
    """What the teacher cache gives, without a file: hidden states computed once."""

    def __init__(self, model: PeftModel, sequences: list[Sequence]) -> None:
        self.head = output_head(model)
        with as_teacher(model):
            self.hidden = torch.cat(teacher_states(model, sequences, 8192))

    def logits(self, batch: AnswerBatch) -> Tensor:
        """The batch is always the same one."""
        return self.head.logits(self.hidden)


def examples(scale: Scale) -> list[Sequence]:
    """Prompts and answers of ordinary, different lengths, the longest ones as the scale says."""
    found = []
    for index in range(scale.batch):
        share = 1 - 0.5 * index / scale.batch
        prompt, answer = max(1, int(scale.prompt * share)), max(1, int(scale.answer * share))
        found.append(Sequence(random_ids(prompt + answer, scale, index), prompt, f"example-{index}"))
    return found


def objective(on_policy: bool, teacher: Any, folder: Path, scale: Scale, temperature: float = 1.0) -> GkdObjective:
    """The study's; it samples the same answers each time, by its seed and the step. temperature: of the loss."""
    sampling = SamplingSettings(temperature=TEMPERATURE, min_new_tokens=scale.answer, max_new_tokens=scale.answer)
    settings = DistillationSettings(beta=BETA, on_policy_share=float(on_policy), temperature=temperature)
    stop = load_tokenizer(model_directory(folder, scale)).eos_token_id
    return GkdObjective(settings, sampling, 0, [stop], teacher)


def our_step(
    placement: LoraQuantisation, on_policy: bool, cached: bool, folder: Path, scale: Scale, temperature: float = 1.0
) -> Work:
    """Forward and backward pass of the study's objective."""
    model, sequences = our_student(placement, folder, scale), examples(scale)
    loss = objective(on_policy, HeldTeacher(model, sequences) if cached else None, folder, scale, temperature)
    [batch] = StudentData(sequences).micro_batches(range(scale.batch), 10**9)

    def work() -> Outcome:
        terms = loss(model, batch.to(model.device), 1)
        return loss_and_gradients(model, terms.total / terms.count)

    return work


def answered(placement: LoraQuantisation, on_policy: bool, folder: Path, scale: Scale) -> AnswerBatch:
    """The batch that our step learns from: the data's answers, or those that it samples."""
    model, sampling = our_student(placement, folder, scale), objective(on_policy, None, folder, scale)
    [batch] = StudentData(examples(scale)).micro_batches(range(scale.batch), 10**9)
    with quantized_once(model):
        return sampling.answered(model, batch.to(model.device), sampling.source(1), 1)


def merged_by_autograd(on_policy: bool, folder: Path, scale: Scale) -> Work:
    """The divergence on our step's answers, written out; the teacher is a second model."""
    batch = answered("merged", on_policy, folder, scale)
    model, teacher = (
        autograd_student(folder, scale),
        frozen(load_model(model_directory(folder, scale), scale.precision)),
    )

    def work() -> Outcome:
        with torch.no_grad():
            taught = answer_rows_logits(teacher, batch)
        divergence = generalized_jsd(answer_rows_logits(model, batch), taught, BETA)
        return loss_and_gradients(model, divergence.sum() / batch.answer_tokens)

    return work


def gkd_trainer(checkpointing: bool, answers: Answers, folder: Path, scale: Scale) -> Work:
    """A training step of TRL's GKDTrainer; without checkpointing it samples with a KV cache.

    answers: the data's, those that it samples, or those that ours sampled with the adapter beside.
    """
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    arguments = GKDConfig(
        beta=BETA,
        temperature=TEMPERATURE,
        lmbda=1.0,
        max_new_tokens=scale.answer,
        gradient_checkpointing=checkpointing,
        **common_arguments(folder, scale),
    )
    trainer: Any = GKDTrainer(
        args=arguments,
        train_dataset=dataset(messages=[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]),
        **models(folder, scale),
    )
    trainer.current_gradient_accumulation_steps = 1  # what its train() would set
    trainer.generation_config.min_new_tokens = scale.answer
    trainer.lmbda = 1.0 if answers == "sampled" else -1.0  # 0 would still sample where the random number is 0
    sequences = answered("beside", True, folder, scale).sequences if answers == "ours" else examples(scale)
    inputs = collated(sequences, trainer.model.device)
    return lambda: stepped(trainer, dict(inputs))


def distillation_trainer(sampling: bool, folder: Path, scale: Scale) -> Work:
    """A training step of TRL's DistillationTrainer on our prompts; not `sampling`: on the answers that ours sampled."""
    from trl.trainer.distillation_config import DistillationConfig
    from trl.trainer.distillation_trainer import DistillationTrainer

    arguments = DistillationConfig(
        beta=BETA,
        temperature=TEMPERATURE,
        max_completion_length=scale.answer,
        generation_kwargs={"min_new_tokens": scale.answer},
        **common_arguments(folder, scale),
    )
    trainer: Any = DistillationTrainer(args=arguments, train_dataset=dataset(prompt="a"), **models(folder, scale))
    trainer.current_gradient_accumulation_steps = 1
    # The prompts are token ids already.
    trainer._tokenize_prompts = lambda prompts: (prompts, None, {})
    sequences = examples(scale)
    if not sampling:
        sequences = list(answered("beside", True, folder, scale).sequences)
        answers = [list(sequence.answer_ids) for sequence in sequences]
        trainer._generate_single_turn = lambda prompts, *_: answers
    return lambda: stepped(trainer, [{"prompt": list(sequence.prompt_ids)} for sequence in sequences])


def models(folder: Path, scale: Scale) -> dict[str, Any]:
    """What both trainers take: torchao's student, a second model as teacher, the tokenizer."""
    directory = model_directory(folder, scale)
    return {
        "model": torchao_student(folder, scale),
        "teacher_model": load_model(directory, scale.precision),
        "processing_class": load_tokenizer(directory),
    }


def common_arguments(folder: Path, scale: Scale) -> dict[str, Any]:
    """Nothing reported, the precision of the scale."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    return {
        "output_dir": tempfile.mkdtemp(dir=folder),
        "per_device_train_batch_size": scale.batch,
        "report_to": [],
        "bf16": scale.precision == "bf16",
        "use_cpu": not torch.cuda.is_available(),
        "disable_tqdm": True,
    }


def dataset(**row: Any) -> Any:
    """One row: the trainers want a data set, the steps bring their own examples."""
    from datasets import Dataset

    return Dataset.from_list([row])


def stepped(trainer: Any, inputs: Any) -> Outcome:
    """The loss and gradients of a trainer's step."""
    loss = trainer.training_step(trainer.model, inputs, None)
    found = {"loss": loss.detach()}
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad and parameter.grad is not None:
            found[name], parameter.grad = parameter.grad, None
    return found


def collated(sequences: Items[Sequence], device: torch.device) -> dict[str, Tensor]:
    """What TRL's collator makes: sequences padded on the right, prompts on the left."""
    longest, prompt = max(map(len, sequences)), max(sequence.answer_start for sequence in sequences)
    inputs = {
        "input_ids": torch.zeros(len(sequences), longest, dtype=torch.long),
        "attention_mask": torch.zeros(len(sequences), longest, dtype=torch.long),
        "labels": torch.full((len(sequences), longest), NO_LABEL),
        "prompts": torch.zeros(len(sequences), prompt, dtype=torch.long),
        "prompt_attention_mask": torch.zeros(len(sequences), prompt, dtype=torch.long),
    }
    for row, sequence in enumerate(sequences):
        inputs["input_ids"][row, : len(sequence)] = torch.tensor(sequence.input_ids)
        inputs["attention_mask"][row, : len(sequence)] = 1
        inputs["labels"][row, sequence.answer_start : len(sequence)] = torch.tensor(sequence.answer_ids)
        inputs["prompts"][row, prompt - sequence.answer_start :] = torch.tensor(sequence.prompt_ids)
        inputs["prompt_attention_mask"][row, prompt - sequence.answer_start :] = 1
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def off_policy_floor(folder: Path, scale: Scale) -> Floor:
    """Forward and backward pass of the student; the teacher's answer rows through the lm_head."""
    sequences = examples(scale)
    rows = sum(len(sequence.answer_ids) for sequence in sequences)
    needed = 2 * forward_operations(scale, sequences, rows) + scale.operations(0, 0, rows)
    return Floor(needed, 4 * scale.weight_bytes, sum(map(len, sequences)))


def on_policy_floor(folder: Path, scale: Scale) -> Floor:
    """Sampling reads the weights once a token; then student and teacher read the answers, the student also back."""
    sequences = [replace(own, input_ids=[0] * (own.answer_start + scale.answer)) for own in examples(scale)]
    forward = forward_operations(scale, sequences, scale.batch * scale.answer)
    return Floor(4 * forward, (scale.answer + 5) * scale.weight_bytes, sum(map(len, sequences)))


DISTILLATION_ON_OURS = "TRL DistillationTrainer on the answers that ours sampled"
AUTOGRAD, TRL_ON_OURS = "merged by autograd on the same answers", "TRL GKDTrainer on the answers that ours sampled"
OFF_POLICY = Benchmark(
    name="gkd_off_policy",
    what="GKD step, off-policy",
    forms=(
        Form("TRL GKDTrainer", "tool", partial(gkd_trainer, False, "data")),
        Form("adapter beside, teacher in the step", "other", partial(our_step, "beside", False, False)),
        Form("adapter beside, cached teacher", "other", partial(our_step, "beside", False, True)),
        Form(AUTOGRAD, "other", partial(merged_by_autograd, False), equals=None, timed=False),
        Form("adapter merged, cached teacher", "ours", partial(our_step, "merged", False, True), equals=AUTOGRAD),
    ),
    aims=(Aim("TRL GKDTrainer", "time", 1), Aim("TRL GKDTrainer", "memory", 1)),
    floor=off_policy_floor,
    floor_formula="2 x forward(student tokens, answer rows) + the teacher's answer rows through the lm_head",
    remains="The rounding, and the divergence over the whole vocabulary.",
)
ON_POLICY = Benchmark(
    name="gkd_on_policy",
    what="GKD step, on-policy",
    forms=(
        Form("TRL GKDTrainer", "tool", partial(gkd_trainer, True, "sampled"), equals=None),
        Form(
            "TRL GKDTrainer without checkpointing",
            "tool",
            partial(gkd_trainer, False, "sampled"),
            equals=None,
            counted=False,
        ),
        Form("TRL DistillationTrainer", "tool", partial(distillation_trainer, True), equals=None),
        Form(DISTILLATION_ON_OURS, "other", partial(distillation_trainer, False), equals=None, timed=False),
        Form(
            "adapter beside, loss at the sampling temperature",
            "other",
            partial(our_step, "beside", True, False, temperature=TEMPERATURE),
            equals=DISTILLATION_ON_OURS,
            timed=False,
        ),
        Form(TRL_ON_OURS, "other", partial(gkd_trainer, False, "ours"), equals=None, timed=False),
        Form("adapter beside", "other", partial(our_step, "beside", True, False), equals=TRL_ON_OURS, timed=False),
        Form(AUTOGRAD, "other", partial(merged_by_autograd, True), equals=None, timed=False),
        Form("adapter merged", "ours", partial(our_step, "merged", True, False), equals=AUTOGRAD),
    ),
    aims=(
        Aim("TRL GKDTrainer", "time", 3),
        Aim("TRL GKDTrainer", "memory", 1),
        Aim(
            "TRL DistillationTrainer",
            "time",
            3,
            cause="The aim supposes sampling without a KV cache, as the GKDTrainer's default is. This trainer samples "
            "with one, as ours does: what is left to save is rounding once a step instead of once a token, and one "
            "copy of the model.",
        ),
        Aim("TRL DistillationTrainer", "memory", 1),
    ),
    floor=on_policy_floor,
    floor_formula="4 x forward(prompts and sampled answers, answer rows); the weights are read once a sampled token",
    remains="Sampling: one token of every answer at a time.",
    change=lambda scale: replace(scale, rounds=min(5, scale.rounds)),
)
