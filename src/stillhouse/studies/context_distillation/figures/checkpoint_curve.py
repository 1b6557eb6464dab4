"""Step program: `checkpoint_curve.png`, each measure over training for the method and for cross entropy alone.

Also draws the base, zero-shot and with shots, as horizontal lines with their intervals.
"""

from __future__ import annotations

from collections.abc import Iterable

from matplotlib.artist import Artist
from matplotlib.axes import Axes

from stillhouse.reporting.steps import FigureStep
from stillhouse.reporting.style import condition_style, draw_frame, draw_notice, figure, save_figure
from stillhouse.runtime.commands import run_step
from stillhouse.studies.context_distillation.comparisons import (
    BASELINE,
    DRAWN_MEASURES,
    GOLD_NLL,
    MARKER,
    METHOD,
    Measure,
    Subject,
    by_seed,
    estimate,
    find,
    headline,
    load_evaluations,
    sample_note,
    trajectory,
)
from stillhouse.studies.context_distillation.results import Evaluation


def main(step: FigureStep) -> None:
    """Draw one row of panels a model and one panel a measure."""
    evaluations = load_evaluations(step.results)
    if not any(subject.trained for evaluation in evaluations for subject in headline(evaluation)):
        draw_notice(step.output, "No student was trained: the configuration names base conditions only.")
        return
    with figure(11, 1.3 + 2.5 * len(evaluations)) as drawing:
        grid = drawing.subplots(len(evaluations), len(DRAWN_MEASURES), squeeze=False)
        for row, evaluation in zip(grid, evaluations, strict=True):
            for axes, measure in zip(row, DRAWN_MEASURES, strict=True):
                for subject in headline(evaluation):
                    if not subject.trained:
                        draw_base(axes, evaluation, subject, measure)
                for condition in drawn_conditions(evaluation):
                    draw_curve(axes, evaluation, condition, measure)
                axes.set_ylabel(measure.axis)
                if not measure.per_token:
                    axes.set_ylim(bottom=-0.03 * axes.get_ylim()[1])  # room for a marker at zero
            row[0].set_title(evaluation.results.model, loc="left", fontweight="bold")
        for axes in grid[-1]:
            axes.set_xlabel("Training step (optimiser updates)")
        handles = legend_handles(grid[:, 0])
        drawing.legend(list(handles.values()), list(handles), loc="outside right center", fontsize=9)
        note = f"{sample_note(evaluations)} Rings: checkpoints chosen by {chosen_by(evaluations[0])}."
        draw_frame(drawing, title(evaluations), note)
        save_figure(drawing, step.output)


def drawn_conditions(evaluation: Evaluation) -> list[str]:
    """Cross entropy alone and the method; where neither was run, every student."""
    trained = [subject.condition for subject in headline(evaluation) if subject.trained]
    return [name for name in trained if name in (BASELINE, METHOD)] or trained


def draw_base(axes: Axes, evaluation: Evaluation, subject: Subject, measure: Measure) -> None:
    """The untrained model: a horizontal line and the band of its interval."""
    style, value = condition_style(subject.condition), estimate(evaluation, subject, measure)
    dashes = (0, (1, 1)) if subject.shots == 0 else (0, (min(subject.shots, 8), 2))
    axes.axhline(measure.scale * value.value, color=style.colour, linestyle=dashes, linewidth=1.2, label=subject.label)
    axes.axhspan(measure.scale * value.low, measure.scale * value.high, color=style.colour, alpha=0.06, linewidth=0)


def draw_curve(axes: Axes, evaluation: Evaluation, condition: str, measure: Measure, line: str = "-") -> None:
    """A condition's mean over training with its interval, single seeds as dots, a ring at each chosen checkpoint."""
    style, subjects = condition_style(condition), trajectory(evaluation, condition)
    values = {step: estimate(evaluation, subject, measure) for step, subject in subjects.items()}
    scaled = [[measure.scale * getattr(one, name) for one in values.values()] for name in ("value", "low", "high")]
    axes.plot(
        list(values), scaled[0], color=style.colour, marker=style.marker, linestyle=line, label=condition, zorder=3
    )
    axes.fill_between(list(values), scaled[1], scaled[2], color=style.colour, alpha=0.15, linewidth=0)
    for step, subject in subjects.items():
        seeds = by_seed(evaluation, subject, measure)
        if len(seeds) > 1:
            dots = [measure.scale * seed for seed in seeds]
            axes.plot([step] * len(dots), dots, linestyle="none", marker=".", markersize=3, color=style.colour)
    chosen = find(headline(evaluation), condition)
    for step in {measurement.step for measurement in chosen.measurements} if chosen else ():
        axes.plot(
            step,
            measure.scale * values[step].value,
            marker="o",
            markersize=12,
            markerfacecolor="none",
            markeredgecolor=style.colour,
        )
    if len(values) <= 8:
        axes.set_xticks(list(values))


def legend_handles(panels: Iterable[Axes]) -> dict[str, Artist]:
    """What the panels show, each name once."""
    shown = [axes.get_legend_handles_labels() for axes in panels]
    return {label: handle for handles, labels in shown for handle, label in zip(handles, labels, strict=True)}


def chosen_by(evaluation: Evaluation) -> str:
    """The rule that chose the headline checkpoints, in words."""
    return {
        "gold_nll": "gold NLL on validation",
        "strict_accuracy": "strict accuracy on validation",
        "last": "its being the last",
        "best_on_test": "strict accuracy on the test set itself (as published)",
    }[str(evaluation.results.evaluation["selection"])]


def title(evaluations: list[Evaluation]) -> str:
    """Where the zero-shot method ends, beside the base with the most shots."""
    subjects = headline(evaluations[0])
    method, shown = find(subjects, METHOD), [subject for subject in subjects if subject.condition == "base_few_shot"]
    if len(evaluations) > 1 or method is None or not shown:
        return "Students without shots during training, against the untrained base"
    ends = [
        [estimate(evaluations[0], subject, measure).value for measure in (GOLD_NLL, MARKER)]
        for subject in (method, shown[-1])
    ]
    (nll, share), (shot_nll, shot_share) = ends
    return (
        f"Without shots, {METHOD} reaches {nll:.2f} nats per token and writes #### in {share:.0%} of answers; "
        f"the base with {shown[-1].shots} shots: {shot_nll:.2f} and {shot_share:.0%}"
    )


if __name__ == "__main__":
    run_step(FigureStep, main)
