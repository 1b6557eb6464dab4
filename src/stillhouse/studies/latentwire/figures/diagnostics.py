"""Step program: `diagnostics.png`, what Z and the prefixes look like while the channels learn.

Four questions: have the prefixes the size of embeddings, do they differ between texts, does the reader say the same
whatever it reads (collapse), and how many directions are used, by Z itself as well?
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes

from stillhouse.reporting.style import BLACK, GREY, ConditionStyle, draw_frame, draw_notice, figure, save_figure
from stillhouse.runtime.commands import run_step
from stillhouse.runtime.files import read_json, verify_manifest
from stillhouse.studies.latentwire.curves import DIAGNOSTICS_FILE, DiagnosticsRow, ReaderDiagnostics, read_diagnostics
from stillhouse.studies.latentwire.figures import CurvesStep, channel_styles

CURVES: dict[str, Callable[[ReaderDiagnostics], float]] = {
    "RMS of the prefix over that of\nthe texts' embeddings": lambda one: one.prefix_rms / one.embedding_rms,
    "Prefix variance between texts\n(% of the whole)": lambda one: 100 * one.between_share,
    "Most frequent first token\n(% of the texts)": lambda one: 100 * one.first_token_share,
}


@dataclass(frozen=True)
class ChannelLooks:
    """One channel's diagnostics by step."""

    condition: str
    seed: int
    rows: list[DiagnosticsRow]


def main(step: CurvesStep) -> None:
    """Draw one row of panels a reader: three curves over training, and the spectra at its end."""
    looks = [one for path in step.channels if (one := read_looks(path)).rows]
    if not looks:
        draw_notice(step.output, "No look was taken: diagnostics_every is above the number of training steps.")
        return
    readers = list(dict.fromkeys(reader for one in looks for reader in one.rows[0].readers))
    styles = channel_styles([one.condition for one in looks])
    with figure(13, 1.4 + 2.5 * len(readers)) as drawing:
        grid = drawing.subplots(len(readers), len(CURVES) + 1, squeeze=False, sharey="col")
        for row, reader in zip(grid, readers, strict=True):
            own = [one for one in looks if reader in one.rows[0].readers]
            for axes, (label, value) in zip(row, CURVES.items(), strict=False):
                draw_curves(axes, own, reader, value, styles)
                axes.set_ylabel(label)
                axes.set_title(reader, fontsize=9)
            row[0].axhline(1, color=GREY, linestyle=":")
            draw_spectrum(row[-1], own, reader, styles)
            row[-1].set_title(reader, fontsize=9)
        for axes in grid[-1][:-1]:
            axes.set_xlabel("Training step (updates)")
            # Once every reader is drawn: the panels of a column share the axis.
            axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
        grid[-1][-1].set_xlabel("Principal components")
        handles, labels = grid[0][-1].get_legend_handles_labels()
        drawing.legend(handles, labels, loc="outside right center", fontsize=8)
        last = looks[0].rows[-1]
        note = (
            f"Over the same {last.texts} texts at each look. Components: cumulative share of variance at the last "
            f"look; black: the embeddings of the texts' own tokens; dashed: Z, the same for every reader. Z of "
            f"{looks[0].condition} at the end: mean {last.latent_mean:+.2f}, standard deviation {last.latent_std:.2f}, "
            f"largest magnitude {last.latent_abs_max:.1f}, {100 * last.latent_between_share:.0f} % of the variance "
            "between texts."
        )
        draw_frame(drawing, title(looks), note)
        save_figure(drawing, step.output)


def read_looks(directory: Path) -> ChannelLooks:
    """The diagnostics that a channel's training left."""
    verify_manifest(directory, "*.json*")
    settings = read_json(directory / "run.json")["settings"]
    return ChannelLooks(settings["condition"], settings["seed"], read_diagnostics(directory / DIAGNOSTICS_FILE))


def draw_curves(
    axes: Axes,
    looks: Sequence[ChannelLooks],
    reader: str,
    value: Callable[[ReaderDiagnostics], float],
    styles: dict[str, ConditionStyle],
) -> None:
    """One measure of one reader over the steps, a line a channel."""
    for one in looks:
        style = styles[one.condition]
        steps = [row.step for row in one.rows]
        axes.plot(steps, [value(row.readers[reader]) for row in one.rows], color=style.colour, marker=style.marker)


def draw_spectrum(axes: Axes, looks: Sequence[ChannelLooks], reader: str, styles: dict[str, ConditionStyle]) -> None:
    """The cumulative variance of prefixes, of Z and of embeddings, by number of components."""
    for place, one in enumerate(looks):
        row, style = one.rows[-1], styles[one.condition]
        last = row.readers[reader]
        if place == 0:
            draw_shares(axes, last.embedding_explained, ConditionStyle(BLACK, "s"), "the texts' embeddings")
        # A legend leaves out what begins with an underscore: one entry for all seeds of a channel.
        unlisted = "" if one.seed == looks[0].seed else "_"
        draw_shares(axes, last.prefix_explained, style, unlisted + one.condition)
        draw_shares(
            axes, row.latent_explained, ConditionStyle(style.colour, ""), f"{unlisted}Z of {one.condition}", "--"
        )
    axes.set_ylabel("Variance explained (%)")
    axes.set_ylim(0, 104)


def draw_shares(axes: Axes, shares: Sequence[float], style: ConditionStyle, label: str, line: str = "-") -> None:
    """One spectrum."""
    heights = [100 * share for share in shares]
    axes.plot(range(1, len(shares) + 1), heights, line, color=style.colour, marker=style.marker, label=label)


def title(looks: Sequence[ChannelLooks]) -> str:
    """Whether any channel collapsed: the readers say the same whatever they read."""
    shares = [one.first_token_share for look in looks for one in look.rows[-1].readers.values()]
    between = [one.between_share for look in looks for one in look.rows[-1].readers.values()]
    return (
        f"At the end of training, {percent_range(between)} of the prefixes' variance lies between texts; "
        f"the commonest first token begins {percent_range(shares)} of the answers"
    )


def percent_range(shares: Sequence[float]) -> str:
    """The smallest and the largest share, in per cent."""
    low, high = (f"{100 * share:.0f}" for share in (min(shares), max(shares)))
    return f"{low} %" if low == high else f"{low} to {high} %"


if __name__ == "__main__":
    run_step(CurvesStep, main)
