"""Tables and section: they agree with the evaluation, and say plainly whether generation beats retrieval."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from stillhouse.evaluation.statistics import paired_difference_over_seeds, wilson_interval
from stillhouse.runtime.errors import UserError
from stillhouse.studies.lora_generation.comparisons import (
    accuracy,
    behaviour_pairs,
    compare,
    groups,
    load_evaluations,
    nearer,
    sample_note,
    values,
)
from stillhouse.studies.lora_generation.report import ReportStep, behaviour, main
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
    results.write_text("{}")
    with pytest.raises(UserError, match=r"results\.json: is not a result of this version"):
        load_evaluations([results])
