"""Tables and section: they agree with the evaluation, and say plainly whether generation beats retrieval."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from stillhouse.evaluation.statistics import paired_difference_over_seeds, wilson_interval
from stillhouse.runtime.errors import UserError
from stillhouse.runtime.files import write_sealed_json
from stillhouse.studies.lora_generation.comparisons import (
    accuracy,
    behaviour_pairs,
    compare,
    groups,
    label,
    load_evaluations,
    nearer,
    sample_note,
    values,
)
from stillhouse.studies.lora_generation.manifest import AdapterRow
from stillhouse.studies.lora_generation.report import MISTAKES, ReportStep, behaviour, main, notes, protocol
from stillhouse.studies.lora_generation.results import Evaluation, ModelResults
from tests.lora_generation.fake_results import ITEMS, RIGHT, write_fake_evaluation


def report_of(directory: Path, results: Path) -> str:
    """The section that is written for an evaluation."""
    main(ReportStep(results=(results,), section=directory / "section.md", tables=directory / "tables"))
    return (directory / "section.md").read_text()


@pytest.mark.parametrize(
    ("share", "sentence"),
    [
        (0.95, "generated adapters **beat** retrieval"),
        (0.525, "generated adapters **do not beat** retrieval: the interval includes zero"),
        (0.05, "generated adapters **do not beat** retrieval; they are worse"),
    ],
)
def test_the_section_says_whether_generated_adapters_beat_retrieval(
    tmp_path: Path, share: float, sentence: str
) -> None:
    section = report_of(tmp_path, write_fake_evaluation(tmp_path, generated=share))
    for group in ("held-out tasks (rivers)", "held-out shards (apples)"):
        assert f"`tiny`, {group}: {sentence}" in section
        assert f"`tiny`, `weight_only`, {group}: {sentence}" in section


@pytest.mark.parametrize(
    ("by_behaviour", "by_weights", "verdict", "accuracy"),
    [
        (0.95, 0.5, "**beat** {}", "45.0 ["),
        (0.95, 1.0, "**do not beat** {}: the interval includes zero", "-5.0 ["),
        (0.5, 0.95, "**do not beat** {}; they are worse", "-45.0 ["),
    ],
)
def test_the_section_says_whether_supervising_behaviour_beats_supervising_weights(
    tmp_path: Path, by_behaviour: float, by_weights: float, verdict: str, accuracy: str
) -> None:
    section = report_of(tmp_path, write_fake_evaluation(tmp_path, by_behaviour, weight_only=by_weights))
    outcome = verdict.format("those of `weight_only`, led by weights alone")
    for group in ("held-out tasks (rivers)", "held-out shards (apples)"):
        [line] = [line for line in section.splitlines() if line.startswith(f"- `tiny`, {group}: adapters of")]
        assert f"adapters of `multi_task`, led by delta activations, {outcome}: accuracy {accuracy}" in line
        assert f"(paired, n = {ITEMS}); NLL of the right answers" in line
        assert line.endswith("cosine to the teacher's delta activation 0.30 [-0.34, 0.94] (n = 2 held-out adapters).")


def test_conditions_are_compared_on_the_same_replicates_and_items(tmp_path: Path) -> None:
    [one] = load_evaluations([write_fake_evaluation(tmp_path, weight_only=0.5)])
    assert behaviour_pairs(one) == [("multi_task", "weight_only")]
    led, alone = (values(one, ["rivers"], "generated", "gold_nll", name) for name in ("multi_task", "weight_only"))
    tokens = values(one, ["rivers"], "generated", "gold_tokens")[0]
    expected = paired_difference_over_seeds(led, alone, tokens)
    found = compare(one, ["rivers"], "generated", "multi_task", "weight_only")
    assert (found.gold_nll.value, found.gold_nll.low, found.gold_nll.high) == pytest.approx(
        (expected.difference, expected.low, expected.high)
    )
    assert found.nll_verdict == found.verdict == "better" and found.gold_nll.n == ITEMS


def test_only_generators_that_differ_in_what_leads_them_answer_the_question(tmp_path: Path) -> None:
    [one] = load_evaluations([write_fake_evaluation(tmp_path)])
    led, alone = one.results.generators
    for change in ({"apart_from_losses": "1"}, {"weight_kind": "matrices"}, {"delta": 0.1}):
        other = one.results.model_copy(update={"generators": (led, alone.model_copy(update=change))})
        [sentence] = behaviour(replace(one, results=other))
        assert sentence.endswith("the question is open.")


def test_one_case_leaves_the_cosines_undecided(tmp_path: Path) -> None:
    [one] = load_evaluations([write_fake_evaluation(tmp_path)])
    kept = tuple(m for m in one.results.measurements if m.shard != 4)
    alone = replace(one, results=one.results.model_copy(update={"measurements": kept}))
    found = nearer(alone, ["rivers"], "multi_task", "weight_only")
    assert (found.value, found.low, found.high, found.n) == (pytest.approx(0.25), -2, 2, 1)


def test_tables_hold_every_arm_condition_and_adapter(tmp_path: Path) -> None:
    report_of(tmp_path, write_fake_evaluation(tmp_path))
    tables = {path.stem: pd.read_csv(path) for path in (tmp_path / "tables").glob("*.csv")}
    arms = tables["arms"].set_index(["task", "arm"])
    assert len(arms) == 2 * 8
    assert arms.loc[("rivers", "base"), "accuracy"] == pytest.approx(RIGHT["base"])
    assert arms.loc[("rivers", "generated"), "cases"] == 4
    assert pd.isna(arms.loc[("rivers", "prompts in context"), "cosine"])
    assert len(tables["paired"]) == 2 * 2 * 7
    assert len(tables["ablation"]) == 2 * 2
    assert len(tables["teachers"]) == 10
    difference = tables["paired"].query("arm == 'nearest by prompts (retrieval)' and condition == 'multi_task'")
    assert difference["accuracy"].tolist() == pytest.approx([0.45, 0.45])


def test_flagged_teachers_are_named(tmp_path: Path) -> None:
    section = report_of(tmp_path, write_fake_evaluation(tmp_path, flagged=[1]))
    assert "10 teacher adapters, 2 of them no better than the base on their own task (by accuracy) and left out of" in (
        section
    )
    assert "apples/shard_1-seed_42/step_9, rivers/shard_1-seed_42/step_9" in section
    assert "bound nothing" not in section and "teacher (upper bound)" in section


def test_a_flagged_teacher_is_named_where_it_serves_as_upper_bound(tmp_path: Path) -> None:
    results = write_fake_evaluation(tmp_path, flagged=[3])
    section = report_of(tmp_path, results)
    assert "`tiny`: held-out teachers that are no better than the base on their own task bound nothing" in section
    assert "is no merit: apples/shard_3-seed_42/step_9, rivers/shard_3-seed_42/step_9." in section
    tables = {name: pd.read_csv(tmp_path / f"tables/{name}.csv") for name in ("arms", "paired")}
    for table in tables.values():
        assert "teacher (1 no better than the base)" in set(table["arm"])
        assert "teacher (upper bound)" not in set(table["arm"])
    assert "4 held-out adapters (2 of them no better than the base)" in sample_note(load_evaluations([results]))


def changed(one: Evaluation, generator: dict[str, Any] | None = None, **results: Any) -> Evaluation:
    """The evaluation with other facts: of its second generator, or of the whole run."""
    if generator:
        first, second = one.results.generators
        results["generators"] = (first, second.model_copy(update=generator))
    return replace(one, results=one.results.model_copy(update=results))


def checkpoints_of_runs(results: ModelResults) -> tuple[AdapterRow, ...]:
    """The adapters with an earlier step of the first one's run among them."""
    return (results.adapters[0].model_copy(update={"step": 4}), *results.adapters)


FOLLOWED: dict[str, Callable[[Evaluation], Evaluation]] = {
    "matrices": lambda one: changed(one, {"weight_kind": "matrices"}),
    "zero": lambda one: changed(one, {"start": "zero"}),
    "cosine_alone": lambda one: changed(one, {"delta": 1.0, "delta_kind": "cosine", "norm": 0.0}),
    "checkpoints": lambda one: changed(one, adapters=checkpoints_of_runs(one.results)),
    "all_tokens": lambda one: changed(one, loss_tokens="all"),
    "last": lambda one: changed(one, evaluation=one.results.evaluation | {"selection": "last"}),
}


def test_the_corrected_protocol_is_described_as_such(tmp_path: Path) -> None:
    section = report_of(tmp_path, write_fake_evaluation(tmp_path))
    assert "As published" not in section
    for corrected, _ in MISTAKES.values():
        assert f"- {corrected}\n" in section


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_run_that_follows_the_published_protocol_is_said_to(tmp_path: Path, mistake: str) -> None:
    [one] = load_evaluations([write_fake_evaluation(tmp_path)])
    corrected, mistaken = MISTAKES[mistake]
    sentences = list(protocol([FOLLOWED[mistake](one)]))
    assert f"**As published:** {mistaken.format('`weight_only`')}" in sentences
    assert corrected not in sentences
    assert sum(sentence.startswith("**As published") for sentence in sentences) == 1


@pytest.mark.parametrize(
    "unread",
    [
        {"weight": 0.0, "weight_kind": "matrices", "delta": 1.0},
        {"delta": 0.0, "delta_kind": "cosine", "norm": 0.0},
        {"delta": 1.0, "delta_kind": "cosine", "norm": 0.1},
    ],
)
def test_what_no_loss_weighs_is_no_mistake(tmp_path: Path, unread: dict[str, Any]) -> None:
    [one] = load_evaluations([write_fake_evaluation(tmp_path)])
    assert not any("As published" in sentence for sentence in protocol([changed(one, unread)]))


@pytest.mark.parametrize(
    ("cases", "seeds", "over"),
    [
        ((3,), (42,), "items; one held-out adapter a task, one generator seed"),
        ((3, 4), (42,), "items and 2 held-out adapters a task; one generator seed"),
        ((3,), (42, 7), "items and 2 generator seeds; one held-out adapter a task"),
        ((3, 4), (42, 7), "items, 2 held-out adapters a task and 2 generator seeds"),
    ],
)
def test_page_tables_and_figures_say_what_their_intervals_are_over(
    tmp_path: Path, cases: tuple[int, ...], seeds: tuple[int, ...], over: str
) -> None:
    results = write_fake_evaluation(tmp_path, cases=cases, seeds=seeds)
    section = report_of(tmp_path, results)
    assert f"a 95 % interval over {over}. Comparisons are paired" in section
    assert section.count(f"95 % intervals over {over}.") == 2
    assert f"95 % intervals, unadjusted, over {over}." in section
    assert sample_note(load_evaluations([results])).endswith(f"95 % intervals over {over}.")


@pytest.mark.parametrize(
    ("limit", "name", "shown"),
    [(None, "prompts in context", 8), (9, "prompts in context", 8), (3, "prompts in context (3 of 8)", 3)],
)
def test_fewer_prompts_in_context_than_the_generator_reads_are_named(
    tmp_path: Path, limit: int | None, name: str, shown: int
) -> None:
    [one] = load_evaluations([write_fake_evaluation(tmp_path)])
    one = changed(one, evaluation=one.results.evaluation | {"in_context_examples": limit})
    assert label(one, ["rivers"], "in_context") == name
    assert any("reads 8 prompts" in note and f"shows {shown} of these" in note for note in notes(one))


def test_arms_are_compared_on_the_same_replicates(tmp_path: Path) -> None:
    [one] = load_evaluations([write_fake_evaluation(tmp_path)])
    assert groups(one) == {"held_out_task": ["rivers"], "held_out_shard": ["apples"]}
    for arm in ("base", "generated", "nearest_adapter"):
        assert values(one, ["rivers", "apples"], arm, "correct").shape == (4, 2 * ITEMS)
    estimate = accuracy(one, ["rivers"], "teacher")
    assert estimate.value == pytest.approx(RIGHT["teacher"])
    wilson = wilson_interval(round(RIGHT["teacher"] * ITEMS), ITEMS)
    assert estimate.low <= wilson.low and estimate.high >= wilson.high
    found = compare(one, ["rivers"], "base")
    assert found.accuracy.value == pytest.approx(0.65) and found.verdict == "better" and found.gold_nll.value < 0


def test_an_evaluation_without_retrieval_says_that_there_is_no_bar(tmp_path: Path) -> None:
    section = report_of(tmp_path, write_fake_evaluation(tmp_path, arms=("base", "generated")))
    assert "retrieval was not run, so that generated adapters have no bar" in section


def test_a_damaged_result_is_named(tmp_path: Path) -> None:
    results = write_fake_evaluation(tmp_path)
    write_sealed_json(results, {})
    with pytest.raises(UserError, match=r"results\.json: is not a result of this version"):
        load_evaluations([results])
