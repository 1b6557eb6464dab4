"""How long the workflow takes to look at its DAG: dry run, one figure, and a real run that finds nothing to do; time,
memory, growth.

The default configuration first, then a study of 6 models, 20 conditions, 5 seeds and a sweep of so many points over
each condition: 16 points make 10,200 trainings. Nothing is trained: for the no-op run every output is an empty
stand-in whose record (settings, code) is the one that a real run leaves, so that each staleness check is really made.
A job that started nevertheless would fail at once, on empty inputs.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from benchmarks.results import CommandResult, WorkflowResult

REPOSITORY = Path(__file__).resolve().parents[1]
SNAKEMAKE = ("-m", "snakemake")
# `--touch` waits a tenth of a second for each job, so that times of files differ: twenty minutes for 10,000 jobs.
TOUCH = "from snakemake import cli; from snakemake.executors import touch; touch.Executor.SLEEPING_TIME = 0; cli.main()"
# Runs a command and writes its status, processor seconds and peak memory. A small process between: a child's peak would
# otherwise begin at that of this one, which has torch loaded.
MEASURED = (
    "import json, resource, subprocess, sys; status = subprocess.call(sys.argv[2:]); "
    "used = resource.getrusage(resource.RUSAGE_CHILDREN); "
    "json.dump([status, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024], open(sys.argv[1], 'w'))"
)
PARTS = ("Snakefile", "rules", "src", "workflow_scripts", "config", "envs", "profiles", "docs/captions")
MODELS, CONDITIONS, SEEDS = 6, 20, 5
SIZES = (0, 16)
# At the default configuration without a job to do, where seconds matter; the median counts.
LOOKS = 3
# Of a study that does not grow: its own jobs alone are to be looked at, however many others there are.
FIGURE = "results/figures/consistency_lens/losses.png"


def measure_workflow(sizes: Sequence[int] = SIZES) -> WorkflowResult:
    """The default configuration, and one with a sweep of each number of points."""
    return WorkflowResult(
        measured=datetime.now(UTC).replace(microsecond=0),
        default=measure(None),
        sizes=tuple(measure(points) for points in sizes),
    )


def measure(points: int | None) -> dict[str, CommandResult]:
    """Dry run, dry run of one figure and no-op run of one size; None is the default configuration."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "project"
        make_project(directory, points)
        dry_run, planned = snakemake(directory, "-n")
        one_figure, _ = snakemake(directory, "-n", FIGURE)
        stand_in_outputs(directory, planned)
        looks = [snakemake(directory)[0] for _ in range(LOOKS if points is None else 1)]
        no_op = sorted(looks, key=lambda look: look.seconds)[len(looks) // 2]
        if no_op.jobs:
            raise SystemExit(f"{no_op.jobs} jobs reran although nothing changed")
    return {"dry run": dry_run, "one figure": one_figure, "no-op": no_op}


def configuration(points: int) -> dict[str, Any]:
    """A study of 6 models x 20 conditions x 5 seeds, with a sweep of `points` learning rates over each condition."""
    source = {"format": "transformers", "licence": "none", "sources": [{"kind": "path", "path": "assets/model"}]}
    conditions = {f"condition_{number}": {"distillation": {"weight": 0.1 * number}} for number in range(CONDITIONS)}
    rates = [1e-5 * (point + 1) for point in range(points)]
    return {
        "models": {f"model_{number}": source for number in range(MODELS)},
        "context_distillation": {
            "models": [f"model_{number}" for number in range(MODELS)],
            "conditions": ["base_zero_shot", "base_few_shot", *conditions],
            "condition_settings": conditions,
            "seeds": list(range(SEEDS)),
            "sweeps": {
                name: {"condition": name, "axes": {"training.learning_rate": rates}} for name in conditions if points
            },
        },
    }


def make_project(directory: Path, points: int | None) -> None:
    """A folder with a copy of the workflow and the configuration of that size."""
    directory.mkdir()
    for part in PARTS:
        source, target = REPOSITORY / part, directory / part
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    (directory / "assets/model").mkdir(parents=True)
    (directory / "scale.yaml").write_text(yaml.safe_dump({} if points is None else configuration(points)))


def snakemake(directory: Path, *arguments: str, program: Sequence[str] = SNAKEMAKE) -> tuple[CommandResult, str]:
    """Run snakemake there; returns what it took and what it printed."""
    environment = {**os.environ, "PYTHONPATH": str(directory / "src")}
    command = [sys.executable, *program, "--configfile", "scale.yaml", "--cores", "2", *arguments]
    log, used = directory / "snakemake.log", directory / "used.json"
    with log.open("wb") as stream:
        start = time.monotonic()
        measured = [sys.executable, "-c", MEASURED, str(used), *command]
        subprocess.run(measured, cwd=directory, env=environment, stdout=stream, stderr=subprocess.STDOUT, check=True)
        seconds = time.monotonic() - start
    text = log.read_text()
    status, processor_seconds, peak = json.loads(used.read_text())
    if status:
        raise SystemExit(f"{' '.join(command)}\n{text[-3000:]}")
    total = re.search(r"^total\s+(\d+)$", text, re.MULTILINE)
    jobs = int(total[1]) if total else 0
    return CommandResult(seconds=seconds, processor_seconds=processor_seconds, peak_memory_mib=peak, jobs=jobs), text


def stand_in_outputs(directory: Path, dry_run: str) -> None:
    """Make every output that a dry run names, then let snakemake record it as made by the current rules."""
    for line in re.findall(r"^    output: (.+)$", dry_run, re.MULTILINE):
        for name in line.split(", "):
            path = directory / name
            if path.suffix:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
            else:
                path.mkdir(parents=True, exist_ok=True)
    # Many jobs at once: the scheduler takes two at a time otherwise, and weighs all that are ready against each other.
    every_job_at_once = ("--cores", "100000", "--resources", "gpu=100000", "--scheduler-subsample", "50")
    snakemake(directory, "--touch", "--forceall", *every_job_at_once, "--quiet", "all", program=("-c", TOUCH))
