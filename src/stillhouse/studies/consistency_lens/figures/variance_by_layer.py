"""Step program: `variance_by_layer.png`, what lenses of several layers recover, beside the controls."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from matplotlib.axes import Axes

from stillhouse.evaluation.statistics import Estimate
from stillhouse.reporting.steps import FigureStep
from stillhouse.reporting.style import GREY, draw_frame, error_bars, figure, save_figure
from stillhouse.runtime.commands import run_step
from stillhouse.studies.consistency_lens.comparisons import (
    LABELS,
    Subject,
    load_evaluations,
    recovered,
    sample_note,
    subjects,
    variance_explained,
)
from stillhouse.studies.consistency_lens.figures.variants import VARIANT_STYLES
from stillhouse.studies.consistency_lens.results import LENS

DRAWN = (LENS, "original_tokens", "text_regression", "other_explanation")
MEASURES: dict[str, Callable[[Subject, str], Estimate]] = {
    "Variance of the activation explained": variance_explained,
    "Share of the mean's KL recovered": recovered,
}


def main(step: FigureStep) -> None:
    """Draw one row of panels a model, one panel a measure, the variants side by side at each layer."""
    evaluations = load_evaluations(step.results)
    with figure(10, 1.2 + 2.9 * len(evaluations)) as drawing:
        grid = drawing.subplots(len(evaluations), len(MEASURES), squeeze=False)
        for row, evaluation in zip(grid, evaluations, strict=True):
            own = sorted(subjects([evaluation]), key=lambda subject: subject.facts.layer)
            for axes, (label, measure) in zip(row, MEASURES.items(), strict=True):
                draw_layers(axes, own, measure)
                axes.set_ylabel(label)
            row[0].set_title(evaluation.results.model, loc="left", fontweight="bold")
        for axes in grid[-1]:
            axes.set_xlabel("Layer (residual stream after this block)")
        handles, labels = grid[0][0].get_legend_handles_labels()
        drawing.legend(handles, labels, loc="outside right center", fontsize=9)
        chosen = subjects(evaluations)
        draw_frame(drawing, message(chosen), f"{sample_note(chosen)} 0: as good as the mean activation.")
        save_figure(drawing, step.output)


def draw_layers(axes: Axes, own: Sequence[Subject], measure: Callable[[Subject, str], Estimate]) -> None:
    """Each variant's measure with its interval, a group a condition."""
    width = 0.6 / len(DRAWN)
    for number, variant in enumerate(DRAWN):
        style = VARIANT_STYLES[variant]
        values = [measure(subject, variant) for subject in own]
        places = [place + (number - (len(DRAWN) - 1) / 2) * width for place in range(len(own))]
        axes.errorbar(
            places,
            [one.value for one in values],
            yerr=error_bars(values),
            color=style.colour,
            marker=style.marker,
            linestyle="none",
            label=LABELS[variant],
        )
    axes.axhline(0, color=GREY, linewidth=1)
    several = len({subject.facts.layer for subject in own}) < len(own)
    names = [f"{subject.facts.layer}" + (f"\n{subject.condition}" if several else "") for subject in own]
    axes.set_xticks(range(len(own)), names)
    # A variant far below 0 would flatten all others.
    axes.set_ylim(bottom=max(axes.get_ylim()[0], -1.0))


def message(chosen: Sequence[Subject]) -> str:
    """The layer that is recovered best."""
    best = max(chosen, key=lambda subject: variance_explained(subject).value)
    value = variance_explained(best)
    return (
        f"Most variance is explained at layer {best.facts.layer}: {value.value:.0%} [{value.low:.0%}, {value.high:.0%}]"
    )


if __name__ == "__main__":
    run_step(FigureStep, main)
