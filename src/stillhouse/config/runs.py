"""Runs of a study: conditions and sweep points, each laid over the settings of what they are run on (a model, a pair).

A run's settings are the study's `defaults`, then what the model or pair overrides, then the condition, then the sweep
point. Each is resolved once, while the DAG is built.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from pydantic import BaseModel, ValidationError

from stillhouse.config.base import SettingError, check_path_names, remembered
from stillhouse.config.layering import merge, nearest, relocated
from stillhouse.config.sweeps import Sweep, SweepPoint

Run = TypeVar("Run", bound=BaseModel)
Overrides = dict[str, Any]


class ConditionRuns(Generic[Run]):
    """What a study's configuration, a `StrictModel`, inherits beside its fields."""

    # Conditions that are evaluated but never trained.
    untrained: ClassVar[tuple[str, ...]] = ()

    if TYPE_CHECKING:
        conditions: tuple[str, ...]
        condition_settings: dict[str, Overrides]
        sweeps: dict[str, Sweep]

    def subject_defaults(self, subject: str) -> Run:
        """The run settings of a model or pair before any condition."""
        raise NotImplementedError

    @property
    def trained_conditions(self) -> tuple[str, ...]:
        """The conditions that are trained, sweep points included, each once."""
        named = (name for name in self.conditions if name not in self.untrained)
        return tuple(dict.fromkeys([*named, *self.sweep_points]))

    @cached_property
    def sweep_points(self) -> dict[str, tuple[Sweep, SweepPoint]]:
        """Every sweep's points by name."""
        return {point.name: (sweep, point) for sweep in self.sweeps.values() for point in sweep.points()}

    @remembered
    def run_settings(self, subject: str, condition: str) -> Run:
        """The settings of one run; raises `SettingError` that names the layer and key at fault."""
        if condition in self.sweep_points:
            sweep, point = self.sweep_points[condition]
            return laid_over(self._condition(subject, sweep.condition), ("sweeps", condition), point.overrides)
        return self._condition(subject, condition)

    @remembered
    def _condition(self, subject: str, condition: str) -> Run:
        overrides = self.condition_settings[condition]
        return laid_over(self.subject_defaults(subject), ("condition_settings", condition), overrides)

    def check_condition_names(self) -> None:
        """Refuse conditions that are declared nowhere, names that no folder may have, and points of one name."""
        check_path_names("condition_settings", self.condition_settings)
        for name in self.condition_settings:
            if "+" in name:
                raise SettingError(("condition_settings", name), "no '+': it parts a sweep's values")
        for key, sweep in self.sweeps.items():
            names = [point.name for point in sweep.points()]
            if repeated := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
                raise SettingError(("sweeps", key, "axes"), f"two points are called '{repeated[0]}': drop one")
        valid = [*self.untrained, *self.condition_settings]
        for name in (*self.conditions, *(sweep.condition for sweep in self.sweeps.values())):
            if name not in valid:
                raise SettingError(("conditions",), f"unknown condition '{name}': {nearest(name, valid, 'conditions')}")


def laid_over(settings: Run, location: tuple[str, ...], overrides: Mapping[str, Any]) -> Run:
    """`settings` with `overrides`; a `SettingError` names the layer by its `location`, and the key at fault."""
    try:
        return type(settings).model_validate(merge(settings.model_dump(), overrides))
    except ValidationError as error:
        raise relocated(error, type(settings), location) from None
