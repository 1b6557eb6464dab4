"""Step program: `summary.png`, every model and condition at its headline checkpoint, with intervals.

The untrained base, zero-shot and with the teacher's shots, stands among the students: a method that does not
beat it has not paid for its training.
"""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes

from stillhouse.reporting.steps import FigureStep
from stillhouse.reporting.style import condition_style, draw_frame, error_bars, figure, save_figure
from stillhouse.runtime.commands import run_step
from stillhouse.studies.context_distillation.comparisons import (
    BASELINE,
    DRAWN_MEASURES,
    GOLD_NLL,
    METHOD,
    Measure,
    by_seed,
    compare,
    estimate,
    find,
    headline,
    load_evaluations,
    sample_note,
)
from stillhouse.studies.context_distillation.results import Evaluation


def main(step: FigureStep) -> None:
    """Draw one row of panels a model, one panel a measure, one line a condition."""
    evaluations = load_evaluations(step.results)
    heights = [len(headline(evaluation)) for evaluation in evaluations]
    with figure(11, 1.2 + sum(0.27 * height + 0.55 for height in heights)) as drawing:
        grid = drawing.subplots(
            len(evaluations), len(DRAWN_MEASURES), squeeze=False, sharey="row", height_ratios=heights
        )
        for row, evaluation in zip(grid, evaluations, strict=True):
            for axes, measure in zip(row, DRAWN_MEASURES, strict=True):
                draw_panel(axes, evaluation, measure)
            row[0].set_title(evaluation.results.model, loc="left", fontweight="bold")
        for axes, measure in zip(grid[-1], DRAWN_MEASURES, strict=True):
            axes.set_xlabel(measure.axis)
        draw_frame(drawing, title(evaluations), sample_note(evaluations))
        save_figure(drawing, step.output)


def draw_panel(axes: Axes, evaluation: Evaluation, measure: Measure) -> None:
    """One measure of every condition, first condition on top."""
    subjects = headline(evaluation)
    for place, subject in enumerate(subjects):
        style = condition_style(subject.condition)
        value = estimate(evaluation, subject, measure)
        seeds = by_seed(evaluation, subject, measure)
        if len(seeds) > 1:
            axes.plot(
                [measure.scale * seed for seed in seeds],
                [place + 0.25] * len(seeds),
                linestyle="none",
                marker=".",
                markersize=3,
                color=style.colour,
            )
        axes.errorbar(
            measure.scale * value.value,
            place,
            xerr=measure.scale * error_bars([value]),
            color=style.colour,
            marker=style.marker,
        )
    axes.set_yticks(range(len(subjects)), [subject.label for subject in subjects])
    axes.set_ylim(len(subjects) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    if not measure.per_token:
        axes.set_xlim(left=-0.03 * axes.get_xlim()[1])  # room for a marker at zero


def title(evaluations: Sequence[Evaluation]) -> str:
    """What came out for the method against cross entropy alone, judged by the paired interval of the gold NLL."""
    found = []
    for evaluation in evaluations:
        subjects = headline(evaluation)
        method, baseline = find(subjects, METHOD), find(subjects, BASELINE)
        if method and baseline:
            found.append(compare(evaluation, method, baseline, GOLD_NLL))
    if not found:
        return "Gold answer NLL, accuracy and answer format by condition"
    better = sum(one.high < 0 for one in found)
    if len(found) > 1:
        return f"{METHOD} has a lower gold NLL than {BASELINE} in {better} of {len(found)} models"
    one = found[0]
    verdict = "has a lower gold NLL than" if better else "has a higher gold NLL than"
    if not one.excludes_zero:
        verdict = "is not told apart from"
    interval = f"{one.difference:+.3f} nats per token [{one.low:+.3f}, {one.high:+.3f}]"
    return f"{METHOD} {verdict} {BASELINE}: {interval}"


if __name__ == "__main__":
    run_step(FigureStep, main)
