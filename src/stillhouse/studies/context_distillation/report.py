"""Step program: the study's tables, and its section of the results page with what the numbers say.

Every sentence about an outcome is computed. Links are relative to `results/`, where the page lies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

from stillhouse.evaluation.statistics import holm
from stillhouse.reporting.steps import ReportStep
from stillhouse.reporting.tables import Column, Table, format_estimate, write_table
from stillhouse.runtime.commands import run_step
from stillhouse.runtime.files import atomic_write_text, staged_directory
from stillhouse.studies.context_distillation.comparisons import (
    BASELINE,
    GOLD_NLL,
    MARKER,
    METHOD,
    STRICT,
    Comparison,
    Measure,
    compare,
    data_note,
    find,
    headline,
    load_evaluations,
)
from stillhouse.studies.context_distillation.figures.checkpoint_curve import chosen_by
from stillhouse.studies.context_distillation.results import Evaluation, ModelResults
from stillhouse.studies.context_distillation.sweeps import sweeps
from stillhouse.studies.context_distillation.tables import (
    checkpoint_table,
    gap_table,
    headline_table,
    paired_comparisons,
    paired_table,
    transfer_table,
)

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
# By the setting that repeats a mistake: what is said of a run without it, and of the conditions that have it.
MISTAKES = {
    "one_late": (
        "The logits that *predict* the answer tokens are distilled; the published code took them one position late and "
        "never distilled the first answer token (`distillation.positions: one_late` does so again).",
        "distil the logits one position late, so that the first answer token is never distilled.",
    ),
    "shuffled_answers_as_published": (
        "`shuffled_answers` is a derangement: no exemplar keeps its own answer; the published permutation let some "
        "keep theirs (`exemplars: shuffled_answers_as_published` does so again).",
        "permute the exemplars' answers so that some keep their own.",
    ),
}
SCORER_NOTES = {
    "corrected": "Answers may have a sign and decimals; the published pattern read digits and commas only.",
    "as_published": "**As published:** the scorer reads digits and commas only, so that a sign or decimals are lost.",
}
SAMPLE_NOTE = (
    "Every number has its n and a 95 % interval; comparisons are paired on the same items, p-values adjusted for their "
    "number."
)


def main(step: ReportStep) -> None:
    """Write the tables and the section."""
    evaluations = load_evaluations(step.results)
    pairs = {one.results.model: paired_comparisons(one) for one in evaluations}
    tables = [headline_table(evaluations), gap_table(evaluations), paired_table(pairs), checkpoint_table(evaluations)]
    transfer = transfer_table(evaluations)
    with staged_directory(step.tables) as directory:
        for table in [*tables, *([transfer] if transfer else []), *sweeps(evaluations).tables()]:
            write_table(replace(table, caption=table.caption + data_note(evaluations)), directory)
    atomic_write_text(step.section, section(evaluations, pairs, tables, transfer))


def section(
    evaluations: Sequence[Evaluation],
    pairs: dict[str, dict[Measure, list[Comparison]]],
    tables: Sequence[Table],
    transfer: Table | None,
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
        *(["### Transfer", transfer.to_markdown()] if transfer else []),
        *sweeps(evaluations).section(),
        "### Checkpoints",
        f"<details><summary>Every checkpoint</summary>\n\n{checkpoints}\n</details>",
        "### Data, models and protocol",
        "\n".join(f"- {note}" for note in [*sources(evaluations), *protocol(first, chosen_by(evaluations[0]))]),
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
        changes.append(f"{measure.name} by {format_estimate(one.estimate, digits, measure.scale)} {unit} (n = {one.n})")
    return f"`{evaluation.results.model}`: {most.shots} shots change {'; '.join(changes)} (paired, 95 % intervals)."


def sources(evaluations: Sequence[Evaluation]) -> list[str]:
    """Where data and models come from, and what generated the answers."""
    data = dict.fromkeys(f"Data `{one.results.dataset}`: {one.results.dataset_note}" for one in evaluations)
    models = [
        f"Model `{one.results.model}`: {one.results.model_note.rstrip('.')}. Answers by {one.results.engine}"
        for one in evaluations
    ]
    return [f"{note.rstrip('.')}." for note in (*data, *models)]


def protocol(results: ModelResults, chooser: str) -> list[str]:
    """What differs from the published protocol, and where this run follows it, mistakes included."""
    settings = results.evaluation
    choice = f"Headline checkpoints are chosen by {chooser}; the published numbers took the best on the test set."
    if settings["selection"] == "best_on_test":
        choice = f"**As published:** headline checkpoints are chosen by {chooser}, which flatters every student."
    repeated = [
        f"**As published:** {', '.join(f'`{name}`' for name in results.repeated_mistakes[mistake])} {mistaken}"
        if mistake in results.repeated_mistakes
        else corrected
        for mistake, (corrected, mistaken) in MISTAKES.items()
    ]
    limit = cast("dict[str, int]", settings["generation"])["max_new_tokens"]
    cut = (
        f"An answer is cut at {limit:,} new tokens and scored as it stands; *finished* is the share that ended before."
    )
    left_out = "; ".join(f"{count:,} by `{condition}`" for condition, count in results.skipped.items())
    skipped = [f"Training examples over the limit of tokens were left out: {left_out}."] if left_out else []
    return [choice, SCORER_NOTES[str(settings["scorer"])], *repeated, cut, *skipped, SAMPLE_NOTE]


if __name__ == "__main__":
    run_step(ReportStep, main)
