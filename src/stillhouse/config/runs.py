"""The settings of a run from its layers: defaults, then overrides of the model, the condition, the sweep point."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from stillhouse.config.layering import merge, relocated

Model = TypeVar("Model", bound=BaseModel)
# The section of the study that a layer stands in, its name there, and what it overrides.
OverrideLayer = tuple[str, str, Mapping[str, Any]]


def resolve_run(defaults: Model, layers: Iterable[OverrideLayer]) -> Model:
    """Lay `layers` over `defaults`, later wins; a `SettingError` names the layer and the key at fault."""
    settings, values = defaults, defaults.model_dump()
    for section, name, overrides in layers:
        values = merge(values, overrides)
        try:
            settings = type(defaults).model_validate(values)
        except ValidationError as error:
            raise relocated(error, type(defaults), (section, name)) from None
    return settings
