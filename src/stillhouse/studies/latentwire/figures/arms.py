"""Step program: `arms.png`, every arm at the headline's budget: F1, exact match and gold NLL, with intervals."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes

from stillhouse.reporting.steps import FigureStep
from stillhouse.reporting.style import ConditionStyle, draw_frame, error_bars, figure, save_figure
from stillhouse.runtime.commands import run_step
from stillhouse.studies.latentwire.comparisons import (
    COMBINED_ARMS,
    COMBINED_NAMES,
    EXACT,
    F1,
    GOLD_NLL,
    Entry,
    Measure,
    arm_entries,
    combined_entries,
    compare,
    estimate,
    headline,
    load_evaluations,
    sample_note,
)
from stillhouse.studies.latentwire.figures import reader_styles
from stillhouse.studies.latentwire.results import AGREEMENT, Evaluation

MEASURES = (F1, EXACT, GOLD_NLL)


def main(step: FigureStep) -> None:
    """Draw one row of panels a pair, one panel a measure, one line an arm."""
    evaluations = load_evaluations(step.results)
    places = [lines(evaluation) for evaluation in evaluations]
    heights = [len(one) for one in places]
    with figure(12.5, 1.5 + sum(0.32 * height + 0.5 for height in heights)) as drawing:
        grid = drawing.subplots(len(evaluations), len(MEASURES), squeeze=False, sharey="row", height_ratios=heights)
        for row, evaluation, place in zip(grid, evaluations, places, strict=True):
            for axes, measure in zip(row, MEASURES, strict=True):
                draw_panel(axes, evaluation, place, measure)
            row[0].set_title(evaluation.results.pair, loc="left", fontweight="bold")
        for axes, measure in zip(grid[-1], MEASURES, strict=True):
            axes.set_xlabel(measure.axis)
        drawing.legend(*grid[0][0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
        note = (
            "Budgets: the bytes, or the vectors as tokens, that the latent takes. Joint choice: of the readers' "
            "answers the one that all readers together find most likely per token; oracle: the best of them. "
            f"{sample_note(evaluations)}"
        )
        draw_frame(drawing, title(evaluations), note)
        save_figure(drawing, step.output)


def lines(evaluation: Evaluation) -> list[str]:
    """The labels of all readers' arms, those that combine readers after the arm that they combine."""
    labels: dict[str, None] = {}
    for reader in evaluation.results.reader_names:
        for one in arm_entries(evaluation, reader):
            labels[one.label] = None
    for one in combined(evaluation):
        labels[combined_label(one)] = None
    return list(labels)


def combined(evaluation: Evaluation) -> list[Entry]:
    """Joint choice and oracle over each arm that has them; agreement is no accuracy and stands in the tables."""
    found = [one for arm in COMBINED_ARMS for one in combined_entries(evaluation, arm)]
    return [one for one in found if one.reader != AGREEMENT]


def combined_label(entry: Entry) -> str:
    """An arm that takes its answers from several readers."""
    return f"{entry.label}: {COMBINED_NAMES[entry.reader]}"


def draw_panel(axes: Axes, evaluation: Evaluation, places: Sequence[str], measure: Measure) -> None:
    """One measure of every arm, first arm on top, readers side by side."""
    readers = evaluation.results.reader_names
    styles = reader_styles(readers)
    for number, reader in enumerate(readers):
        drawn = [(places.index(one.label), one) for one in arm_entries(evaluation, reader)]
        draw_points(axes, evaluation, drawn, measure, reader, styles[reader], reader_shift(number, len(readers)))
    together = [(combined_label(one), one) for one in combined(evaluation)]
    drawn = [(places.index(label), one) for label, one in together if label in places]
    draw_points(axes, evaluation, drawn, measure, "all readers", styles["all readers"], 0.0)
    axes.set_yticks(range(len(places)), places)
    axes.set_ylim(len(places) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)


def reader_shift(number: int, readers: int) -> float:
    """How far from its line a reader's point lies, so that none hides another."""
    return 0.22 * (number - (readers - 1) / 2)


def draw_points(
    axes: Axes,
    evaluation: Evaluation,
    drawn: Sequence[tuple[int, Entry]],
    measure: Measure,
    label: str,
    style: ConditionStyle,
    shift: float,
) -> None:
    """One reader's arms with their intervals."""
    found = [(place, value) for place, one in drawn if (value := estimate(evaluation, one, measure))]
    if not found:
        return
    axes.errorbar(
        [measure.scale * value.value for _, value in found],
        [place + shift for place, _ in found],
        xerr=measure.scale * error_bars([value for _, value in found]),
        color=style.colour,
        marker=style.marker,
        linestyle="none",
        label=label,
    )


def title(evaluations: Sequence[Evaluation]) -> str:
    """How far the latent is from the full text, and whether it says more than the question alone."""
    parts = []
    for evaluation in evaluations:
        for reader in evaluation.results.reader_names:
            latent, arms = headline(evaluation, reader), {one.arm: one for one in arm_entries(evaluation, reader)}
            if latent and "full_text" in arms and "no_context" in arms:
                below = compare(evaluation, latent, arms["full_text"], F1)
                above = compare(evaluation, latent, arms["no_context"], F1)
                assert below and above
                parts.append(f"{reader} {100 * below.difference:+.1f} and {100 * above.difference:+.1f}")
    if not parts:
        return "F1, exact match and gold NLL by arm"
    return f"The latent's F1 minus that of the full text and of the question alone, in points: {'; '.join(parts)}"


if __name__ == "__main__":
    run_step(FigureStep, main)
