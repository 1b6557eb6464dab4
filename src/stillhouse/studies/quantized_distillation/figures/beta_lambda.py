"""Step program: `beta_lambda.png`, a heat map of KL to the teacher on validation over beta and lambda."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from stillhouse.reporting.style import VERMILLION, draw_frame, draw_notice, figure, save_figure
from stillhouse.runtime.commands import run_step
from stillhouse.studies.quantized_distillation.comparisons import load_evaluations
from stillhouse.studies.quantized_distillation.figures import FigureStep
from stillhouse.studies.quantized_distillation.grids import SWEPT, Cell, grid_over, winner

AXES = SWEPT["beta_lambda"]


def main(step: FigureStep) -> None:
    """Draw one map a model, of the largest grid that it has."""
    grids = {one.results.model: group for one in load_evaluations(step.results) if (group := grid_over(one, AXES))}
    if not grids:
        draw_notice(
            step.output, "Beta and lambda are not swept together: config/experiments/quantized_beta_lambda.yaml does."
        )
        return
    with figure(0.6 + 4.4 * len(grids), 4.6) as drawing:
        for axes, (model, group) in zip(drawing.subplots(1, len(grids), squeeze=False)[0], grids.items(), strict=True):
            draw_map(axes, group)
            axes.set_title(model, loc="left", fontweight="bold")
        note = (
            "KL from the teacher (nats per token) on the validation split at the chosen checkpoint, the mean over "
            "seeds; lower is better. Boxed: the lowest, which is picked. β 0: KL(teacher || student), β 1: the "
            "reverse; λ: the share of steps on the student's own answers."
        )
        draw_frame(drawing, title(list(grids.values())), note)
        save_figure(drawing, step.output)


def draw_map(axes: Axes, group: Sequence[Cell]) -> None:
    """Rows are beta, columns lambda; what was not run stays white."""
    betas, lambdas = (sorted({float(cell.at(axis)) for cell in group}) for axis in AXES)
    values = np.full((len(betas), len(lambdas)), np.nan)
    for cell in group:
        values[betas.index(float(cell.at("beta"))), lambdas.index(float(cell.at("on_policy_share")))] = (
            cell.validation_kl
        )
    axes.imshow(values, cmap="cividis_r", aspect="auto")
    middle = (np.nanmin(values) + np.nanmax(values)) / 2
    for (row, column), value in np.ndenumerate(values):
        if not np.isnan(value):
            colour = "white" if value > middle else "black"
            axes.text(column, row, f"{value:.3f}", ha="center", va="center", color=colour, fontweight="bold")
    best = winner(group)
    place = lambdas.index(float(best.at("on_policy_share"))), betas.index(float(best.at("beta")))
    axes.add_patch(_box(*place))
    axes.set_xticks(range(len(lambdas)), [f"{value:g}" for value in lambdas])
    axes.set_yticks(range(len(betas)), [f"{value:g}" for value in betas])
    axes.set_xlabel("λ: share of on-policy steps")
    axes.set_ylabel("β")
    axes.grid(visible=False)


def _box(column: int, row: int) -> Rectangle:
    return Rectangle((column - 0.47, row - 0.47), 0.94, 0.94, fill=False, edgecolor=VERMILLION, linewidth=2.5)


def title(grids: Sequence[Sequence[Cell]]) -> str:
    """Which cell validation picks, of the first model."""
    best = winner(grids[0])
    beta, share = best.at("beta"), best.at("on_policy_share")
    return f"Validation picks β = {beta:g}, λ = {share:g} (KL {best.validation_kl:.3f} nats per token)"


if __name__ == "__main__":
    run_step(FigureStep, main)
