"""Tables for people, programs and papers: one table, written as Markdown, CSV and LaTeX (booktabs).

Markdown and LaTeX round for the reader; the CSV keeps every digit and gives an estimate three columns.
"""

from __future__ import annotations

import csv
import io
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from stillhouse.reporting.style import Interval
from stillhouse.runtime.files import atomic_write_text

Kind = Literal["text", "integer", "number", "percent", "p_value", "estimate", "percent_estimate"]
Cell = str | int | float | Interval | None

LATEX_ESCAPES = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    # A row that begins with a bracket would become the optional argument of the `\\` before it.
    "[": "{[}",
    "]": "{]}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}


@dataclass(frozen=True)
class Column:
    """A column: `name` heads it in the CSV, `heading` (default: the name) for people.

    Of kind `percent` and `percent_estimate`, cells are shares (0.42) and are shown as percent (42.0).
    """

    name: str
    kind: Kind = "text"
    digits: int = 2
    heading: str | None = None

    @property
    def title(self) -> str:
        """What people read above the column."""
        return self.heading or self.name

    @property
    def is_estimate(self) -> bool:
        """Whether cells are a value with its interval."""
        return self.kind in ("estimate", "percent_estimate")

    def show(self, cell: Cell) -> str | None:
        """The cell for people, None where there is no value."""
        if is_missing(cell):
            return None
        match self.kind:
            case "text":
                return str(cell)
            case "integer":
                return f"{_number(cell):,.0f}"
            case "number":
                return f"{_number(cell):z.{self.digits}f}"
            case "percent":
                return f"{100 * _number(cell):z.{self.digits}f}"
            case "p_value":
                number, smallest = _number(cell), 10.0**-self.digits
                return f"{'< ' * (number < smallest)}{max(number, smallest):.{self.digits}f}"
            case "estimate":
                return format_estimate(_interval(cell), self.digits)
            case "percent_estimate":
                return format_estimate(_interval(cell), self.digits, scale=100)


@dataclass(frozen=True)
class Table:
    """A named table with a caption; every row has one cell a column.

    Raises `ValueError` for a name that is no plain file name, columns that share a name, and ragged rows.
    """

    name: str
    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def __post_init__(self) -> None:
        """Refuse a table that cannot be written."""
        if not re.fullmatch(r"[\w.-]+", self.name):
            raise ValueError(f"table name {self.name!r} is not a plain file name")
        if len({column.name for column in self.columns}) != len(self.columns):
            raise ValueError(f"table {self.name}: two columns share a name")
        for number, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(f"table {self.name}: row {number} has {len(row)} of {len(self.columns)} cells")

    def to_markdown(self) -> str:
        """The caption, and the table in GitHub's Markdown."""
        lines = [
            [_markdown(column.title) for column in self.columns],
            [":--" if column.kind == "text" else "--:" for column in self.columns],
            *([_markdown(cell) for cell in row] for row in self._shown("\N{EN DASH}")),
        ]
        return "\n".join([self.caption, "", *(f"| {' | '.join(line)} |" for line in lines), ""])

    def to_csv(self) -> str:
        """Every digit, for programs: an estimate takes the columns `name`, `name_low`, `name_high`."""
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(
            name
            for column in self.columns
            for name in ([column.name] + [f"{column.name}_low", f"{column.name}_high"] * column.is_estimate)
        )
        for row in self.rows:
            writer.writerow(
                value
                for column, cell in zip(self.columns, row, strict=True)
                for value in (_bounds(cell) if column.is_estimate else ["" if is_missing(cell) else cell])
            )
        return buffer.getvalue()

    def to_latex(self) -> str:
        """A floating table for a paper; the preamble needs `\\usepackage{booktabs}`."""
        alignment = "".join("l" if column.kind == "text" else "r" for column in self.columns)
        lines = [[column.title for column in self.columns], *self._shown("--")]
        head, *body = [" & ".join(map(escape_latex, line)) + r" \\" for line in lines]
        return "\n".join(
            [
                r"\begin{table}[t]",
                r"\centering",
                rf"\caption{{{escape_latex(self.caption)}}}",
                rf"\label{{tab:{self.name}}}",
                rf"\begin{{tabular}}{{{alignment}}}",
                r"\toprule",
                head,
                r"\midrule",
                *body,
                r"\bottomrule",
                r"\end{tabular}",
                r"\end{table}",
                "",
            ]
        )

    def _shown(self, missing: str) -> list[list[str]]:
        return [
            [column.show(cell) or missing for column, cell in zip(self.columns, row, strict=True)] for row in self.rows
        ]


def write_table(table: Table, directory: Path) -> list[Path]:
    """Write `<name>.csv`, `<name>.tex` and `<name>.md` into the directory, each whole or not at all."""
    texts = {".csv": table.to_csv(), ".tex": table.to_latex(), ".md": table.to_markdown()}
    paths = [directory / f"{table.name}{suffix}" for suffix in texts]
    for path, text in zip(paths, texts.values(), strict=True):
        atomic_write_text(path, text)
    return paths


def format_estimate(estimate: Interval, digits: int = 2, scale: float = 1.0) -> str:
    """A value with its confidence interval: `0.42 [0.31, 0.53]`."""
    numbers = (estimate.value, estimate.low, estimate.high)
    value, low, high = (f"{scale * number:z.{digits}f}" for number in numbers)
    return f"{value} [{low}, {high}]"


def escape_latex(text: str) -> str:
    """Make text safe in LaTeX, one character at a time so that no escape is escaped again."""
    return "".join(LATEX_ESCAPES.get(character, character) for character in text.replace("\n", " "))


def is_missing(cell: Cell) -> bool:
    """Whether there is no value: None, or a number (of an estimate: its value) that is not one."""
    number = cell.value if isinstance(cell, Interval) else cell
    return number is None or (isinstance(number, float) and math.isnan(number))


def _markdown(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def _bounds(cell: Cell) -> list[float | str]:
    if is_missing(cell):
        return ["", "", ""]
    estimate = _interval(cell)
    return [estimate.value, estimate.low, estimate.high]


def _number(cell: Cell) -> float:
    if isinstance(cell, str | Interval) or cell is None:
        raise TypeError(f"a column of numbers got {cell!r}")
    return cell


def _interval(cell: Cell) -> Interval:
    if not isinstance(cell, Interval):
        raise TypeError(f"a column of estimates got {cell!r}")
    return cell
