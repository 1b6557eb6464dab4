"""How long the workflow takes to look at a large DAG: dry run, no-op run, one figure; time, memory, growth.

    python benchmarks/dag_scale.py [--points 0 3 16] [--output benchmarks/results/dag_scale.json]

Each size is a copy of the workflow with 6 models, 20 conditions, 5 seeds and a sweep of so many points over each
condition: 16 points make 10,200 trainings. Nothing is trained: for the no-op run every output is an empty stand-in
whose record (settings, code) is the one that a real run leaves, so that each staleness check is really made.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).resolve().parents[1]
PARTS = ("Snakefile", "rules", "src", "workflow_scripts", "config", "envs", "profiles", "docs/captions")
MODELS, CONDITIONS, SEEDS = 6, 20, 5
FIGURE = "results/figures/context_distillation/summary.png"
STUDENT = "results/context_distillation/model_0/students/condition_0/seed_0"
SIZES, TARGET_JOBS, TARGET_SECONDS = (0, 3, 16), 10_000, 60.0


@dataclass(frozen=True)
class Measurement:
    """One run of snakemake: wall and processor seconds, peak memory, and the jobs that it counted."""

    seconds: float
    processor_seconds: float
    peak_memory_mib: float
    jobs: int


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


def make_project(directory: Path, points: int) -> None:
    """A folder with a copy of the workflow and the configuration of that size."""
    directory.mkdir()
    for part in PARTS:
        source, target = REPOSITORY / part, directory / part
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    (directory / "assets/model").mkdir(parents=True)
    (directory / "scale.yaml").write_text(yaml.safe_dump(configuration(points)))


def snakemake(directory: Path, *arguments: str) -> tuple[Measurement, str]:
    """Run snakemake there; returns what it took and what it printed."""
    environment = {**os.environ, "PYTHONPATH": str(directory / "src")}
    command = [sys.executable, "-m", "snakemake", "--configfile", "scale.yaml", "--cores", "2", *arguments]
    log = directory / "snakemake.log"
    with log.open("wb") as stream:
        start = time.monotonic()
        process = subprocess.Popen(command, cwd=directory, env=environment, stdout=stream, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - start
    text = log.read_text()
    if status:
        raise SystemExit(f"{' '.join(command)}\n{text[-3000:]}")
    total = re.search(r"^total\s+(\d+)$", text, re.MULTILINE)
    jobs = int(total[1]) if total else 0
    peak = usage.ru_maxrss / 1024
    return Measurement(round(seconds, 2), round(usage.ru_utime + usage.ru_stime, 2), round(peak, 1), jobs), text


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
    # Every job at once: the scheduler takes two at a time otherwise, and that is not what is measured.
    snakemake(directory, "--touch", "--forceall", "--cores", "100000", "--resources", "gpu=100000", "--quiet", "all")


def measure(points: int) -> dict[str, Any]:
    """All measurements of one size."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "project"
        make_project(directory, points)
        student, _ = snakemake(directory, "-n", STUDENT)
        dry_run, planned = snakemake(directory, "-n")
        stand_in_outputs(directory, planned)
        no_op, _ = snakemake(directory, "-n")
        if no_op.jobs:
            raise SystemExit(f"{no_op.jobs} jobs would rerun although nothing changed")
        figure, _ = snakemake(directory, "-n", FIGURE)
    runs = {"dry_run": dry_run, "no_op": no_op, "figure_no_op": figure, "one_student": student}
    return {"jobs": dry_run.jobs, "sweep_points": points, **{name: asdict(run) for name, run in runs.items()}}


def growth(sizes: list[dict[str, Any]], run: str) -> float:
    """The exponent p of processor seconds ~ jobs^p between the two largest sizes; 1 is linear."""
    small, large = sizes[-2:]
    times = large[run]["processor_seconds"] / small[run]["processor_seconds"]
    return round(math.log(times) / math.log(large["jobs"] / small["jobs"]), 2)


def main() -> None:
    """Measure each size, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, nargs="+", default=SIZES)
    parser.add_argument("--output", type=Path, default=REPOSITORY / "benchmarks/results/dag_scale.json")
    arguments = parser.parse_args()
    sizes, runs = [], ("dry_run", "no_op", "figure_no_op", "one_student")
    print("   jobs  dry run s  no-op s  figure s  student s  peak MiB")
    for points in sorted(arguments.points):
        size = measure(points)
        sizes.append(size)
        seconds = [size[run]["seconds"] for run in runs]
        print(
            f"{size['jobs']:7d} {seconds[0]:10.1f} {seconds[1]:8.1f} {seconds[2]:9.1f} {seconds[3]:10.1f} "
            f"{max(size[run]['peak_memory_mib'] for run in ('dry_run', 'no_op')):9.0f}",
            flush=True,
        )
    exponents = {run: growth(sizes, run) for run in ("dry_run", "no_op")} if len(sizes) > 1 else {}
    print("growth exponents:", exponents)
    result = {
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "aim": {"jobs": TARGET_JOBS, "dry_run_seconds": TARGET_SECONDS},
        "growth_exponents": exponents,
        "sizes": sizes,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
