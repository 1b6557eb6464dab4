"""Step program: `cosine.png`, how near each arm's adapter comes to the case's teacher, by behaviour and by weights."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from matplotlib.axes import Axes

from stillhouse.reporting.steps import FigureStep
from stillhouse.reporting.style import draw_frame, draw_notice, figure, save_figure
from stillhouse.runtime.commands import run_step
from stillhouse.studies.lora_generation.comparisons import (
    GROUPS,
    LABELS,
    cases_of_a_task,
    closeness,
    groups,
    load_evaluations,
    weak_teachers,
)
from stillhouse.studies.lora_generation.config import Arm
from stillhouse.studies.lora_generation.figures import ARM_STYLES, draw_values
from stillhouse.studies.lora_generation.results import Evaluation

PANELS = {
    "cosine": ("Cosine to the teacher's delta", 1.0),
    "norm_ratio": ("Norm over the teacher's", 1.0),
    "relative_error": ("Relative error of ΔW", 0.0),
}


def main(step: FigureStep) -> None:
    """Draw a row per model and group, a panel per measure."""
    evaluations = load_evaluations(step.results)
    rows = [(one, group, tasks) for one in evaluations for group, tasks in groups(one).items()]
    drawn = [arm for arm in ARM_STYLES if any(closeness(one, tasks, arm, "cosine") for one, _, tasks in rows)]
    drawn = [arm for arm in drawn if arm != "teacher"]
    if not drawn:
        draw_notice(step.output, "No arm has an adapter beside the teacher's.")
        return
    with figure(10, 1.5 + len(rows) * (0.7 + 0.27 * len(drawn))) as drawing:
        grid = drawing.subplots(len(rows), len(PANELS), squeeze=False, sharey="row", sharex="col")
        for line, (one, group, tasks) in zip(grid, rows, strict=True):
            for axes, (name, (label, ideal)) in zip(line, PANELS.items(), strict=True):
                axes.axvline(ideal, color="#000000", linewidth=0.8, linestyle="--", zorder=0)
                draw_arms(axes, one, tasks, drawn, name)
                axes.set_xlabel(label)
            line[0].set_title(f"{one.results.model}, {GROUPS[group]}", loc="left", fontsize=9, fontweight="bold")
        cases = sum(sum(cases_of_a_task(one).values()) for one in evaluations)
        weak = sum(len(weak_teachers(one, tasks)) for one, _, tasks in rows)
        note = (
            f"A pale point: one held-out adapter ({cases} in all) and seed; a dark one: their mean. Dashed: the "
            "teacher itself. An adapter with no effect has norm ratio 0 and error 1."
            + (f" {weak} of the teachers are no better than the base." if weak else "")
        )
        draw_frame(drawing, message(evaluations), note)
        save_figure(drawing, step.output)


def draw_arms(axes: Axes, one: Evaluation, tasks: Sequence[str], drawn: Sequence[Arm], name: str) -> None:
    """One measure of every arm that has an adapter of its own."""
    for place, arm in enumerate(drawn):
        draw_values(axes, place, closeness(one, tasks, arm, name), ARM_STYLES[arm])
    axes.set_yticks(range(len(drawn)), [LABELS[arm] for arm in drawn])
    axes.set_ylim(len(drawn) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)


def message(evaluations: Sequence[Evaluation]) -> str:
    """Generated beside retrieved adapters."""
    parts = []
    for one in evaluations:
        for group, tasks in groups(one).items():
            pair = [closeness(one, tasks, arm, "cosine") for arm in ("generated", "nearest_adapter")]
            if pair[0] and pair[1]:
                own, other = (f"{fmean(values):.2f}" for values in pair)
                parts.append(f"{GROUPS[group]} {own} against {other}")
    if not parts:
        return "Nearness of adapters to the teacher of their case"
    return f"Cosine to the teacher's delta, generated against retrieved: {'; '.join(parts)}"


if __name__ == "__main__":
    run_step(FigureStep, main)
