"""Step program: the study's tables, and its section of the results page, which says whether generation beats retrieval.

Every sentence about an outcome is computed. Links are relative to `results/`, where the page lies.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from stillhouse.reporting.steps import ReportStep
from stillhouse.reporting.style import Interval
from stillhouse.reporting.tables import Table, format_estimate, write_table
from stillhouse.runtime.commands import run_step
from stillhouse.runtime.files import atomic_write_text, staged_directory
from stillhouse.studies.lora_generation.comparisons import (
    GROUPS,
    Comparison,
    arms,
    behaviour_pairs,
    compare,
    groups,
    in_context_examples,
    load_evaluations,
    names,
    nearer,
    resampled,
    seconds,
    weak_teachers,
)
from stillhouse.studies.lora_generation.config import Arm
from stillhouse.studies.lora_generation.results import Evaluation
from stillhouse.studies.lora_generation.sweeps import sweeps
from stillhouse.studies.lora_generation.tables import all_tables

FIGURES = {
    "accuracy": "Every arm on every task",
    "delta_map": "Adapters by delta activation, and by weights",
    "ablation": "Generators by what their loss weighs",
    "cosine": "How near each arm's adapter comes to the teacher",
    "training": "Training curves of the generators",
}
QUESTION = (
    "Can a network that reads a handful of a task's prompts write LoRA weights that make the base model behave like "
    "one trained on that task, and does it help to supervise behaviour (delta activations: what an adapter does to the "
    "last state on fixed probe texts) and not weights alone? Teacher adapters are trained on disjoint shards of "
    "several tasks; a generator learns from some of them and is asked for adapters of shards, and of whole tasks, that "
    "it has never seen. The honest bar is retrieval: the training adapter whose prompts are nearest."
)
CORRECTIONS = (
    "The delta activations of teachers and generated adapters use the same probes, formatting and length; evaluation "
    "reads them from the cache's own record.",
    "No narrow pattern is repeated over a matrix and no tensor is left out, so that a decoder can meet any one teacher "
    "adapter (measured in docs/protocol.md); that it can meet many at once is not said.",
    "Nothing is compared with adapters that it has learnt from: cases are held-out shards and held-out tasks.",
    "Prompts that stand for a task come from its train split and are never scored.",
)
# By the choice that repeats a mistake: what is said of a run without it, and of one that has it, with the conditions
# that do where it is a generator's own.
MISTAKES = {
    "matrices": (
        "Where weights are in the loss, they are compared as B A alpha/r: two adapters that differ in their factors "
        "alone are equal.",
        "generators of {} learn from the squared error of standardised A and B, to which another factorisation of the "
        "same adapter is an error; the tables' error of ΔW is that of B A alpha/r all the same.",
    ),
    "zero": (
        "Generators give deviations from the mean of the adapters that they learn from.",
        "generators of {} begin at no adapter at all, and learn what all adapters have in common.",
    ),
    "cosine_alone": (
        "Where delta activations are in the loss, their size is too: by the cosine alone, an adapter of any size would "
        "do.",
        "generators of {} learn from the cosine of delta activations alone, by which an adapter of any size would do.",
    ),
    "checkpoints": (
        "Each teacher adapter is the end of a run on its own shard or with its own seed.",
        "teacher adapters are consecutive checkpoints of each run, and neighbours are nearly one adapter.",
    ),
    "all_tokens": (
        "Teachers learn the answers' tokens.",
        "teachers learn every token of prompt and answer.",
    ),
    "last": (
        "The checkpoint that is scored has the lowest loss on validation shards.",
        "the last checkpoint is scored; no validation shard chooses it.",
    ),
}
COSTS: dict[Arm, str] = {"few_prompt_lora": "training on the prompts", "teacher": "training a teacher"}
VERDICTS = {
    "better": "**beat** {}",
    "worse": "**do not beat** {}; they are worse",
    "undecided": "**do not beat** {}: the interval includes zero",
}
NLL_VERDICTS = {
    "better": "lower, and so better",
    "worse": "higher, and so worse",
    "undecided": "lower would be better; the interval includes zero",
}


def main(step: ReportStep) -> None:
    """Write the tables and the section."""
    evaluations = load_evaluations(step.results)
    tables = all_tables(evaluations)
    with staged_directory(step.tables) as directory:
        for table in [*tables, *sweeps(evaluations).tables()]:
            write_table(table, directory)
    atomic_write_text(step.section, section(evaluations, tables))


def section(evaluations: Sequence[Evaluation], tables: Sequence[Table]) -> str:
    """The study's section in Markdown."""
    shown = {table.name: table.to_markdown() for table in tables}
    links = "\n".join(f"![{text}](figures/lora_generation/{name}.png)\n" for name, text in FIGURES.items())
    parts = [
        "## LoRA generation",
        QUESTION,
        "### Do generated adapters beat retrieval?",
        _listed(finding for one in evaluations for finding in findings(one)),
        links,
        "### Every arm",
        shown["arms"],
        f"<details><summary>Generated minus every other arm</summary>\n\n{shown['paired']}\n</details>",
        "### Does supervising behaviour beat supervising weights?",
        _listed(finding for one in evaluations for finding in behaviour(one)),
        shown["ablation"],
        shown["clusters"],
        f"<details><summary>Every teacher adapter</summary>\n\n{shown['teachers']}\n</details>",
        *sweeps(evaluations).section(),
        "### Data, models and protocol",
        _listed(note for one in evaluations for note in notes(one)),
        _listed([*CORRECTIONS, *protocol(evaluations)]),
        "The same tables as CSV and LaTeX: [tables/lora_generation](tables/lora_generation).",
    ]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def findings(one: Evaluation) -> Iterator[str]:
    """What the generated adapters are worth beside retrieval and training, by group."""
    name = f"`{one.results.model}`"
    if "generated" not in arms(one, names(one)):
        yield f"{name}: the generated arm was not run."
        return
    for group, tasks in groups(one).items():
        scored = arms(one, tasks)
        where = f"{name}, {GROUPS[group]} ({', '.join(tasks)})"
        if "nearest_adapter" not in scored:
            yield f"{where}: retrieval was not run, so that generated adapters have no bar."
            continue
        sentences = [f"{where}: {beside_retrieval(one, tasks)}"]
        for arm, words in (
            ("base", "the base"),
            ("teacher", "the teacher"),
            ("few_prompt_lora", "a LoRA on the prompts"),
        ):
            if arm in scored:
                other = compare(one, tasks, arm)
                sentences.append(f"Against {words}: {_points(other.accuracy)}.")
        if (own := seconds(one, tasks, "generated")) is not None:
            sentences.append(f"Making one takes {own:.2f} s" + _beside(one, tasks) + ".")
        yield " ".join(sentences)
    yield from other_conditions(one)
    if weak := weak_teachers(one, names(one)):
        yield (
            f"{name}: held-out teachers that are no better than the base on their own task bound nothing from above, "
            f"and to come near to them is no merit: {', '.join(weak)}."
        )


def beside_retrieval(one: Evaluation, tasks: Sequence[str], condition: str | None = None) -> str:
    """Whether a condition's generated adapters beat retrieval, with both differences."""
    return f"generated adapters {_judged(compare(one, tasks, 'nearest_adapter', condition), 'retrieval')}."


def other_conditions(one: Evaluation) -> Iterator[str]:
    """What the generators of the other conditions are worth beside retrieval."""
    for facts in one.results.generators:
        for group, tasks in groups(one, facts.condition).items():
            if facts.condition != one.results.condition and "nearest_adapter" in arms(one, tasks):
                where = f"`{one.results.model}`, `{facts.condition}`, {GROUPS[group]} ({', '.join(tasks)})"
                yield f"{where}: {beside_retrieval(one, tasks, facts.condition)}"


def behaviour(one: Evaluation) -> Iterator[str]:
    """Whether generators that are led by delta activations beat those that are led by weights alone."""
    name, pairs = f"`{one.results.model}`", behaviour_pairs(one)
    if not pairs:
        yield f"{name}: no two generators that differ in nothing but what leads them were scored: the question is open."
    for led, rival in pairs:
        for group, tasks in groups(one, led).items():
            near, found = nearer(one, tasks, led, rival), compare(one, tasks, "generated", led, rival)
            yield (
                f"{name}, {GROUPS[group]} ({', '.join(tasks)}): adapters of `{led}`, led by delta activations, "
                f"{_judged(found, f'those of `{rival}`, led by weights alone')}; "
                f"cosine to the teacher's delta activation {format_estimate(near)} (n = {near.n} held-out adapters)."
            )


def notes(one: Evaluation) -> Iterator[str]:
    """What was used, and what became of every adapter."""
    results = one.results
    flagged = [row.name for row in results.adapters if row.flagged]
    headline = results.generator(results.condition)
    use = "left out of" if results.flagged == "exclude" else "used in"
    yield f"`{results.model}`: {results.model_note or 'base model of the catalogue'}."
    for task in results.tasks:
        what = f"{task.task}: data set `{task.dataset}`, {task.items} test items, prompts of style `{task.style}`"
        yield f"{what}{task.dataset_note and f' ({task.dataset_note})'}."
    yield (
        f"{len(results.adapters)} teacher adapters, {len(flagged)} of them no better than the base on their own task "
        f"(by {results.adapters[0].better_by}) and {use} training" + (f": {', '.join(flagged)}." if flagged else ".")
    )
    contexts = "in_context" in arms(one, names(one))
    shown = f" The in-context arm shows {in_context_examples(one)} of these prompts." if contexts else ""
    yield (
        f"Headline: `{results.condition}`, {headline.kind} decoder of {headline.parameters:,} parameters, which reads "
        f"{headline.prompts} prompts and learns from {headline.adapters} adapters; held-out tasks: "
        f"{headline.held_out.replace('+', ', ') or 'none'}.{shown} Delta activations: {results.probe_texts} "
        f"{results.probes} probes, fp32."
    )


def protocol(evaluations: Sequence[Evaluation]) -> Iterator[str]:
    """What differs from the published protocol where a setting decides, and where this run follows it."""
    repeated = repeated_mistakes(evaluations)
    for mistake, (corrected, mistaken) in MISTAKES.items():
        if mistake in repeated:
            yield f"**As published:** {mistaken.format(', '.join(f'`{name}`' for name in repeated[mistake]))}"
        else:
            yield corrected
    yield (
        f"Every score has its n and a 95 % interval over {resampled(evaluations)}. Comparisons are paired on the same "
        "items, p-values adjusted for their number."
    )


def repeated_mistakes(evaluations: Sequence[Evaluation]) -> dict[str, list[str]]:
    """The mistakes of the published protocol that the run repeats, each with the conditions that do."""
    results = [one.results for one in evaluations]
    generators = [facts for one in results for facts in one.generators]
    of_generators = {
        "matrices": [one for one in generators if one.weight and one.weight_kind == "matrices"],
        "zero": [one for one in generators if one.start == "zero"],
        "cosine_alone": [one for one in generators if one.delta and one.delta_kind == "cosine" and not one.norm],
    }
    of_runs = {
        "checkpoints": any(len({row.step for row in one.adapters}) > 1 for one in results),
        "all_tokens": any(one.loss_tokens == "all" for one in results),
        "last": any(one.evaluation["selection"] == "last" for one in results),
    }
    return {
        **{name: list(dict.fromkeys(one.condition for one in those)) for name, those in of_generators.items() if those},
        **{name: [] for name, is_so in of_runs.items() if is_so},
    }


def _judged(found: Comparison, rival: str) -> str:
    """Whether generated adapters beat a rival, with both differences."""
    return (
        f"{VERDICTS[found.verdict].format(rival)}: accuracy {_points(found.accuracy)} (paired, "
        f"n = {found.accuracy.n}); NLL of the right answers {format_estimate(found.gold_nll, 3)} nats per token "
        f"({NLL_VERDICTS[found.nll_verdict]})"
    )


def _beside(one: Evaluation, tasks: Sequence[str]) -> str:
    """What the alternatives with training cost."""
    found = {words: seconds(one, tasks, arm) for arm, words in COSTS.items() if arm in arms(one, tasks)}
    return "".join(f", {words} {cost:.1f} s" for words, cost in found.items() if cost is not None)


def _points(estimate: Interval) -> str:
    return f"{format_estimate(estimate, 1, 100)} points"


def _listed(sentences: Iterable[str]) -> str:
    return "\n".join(f"- {sentence}" for sentence in sentences)


if __name__ == "__main__":
    run_step(ReportStep, main)
