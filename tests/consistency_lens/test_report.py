"""The study's section: tables that agree with the evaluation, and sentences that follow from the numbers."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from stillhouse.runtime.commands import parse_settings
from stillhouse.studies.consistency_lens import report
from stillhouse.studies.consistency_lens.results import CONTROLS, LENS, load_evaluation
from tests.consistency_lens.fake_results import TRUTH, fake_evaluation


def make(directory: Path, *results: Path) -> str:
    """Run the step as the workflow does; returns the section."""
    paths = ",".join(map(str, results))
    arguments = [f"results=[{paths}]", f"section={directory / 'section.md'}", f"tables={directory / 'tables'}"]
    report.main(parse_settings(report.ReportStep, arguments))
    return (directory / "section.md").read_text(encoding="utf-8")


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def finding(section: str) -> str:
    """The sentence on the one lens."""
    return next(line for line in section.splitlines() if line.startswith("- `smollm2_135m`, `lens`"))


def test_the_tables_agree_with_the_evaluation(tmp_path: Path) -> None:
    path = fake_evaluation(tmp_path / "evaluation")
    make(tmp_path, path)
    results = load_evaluation(path).results
    [lens] = results.headline()
    [row] = rows(tmp_path / "tables" / "lenses.csv")
    assert float(row["kl"]) == pytest.approx(lens.kl.value, rel=1e-5)
    assert float(row["recovered"]) == pytest.approx(lens.recovered_from_mean.value, rel=1e-5)
    assert float(row["mse"]) == pytest.approx(lens.mse.value, rel=1e-5)
    assert row["step"] == "20" and row["n"] == "40"
    controls = rows(tmp_path / "tables" / "controls.csv")
    assert len(controls) == 1 + len(CONTROLS)
    assert controls[0]["difference"] == controls[0]["p"] == ""
    for control, variant in zip(controls, (LENS, *CONTROLS), strict=True):
        [measured] = results.headline(variant)
        assert float(control["mse"]) == pytest.approx(measured.mse.value, rel=1e-5), variant
    assert len(rows(tmp_path / "tables" / "best_of_k.csv")) == 3
    assert [row["chosen"] for row in rows(tmp_path / "tables" / "checkpoints.csv")] == ["", "chosen"]
    assert {file.suffix for file in (tmp_path / "tables").iterdir()} == {".csv", ".tex", ".md"}


def test_text_that_carries_the_activation_is_said_to(tmp_path: Path) -> None:
    text = finding(make(tmp_path, fake_evaluation(tmp_path / "evaluation")))
    assert "**Yes, in part:" in text and "regression on the input text does better than the lens" in text
    assert "The order of the words matters (+0." in text and "collapsed" not in text


@pytest.mark.parametrize("variant", ["other_explanation", "hard_coded", "text_continuation"])
def test_a_lens_that_a_text_without_the_activation_equals_is_not_praised(variant: str, tmp_path: Path) -> None:
    truth = dict(TRUTH) | {variant: TRUTH["lens"]}
    text = finding(make(tmp_path, fake_evaluation(tmp_path / "evaluation", truth=truth)))
    assert "**Not shown:" in text and "**Yes" not in text


def test_a_lens_no_better_than_the_mean_says_nothing(tmp_path: Path) -> None:
    truth = dict(TRUTH) | {"lens": (2.4, 1.3)}
    text = finding(make(tmp_path, fake_evaluation(tmp_path / "evaluation", truth=truth)))
    assert "**No: the reconstruction is not measurably better than the mean activation" in text
    assert "recovers -" in text


def test_a_collapsed_decoder_is_named(tmp_path: Path) -> None:
    text = finding(make(tmp_path, fake_evaluation(tmp_path / "evaluation", collapsed=True)))
    assert "The decoder has collapsed: only 2% of its texts are different." in text


def test_words_in_any_order_are_called_a_bag_of_words(tmp_path: Path) -> None:
    truth = dict(TRUTH) | {"shuffled": TRUTH["lens"]}
    text = finding(make(tmp_path, fake_evaluation(tmp_path / "evaluation", truth=truth, items=12)))
    assert "a bag of words" in text


def test_published_behaviour_is_named_where_a_run_follows_it(tmp_path: Path) -> None:
    published = fake_evaluation(tmp_path / "evaluation", language_model_positions="one_late")
    assert "**As published:** the language-model term" in make(tmp_path, published)
    assert "**As published:**" not in make(tmp_path, fake_evaluation(tmp_path / "other"))


def test_scores_on_the_choosing_documents_are_said_to_flatter(tmp_path: Path) -> None:
    section = make(tmp_path, fake_evaluation(tmp_path / "evaluation", split="validation"))
    assert "which it is scored on too: that flatters it" in section


def test_several_seeds_layers_and_models_share_the_tables(tmp_path: Path) -> None:
    one = fake_evaluation(tmp_path / "one")
    two = fake_evaluation(tmp_path / "two", model="gpt2", layers={"lens+layer-3": 3, "lens+layer-6": 6}, seeds=(1, 2))
    section = make(tmp_path, one, two)
    table = rows(tmp_path / "tables" / "lenses.csv")
    assert [(row["model"], row["layer"], row["step"]) for row in table] == [
        ("smollm2_135m", "6", "20"),
        ("gpt2", "3", "20, 20"),
        ("gpt2", "6", "20, 20"),
    ]
    assert "variance_by_layer.png" in section
    assert "consistency_lens/gpt2/samples.html" in section
    assert "variance_by_layer.png" not in make(tmp_path / "alone", one)


def test_the_report_is_the_same_when_it_is_remade(tmp_path: Path) -> None:
    path = fake_evaluation(tmp_path / "evaluation", best_of=())
    assert make(tmp_path / "a", path) == make(tmp_path / "b", path)
    assert "Best of K" not in (tmp_path / "a" / "section.md").read_text()
