"""Tables and section: they agree with the evaluation, and say plainly whether generation beats retrieval."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from stillhouse.evaluation.statistics import wilson_interval
from stillhouse.runtime.errors import UserError
from stillhouse.studies.lora_generation.comparisons import accuracy, compare, groups, load_evaluations, values
from stillhouse.studies.lora_generation.report import ReportStep, main
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
    assert "cosine to the teacher's delta activation: multi_task 0.80 (n = 4), weight_only 0.50 (n = 4)" in section


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
    section = report_of(tmp_path, write_fake_evaluation(tmp_path, flagged=True))
    assert "10 teacher adapters, 2 of them no better than the base on their own task (by accuracy) and left out of" in (
        section
    )
    assert "apples/shard_1-seed_42/step_9, rivers/shard_1-seed_42/step_9" in section


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
