"""The workflow on a real Slurm: jobs that are ended, cancelled, preempted and lost with their node change no result."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from slurm import one_node
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
STUDENT = "context_distillation/tiny/students/baseline/seed_{seed}"
# All that the workflow makes but for records and the page of costs, which hold times.
COMPARED = tuple(
    f"{RESULTS}/{name}" for name in ("tiny/evaluation/results.json", "tiny/evaluation/items.parquet", "section.md")
)
DRAWN = "results/figures/context_distillation"
# As shipped, but asking more often: the plugin looks after 40 seconds, which spares a shared controller.
PROFILE = ("--workflow-profile", "profiles/slurm", "--latency-wait", "1")
IMPATIENT = ("--slurm-init-seconds-before-status-checks", "8", "--seconds-between-status-checks", "1")

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
        students = held_in_training(project, process)
        preempted = preempted_by_a_more_urgent_job(set(students), process)
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
    attempts = {}
    for seed in SEEDS:
        record = student(project, seed, "run.json")
        assert record["training"]["resumed_from"] > 0
        assert record["scheduler"]["node"] == one_node.NODE
        assert record["scheduler"]["partition"] == "gpu"
        assert record["visible_devices"] in {str(number) for number in range(one_node.GPUS)}
        attempts[seed] = record["scheduler"]["slurm_job_id"]
    for job, times in put_back.items():
        assert attempts[students[job]] == job, f"Slurm did not start job {job} again itself"
        assert continued(project, students[job]) == times, f"job {job} did not append to its log"
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


def held_in_training(project: Workflow, process: subprocess.Popen[bytes]) -> dict[str, int]:
    """The Slurm jobs of the students, and the seed of each.

    Each is stopped as soon as it has saved a state, so that none ends before its time.
    """
    jobs: dict[int, str] = {}

    def hold() -> bool:
        for seed in SEEDS:
            work = project.directory / "work" / STUDENT.format(seed=seed)
            if seed not in jobs and list(work.glob("*/state-*")):
                jobs[seed] = job_logs(project, seed)[0].stem
                one_node.run("scancel", "--signal=STOP", jobs[seed])
        return len(jobs) == len(SEEDS)

    wait(hold, process, "every student to save a state")
    return {job: seed for seed, job in jobs.items()}


def preempted_by_a_more_urgent_job(jobs: set[str], process: subprocess.Popen[bytes]) -> str:
    """Let a job of a partition that goes first come and go while `jobs` fill the node; the one whose place it takes."""
    request = ("--parsable", "--partition=urgent", "--gres=gpu:1", "--mem=1000", "--output=/dev/null", "--wrap=true")
    urgent = one_node.run("sbatch", *request)
    wait(lambda: (urgent, "COMPLETED") in states(), process, f"job {urgent} to take another's place")

    def put_back() -> set[str]:
        return {job for job in jobs if (job, "PENDING") in states()}

    wait(lambda: bool(put_back()), process, "the job that was preempted to be queued again")
    [preempted] = put_back()
    return preempted


def job_logs(project: Workflow, seed: int) -> list[Path]:
    """The logs of the Slurm jobs that have trained the seed's student, in order."""
    folder = project.directory / f"logs/slurm/rule_context_distillation_train/tiny_baseline_{seed}"
    return sorted(folder.glob("*.log"), key=lambda log: int(log.stem))


def continued(project: Workflow, seed: int) -> int:
    """How often the first job of a seed has gone on from a state."""
    return job_logs(project, seed)[0].read_text().count("continuing from step")


def start_again(job: str, process: subprocess.Popen[bytes], prepare: Callable[[], None] = lambda: None) -> None:
    """Start a job that Slurm has put back into its queue, where it lets it wait for two minutes.

    The wait is for remains of the job; here one can look whether there are any. Where the node's daemon remembers the
    job's first attempt all the same, Slurm holds the job and drains the node; an administrator frees both.
    """

    def started() -> bool:
        if f"{job} PENDING launch failed requeued held" in one_node.queue("all", "%i %T %r"):
            set_node("resume")
            one_node.run("scontrol", "release", job)
            one_node.run("scontrol", "update", f"JobId={job}", "StartTime=now")
        return (job, "RUNNING") in states()

    wait(lambda: (job, "PENDING") in states(), process, f"job {job} to be queued again")
    wait(lambda: not one_node.runs_here(job), process, f"the remains of job {job} to go")
    time.sleep(2)  # The node's daemon refuses an attempt that begins in the second in which the last one ended.
    prepare()
    one_node.run("scontrol", "release", job)
    one_node.run("scontrol", "update", f"JobId={job}", "StartTime=now")
    wait(started, process, f"job {job} to start")


def submission(project: Workflow, name: str) -> str:
    """The Slurm job of a group; the group must have been submitted once."""
    [log] = (project.directory / "logs/slurm" / name).rglob("*.log")
    return log.stem


def asked(job: str) -> dict[str, str]:
    """What Slurm says of a job: what it asked for, and where."""
    return dict(re.findall(r"(\w+)=(\S+)", one_node.run("scontrol", "show", "job", job)))


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
