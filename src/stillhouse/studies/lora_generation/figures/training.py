"""Step program: `training.png`, the loss and its terms while generators learn, and on validation shards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes

from stillhouse.reporting.style import ConditionStyle, draw_frame, figure, save_figure
from stillhouse.runtime.commands import run_step
from stillhouse.runtime.errors import UserError
from stillhouse.runtime.files import read_json
from stillhouse.studies.lora_generation.figures import CurvesStep, named_styles

TERMS = {
    "loss": "Loss (weighted sum)",
    "delta_w": "Distance of ΔW",
    "matrices": "Distance of A and B",
    "delta": "Distance of delta activations",
}


@dataclass(frozen=True)
class Curves:
    """What the generators of one condition logged: one table a seed, its rows by step."""

    name: str
    seeds: tuple[pd.DataFrame, ...]

    def mean(self, column: str) -> pd.Series | None:
        """The mean of a column over seeds, by step; None where it was not logged."""
        logged = [seed[column].dropna() for seed in self.seeds if column in seed]
        return pd.concat(logged, axis=1).mean(axis=1) if logged else None


def main(step: CurvesStep) -> None:
    """Draw one panel a term, one line a condition; rings are on validation."""
    curves = read_curves(step.generators)
    terms = {term: title for term, title in TERMS.items() if any(one.mean(term) is not None for one in curves)}
    with figure(3.1 * len(terms) + 1.5, 3.8) as drawing:
        grid = drawing.subplots(1, len(terms), squeeze=False)[0]
        styles = named_styles([one.name for one in curves])
        for axes, (term, title) in zip(grid, terms.items(), strict=True):
            for one in curves:
                draw_term(axes, one, term, styles[one.name])
            axes.set_title(title, fontsize=9)
            axes.set_xlabel("Training step (updates)")
            axes.set_yscale("log")
        drawing.legend(*grid[0].get_legend_handles_labels(), loc="outside right center", fontsize=9)
        seeds = max(len(one.seeds) for one in curves)
        note = (
            "Lines: training adapters; rings: validation shards, where there are any. Distances are relative: 1 is a "
            f"generator that gives no adapter at all. Mean over {seeds} seed{'s' * (seeds > 1)}. Terms of weight 0 are "
            "logged too."
        )
        draw_frame(drawing, message(curves), note)
        save_figure(drawing, step.output)


def draw_term(axes: Axes, curves: Curves, term: str, style: ConditionStyle) -> None:
    """One condition's term in training and on validation."""
    trained, validated = curves.mean(term), curves.mean(f"validation/{term}")
    if trained is not None:
        axes.plot(trained.index, trained, color=style.colour, label=curves.name)
    if validated is not None:
        axes.plot(validated.index, validated, color=style.colour, marker="o", markerfacecolor="none", linestyle="none")


def read_curves(generators: Sequence[Path]) -> list[Curves]:
    """The curves by model and condition, in the order given; a damaged file is a `UserError`."""
    found: dict[tuple[str, str], list[pd.DataFrame]] = {}
    for generator in generators:
        settings = read_json(generator / "run.json")["settings"]
        path = generator / "metrics.jsonl"
        try:
            rows = pd.read_json(path, lines=True).set_index("step")
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{path}: is no metrics file ({error}): train again") from None
        found.setdefault((settings["model_name"], settings["condition"]), []).append(rows)
    several = len({model for model, _ in found}) > 1
    return [
        Curves(f"{model}, {condition}" if several else condition, tuple(seeds))
        for (model, condition), seeds in found.items()
    ]


def message(curves: Sequence[Curves]) -> str:
    """How far each condition's own loss falls."""
    parts = []
    for one in curves:
        if (loss := one.mean("loss")) is not None:
            parts.append(f"{one.name} {loss.iloc[0]:.2g} to {loss.iloc[-1]:.2g}")
    return f"Loss of the generators from the first to the last update: {'; '.join(parts)}"


if __name__ == "__main__":
    run_step(CurvesStep, main)
