"""A step's command line reads back exactly what the workflow wrote, and names what it does not know."""

from __future__ import annotations

import pytest

from stillhouse.runtime.commands import dotted_arguments, parse_settings, path_arguments
from stillhouse.runtime.errors import ConfigurationError
from stillhouse.studies.context_distillation.config import CONDITIONS, ContextDistillationConfig
from stillhouse.studies.context_distillation.run_settings import RunSettings


@pytest.mark.parametrize("condition", CONDITIONS)
def test_settings_survive_the_command_line(condition: str) -> None:
    run = ContextDistillationConfig(conditions=(condition,)).run_settings("smollm2_135m", condition)
    arguments = dotted_arguments(run.model_dump(mode="json"))
    assert parse_settings(RunSettings, arguments) == run
    assert arguments == sorted(arguments)


@pytest.mark.parametrize(
    "text", ["1e-4", "true", "null", "a: b, c", "it's", "", "${x}", "[1]", "0x10", "2026-11-21", " "]
)
def test_awkward_strings_survive_the_command_line(text: str) -> None:
    from stillhouse.config.base import StrictModel

    class One(StrictModel):
        value: str
        values: tuple[str, ...]

    one = One(value=text, values=(text, "x"))
    assert parse_settings(One, dotted_arguments(one.model_dump(mode="json"))) == one


@pytest.mark.parametrize("count", [0, 1, 400, 401, 10_228])
def test_a_list_of_paths_of_any_length_fits_the_operating_systems_arguments(count: int) -> None:
    from stillhouse.config.base import StrictModel

    class Paths(StrictModel):
        students: tuple[str, ...]
        output: str

    paths = tuple(f"results/context_distillation/model/students/condition_{number}/seed_0" for number in range(count))
    arguments = [*path_arguments("students", paths), *path_arguments("output", "here")]
    assert max(map(len, arguments)) < 2**17
    assert parse_settings(Paths, arguments) == Paths(students=paths, output="here")


def test_an_unknown_key_names_the_nearest() -> None:
    with pytest.raises(
        ConfigurationError, match=r"command line: 'training\.step': unknown key: did you mean 'steps'\?"
    ):
        parse_settings(RunSettings, ["training.step=3"])


def test_an_argument_without_a_value_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="'training' is not of the form key=value"):
        parse_settings(RunSettings, ["training"])


@pytest.mark.parametrize("value", ["*.jsonl", "[1", "{a: b", "a: b: c", "${", "@x"])
def test_a_value_that_is_no_yaml_is_one_clear_line(value: str) -> None:
    with pytest.raises(ConfigurationError, match="command line: "):
        parse_settings(RunSettings, [f"prompt_format={value}"])
