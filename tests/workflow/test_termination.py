"""A step of the workflow that hears SIGTERM saves its state and ends, its last words in its log; its job goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.fake_slurm import PREEMPTED, FakeSlurm
from support.workflow import REPOSITORY

from stillhouse.runtime.scheduler import REQUEUE_VARIABLE

SNAKEFILE = f"""
include: "{REPOSITORY}/rules/termination.smk"

rule step:
    output: "output"
    log: "step.log"
    shell: "python step.py 2>&1 | tee {{log}}"
"""
STEP = """
import signal, sys, time
from pathlib import Path
told = []
signal.signal(signal.SIGTERM, lambda *arguments: told.append(1))
Path("started").touch()
while not told:
    time.sleep(0.01)
print("saving", flush=True)
time.sleep(0.5)
Path("state").touch()
print("saved")
sys.exit(75)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "tell",
    [pytest.param(os.kill, id="the first process is told"), pytest.param(os.killpg, id="each process is told")],
)
def test_a_step_of_a_cluster_job_that_is_told_to_end_saves_its_state_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tell: Callable[[int, int], None]
) -> None:
    slurm = FakeSlurm(tmp_path, monkeypatch)
    slurm.knows(PREEMPTED)
    monkeypatch.delenv(REQUEUE_VARIABLE)
    (tmp_path / "Snakefile").write_text(SNAKEFILE)
    (tmp_path / "step.py").write_text(STEP)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "src")}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    command = [sys.executable, "-m", "snakemake", "--cores", "1", "--mode", "remote"]
    job = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "started").exists():
        assert job.poll() is None and time.monotonic() < deadline, job.communicate()[1]
        time.sleep(0.02)
    tell(job.pid, signal.SIGTERM)
    messages = job.communicate(timeout=60)[1]
    assert job.returncode == 1
    assert (tmp_path / "state").exists(), messages
    assert (tmp_path / "step.log").read_text() == "saving\nsaved\n"
    assert "exit status 75" in messages
    assert slurm.asked.count("requeue 17") == 1
