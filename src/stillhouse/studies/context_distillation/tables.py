"""The study's tables: what `report` writes as CSV, LaTeX and Markdown and joins into the section."""

from __future__ import annotations

from collections.abc import Sequence

from stillhouse.evaluation.statistics import Estimate, holm
from stillhouse.reporting.tables import Cell, Column, Table
from stillhouse.studies.context_distillation.comparisons import (
    BASELINE,
    FINISHED,
    FLEXIBLE,
    GOLD_NLL,
    MARKER,
    STRICT,
    Comparison,
    Measure,
    Subject,
    compare,
    estimate,
    find,
    headline,
    trajectory,
)
from stillhouse.studies.context_distillation.figures.checkpoint_curve import chosen_by
from stillhouse.studies.context_distillation.results import Evaluation, transfer_split

COUNTS = (Column("items", "integer", heading="n (NLL)"), Column("answers", "integer", heading="n (answers)"))


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
            *counted(one, subject, FINISHED)[1:],
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
        Column("finished", "percent_estimate", 1, "finished, %"),
        *COUNTS,
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
            estimate(one, subject, FINISHED),
            estimate(one, subject, GOLD_NLL).n,
            estimate(one, subject, STRICT).n,
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
        Column("finished", "percent_estimate", 1, "finished, %"),
        *COUNTS,
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
            rows.append((*row, nll.n, found[STRICT][place].n))
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
        *COUNTS,
    )
    caption = (
        f"Each condition minus {BASELINE} on the same items. Paired 95 % intervals, unadjusted: bootstrap for NLL, "
        "Bonett and Price for rates. p from the same bootstrap for NLL, from McNemar's exact test for rates (the "
        "bootstrap where there are several seeds), Holm-adjusted over the conditions of a model and measure."
    )
    return Table("paired", caption, columns, tuple(rows))


def transfer_table(evaluations: Sequence[Evaluation]) -> Table | None:
    """Every condition at its headline checkpoint on each further data set; None where none was scored."""
    rows: list[tuple[Cell, ...]] = []
    for one in evaluations:
        for dataset in one.results.transfer_datasets:
            subjects = headline(one, transfer_split(dataset))
            baseline = find(subjects, BASELINE)
            for subject in subjects:
                row: list[Cell] = [one.results.model, dataset, subject.label]
                row += [estimate(one, subject, measure) for measure in (GOLD_NLL, STRICT, FLEXIBLE)]
                paired = compare(one, subject, baseline, GOLD_NLL).estimate if baseline not in (None, subject) else None
                rows.append((*row, paired, estimate(one, subject, STRICT).n))
    columns = (
        Column("model"),
        Column("dataset", heading="data set"),
        Column("condition"),
        Column("gold_nll", "estimate", 3, "gold NLL, nats/token"),
        Column("strict", "percent_estimate", 1, "strict, %"),
        Column("flexible", "percent_estimate", 1, "flexible, %"),
        Column("gold_nll_difference", "estimate", 3, f"Δ gold NLL to {BASELINE}"),
        Column("items", "integer", heading="n"),
    )
    caption = "The same checkpoints on data sets that nothing was trained on or chosen by; 95 % intervals in brackets."
    return Table("transfer", caption, columns, tuple(rows)) if rows else None


def checkpoint_table(evaluations: Sequence[Evaluation]) -> Table:
    """Every saved step of every student, on the test split."""
    rows: list[tuple[Cell, ...]] = [
        (
            one.results.model,
            subject.condition,
            step,
            *(estimate(one, at, m) for m in (GOLD_NLL, STRICT, MARKER)),
            *(estimate(one, at, m).n for m in (GOLD_NLL, STRICT)),
        )
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
        *COUNTS,
    )
    return Table("checkpoints", "Every saved checkpoint on the test split.", columns, tuple(rows))
