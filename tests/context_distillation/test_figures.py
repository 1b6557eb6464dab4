"""The figures: made for every configuration, the same bytes when remade, from the right items."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest
from pydantic import BaseModel

from stillhouse.reporting.steps import FigureStep
from stillhouse.reporting.style import draw_notice
from stillhouse.runtime.commands import parse_settings
from stillhouse.runtime.errors import UserError
from stillhouse.runtime.files import write_manifest
from stillhouse.studies.context_distillation.comparisons import (
    GOLD_NLL,
    MARKER,
    compare,
    estimate,
    find,
    headline,
    load_evaluations,
    trajectory,
)
from stillhouse.studies.context_distillation.figures import ablation_bars, loss
from tests.context_distillation.fake_results import EFFECTS, fake_evaluation, fake_student

FROM_EVALUATIONS = ("summary", "checkpoint_curve", "ablation_curve", "ablation_bars")
PACKAGE = "stillhouse.studies.context_distillation.figures"


def draw(name: str, output: Path, **inputs: list[Path]) -> tuple[bytes, bytes]:
    """Run a figure as the workflow does; returns its PNG and SVG."""
    module = importlib.import_module(f"{PACKAGE}.{name}")
    settings: type[BaseModel] = loss.LossStep if name == "loss" else FigureStep
    lists = [f"{key}=[{','.join(map(str, paths))}]" for key, paths in inputs.items()]
    module.main(parse_settings(settings, [*lists, f"output={output}"]))
    return output.read_bytes(), output.with_suffix(".svg").read_bytes()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_evaluation(tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def seeded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_evaluation(tmp_path_factory.mktemp("seeds"), model="qwen3_1p7b", seeds=(1, 2, 3))


@pytest.mark.parametrize("name", FROM_EVALUATIONS)
def test_a_figure_has_the_same_bytes_when_it_is_remade(name: str, results: Path, tmp_path: Path) -> None:
    items = [results.parent / "items.parquet"]
    png, svg = draw(name, tmp_path / "a.png", results=[results], item_scores=items)
    assert png.startswith(b"\x89PNG") and b"<svg" in svg
    assert (png, svg) == draw(name, tmp_path / "b.png", results=[results], item_scores=items)


@pytest.mark.parametrize("name", FROM_EVALUATIONS)
def test_a_figure_shows_several_models_and_seeds(name: str, results: Path, seeded: Path, tmp_path: Path) -> None:
    one, _ = draw(name, tmp_path / "one.png", results=[results])
    two, _ = draw(name, tmp_path / "two.png", results=[results, seeded])
    assert int.from_bytes(two[20:24], "big") > int.from_bytes(one[20:24], "big")  # the PNG's height


@pytest.mark.parametrize("name", FROM_EVALUATIONS)
@pytest.mark.parametrize("conditions", [("base_zero_shot",), ("online_v1",), ("baseline",)])
def test_a_figure_is_made_for_the_smallest_configuration(
    name: str, conditions: tuple[str, ...], tmp_path: Path
) -> None:
    results = fake_evaluation(tmp_path / "evaluation", conditions=conditions)
    assert draw(name, tmp_path / "figure.png", results=[results])[0].startswith(b"\x89PNG")


def test_the_loss_figure_reads_the_students_metrics(tmp_path: Path) -> None:
    students = [
        fake_student(tmp_path / condition / str(seed), condition, seed)
        for condition in ("baseline", "online_v1", "kl_t1")
        for seed in (1, 2)
    ]
    curves = {one.condition: one for one in loss.read_curves(tuple(students))}
    assert list(curves) == ["baseline", "online_v1", "kl_t1"]
    assert curves["online_v1"].seeds.shape == (16, 2)
    assert draw("loss", tmp_path / "a.png", students=students) == draw("loss", tmp_path / "b.png", students=students)


def test_the_loss_figure_is_made_without_students(tmp_path: Path) -> None:
    assert draw("loss", tmp_path / "loss.png", students=[])[0].startswith(b"\x89PNG")


def test_a_metrics_file_without_cross_entropy_is_named(tmp_path: Path) -> None:
    student = fake_student(tmp_path / "student", "baseline")
    (student / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n', encoding="utf-8")
    write_manifest(student)
    with pytest.raises(UserError, match=r"student/metrics\.jsonl: has no column 'ce'"):
        loss.read_curves((student,))


def test_a_missing_evaluation_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere/results\.json: does not exist"):
        draw("summary", tmp_path / "summary.png", results=[tmp_path / "nowhere" / "results.json"])


def test_estimates_are_those_of_the_evaluation(results: Path) -> None:
    (evaluation,) = load_evaluations([results])
    for subject in headline(evaluation):
        (measurement,) = subject.measurements
        nll, marker = estimate(evaluation, subject, GOLD_NLL), estimate(evaluation, subject, MARKER)
        assert nll.value == pytest.approx(measurement.gold_nll.value, abs=1e-5)
        assert measurement.marker is not None
        assert (marker.value, marker.low, marker.n) == pytest.approx(
            (measurement.marker.value, measurement.marker.low, measurement.marker.n), abs=1e-5
        )


def test_seeds_are_averaged_and_a_rate_of_zero_keeps_an_interval(seeded: Path, tmp_path: Path) -> None:
    (evaluation,) = load_evaluations([seeded])
    subject = find(headline(evaluation), "online_v1")
    assert subject is not None and len(subject.measurements) == 3
    values = [measurement.gold_nll.value for measurement in subject.measurements]
    assert estimate(evaluation, subject, GOLD_NLL).value == pytest.approx(np.mean(values), abs=1e-5)
    rare = dict(EFFECTS) | {"online_v1": type(EFFECTS["online_v1"])(0.0, 0.0, 0.0)}
    silent = dict(rare) | {"base_zero_shot": type(EFFECTS["online_v1"])(0.0, 0.0, 0.0)}
    (never,) = load_evaluations([fake_evaluation(tmp_path, seeds=(1, 2), effects=silent)])
    subject = find(headline(never), "online_v1")
    assert subject is not None
    rate = estimate(never, subject, MARKER)
    assert rate.value == 0 and rate.high > 0.05


def test_a_difference_is_paired_and_far_tighter_than_the_two_intervals(results: Path) -> None:
    (evaluation,) = load_evaluations([results])
    subjects = headline(evaluation)
    method, baseline = find(subjects, "online_v1"), find(subjects, "baseline")
    assert method and baseline
    paired, alone = compare(evaluation, method, baseline, GOLD_NLL), estimate(evaluation, method, GOLD_NLL)
    assert paired.high - paired.low < 0.5 * (alone.high - alone.low)
    assert paired.excludes_zero and paired.difference == pytest.approx(-0.04, abs=0.02)
    rates = compare(evaluation, method, baseline, MARKER)
    assert rates.difference * rates.n == pytest.approx(rates.only_subject - rates.only_baseline)


def test_the_bars_are_sorted_by_gold_nll_and_agree_over_the_measures(results: Path) -> None:
    (evaluation,) = load_evaluations([results])
    bars = ablation_bars.differences_to_baseline(evaluation)
    differences = [bar.difference for bar in bars[GOLD_NLL]]
    assert differences == sorted(differences) and len(differences) == 3
    assert len({tuple(bar.subject.condition for bar in found) for found in bars.values()}) == 1


def test_a_trajectory_starts_at_the_untrained_base(results: Path) -> None:
    (evaluation,) = load_evaluations([results])
    assert list(trajectory(evaluation, "online_v1")) == [0, 8, 16]
    assert trajectory(evaluation, "online_v1")[0].condition == "base_zero_shot"


def test_a_notice_takes_the_place_of_an_empty_figure(tmp_path: Path) -> None:
    draw_notice(tmp_path / "notice.png", "nothing to draw")
    assert (tmp_path / "notice.svg").is_file()
