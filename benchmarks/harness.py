"""What a benchmark is, and how one is run: first equality in fp32, then time by turns, operations and peak memory.

A benchmark declares its forms: the naive one first, which the others must equal, the tool that people would pick, and
ours. A form is prepared apart from the others, so that its memory can be measured in a process of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Literal

from torch import Tensor

from benchmarks.instruments import by_turns, operations, peak_memory_mib
from benchmarks.results import BenchmarkResult, FormResult, Role
from benchmarks.scale import Scale, exact
from stillhouse.runtime.errors import UserError

Outcome = Mapping[str, Tensor]
Work = Callable[[], Outcome]
Quantity = Literal["time", "operations", "memory"]


@dataclass(frozen=True)
class Form:
    """One way of computing it.

    prepare: loads what the form needs, out of a folder that all forms share, and returns one unit of work, which
    returns what must be equal. equals: the form that it must equal, "" for the first one; None where chance decides, or
    where it computes something else. timed: False where only equality is asked. counted: False where operations and
    memory are those of an engine, outside torch's sight, those of another benchmark many times over, or no aim asks.
    """

    name: str
    role: Role
    prepare: Callable[[Path, Scale], Work]
    equals: str | None = ""
    timed: bool = True
    counted: bool = True


@dataclass(frozen=True)
class Aim:
    """Against that form, ours is to need at most 1/`at_least` of the quantity.

    cause: why it is missed, where it is. without: ours less what the cause names, a form that shows what is left.
    series: the growth whose slope shows what the cause names.
    """

    against: str
    quantity: Quantity
    at_least: float
    device: Literal["any", "gpu"] = "any"
    cause: str = ""
    without: str | None = None
    series: str | None = None

    @property
    def text(self) -> str:
        """For people."""
        noun = {"time": "time", "operations": "FLOPs", "memory": "peak memory"}[self.quantity]
        factor = f"at least {self.at_least:g} x" if self.at_least >= 1 else f"within {1 / self.at_least:.3g} x"
        return f"{noun} {factor}{' on a GPU' if self.device == 'gpu' else ''}"


@dataclass(frozen=True)
class Floor:
    """The least that any form must do: floating-point operations, bytes moved to or from memory, and tokens of work."""

    operations: float
    bytes: float
    tokens: int


@dataclass(frozen=True)
class Benchmark:
    """A row of the page.

    what, floor_formula, remains: text for people. `remains` says what lies between the floor and ours. tolerance: of
    the relative difference of each outcome, as norms:
    |a - b| / |b|. change: sizes of this benchmark that differ from the scale's. checked: those at which the forms are
    compared, smaller ones where a unit of work is long.
    """

    name: str
    what: str
    forms: tuple[Form, ...]
    aims: tuple[Aim, ...]
    floor: Callable[[Path, Scale], Floor]
    floor_formula: str
    remains: str
    tolerance: float = 1e-4
    change: Callable[[Scale], Scale] = field(default=lambda scale: scale)
    checked: Callable[[Scale], Scale] = field(default=lambda scale: scale)


def measure(benchmark: Benchmark, scale: Scale, folder: Path) -> BenchmarkResult:
    """Measure every form. Raises `UserError` where one of them computes something else than the first."""
    scale = benchmark.change(scale)
    checked = benchmark.checked(exact(scale))
    works = {form.name: form.prepare(folder, checked) for form in benchmark.forms}
    first_seconds: dict[str, float] = {}

    def noted(name: str) -> Outcome:
        start = time.monotonic()
        outcome = works[name]()
        first_seconds.setdefault(name, time.monotonic() - start)
        return outcome

    errors = compare(benchmark, {name: partial(noted, name) for name in works})
    timed = [form for form in benchmark.forms if form.timed]
    if checked != scale:
        works.clear()
        works = {form.name: form.prepare(folder, scale) for form in timed}
    if exact(scale) != scale:
        for work in works.values():
            work()
    seconds = by_turns({form.name: works[form.name] for form in timed}, scale.rounds, scale.seconds)
    counts = {form.name: operations(works[form.name]) for form in timed if form.counted}
    works.clear()
    memory = peak_memory_mib({form.name: form.prepare for form in timed if form.counted}, folder, [scale])
    floor = benchmark.floor(folder, scale)
    return BenchmarkResult(
        measured=datetime.now(UTC).replace(microsecond=0),
        tokens=floor.tokens,
        tolerance=benchmark.tolerance,
        floor_operations=floor.operations,
        floor_bytes=floor.bytes,
        forms=tuple(
            FormResult(
                name=form.name,
                role=form.role,
                seconds=seconds.get(form.name, ()),
                first_seconds=first_seconds.get(form.name),
                operations=counts.get(form.name),
                peak_memory_mib=memory[form.name][0] if form.name in memory else None,
                error=errors.get(form.name),
            )
            for form in benchmark.forms
        ),
    )


def compare(benchmark: Benchmark, works: Mapping[str, Work]) -> dict[str, float]:
    """The largest relative difference of each form from the one that it must equal, by name.

    Raises `UserError` for an outcome that is missing or differs by more than the tolerance.
    """
    references: dict[str, Outcome] = {}
    errors = {}
    for form in benchmark.forms:
        reference = benchmark.forms[0].name if form.equals == "" else form.equals
        if reference is None or reference == form.name:
            continue
        if reference not in references:
            references[reference] = works[reference]()
        errors[form.name] = difference(benchmark, form.name, works[form.name](), reference, references[reference])
    return errors


def difference(benchmark: Benchmark, name: str, found: Outcome, reference: str, expected: Outcome) -> float:
    """The largest relative difference over the outcomes of two forms."""
    if found.keys() != expected.keys():
        raise UserError(
            f"{benchmark.name}: '{name}' gives {sorted(found)}, '{reference}' {sorted(expected)}: nothing was timed"
        )
    differences = {key: relative_difference(found[key], expected[key]) for key in expected}
    worst = max(differences, key=lambda key: differences[key])
    if not all(value <= benchmark.tolerance for value in differences.values()):
        raise UserError(
            f"{benchmark.name}: '{name}' differs from '{reference}' by {differences[worst]:.1e} in {worst}, above the "
            f"tolerance {benchmark.tolerance:.0e}: nothing was timed"
        )
    return differences[worst]


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected| in fp64; infinite for another shape."""
    if found.shape != expected.shape:
        return float("inf")
    first, second = found.detach().double().cpu(), expected.detach().double().cpu()
    difference, size = float((first - second).norm()), float(second.norm())
    return difference / size if size else difference
