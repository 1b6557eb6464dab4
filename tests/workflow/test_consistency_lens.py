"""The consistency lens in the whole workflow: it runs from nothing, and a change reruns what it reaches."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.workflow import Workflow, make_workflow, write_config

ROOM = "src/stillhouse/studies/consistency_lens"
STUDIES = ("consistency_lens",)
REPORT = {"consistency_lens_report": 1, "results_page": 1}
# Figures of evaluations: controls, best_of_k, variance_by_layer; of training: losses, schedules.
AFTER_EVALUATION = {"consistency_lens_figure": 3, "consistency_lens_samples": 1, **REPORT}
EVALUATE = {"consistency_lens_evaluate": 1, **AFTER_EVALUATION}
TRAIN = {"consistency_lens_train": 2, **EVALUATE, "consistency_lens_figure": 5}
EXTRACT = {"consistency_lens_activations": 2, **TRAIN}

# One worker runs them all, on one finished workflow.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("consistency lens workflow")]


@pytest.fixture(scope="module")
def finished_lens(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Workflow:
    """A workflow of this study alone that has run to its end."""
    workflow = make_workflow(tmp_path_factory.mktemp("lens") / "project", tiny_model, studies=STUDIES)
    workflow.run()
    return workflow


@pytest.fixture
def project(finished_lens: Workflow) -> Iterator[Workflow]:
    """The finished workflow; the sources that a test edits are put back."""
    sources = list((finished_lens.directory / "src").rglob("*.py"))
    before = {path: path.read_bytes() for path in sources}
    yield finished_lens
    for path, content in before.items():
        path.write_bytes(content)


def test_extraction_training_evaluation_and_the_samples_page_are_made_from_nothing(finished_lens: Workflow) -> None:
    results = finished_lens.directory / "results"
    assert "## Consistency lens" in (results / "results.md").read_text()
    for figure in ("losses", "controls", "best_of_k", "schedules", "variance_by_layer"):
        for suffix in ("png", "svg"):
            assert (results / f"figures/consistency_lens/{figure}.{suffix}").stat().st_size > 1000
    page = (results / "consistency_lens/tiny/samples.html").read_text()
    assert page.count("<article>") == 4 and "on_the_fly, seed 42" in page
    assert {".csv", ".tex", ".md"} <= {path.suffix for path in (results / "tables/consistency_lens").iterdir()}
    record = json.loads((results / "consistency_lens/tiny/lenses/on_the_fly/seed_42/run.json").read_text())
    assert record["settings"]["tokens"] and record["settings"]["run"]["lens"]["layer"] == 2
    assert {"code", "data", "git", "packages", "devices", "seconds", "peak_memory_mib"} <= set(record)


def test_a_second_run_has_nothing_to_do(project: Workflow) -> None:
    assert project.planned() == {}


@pytest.mark.parametrize(
    ("module", "rerun"),
    [
        (f"{ROOM}/figures/controls.py", {"consistency_lens_figure": 1}),
        (f"{ROOM}/comparisons.py", {"consistency_lens_figure": 3, **REPORT}),
        (f"{ROOM}/report.py", REPORT),
        (f"{ROOM}/samples_page.py", {"consistency_lens_samples": 1}),
        (f"{ROOM}/controls.py", EVALUATE),
        (f"{ROOM}/evaluate.py", EVALUATE),
        (f"{ROOM}/objective.py", TRAIN),
        (f"{ROOM}/activations.py", {**EXTRACT, "consistency_lens_train": 1}),
        (f"{ROOM}/tokens.py", {"consistency_lens_tokens": 1, **EXTRACT}),
        ("src/stillhouse/models/activations.py", EXTRACT),
        ("src/stillhouse/training/loop.py", TRAIN),
    ],
)
def test_a_change_of_a_module_reruns_exactly_what_it_reaches(
    project: Workflow, module: str, rerun: dict[str, int]
) -> None:
    path = project.directory / module
    path.write_text(path.read_text() + "\nCHANGED = 1\n")
    assert project.planned() == rerun


@pytest.mark.parametrize(
    ("change", "rerun"),
    [
        ({"evaluation": {"top_n": 3}}, EVALUATE),
        ({"defaults": {"loss": {"mse": 0.5}}}, TRAIN),
        ({"defaults": {"schedules": {"temperature": "1.0, linear to 0.5 over 2s"}}}, TRAIN),
        ({"condition_settings": {"on_the_fly": {"seed_offset": 1}}}, {**TRAIN, "consistency_lens_train": 1}),
        ({"defaults": {"positions": {"minimum": 4}}}, EXTRACT),
        ({"defaults": {"activation_dtype": "bfloat16"}}, EXTRACT),
        ({"tokens": {"max_length": 40}}, {"consistency_lens_tokens": 1, **EXTRACT}),
        ({"extraction": {"processes": 2}}, {}),
        ({"seeds": [42, 7]}, TRAIN),
    ],
)
def test_a_change_of_a_setting_reruns_exactly_what_reads_it(
    project: Workflow, change: dict, rerun: dict[str, int]
) -> None:
    write_config(project.directory / "changed.yaml", change, STUDIES)
    assert project.planned(config="changed.yaml") == rerun


def test_a_figure_of_one_layer_alone_needs_no_figure_by_layer(project: Workflow) -> None:
    write_config(project.directory / "changed.yaml", {"conditions": ["lens"]}, STUDIES)
    request = ["-n", "results/figures/consistency_lens/variance_by_layer.png"]
    done = project.run(*request, config="changed.yaml", check=False)
    assert done.returncode != 0
    assert "unknown figure 'variance_by_layer'" in done.stdout + done.stderr


def test_an_evaluation_goes_to_the_directory_that_is_asked_for(project: Workflow) -> None:
    write_config(project.directory / "changed.yaml", {"evaluation": {"output_directory": "elsewhere/lens"}}, STUDIES)
    done = project.run("-n", config="changed.yaml")
    planned = done.stdout + done.stderr
    assert "elsewhere/lens/tiny/results.json" in planned and "results/consistency_lens/tiny/evaluation" not in planned


def test_an_evaluation_that_is_made_again_computes_only_what_is_missing(project: Workflow) -> None:
    directory = project.directory / "results/consistency_lens/tiny/evaluation"
    before = {name: (directory / name).read_bytes() for name in ("results.json", "items.parquet", "samples.json")}
    parts = sorted((project.directory / "work/consistency_lens/tiny/evaluation").glob("*.parquet"))
    parts[0].unlink()
    for name in before:
        (directory / name).unlink()
    project.run(str(directory.relative_to(project.directory) / "results.json"))
    record = json.loads((directory / "run.json").read_text())
    assert (record["parts_computed"], record["parts_kept"]) == (1, len(parts) - 1)
    assert {name: (directory / name).read_bytes() for name in before} == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"defaults": {"lens": {"text_length": 0}}}, "text_length"),
        ({"defaults": {"schedules": {"alpha": "0, climb to 1"}}}, "alpha"),
        ({"defaults": {"positions": {"minimum": 31}}}, "positions.minimum (31) leaves no token"),
        ({"evaluation": {"top": 3}}, "did you mean 'top_n'?"),
    ],
)
def test_a_wrong_setting_is_refused_before_anything_runs(project: Workflow, change: dict, message: str) -> None:
    write_config(project.directory / "changed.yaml", change, STUDIES)
    done = project.run("-n", config="changed.yaml", check=False)
    assert done.returncode != 0
    assert message in done.stdout + done.stderr
