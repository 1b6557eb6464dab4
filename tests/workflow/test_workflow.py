"""The whole workflow on a tiny model: it runs, then there is nothing to do, and a change reruns what it reaches."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pandas as pd
import pytest
from support.workflow import TINY_STUDY, Workflow, make_workflow, write_config

STUDY = "src/stillhouse/studies/context_distillation"
FIGURES = {"context_distillation_figure": 5}
STUDENTS = "context_distillation/tiny/students"
REPORT = {"context_distillation_report": 1, "results_page": 1}
AFTER_EVALUATION = {"context_distillation_figure": 4, **REPORT}
AFTER_TRAINING = {"context_distillation_evaluate": 1, **FIGURES, **REPORT}
TRAIN = {"context_distillation_train": 5, **AFTER_TRAINING}
TASK_TEACHER = {"context_distillation_task_teacher": 1, "context_distillation_teacher_cache": 1}
CACHES = {"context_distillation_task_teacher": 1, "context_distillation_teacher_cache": 3}

# One worker runs them all, on one finished workflow.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("workflow")]


EDITED = ("src", "rules", "workflow_scripts", "assets")


@pytest.fixture
def project(finished: Workflow) -> Workflow:
    """The finished workflow; what a test edits is put back."""
    sources = [path for part in EDITED for path in (finished.directory / part).rglob("*")]
    sources = [path for path in sources if path.is_file() and path.suffix != ".pyc"]
    before = {path: path.read_bytes() for path in sources}
    yield finished
    for path, content in before.items():
        path.write_bytes(content)


def test_everything_that_was_asked_for_is_made(finished: Workflow) -> None:
    results = finished.directory / "results"
    assert "## Context distillation" in (results / "results.md").read_text()
    for figure in ("summary", "checkpoint_curve", "ablation_curve", "ablation_bars", "loss"):
        for suffix in ("png", "svg"):
            assert (results / f"figures/context_distillation/{figure}.{suffix}").stat().st_size > 1000
    assert list((results / "tables/context_distillation").glob("*.tex"))
    assert list((results / "tables/context_distillation").glob("*.csv"))
    transfer = (results / "tables/context_distillation/transfer.csv").read_text()
    assert "tiny,tiny_sums,baseline" in transfer
    record = json.loads((results / "context_distillation/tiny/students/online_v1/seed_42/run.json").read_text())
    assert record["settings"]["run"]["distillation"]["top_k"] == 8
    assert {"code", "data", "git", "packages", "devices", "seconds", "peak_memory_mib"} <= set(record)
    last = (results / STUDENTS / "online_v1/seed_42/metrics.jsonl").read_text().splitlines()[-1]
    assert {"loss", "tokens_per_second", "memory_mib", "eta_seconds"} <= set(json.loads(last))
    assert "| context_distillation / train | 6 |" in (results / "results.md").read_text()  # the task's teacher too


def test_every_saved_checkpoint_of_every_condition_is_scored_item_by_item(finished: Workflow) -> None:
    folder = finished.directory / "results/context_distillation/tiny/evaluation"
    results = json.loads((folder / "results.json").read_text())
    items = pd.read_parquet(folder / "items.parquet")
    trained = ["baseline", "online_v1", "kl_t1", "kl_full", "lora_teacher"]
    scored = {(m["condition"], m["step"]): m for m in results["measurements"] if m["split"] == "test"}
    assert scored.keys() == {
        ("base_zero_shot", 0),
        ("base_few_shot", 0),
        *((condition, step) for condition in trained for step in (2, 4)),
    }
    for (condition, step), measurement in scored.items():
        rows = items[(items["condition"] == condition) & (items["step"] == step) & (items["split"] == "test")]
        assert len(rows) == measurement["gold_nll"]["n"] == 6
        assert rows["output"].notna().sum() == measurement["strict"]["n"] == 4
        assert measurement["gold_nll"]["value"] == pytest.approx(rows["gold_nll"].sum() / rows["gold_tokens"].sum())
    assert results["evaluation"]["generation"]["max_new_tokens"] == 8 and results["repeated_mistakes"] == {}
    assert {choice["condition"] for choice in results["selections"]} == set(trained)


def test_one_engine_answers_for_all_adapters_of_a_model(finished: Workflow) -> None:
    log = (finished.directory / "logs/context_distillation/tiny/evaluation.log").read_text()
    engines = re.findall(r"engine for (\S+): ", log)
    assert engines.count("resources/models/tiny") == 1
    # A fully fine-tuned checkpoint is a model of its own.
    assert sorted(Path(engine).name for engine in engines[1:]) == ["checkpoint-2", "checkpoint-4"]


def test_a_second_run_has_nothing_to_do(project: Workflow) -> None:
    assert project.planned() == {}


def test_touching_every_source_reruns_nothing(project: Workflow) -> None:
    state = project.directory / ".snakemake"
    for path in project.directory.rglob("*"):
        source = path.suffix in {".py", ".smk", ".yaml"} or path.name == "Snakefile"
        if source and not path.is_relative_to(state):
            os.utime(path)
    assert project.planned() == {}


def test_a_comment_in_every_module_reruns_nothing(project: Workflow) -> None:
    for path in (project.directory / "src").rglob("*.py"):
        path.write_text(path.read_text() + "\n# A remark.\n")
    assert project.planned() == {}


def test_a_changed_row_of_an_own_data_set_reruns_what_is_made_of_it(project: Workflow) -> None:
    rows = project.directory / "assets/arithmetic/all.jsonl"
    os.utime(rows)
    assert project.planned() == {}
    rows.write_text(rows.read_text().replace("apples", "pears", 1))
    assert project.planned() == {"dataset": 1, "split_dataset": 1, **CACHES, **TRAIN}


def test_changed_weights_of_an_own_model_rerun_all_that_is_made_with_them(project: Workflow) -> None:
    settings = project.directory / "assets/tiny/config.json"
    settings.write_text(settings.read_text().replace("{", '{\n  "remark": "another model",', 1))
    planned = project.planned()
    assert planned.pop("model") == 1
    assert planned == {**CACHES, **TRAIN}


@pytest.mark.parametrize(
    ("module", "rerun"),
    [
        (f"{STUDY}/figures/summary.py", {"context_distillation_figure": 1}),
        (f"{STUDY}/report.py", REPORT),
        ("src/stillhouse/reporting/results_page.py", {"results_page": 1}),
        (f"{STUDY}/evaluate.py", {"context_distillation_evaluate": 1, **AFTER_EVALUATION}),
        (f"{STUDY}/objective.py", {**TASK_TEACHER, **TRAIN}),
        ("src/stillhouse/training/schedules.py", {**TASK_TEACHER, **TRAIN}),
        (f"{STUDY}/teacher.py", {**CACHES, **TRAIN}),
        ("src/stillhouse/data/splits.py", {"split_dataset": 1, **CACHES, **TRAIN}),
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
        (
            {"evaluation": {"generation": {"max_new_tokens": 9}}},
            {"context_distillation_evaluate": 1, **AFTER_EVALUATION},
        ),
        ({"defaults": {"training": {"learning_rate": 3e-3}}}, TRAIN),
        ({"defaults": {"distillation": {"weight": 0.7}}}, {**TRAIN, "context_distillation_train": 4}),
        (
            {"condition_settings": {"kl_t1": {"distillation": {"temperature": 1.5}}}},
            {"context_distillation_train": 1, **AFTER_TRAINING},
        ),
        (
            {"defaults": {"teacher": {"context": {"shots": 3}}}},
            {"context_distillation_teacher_cache": 2, "context_distillation_train": 3, **AFTER_TRAINING},
        ),
        (
            {"conditions": [*TINY_STUDY["conditions"], "random_k"]},
            {"context_distillation_train": 1, **AFTER_TRAINING},
        ),
        ({"seeds": [42, 7]}, TRAIN),
    ],
)
def test_a_change_of_a_setting_reruns_exactly_what_reads_it(
    project: Workflow, change: dict, rerun: dict[str, int]
) -> None:
    write_config(project.directory / "changed.yaml", change)
    assert project.planned(config="changed.yaml") == rerun


def test_the_number_of_gpus_and_cores_reruns_nothing(project: Workflow) -> None:
    resources = ["resources={training: {gpus: 4, threads: 1, memory_mb: 9000}}"]
    assert project.planned("--resources", "gpu=4", "--config", *resources) == {}


def test_one_figure_asked_for_by_its_path_needs_only_its_own_jobs(tiny_model: Path, tmp_path: Path) -> None:
    workflow = make_workflow(tmp_path / "project", tiny_model)
    training = {
        "model": 1,
        "dataset": 1,
        "split_dataset": 1,
        "context_distillation_task_teacher": 1,
        "context_distillation_teacher_cache": 3,
        "context_distillation_train": 5,
    }
    assert workflow.planned("train") == {**training, "train": 1}
    figure = "results/figures/context_distillation/loss.png"
    assert workflow.planned(figure) == {**training, "context_distillation_figure": 1}


def test_an_evaluation_that_is_made_again_computes_only_what_is_missing(project: Workflow) -> None:
    directory = project.directory / "results/context_distillation/tiny/evaluation"
    before = {name: (directory / name).read_bytes() for name in ("results.json", "items.parquet")}
    parts = sorted((project.directory / "work/context_distillation/tiny/evaluation").glob("*.parquet"))
    parts[0].unlink()
    for name in before:
        (directory / name).unlink()
    project.run(str(directory.relative_to(project.directory) / "results.json"))
    record = json.loads((directory / "run.json").read_text())
    assert (record["parts_computed"], record["parts_kept"]) == (1, len(parts) - 1)
    assert {name: (directory / name).read_bytes() for name in before} == before


def test_four_gpus_train_two_students_side_by_side_and_then_evaluate_on_all(tiny_model: Path, tmp_path: Path) -> None:
    project = make_workflow(
        tmp_path / "project", tiny_model, {"conditions": ["base_zero_shot", "baseline", "online_v1"]}
    )
    layers = ("--configfile", "tiny.yaml", "config/variants/four_gpus.yaml")
    shown = project.run("-n", "--resources", "gpu=4", *layers).stdout
    jobs = re.findall(r"^rule (\w+):$(?:\n    .*)*\n    resources: .*?\bgpu=(\d)", shown, re.MULTILINE)
    assert [int(gpus) for rule, gpus in jobs if rule == "context_distillation_train"] == [2, 2]
    assert [int(gpus) for rule, gpus in jobs if rule == "context_distillation_evaluate"] == [4]
    assert "gpu_lease.py --at-most --distributed 2 --" in shown and "gpu_lease.py --at-most 4 --" in shown


def test_the_dag_can_be_drawn(project: Workflow) -> None:
    assert project.run("--dag", "mermaid-js").stdout.lstrip().startswith(("---", "flowchart", "graph"))


def test_the_workflow_never_imports_torch(project: Workflow) -> None:
    code = (
        "import sys, runpy; sys.argv = ['snakemake', '-n', '--configfile', 'tiny.yaml', '--cores', '1']\n"
        "from snakemake.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(project.directory / "src")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=project.directory, env=environment, capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-1] == "False False"


@pytest.mark.fault("two workflows in one directory", "the second is refused by a line that says why")
def test_two_workflows_in_one_directory_are_told_apart(project: Workflow) -> None:
    request = ["results/context_distillation/section.md", "--forcerun", "context_distillation_report"]
    with project.start(*request) as first:
        lock = project.directory / ".snakemake" / "locks" / "0.output.lock"  # the second of two that it writes
        while first.poll() is None and not (lock.is_file() and lock.stat().st_size):
            time.sleep(0.01)
        os.killpg(first.pid, signal.SIGSTOP)  # held where it has the lock, however fast it is
        second = project.run(*request, check=False)
        os.killpg(first.pid, signal.SIGCONT)
        assert first.wait() == 0
    assert second.returncode == 1
    assert "Directory cannot be locked" in second.stdout + second.stderr


def test_the_report_is_made_with_a_caption_for_every_figure(project: Workflow) -> None:
    project.run("--report", "report.zip")
    with zipfile.ZipFile(project.directory / "report.zip") as archive:
        text = "".join(archive.read(name).decode(errors="replace") for name in archive.namelist() if "html" in name)
    assert "negative log-likelihood of the gold answer" in text.lower()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["results/figures/context_distillation/sumary.png"],
            "unknown figure 'sumary': did you mean 'summary'?",
        ),
        (["--config", "context_distillation={defaults: {training: {step: 3}}}"], "did you mean 'steps'?"),
        (["--configfile", "absent.yaml"], "absent.yaml"),
        (
            ["--forceall", "--config", "models={tiny: {sources: [{kind: path, path: assets/tinny}]}}"],
            "model 'tiny': assets/tinny does not exist: correct the path in sources",
        ),
        (["resources/models/param2_17b_a2_4b"], "model 'param2_17b_a2_4b': sources.0.revision is not set"),
        (["resources/models/smollm_135m"], "unknown model 'smollm_135m': did you mean 'smollm2_135m'?"),
    ],
)
def test_a_wrong_request_gets_one_clear_line(project: Workflow, arguments: list[str], message: str) -> None:
    done = project.run("-n", *arguments, check=False)
    assert done.returncode != 0
    assert message in done.stderr + done.stdout
