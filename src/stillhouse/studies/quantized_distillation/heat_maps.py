"""Heat maps of sweeps over two axes: KL to the teacher on validation, the winner boxed; what `beta_lambda` and
`rank_and_format` draw.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from stillhouse.reporting.steps import FigureStep
from stillhouse.reporting.style import VERMILLION, draw_frame, draw_notice, figure, save_figure
from stillhouse.studies.quantized_distillation.comparisons import load_evaluations
from stillhouse.studies.quantized_distillation.grids import SWEPT, Cell, grid_over, winner

LABELS = {
    "beta": "β",
    "on_policy_share": "λ: share of on-policy steps",
    "lora_rank": "LoRA rank",
    "weight_format": "weights",
}
NOTE = (
    "KL from the teacher (nats per token) on the validation split at the chosen checkpoint, the mean over seeds; lower "
    "is better. Boxed: the lowest, which is picked."
)


def draw_maps(step: FigureStep, name: str, absent: str, note: str = "") -> None:
    """One map for each model and pair of axes of `SWEPT[name]`, of the largest grid that there is; else the notice."""
    grids = [
        (one.results.model, axes, group)
        for one in load_evaluations(step.results)
        for axes in SWEPT[name]
        if (group := grid_over(one, axes))
    ]
    if not grids:
        draw_notice(step.output, absent)
        return
    with figure(0.6 + 4.4 * len(grids), 4.6) as drawing:
        for axes, (model, names, group) in zip(drawing.subplots(1, len(grids), squeeze=False)[0], grids, strict=True):
            draw_map(axes, names, group)
            axes.set_title(model, loc="left", fontweight="bold")
        draw_frame(
            drawing, title([(names, group) for model, names, group in grids if model == grids[0][0]]), NOTE + note
        )
        save_figure(drawing, step.output)


def draw_map(axes: Axes, names: Sequence[str], group: Sequence[Cell]) -> None:
    """The first axis makes the rows, the second the columns; what was not run stays white."""
    rows, columns = ([shown(value) for value in sorted({cell.at(name) for cell in group})] for name in names)
    values = np.full((len(rows), len(columns)), np.nan)

    def place(cell: Cell) -> tuple[int, int]:
        row, column = (shown(cell.at(name)) for name in names)
        return rows.index(row), columns.index(column)

    for cell in group:
        values[place(cell)] = cell.validation_kl
    axes.imshow(values, cmap="cividis_r", aspect="auto")
    middle = (np.nanmin(values) + np.nanmax(values)) / 2
    for (row, column), value in np.ndenumerate(values):
        if not np.isnan(value):
            colour = "white" if value > middle else "black"
            axes.text(column, row, f"{value:.3f}", ha="center", va="center", color=colour, fontweight="bold")
    row, column = place(winner(group))
    box = Rectangle((column - 0.47, row - 0.47), 0.94, 0.94, fill=False, edgecolor=VERMILLION, linewidth=2.5)
    axes.add_patch(box)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylabel(LABELS[names[0]])
    axes.set_xlabel(LABELS[names[1]])
    axes.grid(visible=False)


def shown(value: float | str) -> str:
    """A value on an axis."""
    return value if isinstance(value, str) else f"{value:g}"


def title(grids: Sequence[tuple[Sequence[str], Sequence[Cell]]]) -> str:
    """Which cells validation picks, of one model."""
    picked = []
    for names, group in grids:
        best = winner(group)
        where = ", ".join(f"{LABELS[name].partition(':')[0]} = {shown(best.at(name))}" for name in names)
        picked.append(f"{where} (KL {best.validation_kl:.3f} nats per token)")
    return f"Validation picks {'; '.join(picked)}"
