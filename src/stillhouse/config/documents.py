"""Documents made from the configuration models: the default YAML with comments, its JSON schema, the reference page.

They are committed, so that editors and readers have them; a test fails when they no longer match the models.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any, get_args

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python


def yaml_document(configuration: BaseModel, header: str) -> str:
    """All settings as YAML, each described field with its description as a comment."""
    return f"{header}\n" + "".join(f"{line}\n" for line in _yaml_lines(configuration, 0, set()))


def schema_document(model: type[BaseModel]) -> str:
    """The JSON schema, for editors and validators."""
    return json.dumps(model.model_json_schema(), indent=1, sort_keys=True) + "\n"


def reference_document(configuration: BaseModel, published: BaseModel, header: str) -> str:
    """One Markdown table a section: key, value in the default configuration, and what it means.

    `published` holds the defaults of the models themselves; where the two differ both are shown.
    """
    parts = [header]
    for name, field in type(configuration).model_fields.items():
        value, published_value = getattr(configuration, name), getattr(published, name)
        parts.append(f"\n## `{name}`\n\n{_description(field, value)}\n")
        rows = list(_rows(value, published_value, name))
        if rows:
            parts.append("\n| key | default configuration | otherwise | meaning |\n|---|---|---|---|\n")
            parts.extend(f"| {' | '.join(row)} |\n" for row in rows)
    return "".join(parts)


def _yaml_lines(model: BaseModel, depth: int, explained: set[str]) -> Iterator[str]:
    """The fields of a model; a description that was given already is not repeated in every entry of a catalogue."""
    indent = "  " * depth
    for name, field in type(model).model_fields.items():
        if field.description and field.description not in explained:
            explained.add(field.description)
            yield f"{indent}# {field.description}"
        yield from _yaml_value(name, getattr(model, name), depth, explained)


def _yaml_value(name: str, value: Any, depth: int, explained: set[str]) -> Iterator[str]:
    indent = "  " * depth
    if isinstance(value, BaseModel):
        yield f"{indent}{name}:"
        yield from _yaml_lines(value, depth + 1, explained)
    elif isinstance(value, Mapping) and any(isinstance(item, (BaseModel, Mapping)) for item in value.values()):
        yield f"{indent}{name}:"
        for key, item in value.items():
            yield from _yaml_value(key, item, depth + 1, explained)
    elif isinstance(value, (list, tuple)) and any(isinstance(item, BaseModel) for item in value):
        yield f"{indent}{name}:"
        dumped = yaml.safe_dump([item.model_dump(mode="json") for item in value], sort_keys=False, width=116)
        yield from (f"{indent}  {line}" for line in dumped.splitlines())
    else:
        yield f"{indent}{name}: {_flow(value)}"


def _flow(value: Any) -> str:
    """A value on one line of YAML."""
    text = yaml.safe_dump(
        to_jsonable_python(value), default_flow_style=True, sort_keys=False, width=sys.maxsize, allow_unicode=True
    )
    return text.removesuffix("\n").removesuffix("\n...")


def _rows(value: Any, published: Any, prefix: str) -> Iterator[tuple[str, str, str, str]]:
    if not isinstance(value, BaseModel):
        return
    for name, field in type(value).model_fields.items():
        key, item = f"{prefix}.{name}", getattr(value, name)
        other = getattr(published, name)
        if isinstance(item, BaseModel):
            yield from _rows(item, other, key)
        else:
            shown = "" if item == other else f"`{_cell(other)}`"
            yield f"`{key}`", f"`{_cell(item)}`", shown, _meaning(field)


def _cell(value: Any) -> str:
    if isinstance(value, Mapping) and value:
        return f"{{{', '.join(value)}}}"
    return _flow(value).replace("|", "\\|")


def _meaning(field: FieldInfo) -> str:
    """The description, and the choices of a literal."""
    choices = [option for option in get_args(field.annotation) if isinstance(option, str)]
    parts = [field.description or "", f"One of: {', '.join(choices)}." if choices else ""]
    return " ".join(part for part in parts if part).replace("|", "\\|")


def _description(field: FieldInfo, value: Any) -> str:
    return (
        field.description or (type(value).__doc__ or "").strip()
        if isinstance(value, BaseModel)
        else (field.description or "")
    )
