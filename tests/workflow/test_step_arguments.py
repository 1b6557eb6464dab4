"""Every rule gives its step program arguments that the program knows: also rules that no run of the suite reaches."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
RULES = "\n".join(path.read_text() for path in sorted((REPOSITORY / "rules").glob("*.smk")))
# The program, and what its command line says in words of its own; `{params...}` come from functions.
CALLS = re.findall(r"python -m (stillhouse(?:\.\w+)+) (.*?)2>&1", RULES, re.DOTALL)


def step_of(module: str) -> type:
    """The settings class that a program reads its command line into: the first argument of `run_step`."""
    loaded = importlib.import_module(module)
    assert loaded.__file__ is not None
    for node in ast.walk(ast.parse(Path(loaded.__file__).read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "run_step":
            return getattr(loaded, ast.unparse(node.args[0]))
    raise AssertionError(f"{module} has no run_step")


def test_all_rules_that_start_a_program_are_found() -> None:
    assert len(CALLS) > 20


@pytest.mark.parametrize(("module", "arguments"), CALLS, ids=[module for module, _ in CALLS])
def test_a_rule_gives_its_program_arguments_that_it_knows(module: str, arguments: str) -> None:
    given = set(re.findall(r"(?<![\w.])(\w+)=", arguments))
    assert given <= step_of(module).model_fields.keys()
