"""Step program: `accuracy.png`, every arm on every task: accuracy and the right answers' NLL, with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes

from stillhouse.reporting.steps import FigureStep
from stillhouse.reporting.style import Interval, draw_frame, error_bars, figure, save_figure
from stillhouse.reporting.tables import format_estimate
from stillhouse.runtime.commands import run_step
from stillhouse.studies.lora_generation.comparisons import (
    GROUPS,
    accuracy,
    arms,
    compare,
    gold_nll,
    groups,
    load_evaluations,
    name_of,
    sample_note,
)
from stillhouse.studies.lora_generation.config import Arm
from stillhouse.studies.lora_generation.figures import ARM_STYLES
from stillhouse.studies.lora_generation.results import Evaluation


def main(step: FigureStep) -> None:
    """Draw a column per task, accuracy above NLL, one line an arm."""
    evaluations = load_evaluations(step.results)
    panels = [(one, group, task) for one in evaluations for group, tasks in groups(one).items() for task in tasks]
    places = [arm for arm in ARM_STYLES if any(arm in arms(one, [task]) for one, _, task in panels)]
    height = 0.26 * len(places)
    with figure(2.6 + 2.5 * len(panels), 1.8 + 2 * height) as drawing:
        grid = drawing.subplots(2, len(panels), squeeze=False, sharey=True)
        for (above, below), (one, group, task) in zip(grid.T, panels, strict=True):
            scored = arms(one, [task])
            draw_arms(above, places, {arm: accuracy(one, [task], arm) for arm in scored}, 100)
            draw_arms(below, places, {arm: gold_nll(one, [task], arm) for arm in scored}, 1)
            above.set_yticks(range(len(places)), [name_of(one, arm) for arm in places])
            model = f"{one.results.model}, " if len(evaluations) > 1 else ""
            above.set_title(f"{model}{task}\n({GROUPS[group].removesuffix('s')})", fontsize=9)
            above.set_xlabel("Accuracy (%)")
            below.set_xlabel("Gold NLL (nats/token)")
        draw_frame(
            drawing,
            message(evaluations),
            f"Left is better in the lower row. The dashed line: the base. {sample_note(evaluations)}",
        )
        save_figure(drawing, step.output)


def draw_arms(axes: Axes, places: Sequence[Arm], found: Mapping[Arm, Interval], scale: float) -> None:
    """One measure of every arm at its place, the first on top."""
    for arm, value in found.items():
        place, style = places.index(arm), ARM_STYLES[arm]
        axes.errorbar(
            [scale * value.value],
            [place],
            xerr=scale * error_bars([value]),
            color=style.colour,
            marker=style.marker,
            linestyle="none",
        )
        if arm == "base":
            axes.axvline(scale * value.value, color=style.colour, linewidth=0.8, linestyle="--", zorder=0)
    axes.set_ylim(len(places) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)


def message(evaluations: Sequence[Evaluation]) -> str:
    """The generated arm minus retrieval, in points."""
    parts = [
        f"{GROUPS[group]} {format_estimate(compare(one, tasks, 'nearest_adapter').accuracy, 1, 100)}"
        for one in evaluations
        for group, tasks in groups(one).items()
        if {"generated", "nearest_adapter"} <= set(arms(one, tasks))
    ]
    if not parts:
        return "Accuracy and gold NLL by arm"
    return f"Accuracy of generated adapters minus retrieval, in points: {'; '.join(parts)}"


if __name__ == "__main__":
    run_step(FigureStep, main)
