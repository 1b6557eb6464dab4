"""What the sweeps of any study came to: the winner that validation picks, the table, and the figure.

Stands between each study's `comparisons.sweeps` and its figures and report. A point's axes stand in its
condition's name (`config.sweeps`); its score is what the study measures on validation, lower is better, so that no test
item picks anything.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from stillhouse.config.sweeps import swept_values
from stillhouse.reporting.style import BLACK, PALETTE, VERMILLION, draw_frame, draw_notice, figure, save_figure
from stillhouse.reporting.tables import Cell, Column, Table

NOTHING = "No sweep with at least two points was scored on validation: there is no winner to pick."
MARKERS = ("o", "^", "D", "v", "s", "P", "X", "h")
PANELS_IN_A_ROW = 3


@dataclass(frozen=True)
class Score:
    """One trained run on validation, at its chosen checkpoint. subject: the model or pair. value: lower is better."""

    subject: str
    condition: str
    seed: int
    value: float


@dataclass(frozen=True)
class Point:
    """One combination of a sweep's values, with the scores of its seeds."""

    values: tuple[str, ...]
    scores: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean over seeds: what picks the winner."""
        return statistics.fmean(self.scores)

    @property
    def spread(self) -> float | None:
        """The standard deviation over seeds; None of one seed."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else None


@dataclass(frozen=True)
class Grid:
    """One sweep over a condition of one subject: at least two points."""

    subject: str
    condition: str
    axes: tuple[str, ...]
    points: tuple[Point, ...]

    @property
    def winner(self) -> Point:
        """The point with the lowest mean; the first of equals."""
        return min(self.points, key=lambda point: point.mean)

    @property
    def picked(self) -> str:
        """The winner's values in words: `top_k = 16, temperature = 2`."""
        return in_words(self.axes, self.winner.values)

    def along(self, axis: int) -> list[str]:
        """The distinct values of an axis, numbers by size."""
        return in_order(point.values[axis] for point in self.points)


def grids(scores: Iterable[Score]) -> list[Grid]:
    """Every sweep among the scores; conditions that are no point of one are left out."""
    found: dict[tuple[str, str, tuple[str, ...]], dict[tuple[str, ...], list[float]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for score in scores:
        condition, values = swept_values(score.condition)
        if values:
            axes, place = zip(*values, strict=True)
            found[score.subject, condition, axes][place].append(score.value)
    return [
        Grid(*key, tuple(Point(values, tuple(measured)) for values, measured in points.items()))
        for key, points in found.items()
        if len(points) > 1
    ]


@dataclass(frozen=True)
class Sweeps:
    """Every sweep of a study. measure: what the scores are, with the unit."""

    study: str
    measure: str
    grids: Sequence[Grid]

    def only(self, *axes: str) -> Sweeps:
        """The sweeps over just these axes, in any order."""
        return replace(self, grids=[grid for grid in self.grids if sorted(grid.axes) == sorted(axes)])

    def tables(self) -> list[Table]:
        """Every point of every sweep, the lowest score first, the winner marked; no table without a sweep."""
        if not self.grids:
            return []
        rows: list[tuple[Cell, ...]] = [
            (
                grid.subject,
                grid.condition,
                in_words(grid.axes, point.values),
                point.mean,
                point.spread,
                len(point.scores),
                "picked" if point is grid.winner else None,
            )
            for grid in self.grids
            for point in sorted(grid.points, key=lambda point: point.mean)
        ]
        columns = (
            Column("subject", heading="of"),
            Column("condition", heading="sweep over"),
            Column("values"),
            Column("validation", "number", 4, "mean over seeds"),
            Column("spread", "number", 4, "standard deviation"),
            Column("seeds", "integer"),
            Column("picked", heading="winner"),
        )
        caption = f"{self.measure}, the lowest first; the test split picks nothing."
        return [Table("sweep", caption, columns, tuple(rows))]

    def section(self) -> list[str]:
        """The parts of the report's section on sweeps; none without a sweep."""
        figure_link = f"![Every sweep and its winner](figures/{self.study}/sweep.png)"
        picked = "\n".join(
            f"- `{grid.subject}`: of {len(grid.points)} points over `{grid.condition}` validation picks {grid.picked}."
            for grid in self.grids
        )
        return [part for table in self.tables() for part in ("### Sweeps", picked, figure_link, table.to_markdown())]

    def draw(self, output: Path, absent: str = NOTHING) -> None:
        """A line for every sweep over one axis, conditions of one axis together; a heat map for every other sweep."""
        if not self.grids:
            draw_notice(output, absent)
            return
        lines: dict[tuple[str, str], list[Grid]] = defaultdict(list)
        for grid in self.grids:
            if len(grid.axes) == 1:
                lines[grid.subject, grid.axes[0]].append(grid)
        maps = [grid for grid in self.grids if len(grid.axes) > 1]
        count = len(lines) + len(maps)
        rows, columns = -(-count // PANELS_IN_A_ROW), min(count, PANELS_IN_A_ROW)
        with figure(1.2 + 4.4 * columns, 1.6 + 3.4 * rows) as drawing:
            panels = list(drawing.subplots(rows, columns, squeeze=False).flat)
            for panel, ((subject, axis), group) in zip(panels[: len(lines)], lines.items(), strict=True):
                draw_lines(panel, axis, group, self.measure)
                panel.set_title(subject, loc="left", fontweight="bold")
            for panel, grid in zip(panels[len(lines) : count], maps, strict=True):
                draw_map(panel, grid)
                panel.set_title(f"{grid.subject}, {grid.condition}", loc="left", fontweight="bold")
            for panel in panels[count:]:
                panel.set_visible(False)
            seeds = max(len(point.scores) for grid in self.grids for point in grid.points)
            over = f"mean and standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
            note = f"{self.measure} at the chosen checkpoint, {over}; lower is better. Ringed or boxed: the winner."
            draw_frame(drawing, title(self.grids), note)
            save_figure(drawing, output)


def draw_lines(panel: Axes, axis: str, group: Sequence[Grid], measure: str) -> None:
    """One line a condition over the values of the axis, its winner ringed."""
    ticks = in_order(point.values[0] for grid in group for point in grid.points)
    for number, grid in enumerate(group):
        ordered = sorted(grid.points, key=lambda point: ticks.index(point.values[0]))
        aside = 0.06 * (number - (len(group) - 1) / 2)  # so that bars of several conditions stand side by side
        places = [ticks.index(point.values[0]) + aside for point in ordered]
        colour, marker = PALETTE[number % len(PALETTE)], MARKERS[number % len(MARKERS)]
        bars = [point.spread or 0.0 for point in ordered] if any(point.spread for point in ordered) else None
        panel.errorbar(
            places, [point.mean for point in ordered], yerr=bars, color=colour, marker=marker, label=grid.condition
        )
        winner = ticks.index(grid.winner.values[0]) + aside
        panel.plot(winner, grid.winner.mean, "o", markersize=12, color=BLACK, markerfacecolor="none")
    panel.set_xticks(range(len(ticks)), [shown(value) for value in ticks])
    panel.margins(x=0.08)
    panel.set_xlabel(axis)
    panel.set_ylabel(measure)
    panel.legend(fontsize=8)


def draw_map(panel: Axes, grid: Grid) -> None:
    """The first axis makes the rows, every combination of the others a column; what was not run stays white."""
    rows = grid.along(0)
    columns = sorted(
        dict.fromkeys(point.values[1:] for point in grid.points),
        key=lambda values: [grid.along(1 + place).index(value) for place, value in enumerate(values)],
    )
    values = np.full((len(rows), len(columns)), np.nan)
    for point in grid.points:
        values[rows.index(point.values[0]), columns.index(point.values[1:])] = point.mean
    panel.imshow(values, cmap="cividis_r", aspect="auto")
    middle = (np.nanmin(values) + np.nanmax(values)) / 2
    for point in grid.points:
        row, column = rows.index(point.values[0]), columns.index(point.values[1:])
        text = f"{point.mean:.3f}" + (f"\n±{point.spread:.3f}" if point.spread is not None else "")
        colour = "white" if point.mean > middle else "black"
        panel.text(column, row, text, ha="center", va="center", color=colour, fontweight="bold")
    row, column = rows.index(grid.winner.values[0]), columns.index(grid.winner.values[1:])
    panel.add_patch(Rectangle((column - 0.47, row - 0.47), 0.94, 0.94, fill=False, edgecolor=VERMILLION, linewidth=2.5))
    panel.set_xticks(range(len(columns)), ["\n".join(map(shown, column)) for column in columns])
    panel.set_yticks(range(len(rows)), [shown(row) for row in rows])
    panel.set_ylabel(grid.axes[0])
    panel.set_xlabel(", ".join(grid.axes[1:]))
    panel.grid(visible=False)


def title(found: Sequence[Grid]) -> str:
    """What validation picks, of the first three sweeps."""
    words = [f"{grid.condition}: {grid.picked}" for grid in found[:3]]
    if len({grid.subject for grid in found}) > 1:
        words = [f"{grid.subject}, {text}" for grid, text in zip(found, words, strict=False)]
    more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
    return f"Validation picks for {'; '.join(words)}{more}"


def in_words(axes: Sequence[str], values: Sequence[str]) -> str:
    """`top_k = 16, temperature = 2`."""
    return ", ".join(f"{axis} = {shown(value)}" for axis, value in zip(axes, values, strict=True))


def shown(value: str) -> str:
    """A value for people: a number in its shortest form."""
    number = as_number(value)
    return value if number is None else f"{number:g}"


def in_order(values: Iterable[str]) -> list[str]:
    """The distinct values: numbers by size where all are numbers, else as they come."""
    distinct = list(dict.fromkeys(values))
    numbers = [as_number(value) for value in distinct]
    if None in numbers:
        return distinct
    return [value for _, value in sorted(zip(numbers, distinct, strict=True))]


def as_number(value: str) -> float | None:
    """The number that a value is, if it is one."""
    try:
        return float(value)
    except ValueError:
        return None
