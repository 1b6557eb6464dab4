"""Step program: `schedules.png`, what the schedules did: temperature, alpha and every part's learning rate by step."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes

from stillhouse.reporting.style import PALETTE, condition_style, draw_frame, figure, save_figure
from stillhouse.runtime.commands import run_step
from stillhouse.studies.consistency_lens.figures.curves import Curves, CurvesStep, named, read_curves

RATE = "learning_rate"


def main(step: CurvesStep) -> None:
    """Draw temperature and alpha with one line a condition, and each condition's learning rates by part."""
    curves = read_curves(step.lenses)
    rows = 1 + -(-len(curves) // 2)
    with figure(9, 1.2 + 2.3 * rows) as drawing:
        grid = drawing.subplots(rows, 2, squeeze=False)
        for axes, name, label in zip(
            grid[0], ("temperature", "alpha"), ("Gumbel temperature", "alpha (weight of the LM term)"), strict=True
        ):
            draw_shared(axes, curves, name)
            axes.set_title(label, fontsize=9)
        lower = grid[1:].ravel()
        for axes, one in zip(lower, curves, strict=False):
            draw_rates(axes, one)
            axes.set_title(f"Learning rates, {named(one, curves)}", fontsize=9)
        for axes in lower[len(curves) :]:
            axes.set_axis_off()
        for axes in grid.ravel():
            axes.set_xlabel("Training step (updates)")
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
        label = ", ".join(names) if len(names) <= 3 else f"{', '.join(names[:2])} and {len(names) - 2} more"
        axes.plot(
            steps, values, color=PALETTE[place % len(PALETTE)], linestyle=("-", "--", ":")[place % 3], label=label
        )
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    if parts != [RATE]:
        axes.legend(fontsize=8)


def message(curves: Sequence[Curves]) -> str:
    """Where the schedules end."""
    ends = [(one, *(one.column(name).iloc[-1, 0] for name in ("temperature", "alpha"))) for one in curves]
    parts = [f"{named(one, curves)} at temperature {tau:.2g} and alpha {alpha:.2g}" for one, tau, alpha in ends]
    return f"Training ends with {'; '.join(parts)}"


if __name__ == "__main__":
    run_step(CurvesStep, main)
