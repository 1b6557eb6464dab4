"""Step program: `ablation_bars.png`, every student's difference to the baseline at the headline checkpoint.

Differences are paired: both conditions met the same items (and, with several, the same seeds).
"""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from stillhouse.reporting.steps import FigureStep
from stillhouse.reporting.style import BLACK, condition_style, draw_frame, draw_notice, error_bars, figure, save_figure
from stillhouse.runtime.commands import run_step
from stillhouse.studies.context_distillation.comparisons import (
    BASELINE,
    DRAWN_MEASURES,
    GOLD_NLL,
    Comparison,
    Measure,
    compare,
    find,
    headline,
    load_evaluations,
    sample_note,
)
from stillhouse.studies.context_distillation.results import Evaluation


def main(step: FigureStep) -> None:
    """Draw one row of panels a model, one panel a measure, one bar a condition."""
    evaluations = load_evaluations(step.results)
    differences = {one.results.model: differences_to_baseline(one) for one in evaluations}
    drawn = {model: bars for model, bars in differences.items() if bars[GOLD_NLL]}
    if not drawn:
        draw_notice(step.output, f"No student beside '{BASELINE}' was trained: there is no difference to draw.")
        return
    heights = [len(bars[GOLD_NLL]) for bars in drawn.values()]
    with figure(11, 1.5 + sum(0.3 * height + 0.5 for height in heights)) as drawing:
        grid = drawing.subplots(len(drawn), len(DRAWN_MEASURES), squeeze=False, sharey="row", height_ratios=heights)
        for row, (model, bars) in zip(grid, drawn.items(), strict=True):
            for axes, measure in zip(row, DRAWN_MEASURES, strict=True):
                draw_bars(axes, bars[measure], measure)
            row[0].set_title(model, loc="left", fontweight="bold")
        for axes, measure in zip(grid[-1], DRAWN_MEASURES, strict=True):
            axes.set_xlabel(f"Difference in\n{measure.difference_axis}")
        note = (
            f"Difference to {BASELINE} at each one's chosen checkpoint, paired by item; solid where the interval "
            f"excludes zero, not adjusted for the number of comparisons. {sample_note(evaluations, dots=False)}"
        )
        draw_frame(drawing, title(list(drawn.values())), note)
        save_figure(drawing, step.output)


def differences_to_baseline(evaluation: Evaluation) -> dict[Measure, list[Comparison]]:
    """Each student minus the baseline, by measure, the lowest gold NLL first; empty lists without a baseline."""
    subjects = headline(evaluation)
    baseline = find(subjects, BASELINE)
    students = [s for s in subjects if baseline and s.trained and s.condition != BASELINE]
    bars = {m: [compare(evaluation, s, baseline, m) for s in students if baseline] for m in DRAWN_MEASURES}
    order = [bar.subject.condition for bar in sorted(bars[GOLD_NLL], key=lambda bar: bar.difference)]
    return {m: sorted(found, key=lambda bar: order.index(bar.subject.condition)) for m, found in bars.items()}


def draw_bars(axes: Axes, bars: Sequence[Comparison], measure: Measure) -> None:
    """Horizontal bars from zero with their intervals, in the order given."""
    for place, bar in enumerate(bars):
        style = condition_style(bar.subject.condition)
        axes.barh(
            place,
            measure.scale * bar.difference,
            height=0.65,
            color=style.colour,
            alpha=0.85 if bar.excludes_zero else 0.3,
        )
        axes.errorbar(
            measure.scale * bar.difference,
            place,
            xerr=measure.scale * error_bars([bar.estimate]),
            color=BLACK,
            linewidth=1,
        )
    axes.axvline(0, color=BLACK, linewidth=0.8)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_yticks(range(len(bars)), [bar.subject.label for bar in bars])
    axes.set_ylim(len(bars) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)


def title(models: Sequence[dict[Measure, list[Comparison]]]) -> str:
    """How many differences of the gold NLL have an interval without zero."""
    bars = [bar for found in models for bar in found[GOLD_NLL]]
    lower, higher = sum(bar.high < 0 for bar in bars), sum(bar.low > 0 for bar in bars)
    undecided = len(bars) - lower - higher
    return f"Gold NLL against {BASELINE}: {lower} of {len(bars)} lower, {higher} higher, {undecided} undecided"


if __name__ == "__main__":
    run_step(FigureStep, main)
