"""Step program: `controls.png`, every baseline and control beside the lens, and paired differences to it."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes

from stillhouse.evaluation.statistics import Estimate
from stillhouse.reporting.steps import FigureStep
from stillhouse.reporting.style import GREY, draw_frame, error_bars, figure, save_figure
from stillhouse.runtime.commands import run_step
from stillhouse.studies.consistency_lens.comparisons import (
    LABELS,
    Subject,
    compare,
    kl,
    load_evaluations,
    recovered,
    sample_note,
    subjects,
    variance_explained,
)
from stillhouse.studies.consistency_lens.figures.variants import VARIANT_STYLES, heading
from stillhouse.studies.consistency_lens.results import CONTROLS, LENS

# A variant far below 0 would flatten all others; it is drawn at the edge, as an arrow.
LOWEST_VARIANCE = -1.0


def main(step: FigureStep) -> None:
    """Draw one row of panels a condition, one line a variant."""
    chosen = subjects(load_evaluations(step.results))
    with figure(11, 1.2 + 3.1 * len(chosen)) as drawing:
        grid = drawing.subplots(len(chosen), 3, squeeze=False, sharey="row")
        for row, subject in zip(grid, chosen, strict=True):
            draw_row(row, subject)
            row[0].set_title(heading(subject), loc="left", fontweight="bold")
        for axes, label in zip(
            grid[-1],
            (
                "KL to the original's prediction (nats)\nlower is better",
                "KL minus the lens's, paired (nats)\nright of 0: the lens is better",
                "Variance of the activation explained\nhigher is better",
            ),
            strict=True,
        ):
            axes.set_xlabel(label)
        note = f"{sample_note(chosen)} Arrows: beyond the axis. T: tokens of an explanation."
        draw_frame(drawing, message(chosen), note)
        save_figure(drawing, step.output)


def draw_row(row: Sequence[Axes], subject: Subject) -> None:
    """The three panels of one condition."""
    variants = [LENS, *sorted(CONTROLS, key=lambda variant: kl(subject, variant).value)]
    for place, variant in enumerate(variants):
        draw_estimate(row[0], place, variant, kl(subject, variant))
        if variant != LENS:
            draw_estimate(row[1], place, variant, compare(subject, variant).estimate)
        draw_estimate(row[2], place, variant, variance_explained(subject, variant), lowest=LOWEST_VARIANCE)
    row[0].set_yticks(range(len(variants)), [LABELS[variant] for variant in variants])
    row[0].set_ylim(len(variants) - 0.5, -0.5)
    for axes in row[1:]:
        axes.axvline(0, color=GREY, linewidth=1)
    row[0].set_xlim(left=0)
    row[2].set_xlim(LOWEST_VARIANCE - 0.08, 1.0)
    for axes in row:
        axes.tick_params(axis="y", length=0)


def draw_estimate(axes: Axes, place: int, variant: str, value: Estimate, lowest: float | None = None) -> None:
    """A value with its interval, or an arrow where it lies below the axis."""
    style = VARIANT_STYLES[variant]
    if lowest is not None and value.value < lowest:
        axes.plot(lowest, place, marker="<", color=style.colour, clip_on=False)
        axes.annotate(
            f"{value.value:.1f}",
            (lowest, place),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=7,
            color=style.colour,
        )
        return
    axes.errorbar(value.value, place, xerr=error_bars([value]), color=style.colour, marker=style.marker)


def message(chosen: Sequence[Subject]) -> str:
    """How much of the mean's KL the lens takes away, and how many controls it beats."""
    parts = []
    for subject in chosen:
        found = [compare(subject, variant) for variant in CONTROLS]
        better, worse = sum(one.lens_is_better for one in found), sum(one.lens_is_worse for one in found)
        share = recovered(subject)
        name = subject.condition if len(chosen) > 1 else "The lens"
        parts.append(
            f"{name} recovers {share.value:.0%} of the mean activation's KL [{share.low:.0%}, {share.high:.0%}]; "
            f"better than {better} of {len(found)} baselines and controls, worse than {worse}"
        )
    return "\n".join(parts) if len(parts) <= 3 else "Every baseline and control beside the lens, by condition"


if __name__ == "__main__":
    run_step(FigureStep, main)
