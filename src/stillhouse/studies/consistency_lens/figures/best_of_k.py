"""Step program: `best_of_k.png`, the best of K sampled explanations against the greedy one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from matplotlib.axes import Axes

from stillhouse.evaluation.statistics import Estimate
from stillhouse.reporting.steps import FigureStep
from stillhouse.reporting.style import condition_style, draw_frame, draw_notice, figure, save_figure
from stillhouse.runtime.commands import run_step
from stillhouse.studies.consistency_lens.comparisons import (
    Subject,
    kl,
    load_evaluations,
    sample_note,
    subjects,
    variance_explained,
)
from stillhouse.studies.consistency_lens.results import BEST_OF, LENS

MEASURES: dict[str, Callable[[Subject, str], Estimate]] = {
    "KL to the original's prediction (nats)": kl,
    "Variance of the activation explained": variance_explained,
}


def main(step: FigureStep) -> None:
    """Draw one panel a measure, one line a condition."""
    chosen = [subject for subject in subjects(load_evaluations(step.results)) if subject.sample_counts]
    if not chosen:
        draw_notice(step.output, "No explanations were sampled: evaluation.best_of is empty.")
        return
    with figure(9.5, 4) as drawing:
        panels = drawing.subplots(1, len(MEASURES), squeeze=False)[0]
        for axes, (label, measure) in zip(panels, MEASURES.items(), strict=True):
            for subject in chosen:
                draw_counts(axes, subject, measure)
            axes.set_ylabel(label)
            axes.set_xlabel("K: explanations sampled for each activation")
        panels[0].legend(fontsize=8)
        note = (
            f"{sample_note(chosen)} Of K samples the one with the smallest squared error is kept; it was not chosen by "
            "KL. Dashed: the greedy explanation."
        )
        draw_frame(drawing, message(chosen), note)
        save_figure(drawing, step.output)


def draw_counts(axes: Axes, subject: Subject, measure: Callable[[Subject, str], Estimate]) -> None:
    """A measure over K with its interval, and the greedy explanation's as a dashed line."""
    style, counts = condition_style(subject.condition), subject.sample_counts
    values = [measure(subject, f"{BEST_OF}{count}") for count in counts]
    name = f"{subject.evaluation.results.model}, {subject.condition}"
    axes.plot(counts, [one.value for one in values], color=style.colour, marker=style.marker, label=f"{name}, sampled")
    axes.fill_between(
        counts, [one.low for one in values], [one.high for one in values], color=style.colour, alpha=0.15, linewidth=0
    )
    greedy = measure(subject, LENS).value
    axes.axhline(greedy, color=style.colour, linestyle="--", linewidth=1.2, label=f"{name}, greedy")
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()


def message(chosen: Sequence[Subject]) -> str:
    """What the most samples bring."""
    parts = []
    for subject in chosen:
        counts = subject.sample_counts
        first, last = (kl(subject, f"{BEST_OF}{count}").value for count in (counts[0], counts[-1]))
        name = f"{subject.condition}: " if len(chosen) > 1 else ""
        parts.append(
            f"{name}{first:.2f} nats with {counts[0]}, {last:.2f} with the best of {counts[-1]}, "
            f"{kl(subject).value:.2f} greedy"
        )
    return f"KL by the number of sampled explanations: {'; '.join(parts)}"


if __name__ == "__main__":
    run_step(FigureStep, main)
