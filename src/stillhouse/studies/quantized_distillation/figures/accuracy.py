"""Step program: `accuracy.png`, every system on every task: teacher, baselines and students, with intervals."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes

from stillhouse.reporting.style import condition_style, draw_frame, draw_notice, error_bars, figure, save_figure
from stillhouse.runtime.commands import run_step
from stillhouse.studies.quantized_distillation.comparisons import (
    Measure,
    average_accuracy,
    compare,
    estimate,
    load_evaluations,
    sample_note,
    shown,
    task_measures,
)
from stillhouse.studies.quantized_distillation.figures import FigureStep
from stillhouse.studies.quantized_distillation.results import PTQ, TEACHER, QuantizedEvaluation


def main(step: FigureStep) -> None:
    """Draw one row of panels a model, one panel a task and one for their mean, one line a condition."""
    evaluations = [one for one in load_evaluations(step.results) if one.results.sets("task")]
    if not evaluations:
        draw_notice(step.output, "No tasks are configured (quantized_distillation.evaluation.tasks).")
        return
    panels = [task_panels(one) for one in evaluations]
    columns, heights = max(map(len, panels)), [len(shown(one.results.conditions)) for one in evaluations]
    with figure(2 + 2.6 * columns, 1.3 + sum(0.3 * height + 0.55 for height in heights)) as drawing:
        grid = drawing.subplots(len(evaluations), columns, squeeze=False, sharey="row", height_ratios=heights)
        for row, evaluation, measures in zip(grid, evaluations, panels, strict=True):
            for axes, measure in zip(row, measures, strict=False):
                draw_panel(axes, evaluation, measure)
            for axes in row[len(measures) :]:
                axes.set_visible(False)
            row[0].set_title(evaluation.results.model, loc="left", fontweight="bold")
        draw_frame(drawing, title(evaluations), f"Zero-shot. {sample_note(evaluations)}")
        save_figure(drawing, step.output)


def task_panels(evaluation: QuantizedEvaluation) -> list[Measure]:
    """Each task by acc_norm, or by acc where it defines no other; then the mean of these, where there are several."""
    normalised = {one.sets: one for one in task_measures(evaluation, "acc_norm") if len(one.sets) == 1}
    panels = [normalised.get(one.sets, one) for one in task_measures(evaluation) if len(one.sets) == 1]
    mean = average_accuracy(evaluation)
    return [*panels, mean] if mean and len(panels) > 1 else panels


def draw_panel(axes: Axes, evaluation: QuantizedEvaluation, measure: Measure) -> None:
    """One measure of every condition, the teacher on top and its value as a line."""
    conditions = shown(evaluation.results.conditions)
    for place, condition in enumerate(conditions):
        value, style = estimate(evaluation, condition, measure), condition_style(condition)
        if value is None:
            continue
        axes.errorbar(
            measure.scale * value.value,
            place,
            xerr=measure.scale * error_bars([value]),
            color=style.colour,
            marker=style.marker,
        )
        if condition == TEACHER:
            axes.axvline(measure.scale * value.value, color=style.colour, linewidth=0.8, linestyle=":")
    axes.set_xlabel(measure.axis)
    axes.set_yticks(range(len(conditions)), conditions)
    axes.set_ylim(len(conditions) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)


def title(evaluations: Sequence[QuantizedEvaluation]) -> str:
    """What rounding costs in mean accuracy, and whether the two policies can be told apart."""
    parts = []
    for evaluation in evaluations:
        mean = average_accuracy(evaluation)
        pairs = {"ptq minus teacher": (PTQ, TEACHER), "on- minus off-policy": ("on_policy", "off_policy")}
        for words, (one, other) in pairs.items():
            if mean and (found := compare(evaluation, one, other, mean)):
                low, high = 100 * found.low, 100 * found.high
                parts.append(f"{words} {100 * found.difference:+.1f} points [{low:+.1f}, {high:+.1f}]")
    return f"Mean accuracy: {'; '.join(parts)}" if parts else "Accuracy by task"


if __name__ == "__main__":
    run_step(FigureStep, main)
