"""Step program: `f1_vs_bytes.png`, F1 against the bytes that are sent for a prompt, latents and texts on the same axes.

The text that a standard compressor fits into the same bytes is the bar: a latent below its curve is worth less than
its bytes of text.
"""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from stillhouse.reporting.steps import FigureStep
from stillhouse.reporting.style import ConditionStyle, draw_frame, error_bars, figure, save_figure
from stillhouse.runtime.commands import run_step
from stillhouse.studies.latentwire.comparisons import (
    ARM_NAMES,
    F1,
    Entry,
    entries,
    estimate,
    load_evaluations,
    same_bytes,
    sample_note,
)
from stillhouse.studies.latentwire.config import Arm
from stillhouse.studies.latentwire.figures import ARM_STYLES, channel_styles
from stillhouse.studies.latentwire.results import Evaluation

BYTE_BUDGET: tuple[Arm, ...] = ("byte_budget_compressed", "byte_budget_cut")
BOUNDS: tuple[Arm, ...] = ("full_text", "no_context")


def main(step: FigureStep) -> None:
    """Draw one row of panels a pair, one panel a reader."""
    evaluations = load_evaluations(step.results)
    columns = max(len(one.results.readers) for one in evaluations)
    with figure(4.6 * columns + 2.4, 1.3 + 3.3 * len(evaluations)) as drawing:
        grid = drawing.subplots(len(evaluations), columns, squeeze=False, sharex=True, sharey=True)
        for row, evaluation in zip(grid, evaluations, strict=True):
            for axes in row[len(evaluation.results.readers) :]:
                axes.set_axis_off()
            for axes, reader in zip(row, evaluation.results.reader_names, strict=False):
                draw_panel(axes, evaluation, reader)
                axes.set_title(reader if len(evaluations) == 1 else f"{evaluation.results.pair}: {reader}")
                axes.tick_params(labelbottom=True)
                axes.set_xlabel("Bytes sent per prompt (mean, logarithmic)")
            row[0].set_ylabel(F1.axis)
        handles = {
            label: handle for axes in grid.flat for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        drawing.legend(handles.values(), handles.keys(), loc="outside right center", fontsize=8)
        note = (
            f"Latents: each line is one channel, its points the formats {formats(evaluations)} by falling bytes; "
            "bytes of the real wire file, header included. Texts: UTF-8, cut, or the most that DEFLATE or LZMA fits "
            f"into the bytes. {sample_note(evaluations)}"
        )
        draw_frame(drawing, title(evaluations), note)
        save_figure(drawing, step.output)


def draw_panel(axes: Axes, evaluation: Evaluation, reader: str) -> None:
    """The text arms as curves, the bounds as lines, and one line a channel."""
    for arm in BYTE_BUDGET:
        draw_line(axes, evaluation, entries(evaluation, arm, reader), ARM_STYLES[arm], f"{ARM_NAMES[arm]} to the bytes")
    for arm in BOUNDS:
        for one in entries(evaluation, arm, reader):
            found = estimate(evaluation, one, F1)
            if found:
                style = ARM_STYLES[arm]
                axes.axhline(100 * found.value, color=style.colour, linestyle=":", linewidth=1)
                draw_line(axes, evaluation, [one], style, ARM_NAMES[arm])
    latents = entries(evaluation, "latent", reader)
    shapes = {one.condition: f"M = {one.length}, d = {one.dimension}" for one in evaluation.results.channels}
    for condition, style in channel_styles(list(shapes)).items():
        own = [one for one in latents if one.first.condition == condition]
        draw_line(axes, evaluation, own, style, f"{condition}\n({shapes[condition]})")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(LogLocator(base=2))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(bottom=-2)


def draw_line(axes: Axes, evaluation: Evaluation, drawn: Sequence[Entry], style: ConditionStyle, label: str) -> None:
    """F1 with its interval over the mean bytes; entries that came to the same bytes stand once."""
    points = {}
    for one in drawn:
        found = estimate(evaluation, one, F1)
        if found and one.bytes:
            points[one.bytes] = found
    if not points:
        return
    sizes = sorted(points)
    values = [points[size] for size in sizes]
    axes.errorbar(
        sizes,
        [100 * value.value for value in values],
        yerr=100 * error_bars(values),
        color=style.colour,
        marker=style.marker,
        label=label,
        elinewidth=0.8,
    )


def formats(evaluations: Sequence[Evaluation]) -> str:
    """The wire formats that were measured, largest first."""
    found: dict[str, float] = {
        m.wire: m.bytes or 0 for one in evaluations for m in one.results.measurements if m.wire and m.bytes
    }
    return ", ".join(sorted(found, key=lambda wire: -found[wire]))


def title(evaluations: Sequence[Evaluation]) -> str:
    """Whether the latent beats the text of the same bytes, for each reader."""
    found = [
        (reader, comparison)
        for one in evaluations
        for reader in one.results.reader_names
        if (comparison := same_bytes(one, reader))
    ]
    if not found:
        return "F1 by the bytes that are sent"
    verdicts = {"higher": "beats", "lower": "is worse than", "undecided": "is not told apart from"}
    said = {verdicts[comparison.verdict] for _, comparison in found}
    differences = ", ".join(f"{reader} {100 * one.difference:+.1f}" for reader, one in found)
    if len(said) == 1:
        return f"A latent {said.pop()} the text compressed into the same bytes (F1 points: {differences})"
    parts = [
        f"{verdicts[one.verdict]} it for {reader} ({100 * one.difference:+.1f} F1 points)" for reader, one in found
    ]
    return f"Against the text compressed into the same bytes, a latent {'; '.join(parts)}"


if __name__ == "__main__":
    run_step(FigureStep, main)
