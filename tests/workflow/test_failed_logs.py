"""A failed run ends with the last lines of the failed job's own log, and of no other."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.workflow import REPOSITORY

HOOK = (REPOSITORY / "Snakefile").read_text().partition("\n\nonerror:")[2]
RULES = """
rule all:
    input: "good", "bad", "second_time"

rule:
    name: "good"
    output: "good"
    log: "logs/good.log"
    shell: "echo fine | tee {log}; touch {output}"

rule:
    name: "second_time"
    output: "second_time"
    log: "logs/second_time.log"
    shell: "echo not yet > {log}; [ -e tried ] || (touch tried; exit 1); touch {output}"

rule:
    name: "bad"
    output: "bad"
    log: "logs/bad.log"
    shell: "(seq 1 100; printf 'epoch 1\\repoch 2\\n'; echo 'error: data.jsonl: is empty'; exit 1) > {log} 2>&1"
"""


@pytest.mark.slow
def test_a_failure_prints_the_end_of_the_right_log(tmp_path: Path) -> None:
    assert HOOK, "the Snakefile prints no logs after a failure"
    shutil.copytree(REPOSITORY / "workflow_scripts", tmp_path / "workflow_scripts")
    (tmp_path / "Snakefile").write_text(f"{RULES}\n\nonerror:{HOOK}")
    command = [sys.executable, "-m", "snakemake", "--cores", "1", "--keep-going", "--retries", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    [end] = done.stderr.split(": the end of ")[1:]
    lines = [line.strip() for line in end.splitlines()]
    assert lines[0] == "logs/bad.log"
    last = lines.index("error: data.jsonl: is empty")
    assert lines[last - 2 : last] == ["100", "epoch 2"]
    assert "50" not in lines


GROUP = """\
[Sat Nov 21 09:41:50 2026]
    message: Error in group inputs
    [Sat Nov 21 09:41:50 2026]
    Error in rule dataset:
        jobid: 2
        log: logs/dataset.log (check log file(s) for error details)
    [Sat Nov 21 09:41:50 2026]
    Error in rule split:
        jobid: 1
        log: logs/split.log (check log file(s) for error details)
Finished jobid: 1 (Rule: split)
"""


def test_a_failure_inside_a_group_of_jobs_is_found(tmp_path: Path) -> None:
    (tmp_path / "run.log").write_text(GROUP)
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/dataset.log").write_text("error: no such file\n")
    command = [sys.executable, str(REPOSITORY / "workflow_scripts/failed_logs.py"), "run.log"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.stderr == "dataset: the end of logs/dataset.log\n    error: no such file\n"
