"""Step program: `delta_map.png`, the teacher adapters by delta activation and by weights, coloured by task."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from stillhouse.reporting.steps import FigureStep
from stillhouse.reporting.style import draw_frame, figure, save_figure
from stillhouse.reporting.tables import format_estimate
from stillhouse.runtime.commands import run_step
from stillhouse.studies.lora_generation.comparisons import load_evaluations
from stillhouse.studies.lora_generation.figures import named_styles
from stillhouse.studies.lora_generation.results import Evaluation

MAPS = {"by_delta": "Delta activations", "by_weights": "Flattened weights (A and B)"}


def main(step: FigureStep) -> None:
    """Draw two maps a model: one point an adapter."""
    evaluations = load_evaluations(step.results)
    with figure(9.5, 1.5 + 3.2 * len(evaluations)) as drawing:
        grid = drawing.subplots(len(evaluations), len(MAPS), squeeze=False)
        for row, one in zip(grid, evaluations, strict=True):
            for axes, name in zip(row, MAPS, strict=True):
                draw_map(axes, one, name)
        drawing.legend(*grid[0][0].get_legend_handles_labels(), loc="outside right center")
        first = evaluations[0].results
        note = (
            f"n = {'/'.join(str(len(one.results.points)) for one in evaluations)} teacher adapters. Two principal "
            f"components each, axes in their own units. Silhouette: mean over adapters by task, cosine distance, in "
            f"all dimensions, with its 95 % interval. Probes: {first.probe_texts} {first.probes} texts."
        )
        draw_frame(drawing, message(evaluations), note)
        save_figure(drawing, step.output)


def draw_map(axes: Axes, one: Evaluation, name: str) -> None:
    """One map."""
    for task, style in named_styles([task.task for task in one.results.tasks]).items():
        places = [getattr(point, name) for point in one.results.points if point.task == task]
        across, up = zip(*places, strict=True)
        axes.scatter(across, up, color=style.colour, marker=style.marker, s=34, label=task)
    silhouette = getattr(one.results.clusters, name)
    axes.set_title(f"{one.results.model}: {MAPS[name]}\nsilhouette {format_estimate(silhouette, 2)}", fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel("Component 1")
    axes.set_ylabel("Component 2")


def message(evaluations: Sequence[Evaluation]) -> str:
    """Which of the two tells tasks apart better."""
    parts = []
    for one in evaluations:
        clusters = one.results.clusters
        parts.append(f"{clusters.by_delta.value:.2f} by delta activation, {clusters.by_weights.value:.2f} by weights")
    return f"Silhouette of the teacher adapters by task: {'; '.join(parts)}"


if __name__ == "__main__":
    run_step(FigureStep, main)
