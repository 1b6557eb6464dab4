"""The teacher cache under fixed shots: their keys and values are computed once, not once per example.

Against the plain passes of transformers, one sequence at a time and in padded batches. Serving engines are no
substitute: vLLM skips its prefix cache where it is asked for the prompt's log-probabilities, and its bf16 logits are
not the training engine's.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel

from benchmarks.context_distillation import LONGEST, all_logits, forward_operations
from benchmarks.harness import Aim, Benchmark, Floor, Form, Outcome, Work
from benchmarks.scale import Scale, model_directory, problem_directory
from stillhouse.data.packing import Sequence
from stillhouse.data.prompts import prompt_renderer
from stillhouse.data.records import read_problems
from stillhouse.models.loading import frozen, load_model, load_tokenizer
from stillhouse.models.prefix import shared_prefix_length
from stillhouse.studies.context_distillation.data import TeacherExamples, teacher_examples
from stillhouse.studies.context_distillation.run_settings import ContextSettings
from stillhouse.studies.context_distillation.teacher import TeacherForward

BATCH = 4


def examples(folder: Path, scale: Scale) -> TeacherExamples:
    """`examples` problems after one set of shots."""
    directory = problem_directory(folder, scale, scale.examples + scale.shots)
    renderer = prompt_renderer(load_tokenizer(model_directory(folder, scale)))
    context = ContextSettings(shots=scale.shots, sampling="fixed")
    return teacher_examples(read_problems(directory / "train.jsonl"), renderer, context, LONGEST)


def teacher(folder: Path, scale: Scale) -> PreTrainedModel:
    """The frozen model."""
    return frozen(load_model(model_directory(folder, scale), scale.precision))


def whole_sequences(batch: int, folder: Path, scale: Scale) -> Work:
    """Every sequence from its first token, `batch` at a time, all logits."""
    model, sequences = teacher(folder, scale), list(examples(folder, scale).sequences)

    @torch.no_grad()
    def work() -> Outcome:
        tops = []
        for start in range(0, len(sequences), batch):
            logits, _ = all_logits(model, sequences[start : start + batch])
            tops.append(logits.topk(scale.top_k).values)
        return {"top_logits": torch.cat(tops)}

    return work


def one_by_one(folder: Path, scale: Scale) -> Work:
    """Without padding."""
    return whole_sequences(1, folder, scale)


def padded(folder: Path, scale: Scale) -> Work:
    """As a collator of transformers would make it."""
    return whole_sequences(BATCH, folder, scale)


def shared_shots(folder: Path, scale: Scale) -> Work:
    """Ours; a new `TeacherForward` each time, so that the shots are read once in every unit of work."""
    model, found = teacher(folder, scale), examples(folder, scale)

    def work() -> Outcome:
        forward = TeacherForward(model, found, "top_k", scale.top_k, 8192)
        targets = forward([sequence.example_id for sequence in found.sequences])
        rows = [target.top_logits[:-1] for target in targets if target.top_logits is not None]
        return {"top_logits": torch.cat(rows)}

    return work


def floor(folder: Path, scale: Scale) -> Floor:
    """The shots once, and what each example adds to them."""
    sequences = examples(folder, scale).sequences
    shared = shared_prefix_length([s.input_ids for s in sequences], [s.answer_start for s in sequences])
    rows = sum(len(sequence.answer_ids) for sequence in sequences)
    needed = forward_operations(scale, [Sequence([0] * (shared + 1), 1, "shots")], 0)
    for sequence in sequences:
        own = len(sequence) - shared
        needed += scale.operations(own, own * shared + own * (own + 1) / 2, 0)
    needed += scale.operations(0, 0, rows)
    return Floor(needed, scale.weight_bytes, sum(map(len, sequences)))


FIXED_SHOTS = Benchmark(
    name="teacher_cache",
    what="teacher cache, fixed shots",
    forms=(
        Form("one sequence at a time", "naive", one_by_one),
        Form("padded batches", "tool", padded),
        Form("shots read once", "ours", shared_shots),
    ),
    aims=(Aim("one sequence at a time", "time", 5), Aim("padded batches", "time", 5)),
    floor=floor,
    floor_formula="forward(shots) + examples x forward(own tokens, attention to the shots, answer rows)",
    remains="Each layer joins the shots' keys and values with those of the batch, a copy per batch; the K largest of "
    "every row are sorted.",
)
