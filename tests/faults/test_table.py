"""The table of docs/reliability.md names the faults that the suite plays, and no others."""

from __future__ import annotations

import ast
from argparse import ArgumentTypeError
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.fault_table import BEGIN, END, page_with_table

TESTS = Path(__file__).parents[1]
PAGE = TESTS.parent / "docs/reliability.md"


def marked_faults() -> Iterator[str]:
    """What each `@pytest.mark.fault(what happens, ...)` of the suite says, read from the sources."""
    for path in TESTS.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.fault":
                yield ast.literal_eval(node.args[0])


def test_the_rows_of_the_page_are_the_faults_of_the_suite() -> None:
    table = PAGE.read_text().partition(BEGIN)[2].partition(END)[0].strip().splitlines()
    rows = [line.split("|")[1].strip() for line in table[2:-1]]
    assert sorted(rows) == sorted(set(marked_faults())), (
        "python -m pytest tests -m fault --faults --fault-table docs/reliability.md"
    )


def test_a_page_without_a_place_for_the_table_is_refused_before_the_run(tmp_path: Path) -> None:
    assert page_with_table(str(PAGE)) == PAGE
    with pytest.raises(ArgumentTypeError, match="is no file"):
        page_with_table(str(tmp_path / "absent.md"))
    page = tmp_path / "page.md"
    page.write_text(BEGIN + "a table without an end, and the rest of the page\n")
    with pytest.raises(ArgumentTypeError, match="lacks the lines"):
        page_with_table(str(page))
