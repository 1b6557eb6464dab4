"""The section says what came out; every number of it follows from the items."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from stillhouse.evaluation.statistics import holm
from stillhouse.reporting.steps import ReportStep
from stillhouse.runtime.commands import parse_settings
from stillhouse.studies.quantized_distillation.comparisons import (
    average_accuracy,
    closed_share,
    compare,
    estimate,
    load_evaluations,
    rounded,
    task_measures,
    text_measures,
)
from stillhouse.studies.quantized_distillation.report import main
from stillhouse.studies.quantized_distillation.results import QuantizedEvaluation
from tests.quantized_distillation.fake_results import DISTANCES, ITEMS, swept, write_evaluation


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_evaluation(tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def evaluation(results: Path) -> QuantizedEvaluation:
    return load_evaluations([results])[0]


@pytest.fixture(scope="module")
def made(results: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the section and the tables of one evaluation."""
    folder = tmp_path_factory.mktemp("made")
    make(results, folder)
    return folder


def table(folder: Path, name: str) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / f"tables/{name}.csv").open()))


def make(results: Path, folder: Path) -> str:
    arguments = [f"results=[{results}]", f"section={folder / 'section.md'}", f"tables={folder / 'tables'}"]
    main(parse_settings(ReportStep, arguments))
    return (folder / "section.md").read_text()


def test_the_section_says_damage_recovery_and_what_was_not_run(made: Path) -> None:
    text = (made / "section.md").read_text()
    assert "rounding to nearest takes the perplexity of wikipedia from" in text
    for condition in ("gptq", "off_policy", "on_policy"):
        assert f"`{condition}` closed" in text
    assert "`awq` was not run for `tiny`: not among the conditions; llmcompressor's AWQ needs a GPU." in text
    assert "too coarse to test the published difference of 0.3 points" in text
    assert "itself a dequantised file" in text and "arc_easy 1.0" in text
    assert "perplexity_curve.png" in text and "sweep" not in text, "a figure of a sweep that was not run"
    names = {path.stem for path in (made / "tables").glob("*.csv")}
    assert names == {"systems", "texts", "tasks", "recovered", "paired", "gaps"}


def test_every_condition_is_compared_with_its_ptq_and_the_policies_with_each_other(
    made: Path, evaluation: QuantizedEvaluation
) -> None:
    rows = [row for row in table(made, "paired") if row["metric"] == "KL, wikipedia"]
    pairs = [(name, "ptq") for name in ("gptq", "off_policy", "on_policy", "teacher")] + [("on_policy", "off_policy")]
    assert [row["comparison"] for row in rows] == [f"{first} minus {second}" for first, second in pairs]
    compared = [compare(evaluation, *pair, text_measures(evaluation)[1]) for pair in pairs]
    for row, (first, second), found in zip(rows, pairs, compared, strict=True):
        assert found is not None and float(row["difference"]) == pytest.approx(found.difference)
        assert float(row["difference"]) == pytest.approx(45 / 128 * (DISTANCES[first] - DISTANCES[second]), abs=0.05)
        assert (float(row["difference_low"]), float(row["difference_high"])) == pytest.approx((found.low, found.high))
        assert int(row["items"]) == ITEMS["wikipedia"]
    adjusted = holm([found.p_value for found in compared if found])
    assert [float(row["p"]) for row in rows] == pytest.approx(adjusted)
    metrics = {row["metric"] for row in table(made, "paired")}
    assert metrics >= {"NLL, the test answers", "acc, ARC-Easy", "acc_norm, mean accuracy"}


def test_the_gaps_are_those_of_merging_and_of_conversion(made: Path) -> None:
    rows = table(made, "gaps")
    merged, converted = "merged minus beside", "converted minus fake-quantised"
    assert [(row["condition"], row["comparison"]) for row in rows] == [
        (condition, words) for condition in ("off_policy", "on_policy") for words in (merged, converted)
    ]
    for row in rows:
        # Beside the weights the made-up LoRA is a fifth nearer to the teacher; conversion changes nothing.
        distance = 0.2 * DISTANCES[row["condition"]] if row["comparison"] == merged else 0
        assert float(row["kl"]) == pytest.approx(45 / 128 * distance, rel=0.2)
        assert float(row["kl_low"]) <= float(row["kl"]) <= float(row["kl_high"])
        assert float(row["nll"]) == pytest.approx(51 / 128 * distance, rel=0.2)
        assert row["placement"] == "merged"
        assert row["logits"] == ("" if row["comparison"] == merged else "1e-06")


def test_a_sweep_has_a_table_whose_winner_validation_picks(tmp_path: Path) -> None:
    text = make(swept(tmp_path / "results"), tmp_path)
    assert "of 9 points over `grid` validation picks beta = 0, on_policy_share = 0.5." in text
    rows = [row for row in table(tmp_path, "sweep") if row["condition"] == "grid"]
    assert [row["picked"] for row in rows] == ["picked", *[""] * 8]
    assert float(rows[0]["validation"]) == min(float(row["validation"]) for row in rows)


def test_a_corrected_run_says_what_it_does_otherwise_than_published(made: Path) -> None:
    text = (made / "section.md").read_text()
    assert "- Students train what is deployed: LoRA lies inside the rounded weights" in text
    assert "- The checkpoint with the lowest KL to the teacher on validation is deployed;" in text
    assert "95 % intervals over items and 3 seeds." in text
    assert "beside every student in figures and tables: `ptq`, `gptq`." in text
    assert "chosen step has the lowest KL" in text and "is in the table of gaps" in text
    assert "As published" not in text


def test_published_behaviour_is_named_where_a_run_follows_it(tmp_path: Path) -> None:
    distances = {"teacher": 0.0, "off_policy": 0.5, "on_policy": 0.4}
    last, beside = {"selection": "last"}, {"placement": "beside", "selection": "last"}

    def section(**facts: dict[str, str]) -> str:
        made = write_evaluation(tmp_path / "results", distances=distances, facts=facts, seeds=(42,))
        return make(made, tmp_path)

    as_published = section(off_policy=beside, on_policy=beside)
    assert as_published.count("**As published:**") == 2
    assert "**As published:** `off_policy`, `on_policy` learn with LoRA beside the rounded weights" in as_published
    assert "**As published:** the last checkpoint is deployed" in as_published
    assert "train what is deployed" not in as_published and "lowest KL to the teacher" not in as_published
    assert "over items alone: there is one seed" in as_published and "in figures and tables: " not in as_published

    one_beside = section(off_policy=last, on_policy=beside)
    assert "**As published:** `on_policy` learn with LoRA beside" in one_beside
    assert "- `off_policy` train what is deployed: " in one_beside


def test_a_teacher_alone_makes_a_section_without_findings(tmp_path: Path) -> None:
    text = make(write_evaluation(tmp_path / "results", distances={"teacher": 0.0}), tmp_path)
    assert "`ptq` was not run" in text and "` closed" not in text
    assert "train what is deployed" not in text and "checkpoint with" not in text and "over items." in text


def test_perplexity_is_the_exponential_of_nats_per_token(results: Path, evaluation: QuantizedEvaluation) -> None:
    nll = text_measures(evaluation)[0]
    rows = evaluation.rows["ptq", 0, "deployed", "text", "wikipedia"]
    found = estimate(evaluation, "ptq", nll)
    assert found is not None and found.value == pytest.approx(rows["nll"].sum() / rows["tokens"].sum())
    assert found.low < found.value < found.high


def test_the_closed_share_is_one_for_the_teacher_and_zero_for_ptq(evaluation: QuantizedEvaluation) -> None:
    kl = text_measures(evaluation)[1]
    teacher, ptq = closed_share(evaluation, "teacher", kl), closed_share(evaluation, "ptq", kl)
    assert teacher is not None and (teacher.value, teacher.low, teacher.high) == pytest.approx((1, 1, 1))
    assert ptq is not None and (ptq.value, ptq.low, ptq.high) == pytest.approx((0, 0, 0))
    shares = {name: closed_share(evaluation, name, kl) for name in ("gptq", "off_policy", "on_policy")}
    for name, share in shares.items():
        assert share is not None
        assert share.low < 1 - DISTANCES[name] + 0.05 and share.high > 1 - DISTANCES[name] - 0.05


def test_no_share_is_given_where_rounding_did_no_damage(tmp_path: Path) -> None:
    harmless = write_evaluation(tmp_path, distances={"teacher": 0.0, "ptq": 0.0, "off_policy": 0.0})
    [found] = load_evaluations([harmless])
    assert all(closed_share(found, "off_policy", measure) is None for measure in text_measures(found))


def test_a_format_is_measured_by_its_own_rounding(tmp_path: Path) -> None:
    facts = {name: {"weight_format": "nf4"} for name in ("ptq-nf4", "off_policy+kind-nf4")}
    facts["ptq-nf4"] |= {"checkpoint_step": None, "validation_kl": None}
    distances = {"teacher": 0.0, "ptq": 1.0, "ptq-nf4": 0.5, "off_policy": 0.5, "off_policy+kind-nf4": 0.25}
    [found] = load_evaluations([write_evaluation(tmp_path, distances=distances, facts=facts)])
    assert rounded(found, "off_policy+kind-nf4") == "ptq-nf4"
    assert rounded(found, "off_policy") == "ptq"
    share = closed_share(found, "off_policy+kind-nf4", text_measures(found)[1])
    assert share is not None and share.value == pytest.approx(0.5, abs=0.15)


def test_a_mean_over_tasks_counts_every_task_the_same(evaluation: QuantizedEvaluation) -> None:
    mean = average_accuracy(evaluation)
    single = [one for one in task_measures(evaluation) if len(one.sets) == 1]
    assert mean is not None
    parts = [estimate(evaluation, "on_policy", one) for one in single]
    whole = estimate(evaluation, "on_policy", mean)
    assert whole is not None
    assert whole.value == pytest.approx(np.mean([part.value for part in parts if part is not None]))


def test_differences_of_shares_keep_their_width_where_no_item_differs(evaluation: QuantizedEvaluation) -> None:
    [measure, *_] = task_measures(evaluation)
    same = compare(evaluation, "teacher", "teacher", measure)
    assert same is not None and same.difference == 0 and same.low < 0 < same.high
