"""The learning rate's factor against the libraries that define the shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import get_scheduler

from stillhouse.config.training import ScheduleSettings, TrainingSettings
from stillhouse.training.schedules import learning_rate_factor

STEPS, WARMUP = 40, 6


def library_rates(name: str, **arguments: Any) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = get_scheduler(name, optimizer, WARMUP, STEPS, scheduler_specific_kwargs=arguments)
    rates = []
    for _ in range(STEPS):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def our_rates(**settings: Any) -> list[float]:
    schedule = ScheduleSettings(warmup_steps=WARMUP, **settings)
    return [learning_rate_factor(step, schedule, STEPS) for step in range(STEPS)]


@pytest.mark.parametrize(
    ("ours", "name", "arguments"),
    [
        ({"kind": "constant"}, "constant_with_warmup", {}),
        ({"kind": "linear"}, "linear", {}),
        ({"kind": "cosine"}, "cosine", {}),
        ({"kind": "cosine", "final_factor": 0.1}, "cosine_with_min_lr", {"min_lr_rate": 0.1}),
        ({"kind": "cosine_with_restarts", "cycles": 3}, "cosine_with_restarts", {"num_cycles": 3}),
        ({"kind": "polynomial", "power": 2.0, "final_factor": 0.2}, "polynomial", {"power": 2.0, "lr_end": 0.2}),
    ],
)
def test_each_shape_equals_the_scheduler_of_transformers(ours: Any, name: str, arguments: Any) -> None:
    assert our_rates(**ours) == pytest.approx(library_rates(name, **arguments), abs=1e-12)


def test_exponential_equals_the_scheduler_of_torch_after_the_warmup() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.01 ** (1 / (STEPS - WARMUP)))
    expected = []
    for _ in range(STEPS - WARMUP):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert our_rates(kind="exponential", final_factor=0.01)[WARMUP:] == pytest.approx(expected)


def test_exponential_decay_to_zero_is_refused() -> None:
    with pytest.raises(ValidationError, match="final_factor must be above 0"):
        ScheduleSettings(kind="exponential")


def test_a_warmup_as_long_as_the_run_is_refused() -> None:
    with pytest.raises(ValidationError, match="warmup_steps"):
        TrainingSettings(steps=50)
