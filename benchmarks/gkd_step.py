"""GKD steps beside TRL's trainers, which take torchao's student and a teacher of their own.

Off-policy, on the data set's answers, the losses and gradients must be equal. On-policy, chance decides the answers:
every sampled one has the same length, and all sample from the full vocabulary at one temperature. TRL's GKDTrainer
samples without a KV cache under its default gradient checkpointing.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from benchmarks.context_distillation import forward_operations
from benchmarks.fake_quantization import our_student, torchao_student
from benchmarks.harness import Aim, Benchmark, Floor, Form, Outcome, Work
from benchmarks.scale import Scale, loss_and_gradients, model_directory, random_ids
from stillhouse.config.quantization import LoraQuantisation
from stillhouse.data.packing import NO_LABEL, AnswerBatch, Sequence
from stillhouse.evaluation.teacher_agreement import teacher_states
from stillhouse.models.loading import load_model, load_tokenizer
from stillhouse.models.output_head import output_head
from stillhouse.models.quantized_lora import as_teacher
from stillhouse.studies.quantized_distillation.batches import StudentData
from stillhouse.studies.quantized_distillation.objective import GkdObjective
from stillhouse.studies.quantized_distillation.run_settings import DistillationSettings, SamplingSettings

BETA, TEMPERATURE = 0.5, 0.9


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


def our_step(placement: LoraQuantisation, on_policy: bool, cached: bool, folder: Path, scale: Scale) -> Work:
    """Forward and backward pass of the study's objective."""
    model, sequences = our_student(placement, folder, scale), examples(scale)
    sampling = SamplingSettings(temperature=TEMPERATURE, min_new_tokens=scale.answer, max_new_tokens=scale.answer)
    settings = DistillationSettings(beta=BETA, on_policy_share=float(on_policy))
    teacher: Any = HeldTeacher(model, sequences) if cached else None
    stop = load_tokenizer(model_directory(folder, scale)).eos_token_id
    objective = GkdObjective(settings, sampling, 0, [stop], teacher)
    [batch] = StudentData(sequences).micro_batches(range(scale.batch), 10**9)

    def work() -> Outcome:
        terms = objective(model, batch.to(model.device), 1)
        return loss_and_gradients(model, terms.total / terms.count)

    return work


def gkd_trainer(checkpointing: bool, on_policy: bool, folder: Path, scale: Scale) -> Work:
    """A training step of TRL's GKDTrainer; without checkpointing it samples with a KV cache."""
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
    trainer.lmbda = 1.0 if on_policy else -1.0  # 0 would still sample where the random number is 0
    inputs = collated(examples(scale), trainer.model.device)
    return lambda: stepped(trainer, dict(inputs))


def distillation_trainer(folder: Path, scale: Scale) -> Work:
    """A training step of TRL's DistillationTrainer, which always samples."""
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
    prompts = [" ".join(["apples"] * scale.prompt)] * scale.batch
    return lambda: stepped(trainer, [{"prompt": prompt} for prompt in prompts])


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


def collated(sequences: list[Sequence], device: torch.device) -> dict[str, Tensor]:
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


OFF_POLICY = Benchmark(
    name="gkd_off_policy",
    what="GKD step, off-policy",
    forms=(
        Form("TRL GKDTrainer", "tool", partial(gkd_trainer, False, False)),
        Form("adapter beside, teacher in the step", "other", partial(our_step, "beside", False, False)),
        Form("adapter merged, cached teacher", "other", partial(our_step, "merged", False, True), equals=None),
        Form("adapter beside, cached teacher", "ours", partial(our_step, "beside", False, True)),
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
        Form("TRL GKDTrainer", "tool", partial(gkd_trainer, True, True), equals=None),
        Form("TRL GKDTrainer without checkpointing", "tool", partial(gkd_trainer, False, True), equals=None),
        Form("TRL DistillationTrainer", "tool", distillation_trainer, equals=None),
        Form("adapter merged", "ours", partial(our_step, "merged", True, False), equals=None),
    ),
    aims=(Aim("TRL GKDTrainer", "time", 3), Aim("TRL DistillationTrainer", "time", 1)),
    floor=on_policy_floor,
    floor_formula="4 x forward(prompts and sampled answers, answer rows); the weights are read once a sampled token",
    remains="Sampling: one token of every answer at a time.",
    change=lambda scale: replace(scale, rounds=min(5, scale.rounds)),
)
