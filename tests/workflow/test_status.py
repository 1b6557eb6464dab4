"""`make status` says what is done, running, interrupted and stale, while a workflow runs and after it was killed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from base64 import urlsafe_b64encode
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from support.workflow import REPOSITORY, make_workflow

SNAKEFILE = """
rule all:
    input: "results/slow/last", "results/other"

rule quick:
    output: "results/{name}"
    wildcard_constraints: name="first|other"
    params: size=lambda wildcards: config["size"] if wildcards.name == "first" else 0
    shell: "echo {params.size} > {output}"

rule slow:
    input: "results/first"
    output: "results/slow/last"
    log: "logs/slow/last.log"
    shell:
        "(echo gpu_lease: leased GPU-1; echo step 3/9) > {log}; "
        "while [ ! -e go ]; do sleep 0.1; done; cp {input} {output}"
"""

pytestmark = pytest.mark.slow


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "Snakefile").write_text(SNAKEFILE)
    return tmp_path


@pytest.fixture
def running(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A workflow that waits in its slow job."""
    quiet = subprocess.DEVNULL
    command = [sys.executable, "-m", "snakemake", "--cores", "1", "--config", "size=1"]
    process = subprocess.Popen(command, cwd=folder, stdout=quiet, stderr=quiet, start_new_session=True)
    deadline = time.monotonic() + 120
    while not ((folder / "logs/slow/last.log").exists() and (folder / "results/first").exists()):
        assert process.poll() is None and time.monotonic() < deadline, "the slow job did not start"
        time.sleep(0.05)
    yield process
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def status(folder: Path, size: int = 1, arguments: Sequence[str] = ()) -> str:
    command = [
        sys.executable,
        str(REPOSITORY / "workflow_scripts/status.py"),
        *(arguments or ("--config", f"size={size}")),
    ]
    before = set(folder.glob(".snakemake/locks/*"))
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert set(folder.glob(".snakemake/locks/*")) == before
    return done.stdout


def test_before_anything_ran_all_is_missing_and_nothing_starts(folder: Path) -> None:
    text = status(folder)
    assert text.startswith("0 of 3 files are up to date\n")
    assert "not made yet, files by rule: 2 quick, 1 slow" in text
    assert not (folder / "results").exists()


def test_a_running_job_is_shown_with_the_last_line_of_its_log_and_after_a_kill_as_interrupted(
    folder: Path, running: subprocess.Popen[bytes]
) -> None:
    text = status(folder)
    assert "running:\n  results/slow/last on GPU-1\n      step 3/9\n" in text
    assert re.search(r"newest run: [12] of 4 jobs after [\d:]+; at that pace [\d:]+ more\n", text)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    assert "or was killed (then: snakemake --unlock):\n  results/slow/last on GPU-1\n" in status(folder)
    for lock in folder.glob(".snakemake/locks/*"):
        lock.unlink()
    assert "interrupted (run again to go on from there):\n  results/slow/last on GPU-1\n" in status(folder)


def test_what_is_stale_is_shown_with_its_reason_and_what_is_done_is_counted(
    folder: Path, running: subprocess.Popen[bytes]
) -> None:
    (folder / "go").touch()
    assert running.wait(120) == 0
    assert status(folder).startswith("3 of 3 files are up to date\n")
    text = status(folder, size=2)
    assert text.startswith("1 of 3 files are up to date\n")
    assert "stale, a setting or the code of its step changed:\n  results/first\n" in text
    assert "stale, something that it is made from is made again:\n  results/slow/last\n" in text


LOGS = {
    "resources/models/tiny": "logs/assets/model/tiny.log",
    "results/context_distillation/data/tiny_arithmetic": "logs/context_distillation/split/tiny_arithmetic.log",
    "results/context_distillation/tiny/evaluation/items.parquet": "logs/context_distillation/tiny/evaluation.log",
    "results/figures/context_distillation/{figure}.svg": "logs/context_distillation/figures/{figure}.log",
    "results/tables/context_distillation": "logs/context_distillation/report.log",
    "results/results.md": "logs/results_page.log",
}


def test_the_log_of_every_kind_of_job_of_the_workflow_is_found(tiny_model: Path, tmp_path: Path) -> None:
    project = make_workflow(tmp_path / "project", tiny_model).directory
    figure = next((project / "src/stillhouse/studies/context_distillation/figures").glob("[!_]*.py")).stem
    logs = {output.format(figure=figure): project / log.format(figure=figure) for output, log in LOGS.items()}
    marks = project / ".snakemake/incomplete"
    marks.mkdir(parents=True)
    for number, (output, log) in enumerate(logs.items()):
        (marks / urlsafe_b64encode(output.encode()).decode()).touch()
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(f"line {number}")
    text = status(project, arguments=["--configfile", "tiny.yaml"])
    for number, output in enumerate(logs):
        assert f"  {output}\n      line {number}\n" in text
