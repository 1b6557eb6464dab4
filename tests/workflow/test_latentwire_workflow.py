"""LatentWire through the workflow on two tiny models: it runs, then rests, and a change reruns what it reaches."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.latentwire_workflow import CONFIG, FIGURES, TARGETS, add_latentwire, write_wire_config
from support.workflow import Workflow, make_workflow

STUDY = "src/stillhouse/studies/latentwire"
REPORT = {"latentwire_report": 1}
AFTER_EVALUATION = {"latentwire_figure": 4, **REPORT}
AFTER_TRAINING = {"latentwire_evaluate": 1, "latentwire_figure": 6, **REPORT}
TRAIN = {"latentwire_train": 3, **AFTER_TRAINING}
CACHES = {"latentwire_teacher_cache": 2}

# One worker runs them all, on one finished workflow.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("latentwire workflow")]


@pytest.fixture(scope="module")
def run_once(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Workflow:
    """A workflow of this study that has run to its end."""
    workflow = make_workflow(tmp_path_factory.mktemp("latentwire") / "project", tiny_model)
    add_latentwire(workflow)
    workflow.run(*TARGETS, config=CONFIG)
    return workflow


@pytest.fixture
def project(run_once: Workflow) -> Workflow:
    """The same; what a test edits of the study is put back."""
    before = {path: path.read_bytes() for path in (run_once.directory / "src").rglob("*.py")}
    yield run_once
    for path, content in before.items():
        path.write_bytes(content)


def planned(project: Workflow, config: str = CONFIG) -> dict[str, int]:
    return project.planned(*TARGETS, config=config)


def test_every_figure_table_and_wire_file_is_made(run_once: Workflow) -> None:
    results = run_once.directory / "results"
    section = (results / "latentwire/section.md").read_text()
    assert "the text of the same bytes" in section and "tiny_reading" in section
    for figure in FIGURES:
        for suffix in ("png", "svg"):
            assert (results / f"figures/latentwire/{figure}.{suffix}").stat().st_size > 1000
    assert {path.suffix for path in (results / "tables/latentwire").glob("curve.*")} == {".csv", ".tex", ".md"}
    evaluation = results / "latentwire/tiny_pair/evaluation"
    found = json.loads((evaluation / "results.json").read_text())
    items = next(m["items"] for m in found["measurements"] if m["arm"] == "full_text" and m["reader"] == "tiny")
    assert 0 < items == 6 - found["left_out"]["test"]
    files = list((evaluation / "wire").rglob("*.lwir"))
    assert len(files) == 3 * 2 * items  # channels, formats, prompts


def test_titles_stay_on_one_side_of_the_split(run_once: Workflow) -> None:
    splits = {}
    for name in ("train", "validation", "test"):
        lines = (run_once.directory / f"results/latentwire/data/tiny_reading/{name}.jsonl").read_text().splitlines()
        splits[name] = {json.loads(line)["title"] for line in lines}
    assert not splits["train"] & splits["test"] and not splits["train"] & splits["validation"]
    assert not splits["validation"] & splits["test"]


def test_a_second_run_has_nothing_to_do_and_a_remark_reruns_nothing(project: Workflow) -> None:
    assert planned(project) == {}
    for path in (project.directory / STUDY).rglob("*.py"):
        path.write_text(path.read_text() + "\n# A remark.\n")
    assert planned(project) == {}


@pytest.mark.parametrize(
    ("module", "rerun"),
    [
        (f"{STUDY}/figures/f1_vs_bytes.py", {"latentwire_figure": 1}),
        (f"{STUDY}/figures/training.py", {"latentwire_figure": 1}),
        (f"{STUDY}/report.py", REPORT),
        (f"{STUDY}/compression.py", {"latentwire_evaluate": 1, **AFTER_EVALUATION}),
        ("src/stillhouse/evaluation/reading_comprehension.py", {"latentwire_evaluate": 1, **AFTER_EVALUATION}),
        (f"{STUDY}/wire.py", {"latentwire_evaluate": 1, **AFTER_EVALUATION}),
        (f"{STUDY}/objective.py", TRAIN),
        (f"{STUDY}/diagnostics.py", TRAIN),
        (f"{STUDY}/text_teacher.py", {**CACHES, **TRAIN}),
        (f"{STUDY}/reader.py", {**CACHES, **TRAIN}),
    ],
)
def test_a_change_of_a_module_reruns_exactly_what_it_reaches(
    project: Workflow, module: str, rerun: dict[str, int]
) -> None:
    path = project.directory / module
    path.write_text(path.read_text() + "\nCHANGED = 1\n")
    assert planned(project) == rerun


@pytest.mark.parametrize(
    ("change", "rerun"),
    [
        ({"evaluation": {"byte_budgets": [50]}}, {"latentwire_evaluate": 1, **AFTER_EVALUATION}),
        ({"evaluation": {"wire": {"formats": ["int8", "int4"]}}}, {"latentwire_evaluate": 1, **AFTER_EVALUATION}),
        ({"defaults": {"training": {"learning_rate": 3e-3}}}, TRAIN),
        (
            {"condition_settings": {"prefix_kd": {"losses": {"temperature": 2.0}}}},
            {"latentwire_train": 1, **AFTER_TRAINING},
        ),
        ({"sweeps": {"length": {"axes": {"latent.length": [2, 4]}}}}, {"latentwire_train": 1, **AFTER_TRAINING}),
        (
            {
                "conditions": ["latent", "prefix_kd", "sentence_encoder"],
                "condition_settings": {"sentence_encoder": {"encoder": {"model": "tiny"}}},
            },
            {"latentwire_train": 1, **AFTER_TRAINING},
        ),
        ({"defaults": {"reader": {"anchor": "The answer is: "}}}, {**CACHES, **TRAIN}),
        ({"seeds": [42, 7]}, TRAIN),
        ({"task": {"max_text_bytes": 150}}, {**CACHES, **TRAIN}),
    ],
)
def test_a_change_of_a_setting_reruns_exactly_what_reads_it(
    project: Workflow, change: dict, rerun: dict[str, int]
) -> None:
    write_wire_config(project.directory / "changed_wire.yaml", change)
    assert planned(project, "changed_wire.yaml") == rerun


def test_an_evaluation_that_is_made_again_computes_only_what_is_missing(project: Workflow) -> None:
    directory = project.directory / "results/latentwire/tiny_pair/evaluation"
    before = {name: (directory / name).read_bytes() for name in ("items.parquet", "wire/manifest.json")}
    (directory / "items.parquet").unlink()
    project.run(
        str(directory.relative_to(project.directory) / "results.json"),
        "--forcerun",
        "latentwire_evaluate",
        config=CONFIG,
    )
    record = json.loads((directory / "run.json").read_text())
    assert record["parts_computed"] == 0 and record["parts_kept"] > 0
    assert {name: (directory / name).read_bytes() for name in before} == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"evaluation": {"arms": ["full_txt"]}}, "latentwire.evaluation.arms"),
        ({"evaluation": {"wire": {"formats": ["int3"]}}}, "latentwire.evaluation.wire.formats"),
        ({"defaults": {"latent": {"length": 0}}}, "latentwire.defaults.latent.length"),
        ({"evaluation": {"condition": "latnt"}}, "did you mean 'latent'?"),
        ({"pair_settings": {"tiny_pair": {"models": ["tiny", "tinny"]}}}, "unknown model 'tinny': did you mean"),
    ],
)
def test_a_wrong_setting_is_refused_while_the_dag_is_built(project: Workflow, change: dict, message: str) -> None:
    write_wire_config(project.directory / "wrong_wire.yaml", change)
    done = project.run("-n", *TARGETS, config="wrong_wire.yaml", check=False)
    assert done.returncode != 0
    assert message in done.stderr + done.stdout


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("results/figures/latentwire/arm.png", "unknown figure 'arm': did you mean 'arms'?"),
        ("results/latentwire/tiny_par/evaluation/results.json", "unknown pair 'tiny_par': did you mean 'tiny_pair'?"),
    ],
)
def test_a_wrong_request_gets_one_clear_line(project: Workflow, target: str, message: str) -> None:
    done = project.run("-n", target, config=CONFIG, check=False)
    assert done.returncode != 0 and message in done.stderr + done.stdout


def test_a_text_that_the_encoder_cannot_take_stops_training_with_one_line(project: Workflow, tmp_path: Path) -> None:
    write_wire_config(project.directory / "long_wire.yaml", {"defaults": {"encoder": {"max_length": 40}}})
    done = project.run("results/latentwire/tiny_pair/channels/latent/seed_42", config="long_wire.yaml", check=False)
    assert done.returncode != 0
    assert (
        "encoder.max_length: " in done.stdout + done.stderr
        and "texts are longer than 40 bytes" in done.stdout + done.stderr
    )
