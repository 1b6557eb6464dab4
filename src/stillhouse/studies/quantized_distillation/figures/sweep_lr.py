"""Step program: `sweep_lr.png`, validation KL and test NLL over the learning rate, a line for each policy."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes

from stillhouse.reporting.style import (
    BLACK,
    PALETTE,
    draw_frame,
    draw_notice,
    error_bars,
    figure,
    save_figure,
)
from stillhouse.runtime.commands import run_step
from stillhouse.studies.quantized_distillation.comparisons import (
    estimate,
    load_evaluations,
    sample_note,
    text_measures,
)
from stillhouse.studies.quantized_distillation.figures import FigureStep
from stillhouse.studies.quantized_distillation.grids import Cell, groups_along, winner
from stillhouse.studies.quantized_distillation.results import QuantizedEvaluation

AXIS = "learning_rate"
MARKERS = ("o", "^", "D", "v", "s", "P", "X", "h")


def main(step: FigureStep) -> None:
    """Draw one row of panels a model: what the winner is picked by, and the first text's NLL on the test data."""
    evaluations = [one for one in load_evaluations(step.results) if groups_along(one, (AXIS,))]
    if not evaluations:
        draw_notice(step.output, "No learning rates are swept: config/experiments/quantized_learning_rate.yaml does.")
        return
    with figure(10, 1.5 + 3 * len(evaluations)) as drawing:
        grid = drawing.subplots(len(evaluations), 2, squeeze=False, sharex="row")
        for row, evaluation in zip(grid, evaluations, strict=True):
            for number, group in enumerate(groups_along(evaluation, (AXIS,))):
                draw_group(row, evaluation, group, number)
            row[0].set_title(evaluation.results.model, loc="left", fontweight="bold")
            row[0].set_ylabel("KL from the teacher on validation\n(nats per token)")
            row[1].set_ylabel(text_measures(evaluation)[0].axis)
            for axes in row:
                axes.set_xscale("log")
                axes.set_xlabel("Learning rate")
        drawing.legend(*grid[0][0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
        note = f"Ringed: the lowest KL on validation, which picks the winner. Right: {sample_note(evaluations)}"
        draw_frame(drawing, title(evaluations), note)
        save_figure(drawing, step.output)


def draw_group(row: Sequence[Axes], evaluation: QuantizedEvaluation, group: Sequence[Cell], number: int) -> None:
    """One policy's line in both panels."""
    colour, marker = PALETTE[number % len(PALETTE)], MARKERS[number % len(MARKERS)]
    ordered = sorted(group, key=lambda cell: float(cell.at(AXIS)))
    rates = [float(cell.at(AXIS)) for cell in ordered]
    row[0].plot(
        rates, [cell.validation_kl for cell in ordered], color=colour, marker=marker, label=group_name(ordered[0])
    )
    measure = text_measures(evaluation)[0]
    found = [(rate, estimate(evaluation, cell.condition, measure)) for rate, cell in zip(rates, ordered, strict=True)]
    drawn = [(rate, value) for rate, value in found if value]
    row[1].errorbar(
        [rate for rate, _ in drawn],
        [value.value for _, value in drawn],
        yerr=error_bars([value for _, value in drawn]),
        color=colour,
        marker=marker,
    )
    best = winner(ordered)
    row[0].plot(
        float(best.at(AXIS)), best.validation_kl, marker="o", markersize=12, color=BLACK, markerfacecolor="none"
    )


def group_name(cell: Cell) -> str:
    """What a line's runs have in common."""
    return f"λ = {cell.at('on_policy_share'):g}, β = {cell.at('beta'):g}, {cell.at('weight_format')}"


def title(evaluations: Sequence[QuantizedEvaluation]) -> str:
    """The rate that each policy's validation picks, of the first model."""
    groups = groups_along(evaluations[0], (AXIS,))
    words = [f"λ = {best.at('on_policy_share'):g}: {best.at(AXIS):.0e}" for best in map(winner, groups)]
    return f"Learning rate that validation picks: {'; '.join(words)}"


if __name__ == "__main__":
    run_step(FigureStep, main)
