"""How configuration layers become one validated configuration, and how a fault in them is explained.

Later layers win: the models' defaults, `config/config.yaml`, `--configfile`, `--config`; inside a study its defaults,
the model's, the condition's and the sweep point's overrides. Layers merge with OmegaConf, interpolation included.
"""

from __future__ import annotations

import difflib
import functools
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from stillhouse.config.base import SettingError
from stillhouse.runtime.errors import ConfigurationError

Model = TypeVar("Model", bound=BaseModel)
Location = tuple[str | int, ...]


@dataclass(frozen=True)
class Layer:
    """One source of settings: `name` is what a message calls it, a file's path or `--config`."""

    name: str
    values: Mapping[str, Any]


def read_layer(path: Path) -> Layer:
    """Read one YAML file as a layer."""
    try:
        # What `yaml.safe_load` does, by libyaml: a tenth of the time of every look at the workflow.
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader) or {}
    except FileNotFoundError:
        raise ConfigurationError(f"{path}: does not exist: check the path given to --configfile") from None
    except yaml.YAMLError as error:
        raise ConfigurationError(f"{path}: is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigurationError(f"{path}: must hold a mapping of keys to values at the top")
    shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    return Layer(str(shown), values)


def merge(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Merge nested mappings, later wins, and resolve `${...}` interpolation."""
    if not any(map(_interpolates, layers)):  # OmegaConf takes a hundred times as long to come to the same.
        plain: dict[Any, Any] = functools.reduce(_overlaid, layers, {})
        return {str(key): value for key, value in plain.items()}
    merged = OmegaConf.to_container(OmegaConf.merge(*(OmegaConf.create(dict(layer)) for layer in layers)), resolve=True)
    assert isinstance(merged, dict)
    return {str(key): value for key, value in merged.items()}


def _interpolates(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_interpolates, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(_interpolates, value))
    return isinstance(value, str) and "${" in value


def _overlaid(below: Any, above: Any) -> Any:
    """`above` over `below` by OmegaConf's rules: mappings merge, anything else is replaced."""
    if isinstance(above, Mapping):
        base = below if isinstance(below, Mapping) else {}
        return {**base, **{key: _overlaid(base.get(key), value) for key, value in above.items()}}
    return above


def validate(model: type[Model], values: Mapping[str, Any], layers: Sequence[Layer]) -> Model:
    """Resolve and validate what was merged from `layers`; raises `ConfigurationError` naming file and key."""
    try:
        return model.model_validate(merge(values))
    except OmegaConfBaseException as error:
        raise ConfigurationError(f"{layers[-1].name}: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        raise ConfigurationError(explain_validation_error(error, model, layers)) from None


def relocated(error: ValidationError, model: type[BaseModel], prefix: Location) -> SettingError:
    """The first fault of overrides that were merged apart, told where the overrides stand."""
    location, text = _first_fault(error, model)
    return SettingError((*prefix, *location), text)


def explain_validation_error(error: ValidationError, model: type[BaseModel], source: str | Sequence[Layer]) -> str:
    """One line for the first fault: source, dotted key, what is wrong, and the nearest valid key of a misspelt one."""
    location, text = _first_fault(error, model)
    where = source if isinstance(source, str) else _last_layer_with(location, source)
    key = ".".join(str(part) for part in location) or "(top level)"
    others = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{where}: '{key}': {text}{others}"


def nearest(name: str, valid: Sequence[str], what: str = "") -> str:
    """The remedy for a misspelt name: the nearest valid one, or all of them."""
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    if close:
        return f"did you mean '{close[0]}'?"
    return f"valid{' ' + what if what else ''}: {', '.join(sorted(valid)) or 'none'}"


def _first_fault(error: ValidationError, model: type[BaseModel]) -> tuple[Location, str]:
    """Where the first fault lies and what is wrong there."""
    first = error.errors(include_url=False)[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, SettingError):
        return (*first["loc"], *cause.location), str(cause)
    location = tuple(first["loc"])
    if first["type"] == "extra_forbidden":
        owner = _model_at(model, location[:-1])
        remedy = f": {nearest(str(location[-1]), list(owner.model_fields), 'keys')}" if owner else ""
        return location, f"unknown key{remedy}"
    message = first["msg"].removeprefix("Value error, ")
    given = first.get("input")
    shown = f" (given: {given!r})" if isinstance(given, (str, int, float, bool)) else ""
    return location, f"{message[:1].lower()}{message[1:]}{shown}"


def _last_layer_with(location: Location, layers: Sequence[Layer]) -> str:
    """The name of the last layer that sets the deepest part of `location` that any layer sets."""
    for length in range(len(location), 0, -1):
        for layer in reversed(layers):
            if _contains(layer.values, location[:length]):
                return layer.name
    return layers[-1].name if layers else "configuration"


def _contains(values: Any, location: Location) -> bool:
    for part in location:
        try:
            values = values[part]
        except (TypeError, KeyError, IndexError):
            return False
    return True


def _model_at(annotation: Any, location: Location) -> type[BaseModel] | None:
    """The pydantic model that stands at `location` below an annotation, None where it cannot be told."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _model_at(get_args(annotation)[0], location)
    if origin in (Union, types.UnionType):
        # pydantic puts a union's tag or class name into the location: step over it.
        found = [_model_at(option, rest) for option in get_args(annotation) for rest in (location, location[1:])]
        return next((model for model in found if model is not None), None)
    if origin in (dict, list, tuple):
        options = [argument for argument in get_args(annotation) if argument is not Ellipsis]
        return _model_at(options[-1], location[1:]) if location and options else None
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        if not location:
            return annotation
        field = annotation.model_fields.get(str(location[0]))
        return _model_at(field.annotation, location[1:]) if field else None
    return None
