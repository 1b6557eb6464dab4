"""Step program: `losses.png`, every term of the loss over training, and the same without noise on validation."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import ScalarFormatter

from stillhouse.reporting.curves import Curves, named, read_curves
from stillhouse.reporting.style import condition_style, draw_frame, figure, save_figure
from stillhouse.runtime.commands import run_step
from stillhouse.studies.consistency_lens.figures import CurvesStep

TERMS = {
    "loss": "Loss (weighted sum)",
    "reconstruction_kl": "KL of the reconstruction (nats)",
    "resample_kl": "KL with resampled error (nats)",
    "language_model": "KL of the text to the LM (nats/token)",
    "entropy": "Decoder entropy (nats/token)",
    "mse": "MSE per dimension",
}
COLUMNS = 3
SMOOTHED_SHARE = 0.1


def main(step: CurvesStep) -> None:
    """Draw one panel a term, one line a condition."""
    curves = read_curves(step.lenses)
    rows = -(-len(TERMS) // COLUMNS)
    with figure(10, 1.5 + 2.1 * rows) as drawing:
        grid = drawing.subplots(rows, COLUMNS, squeeze=False, sharex=True).ravel()
        for axes, (term, title) in zip(grid, TERMS.items(), strict=True):
            for one in curves:
                draw_term(axes, one, term, named(one, curves))
            axes.set_title(title, fontsize=9)
            # The two errors of a reconstruction fall by orders of magnitude.
            if term == "mse":
                axes.set_yscale("log")
                axes.yaxis.set_major_formatter(ScalarFormatter())
                axes.yaxis.set_minor_formatter(ScalarFormatter())
            axes.tick_params(labelbottom=True)
        for axes in grid[-COLUMNS:]:
            axes.set_xlabel("Training step (updates)")
        if len(curves) > 1:
            handles, labels = grid[0].get_legend_handles_labels()
            drawing.legend(handles, labels, loc="outside right center", fontsize=9)
        note = (
            f"Light: as logged, with Gumbel noise; dark: centred moving average over {window(curves[0])} logged steps; "
            f"rings: on validation documents, without noise. {seed_note(curves)} Terms of weight 0 are logged too."
        )
        draw_frame(drawing, message(curves), note)
        save_figure(drawing, step.output)


def draw_term(axes: Axes, curves: Curves, term: str, label: str) -> None:
    """One condition's term: raw, smoothed, and on validation where that was logged."""
    style, logged = condition_style(curves.condition), curves.column(term)
    smoothed = logged.rolling(window(curves), center=True, min_periods=1).mean()
    axes.plot(logged.index, logged.mean(axis=1), color=style.colour, linewidth=0.6, alpha=0.35)
    axes.plot(smoothed.index, smoothed.mean(axis=1), color=style.colour, label=label)
    if smoothed.shape[1] > 1:
        low, high = smoothed.min(axis=1), smoothed.max(axis=1)
        axes.fill_between(smoothed.index, low, high, color=style.colour, alpha=0.2, linewidth=0)
    if f"validation/{term}" in curves.columns():
        validated = curves.column(f"validation/{term}").mean(axis=1)
        axes.plot(
            validated.index,
            validated,
            linestyle="none",
            marker="o",
            markersize=7,
            markerfacecolor="white",
            markeredgecolor=style.colour,
        )


def window(curves: Curves) -> int:
    """Logged steps in the moving average."""
    return max(3, round(SMOOTHED_SHARE * len(curves.seeds[0])))


def seed_note(curves: Sequence[Curves]) -> str:
    """How many seeds a line stands for."""
    counts = sorted({len(one.seeds) for one in curves})
    return "One seed." if counts == [1] else f"Mean of {'/'.join(map(str, counts))} seeds, band: their range."


def message(curves: Sequence[Curves]) -> str:
    """From where to where the behavioural loss went."""
    parts = []
    for one in curves:
        logged = one.column("reconstruction_kl").mean(axis=1)
        size = max(1, len(logged) // 10)
        first, last = logged.iloc[:size].mean(), logged.iloc[-size:].mean()
        name = f"{named(one, curves)} " if len(curves) > 1 else ""
        parts.append(f"{name}from {first:.2f} to {last:.2f} nats")
    return f"KL of the reconstruction over training: {'; '.join(parts)}"


if __name__ == "__main__":
    run_step(CurvesStep, main)
