"""The study's tables; `report` writes them and puts them into its section."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from stillhouse.evaluation.statistics import Estimate, PairedComparison, holm
from stillhouse.reporting.tables import Cell, Column, Table
from stillhouse.studies.quantized_distillation.comparisons import (
    Measure,
    average_accuracy,
    closed_share,
    compare,
    estimate,
    gap,
    recoverable,
    recovering,
    rounded,
    task_measures,
    text_measures,
)
from stillhouse.studies.quantized_distillation.results import PTQ, TEACHER, QuantizedEvaluation, Variant

ON_POLICY, OFF_POLICY = "on_policy", "off_policy"


def all_tables(evaluations: Sequence[QuantizedEvaluation]) -> list[Table]:
    """Every table of the study, in the section's order."""
    return [
        systems_table(evaluations),
        texts_table(evaluations),
        tasks_table(evaluations),
        recovered_table(evaluations),
        paired_table(evaluations),
        gaps_table(evaluations),
    ]


def conditions(evaluation: QuantizedEvaluation) -> tuple[str, ...]:
    """All conditions, in the order of the results."""
    return evaluation.results.conditions


def perplexity(nll: Estimate | None) -> Estimate | None:
    """The exponential of nats per token, and of its bounds."""
    if nll is None:
        return None
    value, low, high = (float(np.exp(bound)) for bound in (nll.value, nll.low, nll.high))
    return Estimate(value, low, high, nll.n)


def difference(comparison: PairedComparison | None) -> Estimate | None:
    """A comparison as an estimate, for a cell."""
    if comparison is None:
        return None
    return Estimate(comparison.difference, comparison.low, comparison.high, comparison.n)


def systems_table(evaluations: Sequence[QuantizedEvaluation]) -> Table:
    """What was evaluated, and how it was made."""
    rows = [
        (
            one.results.model,
            system.condition,
            system.seed if system.trained else None,
            system.weight_format or "full precision",
            system.weight_bytes / 1e6,
            system.placement,
            system.beta,
            system.on_policy_share,
            system.learning_rate,
            system.lora_rank,
            system.checkpoint_step,
            system.validation_kl,
        )
        for one in evaluations
        for system in one.results.systems
    ]
    columns = (
        Column("model"),
        Column("condition"),
        Column("seed", "integer"),
        Column("weight_format", heading="weights"),
        Column("megabytes", "number", 1, "MB on disk"),
        Column("placement", heading="LoRA in training"),
        Column("beta", "number", 2, "β"),
        Column("on_policy_share", "number", 2, "λ"),
        Column("learning_rate", "number", 6, "learning rate"),
        Column("lora_rank", "integer", heading="LoRA rank"),
        Column("step", "integer", heading="chosen step"),
        Column("validation_kl", "number", 4, "KL, validation"),
    )
    last = any(system.selection == "last" for one in evaluations for system in one.results.systems)
    chosen = "is the last one" if last else "has the lowest KL to the teacher on validation"
    caption = f"What was evaluated. A student's chosen step {chosen}."
    return Table("systems", caption, columns, tuple(rows))


def texts_table(evaluations: Sequence[QuantizedEvaluation]) -> Table:
    """Perplexity, KL to the teacher and agreement, on every text and on the test answers."""
    rows: list[tuple[Cell, ...]] = []
    for one in evaluations:
        by_set: dict[str, list[Measure]] = {}
        for measure in text_measures(one):
            by_set.setdefault(measure.sets[0], []).append(measure)
        for name, (nll, kl, agrees) in by_set.items():
            for condition in conditions(one):
                values = [estimate(one, condition, measure) for measure in (nll, kl, agrees)]
                if values[0] is not None:
                    rows.append((one.results.model, name, condition, perplexity(values[0]), *values[1:]))
    columns = (
        Column("model"),
        Column("text"),
        Column("condition"),
        Column("perplexity", "estimate", 2),
        Column("kl", "estimate", 4, "KL from the teacher, nats/token"),
        Column("agreement", "percent_estimate", 1, "top-1 agreement, %"),
    )
    caption = "Texts in sliding windows, and the answers of the study's test split; in brackets 95 % intervals."
    return Table("texts", caption, columns, tuple(rows))


def tasks_table(evaluations: Sequence[QuantizedEvaluation]) -> Table:
    """Accuracy on every task, both ways, and the means."""
    rows: list[tuple[Cell, ...]] = []
    for one in evaluations:
        normalised = {measure.sets: measure for measure in task_measures(one, "acc_norm")}
        for measure in task_measures(one):
            norm = normalised.get(measure.sets)
            for condition in conditions(one):
                accuracy = estimate(one, condition, measure)
                if accuracy is not None:
                    name = measure.name.removeprefix("acc, ")
                    both = (accuracy, estimate(one, condition, norm) if norm else None, accuracy.n)
                    rows.append((one.results.model, name, condition, *both))
    columns = (
        Column("model"),
        Column("task"),
        Column("condition"),
        Column("acc", "percent_estimate", 1, "acc, %"),
        Column("acc_norm", "percent_estimate", 1, "acc_norm, %"),
        Column("items", "integer", heading="n"),
    )
    caption = (
        "Zero-shot accuracy by lm-evaluation-harness' definitions; 95 % intervals. Means count every task the same; "
        "that of acc_norm takes acc where a task defines no acc_norm."
    )
    return Table("tasks", caption, columns, tuple(rows))


def recovered_table(evaluations: Sequence[QuantizedEvaluation]) -> Table:
    """Ptq's damage to each metric, and how much of it each condition closed."""
    rows: list[tuple[Cell, ...]] = []
    for one in evaluations:
        for measure in recoverable(one):
            damage = _scaled(difference(gap(one, measure)), measure)
            for condition in recovering(one):
                if share := closed_share(one, condition, measure):
                    rows.append((one.results.model, measure.name, damage, condition, share))
    columns = (
        Column("model"),
        Column("metric"),
        Column("damage", "estimate", 3, "ptq minus teacher"),
        Column("condition"),
        Column("closed", "percent_estimate", 1, "share of the gap closed, %"),
    )
    caption = (
        "Metrics that rounding to nearest made worse beyond doubt (shares in points). 100 %: as good as the teacher; "
        "0 %: as ptq."
    )
    return Table("recovered", caption, columns, tuple(rows))


def paired_table(evaluations: Sequence[QuantizedEvaluation]) -> Table:
    """Every condition against its ptq, and on- against off-policy, on the same items."""
    rows: list[tuple[Cell, ...]] = []
    for one in evaluations:
        pairs = [(name, rounded(one, name)) for name in recovering(one)]
        pairs += [(TEACHER, PTQ)] if PTQ in conditions(one) else []
        if {ON_POLICY, OFF_POLICY} <= set(conditions(one)):
            pairs.append((ON_POLICY, OFF_POLICY))
        for measure in headline_measures(one):
            compared = [(pair, found) for pair in pairs if (found := compare(one, *pair, measure))]
            adjusted = holm([found.p_value for _, found in compared])
            rows += [
                (
                    one.results.model,
                    measure.name,
                    f"{first} minus {second}",
                    _scaled(difference(found), measure),
                    p,
                    found.n,
                )
                for ((first, second), found), p in zip(compared, adjusted, strict=True)
            ]
    columns = (
        Column("model"),
        Column("metric"),
        Column("comparison"),
        Column("difference", "estimate", 3),
        Column("p", "p_value", 3),
        Column("items", "integer", heading="n"),
    )
    caption = (
        "Paired on the same items, over seeds where there are several: 95 % intervals, unadjusted; p by paired "
        "bootstrap, Holm-adjusted within a metric. Shares in points; of NLL and KL less is better."
    )
    return Table("paired", caption, columns, tuple(rows))


def headline_measures(evaluation: QuantizedEvaluation) -> list[Measure]:
    """All that is compared: texts, answers, each task and their mean."""
    mean = average_accuracy(evaluation)
    singles = [one for one in task_measures(evaluation) if len(one.sets) == 1]
    return [*text_measures(evaluation), *singles, *([mean] if mean and len(mean.sets) > 1 else [])]


def gaps_table(evaluations: Sequence[QuantizedEvaluation]) -> Table:
    """What merging the LoRA into the rounded weights, and converting them for real, changes."""
    rows: list[tuple[Cell, ...]] = []
    for one in evaluations:
        nll, kl = text_measures(one)[:2]
        for condition in recovering(one):
            systems = one.results.of(condition)
            if not systems[0].trained:
                continue
            pairs: dict[str, tuple[Variant, Variant]] = {
                "merged minus beside": ("merged", "beside"),
                "converted minus fake-quantised": ("deployed", "merged"),
            }
            for words, variants in pairs.items():
                found = [compare(one, condition, condition, measure, variants) for measure in (nll, kl)]
                if found[0] is not None:
                    differences = [difference(comparison) for comparison in found]
                    largest = max((system.largest_logit_difference or 0.0) for system in systems)
                    logits = largest if words.startswith("converted") else None
                    rows.append((one.results.model, condition, systems[0].placement, words, *differences, logits))
    columns = (
        Column("model"),
        Column("condition"),
        Column("placement", heading="LoRA in training"),
        Column("comparison"),
        Column("nll", "estimate", 4, "Δ NLL, nats/token"),
        Column("kl", "estimate", 4, "Δ KL, nats/token"),
        Column("logits", "number", 6, "largest difference of logits (share of the largest)"),
    )
    caption = (
        "The same student on the first text: its LoRA inside the rounded weights, Q(W + BA), against beside them, "
        "Q(W) + BA; and its converted weights against the fake-quantised ones."
    )
    return Table("gaps", caption, columns, tuple(rows))


def _scaled(value: Estimate | None, measure: Measure) -> Estimate | None:
    """On the measure's own scale: shares in points."""
    if value is None:
        return None
    return Estimate(measure.scale * value.value, measure.scale * value.low, measure.scale * value.high, value.n)
