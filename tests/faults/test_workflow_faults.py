"""A workflow killed at random moments: what was finished stays, and the results are those of an undisturbed one."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from base64 import urlsafe_b64decode
from pathlib import Path
from typing import Any

import pytest
from support.workflow import Workflow, make_workflow

from stillhouse.runtime.files import MANIFEST, read_json, sha256_file

STUDY: dict[str, Any] = {"conditions": ["base_zero_shot", "baseline", "online_v1"]}
TARGET = "results/figures/context_distillation/summary.png"
KILLS, SEED = 20, 11

pytestmark = [pytest.mark.faults, pytest.mark.timeout(3600), pytest.mark.xdist_group("workflow")]


def contents(workflow: Workflow) -> dict[str, Any]:
    """The digest of each file of the results and fetched inputs, but for records and curves, which hold times."""
    digests: dict[str, Any] = {}
    for part in ("results", "resources"):
        for manifest in (workflow.directory / part).rglob(MANIFEST):
            files = {
                name: file
                for name, file in read_json(manifest)["files"].items()
                if name != "metrics.jsonl" and not name.startswith("tensorboard/")
            }
            digests[str(manifest.parent.relative_to(workflow.directory))] = files
    for pattern in ("results/figures/**/*.png", "results/**/items.parquet"):
        for path in workflow.directory.glob(pattern):
            digests[str(path.relative_to(workflow.directory))] = sha256_file(path)
    return digests


def finished(workflow: Workflow) -> dict[Path, int]:
    """The output folders of finished jobs, each with its inode: one that is made again gets another.

    A job that was killed between its last step and snakemake's note of it is made again, from its state in work/.
    """
    marks = workflow.directory / ".snakemake" / "incomplete"
    parts = ["".join(path.relative_to(marks).parts) for path in marks.rglob("*") if path.is_file()]
    incomplete = {urlsafe_b64decode(name.replace("@", "")).decode() for name in parts}
    folders = [path.parent for path in workflow.directory.glob("re*/**/manifest.json") if ".staging" not in str(path)]
    return {
        folder: folder.stat().st_ino
        for folder in folders
        if str(folder.relative_to(workflow.directory)) not in incomplete
    }


def end(process: subprocess.Popen[bytes], whole_group: bool) -> None:
    """Kill the workflow alone, or with its jobs."""
    if whole_group:
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()


@pytest.mark.fault(
    "kill -9 of the workflow, with or without its jobs, at random moments",
    "finished folders untouched; results equal to an undisturbed run's, byte for byte",
)
def test_a_workflow_killed_again_and_again_ends_with_equal_results(
    tiny_model: Path, tmp_path: Path, record_property: Any
) -> None:
    record_property("fault_cases", KILLS)
    undisturbed = make_workflow(tmp_path / "undisturbed", tiny_model, STUDY)
    started = time.monotonic()
    undisturbed.run(TARGET)
    seconds = time.monotonic() - started

    draw = random.Random(SEED)
    kills = refused = folders = 0
    while kills < KILLS:
        killed = make_workflow(tmp_path / f"killed_{folders}", tiny_model, STUDY)
        folders += 1
        assert folders <= KILLS, "workflows end before they are killed"
        while kills < KILLS:
            before = finished(killed)
            process = killed.start(TARGET)
            try:
                process.wait(draw.uniform(0, seconds / 3))
                break  # It got to its end between two kills: the next ones meet a fresh folder.
            except subprocess.TimeoutExpired:
                end(process, whole_group=kills % 2 == 0)
            kills += 1
            assert before.items() <= finished(killed).items(), "a finished folder was made again or lost"
            if list((killed.directory / ".snakemake" / "locks").glob("*")):
                again = killed.run(TARGET, check=False)
                refused += 1
                assert again.returncode != 0 and "--unlock" in again.stdout + again.stderr
                killed.run("--unlock")
        killed.run(TARGET)
        assert contents(killed) == contents(undisturbed)
    assert refused >= 1
