"""The study's tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import fmean

from stillhouse.evaluation.statistics import holm
from stillhouse.reporting.tables import Cell, Column, Table
from stillhouse.studies.lora_generation.comparisons import (
    GROUPS,
    accuracy,
    arms,
    closeness,
    compare,
    gold_nll,
    groups,
    label,
    names,
    resampled,
    seconds,
)
from stillhouse.studies.lora_generation.config import Arm
from stillhouse.studies.lora_generation.results import Evaluation

CLOSENESS = (
    Column("cosine", "number", 2, "cosine to the teacher's delta"),
    Column("norm_ratio", "number", 2, "norm ratio"),
    Column("relative_error", "number", 2, "error of ΔW"),
    Column("cases", "integer", heading="held-out adapters x seeds"),
)


def all_tables(evaluations: Sequence[Evaluation]) -> list[Table]:
    """Every table, in the order of the section."""
    makers = (arms_table, paired_table, ablation_table, clusters_table, teachers_table)
    return [make(evaluations) for make in makers]


def arms_table(evaluations: Sequence[Evaluation]) -> Table:
    """Every arm on every task."""
    rows = []
    for one in evaluations:
        for group, tasks in groups(one).items():
            for task in tasks:
                for arm in arms(one, [task]):
                    scores = (accuracy(one, [task], arm), gold_nll(one, [task], arm))
                    near = nearness(one, [task], arm)
                    cost = seconds(one, [task], arm)
                    rows.append((one.results.model, GROUPS[group], task, label(one, [task], arm), *scores, *near, cost))
    columns = (
        Column("model"),
        Column("held_out", heading="what is held out"),
        Column("task"),
        Column("arm"),
        Column("accuracy", "percent_estimate", 1, "accuracy, %"),
        Column("gold_nll", "estimate", 3, "gold NLL, nats/token"),
        *CLOSENESS,
        Column("seconds", "number", 2, "s per adapter"),
    )
    caption = (
        f"Test items; in brackets 95 % intervals over {resampled(evaluations)}. Gold NLL: of the right answers. "
        "Seconds: from prompts to an adapter, training included where there is any; a teacher's share of the training "
        "of its shards. The norm ratio and the cosine compare delta activations with those of the case's teacher."
    )
    return Table("arms", caption, columns, tuple(rows))


def paired_table(evaluations: Sequence[Evaluation]) -> Table:
    """The generated arm of each condition minus every other arm."""
    rows: list[tuple[Cell, ...]] = []
    for one, name, group, tasks in generated_groups(evaluations):
        found = [compare(one, tasks, arm, name) for arm in arms(one, tasks) if arm != "generated"]
        adjusted = zip(holm([c.accuracy_p for c in found]), holm([c.gold_nll_p for c in found]), strict=True)
        for comparison, (p, nll_p) in zip(found, adjusted, strict=True):
            cells = (comparison.accuracy, p, comparison.gold_nll, nll_p, comparison.accuracy.n)
            rows.append((one.results.model, name, GROUPS[group], label(one, tasks, comparison.arm), *cells))
    columns = (
        Column("model"),
        Column("condition"),
        Column("held_out", heading="what is held out"),
        Column("arm", heading="generated minus"),
        Column("accuracy", "percent_estimate", 1, "Δ accuracy, points"),
        Column("accuracy_p", "p_value", 3, "p"),
        Column("gold_nll", "estimate", 3, "Δ gold NLL, nats/token"),
        Column("gold_nll_p", "p_value", 3, "p (NLL)"),
        Column("items", "integer", heading="n"),
    )
    caption = (
        "Each condition's generated adapters minus each arm on the same items, tasks pooled. 95 % intervals, "
        f"unadjusted, over {resampled(evaluations)}. p Holm-adjusted over the arms of a condition and group. A lower "
        "NLL is better."
    )
    return Table("paired", caption, columns, tuple(rows))


def ablation_table(evaluations: Sequence[Evaluation]) -> Table:
    """Every generator: what its loss weighs, and what comes of it."""
    rows = []
    for one, name, group, tasks in generated_groups(evaluations):
        facts = one.results.generator(name)
        loss = (facts.weight, facts.weight_kind, facts.delta, facts.delta_kind, "yes" if facts.guided else "no")
        scores = (accuracy(one, tasks, "generated", name), gold_nll(one, tasks, "generated", name))
        near = nearness(one, tasks, "generated", name)
        rows.append((one.results.model, name, *loss, facts.kind, facts.adapters, GROUPS[group], *scores, *near))
    columns = (
        Column("model"),
        Column("condition"),
        Column("lambda_w", "number", 2, "λ_w"),
        Column("weight_kind", heading="weights as"),
        Column("lambda_d", "number", 2, "λ_d"),
        Column("delta_kind", heading="delta as"),
        Column("guided"),
        Column("decoder"),
        Column("adapters", "integer", heading="adapters learnt from"),
        Column("held_out", heading="what is held out"),
        Column("accuracy", "percent_estimate", 1, "accuracy, %"),
        Column("gold_nll", "estimate", 3, "gold NLL, nats/token"),
        *CLOSENESS,
    )
    caption = (
        "Every generator on what it has never seen; weights of the loss, and the delta activations it is led to. "
        f"95 % intervals over {resampled(evaluations)}. Nearness is a mean over held-out adapters and seeds."
    )
    return Table("ablation", caption, columns, tuple(rows))


def clusters_table(evaluations: Sequence[Evaluation]) -> Table:
    """Silhouettes of the teacher adapters by task."""
    rows = [(one.results.model, one.results.probes, len(one.results.points), *_silhouettes(one)) for one in evaluations]
    columns = (
        Column("model"),
        Column("probes"),
        Column("adapters", "integer"),
        Column("by_delta", "estimate", 3, "by delta activation"),
        Column("by_weights", "estimate", 3, "by flattened weights"),
    )
    caption = "Mean silhouette of the teacher adapters by task, cosine distance; intervals over adapters."
    return Table("clusters", caption, columns, tuple(rows))


def teachers_table(evaluations: Sequence[Evaluation]) -> Table:
    """Every teacher adapter, before and after."""
    rows = []
    for one in evaluations:
        for row in one.results.adapters:
            scores = (row.accuracy_before, row.accuracy_after, row.gold_nll_before, row.gold_nll_after)
            verdict = "no better than the base" if row.flagged else ""
            rows.append((one.results.model, row.task, row.shard, row.seed, row.step, *scores, verdict))
    columns = (
        Column("model"),
        Column("task"),
        Column("shard", "integer"),
        Column("seed", "integer"),
        Column("step", "integer"),
        Column("accuracy_before", "percent_estimate", 1, "accuracy before, %"),
        Column("accuracy_after", "percent_estimate", 1, "after, %"),
        Column("gold_nll_before", "estimate", 3, "gold NLL before"),
        Column("gold_nll_after", "estimate", 3, "after"),
        Column("flag"),
    )
    return Table("teachers", "The teacher adapters on validation items of their own task.", columns, tuple(rows))


def generated_groups(evaluations: Sequence[Evaluation]) -> Iterator[tuple[Evaluation, str, str, list[str]]]:
    """Every model, condition and group of tasks that the condition's generators were scored on."""
    for one in evaluations:
        for facts in one.results.generators if "generated" in arms(one, names(one)) else ():
            for group, tasks in groups(one, facts.condition).items():
                yield one, facts.condition, group, tasks


def nearness(one: Evaluation, tasks: Sequence[str], arm: Arm, condition: str | None = None) -> list[Cell]:
    """The means of `CLOSENESS` over cases and seeds, and how many there are."""
    found = [closeness(one, tasks, arm, column.name, condition) for column in CLOSENESS[:-1]]
    return [*(fmean(values) if values else None for values in found), len(found[0]) or None]


def _silhouettes(one: Evaluation) -> tuple[Cell, Cell]:
    return one.results.clusters.by_delta, one.results.clusters.by_weights
