"""What tests do to the jobs of a workflow on Slurm: hold them, let them go on, look at them, and wait."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from slurm import one_node
from support.workflow import Workflow

STUDENT = "context_distillation/tiny/students/baseline/seed_{seed}"
# As shipped, but asking more often: the plugin looks after 40 seconds, which spares a shared controller.
PROFILE = ("--workflow-profile", "profiles/slurm", "--latency-wait", "1")
IMPATIENT = ("--slurm-init-seconds-before-status-checks", "8", "--seconds-between-status-checks", "1")


def held_in_training(project: Workflow, process: subprocess.Popen[bytes], seeds: Sequence[int]) -> dict[str, int]:
    """The Slurm jobs of the students, and the seed of each.

    Each is stopped as soon as it has saved a state, so that none ends before its time.
    """
    jobs: dict[int, str] = {}

    def hold() -> bool:
        for seed in seeds:
            work = project.directory / "work" / STUDENT.format(seed=seed)
            if seed not in jobs and list(work.glob("*/state-*")):
                jobs[seed] = job_logs(project, seed)[0].stem
                one_node.run("scancel", "--signal=STOP", jobs[seed])
        return len(jobs) == len(seeds)

    wait(hold, process, "every student to save a state")
    return {job: seed for seed, job in jobs.items()}


def preempted_by_a_more_urgent_job(jobs: set[str], process: subprocess.Popen[bytes], gpus: int) -> str:
    """Let a job come and go whose partition goes first, and that lacks the place of one of `jobs`; the one it was."""
    request = (
        "--parsable",
        "--partition=urgent",
        f"--gres=gpu:{gpus}",
        "--mem=1000",
        "--output=/dev/null",
        "--wrap=true",
    )
    urgent = one_node.run("sbatch", *request)
    wait(lambda: (urgent, "COMPLETED") in states(), process, f"job {urgent} to take another's place")

    def put_back() -> set[str]:
        return {job for job in jobs if (job, "PENDING") in states()}

    wait(lambda: bool(put_back()), process, "the job that was preempted to be queued again")
    [preempted] = put_back()
    return preempted


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


def job_logs(project: Workflow, seed: int) -> list[Path]:
    """The logs of the Slurm jobs that have trained the seed's student, in order."""
    folder = project.directory / f"logs/slurm/rule_context_distillation_train/tiny_baseline_{seed}"
    return sorted(folder.glob("*.log"), key=lambda log: int(log.stem))


def continued(project: Workflow, seed: int) -> int:
    """How often the first job of a seed has gone on from a state."""
    return job_logs(project, seed)[0].read_text().count("continuing from step")


def set_node(state: str) -> None:
    """Drain, lose or bring back the node."""
    one_node.run("scontrol", "update", f"NodeName={one_node.NODE}", f"State={state}", "Reason=test")


def states() -> set[tuple[str, str]]:
    """Each job's number and state, finished ones too."""
    return {(job, state) for job, state in (line.split() for line in one_node.queue("all", "%i %T"))}


def wait(condition: Callable[[], bool], process: subprocess.Popen[bytes], what: str) -> None:
    """Wait, as long as the workflow runs."""
    deadline = time.monotonic() + 600
    while not condition():
        assert process.poll() is None, f"the workflow ended before {what}"
        assert time.monotonic() < deadline, f"waited in vain for {what}: {one_node.queue('all', '%i %T %r')}"
        time.sleep(0.02)


def messages(project: Workflow) -> str:
    """The end of what snakemake said, the last time it ran."""
    return max((project.directory / ".snakemake/log").glob("*.log")).read_text()[-5000:]
