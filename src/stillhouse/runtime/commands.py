"""Command lines of step programs: `python -m stillhouse.<module> key=value nested.key=value ...`.

The values are YAML, the keys are dotted paths into the program's pydantic settings, and OmegaConf interpolation
works between them. A program is called by hand exactly as the workflow calls it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from stillhouse.config.layering import explain_validation_error
from stillhouse.runtime.errors import ConfigurationError, UserError
from stillhouse.runtime.logs import configure_logging

Settings = TypeVar("Settings", bound=BaseModel)
# Linux takes 128 KiB in one argument; a path has at most 255 bytes or so.
PATHS_PER_ARGUMENT = 400


def parse_settings(model: type[Settings], arguments: Sequence[str]) -> Settings:
    """Build `model` from `key=value` arguments; a fault is a `ConfigurationError` naming the key.

    `key+=[...]` appends to the list that `key=[...]` began.
    """
    for argument in arguments:
        if "=" not in argument:
            raise ConfigurationError(f"command line: '{argument}' is not of the form key=value")
    try:
        given = OmegaConf.from_dotlist([argument for argument in arguments if not _appends(argument)])
        for argument in filter(_appends, arguments):
            [(key, more)] = OmegaConf.from_dotlist([argument.replace("+=", "=", 1)]).items()
            given[key].extend(more)
        return model.model_validate(OmegaConf.to_container(given, resolve=True))
    except ValidationError as error:
        raise ConfigurationError(explain_validation_error(error, model, "command line")) from None
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigurationError(f"command line: {' '.join(str(error).split())}") from None


def run_step(model: type[Settings], main: Callable[[Settings], None]) -> None:
    """Run a step program: parse the command line, call `main`, turn a `UserError` into one line and status 1."""
    configure_logging()
    try:
        main(parse_settings(model, sys.argv[1:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        print(
            f"error: out of memory ({reason}): lower the token budget or batch size of this step, or use a larger "
            "device; what was finished is kept, and the same command continues",
            file=sys.stderr,
        )
        raise SystemExit(1) from None


def _out_of_memory(error: Exception) -> bool:
    """Whether memory ran out on a device (torch's own error, not imported here) or on the host."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"MemoryError", "OutOfMemoryError"}) or "can't allocate memory" in str(error)


def path_arguments(name: str, paths: str | Sequence[str]) -> list[str]:
    """One path as `name=path`, a list as `name=[path,path]`, a very long one in several arguments."""
    if isinstance(paths, str):
        return [f"{name}={paths}"]
    starts = range(0, max(len(paths), 1), PATHS_PER_ARGUMENT)
    return [f"{name}{'+' if start else ''}=[{','.join(paths[start : start + PATHS_PER_ARGUMENT])}]" for start in starts]


def _appends(argument: str) -> bool:
    return argument.partition("=")[0].endswith("+")


def dotted_arguments(settings: dict[str, Any], prefix: str = "") -> list[str]:
    """Flatten nested settings to sorted `key=value` arguments that `parse_settings` reads back."""
    arguments: list[str] = []
    for key, value in sorted(settings.items()):
        path = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            arguments.extend(dotted_arguments(value, f"{path}."))
        else:
            arguments.append(f"{path}={_yaml_flow(value)}")
    return arguments


def _yaml_flow(value: Any) -> str:
    """One value as YAML on one line, in OmegaConf's own reading of it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{','.join(_yaml_flow(item) for item in value)}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}: {_yaml_flow(item)}" for key, item in sorted(value.items())) + "}"
    if isinstance(value, str):
        # A dollar would start an interpolation: settings that come from the workflow are resolved already.
        escaped = value.replace("'", "''").replace("${", "\\${")
        return value if _is_plain(value) else f"'{escaped}'"
    return repr(value)


@cache
def _is_plain(text: str) -> bool:
    """Whether YAML reads the text back as the same string without quotes."""
    if not text or not all(character.isalnum() or character in "_-./+" for character in text):
        return False
    return isinstance(OmegaConf.from_dotlist([f"value={text}"]).value, str)
