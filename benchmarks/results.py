"""What a run of the benchmarks leaves in `results/<device>.json`, and the statistics drawn from it; no torch here.

Ratios are computed from the rounds when they are shown, never stored beside them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Literal

import numpy as np
from scipy import stats

from stillhouse.config.base import StrictModel
from stillhouse.evaluation.statistics import Estimate
from stillhouse.runtime.files import read_json, write_json

Role = Literal["naive", "tool", "other", "ours"]
DIRECTORY = Path(__file__).parent / "results"


class Device(StrictModel):
    """Where it was measured. The two rates are measured there: a large matrix product and a large copy."""

    kind: Literal["cpu", "gpu"]
    name: str
    cores: int
    precision: str
    operations_per_second: float
    bytes_per_second: float
    versions: dict[str, str]

    @property
    def slug(self) -> str:
        """A name for files: every processor is `cpu`, since ratios alone are shown of it."""
        return "cpu" if self.kind == "cpu" else "-".join(self.name.lower().split())


class FormResult(StrictModel):
    """One way of computing it. seconds: one a round, empty where it was only compared. error: the largest relative
    difference from the first form, None where there is nothing to compare. first_seconds: of the first call, in the
    comparison.
    """

    name: str
    role: Role
    seconds: tuple[float, ...] = ()
    first_seconds: float | None = None
    operations: int | None = None
    peak_memory_mib: float | None = None
    error: float | None = None


class BenchmarkResult(StrictModel):
    """A row. tokens: what one unit of work learns from or reads. floor_*: the least that any form has to do."""

    measured: datetime
    tokens: int
    tolerance: float
    floor_operations: float | None = None
    floor_bytes: float | None = None
    forms: tuple[FormResult, ...]

    def form(self, name: str) -> FormResult:
        """The form of that name."""
        return next(form for form in self.forms if form.name == name)

    @property
    def ours(self) -> FormResult:
        """What the studies run."""
        return next(form for form in self.forms if form.role == "ours")

    def time_ratio(self, name: str) -> Estimate:
        """How many times as long as ours a form takes: the median over rounds."""
        pairs = zip(self.form(name).seconds, self.ours.seconds, strict=True)
        return median_interval([theirs / ours for theirs, ours in pairs])

    def floor_seconds(self, device: Device) -> float | None:
        """The time under which no form can be on that device."""
        if self.floor_operations is None or self.floor_bytes is None:
            return None
        return max(self.floor_operations / device.operations_per_second, self.floor_bytes / device.bytes_per_second)


class Point(StrictModel):
    """One value on a series' axis."""

    value: float
    seconds: tuple[float, ...]
    peak_memory_mib: float | None = None


class SeriesResult(StrictModel):
    """Time and memory of some forms of a benchmark as one of its sizes grows; points by form, by rising value."""

    measured: datetime
    curves: dict[str, tuple[Point, ...]]


class CommandResult(StrictModel):
    """One run of a command: wall and processor seconds, peak memory (None: not measured), and the jobs it counted."""

    seconds: float
    processor_seconds: float
    peak_memory_mib: float | None
    jobs: int


class WorkflowResult(StrictModel):
    """Looking at the workflow: the default configuration, then larger and larger ones; commands by name.

    start: of snakemake on a Snakefile of one rule, which every command takes.
    """

    measured: datetime
    start: CommandResult
    default: dict[str, CommandResult]
    sizes: tuple[dict[str, CommandResult], ...]


class Results(StrictModel):
    """Everything measured on one device. took: seconds of measuring each part, by name.

    whole_seconds: of the last command that ran all of them, its start included.
    """

    device: Device
    took: dict[str, float] = {}
    whole_seconds: float | None = None
    benchmarks: dict[str, BenchmarkResult] = {}
    series: dict[str, SeriesResult] = {}
    workflow: WorkflowResult | None = None

    def write(self, directory: Path) -> Path:
        """Write `<device>.json`; returns its path."""
        path = directory / f"{self.device.slug}.json"
        write_json(path, self.model_dump(mode="json"))
        return path


def read_results(directory: Path = DIRECTORY) -> list[Results]:
    """The results of every device, processors first."""
    found = [Results.model_validate(read_json(path)) for path in directory.glob("*.json")]
    return sorted(found, key=lambda results: (results.device.kind, results.device.slug))


def median_interval(values: Sequence[float], confidence: float = 0.95) -> Estimate:
    """The median with its interval from order statistics, which assumes nothing of the distribution.

    The widest pair, smallest and largest, where too few values reach the confidence: of n values it holds the median
    with probability 1 - 2^(1-n), 97 % for 6.
    """
    ordered = sorted(values)
    n = len(ordered)
    tail = (1 - confidence) / 2
    # Values below the median are binomial with p = 1/2.
    place = max((place for place in range(n // 2) if stats.binom.cdf(place, n, 0.5) <= tail), default=0)
    return Estimate(float(np.median(ordered)), ordered[place], ordered[n - 1 - place], n)


def growth_exponent(values: Sequence[float], costs: Sequence[float], last: int = 3) -> float:
    """The p of cost ~ value^p by least squares on logarithms over the `last` largest values; NaN for fewer than two."""
    if len(values) < 2:
        return math.nan
    return float(np.polyfit(np.log(values[-last:]), np.log(costs[-last:]), 1)[0])
