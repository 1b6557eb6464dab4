"""Figures: drawn from results files alone, equal bytes whenever they are remade, and their titles say the numbers."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from stillhouse.reporting.curves import read_curves
from stillhouse.reporting.steps import FigureStep
from stillhouse.runtime.errors import UserError
from stillhouse.runtime.files import write_manifest
from stillhouse.studies.lora_generation.comparisons import load_evaluations
from stillhouse.studies.lora_generation.config import ARMS
from stillhouse.studies.lora_generation.figures import (
    ARM_STYLES,
    CurvesStep,
    ablation,
    accuracy,
    cosine,
    delta_map,
    named_styles,
    training,
)
from tests.lora_generation.fake_results import write_fake_evaluation, write_fake_generator

OF_EVALUATION = ("accuracy", "delta_map", "ablation", "cosine")


@pytest.mark.parametrize("name", OF_EVALUATION)
@pytest.mark.parametrize("arms", [ARMS, ("base", "teacher"), ("base",)])
def test_a_figure_of_the_evaluation_is_remade_byte_by_byte(tmp_path: Path, name: str, arms: tuple[str, ...]) -> None:
    results = write_fake_evaluation(tmp_path, arms=arms)
    module = importlib.import_module(f"stillhouse.studies.lora_generation.figures.{name}")
    drawn = []
    for number in range(2):
        output = tmp_path / str(number) / f"{name}.png"
        module.main(FigureStep(results=(results,), output=output))
        drawn.append((output.read_bytes(), output.with_suffix(".svg").read_bytes()))
    assert drawn[0] == drawn[1] and len(drawn[0][0]) > 1000


def test_titles_say_what_was_measured(tmp_path: Path) -> None:
    evaluations = load_evaluations([write_fake_evaluation(tmp_path)])
    assert "held-out tasks 45.0" in accuracy.message(evaluations)
    assert "0.80 by delta activation, 0.10 by weights" in delta_map.message(evaluations)
    assert "held-out tasks: multi_task 0.80, weight_only 0.50" in ablation.message(evaluations)
    assert "held-out shards 0.80 against 0.50" in cosine.message(evaluations)


def test_training_curves_of_seeds_are_one_line(tmp_path: Path) -> None:
    generators = [
        write_fake_generator(tmp_path / f"{condition}-{seed}", condition, seed)
        for condition in ("multi_task", "weight_only")
        for seed in (1, 2)
    ]
    curves = read_curves(generators)
    assert [(one.condition, len(one.seeds)) for one in curves] == [("multi_task", 2), ("weight_only", 2)]
    assert training.message(curves).endswith("multi_task 2 to 0.067; weight_only 2 to 0.067")
    training.main(CurvesStep(generators=tuple(generators), output=tmp_path / "training.png"))
    assert (tmp_path / "training.png").stat().st_size > 1000
    (generators[0] / "metrics.jsonl").write_text("not json")
    write_manifest(generators[0])
    with pytest.raises(UserError, match=r"metrics\.jsonl: is no metrics file"):
        read_curves(generators)


def test_no_two_arms_look_alike() -> None:
    assert len({(style.colour, style.marker) for style in ARM_STYLES.values()}) == len(ARM_STYLES) == len(ARMS)
    assert len(set(named_styles([str(number) for number in range(7)]).values())) == 7
