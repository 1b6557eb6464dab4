"""The study's tables: lenses, controls, best-of-K and the checkpoints; rows from estimates over the same documents."""

from __future__ import annotations

from collections.abc import Sequence

from stillhouse.evaluation.results_files import Interval
from stillhouse.evaluation.statistics import bootstrap_ratio_interval
from stillhouse.reporting.tables import Cell, Column, Table
from stillhouse.studies.consistency_lens.comparisons import (
    LABELS,
    Subject,
    comparisons,
    kl,
    mse,
    recovered,
    top1,
    variance_explained,
)
from stillhouse.studies.consistency_lens.results import BEST_OF, CONTROLS, LENS, ZERO

NAMES = (Column("model"), Column("condition"))


def names(subject: Subject) -> tuple[str, str]:
    """A subject's first cells."""
    return subject.evaluation.results.model, subject.condition


def lens_table(chosen: Sequence[Subject]) -> Table:
    """Every lens at its chosen checkpoint: how the reconstruction behaves, and what text it comes from."""
    rows: list[tuple[Cell, ...]] = []
    for subject in chosen:
        measured = subject.measurements
        texts = [one.diversity for one in measured if one.diversity]
        rows.append(
            (
                *names(subject),
                subject.facts.layer,
                subject.facts.text_length,
                subject.facts.train_examples,
                ", ".join(str(one.step) for one in measured),
                kl(subject),
                recovered(subject),
                recovered(subject, baseline=ZERO),
                variance_explained(subject),
                mse(subject),
                top1(subject),
                fluency(subject, LENS),
                sum(text.distinct_texts for text in texts) / len(texts),
                sum(text.distinct_tokens for text in texts) / len(texts),
                sum(text.most_common_token for text in texts) / len(texts),
                sum(text.repeated_within for text in texts) / len(texts),
                measured[0].kl.n,
            )
        )
    columns = (
        *NAMES,
        Column("layer", "integer"),
        Column("tokens", "integer", heading="T"),
        Column("train_documents", "integer", heading="train documents"),
        Column("step", heading="chosen step"),
        Column("kl", "estimate", 3, "KL, nats"),
        Column("recovered", "percent_estimate", 1, "of the mean's KL recovered, %"),
        Column("recovered_zero", "percent_estimate", 1, "of zeros' KL recovered, %"),
        Column("variance", "percent_estimate", 1, "variance explained, %"),
        Column("mse", "estimate", 3, "MSE per component"),
        Column("top1", "percent_estimate", 1, "same top token, %"),
        Column("fluency", "estimate", 2, "NLL of the text, nats/token"),
        Column("distinct_texts", "percent", 0, "different texts, %"),
        Column("distinct_tokens", "percent", 0, "different tokens, %"),
        Column("most_common", "percent", 0, "most common token, %"),
        Column("repeated", "percent", 0, "repeated within a text, %"),
        Column("n", "integer"),
    )
    split = chosen[0].evaluation.results.split
    caption = f"Lenses on the {split} documents, explanations without noise; in brackets 95 % intervals."
    return Table("lenses", caption, columns, tuple(rows))


def fluency(subject: Subject, variant: str) -> Cell:
    """The text's NLL under the original in nats per token, over the documents of all seeds; none without a text."""
    measured = [one.fluency for one in subject.of(variant) if one.fluency]
    if len(measured) <= 1:
        return measured[0] if measured else None
    nll, tokens = (subject.values(variant, column).mean(axis=0) for column in ("text_nll", "text_tokens"))
    return Interval.of(bootstrap_ratio_interval(nll, tokens))


def control_table(chosen: Sequence[Subject]) -> Table:
    """Every baseline and control beside the lens, and minus it on the same documents."""
    rows: list[tuple[Cell, ...]] = []
    for subject in chosen:
        found = {one.variant: (one, adjusted) for one, adjusted in comparisons(subject)}
        for variant in (LENS, *CONTROLS):
            against, adjusted = found.get(variant, (None, None))
            rows.append(
                (
                    *names(subject),
                    LABELS[variant],
                    kl(subject, variant),
                    against.estimate if against else None,
                    adjusted,
                    variance_explained(subject, variant),
                    mse(subject, variant),
                    top1(subject, variant),
                    fluency(subject, variant),
                )
            )
    columns = (
        *NAMES,
        Column("variant", heading="in place of the reconstruction"),
        Column("kl", "estimate", 3, "KL, nats"),
        Column("difference", "estimate", 3, "KL minus the lens's"),
        Column("p", "p_value", 3, "p"),
        Column("variance", "percent_estimate", 1, "variance explained, %"),
        Column("mse", "estimate", 3, "MSE per component"),
        Column("top1", "percent_estimate", 1, "same top token, %"),
        Column("fluency", "estimate", 2, "NLL of the text, nats/token"),
    )
    caption = (
        "Baselines and controls on the documents of the lens. Differences are paired (95 % bootstrap intervals, "
        "unadjusted; above 0 the lens is better), p from the same bootstrap, Holm-adjusted over a condition's controls."
    )
    return Table("controls", caption, columns, tuple(rows))


def best_of_table(chosen: Sequence[Subject]) -> Table:
    """The best of K sampled explanations."""
    rows: list[tuple[Cell, ...]] = [
        (*names(subject), k, kl(subject, variant), variance_explained(subject, variant), top1(subject, variant))
        for subject in chosen
        for k in subject.sample_counts
        for variant in (f"{BEST_OF}{k}",)
    ]
    columns = (
        *NAMES,
        Column("k", "integer", heading="K"),
        Column("kl", "estimate", 3, "KL, nats"),
        Column("variance", "percent_estimate", 1, "variance explained, %"),
        Column("top1", "percent_estimate", 1, "same top token, %"),
    )
    caption = "The best of K sampled explanations, chosen by the squared error of the reconstruction."
    return Table("best_of_k", caption, columns, tuple(rows))


def checkpoint_table(chosen: Sequence[Subject]) -> Table:
    """Every kept checkpoint on validation, where one was chosen."""
    rows: list[tuple[Cell, ...]] = []
    for subject in chosen:
        results = subject.evaluation.results
        picked = {(one.condition, one.seed, one.step) for one in results.selections}
        for one in results.measurements:
            if (one.condition, one.split, one.variant) == (subject.condition, "validation", LENS):
                mark = "chosen" if (one.condition, one.seed, one.step) in picked else ""
                rows.append((*names(subject), one.seed, one.step, one.kl, one.variance_explained, mark))
    columns = (
        *NAMES,
        Column("seed"),
        Column("step", "integer"),
        Column("kl", "estimate", 3, "KL, nats"),
        Column("variance", "percent_estimate", 1, "variance explained, %"),
        Column("chosen", heading=""),
    )
    return Table("checkpoints", "Every kept checkpoint on the validation documents.", columns, tuple(rows))
