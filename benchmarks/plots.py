"""The page's figures: every ratio beside its aim, and how cost grows; from results alone, no torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from benchmarks.results import Point, SeriesResult, growth_exponent
from stillhouse.evaluation.statistics import Estimate
from stillhouse.reporting.style import BLUE, GREEN, GREY, VERMILLION, draw_frame, figure, save_figure

COLUMNS = 3


def draw_ratios(path: Path, rows: Sequence[tuple[str, Estimate, float | None]]) -> None:
    """One row a comparison: label, how many times as long it takes, and the aim where there is one."""
    with figure(9, 1.3 + 0.27 * len(rows)) as drawing:
        axes = drawing.subplots()
        for place, (_, ratio, aim) in enumerate(rows):
            met = aim is None or ratio.value >= aim
            axes.barh(place, ratio.value, color=(GREY if aim is None else GREEN if met else VERMILLION), height=0.62)
            axes.plot([ratio.low, ratio.high], [place, place], color="black", linewidth=1)
            if aim is not None:
                axes.plot([aim, aim], [place - 0.4, place + 0.4], color="black", linewidth=2)
            axes.text(max(ratio.high, aim or 0) * 1.04, place, f"{ratio.value:.1f}", va="center", fontsize=8)
        axes.set_yticks(range(len(rows)), [label for label, _, _ in rows], fontsize=8)
        axes.invert_yaxis()
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xticks([0.5, 1, 2, 5, 10, 20])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlim(0.5, 1.4 * max(max(ratio.high, aim or 0) for _, ratio, aim in rows))
        axes.axvline(1, color="black", linewidth=0.8)
        axes.grid(axis="y", visible=False)
        note = (
            "Time of the other form over ours; thin lines: intervals over rounds; thick marks: aims. Green meets its "
            "aim, red does not, grey has none."
        )
        draw_frame(drawing, "How many times as long the same work takes in other forms", note)
        save_figure(drawing, path)


def draw_growth(
    path: Path, series: Mapping[str, SeriesResult], labels: Mapping[str, tuple[str, str]], ours: frozenset[str]
) -> None:
    """Two rows of panels a block of series, time above memory; each curve relative to ours at its smallest size.

    labels: of each series, what is measured and which size grows.
    """
    names, blocks = list(series), -(-len(series) // COLUMNS)
    with figure(12, 0.9 + 4.6 * blocks) as drawing:
        grid = drawing.subplots(2 * blocks, COLUMNS, squeeze=False)
        for place, name in enumerate(names):
            block, column = divmod(place, COLUMNS)
            above, below = grid[2 * block, column], grid[2 * block + 1, column]
            draw_panel(above, series[name], ours, "seconds")
            if all(point.peak_memory_mib for points in series[name].curves.values() for point in points):
                draw_panel(below, series[name], ours, "memory")
            else:
                below.set_axis_off()
                above.set_xlabel(labels[name][1])
            above.set_title(fill(labels[name][0], 34))
            below.set_xlabel(labels[name][1])
            if column == 0:
                above.set_ylabel("Time, relative")
                below.set_ylabel("Peak memory, relative")
        for place in range(len(names), COLUMNS * blocks):
            block, column = divmod(place, COLUMNS)
            grid[2 * block, column].set_axis_off()
            grid[2 * block + 1, column].set_axis_off()
        note = (
            "Relative to ours at the smallest value. The number at a name is p of cost ~ size^p, fitted over its "
            "three largest sizes. Blue: ours; grey: the other form."
        )
        draw_frame(drawing, "How cost grows", note)
        save_figure(drawing, path)


def draw_panel(axes: Axes, result: SeriesResult, ours: frozenset[str], quantity: str) -> None:
    """All curves of one quantity, with their exponents."""
    own = next(name for name in result.curves if name in ours)
    unit = costs(result.curves[own], quantity)[0]
    for name, points in sorted(result.curves.items(), key=lambda item: item[0] in ours):
        values, relative = [point.value for point in points], [cost / unit for cost in costs(points, quantity)]
        colour, marker = (BLUE, "o") if name in ours else (GREY, "s")
        label = f"{name}: {growth_exponent(values, relative):.2f}"
        axes.plot(values, relative, color=colour, marker=marker, label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks([point.value for point in result.curves[own]])
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_locator(NullLocator())
    axes.margins(x=0.08, y=0.1)
    lowest, highest = axes.get_ylim()
    axes.set_ylim(lowest, highest * (highest / lowest) ** 0.4)  # room for the names
    axes.legend(loc="upper left", fontsize=7.5, handlelength=1, borderpad=0)


def costs(points: Sequence[Point], quantity: str) -> list[float]:
    """The median seconds, or the peak memory, of each point."""
    if quantity == "seconds":
        return [float(np.median(point.seconds)) for point in points]
    return [point.peak_memory_mib or float("nan") for point in points]
