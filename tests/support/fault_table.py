"""Hooks of pytest that count the faults survived: `@pytest.mark.fault(what happens, what holds afterwards)`.

Any test may carry the mark; one that plays its fault more than once says so by `record_property("fault_cases", n)`.
The table is printed at the end of a run, and `--fault-table docs/reliability.md` writes it between the page's markers.
Tests marked `faults` take minutes and run with `--faults` alone.
"""

from __future__ import annotations

from argparse import ArgumentTypeError
from dataclasses import dataclass
from pathlib import Path

import pytest

BEGIN, END = "<!-- fault table: begin -->\n", "<!-- fault table: end -->\n"


@dataclass
class Row:
    """One kind of fault: how often it was played, how often survived, and how often left out on this machine."""

    fault: str
    afterwards: str
    cases: int = 0
    survived: int = 0
    left_out: int = 0


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("stillhouse")
    group.addoption("--faults", action="store_true", help="run the slow part of the fault suite too")
    group.addoption(
        "--fault-table", type=page_with_table, metavar="PAGE", help="write the counted faults into this page"
    )


def page_with_table(argument: str) -> Path:
    """The page to write, refused before the minutes of a run when there is no place for the table in it."""
    page = Path(argument)
    if not page.is_file():
        raise ArgumentTypeError(f"{page} is no file: name the page that holds the table, docs/reliability.md")
    _, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    if not begin or END not in rest:
        raise ArgumentTypeError(f"{page} lacks the lines {BEGIN.strip()} and {END.strip()}: add both, in this order")
    return page


def leave_out_long_faults(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Note each test's fault for the table, and skip the long ones unless they are asked for."""
    for item in items:
        if mark := item.get_closest_marker("fault"):
            item.user_properties.append(("fault", mark.args))
        if item.get_closest_marker("faults") and not config.getoption("--faults"):
            item.add_marker(pytest.mark.skip(reason="minutes long: run with --faults"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = counted(terminalreporter)
    if not rows:
        return
    terminalreporter.section("faults")
    width = max(len(row.fault) for row in rows)
    for row in rows:
        left_out = f"  ({row.left_out} left out here)" if row.left_out else ""
        terminalreporter.write_line(f"{row.fault:{width}}  {row.survived:3d} of {row.cases:3d} survived{left_out}")
    if page := config.getoption("--fault-table"):
        write_table(page, rows)


def counted(terminalreporter: pytest.TerminalReporter) -> list[Row]:
    """The faults of the run, in order of their names."""
    rows: dict[tuple[str, str], Row] = {}
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            properties = dict(getattr(report, "user_properties", ()))
            if "fault" not in properties or (report.when != "call" and outcome == "passed"):
                continue
            fault, afterwards = properties["fault"]
            row = rows.setdefault((fault, afterwards), Row(fault, afterwards))
            cases = properties.get("fault_cases", 1)
            if outcome == "skipped":
                row.left_out += cases
            else:
                row.cases += cases
                row.survived += cases * (outcome == "passed")
    return sorted(rows.values(), key=lambda row: row.fault)


def write_table(page: Path, rows: list[Row]) -> None:
    """Replace what stands between the page's markers."""
    lines = ["| what happens | times | survived | what holds afterwards |", "|---|---:|---:|---|"]
    lines += [f"| {row.fault} | {row.cases} | {row.survived} | {row.afterwards} |" for row in rows]
    lines += [f"| all | {sum(row.cases for row in rows)} | {sum(row.survived for row in rows)} | |"]
    text = page.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(before + BEGIN + "\n" + "\n".join(lines) + "\n\n" + END + after, encoding="utf-8")
