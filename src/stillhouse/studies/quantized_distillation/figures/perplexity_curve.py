"""Step program: `perplexity_curve.png`, perplexity and KL to the teacher on held-out data while students learn."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes

from stillhouse.reporting.style import BLACK, GREY, condition_style, draw_frame, draw_notice, figure, save_figure
from stillhouse.runtime.commands import run_step
from stillhouse.studies.quantized_distillation.comparisons import shown
from stillhouse.studies.quantized_distillation.curves import Curve, read_curve
from stillhouse.studies.quantized_distillation.figures import CurveStep

MEASURES = {
    "perplexity": "Perplexity of the followed text",
    "validation_kl": "KL from the teacher on validation\n(nats per token)",
    "validation_agreement": "Top-1 agreement on validation",
}
FIRST_CONDITIONS = 8


def main(step: CurveStep) -> None:
    """Draw one row of panels a model, one panel a measure, one line a student; step 0 is ptq."""
    curves = [read_curve(path) for path in step.students]
    if not curves:
        draw_notice(step.output, "No student is trained: there is no curve to draw.")
        return
    models = list(dict.fromkeys(one.model for one in curves))
    drawn = shown(list(dict.fromkeys(one.condition for one in curves)))[:FIRST_CONDITIONS]
    with figure(11, 1.4 + 2.7 * len(models)) as drawing:
        grid = drawing.subplots(len(models), len(MEASURES), squeeze=False, sharex="row")
        for row, model in zip(grid, models, strict=True):
            own = [one for one in curves if one.model == model and one.condition in drawn]
            for axes, (measure, label) in zip(row, MEASURES.items(), strict=True):
                draw_measure(axes, own, measure)
                axes.set_ylabel(label)
                axes.set_xlabel("Training step (updates)")
            row[0].set_title(model, loc="left", fontweight="bold")
        drawing.legend(*grid[0][0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
        draw_frame(drawing, title(curves), note(curves, drawn))
        save_figure(drawing, step.output)


def draw_measure(axes: Axes, curves: Sequence[Curve], measure: str) -> None:
    """One measure over the steps; a condition's seeds have one colour."""
    named: set[str] = set()
    for one in curves:
        style = condition_style(one.condition)
        steps = [point for point in one.points if measure in point.values]
        axes.plot(
            [point.step for point in steps],
            [point.values[measure] for point in steps],
            color=style.colour,
            marker=style.marker,
            label="_again" if one.condition in named else one.condition,
        )
        named.add(one.condition)
    if measure == "perplexity":
        axes.axhline(curves[0].points[0].values[measure], color=GREY, linestyle="--", linewidth=1, label="ptq")
        axes.axhline(curves[0].teacher_perplexity, color=BLACK, linestyle=":", linewidth=1, label="teacher")


def note(curves: Sequence[Curve], drawn: Sequence[str]) -> str:
    """Whose lines these are, and on how much data they stand."""
    hidden = len({one.condition for one in curves}) - len(drawn)
    several = len({one.seed for one in curves}) > 1
    more = f" {hidden} further conditions are left out." if hidden else ""
    return (
        "Fake-quantised students, as they are trained, before and at each saved checkpoint, on data that they do not "
        f"learn from. {'A line a seed.' if several else 'One seed.'}{more}"
    )


def title(curves: Sequence[Curve]) -> str:
    """How far perplexity fell from ptq's, and where the teacher's is."""
    start = curves[0].points[0].values["perplexity"]
    ends: dict[str, list[float]] = {}
    for one in curves:
        ends.setdefault(one.condition, []).append(one.points[-1].values["perplexity"])
    finals = ", ".join(f"{name} {sum(values) / len(values):.1f}" for name, values in list(ends.items())[:4])
    return f"Perplexity: ptq {start:.1f}, after training {finals}; the teacher {curves[0].teacher_perplexity:.1f}"


if __name__ == "__main__":
    run_step(CurveStep, main)
