"""LoRA generation through the workflow on a tiny model: it runs from nothing, and a change reruns what it reaches."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from support.lora_generation_workflow import CONFIG, FIGURES, add_lora_generation, write_lora_config
from support.workflow import Workflow, make_workflow

ROOM = "src/stillhouse/studies/lora_generation"
REPORT = {"lora_generation_report": 1, "results_page": 1}
# Figures of the evaluation: accuracy, delta_map, ablation, cosine; of training: training.
EVALUATE = {"lora_generation_evaluate": 1, "lora_generation_figure": 4, **REPORT}
TRAIN = {"lora_generation_train": 2, **EVALUATE, "lora_generation_figure": 5}
DELTAS = {"lora_generation_deltas": 1, **TRAIN}
COLLECT = {"lora_generation_collect": 1, **DELTAS}
TEACHERS = {"lora_generation_teachers": 2, **COLLECT}

# One worker runs them all, on one finished workflow.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("lora generation workflow")]


@pytest.fixture(scope="module")
def finished_study(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Workflow:
    """A workflow of this study alone that has run to its end."""
    workflow = make_workflow(tmp_path_factory.mktemp("lora") / "project", tiny_model)
    add_lora_generation(workflow)
    workflow.run(config=CONFIG)
    return workflow


@pytest.fixture
def project(finished_study: Workflow) -> Iterator[Workflow]:
    """The finished workflow; the sources that a test edits are put back."""
    before = {path: path.read_bytes() for path in (finished_study.directory / "src").rglob("*.py")}
    yield finished_study
    for path, content in before.items():
        path.write_bytes(content)


def test_teachers_generators_arms_and_the_report_are_made_from_nothing(finished_study: Workflow) -> None:
    results = finished_study.directory / "results"
    page = (results / "results.md").read_text()
    assert "### Do generated adapters beat retrieval?" in page
    assert "prompts in context (1 of 2)" in page
    assert "95 % interval over items; one held-out adapter a task, one generator seed." in page
    for figure in FIGURES:
        for suffix in ("png", "svg"):
            assert (results / f"figures/lora_generation/{figure}.{suffix}").stat().st_size > 1000
    assert {".csv", ".tex", ".md"} <= {path.suffix for path in (results / "tables/lora_generation").iterdir()}
    record = json.loads((results / "lora_generation/tiny/evaluation/run.json").read_text())
    assert {"code", "data", "git", "packages", "devices", "seconds", "peak_memory_mib"} <= set(record)


def test_the_manifest_accounts_for_every_adapter(finished_study: Workflow) -> None:
    collection = finished_study.directory / "results/lora_generation/tiny/adapters"
    rows = json.loads((collection / "manifest.json").read_text())["adapters"]
    expected = {f"{t}/shard_{n}-seed_42/step_2" for t in ("choices", "arithmetic") for n in range(4)}
    assert {row["name"] for row in rows} == expected
    for name in expected:
        files = {path.name for path in (collection / name).iterdir()}
        assert files == {"adapter_model.safetensors", "adapter_config.json", "prompts.json", "teacher.json"}
    results = json.loads((collection.parent / "evaluation/results.json").read_text())
    assert len(results["points"]) == len(results["adapters"]) == len(expected)


def test_every_arm_is_scored_on_the_held_out_task_and_the_held_out_shard(finished_study: Workflow) -> None:
    results = json.loads(
        (finished_study.directory / "results/lora_generation/tiny/evaluation/results.json").read_text()
    )
    arms = {(m["task"], m["arm"]): m for m in results["measurements"] if m["condition"] in (None, "multi_task")}
    # The held-in task has no adapter of another task to offer: generators learn from it alone.
    every = {"base", "generated", "teacher", "mean_adapter", "nearest_adapter", "in_context", "few_prompt_lora"}
    assert {arm for task, arm in arms if task == "choices"} == every
    assert {arm for task, arm in arms if task == "arithmetic"} == every | {"other_task"}
    assert arms["choices", "generated"]["role"] == "held_out_shard"
    assert arms["arithmetic", "generated"]["role"] == "held_out_task"
    assert arms["choices", "teacher"]["closeness"]["relative_error"] == pytest.approx(0, abs=1e-3)
    assert arms["choices", "teacher"]["closeness"]["cosine"] == pytest.approx(1)
    made = finished_study.directory / "results/lora_generation/tiny/evaluation/adapters"
    assert (made / "generated/multi_task/seed_42/arithmetic/3-42/adapter_model.safetensors").is_file()


def test_the_prompts_that_stand_for_an_adapter_are_never_scored(finished_study: Workflow) -> None:
    study = finished_study.directory / "results/lora_generation/tiny"
    rows = json.loads((study / "adapters/manifest.json").read_text())["adapters"]
    read = {(row["task"], prompt) for row in rows for prompt in prompt_ids(study / "adapters" / row["name"])}
    scored = set(pd.read_parquet(study / "evaluation/items.parquet")[["task", "item_id"]].itertuples(index=False))
    assert len(read) == 2 * 4 * 2 and len(scored) == 2 * 5
    assert not read & {tuple(one) for one in scored}


def prompt_ids(folder: Path) -> list[str]:
    return json.loads((folder / "prompts.json").read_text())["ids"]


def test_a_second_run_has_nothing_to_do(project: Workflow) -> None:
    assert project.planned(config=CONFIG) == {}


@pytest.mark.parametrize(
    ("module", "rerun"),
    [
        (f"{ROOM}/figures/cosine.py", {"lora_generation_figure": 1}),
        (f"{ROOM}/comparisons.py", {"lora_generation_figure": 4, **REPORT}),
        (f"{ROOM}/report.py", REPORT),
        (f"{ROOM}/arms.py", EVALUATE),
        (f"{ROOM}/objective.py", TRAIN),
        (f"{ROOM}/delta_cache.py", DELTAS),
        (f"{ROOM}/collect.py", COLLECT),
        (f"{ROOM}/teachers.py", TEACHERS),
    ],
)
def test_a_change_of_a_module_reruns_exactly_what_it_reaches(
    project: Workflow, module: str, rerun: dict[str, int]
) -> None:
    path = project.directory / module
    path.write_text(path.read_text() + "\nCHANGED = 1\n")
    assert project.planned(config=CONFIG) == rerun


@pytest.mark.parametrize(
    ("change", "rerun"),
    [
        ({"evaluation": {"test_items": 3}}, EVALUATE),
        ({"defaults": {"losses": {"norm": 0.2}}}, TRAIN),
        ({"condition_settings": {"multi_task": {"seed_offset": 1}}}, {**TRAIN, "lora_generation_train": 1}),
        ({"probes": {"kind": "mixed"}}, DELTAS),
        ({"teachers": {"training": {"learning_rate": 0.02}}}, TEACHERS),
        ({"teachers": {"flagged": "exclude"}}, TRAIN),
    ],
)
def test_a_change_of_a_setting_reruns_exactly_what_reads_it(
    project: Workflow, change: dict, rerun: dict[str, int]
) -> None:
    write_lora_config(project.directory / "changed.yaml", change)
    assert project.planned(config="changed.yaml") == rerun


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": ["choices", "arithmetik"]}, "did you mean 'arithmetic'?"),
        ({"teachers": {"prompts": 4}}, "a shard has 3 examples, not 4"),
        ({"teachers": {"training": {"lora": {"dropout": 0.1}}}}, "dropout"),
        ({"evaluation": {"condition": "cosine"}}, "'cosine' is not among the trained conditions"),
    ],
)
def test_a_wrong_setting_is_refused_before_anything_runs(project: Workflow, change: dict, message: str) -> None:
    write_lora_config(project.directory / "changed.yaml", change)
    done = project.run("-n", config="changed.yaml", check=False)
    assert done.returncode != 0
    assert message in done.stdout + done.stderr
