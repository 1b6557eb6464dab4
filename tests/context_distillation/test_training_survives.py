"""A student's training that is killed goes on where it stopped, and ends with the very same weights."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.workflow import Workflow, make_workflow

from stillhouse.runtime.files import read_json

STUDENT = "results/context_distillation/tiny/students/online_v1/seed_42"

pytestmark = pytest.mark.slow


def weights(workflow: Workflow) -> dict[str, str]:
    """The sha256 of each checkpoint file of the student."""
    files = read_json(workflow.directory / STUDENT / "manifest.json")["files"]
    return {name: entry["sha256"] for name, entry in files.items() if name.endswith(".safetensors")}


def test_a_workflow_killed_in_the_middle_of_training_ends_with_equal_weights(tiny_model: Path, tmp_path: Path) -> None:
    longer = {"defaults": {"training": {"steps": 12, "save_every": 6}}}
    undisturbed = make_workflow(tmp_path / "undisturbed", tiny_model, longer)
    undisturbed.run(STUDENT)
    killed = make_workflow(tmp_path / "killed", tiny_model, longer)
    environment = {**os.environ, "PYTHONPATH": str(killed.directory / "src")}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    command = [sys.executable, "-m", "snakemake", "--configfile", "tiny.yaml", "--cores", "2", STUDENT]
    process = subprocess.Popen(
        command, cwd=killed.directory, env=environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=-3
    )
    work = killed.directory / "work/context_distillation/tiny/students/online_v1"
    deadline = time.monotonic() + 240
    while not list(work.glob("seed_42/*/state-*")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert list(work.glob("seed_42/*/state-*")), "the run ended before it saved a state"
    assert not (killed.directory / STUDENT).exists()
    killed.run("--unlock")
    killed.run(STUDENT)
    assert read_json(killed.directory / STUDENT / "run.json")["training"]["resumed_from"] > 0
    assert weights(killed) == weights(undisturbed)
