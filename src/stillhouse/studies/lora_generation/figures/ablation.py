"""Step program: `ablation.png`, generators by what their loss weighs: accuracy, NLL and nearness to the teacher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean

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
from stillhouse.studies.lora_generation.config import Arm
from stillhouse.studies.lora_generation.figures import draw_values, named_styles
from stillhouse.studies.lora_generation.results import Evaluation

Score = Callable[[Evaluation, Sequence[str], Arm, str], Interval]
SCORES: dict[str, tuple[float, Score]] = {"Accuracy (%)": (100, accuracy), "Gold NLL (nats/token)": (1, gold_nll)}
NEARNESS = {"Cosine to the teacher's delta": "cosine", "Relative error of ΔW": "relative_error"}


def main(step: FigureStep) -> None:
    """Draw a row per model and group of tasks, a panel per measure, one line a condition."""
    evaluations = [one for one in load_evaluations(step.results) if "generated" in arms(one, names(one))]
    if not evaluations:
        draw_notice(step.output, "The generated arm was not run.")
        return
    rows = [(one, group, name) for one in evaluations for group, name in GROUPS.items() if members(one, group)]
    longest = max(len(one.results.generators) for one in evaluations)
    with figure(11.5, 1.5 + len(rows) * (0.7 + 0.28 * longest)) as drawing:
        grid = drawing.subplots(len(rows), len(SCORES) + len(NEARNESS), squeeze=False, sharey="row", sharex="col")
        for line, (one, group, name) in zip(grid, rows, strict=True):
            draw_generators(line, one, members(one, group))
            line[0].set_title(f"{one.results.model}, {name}", loc="left", fontsize=9, fontweight="bold")
        note = (
            f"λ_w weighs the distance of weights, λ_d that of delta activations. {sample_note(evaluations)} Right: a "
            "pale point is one held-out adapter and seed, a dark one their mean."
        )
        draw_frame(drawing, message(evaluations), note)
        save_figure(drawing, step.output)


def members(one: Evaluation, group: str) -> dict[str, list[str]]:
    """The tasks of a group by condition; conditions may hold out different tasks."""
    found = {facts.condition: groups(one, facts.condition).get(group, []) for facts in one.results.generators}
    return {name: tasks for name, tasks in found.items() if tasks}


def draw_generators(line: Sequence[Axes], one: Evaluation, tasks: dict[str, list[str]]) -> None:
    """Every measure of every condition, the first on top."""
    styles = named_styles([facts.condition for facts in one.results.generators])
    labels = []
    for place, (condition, own) in enumerate(tasks.items()):
        facts, style = one.results.generator(condition), styles[condition]
        labels.append(f"{condition} (λ_w {facts.weight:g}, λ_d {facts.delta:g})")
        for axes, (scale, score) in zip(line[: len(SCORES)], SCORES.values(), strict=True):
            value = score(one, own, "generated", condition)
            axes.errorbar(
                [scale * value.value],
                [place],
                xerr=scale * error_bars([value]),
                color=style.colour,
                marker=style.marker,
                linestyle="none",
            )
        for axes, name in zip(line[len(SCORES) :], NEARNESS.values(), strict=True):
            draw_values(axes, place, closeness(one, own, "generated", name, condition), style)
    for axes, measure in zip(line, [*SCORES, *NEARNESS], strict=True):
        axes.set_xlabel(measure)
        axes.set_yticks(range(len(labels)), labels)
        axes.set_ylim(len(labels) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)


def message(evaluations: Sequence[Evaluation]) -> str:
    """The cosines of the generators with and without delta activations in their loss."""
    parts: dict[str, list[str]] = {}
    for one in evaluations:
        for group, name in GROUPS.items():
            for condition, tasks in members(one, group).items():
                if cosines := closeness(one, tasks, "generated", "cosine", condition):
                    parts.setdefault(name, []).append(f"{condition} {fmean(cosines):.2f}")
    listed = "; ".join(f"{name}: {', '.join(own)}" for name, own in parts.items())
    return f"Cosine of generated adapters to the teacher's delta activation, {listed}"


if __name__ == "__main__":
    run_step(FigureStep, main)
