"""Step program: `first_token.png`, whether the answer begins right, and whether it always begins the same.

FirstTok@1 and @5: the best-ranked first token of a gold answer is the most likely one, or among the five. A reader
that begins every answer with one token has learned an average, whatever its other scores.
"""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes

from stillhouse.reporting.steps import FigureStep
from stillhouse.reporting.style import draw_frame, figure, save_figure
from stillhouse.runtime.commands import run_step
from stillhouse.studies.latentwire.comparisons import (
    FIRST_AT_1,
    FIRST_AT_5,
    arm_entries,
    headline,
    load_evaluations,
    sample_note,
    top_first_token_share,
)
from stillhouse.studies.latentwire.figures import reader_styles
from stillhouse.studies.latentwire.figures.arms import draw_panel, reader_shift
from stillhouse.studies.latentwire.results import Evaluation

MEASURES = (FIRST_AT_1, FIRST_AT_5)


def main(step: FigureStep) -> None:
    """Draw one row of panels a pair: FirstTok@1, FirstTok@5, share of the most frequent first token."""
    evaluations = load_evaluations(step.results)
    places = [labels(evaluation) for evaluation in evaluations]
    heights = [len(one) for one in places]
    with figure(12.5, 1.5 + sum(0.32 * height + 0.5 for height in heights)) as drawing:
        grid = drawing.subplots(len(evaluations), 3, squeeze=False, sharey="row", height_ratios=heights)
        for row, evaluation, place in zip(grid, evaluations, places, strict=True):
            for axes, measure in zip(row, MEASURES, strict=False):
                draw_panel(axes, evaluation, place, measure)
                axes.set_xlim(-4, 104)
            draw_collapse(row[-1], evaluation, place)
            row[0].set_title(evaluation.results.pair, loc="left", fontweight="bold")
        for axes, label in zip(
            grid[-1], [*(m.axis for m in MEASURES), "Most frequent first token (% of answers)"], strict=True
        ):
            axes.set_xlabel(label)
        drawing.legend(*grid[0][0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
        note = (
            "FirstTok@k: a first token of a gold answer is among the k most likely. Right: the share of questions "
            f"whose most likely first token is the commonest one; 100 % is collapse. {sample_note(evaluations)}"
        )
        draw_frame(drawing, title(evaluations), note)
        save_figure(drawing, step.output)


def labels(evaluation: Evaluation) -> list[str]:
    """The arms of all readers, each once."""
    readers = evaluation.results.reader_names
    return list(dict.fromkeys(one.label for reader in readers for one in arm_entries(evaluation, reader)))


def draw_collapse(axes: Axes, evaluation: Evaluation, places: Sequence[str]) -> None:
    """The share of the most frequent first token, one point an arm and reader."""
    readers = evaluation.results.reader_names
    for number, (reader, style) in enumerate(reader_styles(readers).items()):
        drawn = [(one, share) for one in arm_entries(evaluation, reader) if (share := top_first_token_share(one))]
        axes.plot(
            [100 * share for _, share in drawn],
            [places.index(one.label) + reader_shift(number, len(readers)) for one, _ in drawn],
            color=style.colour,
            marker=style.marker,
            linestyle="none",
        )
    axes.set_xlim(-4, 104)


def title(evaluations: Sequence[Evaluation]) -> str:
    """How much of the answers' first tokens is one and the same, for the latent."""
    found = [
        (reader, share)
        for one in evaluations
        for reader in one.results.reader_names
        if (latent := headline(one, reader)) and (share := top_first_token_share(latent))
    ]
    if not found:
        return "The answer's first token by arm"
    shares = ", ".join(f"{reader} {100 * share:.0f} %" for reader, share in found)
    return f"Answers that begin with the commonest first token when a latent is read: {shares}"


if __name__ == "__main__":
    run_step(FigureStep, main)
