"""What the study's figures and tables share: scores over cases and seeds, and the generated arm minus every other one.

Stands above `results`; no torch here. Tasks fall into two groups: those that the headline's generator has never seen,
and those of which it knows other shards. A replicate is a case under one seed of the generator; all arms are compared
on the same replicates and items.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stillhouse.evaluation.statistics import (
    Estimate,
    bootstrap_ratio_interval,
    mcnemar,
    paired_difference_over_seeds,
    paired_rate_interval,
    student_mean_interval,
    wilson_interval,
)
from stillhouse.studies.lora_generation.config import ARMS, Arm
from stillhouse.studies.lora_generation.results import (
    OF_COLLECTION,
    Evaluation,
    GeneratorFacts,
    Measurement,
    Subject,
    load_evaluation,
)

Floats = NDArray[np.float64]
LABELS: dict[Arm, str] = {
    "base": "base",
    "generated": "generated",
    "teacher": "teacher (upper bound)",
    "mean_adapter": "mean of adapters",
    "nearest_adapter": "nearest by prompts (retrieval)",
    "other_task": "adapter of another task",
    "in_context": "prompts in context",
    "few_prompt_lora": "LoRA on the prompts",
}
GROUPS = {"held_out_task": "held-out tasks", "held_out_shard": "held-out shards"}


@dataclass(frozen=True)
class Comparison:
    """The generated arm minus another one: accuracy (above 0 is better), and nats per token (below 0 is better).

    Another arm, or the same one of another condition.
    """

    arm: Arm
    accuracy: Estimate
    accuracy_p: float
    gold_nll: Estimate
    gold_nll_p: float

    @property
    def verdict(self) -> str:
        """`better`, `worse` or `undecided` by accuracy."""
        if self.accuracy.low > 0:
            return "better"
        return "worse" if self.accuracy.high < 0 else "undecided"

    @property
    def nll_verdict(self) -> str:
        """The same by the right answers' NLL."""
        if self.gold_nll.high < 0:
            return "better"
        return "worse" if self.gold_nll.low > 0 else "undecided"


def load_evaluations(results: Sequence[Path]) -> list[Evaluation]:
    """The evaluation behind each `results.json`; `UserError` names a damaged file."""
    return [load_evaluation(path) for path in results]


def groups(evaluation: Evaluation, condition: str | None = None) -> dict[str, list[str]]:
    """The tasks by what they are to a condition's generators (the headline's by default); empty groups are left out."""
    results = evaluation.results
    unseen = results.generator(condition or results.condition).held_out.split("+")
    tasks = names(evaluation)
    found = {
        "held_out_task": [task for task in tasks if task in unseen],
        "held_out_shard": [task for task in tasks if task not in unseen],
    }
    return {group: members for group, members in found.items() if members}


def arms(evaluation: Evaluation, tasks: Sequence[str]) -> list[Arm]:
    """The arms that were scored on each of the tasks, in their order."""
    scored = {(one.task, one.arm) for one in evaluation.results.measurements}
    return [arm for arm in ARMS if all((task, arm) in scored for task in tasks)]


def names(evaluation: Evaluation) -> list[str]:
    """All tasks."""
    return [task.task for task in evaluation.results.tasks]


def measurements(evaluation: Evaluation, task: str, arm: Arm, condition: str | None = None) -> list[Measurement]:
    """An arm's measurements on a task: of the condition's generators, or beside what those learn from."""
    results = evaluation.results
    condition = condition or results.condition
    held_out = results.generator(condition).held_out
    return [
        one
        for one in results.measurements
        if (one.task, one.arm) == (task, arm)
        and one.condition == (condition if arm == "generated" else None)
        and (one.held_out == held_out or arm not in (*OF_COLLECTION, "generated"))
    ]


def values(evaluation: Evaluation, tasks: Sequence[str], arm: Arm, column: str, condition: str | None = None) -> Floats:
    """A column of an arm, [replicates, items of all tasks]; arms without a generator repeat over its seeds."""
    results = evaluation.results
    facts = results.generator(condition or results.condition)
    generated = arm == "generated"
    held_out = facts.held_out if generated or arm in OF_COLLECTION else None
    seeds = sorted({s.seed for s in results.selections if s.condition == facts.condition})
    parts = []
    for task in tasks:
        cases = sorted(
            {(m.shard, m.teacher_seed) for m in results.measurements if m.task == task and m.shard is not None}
        )
        subjects = [
            Subject(
                task, arm, shard, teacher, facts.condition if generated else None, seed if generated else None, held_out
            )
            for shard, teacher in (cases if arm != "base" else [(None, None)] * max(1, len(cases)))
            for seed in seeds
        ]
        parts.append(
            np.stack([evaluation.rows[astuple(subject)][column].to_numpy(dtype=float) for subject in subjects])
        )
    return np.concatenate(parts, axis=1)


def accuracy(evaluation: Evaluation, tasks: Sequence[str], arm: Arm, condition: str | None = None) -> Estimate:
    """The share of right answers; never narrower than Wilson's interval of one replicate."""
    found = values(evaluation, tasks, arm, "correct", condition)
    one = wilson_interval(round(found.mean(axis=0).sum()), found.shape[1])
    if len(found) == 1:
        return one
    both = paired_difference_over_seeds(found, np.zeros_like(found))
    return Estimate(both.difference, min(both.low, one.low), max(both.high, one.high), both.n)


def gold_nll(evaluation: Evaluation, tasks: Sequence[str], arm: Arm, condition: str | None = None) -> Estimate:
    """Nats per token of the right answers."""
    nats = values(evaluation, tasks, arm, "gold_nll", condition)
    tokens = values(evaluation, tasks, arm, "gold_tokens", condition)[0]
    if len(nats) == 1:
        return bootstrap_ratio_interval(nats[0], tokens)
    both = paired_difference_over_seeds(nats, np.zeros_like(nats), tokens)
    return Estimate(both.difference, both.low, both.high, both.n)


def closeness(
    evaluation: Evaluation, tasks: Sequence[str], arm: Arm, name: str, condition: str | None = None
) -> list[float]:
    """Cosine, norm ratio or relative error of each case and seed; empty where the arm has no adapter."""
    return [
        getattr(one.closeness, name)
        for task in tasks
        for one in measurements(evaluation, task, arm, condition)
        if one.closeness
    ]


def seconds(evaluation: Evaluation, tasks: Sequence[str], arm: Arm, condition: str | None = None) -> float | None:
    """Mean seconds to make an adapter."""
    found = [
        one.seconds
        for task in tasks
        for one in measurements(evaluation, task, arm, condition)
        if one.seconds is not None
    ]
    return float(np.mean(found)) if found else None


def compare(
    evaluation: Evaluation, tasks: Sequence[str], arm: Arm, condition: str | None = None, rival: str | None = None
) -> Comparison:
    """The generated arm minus another one, or the same one of condition `rival`, on the same replicates and items."""
    sides: tuple[tuple[Arm, str | None], ...] = (("generated", condition), (arm, rival or condition))
    own, other = (values(evaluation, tasks, one, "correct", of) for one, of in sides)
    paired = paired_difference_over_seeds(own, other)
    only_own, only_other = ((a * (1 - b)).sum(axis=1).mean() for a, b in ((own, other), (other, own)))
    rate = paired_rate_interval(only_own, only_other, own.shape[1])
    p_value = mcnemar(own[0], other[0]).p_value if len(own) == 1 else paired.p_value
    # Never narrower than one replicate's interval: a few items that agree are no certainty.
    low, high = (rate.low, rate.high) if len(own) == 1 else (min(paired.low, rate.low), max(paired.high, rate.high))
    own_nats, other_nats = (values(evaluation, tasks, one, "gold_nll", of) for one, of in sides)
    tokens = values(evaluation, tasks, "generated", "gold_tokens", condition)[0]
    nll = paired_difference_over_seeds(own_nats, other_nats, tokens)
    return Comparison(
        arm,
        Estimate(paired.difference, low, high, paired.n),
        p_value,
        Estimate(nll.difference, nll.low, nll.high, nll.n),
        nll.p_value,
    )


def behaviour_pairs(evaluation: Evaluation) -> list[tuple[str, str]]:
    """Conditions led by delta activations, each with one that is led by weights alone and is alike in all else."""

    def kin(facts: GeneratorFacts) -> tuple[str, str]:
        return facts.apart_from_losses, facts.weight_kind

    if "generated" not in arms(evaluation, names(evaluation)):
        return []
    generators = evaluation.results.generators
    alone = [facts for facts in generators if not facts.delta]
    found = ((led, next((one for one in alone if kin(one) == kin(led)), None)) for led in generators if led.delta)
    return [(led.condition, rival.condition) for led, rival in found if rival]


def nearer(evaluation: Evaluation, tasks: Sequence[str], condition: str, rival: str) -> Estimate:
    """Cosine to the teacher's delta activation, a condition's adapters minus a rival's, mean over cases.

    Seeds are averaged first. Of one case the interval is as wide as a difference of cosines can be.
    """
    own, other = (_cosines(evaluation, tasks, one) for one in (condition, rival))
    found = student_mean_interval([own[case] - other[case] for case in own])
    return replace(found, low=max(-2.0, found.low), high=min(2.0, found.high))


def _cosines(evaluation: Evaluation, tasks: Sequence[str], condition: str) -> dict[tuple[object, ...], float]:
    """The mean cosine over seeds of each case."""
    found: dict[tuple[object, ...], list[float]] = {}
    for task in tasks:
        for one in measurements(evaluation, task, "generated", condition):
            assert one.closeness, "generated adapters have a teacher"
            found.setdefault((task, one.shard, one.teacher_seed), []).append(one.closeness.cosine)
    return {case: float(np.mean(cosines)) for case, cosines in found.items()}


def weak_teachers(evaluation: Evaluation, tasks: Sequence[str]) -> list[str]:
    """The cases' teachers that are no better than the base: as upper bound and reference they say little."""
    results = evaluation.results
    last = max(row.step for row in results.adapters)
    cases = {(m.task, m.shard, m.teacher_seed) for m in results.measurements if m.task in tasks}
    rows = [row for row in results.adapters if row.flagged and row.step == last]
    return [row.name for row in rows if (row.task, row.shard, row.seed) in cases]


def label(evaluation: Evaluation, tasks: Sequence[str], arm: Arm) -> str:
    """An arm's name in a table; the teacher's says where it is no upper bound."""
    weak = weak_teachers(evaluation, tasks) if arm == "teacher" else []
    return f"teacher ({len(weak)} no better than the base)" if weak else name_of(evaluation, arm)


def name_of(evaluation: Evaluation, arm: Arm) -> str:
    """An arm's name; that of the prompts in context says where they are fewer than the generators read."""
    read, shown = evaluation.results.generator(evaluation.results.condition).prompts, in_context_examples(evaluation)
    return LABELS[arm] + (f" ({shown} of {read})" if arm == "in_context" and shown < read else "")


def in_context_examples(evaluation: Evaluation) -> int:
    """How many of the prompts that the headline's generators read stand in the context of that arm."""
    results = evaluation.results
    read, limit = results.generator(results.condition).prompts, results.evaluation["in_context_examples"]
    return min(read, limit) if isinstance(limit, int) else read


def sample_note(evaluations: Sequence[Evaluation]) -> str:
    """The n, the held-out adapters and the meaning of the intervals, for a figure's last line."""
    notes = []
    for one in evaluations:
        counts = sorted({task.items for task in one.results.tasks})
        cases = sum(cases_of_a_task(one).values())
        weak = weak_teachers(one, names(one))
        of_them = f" ({len(weak)} of them no better than the base)" if weak else ""
        name = f"{one.results.model}: " if len(evaluations) > 1 else ""
        notes.append(
            f"{name}n = {'/'.join(map(str, counts))} test items a task, {cases} held-out adapter{'s' * (cases > 1)}"
            f"{of_them}"
        )
    return f"{'; '.join(notes)}. 95 % intervals over {resampled(evaluations)}."


def resampled(evaluations: Sequence[Evaluation]) -> str:
    """What the intervals of scores are over, and of what there is but one: items, held-out adapters, seeds."""
    cases = max((count for one in evaluations for count in cases_of_a_task(one).values()), default=0)
    seeds = max(len({s.seed for s in one.results.selections}) for one in evaluations)
    counts = {"held-out adapter": (cases, " a task"), "generator seed": (seeds, "")}
    several = [f"{count} {what}s{of}" for what, (count, of) in counts.items() if count > 1]
    alone = [f"one {what}{of}" for what, (count, of) in counts.items() if count == 1]
    over = ["items", *several]
    listed = " and ".join([", ".join(over[:-1]), over[-1]] if several else over)
    return "; ".join([listed, *([", ".join(alone)] if alone else [])])


def cases_of_a_task(evaluation: Evaluation) -> Counter[str]:
    """How many held-out adapters each task has."""
    found = {(m.task, m.shard, m.teacher_seed) for m in evaluation.results.measurements if m.shard is not None}
    return Counter(task for task, _, _ in found)
