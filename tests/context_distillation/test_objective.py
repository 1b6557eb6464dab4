"""Cached and online teachers give the loss and gradients of a naive two-copy, full-logits implementation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from context_distillation.conftest import CONTEXTS
from torch import Tensor
from torch.nn import functional

from stillhouse.data.exemplars import ShotSampler
from stillhouse.data.packing import NO_LABEL
from stillhouse.models.loading import load_model
from stillhouse.models.target_cache import TeacherTargets
from stillhouse.runtime.errors import UserError
from stillhouse.runtime.seeds import generator
from stillhouse.studies.context_distillation.data import student_data, teacher_examples
from stillhouse.studies.context_distillation.objective import (
    ContextDistillationObjective,
    kl_divergence,
    mean_squared_difference,
)
from stillhouse.studies.context_distillation.run_settings import DistillationSettings
from stillhouse.studies.context_distillation.teacher import CachedTeacher, OnlineTeacher

SEED, TOP_K, STEPS = 5, 16, 10
LOSSES = {
    "mse_top_k": DistillationSettings(top_k=7),
    "mse_random_k": DistillationSettings(loss="mse_random_k", top_k=7),
    "kl": DistillationSettings(loss="kl", temperature=2.0, weight=0.3),
    "one_late": DistillationSettings(top_k=7, positions="one_late"),
    "kl_one_late": DistillationSettings(loss="kl", positions="one_late"),
}
# Every loss; shared shots in both cache modes; padding with both kinds of rows.
CASES = [
    *((name, "per_example", True) for name in LOSSES),
    *((name, sampling, True) for name in ("mse_top_k", "kl") for sampling in ("grouped", "fixed")),
    *((name, "fixed", False) for name in ("kl", "one_late")),
]


def mode_of(settings: DistillationSettings) -> str:
    return "top_k" if settings.loss == "mse_top_k" else "hidden"


def naive_distance(settings: DistillationSettings, student: Tensor, teacher: Tensor, example_id: str) -> Tensor:
    """Of all logits of one example's distilled positions, [n, vocab] each."""
    total = torch.zeros(())
    draw = generator(SEED, "random ids", example_id)
    ids = torch.randint(student.shape[1], (len(student) + 1, settings.top_k), generator=draw)
    ids = ids[1:] if settings.positions == "one_late" else ids[:-1]
    for row in range(len(student)):
        if settings.loss == "kl":
            log_p, log_q = ((x[row] / settings.temperature).log_softmax(0) for x in (teacher, student))
            total = total + settings.temperature**2 * (log_p.exp() * (log_p - log_q)).sum()
        else:
            chosen = teacher[row].argsort(descending=True)[: settings.top_k]
            chosen = chosen if settings.loss == "mse_top_k" else ids[row]
            total = total + (student[row, chosen] - teacher[row, chosen]).pow(2).mean()
    return total


def naive_loss(settings, context, student, base, problems, renderer, ids) -> tuple[Tensor, int]:
    """Two models, one example at a time, logits of every position, as the published training script does it."""
    sampler = ShotSampler(problems, context.shots, context.sampling, context.groups, context.exemplars, context.seed)
    total, count = torch.zeros(()), 0
    for identity in ids:
        index = next(place for place, problem in enumerate(problems) if problem.id == identity)
        ours = renderer.sequence(problems[index])
        theirs = renderer.sequence(problems[index], sampler.draw(index))
        student_logits = student(input_ids=torch.tensor([ours.input_ids])).logits[0]
        with torch.no_grad():
            teacher_logits = base(input_ids=torch.tensor([theirs.input_ids])).logits[0]
        labels = torch.full((len(ours),), -100)
        labels[ours.answer_start :] = torch.tensor(ours.answer_ids)
        total = total + functional.cross_entropy(student_logits[:-1], labels[1:], reduction="sum")
        # Published: logits[start:end] of both, which predict the tokens after the answer's first, and one beyond.
        shift = 0 if settings.positions == "one_late" else 1
        ours_rows = student_logits[ours.answer_start - shift : len(ours) - shift]
        theirs_rows = teacher_logits[theirs.answer_start - shift : len(theirs) - shift]
        total = total + settings.weight * naive_distance(settings, ours_rows, theirs_rows, identity)
        count += len(ours.answer_ids)
    return total, count


def gradients(model, total: Tensor, count: int) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    (total / count).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def loss_of(objective, model, data, indices, budget: int = 160) -> tuple[Tensor, int, dict[str, Tensor]]:
    """Summed over micro-batches, as the loop does."""
    parts = [objective(model, batch, step=1) for batch in data.micro_batches(indices, budget)]
    assert len(parts) > 1
    terms = {name: sum(part.terms[name] for part in parts) for name in parts[0].terms}
    return sum(part.total for part in parts), sum(part.count for part in parts), terms


@pytest.mark.parametrize(("name", "sampling", "packing"), CASES)
def test_cached_online_and_naive_agree(name, sampling, packing, student, tiny_model, problems, renderer, build_cache):
    settings, context = LOSSES[name], CONTEXTS[sampling]
    mode = mode_of(settings)
    data = student_data(problems, renderer, context, 512, packing=packing, positions=settings.positions)
    examples = teacher_examples(problems, renderer, context, 2048)
    indices = [5, 2, 0, 6, 2]
    ids = [data.sequences[index].example_id for index in indices]
    base = load_model(tiny_model, "fp32")
    total, count = naive_loss(settings, context, student, base, problems, renderer, ids)
    expected = gradients(student, total, count)
    teachers = [
        CachedTeacher(build_cache(mode, context), student, mode, settings.top_k),
        OnlineTeacher(student, examples, mode, TOP_K, batch_tokens=512),
    ]
    for teacher in teachers:
        objective = ContextDistillationObjective(settings, STEPS, SEED, teacher)
        loss, answer_tokens, terms = loss_of(objective, student, data, indices)
        assert answer_tokens == count
        torch.testing.assert_close(loss / count, total / count, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(terms["ce"] + settings.weight * terms["distillation"], loss.detach())
        found = gradients(student, loss, answer_tokens)
        assert found.keys() == expected.keys() and all("lora" in parameter for parameter in found)
        for parameter, gradient in found.items():
            torch.testing.assert_close(gradient, expected[parameter], rtol=1e-4, atol=1e-6, msg=parameter)
        assert student.training


@pytest.mark.parametrize("name", ["mse_top_k", "kl"])
def test_a_fully_trained_student_is_taught_by_its_base_s_head(name, tiny_model, problems, renderer, build_cache):
    settings, context = LOSSES[name], CONTEXTS["fixed"]
    model = load_model(tiny_model, "fp32").train()
    data = student_data(problems, renderer, context, 512)
    teacher = CachedTeacher(build_cache(mode_of(settings), context), model, mode_of(settings), settings.top_k)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1.5)
    ids = [sequence.example_id for sequence in data.sequences]
    base = load_model(tiny_model, "fp32")
    total, count = naive_loss(settings, context, model, base, problems, renderer, ids)
    objective = ContextDistillationObjective(settings, STEPS, SEED, teacher)
    loss, _, _ = loss_of(objective, model, data, range(len(data)))
    torch.testing.assert_close(loss / count, total / count, rtol=1e-6, atol=1e-6)
    if teacher.head is not None:
        assert teacher.head.weight.data_ptr() != model.get_output_embeddings().weight.data_ptr()


def test_a_frozen_head_is_shared_and_not_copied(student, build_cache) -> None:
    teacher = CachedTeacher(build_cache("hidden", CONTEXTS["fixed"]), student, "hidden", 0)
    assert teacher.head is not None and teacher.head.weight is student.get_output_embeddings().weight


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
def test_one_late_never_distils_the_first_answer_token(packing, student, problems, renderer, build_cache) -> None:
    """The published misalignment: the loss ignores what predicts the first token, and reads one row beyond the last."""
    settings, context = LOSSES["one_late"], CONTEXTS["per_example"]
    teacher = CachedTeacher(build_cache("top_k", context), student, "top_k", settings.top_k)
    data = student_data(problems, renderer, context, 512, packing=packing, positions="one_late")
    [batch] = data.micro_batches([0], 4096)
    assert batch.labels[-1] == NO_LABEL

    class Changed:
        head = None

        def __init__(self, row: int) -> None:
            self.row = row

        def targets(self, example_ids) -> TeacherTargets:
            targets = teacher.targets(example_ids)
            logits = targets.top_logits.clone()
            logits[self.row] += 3
            return replace(targets, top_logits=logits)

    def distillation(source) -> float:
        objective = ContextDistillationObjective(settings, STEPS, SEED, source)
        return objective(student, batch, 1).terms["distillation"].item()

    assert distillation(Changed(0)) == distillation(teacher)
    assert distillation(Changed(-1)) != distillation(teacher)


def test_without_a_loss_there_is_no_teacher_and_only_cross_entropy(student, problems, renderer) -> None:
    settings, context = DistillationSettings(loss="none"), CONTEXTS["fixed"]
    [batch] = student_data(problems, renderer, context, 512).micro_batches([0, 1], 4096)
    terms = ContextDistillationObjective(settings, STEPS)(student, batch, 1)
    assert set(terms.terms) == {"ce"} and terms.total.item() == terms.terms["ce"].item()
    with pytest.raises(ValueError, match="needs a teacher"):
        ContextDistillationObjective(LOSSES["kl"], STEPS)


@pytest.mark.parametrize(
    ("window", "active"),
    [
        ({}, range(1, 11)),
        ({"only_first_steps": 3}, range(1, 4)),
        ({"only_last_steps": 2}, range(9, 11)),
        ({"only_first_steps": 1, "only_last_steps": 1}, (1, 10)),
    ],
)
def test_a_timing_window_switches_the_term_off_and_still_logs_it(
    window, active, student, problems, renderer, build_cache
) -> None:
    settings, context = DistillationSettings(top_k=7, **window), CONTEXTS["fixed"]
    teacher = CachedTeacher(build_cache("top_k", context), student, "top_k", 7)
    objective = ContextDistillationObjective(settings, STEPS, SEED, teacher)
    assert [step for step in range(1, STEPS + 1) if objective.weight(step)] == list(active)
    [batch] = student_data(problems, renderer, context, 512).micro_batches([0], 4096)
    for step in (1, 5, 10):
        terms = objective(student, batch, step)
        expected = terms.terms["ce"] + (settings.weight if step in active else 0) * terms.terms["distillation"]
        assert terms.terms["distillation"] > 0
        torch.testing.assert_close(terms.total.detach(), expected)


def test_the_squared_difference_has_gather_s_gradient_and_keeps_no_logits() -> None:
    weights, values = torch.randn(6, 50, dtype=torch.float64, requires_grad=True), torch.randn(6, 8).double()
    ids = torch.randint(50, (6, 8))
    ids[:, 1] = ids[:, 0]  # mse_random_k may draw an id twice
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    reference = (weights.gather(1, ids) - values).square().mean(1).sum()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        found = mean_squared_difference(weights, ids, values)
    torch.testing.assert_close(found, reference)
    torch.testing.assert_close(*(torch.autograd.grad(loss, weights)[0] for loss in (found, reference)))
    assert kept and all(tensor.shape[1] == 8 for tensor in kept if tensor.ndim == 2)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_kl_is_torch_s_kl_div_at_a_temperature(temperature) -> None:
    student, teacher = torch.randn(2, 6, 50, dtype=torch.float64)
    reference = functional.kl_div(
        (student / temperature).log_softmax(-1), (teacher / temperature).softmax(-1), reduction="sum"
    )
    torch.testing.assert_close(kl_divergence(student, teacher, temperature), reference * temperature**2)
    assert kl_divergence(student, student, temperature).item() == pytest.approx(0, abs=1e-12)


def test_the_gradient_of_kl_keeps_its_size_at_high_temperature() -> None:
    """Hinton et al. (arXiv 1503.02531), section 2.1: T^2 times the KL tends to half the squared distance / vocab."""
    student, teacher = torch.randn(2, 4, 30, dtype=torch.float64)
    student, teacher = (logits - logits.mean(-1, keepdim=True) for logits in (student, teacher))
    limit = (student - teacher).square().sum() / (2 * 30)
    torch.testing.assert_close(kl_divergence(student, teacher, 1e4), limit, rtol=1e-3, atol=0)


def test_misaligned_answers_are_refused_and_the_place_is_named(student, problems, renderer, build_cache) -> None:
    context = CONTEXTS["fixed"]
    teacher = CachedTeacher(build_cache("top_k", context), student, "top_k", 7)
    data = student_data(problems, renderer, context, 512)
    changed = replace(data.sequences[1], input_ids=[*data.sequences[1].input_ids])
    changed.input_ids[changed.answer_start + 3] += 1
    data.sequences = [data.sequences[0], changed]
    [batch] = data.micro_batches([0, 1], 4096)
    objective = ContextDistillationObjective(DistillationSettings(top_k=7), STEPS, SEED, teacher)
    with pytest.raises(UserError, match=f"{changed.example_id}: the student's answer .* differ from answer token 3"):
        objective(student, batch, 1)
