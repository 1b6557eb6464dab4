"""Step program: `ablation.png`, generators by what their loss weighs: accuracy, NLL and nearness to the teacher."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from matplotlib.axes import Axes

from stillhouse.reporting.steps import FigureStep
from stillhouse.reporting.style import Interval, draw_frame, draw_notice, error_bars, figure, save_figure
from stillhouse.runtime.commands import run_step
from stillhouse.studies.lora_generation.comparisons import (
    GROUPS,
    accuracy,
    arms,
    closeness,
    gold_nll,
    groups,
    load_evaluations,
    names,
    sample_note,
)
from stillhouse.studies.lora_generation.figures import named_styles
from stillhouse.studies.lora_generation.results import Evaluation

Score = Callable[[Evaluation, Sequence[str], str], Interval | None]
MEASURES: dict[str, tuple[float, Score]] = {
    "Accuracy (%)": (100, lambda one, tasks, name: accuracy(one, tasks, "generated", name)),
    "Gold NLL (nats/token)": (1, lambda one, tasks, name: gold_nll(one, tasks, "generated", name)),
    "Cosine to the teacher's delta": (1, lambda one, tasks, name: closeness(one, tasks, "generated", "cosine", name)),
    "Relative error of ΔW": (1, lambda one, tasks, name: closeness(one, tasks, "generated", "relative_error", name)),
}


def main(step: FigureStep) -> None:
    """Draw a row per model and group of tasks, a panel per measure, one line a condition."""
    evaluations = [one for one in load_evaluations(step.results) if "generated" in arms(one, names(one))]
    if not evaluations:
        draw_notice(step.output, "The generated arm was not run.")
        return
    rows = [(one, group, name) for one in evaluations for group, name in GROUPS.items() if members(one, group)]
    longest = max(len(one.results.generators) for one in evaluations)
    with figure(11.5, 1.5 + len(rows) * (0.7 + 0.28 * longest)) as drawing:
        grid = drawing.subplots(len(rows), len(MEASURES), squeeze=False, sharey="row", sharex="col")
        for line, (one, group, name) in zip(grid, rows, strict=True):
            for axes, (measure, (scale, score)) in zip(line, MEASURES.items(), strict=True):
                draw_measure(axes, one, members(one, group), scale, score)
                axes.set_xlabel(measure)
            line[0].set_title(f"{one.results.model}, {name}", loc="left", fontsize=9, fontweight="bold")
        note = f"λ_w weighs the distance of weights, λ_d that of delta activations. {sample_note(evaluations)}"
        draw_frame(drawing, message(evaluations), note)
        save_figure(drawing, step.output)


def members(one: Evaluation, group: str) -> dict[str, list[str]]:
    """The tasks of a group by condition; conditions may hold out different tasks."""
    found = {facts.condition: groups(one, facts.condition).get(group, []) for facts in one.results.generators}
    return {name: tasks for name, tasks in found.items() if tasks}


def draw_measure(axes: Axes, one: Evaluation, tasks: dict[str, list[str]], scale: float, score: Score) -> None:
    """One measure of every condition, the first on top."""
    styles = named_styles([facts.condition for facts in one.results.generators])
    labels = []
    for place, (condition, own) in enumerate(tasks.items()):
        facts = one.results.generator(condition)
        labels.append(f"{condition} (λ_w {facts.weight:g}, λ_d {facts.delta:g})")
        if value := score(one, own, condition):
            axes.errorbar(
                [scale * value.value],
                [place],
                xerr=scale * error_bars([value]),
                color=styles[condition].colour,
                marker=styles[condition].marker,
                linestyle="none",
            )
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)


def message(evaluations: Sequence[Evaluation]) -> str:
    """The cosines of the generators with and without delta activations in their loss."""
    parts: dict[str, list[str]] = {}
    for one in evaluations:
        for group, name in GROUPS.items():
            for condition, tasks in members(one, group).items():
                if value := closeness(one, tasks, "generated", "cosine", condition):
                    parts.setdefault(name, []).append(f"{condition} {value.value:.2f}")
    listed = "; ".join(f"{name}: {', '.join(own)}" for name, own in parts.items())
    return f"Cosine of generated adapters to the teacher's delta activation, {listed}"


if __name__ == "__main__":
    run_step(FigureStep, main)
