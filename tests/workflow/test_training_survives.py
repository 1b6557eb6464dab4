"""A student's training that is killed goes on where it stopped, and ends with the very same weights."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from support.workflow import Workflow

from stillhouse.runtime.files import read_json

STUDENT = "results/context_distillation/tiny/students/online_v1/seed_42"
WORK = "work/context_distillation/tiny/students/online_v1/seed_42"

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("workflow")]


def weights(workflow: Workflow) -> dict[str, str]:
    """The sha256 of each checkpoint file of the student."""
    files = read_json(workflow.directory / STUDENT / "manifest.json")["files"]
    return {name: entry["sha256"] for name, entry in files.items() if name.endswith(".safetensors")}


@pytest.fixture
def untrained(finished: Workflow, tmp_path: Path) -> Workflow:
    """The finished workflow in another folder, its student taken away."""
    copy = tmp_path / "project"
    shutil.copytree(finished.directory, copy, symlinks=True)
    for path in (copy / STUDENT, copy / WORK):
        shutil.rmtree(path)
    return Workflow(copy)


@pytest.mark.fault(
    "kill -9 of the workflow and its jobs in a training",
    "after --unlock: resumed where it stopped; equal weights",
)
def test_a_workflow_killed_in_the_middle_of_training_ends_with_equal_weights(
    finished: Workflow, untrained: Workflow
) -> None:
    process = untrained.start(STUDENT)
    work = untrained.directory / WORK
    deadline = time.monotonic() + 240
    while not list(work.glob("*/state-*")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert list(work.glob("*/state-*")), "the run ended before it saved a state"
    assert not (untrained.directory / STUDENT).exists()
    untrained.run("--unlock")
    untrained.run(STUDENT)
    assert read_json(untrained.directory / STUDENT / "run.json")["training"]["resumed_from"] > 0
    assert weights(untrained) == weights(finished)
