"""The page's section on looking at the workflow: its aims, met or not, with what bounds them; measures nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.results import WorkflowResult, growth_exponent
from stillhouse.reporting.tables import Cell, Column, Table

NO_OP_SECONDS, GROWTH = 3.0, 1.2
MANY_JOBS, MANY_JOBS_SECONDS, ONE_FIGURE_SECONDS = 10_000, 60.0, 10.0


@dataclass(frozen=True)
class WorkflowAim:
    """One of the workflow's aims. found: what was measured, with its unit."""

    text: str
    found: str
    met: bool
    cause: str = ""


def workflow_aims(workflow: WorkflowResult) -> Iterator[WorkflowAim]:
    """Every aim of looking at the DAG, met or not, with what bounds it."""
    start, no_op = workflow.start.seconds, workflow.default["no-op"].seconds
    rest = "the rest validates the configuration, digests the code and checks every output"
    yield WorkflowAim(
        f"a no-op run under {NO_OP_SECONDS:g} s with the default configuration",
        f"{no_op:.1f} s",
        no_op < NO_OP_SECONDS,
        f"The floor, snakemake's own start, is {start:.1f} s, {start / no_op:.0%} of it; {rest}.",
    )
    for size in workflow.sizes:
        jobs, taken = size["dry run"].jobs, size["dry run"].seconds
        if jobs >= MANY_JOBS:
            yield WorkflowAim(
                f"a dry run of {MANY_JOBS:,} jobs within {MANY_JOBS_SECONDS:g} s",
                f"{taken:.0f} s of {jobs:,} jobs",
                taken < MANY_JOBS_SECONDS,
                f"{1000 * (taken - start) / jobs:.1f} ms a job: snakemake's objects, and the settings of each.",
            )
    looks = [size["one figure"] for size in (workflow.default, *workflow.sizes)]
    slowest = max(looks, key=lambda look: look.seconds)
    yield WorkflowAim(
        "one figure is looked at in seconds, whatever the other studies hold",
        f"{slowest.seconds:.1f} s at most, of {slowest.jobs} jobs",
        slowest.seconds < ONE_FIGURE_SECONDS,
        "The configuration of every study is validated and its targets are listed all the same.",
    )
    sizes = [float(size["dry run"].jobs) for size in workflow.sizes]
    for name in ("dry run", "no-op"):
        exponent = growth_exponent(sizes, [size[name].processor_seconds for size in workflow.sizes])
        yield WorkflowAim(
            f"near-linear growth of the {name}",
            f"processor time ~ jobs^{exponent:.2f} over {len(sizes)} sizes",
            exponent <= GROWTH,
            f"An exponent of at most {GROWTH:g} counts as near-linear.",
        )


def workflow_section(workflow: WorkflowResult) -> Iterator[str]:
    """Seconds of looking at the DAG, and their growth."""
    yield "### The workflow\n"
    cells: list[tuple[Cell, ...]] = []
    for label, size in (("default", workflow.default), *((None, size) for size in workflow.sizes)):
        jobs = size["dry run"].jobs
        times = [command.seconds for command in size.values()]
        peak = max((command.peak_memory_mib for command in size.values() if command.peak_memory_mib), default=None)
        cells.append((label or "five studies, 6 models, 20 conditions", jobs, *times, peak))
    columns = (
        Column("configuration"),
        Column("jobs", "integer"),
        *(Column(name, "number", 1, f"{name}, s") for name in workflow.default),
        Column("peak memory", "integer", heading="peak memory, MiB"),
    )
    yield Table(
        "workflow",
        "Seconds of a dry run, of one of a single figure, and of a run that finds nothing to do. The sizes differ in "
        "seeds and in points of a sweep over each condition; the figure's own study stays as by default.",
        columns,
        tuple(cells),
    ).to_markdown()
    start, no_op = workflow.start.seconds, workflow.default["no-op"].seconds
    yield (
        f"Floor: Python and snakemake alone, on a Snakefile of one rule whose input is there, take {start:.1f} s, "
        f"{start / no_op:.0%} of the default no-op run. What is left: the configuration, the digests of the code, and "
        "a look at every output. Imports are compiled once and kept; with `PYTHONDONTWRITEBYTECODE` set every start "
        "compiles them again.\n"
    )
    yield "\n".join(
        [*(f"- {aim.text}: {'met' if aim.met else 'missed'}, {aim.found}." for aim in workflow_aims(workflow)), ""]
    )
