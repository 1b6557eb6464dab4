"""Run benchmarks, scaling series and the look at the workflow; write `results/<device>.json` and the page.

    python -m benchmarks [only=[context_step,top_k,workflow]] [rounds=7] [results=DIRECTORY] [page=README.md]

Without `only` everything is run but what is on request (`catalogue.ON_REQUEST`), and the command's own time is kept.
What is run replaces its own entry; the rest of the file stays as it was. A form that computes something else than the
naive one ends the program before anything of its benchmark is timed.
"""

from __future__ import annotations

import difflib
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import psutil
import transformers
from pydantic import Field

from benchmarks.catalogue import MEASURED, ON_REQUEST
from benchmarks.dag_scale import measure_workflow
from benchmarks.harness import measure
from benchmarks.instruments import describe
from benchmarks.page import write_page
from benchmarks.results import DIRECTORY, Device, Results, read_results
from benchmarks.scale import GPU, PROCESSOR, Scale
from benchmarks.scaling import SERIES, measure_series
from stillhouse.config.base import StrictModel
from stillhouse.models.precision import default_device
from stillhouse.runtime.commands import run_step
from stillhouse.runtime.errors import ConfigurationError
from stillhouse.runtime.logs import logger


class Run(StrictModel):
    """The command line. only: names of what is run, empty: everything. rounds: of the timing, None: the scale's."""

    only: tuple[str, ...] = ()
    rounds: Annotated[int | None, Field(ge=1)] = None
    results: Path = DIRECTORY
    page: Path = DIRECTORY.parent / "README.md"


def main(run: Run) -> None:
    """Measure on the scale of the device."""
    measure_parts(run, GPU if default_device().type == "cuda" else PROCESSOR)


def measure_parts(run: Run, scale: Scale) -> None:
    """Measure, and write after each part, so that what a stopped run finished is kept."""
    # Programs that are started keep what they compile, as by default: each start would take seconds more otherwise.
    os.environ["PYTHONDONTWRITEBYTECODE"] = ""
    transformers.utils.logging.disable_progress_bar()
    scale = replace(scale, rounds=run.rounds or scale.rounds)
    device = describe(default_device(), scale.precision)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        parts: dict[str, tuple[str, Callable[[], Any]]] = {
            **{name: ("benchmarks", partial(measure, one, scale, place)) for name, one in MEASURED.items()},
            **{name: ("series", partial(measure_series, one, scale, place)) for name, one in SERIES.items()},
            "workflow": ("workflow", measure_workflow),
        }
        for name in chosen(run.only, tuple(parts)):
            section, work = parts[name]
            started = time.monotonic()
            result = work()
            took = time.monotonic() - started
            keep(run.results, device, section, name, result, took)
            logger.info("%s: measured in %.0f s", name, took)
    if not run.only:
        keep_whole(run.results, device, time.time() - psutil.Process().create_time())
    write_page(run.results, run.page)


def chosen(only: tuple[str, ...], known: tuple[str, ...]) -> tuple[str, ...]:
    """The parts to run, by default all but those on request. Raises `ConfigurationError` for an unknown name."""
    for name in only:
        if name not in known:
            [nearest] = difflib.get_close_matches(name, known, n=1, cutoff=0)
            raise ConfigurationError(f"only: there is no '{name}'; nearest: '{nearest}', all: {', '.join(known)}")
    return only or tuple(name for name in known if name not in ON_REQUEST)


def keep(directory: Path, device: Device, section: str, name: str, result: Any, took: float) -> None:
    """Put one result, and the seconds that it took, into the device's file."""
    results = results_of(directory, device)
    entry = result if section == "workflow" else {**getattr(results, section), name: result}
    took_by_part = {**results.took, name: took}
    results.model_copy(update={"device": device, "took": took_by_part, section: entry}).write(directory)


def keep_whole(directory: Path, device: Device, seconds: float) -> None:
    """Put the time of a command that ran everything into the device's file."""
    results_of(directory, device).model_copy(update={"whole_seconds": seconds}).write(directory)


def results_of(directory: Path, device: Device) -> Results:
    """The device's results so far."""
    earlier = next((found for found in read_results(directory) if found.device.slug == device.slug), None)
    return earlier or Results(device=device)


if __name__ == "__main__":
    run_step(Run, main)
