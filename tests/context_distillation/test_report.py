"""The study's section: tables that agree with the evaluation, and sentences that follow from the numbers."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from stillhouse.config.evaluation import EngineSettings
from stillhouse.runtime.commands import parse_settings
from stillhouse.studies.context_distillation import report
from stillhouse.studies.context_distillation.config import EvaluationSettings
from stillhouse.studies.context_distillation.results import load_evaluation
from tests.context_distillation.fake_results import EFFECTS, Effect, fake_evaluation


def make(directory: Path, *results: Path) -> str:
    """Run the step as the workflow does; returns the section."""
    paths = ",".join(map(str, results))
    arguments = [f"results=[{paths}]", f"section={directory / 'section.md'}", f"tables={directory / 'tables'}"]
    report.main(parse_settings(report.ReportStep, arguments))
    return (directory / "section.md").read_text(encoding="utf-8")


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def test_the_tables_agree_with_the_evaluation(tmp_path: Path) -> None:
    path = fake_evaluation(tmp_path / "evaluation")
    make(tmp_path, path)
    results = load_evaluation(path).results
    table = {row["condition"]: row for row in rows(tmp_path / "tables" / "headline.csv")}
    assert list(table)[:3] == ["base, zero-shot", "base, 4-shot", "base, 8-shot"]
    for measurement in results.headline("test"):
        if measurement.step:
            row = table[measurement.condition]
            assert int(row["step"]) == measurement.step
            assert float(row["gold_nll"]) == pytest.approx(measurement.gold_nll.value, abs=1e-5)
            assert measurement.strict is not None
            assert row["strict_count"] == f"{measurement.strict.count} / {measurement.strict.n}"
            assert measurement.finished is not None
            assert float(row["finished"]) == pytest.approx(measurement.finished.value, abs=1e-5)
    assert len(rows(tmp_path / "tables" / "checkpoints.csv")) == 2 * 4
    for table_name in ("headline", "icl_gap", "paired", "checkpoints"):  # every number has its n
        for row in rows(tmp_path / "tables" / f"{table_name}.csv"):
            assert int(row["items"]) >= int(row["answers"]) > 0
    assert [row["shots"] for row in rows(tmp_path / "tables" / "icl_gap.csv")] == ["0", "4", "8"]
    assert {file.suffix for file in (tmp_path / "tables").iterdir()} == {".csv", ".tex", ".md"}
    for file in (tmp_path / "tables").glob("*.tex"):
        assert "not comparable with published numbers" in file.read_text()


def test_a_real_difference_is_reported_as_one(tmp_path: Path) -> None:
    section = make(tmp_path, fake_evaluation(tmp_path / "evaluation"))
    clause = next(line for line in section.splitlines() if "`online_v1` minus `baseline`" in line)
    assert "gold NLL -0.0" in clause and "n = 40; the interval excludes zero" in clause
    assert "figures/context_distillation/summary.png" in section
    assert "not comparable with published numbers" in section


def test_no_difference_is_reported_as_none(tmp_path: Path) -> None:
    same = dict(EFFECTS) | {"online_v1": EFFECTS["baseline"]}
    section = make(tmp_path, fake_evaluation(tmp_path / "evaluation", effects=same, test_items=12))
    clause = next(line for line in section.splitlines() if "`online_v1` minus `baseline`" in line)
    assert "strict accuracy" in clause and "the interval includes zero" in clause


def test_a_harmful_method_is_not_praised(tmp_path: Path) -> None:
    worse = dict(EFFECTS) | {"online_v1": Effect(-0.05, 0.3, 0.0)}
    section = make(tmp_path, fake_evaluation(tmp_path / "evaluation", effects=worse))
    clause = next(line for line in section.splitlines() if "`online_v1` minus `baseline`" in line)
    assert "gold NLL 0.1" in clause and "the interval excludes zero" in clause


def test_published_behaviour_is_named_where_a_run_follows_it(tmp_path: Path) -> None:
    settings = EvaluationSettings(
        engine=EngineSettings(kind="transformers"), scorer="as_published", selection="best_on_test"
    )
    mistakes = {"one_late": ("online_v1", "kl_t1"), "shuffled_answers_as_published": ("shuffled_answers",)}
    section = make(tmp_path, fake_evaluation(tmp_path / "evaluation", settings=settings, repeated_mistakes=mistakes))
    assert section.count("**As published:**") == 4
    assert "`online_v1`, `kl_t1` distil the logits one position late" in section and "derangement" not in section
    corrected = make(tmp_path, fake_evaluation(tmp_path / "other"))
    assert "**As published:**" not in corrected and "is a derangement" in corrected
    assert "cut at 512 new tokens" in corrected


def test_examples_that_were_left_out_are_counted(tmp_path: Path) -> None:
    assert "left out" not in make(tmp_path, fake_evaluation(tmp_path / "none"))
    section = make(tmp_path, fake_evaluation(tmp_path / "some", skipped={"online_v1": 1200}))
    assert "Training examples over the limit of tokens were left out: 1,200 by `online_v1`." in section


def test_several_seeds_and_models_share_the_tables(tmp_path: Path) -> None:
    one = fake_evaluation(tmp_path / "one")
    two = fake_evaluation(tmp_path / "two", model="qwen3_1p7b", seeds=(1, 2))
    make(tmp_path, one, two)
    table = rows(tmp_path / "tables" / "headline.csv")
    seeds = {(row["model"], row["condition"]): row["seeds"] for row in table}
    assert seeds["smollm2_135m", "online_v1"] == "1"
    assert seeds["qwen3_1p7b", "online_v1"] == "2"
    assert seeds["qwen3_1p7b", "base, zero-shot"] == "1"


@pytest.mark.parametrize("conditions", [("base_zero_shot",), ("online_v1",), ("baseline",)])
def test_the_smallest_configuration_has_a_section(conditions: tuple[str, ...], tmp_path: Path) -> None:
    section = make(tmp_path, fake_evaluation(tmp_path / "evaluation", conditions=conditions))
    assert "was not run" in section


def test_the_report_is_the_same_when_it_is_remade(tmp_path: Path) -> None:
    path = fake_evaluation(tmp_path / "evaluation")
    assert make(tmp_path / "a", path) == make(tmp_path / "b", path)
