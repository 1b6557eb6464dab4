"""What falls short: every aim that was missed with its cause and the measurements that show it; measures nothing."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from benchmarks.harness import Aim, Benchmark
from benchmarks.results import BenchmarkResult, Device, FormResult, Point, Results
from benchmarks.scaling import SERIES
from benchmarks.workflow_page import workflow_aims


def ratio(result: BenchmarkResult, form: FormResult, quantity: str) -> float | None:
    """The other form's quantity over ours; None where it was not measured."""
    ours = result.ours
    if quantity == "time":
        return result.time_ratio(form.name).value if form.seconds else None
    pair = (
        (form.operations, ours.operations) if quantity == "operations" else (form.peak_memory_mib, ours.peak_memory_mib)
    )
    return pair[0] / pair[1] if pair[0] is not None and pair[1] else None


def short_falls(rows: list[tuple[Benchmark, BenchmarkResult]], results: Results) -> Iterator[str]:
    """Every aim that was missed, with its cause, and those that are met within the noise alone."""
    yield "### What falls short\n"
    device = results.device
    missed = [
        f"- {benchmark.what}, against {aim.against}: {aim.text}, measured {value:.2f}. {cause(benchmark, aim, results)}"
        for benchmark, aim, value in missed_aims(rows, device)
    ]
    if results.workflow:
        missed += [
            f"- the workflow: {aim.text}, measured {aim.found}. {aim.cause}"
            for aim in workflow_aims(results.workflow)
            if not aim.met
        ]
    yield from missed
    if not missed:
        yield "Nothing: every aim is met."
    for benchmark, result in rows:
        for aim in benchmark.aims:
            if applies(aim, device) and aim.quantity == "time":
                found = result.time_ratio(aim.against)
                if found.low < aim.at_least <= found.value:
                    yield (
                        f"- {benchmark.what}, against {aim.against}: {aim.text}, met by the median alone: the interval "
                        f"over {found.n} rounds begins at {found.low:.2f}."
                    )
    yield ""


def missed_aims(rows: list[tuple[Benchmark, BenchmarkResult]], device: Device) -> list[tuple[Benchmark, Aim, float]]:
    """The aims of this device that were missed, each with what was measured."""
    return [
        (benchmark, aim, value)
        for benchmark, result in rows
        for aim in benchmark.aims
        if applies(aim, device)
        and (value := ratio(result, result.form(aim.against), aim.quantity)) is not None
        and value < aim.at_least
    ]


def cause(benchmark: Benchmark, aim: Aim, results: Results) -> str:
    """Why an aim was missed, with the measurements that show it."""
    text, result = [aim.cause], results.benchmarks[benchmark.name]
    if aim.without and any(form.name == aim.without for form in result.forms):
        theirs, left = np.array(result.form(aim.against).seconds), np.array(result.form(aim.without).seconds)
        text.append(f"Beside '{aim.without}' it takes {np.median(theirs / left):.2f} x.")
    if aim.series and aim.series in results.series:
        label, curves = SERIES[aim.series].label, results.series[aim.series].curves
        slopes = {name: line(points) for name, points in curves.items()}
        (ours, fixed), size = slopes[result.ours.name], curves[result.ours.name][-1].value
        text.append(f"Of our time at {size:g} {label}, {fixed / (fixed + ours * size):.0%} does not grow with them.")
        if aim.against in slopes:
            ratio_of_slopes = slopes[aim.against][0] / ours
            text.append(
                f"Each further one costs the other form {ratio_of_slopes:.1f} x as much: more cannot be reached."
            )
    return " ".join(text)


def line(points: tuple[Point, ...]) -> tuple[float, float]:
    """Slope and intercept of the seconds over the sizes, by least squares."""
    slope, intercept = np.polyfit([point.value for point in points], [np.median(point.seconds) for point in points], 1)
    return float(slope), float(intercept)


def applies(aim: Aim, device: Device) -> bool:
    """Whether the aim is one of this kind of device."""
    return aim.device == "any" or aim.device == device.kind
