"""The page `README.md` and its figures, from the results files and the benchmarks' declarations; measures nothing.

python -m benchmarks.page [results=DIRECTORY] [page=README.md]
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.catalogue import BENCHMARKS, MEASURED, ON_REQUEST
from benchmarks.harness import Benchmark
from benchmarks.plots import draw_growth, draw_ratios
from benchmarks.results import (
    DIRECTORY,
    BenchmarkResult,
    Device,
    FormResult,
    Results,
    SeriesResult,
    read_results,
)
from benchmarks.scaling import SERIES
from benchmarks.short_falls import ratio, short_falls
from benchmarks.weighed import NOT_MEASURED, WEIGHED
from benchmarks.workflow_page import workflow_section
from stillhouse.config.base import StrictModel
from stillhouse.reporting.tables import Cell, Column, Table, format_estimate
from stillhouse.runtime.commands import run_step
from stillhouse.runtime.files import atomic_write_text

WHOLE_MINUTES = 20.0
INTRODUCTION = """# Benchmarks

Each benchmark computes the same thing in several forms: the naive one, the tool that people would pick, and ours. It
first checks in fp32 that they give the same loss and gradients (or activations, logits, answers), and stops where they
do not. Then it times them by turns in one process, counts their floating-point operations, and measures the peak memory
of each in a process of its own.

    make benchmark                                          # all of it
    python -m benchmarks only=[context_step,teacher_cache]  # some of it; the rest of the results stays
    python -m benchmarks only=[loading,compiled_lens]       # choices that were weighed: on request alone
    python -m benchmarks only=[ms_swift]                    # on request: its environment, see docs/environments.md
    python -m benchmarks.page                               # this page from benchmarks/results/

The same command on a GPU takes the full-size scale in bf16 and writes a file of its own. Ratios are medians over
rounds, with the interval that order statistics give; above 1 ours is better. Every form does the same tokens, so that
tokens/s have the ratio of time. A dash: the form was only compared; or its FLOPs and memory were not counted, since an
engine is out of torch's sight, another row has them, or no aim asks for them. Every form takes three rounds, and more
as long as they begin within some seconds (`Scale.seconds`). *Floor*: the least that any form must do, the operations of
its formula over the rate that a large matrix product attains on the device, or its bytes over that of a large copy,
whichever is longer. Attention counts as whole squares in the FLOPs and as the causal half in the floors. *Peak memory*:
of the weights and one unit of work; on a processor the resident memory above that of a process which did the same on a
tiny scale, so that Python and the libraries, some 600 MiB in every form, are left out. Sizes: `scale.py`.
"""


class Page(StrictModel):
    """The command line."""

    results: Path = DIRECTORY
    page: Path = DIRECTORY.parent / "README.md"


def main(step: Page) -> None:
    """Write the page again."""
    write_page(step.results, step.page)


def write_page(results: Path, page: Path) -> None:
    """Write the page, and the figures beside the results."""
    found = read_results(results)
    parts = [INTRODUCTION, *(part for one in found for part in device_section(one, results, page))]
    atomic_write_text(page, "\n".join([*parts, missing_section(found)]))


def device_section(results: Results, directory: Path, page: Path) -> Iterator[str]:
    """Everything measured on one device."""
    device, slug = results.device, results.device.slug
    versions = ", ".join(f"{name} {version}" for name, version in device.versions.items())
    where = f"{device.cores} cores, {device.name}" if device.kind == "cpu" else device.name
    yield f"## {'Processor' if device.kind == 'cpu' else device.name}\n"
    yield f"{where}; {device.precision}; {versions}.\n"
    if device.kind == "gpu":
        yield (
            "`python -m benchmarks`. A matrix product attains "
            f"{device.operations_per_second / 1e12:.1f} TFLOP/s, a copy {device.bytes_per_second / 1e9:.0f} GB/s.\n"
        )
    if results.took:
        yield duration(results)
    rows = [(BENCHMARKS[name], results.benchmarks[name]) for name in BENCHMARKS if name in results.benchmarks]
    if rows:
        yield ratio_table(rows).to_markdown()
        figure = directory / f"{slug}-ratios.png"
        draw_ratios(
            figure,
            [
                (f"{benchmark.what}\nagainst {form.name}", result.time_ratio(form.name), time_aim(benchmark, form.name))
                for benchmark, result in rows
                for form in others(result)
                if form.seconds
            ],
        )
        yield f"![Ratios of time]({figure.relative_to(page.parent)})\n"
        yield "### Equality, floor, and what is left\n"
        yield floor_table(rows, device).to_markdown()
        yield "\n".join(floor_notes(rows))
        yield "\n".join(short_falls(rows, results))
    if device.kind == "gpu":
        yield rate_table(rows, device).to_markdown()
    weighed = [(WEIGHED[name], results.benchmarks[name]) for name in WEIGHED if name in results.benchmarks]
    if weighed:
        yield "### What was weighed\n"
        yield weighed_table(weighed).to_markdown()
        yield "\n".join([*(f"- {what}, not measured: {reason}." for what, reason in NOT_MEASURED.items()), ""])
    if results.series:
        series = {name: results.series[name] for name in SERIES if name in results.series}
        figure = directory / f"{slug}-growth.png"
        labels = {name: (BENCHMARKS[SERIES[name].benchmark].what, SERIES[name].label) for name in series}
        ours = frozenset(
            form.name for benchmark in BENCHMARKS.values() for form in benchmark.forms if form.role == "ours"
        )
        draw_growth(figure, series, labels, ours)
        yield f"### How cost grows\n\n![Growth of time and memory]({figure.relative_to(page.parent)})\n"
        yield "Each size is timed once, after a first call that is not, so that an exponent has no interval.\n"
        if unseen := [name for name, one in series.items() if not has_memory(one)]:
            yield f"No memory of {', '.join(unseen)}: an engine takes the cache that it is given, whatever the size.\n"
    if results.workflow:
        yield from workflow_section(results.workflow)


def duration(results: Results) -> str:
    """How long all that the command measures took, beside its limit on a processor."""
    took = {name: seconds for name, seconds in results.took.items() if name not in ON_REQUEST}
    longest = max(took, key=lambda name: took[name])
    minutes = (results.whole_seconds or sum(took.values())) / 60
    what = "`make benchmark` took" if results.whole_seconds else "The parts of `make benchmark` took"
    limit = ""
    if results.device.kind == "cpu":
        limit = f" (limit: {WHOLE_MINUTES:g}, {'met' if minutes < WHOLE_MINUTES else 'missed'})"
    return f"{what} {minutes:.1f} minutes{limit}, of which {longest} {took[longest] / 60:.1f}.\n"


def has_memory(series: SeriesResult) -> bool:
    """Whether its forms' memory was measured."""
    return all(point.peak_memory_mib is not None for points in series.curves.values() for point in points)


def others(result: BenchmarkResult) -> list[FormResult]:
    """The forms that are not ours."""
    return [form for form in result.forms if form.role != "ours"]


def ratio_table(rows: list[tuple[Benchmark, BenchmarkResult]]) -> Table:
    """Ours beside each other form, with the aims."""
    cells: list[tuple[Cell, ...]] = []
    for benchmark, result in rows:
        for form in others(result):
            aims = [aim for aim in benchmark.aims if aim.against == form.name]
            cells.append(
                (
                    benchmark.what,
                    form.name,
                    "; ".join(aim.text for aim in aims) or "the same result",
                    format_estimate(result.time_ratio(form.name), 2) if form.seconds else None,
                    ratio(result, form, "operations"),
                    ratio(result, form, "memory"),
                    len(form.seconds) or None,
                )
            )
    columns = (
        Column("what"),
        Column("against"),
        Column("aim"),
        Column("time"),
        Column("FLOPs", "number", 2),
        Column("peak memory", "number", 2),
        Column("rounds", "integer"),
    )
    return Table("ratios", "How many times as much the other form takes.", columns, tuple(cells))


def time_aim(benchmark: Benchmark, form: str) -> float | None:
    """What the time ratio is to reach."""
    return next((aim.at_least for aim in benchmark.aims if aim.against == form and aim.quantity == "time"), None)


def floor_table(rows: list[tuple[Benchmark, BenchmarkResult]], device: Device) -> Table:
    """How near ours is to the least that any form must do."""
    cells: list[tuple[Cell, ...]] = []
    for benchmark, result in rows:
        floor, ours = result.floor_seconds(device), result.ours
        errors = [form.error for form in result.forms if form.error is not None]
        cells.append(
            (
                benchmark.what,
                f"{max(errors):.0e} (at most {result.tolerance:.0e})" if errors else None,
                ours.operations / result.floor_operations if ours.operations and result.floor_operations else None,
                floor / float(np.median(ours.seconds)) if floor else None,
                benchmark.remains,
            )
        )
    columns = (
        Column("what"),
        Column("largest relative difference"),
        Column("FLOPs over floor", "number", 2),
        Column("floor over time", "percent", 0, "share of the floor, %"),
        Column("what is left"),
    )
    return Table("floors", "Ours beside the least that any form must do.", columns, tuple(cells))


def floor_notes(rows: list[tuple[Benchmark, BenchmarkResult]]) -> Iterator[str]:
    """The formulas of the floors."""
    yield "Floors (`forward` as in `Scale.operations`: projections, causal attention, lm_head rows):\n"
    yield from (f"- {benchmark.what}: {benchmark.floor_formula}" for benchmark, _ in rows)
    yield ""


def rate_table(rows: list[tuple[Benchmark, BenchmarkResult]], device: Device) -> Table:
    """Absolute times and rates, on GPUs alone; the rate is that of the counted operations."""
    cells: list[tuple[Cell, ...]] = []
    for benchmark, result in rows:
        for form in result.forms:
            if form.seconds:
                time = float(np.median(form.seconds))
                rate = form.operations / time / device.operations_per_second if form.operations else None
                cells.append((benchmark.what, form.name, 1000 * time, result.tokens / time, rate, form.peak_memory_mib))
    columns = (
        Column("what"),
        Column("form"),
        Column("milliseconds", "number", 1),
        Column("tokens/s", "integer"),
        Column("rate", "percent", 0, "share of the attainable rate, %"),
        Column("peak memory, MiB", "integer"),
    )
    return Table("rates", "Absolute times.", columns, tuple(cells))


def weighed_table(rows: list[tuple[Benchmark, BenchmarkResult]]) -> Table:
    """The choices of the training loop, each beside the other one, and what was decided."""
    cells: list[tuple[Cell, ...]] = []
    for benchmark, result in rows:
        [form] = others(result)
        later, first = float(np.median(form.seconds)), form.first_seconds
        cells.append(
            (
                benchmark.what,
                form.name,
                result.ours.name,
                format_estimate(result.time_ratio(form.name), 2),
                ratio(result, form, "memory"),
                first / later if first is not None else None,
                benchmark.remains,
            )
        )
    columns = (
        Column("what"),
        Column("one form"),
        Column("ours"),
        Column("time"),
        Column("peak memory", "number", 2),
        Column("first", "number", 1, "its first call over a later one"),
        Column("decision"),
    )
    return Table("weighed", "How many times as much the one form takes as ours.", columns, tuple(cells))


def missing_section(found: list[Results]) -> str:
    """What the page cannot show."""
    missing: dict[str, str] = {}
    if not any(results.device.kind == "gpu" for results in found):
        missing["figures of a GPU"] = "none could be used; `python -m benchmarks` on a machine with one adds them"
    for results in found:
        absent = [name for name in MEASURED if name not in results.benchmarks]
        absent += [f"growth of {name}" for name in SERIES if name not in results.series]
        absent += [] if results.workflow else ["workflow"]
        if absent:
            missing[f"not yet measured on {results.device.slug}"] = ", ".join(absent)
    lines = [f"- {what}: {reason}." for what, reason in missing.items()]
    return "\n".join(["## Missing\n", *lines, ""])


if __name__ == "__main__":
    run_step(Page, main)
