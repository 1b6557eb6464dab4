"""Step program: `results.md`, the studies' sections joined, and what every stage took on which hardware.

Reads sections and run records alone, so the same inputs give the same page.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stillhouse.config.base import StrictModel
from stillhouse.reporting.tables import Cell, Column, Table
from stillhouse.runtime.commands import run_step
from stillhouse.runtime.errors import UserError
from stillhouse.runtime.files import atomic_write_text, read_sealed_json

RECORD = "run.json"
COST_HEADING = "Hardware, time and cost"
REPRODUCE = """\
    snakemake --cores all --resources gpu=4 results/results.md

reruns what is stale and nothing else. The `run.json` beside every result holds the exact command of its job, its
resolved settings and the digests of its code and data."""


class ResultsPageStep(StrictModel):
    """The step's command line. A record is a `run.json`, or a directory that holds one."""

    sections: tuple[Path, ...] = ()
    records: tuple[Path, ...] = ()
    output: Path
    gpu_hour_price: Annotated[float, Field(ge=0, description="0 leaves the cost out.")] = 0.0
    currency: str = "USD"


class GitState(BaseModel):
    """The source tree of a run."""

    commit: str
    dirty: bool


class DeviceEnergy(BaseModel):
    """What the page reads of a watched GPU; None where the device does not count its energy."""

    energy_joules: float | None = None


class DeviceUsage(BaseModel):
    """The GPUs that NVML watched during a run; none on a CPU."""

    devices: tuple[DeviceEnergy, ...] = ()


class TrainingFacts(BaseModel):
    """Of a training: the number format that it computed in, which `precision: auto` takes from the device."""

    precision: str


class Record(BaseModel):
    """What the page reads of a run record."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    module: str
    seconds: float
    devices: tuple[str, ...]
    peak_memory_mib: dict[str, float]
    packages: dict[str, str]
    python: str
    git: GitState | None
    device_usage: DeviceUsage = DeviceUsage()
    training: TrainingFacts | None = None

    @property
    def stage(self) -> str:
        """The job's kind: its module without the package's name."""
        return self.module.removeprefix("stillhouse.").removeprefix("studies.").replace(".", " / ")

    @property
    def gpu_hours(self) -> float:
        """Hours of all the GPUs that the job held; run records name a processor with its cores."""
        gpus = [device for device in self.devices if not re.search(r"\(\d+ cores\)$", device)]
        return len(gpus) * self.seconds / 3600

    @property
    def energy_joules(self) -> list[float]:
        """Energy of each GPU that counts it."""
        return [device.energy_joules for device in self.device_usage.devices if device.energy_joules is not None]


def main(step: ResultsPageStep) -> None:
    """Write the page."""
    sections = [read_section(path) for path in step.sections]
    records = [read_record(path) for path in sorted(set(step.records))]
    parts = ["# Results", contents(sections), *sections, costs(records, step.gpu_hour_price, step.currency)]
    atomic_write_text(step.output, "\n\n".join(part.strip("\n") for part in parts) + "\n")


def read_section(path: Path) -> str:
    """A study's section."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}): run the study's report again") from None


def read_record(path: Path) -> Record:
    """A run record; `UserError` where there is none or it is not one."""
    file = path / RECORD if path.is_dir() else path
    try:
        return Record.model_validate(read_sealed_json(file))
    except ValidationError as error:
        fault = error.errors()[0]
        key = ".".join(map(str, fault["loc"]))
        raise UserError(f"{file}: is no run record ('{key}': {fault['msg']}): run its job again") from None


def contents(sections: Sequence[str]) -> str:
    """Links to the sections, and to the cost."""
    headings = [heading for text in sections for heading in re.findall(r"^## (.+)$", text, re.MULTILINE)]
    return "\n".join(f"- [{heading}](#{anchor(heading)})" for heading in [*headings, COST_HEADING])


def anchor(heading: str) -> str:
    """The link target that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def costs(records: Sequence[Record], price: float, currency: str) -> str:
    """Time, memory and cost by stage, the hardware and the versions behind all results."""
    table = cost_table(records, price, currency).to_markdown()
    formats = [record.training.precision for record in records if record.training]
    facts = [
        f"- Hardware: {joined([device for record in records for device in record.devices])}",
        *([f"- Trainings computed in {joined(formats)}"] if formats else []),
        f"- Code: {joined([describe_git(record.git) for record in records])}",
        f"- Packages: {joined([f'Python {r.python}' for r in records])}, {joined(package_names(records))}",
    ]
    return "\n\n".join([f"## {COST_HEADING}", table, "\n".join(facts), "To make all of this again,", REPRODUCE])


def cost_table(records: Sequence[Record], price: float, currency: str) -> Table:
    """One row a stage and one for the sum; energy only where a GPU counted it, cost only at a price."""
    stages = sorted({record.stage for record in records})
    groups = [(stage, [record for record in records if record.stage == stage]) for stage in stages]
    energy_counted = any(record.energy_joules for record in records)
    columns = [
        Column("stage"),
        Column("jobs", "integer"),
        Column("minutes", "number", 1, "job time, min"),
        Column("gpu_hours", "number", 2, "GPU hours"),
        Column("host_memory", "number", 1, "peak memory, GiB"),
        Column("gpu_memory", "number", 1, "peak GPU memory, GiB"),
        *([Column("energy", "number", 3, "GPU energy, kWh")] if energy_counted else []),
        *([Column("cost", "number", 2, f"cost, {currency}")] if price > 0 else []),
    ]
    rows = [cost_row(name, group, energy_counted, price) for name, group in [*groups, ("all", list(records))]]
    caption = (
        "Job time is the sum over jobs, as each one's last attempt recorded it: jobs that ran side by side both count, "
        "an interrupted attempt and parts kept from an earlier run do not."
        + (" GPU energy is what the devices themselves count." if energy_counted else "")
    )
    return Table("cost", caption, tuple(columns), tuple(rows))


def cost_row(name: str, records: Sequence[Record], energy_counted: bool, price: float) -> tuple[Cell, ...]:
    """The sums and peaks of one stage."""
    peaks = [(key, mib / 1024) for record in records for key, mib in record.peak_memory_mib.items()]
    gpu_hours = sum(record.gpu_hours for record in records)
    joules = [energy for record in records for energy in record.energy_joules]
    row: list[Cell] = [
        name,
        len(records),
        sum(record.seconds for record in records) / 60,
        gpu_hours,
        max((gib for key, gib in peaks if key == "host"), default=None),
        max((gib for key, gib in peaks if key != "host"), default=None),
    ]
    if energy_counted:
        row.append(sum(joules) / 3.6e6 if joules else None)
    return tuple([*row, gpu_hours * price] if price > 0 else row)


def describe_git(state: GitState | None) -> str:
    """A commit, and whether the tree had changes that no commit holds."""
    if state is None:
        return "no git checkout"
    return f"commit {state.commit[:12]}" + (" with uncommitted changes" if state.dirty else "")


def package_names(records: Sequence[Record]) -> list[str]:
    """Every package version that any run used."""
    return [f"{name} {version}" for record in records for name, version in record.packages.items()]


def joined(values: Sequence[str]) -> str:
    """The distinct values, sorted."""
    return ", ".join(sorted(set(values))) or "none recorded"


if __name__ == "__main__":
    run_step(ResultsPageStep, main)
