"""Step program: `recovered.png`, the share of the gap between ptq and the teacher that each condition closed."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes

from stillhouse.evaluation.statistics import Estimate
from stillhouse.reporting.style import (
    BLACK,
    GREY,
    condition_style,
    draw_frame,
    draw_notice,
    error_bars,
    figure,
    save_figure,
)
from stillhouse.runtime.commands import run_step
from stillhouse.studies.quantized_distillation.comparisons import (
    closed_share,
    load_evaluations,
    recoverable,
    recovering,
    sample_note,
)
from stillhouse.studies.quantized_distillation.figures import FigureStep
from stillhouse.studies.quantized_distillation.results import QuantizedEvaluation

LOWEST = -100.0


def main(step: FigureStep) -> None:
    """Draw one panel a model: metrics from top to bottom, conditions side by side."""
    evaluations = [one for one in load_evaluations(step.results) if recoverable(one) and recovering(one)]
    if not evaluations:
        draw_notice(step.output, "No condition recovers anything: no damage by ptq is beyond doubt, or none was run.")
        return
    rows = [len(recoverable(one)) * (0.2 * len(recovering(one)) + 0.2) for one in evaluations]
    with figure(9.5, 1.6 + sum(rows) + 0.5 * len(rows)) as drawing:
        grid = drawing.subplots(len(evaluations), 1, squeeze=False, height_ratios=rows)
        for (axes,), evaluation in zip(grid, evaluations, strict=True):
            draw_panel(axes, evaluation)
            axes.set_title(evaluation.results.model, loc="left", fontweight="bold")
        grid[-1][0].set_xlabel("Share of the gap closed (%): 0 is ptq, 100 is the teacher")
        drawing.legend(*grid[0][0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
        note = (
            "Metrics that rounding made worse beyond doubt. What lies outside of the picture is drawn at its edge. "
            f"{sample_note(evaluations)}"
        )
        draw_frame(drawing, title(evaluations), note)
        save_figure(drawing, step.output)


def draw_panel(axes: Axes, evaluation: QuantizedEvaluation) -> None:
    """Every metric that rounding damaged, with what each condition closed of it."""
    measures, conditions = recoverable(evaluation), recovering(evaluation)
    for number, condition in enumerate(conditions):
        shift = 0.7 * ((number + 0.5) / len(conditions) - 0.5)
        style = condition_style(condition)
        found = [(place, closed_share(evaluation, condition, measure)) for place, measure in enumerate(measures)]
        drawn = [(place, _inside(value)) for place, value in found if value]
        axes.errorbar(
            [100 * value.value for _, value in drawn],
            [place + shift for place, _ in drawn],
            xerr=100 * error_bars([value for _, value in drawn]),
            color=style.colour,
            marker=style.marker,
            linestyle="none",
            label=condition,
        )
    for place, colour in ((0, GREY), (100, BLACK)):
        axes.axvline(place, color=colour, linewidth=0.9, linestyle="--" if place == 0 else ":")
    axes.set_yticks(range(len(measures)), [measure.name for measure in measures])
    axes.set_ylim(len(measures) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)


def _inside(value: Estimate) -> Estimate:
    """A ratio's interval can be endless: cut at the picture's edges, two gaps below zero and above one."""
    low, high = LOWEST / 100, 1 - LOWEST / 100
    middle, left, right = (min(max(bound, low), high) for bound in (value.value, value.low, value.high))
    return Estimate(middle, left, right, value.n)


def title(evaluations: Sequence[QuantizedEvaluation]) -> str:
    """What share of the damage to the first metric each condition undid."""
    evaluation = evaluations[0]
    measure = recoverable(evaluation)[0]
    shares = [(name, closed_share(evaluation, name, measure)) for name in recovering(evaluation)]
    words = ", ".join(f"{name} {100 * value.value:.0f} %" for name, value in shares if value)
    return f"Of what rounding to nearest cost in {measure.name}, closed: {words}"


if __name__ == "__main__":
    run_step(FigureStep, main)
