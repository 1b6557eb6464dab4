"""Step program: `ablation_curve.png`, each measure over training, one row of panels a condition.

Every row shows one condition in colour against the baseline; the others are grey lines behind it.
"""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import SubFigure

from stillhouse.reporting.steps import FigureStep
from stillhouse.reporting.style import GREY, draw_frame, draw_notice, figure, save_figure
from stillhouse.runtime.commands import run_step
from stillhouse.studies.context_distillation.comparisons import (
    BASELINE,
    DRAWN_MEASURES,
    GOLD_NLL,
    Measure,
    by_seed,
    find,
    headline,
    load_evaluations,
    sample_note,
    trajectory,
)
from stillhouse.studies.context_distillation.figures.checkpoint_curve import chosen_by, draw_curve
from stillhouse.studies.context_distillation.results import Evaluation


def main(step: FigureStep) -> None:
    """Draw one block of rows a model."""
    evaluations = [one for one in load_evaluations(step.results) if ablations(one)]
    if not evaluations:
        draw_notice(step.output, "No condition besides the baseline was trained: there is nothing to compare.")
        return
    heights = [len(ablations(evaluation)) for evaluation in evaluations]
    with figure(11, 1.4 + sum(1.15 * height + 0.4 for height in heights)) as drawing:
        blocks = drawing.subfigures(len(evaluations), 1, squeeze=False, height_ratios=heights)
        for block, evaluation in zip(blocks[:, 0], evaluations, strict=True):
            draw_block(block, evaluation)
        note = (
            f"Solid: the row's condition; dashed: {BASELINE}; grey: the other conditions. {sample_note(evaluations)} "
            f"Rings: checkpoints chosen by {chosen_by(evaluations[0])}."
        )
        draw_frame(drawing, title(evaluations), note)
        save_figure(drawing, step.output)


def ablations(evaluation: Evaluation) -> list[str]:
    """The trained conditions but the baseline, in the configured order."""
    return [s.condition for s in headline(evaluation) if s.trained and s.condition != BASELINE]


def draw_block(block: SubFigure, evaluation: Evaluation) -> None:
    """One model: a row a condition, a column a measure, each column on one scale."""
    conditions = ablations(evaluation)
    grid = block.subplots(len(conditions), len(DRAWN_MEASURES), squeeze=False, sharex=True, sharey="col")
    with_baseline = [BASELINE] if find(headline(evaluation), BASELINE) else []
    for column, measure in zip(grid.T, DRAWN_MEASURES, strict=True):
        for axes, condition in zip(column, conditions, strict=True):
            draw_others(axes, evaluation, [name for name in conditions if name != condition], measure)
            for name in with_baseline:
                draw_curve(axes, evaluation, name, measure, line="--")
            draw_curve(axes, evaluation, condition, measure)
        column[0].set_title(measure.axis)
        column[-1].set_xlabel("Training step (optimiser updates)")
        if not measure.per_token:
            column[0].set_ylim(bottom=-0.05 * column[0].get_ylim()[1])  # room for a marker at zero
    for axes, condition in zip(grid[:, 0], conditions, strict=True):
        axes.set_ylabel(row_label(condition), rotation=0, ha="right", va="center", fontweight="bold")
    block.suptitle(evaluation.results.model, x=0.01, ha="left", fontweight="bold", fontsize=10)


def draw_others(axes: Axes, evaluation: Evaluation, conditions: Sequence[str], measure: Measure) -> None:
    """The mean curves of other conditions, for orientation."""
    for condition in conditions:
        subjects = trajectory(evaluation, condition)
        seeds = [by_seed(evaluation, subject, measure) for subject in subjects.values()]
        means = [measure.scale * sum(values) / len(values) for values in seeds]
        axes.plot(list(subjects), means, color=GREY, linewidth=0.6, alpha=0.6)


def row_label(condition: str) -> str:
    """A condition's name, a sweep point's axes on lines of their own."""
    return condition.replace("+", "\n+")


def title(evaluations: Sequence[Evaluation]) -> str:
    """Which condition ends with the lowest gold NLL; in words of number alone where models are several."""
    if len(evaluations) > 1:
        return "What each part of the method changes, over training"
    trained = [subject for subject in headline(evaluations[0]) if subject.trained]
    ends = {s.condition: by_seed(evaluations[0], s, GOLD_NLL) for s in trained}
    means = {condition: sum(values) / len(values) for condition, values in ends.items()}
    best = min(means, key=lambda condition: means[condition])
    worst = max(means, key=lambda condition: means[condition])
    return f"Chosen checkpoints lie between {means[best]:.3f} ({best}) and {means[worst]:.3f} nats per token ({worst})"


if __name__ == "__main__":
    run_step(FigureStep, main)
