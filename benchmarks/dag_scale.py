"""How long the workflow takes to look at its DAG: dry run, one figure, and a real run that finds nothing to do; time,
memory, growth.

The default configuration first, then all five studies with 6 models, 20 conditions, and more and more seeds and points
of a sweep over each condition, up to over 10,000 jobs. Nothing is trained: for the no-op run every output is an empty
stand-in whose record (settings, code) is the one that a real run leaves, so that each staleness check is really made.
A job that started nevertheless would fail at once, on empty inputs. The floor of a no-op run is snakemake's own start,
on a Snakefile of one rule whose input is there.
"""

from __future__ import annotations

import compileall
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
from typing import Any, NamedTuple

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
MODELS, CONDITIONS = 6, 20
# At the default configuration without a job to do, where seconds matter; the median counts.
LOOKS = 3
# Its study is as in the default configuration, whatever the others are: only its own jobs are to be looked at.
FIGURE, FIGURE_STUDY = "results/figures/consistency_lens/losses.png", "consistency_lens"


class Size(NamedTuple):
    """How much there is of each study beside its models and conditions. points: of the sweep over a condition."""

    seeds: int
    points: int


SIZES = (Size(1, 0), Size(2, 1), Size(5, 2))


def measure_workflow(sizes: Sequence[Size] = SIZES) -> WorkflowResult:
    """Snakemake's own start, the default configuration, and each size."""
    return WorkflowResult(
        measured=datetime.now(UTC).replace(microsecond=0),
        start=measure_start(),
        default=measure(None),
        sizes=tuple(measure(size) for size in sizes),
    )


def measure_start() -> CommandResult:
    """What Python and snakemake take of each command. The first look may compile what it imports: it does not count."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        (directory / "Snakefile").write_text("rule all:\n    input: 'scale.yaml'\n")
        (directory / "scale.yaml").write_text("{}")
        return median([snakemake(directory)[0] for _ in range(1 + LOOKS)][1:])


def median(looks: Sequence[CommandResult]) -> CommandResult:
    """The look of middle duration."""
    return sorted(looks, key=lambda look: look.seconds)[len(looks) // 2]


def measure(size: Size | None) -> dict[str, CommandResult]:
    """Dry run, dry run of one figure and no-op run of one size; None: the default configuration."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "project"
        make_project(directory, size)
        dry_run, planned = snakemake(directory, "-n")
        one_figure, _ = snakemake(directory, "-n", FIGURE, settings="figure.yaml")
        stand_in_outputs(directory, planned)
        no_op = median([snakemake(directory)[0] for _ in range(LOOKS if size is None else 1)])
        if no_op.jobs:
            raise SystemExit(f"{no_op.jobs} jobs reran although nothing changed")
    return {"dry run": dry_run, "one figure": one_figure, "no-op": no_op}


def configuration(size: Size) -> dict[str, Any]:
    """Every study with 6 models (LatentWire: 6 pairs) x 20 conditions x seeds, and a sweep over each condition."""
    source = {"format": "transformers", "licence": "none", "sources": [{"kind": "path", "path": "assets/model"}]}
    models = [f"model_{number}" for number in range(MODELS)]
    pairs = {f"pair_{number}": {"models": [models[number - 1], models[number]]} for number in range(MODELS)}
    conditions = {
        f"condition_{number}": {"training": {"weight_decay": 0.01 * (number + 1)}} for number in range(CONDITIONS)
    }
    rates = [1e-5 * (point + 1) for point in range(size.points)]
    runs: dict[str, Any] = {
        "condition_settings": conditions,
        "conditions": list(conditions),
        "seeds": list(range(size.seeds)),
        "sweeps": {
            name: {"condition": name, "axes": {"training.learning_rate": rates}} for name in conditions if rates
        },
    }
    scored = {"evaluation": {"condition": "condition_0"}}
    return {
        "models": dict.fromkeys(models, source),
        "context_distillation": {
            **runs,
            "models": models,
            "conditions": ["base_zero_shot", "base_few_shot", *conditions],
        },
        "quantized_distillation": {**runs, "models": models, "conditions": ["teacher", "ptq", *conditions]},
        "consistency_lens": {**runs, "models": models},
        "latentwire": {**runs, **scored, "pair_settings": pairs, "pairs": list(pairs)},
        "lora_generation": {**runs, **scored, "models": models},
    }


def make_project(directory: Path, size: Size | None) -> None:
    """A folder with a copy of the workflow and the configuration of that size."""
    directory.mkdir()
    for part in PARTS:
        source, target = REPOSITORY / part, directory / part
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    compileall.compile_dir(directory / "src", quiet=1)  # as every look but a project's first finds it
    (directory / "assets/model").mkdir(parents=True)
    studies = {} if size is None else configuration(size)
    (directory / "scale.yaml").write_text(yaml.safe_dump(studies))
    (directory / "figure.yaml").write_text(yaml.safe_dump({**studies, FIGURE_STUDY: {}}))


def snakemake(
    directory: Path, *arguments: str, program: Sequence[str] = SNAKEMAKE, settings: str = "scale.yaml"
) -> tuple[CommandResult, str]:
    """Run snakemake there; returns what it took and what it printed."""
    # Python keeps what it compiles, as by default: where the environment forbids it, each start takes seconds more.
    environment = {**os.environ, "PYTHONPATH": str(directory / "src"), "PYTHONDONTWRITEBYTECODE": ""}
    command = [sys.executable, *program, "--configfile", settings, "--cores", "2", *arguments]
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
