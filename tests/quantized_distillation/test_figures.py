"""The figures: made for every configuration, and the same bytes when remade."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from stillhouse.reporting.steps import FigureStep
from stillhouse.runtime.commands import parse_settings
from stillhouse.runtime.errors import UserError
from stillhouse.runtime.files import write_manifest
from stillhouse.studies.quantized_distillation.comparisons import load_evaluations, recoverable, recovering
from stillhouse.studies.quantized_distillation.curves import read_curve
from stillhouse.studies.quantized_distillation.figures import CurveStep, accuracy, recovered
from stillhouse.studies.quantized_distillation.sweeps import sweeps
from tests.quantized_distillation.fake_results import SEEDS, swept, write_evaluation, write_student

FROM_EVALUATIONS = ("accuracy", "recovered", "sweep_lr", "beta_lambda", "sweep")
PACKAGE = "stillhouse.studies.quantized_distillation.figures"


def draw(name: str, output: Path, **inputs: list[Path]) -> tuple[bytes, bytes]:
    """Run a figure as the workflow does; returns its PNG and SVG."""
    lists = [f"{key}=[{','.join(map(str, paths))}]" for key, paths in inputs.items()]
    step = CurveStep if name == "perplexity_curve" else FigureStep
    importlib.import_module(f"{PACKAGE}.{name}").main(parse_settings(step, [*lists, f"output={output}"]))
    return output.read_bytes(), output.with_suffix(".svg").read_bytes()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_evaluation(tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_evaluation(tmp_path_factory.mktemp("other"), model="other")


@pytest.fixture(scope="module")
def sweeps_made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return swept(tmp_path_factory.mktemp("sweeps"))


@pytest.mark.parametrize("name", FROM_EVALUATIONS)
def test_a_figure_is_made_of_one_model_of_several_and_of_sweeps(
    name: str, results: Path, other: Path, sweeps_made: Path, tmp_path: Path
) -> None:
    first = draw(name, tmp_path / "a.png", results=[results])
    assert first == draw(name, tmp_path / "b.png", results=[results])
    for inputs in ([results, other], [sweeps_made]):
        png, svg = draw(name, tmp_path / "c.png", results=inputs)
        assert len(png) > 3000 and svg.startswith(b"<?xml")


@pytest.mark.parametrize("name", FROM_EVALUATIONS)
def test_a_teacher_alone_still_makes_every_figure(name: str, tmp_path: Path) -> None:
    only = write_evaluation(tmp_path / "only", distances={"teacher": 0.0})
    assert draw(name, tmp_path / "a.png", results=[only])


def test_the_curves_show_every_student_and_no_student_is_no_fault(tmp_path: Path) -> None:
    students = [
        write_student(tmp_path / condition / str(seed), condition, seed)
        for condition in ("off_policy", "on_policy")
        for seed in SEEDS
    ]
    curve = read_curve(students[0])
    assert [point.step for point in curve.points] == [0, 5, 10, 15, 20]
    assert (curve.condition, curve.points[0].values["perplexity"], curve.teacher_perplexity) == ("off_policy", 45, 30)
    both = draw("perplexity_curve", tmp_path / "a.png", students=students)
    assert both == draw("perplexity_curve", tmp_path / "b.png", students=students)
    assert both != draw("perplexity_curve", tmp_path / "c.png", students=[])


def test_a_student_without_its_measures_is_named(tmp_path: Path) -> None:
    student = write_student(tmp_path / "student", "off_policy", 1)
    (student / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    write_manifest(student)
    with pytest.raises(UserError, match=r"metrics\.jsonl: cannot be read .*: train again"):
        read_curve(student)


def test_each_figure_of_a_sweep_has_its_own_axes_and_validation_s_winner(sweeps_made: Path) -> None:
    found = sweeps(load_evaluations([sweeps_made]))
    rates, grid = found.only("learning_rate").grids, found.only("on_policy_share", "beta").grids
    assert [(one.condition, one.picked) for one in rates] == [
        ("policy0", "learning_rate = 0.0001"),
        ("policy1", "learning_rate = 0.0001"),
    ]
    assert [(len(one.points), one.picked) for one in grid] == [(9, "beta = 0, on_policy_share = 0.5")]
    assert {one.axes for one in found.grids} > {("lora_rank",), ("weight_format",)}, "sweep.png has every other one"


def test_titles_say_what_came_out(results: Path) -> None:
    [evaluation] = load_evaluations([results])
    assert recovered.title([evaluation]).startswith("Of what rounding to nearest cost in NLL, wikipedia, closed: gptq")
    assert "ptq minus teacher -" in accuracy.title([evaluation])
    assert recovering(evaluation) == ["gptq", "off_policy", "on_policy"]
    assert [one.name for one in recoverable(evaluation)][-1] == "acc_norm, mean accuracy"
