"""Step program: `training.png`, the loss and its terms while generators learn, and on validation shards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
from matplotlib.axes import Axes

from stillhouse.reporting.curves import Curves, named, read_curves
from stillhouse.reporting.style import ConditionStyle, draw_frame, figure, save_figure
from stillhouse.runtime.commands import run_step
from stillhouse.studies.lora_generation.figures import CurvesStep, named_styles

TERMS = {
    "loss": "Loss (weighted sum)",
    "delta_w": "Distance of ΔW",
    "matrices": "Distance of A and B",
    "delta": "Distance of delta activations",
}


def main(step: CurvesStep) -> None:
    """Draw one panel a term, one line a condition; rings are on validation."""
    curves = read_curves(step.generators)
    terms = {term: title for term, title in TERMS.items() if any(mean(one, term) is not None for one in curves)}
    with figure(3.1 * len(terms) + 1.5, 3.8) as drawing:
        grid = drawing.subplots(1, len(terms), squeeze=False)[0]
        styles = named_styles([named(one, curves) for one in curves])
        for axes, (term, title) in zip(grid, terms.items(), strict=True):
            for one in curves:
                draw_term(axes, one, term, named(one, curves), styles)
            axes.set_title(title, fontsize=9)
            axes.set_xlabel("Training step (updates)")
            axes.set_ylim(bottom=0)
        drawing.legend(*grid[0].get_legend_handles_labels(), loc="outside right center", fontsize=9)
        seeds = max(len(one.seeds) for one in curves)
        note = (
            "Lines: training adapters; rings: validation shards, where there are any. Distances are relative: 1 is a "
            f"generator that gives no adapter at all. Mean over {seeds} seed{'s' * (seeds > 1)}. In training, delta "
            "activations are computed only where the loss weighs them."
        )
        draw_frame(drawing, message(curves), note)
        save_figure(drawing, step.output)


def draw_term(axes: Axes, curves: Curves, term: str, name: str, styles: Mapping[str, ConditionStyle]) -> None:
    """One condition's term in training and on validation."""
    trained, validated = mean(curves, term), mean(curves, f"validation/{term}")
    if trained is not None:
        axes.plot(trained.index, trained, color=styles[name].colour, label=name)
    if validated is not None:
        axes.plot(
            validated.index, validated, color=styles[name].colour, marker="o", markerfacecolor="none", linestyle="none"
        )


def mean(curves: Curves, column: str) -> pd.Series | None:
    """The mean of a column over seeds, by step; None where it was not logged."""
    return curves.column(column).mean(axis=1) if column in curves.columns() else None


def message(curves: Sequence[Curves]) -> str:
    """How far each condition's own loss falls."""
    parts = []
    for one in curves:
        if (loss := mean(one, "loss")) is not None:
            parts.append(f"{named(one, curves)} {loss.iloc[0]:.2g} to {loss.iloc[-1]:.2g}")
    return f"Loss of the generators from the first to the last update: {'; '.join(parts)}"


if __name__ == "__main__":
    run_step(CurvesStep, main)
