"""The figures: made for every configuration, the same bytes when remade, from the right documents."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
from pydantic import BaseModel

from stillhouse.reporting import curves
from stillhouse.reporting.steps import FigureStep
from stillhouse.runtime.commands import parse_settings
from stillhouse.runtime.errors import UserError
from stillhouse.runtime.files import write_manifest
from stillhouse.studies.consistency_lens.comparisons import (
    compare,
    kl,
    load_evaluations,
    recovered,
    subjects,
    top1,
    variance_explained,
)
from stillhouse.studies.consistency_lens.figures import CurvesStep
from stillhouse.studies.consistency_lens.results import CONTROLS
from tests.consistency_lens.fake_results import fake_evaluation, fake_lens

FROM_EVALUATIONS = ("controls", "best_of_k", "variance_by_layer")
FROM_TRAINING = ("losses", "schedules")
PACKAGE = "stillhouse.studies.consistency_lens.figures"
LAYERS = {"lens+layer-3": 3, "lens+layer-12": 12}


def draw(name: str, output: Path, **inputs: list[Path]) -> tuple[bytes, bytes]:
    """Run a figure as the workflow does; returns its PNG and SVG."""
    module = importlib.import_module(f"{PACKAGE}.{name}")
    settings: type[BaseModel] = CurvesStep if name in FROM_TRAINING else FigureStep
    lists = [f"{key}=[{','.join(map(str, paths))}]" for key, paths in inputs.items()]
    module.main(parse_settings(settings, [*lists, f"output={output}"]))
    return output.read_bytes(), output.with_suffix(".svg").read_bytes()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_evaluation(tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def seeded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_evaluation(tmp_path_factory.mktemp("seeds"), model="gpt2", layers=LAYERS, seeds=(1, 2))


@pytest.mark.parametrize("name", FROM_EVALUATIONS)
def test_a_figure_of_the_evaluation_has_the_same_bytes_when_it_is_remade(
    name: str, results: Path, tmp_path: Path
) -> None:
    items = [results.parent / "items.parquet"]
    png, svg = draw(name, tmp_path / "a.png", results=[results], item_scores=items)
    assert png.startswith(b"\x89PNG") and b"<svg" in svg
    assert (png, svg) == draw(name, tmp_path / "b.png", results=[results], item_scores=items)


@pytest.mark.parametrize("name", FROM_EVALUATIONS)
def test_a_figure_shows_several_models_layers_and_seeds(name: str, results: Path, seeded: Path, tmp_path: Path) -> None:
    assert draw(name, tmp_path / "two.png", results=[results, seeded])[0].startswith(b"\x89PNG")


@pytest.mark.parametrize("name", FROM_TRAINING)
def test_a_figure_of_the_training_reads_the_metrics_of_every_lens(name: str, tmp_path: Path) -> None:
    lenses = [
        fake_lens(tmp_path / condition / str(seed), condition, seed)
        for condition in ("lens", "mse_only", "unfrozen")
        for seed in (1, 2)
    ]
    found = {one.condition: one for one in curves.read_curves(lenses)}
    assert list(found) == ["lens", "mse_only", "unfrozen"]
    assert found["lens"].column("mse").shape == (40, 2)
    assert found["lens"].column("validation/mse").index.tolist() == [20, 40]
    assert draw(name, tmp_path / "a.png", lenses=lenses) == draw(name, tmp_path / "b.png", lenses=lenses)
    assert draw(name, tmp_path / "one.png", lenses=lenses[:1])[0].startswith(b"\x89PNG")


def test_a_damaged_metrics_file_is_named(tmp_path: Path) -> None:
    lens = fake_lens(tmp_path / "lens")
    (lens / "metrics.jsonl").write_text("no json\n")
    write_manifest(lens)
    with pytest.raises(UserError, match=r"lens/metrics\.jsonl: is no metrics file"):
        curves.read_curves([lens])


def test_best_of_k_is_made_where_nothing_was_sampled(tmp_path: Path) -> None:
    results = fake_evaluation(tmp_path / "evaluation", best_of=())
    assert draw("best_of_k", tmp_path / "figure.png", results=[results])[0].startswith(b"\x89PNG")


def test_a_missing_evaluation_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere/results\.json: does not exist"):
        draw("controls", tmp_path / "controls.png", results=[tmp_path / "nowhere" / "results.json"])


def test_estimates_are_those_of_the_evaluation(results: Path) -> None:
    (evaluation,) = load_evaluations([results])
    (subject,) = subjects([evaluation])
    for variant in ("lens", *CONTROLS, "best_of_4"):
        (measured,) = subject.of(variant)
        for estimate, expected in (
            (kl(subject, variant), measured.kl),
            (recovered(subject, variant), measured.recovered_from_mean),
            (variance_explained(subject, variant), measured.variance_explained),
            (top1(subject, variant), measured.top1),
        ):
            assert (estimate.value, estimate.low, estimate.high, estimate.n) == pytest.approx(
                (expected.value, expected.low, expected.high, expected.n), rel=1e-5, abs=1e-6
            )


def test_a_control_is_paired_with_the_lens_and_far_tighter_than_the_two_intervals(results: Path) -> None:
    (evaluation,) = load_evaluations([results])
    (subject,) = subjects([evaluation])
    paired, alone = compare(subject, "shuffled"), kl(subject)
    assert paired.estimate.value == pytest.approx(0.3, abs=0.12)
    assert paired.estimate.high - paired.estimate.low < 0.7 * (alone.high - alone.low)
    assert paired.lens_is_better and compare(subject, "text_regression").lens_is_worse


def test_seeds_are_averaged(seeded: Path) -> None:
    (evaluation,) = load_evaluations([seeded])
    for subject in subjects([evaluation]):
        values = [one.kl.value for one in subject.measurements]
        assert len(values) == 2 and kl(subject).value == pytest.approx(sum(values) / 2, rel=1e-5)
