"""Step program: `schedules.png`, what the schedules did: temperature, alpha and every part's learning rate by step."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes

from stillhouse.reporting.curves import Curves, named, read_curves
from stillhouse.reporting.style import PALETTE, condition_style, draw_frame, figure, save_figure
from stillhouse.runtime.commands import run_step
from stillhouse.studies.consistency_lens.figures import CurvesStep

RATE = "learning_rate"
SHARED = {
    "temperature": "Gumbel temperature",
    "noise": "Factor of the Gumbel noise",
    "alpha": "alpha (weight of the LM term)",
}
COLUMNS = 2


def main(step: CurvesStep) -> None:
    """Draw temperature and alpha with one line a condition, and each condition's learning rates by part."""
    curves = read_curves(step.lenses)
    rows = -(-(len(SHARED) + len(curves)) // COLUMNS)
    with figure(9, 1.2 + 2.4 * rows) as drawing:
        grid = drawing.subplots(rows, COLUMNS, squeeze=False).ravel()
        for axes, (name, label) in zip(grid, SHARED.items(), strict=False):
            draw_shared(axes, curves, name)
            axes.set_title(label, fontsize=9)
        for axes, one in zip(grid[len(SHARED) :], curves, strict=False):
            draw_rates(axes, one)
            axes.set_title(f"Learning rates, {named(one, curves)}", fontsize=9)
        for axes in grid:
            axes.set_xlabel("Training step (updates)")
        for axes in grid[len(SHARED) + len(curves) :]:
            axes.set_axis_off()
        draw_frame(drawing, message(curves), "As logged at each step. A rate of 0: the part is frozen at that step.")
        save_figure(drawing, step.output)


def draw_shared(axes: Axes, curves: Sequence[Curves], name: str) -> None:
    """One schedule of every condition; equal ones lie on each other, so lines differ in dashes too."""
    for place, one in enumerate(curves):
        values = one.column(name).iloc[:, 0]
        axes.plot(
            values.index,
            values,
            color=condition_style(one.condition).colour,
            linestyle=("-", "--", ":", "-.")[place % 4],
            label=named(one, curves),
        )
    axes.set_ylim(bottom=0)
    if len(curves) > 1:
        axes.legend(fontsize=8)


def draw_rates(axes: Axes, curves: Curves) -> None:
    """The learning rate of each part; parts with one rate share a line."""
    rates: dict[tuple[float, ...], list[str]] = {}
    parts = curves.columns(f"{RATE}/") or [RATE]
    for part in parts:
        rates.setdefault(tuple(curves.column(part).iloc[:, 0]), []).append(part.removeprefix(f"{RATE}/"))
    steps = curves.column(parts[0]).index
    for place, (values, names) in enumerate(rates.items()):
        label = "\n".join(names)
        axes.plot(
            steps, values, color=PALETTE[place % len(PALETTE)], linestyle=("-", "--", ":")[place % 3], label=label
        )
    # Room for the legend, which would hide the lines.
    axes.set_ylim(0, max(map(max, rates)) * (1.1 + 0.12 * len(parts)))
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    if parts != [RATE]:
        axes.legend(fontsize=7, loc="upper left")


def message(curves: Sequence[Curves]) -> str:
    """Where the schedules end."""
    parts = []
    for one in curves:
        temperature, noise, alpha = (one.column(name).iloc[-1, 0] for name in SHARED)
        name = f"{named(one, curves)} " if len(curves) > 1 else ""
        parts.append(f"{name}at temperature {temperature:.2g}, noise {noise:.2g} and alpha {alpha:.2g}")
    return f"Training ends {'; '.join(parts)}"


if __name__ == "__main__":
    run_step(CurvesStep, main)
