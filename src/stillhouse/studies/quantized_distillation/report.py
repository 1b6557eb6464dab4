"""Step program: the study's tables, and its section of the results page: what rounding costs, and who gives it back.

Every sentence about an outcome is computed. Links are relative to `results/`, where the page lies.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from stillhouse.reporting.steps import ReportStep
from stillhouse.reporting.tables import Table, format_estimate, write_table
from stillhouse.runtime.commands import run_step
from stillhouse.runtime.files import atomic_write_text, staged_directory
from stillhouse.studies.quantized_distillation.comparisons import (
    Measure,
    average_accuracy,
    closed_share,
    compare,
    estimate,
    load_evaluations,
    recoverable,
    recovering,
    seed_count,
    text_measures,
)
from stillhouse.studies.quantized_distillation.results import PTQ, TEACHER, QuantizedEvaluation, SystemFacts
from stillhouse.studies.quantized_distillation.sweeps import sweeps
from stillhouse.studies.quantized_distillation.tables import (
    OFF_POLICY,
    ON_POLICY,
    all_tables,
    difference,
    perplexity,
)

FIGURES = {
    "recovered": "The share of the gap between ptq and the teacher that each condition closed",
    "perplexity_curve": "Perplexity and KL from the teacher while students learn",
    "accuracy": "Every system on every task",
}
HEADINGS = {
    "systems": "What was evaluated",
    "texts": "Perplexity, and the distance from the teacher",
    "tasks": "Accuracy",
    "recovered": "How much of the damage was closed",
    "paired": "Paired comparisons",
    "gaps": "From training to deployment",
}
QUESTION = (
    "A model's weights are rounded to four bits. Does training the rounded student on its own samples (on-policy) "
    "recover more of the full-precision model than training it on a fixed data set (off-policy)? The published answer "
    "is no, within about 0.3 points of accuracy. Teacher and student are one set of weights: rounding and adapter off, "
    "or on. `ptq` is rounding to nearest without any training, the baseline that training has to beat; GPTQ and AWQ "
    "round with calibration data, and were never reported by the published project."
)
# By the choice that repeats the published behaviour: what is said of students without it, and of those that have it.
PLACEMENT = (
    "train what is deployed: LoRA lies inside the rounded weights, Q(W + BA), in training too. The published training "
    "computed Q(W)x + BAx and its evaluation Q(W + BA)x.",
    "learn with LoRA beside the rounded weights, Q(W)x + BAx, and are deployed with it inside, Q(W + BA)x: another "
    "model than was trained.",
)
SELECTION = (
    "The checkpoint with the lowest KL to the teacher on validation is deployed; the published numbers are of the last "
    "one.",
    "**As published:** the last checkpoint is deployed, whatever validation says.",
)
CONVERTED = (
    "Texts, answers and tasks are scored with really converted weights, read back from disk; the published numbers are "
    "of fake-quantised ones."
)
PUBLISHED_POINTS = 0.3


def main(step: ReportStep) -> None:
    """Write the tables and the section."""
    evaluations = load_evaluations(step.results)
    tables = all_tables(evaluations)
    with staged_directory(step.tables) as directory:
        for table in [*tables, *sweeps(evaluations).tables()]:
            write_table(table, directory)
    atomic_write_text(step.section, section(evaluations, tables))


def section(evaluations: Sequence[QuantizedEvaluation], tables: Sequence[Table]) -> str:
    """The study's section in Markdown."""
    links = "\n".join(f"![{text}](figures/quantized_distillation/{name}.png)\n" for name, text in FIGURES.items())
    shown = [part for table in tables for part in (f"### {HEADINGS[table.name]}", folded(table))]
    parts = [
        "## Quantised distillation",
        QUESTION,
        "### What rounding costs, and what comes back",
        "\n".join(f"- {sentence}" for one in evaluations for sentence in findings(one)),
        links,
        *shown,
        *sweeps(evaluations).section(),
        "### Data, models and protocol",
        "\n".join(f"- {note}" for note in notes(evaluations)),
        "The same tables as CSV and LaTeX: [tables/quantized_distillation](tables/quantized_distillation).",
    ]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def folded(table: Table) -> str:
    """The table, behind a click where it is long."""
    text = table.to_markdown()
    return text if len(table.rows) <= 24 else f"<details><summary>{table.caption}</summary>\n\n{text}\n</details>"


def findings(evaluation: QuantizedEvaluation) -> Iterator[str]:
    """What rounding cost the model, what each condition closed of it, and the study's question."""
    name, (nll, kl, *_) = f"`{evaluation.results.model}`", text_measures(evaluation)
    teacher, ptq = (perplexity(estimate(evaluation, one, nll)) for one in (TEACHER, PTQ))
    if teacher and ptq:
        weights = next(one.weight_format for one in evaluation.results.systems if one.condition == PTQ)
        yield (
            f"{name}, {weights}: rounding to nearest takes the perplexity of {nll.sets[0]} from "
            f"{format_estimate(teacher, 2)} to {format_estimate(ptq, 2)}."
        )
    undamaged = [one.name for one in everything(evaluation) if one not in recoverable(evaluation)]
    if teacher and ptq and undamaged:
        yield f"{name}: no damage beyond doubt to {', '.join(undamaged)}: too few items, or none was done."
    for condition in recovering(evaluation):
        shares = [(one, closed_share(evaluation, condition, one)) for one in (nll, kl)]
        words = [f"{format_estimate(share, 0, 100)} % of the gap in {one.name}" for one, share in shares if share]
        if words:
            yield f"{name}: `{condition}` closed {' and '.join(words)}."
    yield from policies(evaluation)


def everything(evaluation: QuantizedEvaluation) -> list[Measure]:
    """The measures that could have been damaged."""
    mean = average_accuracy(evaluation)
    return [*text_measures(evaluation), *([mean] if mean else [])]


def policies(evaluation: QuantizedEvaluation) -> Iterator[str]:
    """On-policy against off-policy, on each measure: which is better, as far as the interval says."""
    verdicts = []
    for measure in everything(evaluation):
        found = compare(evaluation, ON_POLICY, OFF_POLICY, measure)
        if found is None:
            continue
        better, worse = (found.high < 0, found.low > 0) if measure.lower_is_better else (found.low > 0, found.high < 0)
        verdict = "on-policy is better" if better else "off-policy is better" if worse else "not told apart"
        value = difference(found)
        assert value
        verdicts.append(f"{measure.name}: {format_estimate(value, measure.digits, measure.scale)} ({verdict})")
    if not verdicts:
        return
    yield f"`{evaluation.results.model}`, on-policy minus off-policy: {'; '.join(verdicts)}."
    mean = average_accuracy(evaluation)
    found = compare(evaluation, ON_POLICY, OFF_POLICY, mean) if mean else None
    if found:
        half = 100 * (found.high - found.low) / 2
        enough = "is fine enough" if half <= PUBLISHED_POINTS else "is too coarse"
        yield (
            f"`{evaluation.results.model}`: the interval of the accuracy is ±{half:.1f} points, which {enough} to test "
            f"the published difference of {PUBLISHED_POINTS} points."
        )


def notes(evaluations: Sequence[QuantizedEvaluation]) -> Iterator[str]:
    """Where models and data come from, what was not run, and how the protocol differs from the published one."""
    for one in evaluations:
        results = one.results
        yield f"`{results.model}`: {results.model_note or 'as published'}."
        if "dequantised" in results.model_note:
            yield (
                f"The teacher of `{results.model}` is itself a dequantised file: its weights lie on a 4-bit grid "
                "already, and the gap here is that of rounding them once more, to another grid."
            )
        for condition, reason in results.not_run.items():
            yield f"`{condition}` was not run for `{results.model}`: {reason}."
    first = evaluations[0].results
    yield f"Training, validation and test answers: `{first.dataset}` ({first.dataset_note or 'as published'})."
    for name, note in first.set_notes.items():
        if note:
            yield f"{name}: {note}."
    if first.task_versions:
        versions = ", ".join(f"{name} {version}" for name, version in first.task_versions.items())
        yield f"Tasks by lm-evaluation-harness, zero-shot, definitions in version: {versions}."
    window, stride = first.evaluation["window"], first.evaluation["stride"]
    yield f"Perplexity in sliding windows of {window} tokens, {stride} new ones each."
    yield from protocol(evaluations)


def protocol(evaluations: Sequence[QuantizedEvaluation]) -> Iterator[str]:
    """What differs from the published protocol, and where these runs follow it."""
    systems = [system for one in evaluations for system in one.results.systems]
    trained = [system for system in systems if system.trained]
    corrected, published = PLACEMENT
    if beside := named(system for system in trained if system.placement == "beside"):
        yield f"**As published:** {beside} {published}"
    if merged := named(system for system in trained if system.placement == "merged"):
        yield f"{merged if beside else 'Students'} {corrected}"
    if any(measured.variant == "beside" for one in evaluations for measured in one.results.measurements):
        yield "What it changes to move LoRA from beside the weights into them is in the table of gaps."
    chosen = {system.selection for system in trained}
    yield from (text for choice, text in zip(("validation_kl", "last"), SELECTION, strict=True) if choice in chosen)
    yield CONVERTED
    seeds = seed_count(evaluations)
    over = {0: "items", 1: "items alone: there is one seed, and no other was tried"}.get(
        seeds, f"items and {seeds} seeds"
    )
    yield f"Differences are paired on the same items and carry 95 % intervals over {over}."
    if untrained := named(system for system in systems if not system.trained and system.condition != TEACHER):
        yield f"Not trained, and beside every student in figures and tables: {untrained}."


def named(systems: Iterable[SystemFacts]) -> str:
    """The conditions of these systems, each once."""
    return ", ".join(f"`{name}`" for name in dict.fromkeys(system.condition for system in systems))


if __name__ == "__main__":
    run_step(ReportStep, main)
