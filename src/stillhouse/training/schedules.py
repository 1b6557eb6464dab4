"""The learning rate's factor as a pure function of the step: nothing to save, and nothing to step twice.

The shapes are those of transformers' schedulers of the same names (`exponential`: a geometric decay to
`final_factor`); a test compares them.
"""

from __future__ import annotations

import math

from stillhouse.config.training import ScheduleSettings


def learning_rate_factor(step: int, settings: ScheduleSettings, total_steps: int) -> float:
    """The factor in [0, 1] for the update after `step` completed ones; the first update has `step` 0."""
    if step < settings.warmup_steps:
        return step / settings.warmup_steps
    progress = min(1.0, (step - settings.warmup_steps) / max(1, total_steps - settings.warmup_steps))
    if settings.kind == "constant":
        return 1.0
    if settings.kind == "exponential":
        return settings.final_factor**progress
    return settings.final_factor + (1 - settings.final_factor) * _decay(progress, settings)


def _decay(progress: float, settings: ScheduleSettings) -> float:
    """The shape's fall from 1 at progress 0 to 0 at progress 1."""
    if settings.kind == "linear":
        return 1 - progress
    if settings.kind == "polynomial":
        return float((1 - progress) ** settings.power)
    if settings.kind == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    within_cycle = 1.0 if progress >= 1 else (settings.cycles * progress) % 1
    return 0.5 * (1 + math.cos(math.pi * within_cycle))
