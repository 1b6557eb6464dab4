"""The table of docs/reliability.md names the faults that the suite plays, and no others."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from support.fault_table import BEGIN, END

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
