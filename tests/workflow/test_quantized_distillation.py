"""Quantised distillation through the workflow on a tiny model: it runs, rests, and reruns what a change reaches."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from support.quantized_workflow import CONFIG, FIGURES, make_quantized_workflow, write_quantized_config
from support.workflow import Workflow

STUDY = "src/stillhouse/studies/quantized_distillation"
REPORT = {"quantized_distillation_report": 1, "results_page": 1}
AFTER_EVALUATION = {"quantized_distillation_figure": 5, **REPORT}
AFTER_EXPORT = {"quantized_distillation_evaluate": 1, **AFTER_EVALUATION}
TRAIN = {
    "quantized_distillation_train": 4,
    "quantized_distillation_export": 4,
    **AFTER_EXPORT,
    "quantized_distillation_figure": 6,
}

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("quantized_workflow")]


@pytest.fixture(scope="module")
def run_once(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Workflow:
    """A workflow of this study that has run to its end."""
    workflow = make_quantized_workflow(tmp_path_factory.mktemp("quantized") / "project", tiny_model)
    workflow.run()
    return workflow


@pytest.fixture
def project(run_once: Workflow) -> Workflow:
    """The same; what a test edits is put back."""
    edited = [*(run_once.directory / "src").rglob("*.py"), *(run_once.directory / "src").rglob("*.yaml")]
    before = {path: path.read_bytes() for path in [*edited, run_once.directory / CONFIG]}
    yield run_once
    for path, content in before.items():
        path.write_bytes(content)


def test_every_figure_and_table_is_made_of_all_systems(run_once: Workflow) -> None:
    results = run_once.directory / "results"
    page = (results / "results.md").read_text()
    assert "rounding to nearest takes the perplexity of wikipedia" in page
    assert "`awq` was not run for `tiny`: not among the conditions; llmcompressor's AWQ needs a GPU." in page
    for figure in FIGURES:
        for suffix in ("png", "svg"):
            assert (results / f"figures/quantized_distillation/{figure}.{suffix}").stat().st_size > 1000
    evaluation = results / "quantized_distillation/tiny/evaluation"
    found = json.loads((evaluation / "results.json").read_text())
    swept = [f"off_policy+learning_rate-0.01+beta-{beta}" for beta in ("0.0", "1.0")]
    assert found["conditions"] == ["teacher", "ptq", "off_policy", "on_policy", *swept]
    assert all(one["validation_kl"] > 0 for one in found["systems"] if one["checkpoint_step"])
    assert found["task_versions"] == {"arc_easy": "1.0", "winogrande": "1.0"}
    items = pd.read_parquet(evaluation / "items.parquet")
    by_kl = {one["condition"]: one["validation_kl"] for one in found["systems"] if one["condition"] in swept}
    assert f"beta = {min(by_kl, key=by_kl.get)[-3]}." in page, "the page names the point that validation picks"
    assert (items[items.condition == "teacher"].dropna(subset=["kl"]).kl.abs() < 1e-4).all()
    assert set(items[items.condition == "on_policy"].variant) == {"deployed", "merged", "beside"}
    counts = items[items.condition == "ptq"].groupby("name").size()
    assert (counts["arc_easy"], counts["winogrande"]) == (6, 4)


def test_the_converted_weights_are_what_was_trained(run_once: Workflow) -> None:
    results = run_once.directory / "results/quantized_distillation/tiny"
    items = pd.read_parquet(results / "evaluation/items.parquet")
    text = items[(items.condition == "off_policy") & (items.kind == "text")].set_index(["variant", "item_id"]).nll
    assert (text["deployed"] - text["merged"]).abs().max() < 1e-2
    assert (text["beside"] - text["merged"]).abs().max() > 1e-3
    record = json.loads((results / "exported/off_policy/seed_1/run.json").read_text())
    assert record["largest_logit_difference"] < 1e-3


def test_a_second_run_has_nothing_to_do_and_a_remark_reruns_nothing(project: Workflow) -> None:
    assert project.planned() == {}
    for path in (project.directory / STUDY).rglob("*.py"):
        path.write_text(path.read_text() + "\n# A remark.\n")
    assert project.planned() == {}


@pytest.mark.parametrize(
    ("module", "rerun"),
    [
        (f"{STUDY}/figures/accuracy.py", {"quantized_distillation_figure": 1}),
        (f"{STUDY}/curves.py", {"quantized_distillation_figure": 1}),
        (f"{STUDY}/tables.py", REPORT),
        (f"{STUDY}/sweeps.py", {"quantized_distillation_figure": 3, **REPORT}),
        (f"{STUDY}/comparisons.py", {"quantized_distillation_figure": 6, **REPORT}),
        (f"{STUDY}/evaluate.py", AFTER_EXPORT),
        (f"{STUDY}/baselines.py", {}),
        (f"{STUDY}/validation.py", TRAIN),
    ],
)
def test_a_changed_module_reruns_what_it_reaches(project: Workflow, module: str, rerun: dict[str, int]) -> None:
    path = project.directory / module
    path.write_text(path.read_text() + "\n_CHANGED = 1\n")
    assert project.planned() == rerun


def test_a_changed_task_file_reruns_the_evaluation(project: Workflow) -> None:
    path = project.directory / "src/stillhouse/evaluation/tasks/arc_easy.yaml"
    path.write_text(path.read_text().replace("Question:", "Q:"))
    assert project.planned() == AFTER_EXPORT


@pytest.mark.parametrize(
    ("changed", "rerun"),
    [
        ({"evaluation": {"texts": {"wikipedia": {"tokens": 200}}}}, AFTER_EXPORT),
        (
            {"defaults": {"training": {"learning_rate": 1e-4}}},
            {**TRAIN, "quantized_distillation_train": 2} | {"quantized_distillation_export": 2},
        ),
        ({"export": {"selection": "last"}}, {"quantized_distillation_export": 5, **AFTER_EXPORT}),
        ({"baselines": {"samples": 3}}, {}),
    ],
)
def test_a_changed_setting_reruns_what_reads_it(
    project: Workflow, changed: dict[str, object], rerun: dict[str, int]
) -> None:
    write_quantized_config(project.directory / CONFIG, changed)
    assert project.planned() == rerun


def test_a_new_condition_trains_alone_and_computes_its_own_parts_only(project: Workflow) -> None:
    write_quantized_config(
        project.directory / CONFIG, {"conditions": ["teacher", "ptq", "off_policy", "on_policy", "mixed_policy"]}
    )
    planned = project.planned()
    assert planned["quantized_distillation_train"] == planned["quantized_distillation_export"] == 1


def test_gptq_brings_its_environment_and_no_other_job(project: Workflow) -> None:
    write_quantized_config(
        project.directory / CONFIG, {"conditions": ["teacher", "ptq", "gptq", "off_policy", "on_policy"]}
    )
    planned = project.planned()
    assert planned["llmcompressor_environment"] == planned["quantized_distillation_calibrate"] == 1
    assert "quantized_distillation_train" not in planned


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"conditions": ["teacher", "ptq", "awq"]}, "condition awq: llmcompressor's AWQ needs a GPU, and this machine"),
        ({"defaults": {"format": {"kind": "nvfp4", "group_size": None}}}, "format nvfp4 needs a GPU of compute"),
        ({"defaults": {"distillation": {"on_policy_share": 1.5}}}, "on_policy_share"),
        ({"evaluation": {"texts": {"answers": {"dataset": "tiny_passages"}}}}, "the name 'answers' is taken"),
        ({"evaluation": {"tasks": {"arc_easy": {"dataset": "tiny_chioces"}}}}, "did you mean 'tiny_choices'"),
    ],
)
def test_what_cannot_run_is_refused_while_the_dag_is_built(
    project: Workflow, changed: dict[str, object], message: str
) -> None:
    write_quantized_config(project.directory / CONFIG, changed)
    done = project.run("-n", check=False)
    assert done.returncode != 0
    assert message in done.stdout + done.stderr
