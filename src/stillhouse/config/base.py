"""The base of every configuration model: unknown keys are errors, values are frozen once validated."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import cached_property, wraps
from typing import Any, TypeVar, cast

from pydantic import BaseModel, ConfigDict

Method = TypeVar("Method", bound=Callable[..., Any])


class StrictModel(BaseModel):
    """A pydantic model that refuses unknown keys and cannot be changed after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    @cached_property
    def _answers(self) -> dict[tuple[Any, ...], Any]:
        """What `remembered` methods have computed; unlike a private attribute it is no part of equality."""
        return {}


class SettingError(ValueError):
    """A fault that a validator finds below its own model; `location` leads from there to the setting."""

    def __init__(self, location: tuple[str | int, ...], message: str) -> None:
        super().__init__(message)
        self.location = location


def check_path_names(key: str, names: Iterable[str]) -> None:
    """Refuse names that folders, wildcards and command lines cannot carry; `key` is where they are given."""
    for name in names:
        if not re.fullmatch(r"\w[\w.+-]*", name):
            raise SettingError((key, name), "a name is letters, digits, '_', '.', '+' and '-', since folders bear it")


def remembered(method: Method) -> Method:
    """Compute a method of a `StrictModel` once per distinct (hashable) arguments: the model cannot change.

    The workflow asks for a run's settings in each of its jobs, and there may be ten thousand.
    """

    @wraps(method)
    def answer(self: StrictModel, *arguments: Any) -> Any:
        key = (method.__name__, *arguments)
        if key not in self._answers:
            self._answers[key] = method(self, *arguments)
        return self._answers[key]

    return cast(Method, answer)
