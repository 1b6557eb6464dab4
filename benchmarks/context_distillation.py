"""Context distillation: a training step on cached targets, and a small study of five conditions with its cache.

The naive form is the published one: a second copy of the model reads shots, question and answer of every example in
every step, all logits are made, the student's activations are recomputed in its backward pass. `adapter off` is the
form of ms-swift's GKD with a teacher prompt: one copy of the weights, the top K of the teacher in each step. Here it
runs on this package's own code; `ms_swift` has the tool itself, in the environment that it needs.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import functional

from benchmarks.harness import Aim, Benchmark, Floor, Form, Outcome, Work
from benchmarks.scale import Scale, loss_and_gradients, model_directory, problem_directory, student
from stillhouse.data.packing import NO_LABEL, Sequence
from stillhouse.data.prompts import prompt_renderer
from stillhouse.data.records import read_problems
from stillhouse.models.loading import enable_gradient_checkpointing, frozen, load_model, load_tokenizer
from stillhouse.runtime.digests import short_digest
from stillhouse.studies.context_distillation.data import (
    ContextDistillationData,
    TeacherExamples,
    student_data,
    teacher_examples,
)
from stillhouse.studies.context_distillation.objective import ContextDistillationObjective
from stillhouse.studies.context_distillation.run_settings import CacheSettings, ContextSettings, DistillationSettings
from stillhouse.studies.context_distillation.teacher import CachedTeacher, OnlineTeacher, TargetSource, TeacherStep
from stillhouse.studies.context_distillation.teacher import main as build_cache

LONGEST = 32768
EPOCHS, WEIGHTS = 3, (0.1, 0.3, 0.5, 1.0, 2.0)


def context(scale: Scale) -> ContextSettings:
    """Shots of its own for each example, as published."""
    return ContextSettings(shots=scale.shots, sampling="per_example")


def problems(folder: Path, scale: Scale) -> tuple[ContextDistillationData, TeacherExamples]:
    """What student and teacher read of one batch; the shots are the batch's other problems and a few more."""
    found = read_problems(data_directory(folder, scale) / "train.jsonl")
    renderer = prompt_renderer(load_tokenizer(model_directory(folder, scale)))
    return (
        student_data(found, renderer, context(scale), LONGEST),
        teacher_examples(found, renderer, context(scale), LONGEST),
    )


def data_directory(folder: Path, scale: Scale) -> Path:
    """At least as many problems as the shots need."""
    return problem_directory(folder, scale, max(scale.batch, scale.shots + 1))


def built_cache(folder: Path, scale: Scale, output: Path) -> Path:
    """The teacher cache as its step program makes it."""
    settings = CacheSettings(
        mode="top_k",
        model=None,
        adapter=False,
        context=context(scale),
        max_length=LONGEST,
        top_k=scale.top_k,
        precision=scale.precision,
        batch_tokens=8192,
        prompt_format="auto",
        overlong="error",
        train_examples=None,
    )
    model = model_directory(folder, scale)
    work = output.parent / f"{output.name}-work"
    build_cache(
        TeacherStep(
            data=data_directory(folder, scale), student=model, teacher=model, output=output, work=work, cache=settings
        )
    )
    return output


def cached_step(folder: Path, scale: Scale) -> Work:
    """Ours: the answer rows of packed sequences, targets from the cache."""
    cache = folder / f"cache-{short_digest(repr(scale))}"
    if not cache.exists():
        built_cache(folder, scale, cache)
    model = student(model_directory(folder, scale), scale)
    data, _ = problems(folder, scale)
    return partial(our_step, model, data, CachedTeacher(cache, model, "top_k", scale.top_k), scale)


def checkpointed_step(folder: Path, scale: Scale) -> Work:
    """Ours with `training.gradient_checkpointing`: activations are recomputed, as in the naive form."""
    step = cached_step(folder, scale)
    assert isinstance(step, partial)
    enable_gradient_checkpointing(step.args[0])
    return step


def example_by_example_step(folder: Path, scale: Scale) -> Work:
    """Ours with `training.micro_batch_tokens` for one example in a pass."""
    step = cached_step(folder, scale)
    assert isinstance(step, partial)
    return partial(step, micro_batch_tokens=1)


def adapter_off_step(folder: Path, scale: Scale) -> Work:
    """The teacher behind the student's adapter, in each step."""
    model = student(model_directory(folder, scale), scale)
    data, examples = problems(folder, scale)
    return partial(our_step, model, data, OnlineTeacher(model, examples, "top_k", scale.top_k, 8192), scale)


def our_step(
    model: PeftModel,
    data: ContextDistillationData,
    teacher: TargetSource,
    scale: Scale,
    weight: float = 0.5,
    micro_batch_tokens: int = LONGEST,
) -> Outcome:
    """Forward and backward passes of one batch through the study's objective, as the training loop makes them."""
    settings = DistillationSettings(loss="mse_top_k", top_k=scale.top_k, weight=weight)
    objective = ContextDistillationObjective(settings, 1, 0, teacher)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.zero_grad(set_to_none=True)
    loss, count = torch.zeros((), device=model.device), 0
    for batch in data.micro_batches(range(scale.batch), micro_batch_tokens):
        terms = objective(model, batch.to(model.device), 1)
        terms.total.backward()
        loss, count = loss + terms.total.detach(), count + terms.count
    return {"loss": loss / count} | {name: parameter.grad / count for name, parameter in trained.items()}


def naive_step(folder: Path, scale: Scale) -> Work:
    """Two copies, padded on the right with an attention mask, checkpointing as it is usually switched on."""
    model = student(model_directory(folder, scale), scale)
    enable_gradient_checkpointing(model)
    teacher = frozen(load_model(model_directory(folder, scale), scale.precision))
    data, examples = problems(folder, scale)
    ours, theirs = data.sequences[: scale.batch], examples.sequences[: scale.batch]
    return partial(naive_loss, model, teacher, list(ours), list(theirs), scale)


def naive_loss(
    model: PeftModel,
    teacher: torch.nn.Module,
    ours: list[Sequence],
    theirs: list[Sequence],
    scale: Scale,
    weight: float = 0.5,
) -> Outcome:
    """Cross entropy and the mean squared difference of the teacher's top K, from the logits of every position."""
    with torch.no_grad():
        taught, _ = all_logits(teacher, theirs)
    learnt, labels = all_logits(model, ours)
    top = taught.topk(scale.top_k)
    cross_entropy = functional.cross_entropy(learnt, labels, reduction="sum")
    distance = (learnt.gather(1, top.indices) - top.values).square().mean(1).sum()
    return loss_and_gradients(model, (cross_entropy + weight * distance) / len(labels))


def all_logits(model: torch.nn.Module, sequences: list[Sequence]) -> tuple[Tensor, Tensor]:
    """Logits [R, vocabulary] that predict the answers, chosen after all were made, and the answers' tokens [R]."""
    longest, device = max(map(len, sequences)), next(model.parameters()).device
    ids = torch.zeros(len(sequences), longest, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, NO_LABEL)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence.input_ids)
        mask[row, : len(sequence)] = 1
        labels[row, sequence.answer_start : len(sequence)] = torch.tensor(sequence.answer_ids)
    logits = model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits.float()
    labels = labels[:, 1:].to(device)
    return logits[:, :-1][labels != NO_LABEL], labels[labels != NO_LABEL]


def step_floor(folder: Path, scale: Scale, teaching: bool = False) -> Floor:
    """Forward and backward pass of the student; with `teaching` also the teacher's forward pass."""
    data, examples = problems(folder, scale)
    ours, theirs = data.sequences[: scale.batch], examples.sequences[: scale.batch]
    rows = sum(len(sequence.answer_ids) for sequence in ours)
    needed = 2 * forward_operations(scale, ours, rows)
    if teaching:
        needed += forward_operations(scale, theirs, rows)
    return Floor(needed, 2 * scale.weight_bytes, sum(map(len, ours)))


def forward_operations(scale: Scale, sequences: Items[Sequence], rows: int) -> float:
    """Of sequences that each see themselves alone, causally."""
    pairs = sum(len(sequence) * (len(sequence) + 1) / 2 for sequence in sequences)
    return scale.operations(sum(map(len, sequences)), pairs, rows)


def naive_study(folder: Path, scale: Scale) -> Work:
    """Three epochs of every condition, the teacher in each step."""
    step = naive_step(folder, scale)
    assert isinstance(step, partial)
    return lambda: study(step)


def adapter_off_study(folder: Path, scale: Scale) -> Work:
    """The same with the adapter switched off for the teacher."""
    step = adapter_off_step(folder, scale)
    assert isinstance(step, partial)
    return lambda: study(step)


def cached_study(built: bool, folder: Path, scale: Scale) -> Work:
    """The cache is built anew, model loading and files included, or was built before; then the same steps read it."""
    model = student(model_directory(folder, scale), scale)
    data, _ = problems(folder, scale)
    place = folder / f"study-cache-{built}"
    earlier = built_cache(folder, scale, place) if built else None

    def work() -> Outcome:
        teacher = CachedTeacher(earlier or built_cache(folder, scale, place), model, "top_k", scale.top_k)
        return study(partial(our_step, model, data, teacher, scale))

    return work


def study(step: partial[Outcome]) -> Outcome:
    """Every epoch of every condition; the weights stay as they are, so that the last step can be compared."""
    for weight in WEIGHTS:
        for _ in range(EPOCHS):
            outcome = step(weight=weight)
    return outcome


def study_floor(folder: Path, scale: Scale) -> Floor:
    """One pass of the teacher, and every step of the student."""
    with_teacher, alone = step_floor(folder, scale, teaching=True), step_floor(folder, scale)
    steps = EPOCHS * len(WEIGHTS)
    return Floor(with_teacher.operations + (steps - 1) * alone.operations, steps * alone.bytes, steps * alone.tokens)


STEP = Benchmark(
    name="context_step",
    what="context distillation, training step on cached targets",
    forms=(
        Form("naive", "naive", naive_step),
        Form("adapter off, teacher in each step", "other", adapter_off_step),
        Form("cached targets, activations recomputed", "other", checkpointed_step),
        Form("cached targets, one example in a pass", "other", example_by_example_step),
        Form("cached targets", "ours", cached_step),
    ),
    aims=(
        Aim("naive", "operations", 6),
        Aim("naive", "time", 5),
        Aim(
            "naive",
            "memory",
            2,
            cause="The naive form recomputes its activations, ours keeps those of a whole update, which is what makes "
            "it fast. `training.micro_batch_tokens` trades time for memory, and so does "
            "`training.gradient_checkpointing`: see the forms with one example in a pass and with recomputed "
            "activations. The output embeddings of this scale are small for its width: with a real vocabulary the "
            "naive form's logits would weigh more beside the activations.",
        ),
    ),
    floor=step_floor,
    floor_formula="2 x forward(student tokens, answer rows): the frozen base needs no gradient of its weights",
    # The README quotes it: more rounds than the other rows have.
    change=lambda scale: replace(scale, seconds=8 * scale.seconds),
    remains="Packed sequences share one mask, so attention computes the square of the whole row; norms, rotations and "
    "softmax move bytes and count no operation.",
)
CACHE_BUILT = "cached targets, the cache built before"
STUDY = Benchmark(
    name="context_study",
    what=f"the same over {EPOCHS} epochs x {len(WEIGHTS)} conditions, cache build included",
    forms=(
        Form("naive", "naive", naive_study, counted=False),
        Form("adapter off, teacher in each step", "tool", adapter_off_study, counted=False),
        Form(CACHE_BUILT, "other", partial(cached_study, True), counted=False),
        Form("cached targets", "ours", partial(cached_study, False), counted=False),
    ),
    aims=(
        Aim(
            "naive",
            "time",
            4,
            cause="Loading a teacher and writing its checked shards happens once in a study of any length: fifteen "
            "steps carry here what a real study spreads over thousands.",
            without=CACHE_BUILT,
        ),
        Aim("adapter off, teacher in each step", "time", 2),
    ),
    floor=study_floor,
    floor_formula="forward(teacher tokens, answer rows) + steps x 2 x forward(student tokens, answer rows)",
    remains="Loading the teacher and writing the cache with its checksums, once; then the step's own.",
    # A round is fifteen steps of every form. The batch is all that the cache holds: an epoch learns from each example.
    change=lambda scale: replace(
        scale, layers=max(1, scale.layers // 2), batch=scale.shots + 1, rounds=min(3, scale.rounds)
    ),
    checked=lambda scale: replace(scale, batch=1),
)
