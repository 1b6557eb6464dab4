"""The workflow on a real Slurm: it survives a cancelled job and a lost node, and results do not change."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from slurm import one_node
from support.workflow import Workflow, make_workflow

from stillhouse.runtime.files import read_json

SEEDS = (1, 2)
STUDY = {
    "conditions": ["base_zero_shot", "baseline"],
    "seeds": list(SEEDS),
    "defaults": {"training": {"steps": 24, "save_every": 24, "resume_every": 1}},
}
EVALUATION = "results/context_distillation/tiny/evaluation"
STUDENT = "context_distillation/tiny/students/baseline/seed_{seed}"
TARGET, *_ = COMPARED = (f"{EVALUATION}/results.json", f"{EVALUATION}/items.parquet")
# As shipped, but asking more often: the plugin looks after 40 seconds, which spares a shared controller.
PROFILE = ("--workflow-profile", "profiles/slurm", "--latency-wait", "5")
IMPATIENT = ("--slurm-init-seconds-before-status-checks", "8", "--seconds-between-status-checks", "1")

pytestmark = [pytest.mark.slow, pytest.mark.slurm, pytest.mark.xdist_group("slurm"), pytest.mark.timeout(900)]


@pytest.fixture
def project(slurm: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workflow:
    """A fresh workflow whose jobs see four GPUs, of which Slurm gives them some."""
    monkeypatch.setenv("STILLHOUSE_FAKE_GPUS", ",".join(f"GPU-{number}" for number in range(one_node.GPUS)))
    return make_workflow(tmp_path / "project", tiny_model, STUDY)


@pytest.fixture
def undisturbed(tiny_model: Path, tmp_path: Path) -> Workflow:
    """The same workflow on the machine itself."""
    return make_workflow(tmp_path / "undisturbed", tiny_model, STUDY)


def test_a_workflow_that_loses_a_job_and_a_node_ends_with_the_results_of_an_undisturbed_run(
    project: Workflow, undisturbed: Workflow
) -> None:
    undisturbed.run(TARGET)
    process = project.start(TARGET, *PROFILE, *IMPATIENT)
    try:
        cancelled = job_in_training(project, process, 1)
        one_node.run("scancel", cancelled)
        lost = job_in_training(project, process, 2)
        set_node("drain")
        assert one_node.node_state() == "draining"
        set_node("down")
        wait(lambda: (lost, "PENDING") in states(), process, f"job {lost} to be queued again")
        # Slurm lets a lost job wait for two minutes, so that its remains are gone; here one can look.
        wait(lambda: not one_node.runs_here(lost), process, f"the remains of job {lost} to go")
        set_node("resume")
        one_node.run("scontrol", "update", f"JobId={lost}", "StartTime=now")
        assert process.wait(600) == 0, messages(project)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)

    assert (cancelled, "CANCELLED") in states()
    assert (lost, "COMPLETED") in states()
    attempts = {}
    for seed in SEEDS:
        record = student(project, seed, "run.json")
        assert record["training"]["resumed_from"] > 0
        assert record["scheduler"]["node"] == one_node.NODE
        assert record["visible_devices"] in {str(number) for number in range(one_node.GPUS)}
        attempts[seed] = record["scheduler"]["slurm_job_id"]
    assert attempts[1] != cancelled, "the cancelled job was not submitted again"
    assert attempts[2] == lost, "Slurm did not start the lost job again itself"
    logs = sorted((project.directory / "logs/slurm/rule_context_distillation_train/tiny_baseline_1").glob("*.log"))
    assert [log.stem for log in logs] == [cancelled, attempts[1]]
    [log] = (project.directory / "logs/slurm/rule_context_distillation_train/tiny_baseline_2").glob("*.log")
    assert log.read_text().count("continuing from step") == 1

    for path in COMPARED:
        assert (project.directory / path).read_bytes() == (undisturbed.directory / path).read_bytes(), path
    for seed in SEEDS:
        assert weights(project, seed) == weights(undisturbed, seed) != {}
    assert project.planned(TARGET) == {}


def job_in_training(project: Workflow, process: subprocess.Popen[bytes], seed: int) -> str:
    """The Slurm job that trains the seed's student, once it has saved a state."""
    work = project.directory / "work" / STUDENT.format(seed=seed)
    logs = project.directory / f"logs/slurm/rule_context_distillation_train/tiny_baseline_{seed}"
    wait(lambda: bool(list(work.glob("*/state-*"))), process, f"seed {seed} to save a state")
    [log] = logs.glob("*.log")
    return log.stem


def set_node(state: str) -> None:
    """Drain, lose or bring back the node."""
    one_node.run("scontrol", "update", f"NodeName={one_node.NODE}", f"State={state}", "Reason=test")


def states() -> set[tuple[str, str]]:
    """Each job's number and state, finished ones too."""
    return {(job, state) for job, state in (line.split() for line in one_node.queue("all", "%i %T"))}


def student(project: Workflow, seed: int, name: str) -> dict:
    """A JSON file of a student."""
    return read_json(project.directory / "results" / STUDENT.format(seed=seed) / name)


def weights(project: Workflow, seed: int) -> dict[str, str]:
    """The sha256 of each file of a student's weights."""
    files = student(project, seed, "manifest.json")["files"]
    return {name: entry["sha256"] for name, entry in files.items() if name.endswith(".safetensors")}


def wait(condition: Callable[[], bool], process: subprocess.Popen[bytes], what: str) -> None:
    """Wait, as long as the workflow runs."""
    deadline = time.monotonic() + 600
    while not condition():
        assert process.poll() is None, f"the workflow ended before {what}"
        assert time.monotonic() < deadline, f"waited in vain for {what}: {one_node.queue('all', '%i %T %r')}"
        time.sleep(0.02)


def messages(project: Workflow) -> str:
    """The end of what snakemake said."""
    [log] = (project.directory / ".snakemake/log").glob("*.log")
    return log.read_text()[-5000:]
