"""The figures: made for every configuration, and the same bytes when remade."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from stillhouse.reporting.steps import FigureStep
from stillhouse.runtime.commands import parse_settings
from stillhouse.runtime.errors import UserError
from stillhouse.runtime.files import write_manifest
from stillhouse.studies.quantized_distillation import heat_maps
from stillhouse.studies.quantized_distillation.comparisons import load_evaluations, recoverable, recovering
from stillhouse.studies.quantized_distillation.curves import read_curve
from stillhouse.studies.quantized_distillation.figures import CurveStep, accuracy, recovered, sweep_lr
from stillhouse.studies.quantized_distillation.grids import SWEPT, grid_over, groups_along, winner
from tests.quantized_distillation.fake_results import SEEDS, swept, write_evaluation, write_student

FROM_EVALUATIONS = ("accuracy", "recovered", "sweep_lr", "beta_lambda", "rank_and_format")
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
def sweeps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return swept(tmp_path_factory.mktemp("sweeps"))


@pytest.mark.parametrize("name", FROM_EVALUATIONS)
def test_a_figure_is_made_of_one_model_of_several_and_of_sweeps(
    name: str, results: Path, other: Path, sweeps: Path, tmp_path: Path
) -> None:
    first = draw(name, tmp_path / "a.png", results=[results])
    assert first == draw(name, tmp_path / "b.png", results=[results])
    for inputs in ([results, other], [sweeps]):
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


def test_a_sweep_is_drawn_apart_from_other_settings_and_its_winner_is_validations(sweeps: Path) -> None:
    [evaluation] = load_evaluations([sweeps])
    off, on = (group for group in groups_along(evaluation, ("learning_rate",)) if len(group) >= 3)
    assert {cell.at("on_policy_share") for cell in off} == {0.0}
    assert [winner(group).at("learning_rate") for group in (off, on)] == [1e-4, 1e-4]
    grid = groups_along(evaluation, ("beta", "on_policy_share"))[0]
    assert len(grid) == 9
    assert (winner(grid).at("beta"), winner(grid).at("on_policy_share")) == (0.0, 0.5)
    assert "λ = 0: 1e-04; λ = 1: 1e-04" in sweep_lr.title([evaluation])


def test_ranks_and_formats_have_maps_by_policy_with_their_winners(sweeps: Path) -> None:
    [evaluation] = load_evaluations([sweeps])
    grids = [(axes, grid_over(evaluation, axes) or []) for axes in SWEPT["rank_and_format"]]
    # The rates' middle point is at the rank and in the format that the others leave alone.
    ranks, formats = ({cell.at(axes[0]) for cell in group} for axes, group in grids)
    assert ranks == {4, 8, 16} and formats == {"fp4", "int4-g64", "nf4"}
    assert all(len(group) == 6 for _, group in grids)
    assert heat_maps.title(grids) == (
        "Validation picks LoRA rank = 16, λ = 0 (KL 0.042 nats per token); "
        "weights = nf4, λ = 0 (KL 0.030 nats per token)"
    )


def test_titles_say_what_came_out(results: Path) -> None:
    [evaluation] = load_evaluations([results])
    assert recovered.title([evaluation]).startswith("Of what rounding to nearest cost in NLL, wikipedia, closed: gptq")
    assert "ptq minus teacher -" in accuracy.title([evaluation])
    assert recovering(evaluation) == ["gptq", "off_policy", "on_policy"]
    assert [one.name for one in recoverable(evaluation)][-1] == "acc_norm, mean accuracy"
