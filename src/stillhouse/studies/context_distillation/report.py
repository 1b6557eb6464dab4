"""Step program: the study's tables, and its section of the results page with what the numbers say.

Every sentence about an outcome is computed. Links are relative to `results/`, where the page lies.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field

from stillhouse.config.base import StrictModel
from stillhouse.evaluation.statistics import Estimate
from stillhouse.reporting.tables import Cell, Column, Table, format_estimate, write_table
from stillhouse.runtime.commands import run_step
from stillhouse.runtime.files import atomic_write_text, staged_directory
from stillhouse.studies.context_distillation.comparisons import (
    BASELINE,
    FLEXIBLE,
    GOLD_NLL,
    MARKER,
    METHOD,
    STRICT,
    Comparison,
    Measure,
    Subject,
    compare,
    estimate,
    find,
    headline,
    load_evaluations,
    trajectory,
)
from stillhouse.studies.context_distillation.figures.checkpoint_curve import chosen_by
from stillhouse.studies.context_distillation.results import Evaluation

FIGURES = {
    "summary": "Every condition at its headline checkpoint",
    "checkpoint_curve": "Over training: the method, cross entropy alone and the untrained base",
    "ablation_curve": "Over training: every condition against the baseline",
    "ablation_bars": "Paired differences to the baseline",
    "loss": "Training cross entropy",
}
QUESTION = (
    "Can a zero-shot student absorb what worked examples in the prompt give its teacher? A frozen teacher reads the "
    "examples, the question and the gold answer; the student reads the question and the gold answer alone and is "
    f"trained on cross entropy plus the distance to the teacher's logits. `{BASELINE}` is the same training without "
    "the distance; the other conditions change one part of the teacher or of the distance."
)
CORRECTIONS = (
    "The logits that *predict* the answer tokens are distilled; the published code took them one position late and "
    "never distilled the first answer token (`distillation.positions: one_late` does so again).",
    "`shuffled_answers` is a derangement: no exemplar keeps its own answer; the published permutation let some keep "
    "theirs (`exemplars: shuffled_answers_as_published` does so again).",
)
SCORER_NOTES = {
    "corrected": "Answers may have a sign and decimals; the published pattern read digits and commas only.",
    "as_published": "**As published:** the scorer reads digits and commas only, so that a sign or decimals are lost.",
}
SAMPLE_NOTE = (
    "Every number has its n and a 95 % interval; comparisons are paired on the same items, p-values adjusted for their "
    "number."
)


class ReportStep(StrictModel):
    """The step's command line; the items lie beside the results and are named for the workflow's sake."""

    results: Annotated[tuple[Path, ...], Field(min_length=1)]
    item_scores: tuple[Path, ...] = ()
    section: Path
    tables: Annotated[Path, Field(description="Directory for CSV, LaTeX and Markdown, replaced as a whole.")]


def main(step: ReportStep) -> None:
    """Write the tables and the section."""
    evaluations = load_evaluations(step.results)
    pairs = {one.results.model: paired_comparisons(one) for one in evaluations}
    tables = [headline_table(evaluations), gap_table(evaluations), paired_table(pairs), checkpoint_table(evaluations)]
    with staged_directory(step.tables) as directory:
        for table in tables:
            write_table(table, directory)
    atomic_write_text(step.section, section(evaluations, pairs, tables))


def headline_table(evaluations: Sequence[Evaluation]) -> Table:
    """Every condition at its headline checkpoint."""
    rows = [
        (
            one.results.model,
            subject.label,
            ", ".join(str(m.step) for m in subject.measurements) if subject.trained else None,
            len(subject.measurements),
            estimate(one, subject, GOLD_NLL),
            *counted(one, subject, STRICT),
            *counted(one, subject, FLEXIBLE)[1:],
            *counted(one, subject, MARKER)[1:],
            estimate(one, subject, GOLD_NLL).n,
            estimate(one, subject, STRICT).n,
        )
        for one in evaluations
        for subject in headline(one)
    ]
    columns = (
        Column("model"),
        Column("condition"),
        Column("step", heading="chosen step"),
        Column("seeds", "integer"),
        Column("gold_nll", "estimate", 3, "gold NLL, nats/token"),
        Column("strict_count", heading="strict, correct / answers"),
        Column("strict", "percent_estimate", 1, "strict, %"),
        Column("flexible", "percent_estimate", 1, "flexible, %"),
        Column("marker", "percent_estimate", 1, "wrote ####, %"),
        Column("items", "integer", heading="n (NLL)"),
        Column("answers", "integer", heading="n (answers)"),
    )
    caption = f"Test split, checkpoints chosen by {chosen_by(evaluations[0])}; in brackets 95 % intervals."
    return Table("headline", caption, columns, tuple(rows))


def counted(evaluation: Evaluation, subject: Subject, measure: Measure) -> tuple[str, Estimate]:
    """A rate as counts over all seeds, and as an estimate."""
    rate = estimate(evaluation, subject, measure)
    answers = rate.n * len(subject.measurements)
    return f"{round(rate.value * answers)} / {answers}", rate


def gap_table(evaluations: Sequence[Evaluation]) -> Table:
    """The untrained base by number of shots: what there is to distil."""
    rows = [
        (
            one.results.model,
            subject.shots,
            estimate(one, subject, GOLD_NLL),
            estimate(one, subject, STRICT),
            estimate(one, subject, MARKER),
        )
        for one in evaluations
        for subject in headline(one)
        if not subject.trained
    ]
    columns = (
        Column("model"),
        Column("shots", "integer"),
        Column("gold_nll", "estimate", 3, "gold NLL, nats/token"),
        Column("strict", "percent_estimate", 1, "strict, %"),
        Column("marker", "percent_estimate", 1, "wrote ####, %"),
    )
    return Table("icl_gap", "The base model before any training, by number of shots.", columns, tuple(rows))


def paired_comparisons(evaluation: Evaluation) -> dict[Measure, list[Comparison]]:
    """Every other condition minus the baseline, by measure; empty lists where the baseline was not run."""
    subjects = headline(evaluation)
    baseline = find(subjects, BASELINE)
    others = [subject for subject in subjects if subject.condition != BASELINE]
    return {m: [compare(evaluation, s, baseline, m) for s in others if baseline] for m in (GOLD_NLL, STRICT, MARKER)}


def paired_table(pairs: dict[str, dict[Measure, list[Comparison]]]) -> Table:
    """Paired differences to the baseline, with p-values adjusted within each model and measure."""
    rows: list[tuple[Cell, ...]] = []
    for model, found in pairs.items():
        adjusted = {measure: holm([one.p_value for one in found[measure]]) for measure in found}
        for place, nll in enumerate(found[GOLD_NLL]):
            row: list[Cell] = [model, nll.subject.label, nll.estimate, adjusted[GOLD_NLL][place]]
            for measure in (STRICT, MARKER):
                one = found[measure][place]
                discordant = f"{one.only_subject} : {one.only_baseline}"
                row += [one.estimate, discordant, adjusted[measure][place]]
            rows.append(tuple(row))
    columns = (
        Column("model"),
        Column("condition"),
        Column("gold_nll", "estimate", 3, "Δ gold NLL, nats/token"),
        Column("gold_nll_p", "p_value", 3, "p"),
        Column("strict", "percent_estimate", 1, "Δ strict, points"),
        Column("strict_discordant", heading="strict, only it : only baseline"),
        Column("strict_p", "p_value", 3, "p (strict)"),
        Column("marker", "percent_estimate", 1, "Δ wrote ####, points"),
        Column("marker_discordant", heading="####, only it : only baseline"),
        Column("marker_p", "p_value", 3, "p (####)"),
    )
    caption = (
        f"Each condition minus {BASELINE} on the same items: paired bootstrap intervals (95 %, unadjusted); p from the "
        "same bootstrap for NLL, from McNemar's exact test for rates (the bootstrap where there are several seeds), "
        "Holm-adjusted over the conditions of a model and measure."
    )
    return Table("paired", caption, columns, tuple(rows))


def checkpoint_table(evaluations: Sequence[Evaluation]) -> Table:
    """Every saved step of every student, on the test split."""
    rows: list[tuple[Cell, ...]] = [
        (one.results.model, subject.condition, step, *(estimate(one, at, m) for m in (GOLD_NLL, STRICT, MARKER)))
        for one in evaluations
        for subject in headline(one)
        if subject.trained
        for step, at in trajectory(one, subject.condition).items()
        if step
    ]
    columns = (
        Column("model"),
        Column("condition"),
        Column("step", "integer"),
        Column("gold_nll", "estimate", 3, "gold NLL, nats/token"),
        Column("strict", "percent_estimate", 1, "strict, %"),
        Column("marker", "percent_estimate", 1, "wrote ####, %"),
    )
    return Table("checkpoints", "Every saved checkpoint on the test split.", columns, tuple(rows))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment (1979): the k-th smallest of m counts m - k + 1 times, and never less than before."""
    order = np.argsort(p_values, kind="stable")
    factors = np.arange(len(p_values), 0, -1)
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(np.asarray(p_values)[order] * factors))
    return [float(value) for value in adjusted]


def section(
    evaluations: Sequence[Evaluation], pairs: dict[str, dict[Measure, list[Comparison]]], tables: Sequence[Table]
) -> str:
    """The study's section in Markdown."""
    first = evaluations[0].results
    main_table, gap, paired, checkpoints = (table.to_markdown() for table in tables)
    links = "\n".join(f"![{text}](figures/context_distillation/{name}.png)\n" for name, text in FIGURES.items())
    parts = [
        "## Context distillation",
        QUESTION,
        "### What came out",
        "\n".join(f"- {finding(one, pairs[one.results.model])}" for one in evaluations),
        main_table,
        "### What there was to distil",
        "\n".join(f"- {gap_finding(one)}" for one in evaluations),
        gap,
        "### Against the baseline",
        paired,
        links,
        "### Checkpoints",
        f"<details><summary>Every checkpoint</summary>\n\n{checkpoints}\n</details>",
        "### Data, models and protocol",
        "\n".join(
            f"- {note}" for note in [*sources(evaluations), *protocol(first.evaluation, chosen_by(evaluations[0]))]
        ),
        "The same tables as CSV and LaTeX: [tables/context_distillation](tables/context_distillation).",
    ]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def finding(evaluation: Evaluation, pairs: dict[Measure, list[Comparison]]) -> str:
    """Whether the method differs from the baseline, and which other students do, after Holm's adjustment."""
    model, subjects = f"`{evaluation.results.model}`", [one.subject for one in pairs[GOLD_NLL]]
    if not pairs[GOLD_NLL]:
        return f"{model}: `{BASELINE}` was not run, so nothing is compared."
    adjusted = {measure: holm([one.p_value for one in pairs[measure]]) for measure in pairs}
    sentences = []
    if find(subjects, METHOD):
        place = [subject.condition for subject in subjects].index(METHOD)
        clauses = [difference_clause(m, pairs[m][place], adjusted[m][place]) for m in pairs]
        sentences.append(f"{model}: `{METHOD}` minus `{BASELINE}`: {'; '.join(clauses)}.")
    else:
        sentences.append(f"{model}: `{METHOD}` was not run.")
    others = [place for place, subject in enumerate(subjects) if subject.trained and subject.condition != METHOD]
    if others:
        names = [f"`{subjects[place].condition}`" for place in others if adjusted[GOLD_NLL][place] < 0.05]
        named = f" ({', '.join(names)})" if names else ""
        sentences.append(
            f"Other students that differ from `{BASELINE}` in gold NLL at an adjusted p below 0.05: {len(names)} of "
            f"{len(others)}{named}."
        )
    return " ".join(sentences)


def difference_clause(measure: Measure, one: Comparison, adjusted: float) -> str:
    """One measure's difference with its interval, and what the interval says."""
    digits, unit = (3, " nats per token") if measure.per_token else (1, " points")
    verdict = "the interval excludes zero" if one.excludes_zero else "the interval includes zero"
    p_value = Column("p", "p_value", 3).show(adjusted) or ""
    equals = "" if p_value.startswith("<") else "= "
    difference = format_estimate(one.estimate, digits, measure.scale)
    return f"{measure.name} {difference}{unit} (n = {one.n}; {verdict}; adjusted p {equals}{p_value})"


def gap_finding(evaluation: Evaluation) -> str:
    """What shots do to the untrained base."""
    base = [subject for subject in headline(evaluation) if not subject.trained]
    zero, shown = find(base, "base_zero_shot"), [subject for subject in base if subject.shots]
    if zero is None or not shown:
        return f"`{evaluation.results.model}`: the base was not measured both with and without shots."
    most = max(shown, key=lambda subject: subject.shots)
    changes = []
    for measure in (GOLD_NLL, STRICT, MARKER):
        one, digits = compare(evaluation, most, zero, measure), 3 if measure.per_token else 1
        unit = "nats per token" if measure.per_token else "points"
        changes.append(f"{measure.name} by {format_estimate(one.estimate, digits, measure.scale)} {unit}")
    return f"`{evaluation.results.model}`: {most.shots} shots change {'; '.join(changes)} (paired, 95 % intervals)."


def sources(evaluations: Sequence[Evaluation]) -> list[str]:
    """Where data and models come from, and what generated the answers."""
    data = dict.fromkeys(f"Data `{one.results.dataset}`: {one.results.dataset_note}" for one in evaluations)
    models = [
        f"Model `{one.results.model}`: {one.results.model_note.rstrip('.')}. Answers by {one.results.engine}"
        for one in evaluations
    ]
    return [f"{note.rstrip('.')}." for note in (*data, *models)]


def protocol(settings: dict[str, object], chooser: str) -> list[str]:
    """What differs from the published protocol, and where this run follows it, mistakes included."""
    choice = f"Headline checkpoints are chosen by {chooser}; the published numbers took the best on the test set."
    if settings["selection"] == "best_on_test":
        choice = f"**As published:** headline checkpoints are chosen by {chooser}, which flatters every student."
    return [choice, SCORER_NOTES[str(settings["scorer"])], *CORRECTIONS, SAMPLE_NOTE]


if __name__ == "__main__":
    run_step(ReportStep, main)
