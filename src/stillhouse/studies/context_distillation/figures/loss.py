"""Step program: `loss.png`, the training cross entropy of every distilled student against the baseline's.

Reads the metrics files that training wrote; the distillation term is left out, so that conditions compare.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes

from stillhouse.config.base import StrictModel
from stillhouse.reporting.style import condition_style, draw_frame, draw_notice, figure, save_figure
from stillhouse.runtime.commands import run_step
from stillhouse.runtime.errors import UserError
from stillhouse.runtime.files import read_json, verify_manifest
from stillhouse.studies.context_distillation.comparisons import BASELINE

CROSS_ENTROPY = "ce"  # the term that the study's objective logs
COLUMNS = 4
SMOOTHED_SHARE = 0.05


class LossStep(StrictModel):
    """The step's command line: students' directories, each with `metrics.jsonl` and `run.json`."""

    students: tuple[Path, ...] = ()
    output: Path


@dataclass(frozen=True)
class Curves:
    """The cross entropy of one model's condition, in nats per answer token: a row a step, a column a seed."""

    model: str
    condition: str
    seeds: pd.DataFrame

    @property
    def window(self) -> int:
        """Logged steps in the moving average."""
        return max(3, round(SMOOTHED_SHARE * len(self.seeds)))

    @property
    def smoothed(self) -> pd.DataFrame:
        """Each seed's centred moving average."""
        return self.seeds.rolling(self.window, center=True, min_periods=1).mean()


def main(step: LossStep) -> None:
    """Draw one panel a model and distilled condition, each with the baseline of that model."""
    curves = read_curves(step.students)
    baselines = {one.model: one for one in curves if one.condition == BASELINE}
    panels = [one for one in curves if one.condition != BASELINE] or curves
    if not panels:
        draw_notice(step.output, "No student was trained: the configuration names base conditions only.")
        return
    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    with figure(max(6.0, 2.7 * columns + 0.5), 1.1 + 2.0 * rows) as drawing:
        grid = drawing.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
        for axes, panel in zip(grid, panels, strict=False):
            if panel.model in baselines:
                draw_curves(axes, baselines[panel.model], line="--")
            draw_curves(axes, panel)
            several = len({one.model for one in curves}) > 1
            axes.set_title(f"{panel.model}\n{panel.condition}" if several else panel.condition, fontsize=9)
            axes.tick_params(labelbottom=True)
        for axes in grid[len(panels) :]:
            axes.set_axis_off()
        for axes in grid[::columns]:
            axes.set_ylabel("Cross entropy\n(nats per answer token)")
        for axes in grid[-columns:]:
            axes.set_xlabel("Training step (updates)")
        note = (
            f"Solid: the panel's condition; dashed: {BASELINE}. Light: as logged; dark: centred moving average over "
            f"{panels[0].window} logged steps. {seed_note(curves)}"
        )
        draw_frame(drawing, title(panels, baselines), note)
        save_figure(drawing, step.output)


def read_curves(students: tuple[Path, ...]) -> list[Curves]:
    """The students' curves by model and condition, in the order given; a damaged file is a `UserError`."""
    found: dict[tuple[str, str], dict[int, pd.Series]] = {}
    for student in students:
        verify_manifest(student, "*.json*")
        settings = read_json(student / "run.json")["settings"]
        key = (Path(settings["model"]).name, settings["condition"])
        found.setdefault(key, {})[settings["seed"]] = read_cross_entropy(student / "metrics.jsonl")
    return [Curves(model, condition, pd.DataFrame(seeds)) for (model, condition), seeds in found.items()]


def read_cross_entropy(path: Path) -> pd.Series:
    """The logged cross entropy by step."""
    try:
        metrics = pd.read_json(path, lines=True).set_index("step")
        return metrics[CROSS_ENTROPY].astype(float)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: has no column '{CROSS_ENTROPY}' by step ({error}): train again") from None


def draw_curves(axes: Axes, curves: Curves, line: str = "-") -> None:
    """Raw values lightly, the seeds' mean moving average darkly, and their range as a band."""
    style, smoothed = condition_style(curves.condition), curves.smoothed
    axes.plot(curves.seeds.index, curves.seeds.mean(axis=1), color=style.colour, linewidth=0.6, alpha=0.35)
    axes.plot(smoothed.index, smoothed.mean(axis=1), color=style.colour, linestyle=line)
    if smoothed.shape[1] > 1:
        axes.fill_between(
            smoothed.index, smoothed.min(axis=1), smoothed.max(axis=1), color=style.colour, alpha=0.2, linewidth=0
        )


def seed_note(curves: list[Curves]) -> str:
    """How many seeds a line stands for."""
    counts = sorted({one.seeds.shape[1] for one in curves})
    return "One seed." if counts == [1] else f"Mean of {'/'.join(map(str, counts))} seeds, band: their range."


def title(panels: list[Curves], baselines: dict[str, Curves]) -> str:
    """Whether distillation costs cross entropy at the end of training."""
    ends = [
        float(one.smoothed.iloc[-1].mean() - baselines[one.model].smoothed.iloc[-1].mean())
        for one in panels
        if one.model in baselines and one.condition != BASELINE
    ]
    if not ends:
        return "Training cross entropy by step"
    return (
        f"At the end of training, cross entropy of the distilled students is "
        f"{min(ends):+.3f} to {max(ends):+.3f} nats per token from the {BASELINE}'s"
    )


if __name__ == "__main__":
    run_step(LossStep, main)
