"""The workflow on a real Slurm: jobs that are ended, cancelled, preempted and lost with their node change no result."""

from __future__ import annotations

import os
import re
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
from slurm import one_node
from slurm.jobs import (
    IMPATIENT,
    PROFILE,
    STUDENT,
    continued,
    held_in_training,
    job_logs,
    messages,
    preempted_by_a_more_urgent_job,
    set_node,
    start_again,
    states,
    wait,
)
from support.workflow import Workflow, make_workflow

from stillhouse.runtime.files import read_json

# A student for each disturbance, and for each of the node's GPUs.
SEEDS = (1, 2, 3, 4)
STUDY = {
    "conditions": ["base_zero_shot", "baseline"],
    "seeds": list(SEEDS),
    "defaults": {"training": {"steps": 48, "save_every": 48, "resume_every": 1}},
}
RESULTS = "results/context_distillation"
# All that the workflow makes but for records and the page of costs, which hold times.
COMPARED = tuple(
    f"{RESULTS}/{name}" for name in ("tiny/evaluation/results.json", "tiny/evaluation/items.parquet", "section.md")
)
DRAWN = "results/figures/context_distillation"

pytestmark = [pytest.mark.slow, pytest.mark.slurm, pytest.mark.xdist_group("slurm"), pytest.mark.timeout(1800)]


@dataclass(frozen=True)
class Disturbed:
    """A workflow that has ended on Slurm after all that happened to its first jobs, and one left in peace."""

    project: Workflow
    undisturbed: Workflow
    students: dict[str, int]
    cancelled: str
    lost: str
    terminated: str
    preempted: str


@pytest.fixture(scope="module")
def disturbed(slurm: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Disturbed:
    """Jobs that are told to end, cancelled, lost with their node, and preempted; they see four GPUs."""
    folder = tmp_path_factory.mktemp("workflows")
    undisturbed = make_workflow(folder / "undisturbed", tiny_model, STUDY)
    undisturbed.run()
    project = make_workflow(folder / "project", tiny_model, STUDY)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("STILLHOUSE_FAKE_GPUS", ",".join(f"GPU-{number}" for number in range(one_node.GPUS)))
        process = project.start(*PROFILE, *IMPATIENT, cores=None)
    try:
        students = held_in_training(project, process, SEEDS)
        preempted = preempted_by_a_more_urgent_job(set(students), process, gpus=1)
        cancelled, lost, terminated = sorted(set(students) - {preempted}, key=int)
        one_node.run("scancel", "--signal=CONT", terminated)
        one_node.run("scancel", "--signal=TERM", terminated)  # As Slurm does before a job's time is over.
        one_node.run("scancel", cancelled)
        set_node("drain")
        assert one_node.node_state() == "draining"
        wait(lambda: (terminated, "PENDING") in states(), process, f"job {terminated} to save its state and end")
        for job in (preempted, terminated):
            one_node.run("scontrol", "hold", job)  # Until the node is back and no other job needs looking after.
        set_node("down")
        start_again(lost, process, lambda: set_node("resume"))
        wait(lambda: continued(project, students[lost]) == 1, process, f"job {lost} to continue")
        one_node.run("scontrol", "requeue", lost)  # What an administrator does.
        for job in (lost, terminated, preempted):
            start_again(job, process)
        assert process.wait(900) == 0, messages(project)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return Disturbed(project, undisturbed, students, cancelled, lost, terminated, preempted)


def test_a_workflow_that_loses_jobs_and_a_node_ends_with_the_results_of_an_undisturbed_run(
    disturbed: Disturbed,
) -> None:
    project, undisturbed = disturbed.project, disturbed.undisturbed
    for path in COMPARED:
        assert (project.directory / path).read_bytes() == (undisturbed.directory / path).read_bytes(), path
    drawn, expected = ({figure.name: figure.read_bytes() for figure in figures(one)} for one in (project, undisturbed))
    assert drawn == expected != {}
    for seed in SEEDS:
        assert weights(project, seed) == weights(undisturbed, seed) != {}
    assert project.planned() == {}


def test_every_disturbed_training_goes_on_from_its_last_state(disturbed: Disturbed) -> None:
    project, students = disturbed.project, disturbed.students
    put_back = {disturbed.lost: 2, disturbed.terminated: 1, disturbed.preempted: 1}
    assert {(disturbed.cancelled, "CANCELLED"), *((job, "COMPLETED") for job in put_back)} <= states()
    attempts, restarts = {}, {}
    for seed in SEEDS:
        record = student(project, seed, "run.json")
        assert record["training"]["resumed_from"] > 0
        assert record["scheduler"]["node"] == one_node.NODE
        assert record["scheduler"]["partition"] == "gpu"
        assert record["visible_devices"] in {str(number) for number in range(one_node.GPUS)}
        attempts[seed] = record["scheduler"]["slurm_job_id"]
        restarts[seed] = record["scheduler"]["restarts"]
    for job, times in put_back.items():
        assert attempts[students[job]] == job, f"Slurm did not start job {job} again itself"
        assert continued(project, students[job]) == times, f"job {job} did not append to its log"
        assert int(restarts[students[job]]) >= times
    again = attempts[students[disturbed.cancelled]]
    assert again != disturbed.cancelled, f"job {disturbed.cancelled} was not submitted again"
    assert [log.stem for log in job_logs(project, students[disturbed.cancelled])] == [disturbed.cancelled, again]
    said = job_logs(project, students[disturbed.terminated])[0].read_text()
    assert "SIGTERM: saving the state after this step" in said
    assert f"job {disturbed.terminated} goes back into Slurm's queue" in said


def test_jobs_ask_for_what_the_profile_says(disturbed: Disturbed) -> None:
    inputs = asked(submission(disturbed.project, "group_inputs_dataset_model_split_dataset"))
    training = asked(disturbed.cancelled)
    expected = {"Partition": "gpu", "TimeLimit": "04:00:00", "MinMemoryNode": "8000M", "NumCPUs": "2"}
    assert training.items() >= expected.items()
    assert [training[name] for name in training if name.startswith("TresPer")] == ["gres:gpu:1"]
    assert inputs["Partition"] == "cpu" and not [name for name in inputs if name.startswith("TresPer")]


def test_small_jobs_share_submissions_through_to_the_results_page(disturbed: Disturbed) -> None:
    assert "## Context distillation" in (disturbed.project.directory / "results/results.md").read_text()
    submitted = {path.name for path in (disturbed.project.directory / "logs/slurm").iterdir()}
    small = {name.removeprefix("group_").partition("_")[0] for name in submitted if name.startswith("group_")}
    assert small >= {"inputs", "figures", "report"}, submitted


def figures(project: Workflow) -> list[Path]:
    """The figures that a workflow has drawn."""
    return sorted((project.directory / DRAWN).glob("*.png"))


def submission(project: Workflow, name: str) -> str:
    """The Slurm job of a group; the group must have been submitted once."""
    [log] = (project.directory / "logs/slurm" / name).rglob("*.log")
    return log.stem


def asked(job: str) -> dict[str, str]:
    """What Slurm says of a job: what it asked for, and where."""
    return dict(re.findall(r"(\w+)=(\S+)", one_node.run("scontrol", "show", "job", job)))


def student(project: Workflow, seed: int, name: str) -> dict:
    """A JSON file of a student."""
    return read_json(project.directory / "results" / STUDENT.format(seed=seed) / name)


def weights(project: Workflow, seed: int) -> dict[str, str]:
    """The sha256 of each file of a student's weights."""
    files = student(project, seed, "manifest.json")["files"]
    return {name: entry["sha256"] for name, entry in files.items() if name.endswith(".safetensors")}
