"""Sweeps as they came out: conditions as points on axes, and the winner that validation picks; no torch here."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stillhouse.studies.quantized_distillation.results import QuantizedEvaluation, SystemFacts

AXES = ("learning_rate", "beta", "on_policy_share", "lora_rank", "weight_format", "placement")
# The figures of sweeps, and what varies in each panel of a model.
SWEPT: dict[str, tuple[tuple[str, ...], ...]] = {
    "sweep_lr": (("learning_rate",),),
    "beta_lambda": (("beta", "on_policy_share"),),
    "rank_and_format": (("lora_rank", "on_policy_share"), ("weight_format", "on_policy_share")),
}


@dataclass(frozen=True)
class Cell:
    """One trained condition with all of its seeds."""

    systems: tuple[SystemFacts, ...]

    @property
    def condition(self) -> str:
        """Its name."""
        return self.systems[0].condition

    def at(self, axis: str) -> float | str:
        """Its value on an axis of `AXES`."""
        value: float | str = getattr(self.systems[0], axis)
        return value

    @property
    def validation_kl(self) -> float:
        """KL to the teacher on validation at the chosen checkpoints, the mean over seeds: what picks a winner."""
        return float(np.mean([one.validation_kl for one in self.systems if one.validation_kl is not None]))


def cells(evaluation: QuantizedEvaluation) -> list[Cell]:
    """Every trained condition whose validation is known."""
    found = (evaluation.results.of(condition) for condition in evaluation.results.conditions)
    return [Cell(tuple(systems)) for systems in found if systems[0].trained and systems[0].validation_kl is not None]


def groups_along(evaluation: QuantizedEvaluation, axes: Sequence[str]) -> list[list[Cell]]:
    """The cells that differ in nothing but `axes`, where at least two do; the largest group first.

    Two conditions at one place (a sweep's point, and the condition by its own name) are one: the first.
    """
    groups: dict[tuple[float | str, ...], dict[tuple[float | str, ...], Cell]] = defaultdict(dict)
    for cell in cells(evaluation):
        rest = tuple(cell.at(axis) for axis in AXES if axis not in axes)
        groups[rest].setdefault(tuple(cell.at(axis) for axis in axes), cell)
    found = [list(group.values()) for group in groups.values() if len(group) > 1]
    return sorted(found, key=len, reverse=True)


def grid_over(evaluation: QuantizedEvaluation, axes: Sequence[str]) -> list[Cell] | None:
    """The largest of `groups_along` in which every axis varies; None where there is none."""
    for group in groups_along(evaluation, axes):
        if all(len({cell.at(axis) for cell in group}) > 1 for axis in axes):
            return group
    return None


def winner(found: Sequence[Cell]) -> Cell:
    """The cell with the lowest KL on validation; the first of equals."""
    return min(found, key=lambda cell: cell.validation_kl)
