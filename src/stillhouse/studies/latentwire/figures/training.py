"""Step program: `training.png`, each reader's cross entropy and first-token accuracy while the channels learn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes

from stillhouse.reporting.curves import read_metrics
from stillhouse.reporting.style import ConditionStyle, draw_frame, figure, save_figure
from stillhouse.runtime.commands import run_step
from stillhouse.runtime.errors import UserError
from stillhouse.runtime.files import read_json, verify_manifest
from stillhouse.studies.latentwire.figures import CurvesStep, channel_styles

MEASURES = {
    "ce": ("Cross entropy of the answer\n(nats per token)", 1.0),
    "first_token": ("Cross entropy of the first token\n(nats)", 1.0),
    "first_token_accuracy": ("First token right\n(% of the batch)", 100.0),
}
SMOOTHED_SHARE = 0.1


@dataclass(frozen=True)
class ChannelCurves:
    """One channel's run: its pair's readers, its condition and seed, and the metrics by step."""

    readers: tuple[str, ...]
    condition: str
    seed: int
    metrics: pd.DataFrame


def main(step: CurvesStep) -> None:
    """Draw one row of panels a reader, one panel a measure, one line a channel."""
    curves = [read_channel(path) for path in step.channels]
    readers = list(dict.fromkeys(reader for one in curves for reader in one.readers))
    styles = channel_styles([one.condition for one in curves])
    with figure(11.5, 1.3 + 2.3 * len(readers)) as drawing:
        grid = drawing.subplots(len(readers), len(MEASURES), squeeze=False, sharex=True, sharey="col")
        for row, reader in zip(grid, readers, strict=True):
            for axes, (name, (label, scale)) in zip(row, MEASURES.items(), strict=True):
                draw_measure(axes, curves, f"{name}/{reader}", scale, styles)
                axes.set_ylabel(label)
                axes.set_title(reader, fontsize=9)
        for axes in grid[-1]:
            axes.set_xlabel("Training step (updates)")
        drawing.legend(*grid[0][0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
        several = len({one.seed for one in curves}) > 1
        note = (
            "On the training batches. Light: as logged; dark: centred moving average over "
            f"{window(curves[0].metrics)} logged steps. {'A line a seed.' if several else 'One seed.'}"
        )
        draw_frame(drawing, title(curves), note)
        save_figure(drawing, step.output)


def read_channel(directory: Path) -> ChannelCurves:
    """What a channel's training logged; `UserError` where a reader's curve is not in it."""
    verify_manifest(directory, "*.json*")
    settings = read_json(directory / "run.json")["settings"]
    metrics, readers = read_metrics(directory / "metrics.jsonl"), tuple(settings["names"])
    for column in (f"{name}/{reader}" for name in MEASURES for reader in readers):
        if column not in metrics:
            raise UserError(f"{directory / 'metrics.jsonl'}: has no column '{column}': train again")
    return ChannelCurves(readers, settings["condition"], settings["seed"], metrics)


def draw_measure(
    axes: Axes, curves: Sequence[ChannelCurves], column: str, scale: float, styles: dict[str, ConditionStyle]
) -> None:
    """One measure of one reader over the steps of every channel that has it."""
    named: set[str] = set()
    for one in (one for one in curves if column in one.metrics):
        values, colour = scale * one.metrics[column], styles[one.condition].colour
        axes.plot(values.index, values, color=colour, linewidth=0.6, alpha=0.35)
        smoothed = values.rolling(window(one.metrics), center=True, min_periods=1).mean()
        axes.plot(
            smoothed.index, smoothed, color=colour, label=one.condition if one.condition not in named else "_again"
        )
        named.add(one.condition)


def window(metrics: pd.DataFrame) -> int:
    """Logged steps in the moving average."""
    return max(3, round(SMOOTHED_SHARE * len(metrics)))


def title(curves: Sequence[ChannelCurves]) -> str:
    """How far cross entropy fell, over all channels and readers."""
    falls = []
    for one in curves:
        for reader in one.readers:
            values, part = one.metrics[f"ce/{reader}"], window(one.metrics)
            falls.append(float(values.iloc[-part:].mean() - values.iloc[:part].mean()))
    return (
        "From the first to the last steps, cross entropy on the training batches changed by "
        f"{min(falls):+.2f} to {max(falls):+.2f} nats per token"
    )


if __name__ == "__main__":
    run_step(CurvesStep, main)
