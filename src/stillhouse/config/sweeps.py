"""Sweeps: a grid of overrides over one condition, declared by any study and fanned out by the DAG."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from stillhouse.config.base import StrictModel


@dataclass(frozen=True)
class SweepPoint:
    """One point of a grid: a name fit for a path, the axes' values, and the nested overrides they mean."""

    name: str
    values: dict[str, Any]
    overrides: dict[str, Any]


class Sweep(StrictModel):
    """Every combination of the axes' values, each laid over `condition`."""

    condition: str
    axes: Annotated[
        dict[str, Annotated[tuple[Any, ...], Field(min_length=1)]],
        Field(min_length=1, description="Dotted key of the run settings -> values."),
    ]

    def points(self) -> list[SweepPoint]:
        """The grid, in the order of the axes."""
        points = []
        for combination in itertools.product(*self.axes.values()):
            values = dict(zip(self.axes, combination, strict=True))
            overrides: dict[str, Any] = {}
            for key, value in values.items():
                *parents, leaf = key.split(".")
                target = overrides
                for parent in parents:
                    target = target.setdefault(parent, {})
                target[leaf] = value
            label = "+".join(f"{key.rpartition('.')[2]}-{_path_safe(value)}" for key, value in values.items())
            points.append(SweepPoint(f"{self.condition}+{label}", values, overrides))
        return points


def swept_values(name: str) -> tuple[str, tuple[tuple[str, str], ...]]:
    """The condition that a point's name begins with, and each axis with its value; no axes for a plain condition."""
    condition, *labels = name.split("+")
    return condition, tuple((axis, value) for axis, _, value in (label.partition("-") for label in labels))


def _path_safe(value: Any) -> str:
    return re.sub(r"[^A-Za-z0-9.-]", "-", str(value))
