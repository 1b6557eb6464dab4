"""A step of GKD here and in TRL's GKDTrainer: on the data set's answers and on the student's own samples.

    PYTHONPATH=src:. python benchmarks/gkd_step.py [model=DIRECTORY] [batch=4] [prompt=32] [answer=32] [repeats=3]

Both train LoRA beside torchao's int4 grid: TRL on torchao's QAT layers with a teacher of its own, as its users would,
this package on its own layers with the teacher in the same weights. On the data set's answers the two losses must be
equal before anything is timed. Every sampled answer has the same length, and both sample with a KV cache. The `cached`
line has the teacher's hidden states from the cache, which TRL does not offer. Forms take turns.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
from peft import PeftModel
from pydantic import Field
from torch import Tensor

from benchmarks.consistency_lens import make_model
from benchmarks.fake_quantization import student, torchao_student
from stillhouse.config.base import StrictModel
from stillhouse.data.packing import NO_LABEL, AnswerBatch, Sequence
from stillhouse.evaluation.teacher_agreement import teacher_states
from stillhouse.models.loading import load_model, load_tokenizer
from stillhouse.models.output_head import output_head
from stillhouse.models.quantized_lora import as_teacher
from stillhouse.runtime.commands import run_step
from stillhouse.studies.quantized_distillation.batches import StudentData
from stillhouse.studies.quantized_distillation.objective import GkdObjective
from stillhouse.studies.quantized_distillation.run_settings import DistillationSettings, SamplingSettings


class Benchmark(StrictModel):
    """The command line; prompt and answer in tokens."""

    model: Path | None = None
    group_size: Annotated[int, Field(ge=2)] = 64
    batch: Annotated[int, Field(ge=1)] = 4
    prompt: Annotated[int, Field(ge=1)] = 32
    answer: Annotated[int, Field(ge=1)] = 32
    beta: Annotated[float, Field(ge=0, le=1)] = 0.5
    repeats: Annotated[int, Field(ge=1)] = 3


class HeldTeacher:
    """What the teacher cache gives, without a file: hidden states computed once."""

    def __init__(self, model: PeftModel, sequences: list[Sequence]) -> None:
        self.head = output_head(model)
        with as_teacher(model):
            self.hidden = torch.cat(teacher_states(model, sequences, 8192))

    def logits(self, batch: AnswerBatch) -> Tensor:
        """The batch is always the same one."""
        return self.head.logits(self.hidden)


def main(settings: Benchmark) -> None:
    """Print seconds of a step in each form, the best of the repeats, and TRL's time as a multiple of it."""
    with tempfile.TemporaryDirectory() as folder:
        model_dir = settings.model or make_model(Path(folder) / "model")
        trainer = trl_trainer(model_dir, settings, Path(folder))
        sequences = examples(settings, trainer.model.config.vocab_size)
        inputs = trl_inputs(sequences, trainer.model.device)
        models = {name: student(model_dir, settings.group_size, name) for name in ("beside", "merged")}
        [batch] = StudentData(sequences).micro_batches(range(settings.batch), 10**9)

        def ours(name: str, on_policy: bool, cached: bool = False) -> Callable[[], float]:
            sampling = SamplingSettings(min_new_tokens=settings.answer, max_new_tokens=settings.answer)
            distillation = DistillationSettings(beta=settings.beta, on_policy_share=float(on_policy))
            model = models[name]
            teacher: Any = HeldTeacher(model, sequences) if cached else None
            objective = GkdObjective(distillation, sampling, 0, trainer.generation_config.eos_token_id, teacher)

            def step() -> float:
                terms = objective(model, batch.to(model.device), 1)
                loss = terms.total / terms.count
                loss.backward()
                return loss.item()

            return step

        def theirs(on_policy: bool) -> Callable[[], float]:
            def step() -> float:
                trainer.lmbda = 1.0 if on_policy else -1.0  # 0 would still sample where the random number is 0
                return float(trainer.training_step(trainer.model, dict(inputs)))

            return step

        equal, reference = ours("beside", on_policy=False)(), theirs(on_policy=False)()
        torch.testing.assert_close(equal, reference, rtol=1e-4, atol=1e-6)
        print(f"off-policy loss: {equal:.6f} here, {reference:.6f} in TRL")
        for label, on_policy in (("off-policy", False), ("on-policy", True)):
            forms = {"TRL": theirs(on_policy), "beside": ours("beside", on_policy), "merged": ours("merged", on_policy)}
            if not on_policy:
                forms["merged, cached"] = ours("merged", on_policy, cached=True)
            best = measured(forms, settings.repeats)
            for name, seconds in best.items():
                print(f"{label:10s} {name:15s} {seconds:.3f} s, {best['TRL'] / seconds:.2f} times as fast as TRL")


def measured(forms: dict[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    """The fastest of `repeats` steps of each form, taken in turn."""
    best = dict.fromkeys(forms, float("inf"))
    for _ in range(repeats):
        for name, form in forms.items():
            start = time.perf_counter()
            form()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def examples(settings: Benchmark, vocabulary: int) -> list[Sequence]:
    """Prompts and answers of ordinary, different lengths, the longest ones as the settings say."""
    drawing = torch.Generator().manual_seed(0)
    sequences = []
    for index in range(settings.batch):
        share = 1 - 0.5 * index / settings.batch
        prompt, answer = max(1, int(settings.prompt * share)), max(1, int(settings.answer * share))
        ids = torch.randint(10, vocabulary, (prompt + answer,), generator=drawing).tolist()
        sequences.append(Sequence(ids, prompt, f"example-{index}"))
    return sequences


def trl_inputs(sequences: list[Sequence], device: torch.device) -> dict[str, Tensor]:
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


def trl_trainer(model_dir: Path, settings: Benchmark, folder: Path) -> Any:
    """TRL's trainer as it comes, but that it may use its KV cache and samples answers of one length."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    tokenizer = load_tokenizer(model_dir)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    arguments = GKDConfig(
        output_dir=str(folder / "trl"),
        beta=settings.beta,
        temperature=0.9,
        max_new_tokens=settings.answer,
        gradient_checkpointing=False,
        report_to=[],
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = GKDTrainer(
        model=torchao_student(model_dir, settings.group_size),
        teacher_model=load_model(model_dir, "fp32"),
        args=arguments,
        train_dataset=Dataset.from_list([{"messages": turns}]),
        processing_class=tokenizer,
    )
    trainer.current_gradient_accumulation_steps = 1  # what its train() would set
    trainer.generation_config.eos_token_id = [tokenizer.eos_token_id]
    trainer.generation_config.min_new_tokens = settings.answer
    return trainer


if __name__ == "__main__":
    run_step(Benchmark, main)
